"""A cross-encoder: a network that reads query and document together and gives one score."""

import tempfile
from collections.abc import Sequence

import numpy as np
import pyarrow.fs as pafs
import torch
from numpy.typing import NDArray

from rayemb import storage
from rayemb.models import ModelError


class CrossEncoder:
    """A sequence classifier of `transformers` with one output, or two of which the second means "matches"."""

    def __init__(self, source: str, *, max_length: int = 256, batch_size: int = 64) -> None:
        """`source`: a directory, path or URI, with safetensors and a fast tokenizer.

        Raises ModelError if it holds no such network.
        """
        import transformers

        folder = _local(source)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.network = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            ).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"not a cross-encoder ({str(error).splitlines()[0]})", where=source) from error
        if self.network.config.num_labels > 2:
            raise ModelError(f"it tells {self.network.config.num_labels} classes apart, not one score", where=source)
        self.max_length, self.batch_size = max_length, batch_size

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores `(N,)` float32 of pairs: the logit, or the difference of the two."""
        parts = [np.zeros(0, np.float32)]
        with torch.inference_mode():
            for start in range(0, len(queries), self.batch_size):
                these = slice(start, start + self.batch_size)
                inputs = self.tokenizer(
                    list(queries[these]),
                    list(documents[these]),
                    padding=True,
                    truncation=True,
                    max_length=self.max_length,
                    return_tensors="pt",
                )
                logits = self.network(**inputs).logits.float()
                parts.append((logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).numpy())
        return np.concatenate(parts)


def _local(source: str) -> str:
    """A folder on this machine with the files of `source`, for a library that reads no URIs."""
    fs, path = storage.filesystem(source)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    folder = tempfile.mkdtemp(prefix="rayemb-cross-encoder-")
    pafs.copy_files(path, folder, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    return folder
