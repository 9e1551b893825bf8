"""A directory of files as one thing: made in memory, written where there is nothing, its main file last."""

import json
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from rayemb import storage
from rayemb.models.errors import ModelError

Files = dict[str, bytes]


def require_free(uri: str) -> None:
    """Raises ModelError if there is something at `uri` already: old files would mix with new ones."""
    if found := storage.list_files(uri):
        raise ModelError(
            f"there are {len(found)} files here already, the first is {found[0].rsplit('/', 1)[-1]}",
            where=uri,
            fix="give a new folder, or delete this one first",
        )


def publish(uri: str, files: Files, main: str) -> None:
    """Writes the files below `uri`, `main` last: who finds it finds all."""
    for name in sorted(files, key=lambda name: name == main):
        storage.write_bytes(storage.join(uri, name), files[name])


def as_json(document: Any) -> bytes:
    """A JSON document as the bytes of a file."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file that transformers reads too."""
    # Cloned: safetensors refuses tensors that share storage.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return bytes(save_tensors(plain, metadata={"format": "pt"}))


def parameters(tensors: dict[str, Tensor]) -> int:
    """How many numbers they hold."""
    return sum(tensor.numel() for tensor in tensors.values() if torch.is_floating_point(tensor))
