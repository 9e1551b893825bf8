"""Any encoder of ours as a model of mteb (Muennighoff et al., 2023; extra `mteb`), for its tasks and leaderboards.

mteb is imported by what needs it alone: it takes seconds, and evaluations of our own do without.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayemb.errors import RayembError
from rayemb.evaluate.encoders import Encoder, ModelEncoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.tasks.vectors import image_vectors, text_vectors

TEXTS, IMAGE_BYTES = 4096, 64 << 20
"""What is given to an encoder at once: it sorts texts by length, and shares out what it has."""
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


class MtebEncoder:
    """An `Encoder` by mteb's `EncoderProtocol`: give it to `mteb.evaluate`.

    Args:
        encoder: what is judged. One text and one picture are encoded to learn its dimension and whether it takes
            pictures; if not, mteb leaves tasks of pictures to others.
        facts: fields of mteb's `ModelMeta` that nobody but you knows (languages, license, training_datasets, ...), or
            knows better; see `mteb_meta`.

    Queries are encoded as queries, documents and all else as documents: the model's own prompts apply, not those that
    mteb has for tasks. A text with a picture has the unit vector of the mean of both. `batch_size` of mteb's
    `encode_kwargs` is that of its loader; the encoder's own is set where it is opened.
    Raises EvaluateError where mteb is not installed.
    """

    def __init__(self, encoder: Encoder, **facts: Any) -> None:
        _imported()
        self.encoder = encoder
        self.mteb_model_meta = mteb_meta(encoder, **facts)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        precision: str | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Unit vectors `(N, D)` float32 of the rows of mteb's loader `inputs`: batches with `text`, `image`, or both.

        Raises EvaluateError for batches of neither, vectors that are not finite, and a `precision` that it has not.
        """
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # mteb needs it, too

        where = f"{task_metadata.name} ({hf_subset}, {hf_split})"
        if precision not in (None, "float32"):
            raise EvaluateError(f"vectors are float32, not {precision}", where=where, fix="leave `precision` out")
        side: Side = "query" if getattr(prompt_type, "value", prompt_type) == "query" else "text"
        parts, start = [], 0
        with tqdm(total=len(inputs.dataset), desc=where, unit="row", disable=not show_progress_bar) as bar:
            for texts, images in _windows(inputs, self.mteb_model_meta.modalities, where):
                parts.append(self._vectors(texts, images, side, where, start))
                start += len(parts[-1])
                bar.update(len(parts[-1]))
        return np.concatenate(parts) if parts else np.empty((0, self.mteb_model_meta.embed_dim), np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines `(N, M)` of vectors `(N, D)` and `(M, D)`, as a torch tensor."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines `(N,)` of pairs of vectors, each `(N, D)`, as a torch tensor."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)

    def close(self) -> None:
        """Gives back what the encoder holds, if it holds anything."""
        if hasattr(self.encoder, "close"):
            self.encoder.close()

    def _vectors(
        self, texts: Sequence[str], images: Sequence[bytes], side: Side, where: str, start: int
    ) -> NDArray[np.float32]:
        names = [f"row {start + n}" for n in range(max(len(texts), len(images)))]
        found = [text_vectors(self.encoder, texts, where, kind=side, names=names)] if texts else []
        found += [image_vectors(self.encoder, images, where, names)] if images else []
        if len(found) == 1:
            return found[0]
        mean = (found[0] + found[1]) / 2
        return np.asarray(mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12), np.float32)


def mteb_meta(encoder: Encoder, **facts: Any) -> Any:
    """mteb's `ModelMeta` of an encoder: what is known of it, `facts` where they say otherwise, None for the rest.

    The revision is the model's digest, so that mteb's cache of results never takes one model for another.
    Raises EvaluateError for facts that mteb does not take.
    """
    _imported()
    from mteb.models import ModelMeta
    from pydantic import ValidationError

    known = {"name": encoder.name, **_probed(encoder), **_of_a_model(encoder), **facts}
    if "/" not in known["name"]:  # mteb has organisation/model, and makes files of it
        known["name"] = "rayemb/" + re.sub(r"[^\w.-]", "-", known["name"])
    empty = dict.fromkeys(name for name, field in ModelMeta.model_fields.items() if field.is_required())
    try:
        return ModelMeta(
            **{
                **empty,
                "framework": [],
                "model_type": ["dense"],
                "revision": encoder.digest or None,
                "similarity_fn_name": "cosine",
                **known,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise EvaluateError(first["msg"], where=f"ModelMeta.{'.'.join(map(str, first['loc']))}") from error


def _imported() -> None:
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise EvaluateError(
            f"{error.name} is not installed", where="rayemb.evaluate.mteb", fix="pip install 'rayemb[mteb]'"
        ) from error


def _probed(encoder: Encoder) -> dict[str, Any]:
    """Dimension and modalities, as the encoder itself shows them."""
    modalities, dim = ["text"], encoder.texts(["a"]).shape[1]
    try:
        encoder.images([_png(Image.new("RGB", (8, 8)), "")])
        modalities.append("image")
    except RayembError:
        pass  # by its contract it takes none
    return {"embed_dim": dim, "modalities": modalities}


def _of_a_model(encoder: Encoder) -> dict[str, Any]:
    if not isinstance(encoder, ModelEncoder):
        return {}
    network, prompts = encoder.model.network, encoder.model.network.config.prompts
    weights = list(network.parameters())
    return {
        "framework": ["PyTorch"],
        "n_parameters": sum(each.numel() for each in weights),
        "memory_usage_mb": sum(each.numel() * each.element_size() for each in weights) / 2**20,
        "max_tokens": encoder.model.tokenizer.max_length,
        "use_instructions": bool(prompts.query or prompts.text),
    }


def _windows(inputs: Any, modalities: Sequence[str], where: str) -> Iterator[tuple[list[str], list[bytes]]]:
    """Texts and pictures (either may be none) of several batches of a loader together."""
    texts: list[str] = []
    images: list[bytes] = []
    size = 0
    for batch in inputs:
        if not any(name in batch for name in modalities):
            raise EvaluateError(f"the batches have {', '.join(batch)}, not {' or '.join(modalities)}", where=where)
        if "text" in batch:
            texts += _strings(batch, where)
        if "image" in batch and "image" in modalities:
            pictures = [_png(image, where) for image in batch["image"]]
            images, size = images + pictures, size + sum(map(len, pictures))
        if len(texts) >= TEXTS or size >= IMAGE_BYTES:
            yield texts, images
            texts, images, size = [], [], 0
    if texts or images:
        yield texts, images


def _strings(batch: Mapping[str, Any], where: str) -> list[str]:
    found = list(batch["text"])
    for text in found:
        if not isinstance(text, str):
            raise EvaluateError(f"a text is a {type(text).__name__}", where=where)
    return found


def _png(image: Any, where: str) -> bytes:
    """The picture as a file, without loss: an encoder reads it as it reads any other."""
    if not isinstance(image, Image.Image):
        raise EvaluateError(f"a picture is a {type(image).__name__}, not one of PIL", where=where)
    out = io.BytesIO()
    plain = image if image.mode in _PNG_MODES else image.convert("RGB")
    plain.save(out, "PNG", compress_level=1)
    return out.getvalue()
