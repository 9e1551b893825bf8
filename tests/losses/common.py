"""What the tests of the losses share: vectors, losses in fp64, similarities taken by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from rayemb.losses import AnyLoss, Batch, Loss
from rayemb.losses.temperature import Temperature

FOUR = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")

# One of every loss, and of those options that are losses of their own.
EVERY: dict[str, dict[str, Any]] = {
    "infonce": {},
    "gte": {"name": "infonce", "directions": FOUR, "partition": "joint", "margin": 0.1},
    "nt_xent": {"name": "nt_xent"},
    "supcon": {"name": "supcon"},
    "siglip": {"name": "siglip", "bias": -2.0},
    "decoupled": {"name": "decoupled"},
    "debiased": {"name": "debiased"},
    "gist_embed": {"name": "gist_embed", "temperature": 0.1},
    "rzenembed": {"name": "rzenembed", "detach_hardness": False, "tasks": 2, "temperature": 0.1, "hardness": 3},
    "class_proxies": {
        "name": "class_proxies",
        "classes": 3,
        "margin": 0.1,
        "angular_margin": 0.2,
        "temperature": 0.1,
    },
    "focal": {"name": "focal", "loss": {"duplicates": "ignore"}},
    "progressive": {"name": "progressive", "loss": {"temperature": 0.2}},
    "matryoshka": {"name": "matryoshka", "dims": (3, 6), "weights": (0.5, 1.0), "loss": {"temperature": 0.2}},
    # Its divergences stop gradients, which finite differences do not know: see test_starbucks.py.
    "starbucks": {"name": "starbucks", "sizes": [[2, 3], [4, 6]], "divergence": 0.0, "loss": {"temperature": 0.2}},
    "cross_batch_memory": {"name": "cross_batch_memory", "size": 4, "loss": {"directions": ["query_to_document"]}},
}


def vectors(rows: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random vectors of random lengths."""
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def built(config: dict[str, Any], dim: int = 6) -> Loss:
    """The loss of a config as it would stand in YAML."""
    loss: Loss = TypeAdapter(AnyLoss).validate_python(config).build(dim)
    return loss


def exact(config: dict[str, Any], dim: int = 6) -> Loss:
    """The same in fp64, with the temperature of the config to all its digits."""
    loss = built(config, dim).double()
    for part in loss.modules():
        if isinstance(getattr(part, "scale", None), Temperature):
            with torch.no_grad():
                part.scale.log_scale.fill_(-math.log(part.config.temperature))
    return loss


def everything(rows: int, negatives: int = 3, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """A batch with all that any loss reads."""
    some = negatives if rows else 0
    small = Batch(
        vectors(rows, dim, seed + 6, dtype),
        vectors(rows, dim, seed + 7, dtype),
        negatives=vectors(some, dim, seed + 8, dtype),
        keys=torch.arange(rows) // 2,
    )
    return Batch(
        vectors(rows, dim, seed, dtype),
        vectors(rows, dim, seed + 1, dtype),
        negatives=vectors(some, dim, seed + 2, dtype),
        negative_rows=torch.arange(some) % max(rows, 1),
        keys=torch.arange(rows) // 2,
        labels=torch.arange(rows) % 3,
        tasks=torch.arange(rows) % 2,
        guide=Batch(vectors(rows, 5, seed + 3), vectors(rows, 5, seed + 4), vectors(some, 5, seed + 5)),
        exits={2: small},
        progress=0.3,
    )


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its vectors changed, after fewer layers too."""
    parts = {name: getattr(batch, name) for name in ("queries", "documents", "negatives")}
    exits = {layers: changed(small, change) for layers, small in batch.exits.items()}
    return replace(batch, exits=exits, **{name: change(rows) for name, rows in parts.items() if rows is not None})


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """`(n, m)` in fp64, with torch's own cosine."""
    return F.cosine_similarity(left.double()[:, None], right.double()[None], dim=2)


def with_cosines(*values: float) -> tuple[Tensor, Tensor]:
    """One query, and a document of each cosine to it."""
    rows = torch.zeros(len(values), len(values) + 1, dtype=torch.float64)
    for i, value in enumerate(values):
        rows[i, 0], rows[i, i + 1] = value, math.sqrt(1 - value * value)
    return torch.eye(1, len(values) + 1, dtype=torch.float64), rows


def with_gram(gram: list[list[float]]) -> Tensor:
    """Vectors of these products."""
    return torch.linalg.cholesky(torch.tensor(gram, dtype=torch.float64))


def surprise(positive: float, negatives: list[float]) -> float:
    """`-log p` of one logit among others."""
    return math.log1p(math.fsum(math.exp(x - positive) for x in negatives))


def gradients(loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """The gradients of a batch's vectors and of a loss's parameters, from one backward."""
    leaves = {
        name: getattr(batch, name).detach().clone().requires_grad_()
        for name in ("queries", "documents", "negatives")
        if getattr(batch, name) is not None
    }
    loss.zero_grad()
    value = loss(replace(batch, **leaves))
    if value.requires_grad:
        value.backward()
    leaves |= {name: p for name, p in loss.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
