"""A model in the formats of others."""

from types import ModuleType
from typing import Literal

from rayemb.models.bundle import Model
from rayemb.models.errors import ModelError
from rayemb.models.interchange import onnx_graphs, sentence_transformers, tensors
from rayemb.models.interchange.directory import publish, require_free

ExportFormat = Literal["sentence-transformers", "safetensors", "onnx"]
FORMATS: dict[ExportFormat, ModuleType] = {
    "sentence-transformers": sentence_transformers,
    "safetensors": tensors,
    "onnx": onnx_graphs,
}


def export(model: Model, out: str, format: ExportFormat = "sentence-transformers") -> list[str]:
    """Writes the model into the new folder `out` (path or URI); gives the names of its files.

    `sentence-transformers`: the text tower as that library loads it. `safetensors`: the weights of both towers and what
    each tensor is. `onnx`: each tower as a graph. Nothing is written if it cannot be done.

    Raises ModelError if the format cannot express the model, or something is there already.
    """
    require_free(out)
    if model.network.config.text.context is not None and format != "safetensors":
        raise ModelError(
            f"{format} cannot express how texts beyond the trained positions are read",
            where="model.text.context",
            fix="export the model that it was made of",
        )
    kind = FORMATS[format]
    files = kind.files(model)
    publish(out, files, kind.MAIN)
    return sorted(files)
