"""A smaller model out of a larger one: the first layers of its text tower, the first coordinates of its vectors."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rayemb.models.errors import ModelError
from rayemb.models.two_tower import TwoTower

if TYPE_CHECKING:
    from rayemb.models.bundle import Model

OFF = 1e-3  # of unit vectors, beyond rounding


def cut(model: "Model", layers: int | None = None, dim: int | None = None) -> "Model":
    """The model with the first `layers` of its text tower and the first `dim` coordinates; null: all of them.

    Its vectors are those of the whole model after so many layers, cut to `dim` and normalised: a model that was trained
    for that (losses starbucks, matryoshka) loses little. The image tower keeps its depth. `info` says where it is from.

    Raises ModelError for a size that the model does not have, or a tower that gives other states when it is cut.
    """
    network, config = model.network, model.network.config
    layers, dim = layers or network.text.layers, dim or config.dim
    for name, wanted, most in (("layers", layers, network.text.layers), ("dim", dim, config.dim)):
        if not 1 <= wanted <= most:
            raise ModelError(f"{wanted} of {most} cannot be had", where=name, fix=f"give 1 to {most}")
    # Without projections a shorter vector needs one all the same: the one that takes the first coordinates.
    projection = "linear" if dim < config.dim else config.projection
    towers = config.resolved().model_copy(
        update={"dim": dim, "projection": projection, "text": config.text.cut(layers)}
    )
    small = TwoTower(towers, model.tokenizer.vocab_size)
    there = network.state_dict()
    for name in ("text_projection", "image_projection"):
        part = getattr(network, name)
        if isinstance(part, nn.Identity):
            width = network.text.features if name == "text_projection" else network.image.features  # type: ignore[union-attr]
            there[f"{name}.weight"] = torch.eye(width)
        if part is not None and projection == "linear":
            there[f"{name}.weight"] = there[f"{name}.weight"][:dim]
    missing = sorted(set(small.state_dict()) - set(there))
    if missing:
        raise ModelError(f"the cut tower has weights that the whole one has not: {missing[0]}", where="model.text")
    small.load_state_dict(
        {
            # What is of another shape is a head over all layers (ESM has one) that nothing here reads: see `_check`.
            name: there[name] if there[name].shape == value.shape else torch.zeros_like(value)
            for name, value in small.state_dict().items()
        }
    )
    _check(network, small.eval(), layers, dim)
    info = {**model.info, "cut": {"digest": model.digest, "layers": layers, "dim": dim}}
    return type(model)(small, model.tokenizer, info)


@torch.inference_mode()
def _check(whole: TwoTower, small: TwoTower, layers: int, dim: int) -> None:
    """Raises ModelError if the small one has other vectors than the whole one after so many layers."""
    device = next(whole.parameters()).device
    high = whole.text.embedding.num_embeddings
    length = min(6, whole.config.tokenizer.max_length)
    ids = torch.randint(0, high, (3, length), generator=torch.Generator().manual_seed(0))
    ids[1:, length // 2 :] = -1
    training = whole.training
    if layers == whole.text.layers:
        vectors = whole.eval().encode_text(ids.to(device)).cpu()
    else:
        vectors = whole.eval().encode_text_exits(ids.to(device), None, [layers])[0].cpu()
    whole.train(training)
    expected: Tensor = nn.functional.normalize(vectors[:, :dim], dim=-1)
    off = float((small.encode_text(ids) - expected).abs().max())
    if not off < OFF:
        raise ModelError(
            f"after {layers} layers the whole tower has other states than one of {layers} layers (off by {off:.2g})",
            where="model.text",
            fix="networks of transformers with a norm before each part and a last one of an unknown name cannot be cut",
        )
