"""Models of others as ours."""

from typing import Any, Literal

import torch

from rayemb import storage
from rayemb.config import ConfigError, from_mapping
from rayemb.models.bundle import Model
from rayemb.models.errors import ModelError
from rayemb.models.interchange import reading
from rayemb.models.interchange.directory import require_free
from rayemb.models.pretrained import PretrainedText, read_mapping
from rayemb.models.two_tower import TwoTowerConfig

ImportPooling = Literal["mean", "cls", "last"]


def import_model(
    source: str,
    out: str,
    *,
    pooling: ImportPooling | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
) -> Model:
    """The model of a sentence-transformers or transformers directory `source`, saved in the new folder `out`.

    Its vectors are the source's, normalised. A plain transformers directory does not say how it is pooled: `pooling`
    does, by default the mean. `max_length`: tokens of a text at most, by default what the source says.

    Raises ModelError, naming it, for whatever rayemb does not have, and for pickles unless `allow_pickle`.
    """
    require_free(out)
    source = storage.normalise(source)
    kind, found = _read(source, pooling)
    architecture = read_mapping(found.network, "config.json")
    if "model_type" not in architecture:
        raise ModelError("config.json has no model_type: it is not of transformers", where=found.network)
    weights, digest = reading.weights_of(found.network, allow_pickle=allow_pickle)
    length = max_length or reading.length_of(found, architecture)
    tokenizer = reading.tokenizer_of(found, length)
    projection = found.projection
    width = architecture.get("hidden_size") or architecture.get("d_model") or architecture.get("dim")
    towers: dict[str, Any] = {
        "image": None,
        "dim": len(projection) if projection is not None else width,
        "projection": "none" if projection is None else "linear",
        "text": {"name": "transformers", "architecture": architecture, "pooling": {"name": found.pooling}},
        "tokenizer": {"name": "pretrained", "source": found.network, "max_length": length},
        "prompts": found.prompts,
    }
    try:
        model = Model.create(from_mapping(TwoTowerConfig, towers, source=source), tokenizer, seed=0)
    except ConfigError as error:
        raise ModelError(f"it cannot be described as a rayemb model: {error.what}", where=source) from error
    assert isinstance(model.network.text, PretrainedText)
    model.network.text.put(weights, found.network)
    if projection is not None:
        with torch.no_grad():
            model.network.text_projection.weight.copy_(projection)  # type: ignore[operator]
    imported: dict[str, Any] = {"format": kind, "sha256": digest}
    if found.other_prompts:
        imported["other_prompts"] = found.other_prompts
    model.info = {"imported": imported}
    if licence := reading.license_of(source):
        model.info["license"] = licence
    model.save(out)
    return model


def _read(source: str, pooling: ImportPooling | None) -> tuple[str, reading.Found]:
    if storage.exists(storage.join(source, "modules.json")):
        if pooling is not None:
            raise ModelError("the source says how it is pooled", where="--pooling", fix="leave it out")
        return "sentence-transformers", reading.of_sentence_transformers(source)
    if storage.exists(storage.join(source, "open_clip_config.json")):
        raise ModelError(
            "towers of open_clip have a class token and a norm before their blocks, which rayemb's have not",
            where=source,
            fix="import its text tower from a transformers directory (model_type clip_text_model)",
        )
    if storage.exists(storage.join(source, "config.json")):
        return "transformers", reading.of_transformers(source, pooling or "mean")
    raise ModelError("neither modules.json nor config.json is here", where=source, fix="give the folder of a model")
