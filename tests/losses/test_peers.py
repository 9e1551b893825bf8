"""The same numbers and gradients as the released losses of other libraries, in one process and fp64.

sentence-transformers 6.2, open_clip 3.3, pytorch-metric-learning 2.9. Where they differ from us on purpose, they are
not here: open_clip's gradients over several processes, a queue that is filled before the loss.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml
import sentence_transformers.sentence_transformer.losses as st
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import gist_embed as st_gist_embed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rayemb.losses import Batch, Loss
from tests.losses.common import FOUR, exact, vectors

THEIRS = {
    "query_to_document": "query_to_doc",
    "document_to_query": "doc_to_query",
    "query_to_query": "query_to_query",
    "document_to_document": "doc_to_doc",
}
MULTIPLE_NEGATIVES = {"temperature": 0.05, "directions": FOUR[:1]}
SYMMETRIC = {"temperature": 0.05, "directions": FOUR[:2]}


def open_clip() -> Any:
    """open_clip/loss.py by its path: the package itself imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    spec = importlib.util.spec_from_file_location(
        "open_clip_loss", Path(package.submodule_search_locations[0]) / "loss.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def columns(number: int, rows: int = 7, dim: int = 6) -> list[Tensor]:
    """Queries, documents and one hard negative per query after another, as sentence-transformers has them."""
    return [vectors(rows, dim, seed=seed) for seed in range(number)]


def batch_of(given: list[Tensor], **fields: Any) -> Batch:
    rows = given[0].shape[0]
    if len(given) == 2:
        return Batch(given[0], given[1], **fields)
    owners = torch.arange(rows).repeat(len(given) - 2)
    return Batch(given[0], given[1], negatives=torch.cat(given[2:]), negative_rows=owners, **fields)


def agree(
    loss: Loss,
    ours: Callable[[list[Tensor]], Batch],
    theirs: Callable[[list[Tensor]], Tensor],
    given: list[Tensor],
    number: int | None = None,
) -> None:
    """Values, and gradients of all columns (the first `number`)."""
    mine, other = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    value, expected = loss(ours(mine)), theirs(other)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    value.backward()
    expected.backward()
    for left, right in list(zip(mine, other, strict=True))[:number]:
        assert left.grad is not None
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-14)


# -- sentence-transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (MULTIPLE_NEGATIVES, {}),
        (SYMMETRIC, {"partition_mode": "per_direction"}),
        ({"temperature": 0.05, "directions": FOUR, "partition": "joint"}, {}),
        ({"temperature": 0.05, "directions": (FOUR[0], FOUR[2]), "partition": "joint"}, {}),
        ({"temperature": 0.05, "directions": (FOUR[0], FOUR[3]), "partition": "joint"}, {}),
    ],
)
def test_multiple_negatives_ranking(negatives: int, config: dict[str, Any], options: dict[str, Any]) -> None:
    directions = tuple(THEIRS[name] for name in config["directions"])
    peer = st.MultipleNegativesRankingLoss(None, directions=directions, **options)
    agree(exact(config), batch_of, lambda x: peer.compute_loss_from_embeddings(x, None), columns(2 + negatives))


@pytest.mark.parametrize(("negatives", "mode"), [(0, "in_batch_negatives"), (0, "all_negatives"), (2, "all_negatives")])
def test_hardness(negatives: int, mode: Any) -> None:
    peer = st.MultipleNegativesRankingLoss(None, hardness_mode=mode, hardness_strength=9.0)
    loss = exact({"name": "rzenembed", "temperature": 0.05, "false_negative_above": 1})
    agree(loss, batch_of, lambda x: peer.compute_loss_from_embeddings(x, None), columns(2 + negatives))


class Indexable(nn.Module):
    def __getitem__(self, index: int) -> nn.Module:
        return self


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("size", [3, 100])
@pytest.mark.parametrize("config", [MULTIPLE_NEGATIVES, SYMMETRIC])
def test_cached_multiple_negatives_ranking(negatives: int, size: int, config: dict[str, Any]) -> None:
    peer = st.CachedMultipleNegativesRankingLoss(
        Indexable(),
        mini_batch_size=size,
        directions=tuple(THEIRS[name] for name in config["directions"]),
        partition_mode="per_direction" if config is SYMMETRIC else "joint",
    )
    agree(
        exact(config),
        batch_of,
        lambda given: peer.calculate_loss([list(x.split(size)) for x in given]),
        columns(2 + negatives),
    )


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_multiple_negatives_symmetric_ranking(negatives: int) -> None:
    peer = st.MultipleNegativesSymmetricRankingLoss(None)
    agree(exact(SYMMETRIC), batch_of, lambda x: peer.compute_loss_from_embeddings(x, None), columns(2 + negatives))


class Tokenizer(PreTrainedTokenizerBase):
    def __init__(self) -> None:
        pass

    def get_vocab(self) -> dict[str, int]:
        return {}


class Encoder(nn.Module):
    """As much of a model as GISTEmbedLoss looks at."""

    max_seq_length = 1

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()


@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize(("margin", "strategy"), [(0.0, "absolute"), (0.2, "absolute"), (0.2, "relative")])
@pytest.mark.parametrize(("queries", "documents"), [(True, True), (False, True), (True, False), (False, False)])
def test_gist_embed(
    monkeypatch: pytest.MonkeyPatch,
    negatives: int,
    margin: float,
    strategy: Any,
    queries: bool,
    documents: bool,
) -> None:
    model, guide = Encoder(), Encoder()
    peer = st.GISTEmbedLoss(
        model,
        guide,
        margin=margin,
        margin_strategy=strategy,
        contrast_anchors=queries,
        contrast_positives=documents,
    )
    monkeypatch.setattr(st_gist_embed, "embed_columns", lambda of, found: [x[of is guide] for x in found])
    guides = [vectors(7, 4, seed=10 + k) for k in range(2 + negatives)]
    config = {"margin": margin, "margin_strategy": strategy, "contrast_queries": queries}
    loss = exact({"name": "gist_embed", **config, "contrast_documents": documents})
    agree(
        loss,
        lambda x: batch_of(x, guide=batch_of(guides)),
        lambda x: peer([dict(enumerate(pair)) for pair in zip(x, guides, strict=True)], None),
        columns(2 + negatives),
    )


class Lookup(nn.Module):
    """A model whose texts are vectors already."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["text"]}

    def get_embedding_dimension(self) -> int:
        return 6


@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 0.1]])
def test_matryoshka(negatives: int, weights: list[float] | None) -> None:
    model = Lookup()
    peer = st.MatryoshkaLoss(model, st.MultipleNegativesRankingLoss(model), [6, 4, 2], weights)
    loss = exact({"name": "matryoshka", "dims": [6, 4, 2], "weights": weights, "loss": MULTIPLE_NEGATIVES})
    agree(loss, batch_of, lambda x: peer([{"text": column} for column in x], None), columns(2 + negatives))


# -- open_clip -------------------------------------------------------------------------------------------------


def normalised(given: list[Tensor]) -> list[Tensor]:
    return [F.normalize(x, dim=1) for x in given]


def test_clip_and_the_gradient_of_its_scale() -> None:
    log_scale = torch.tensor(-math.log(0.07), dtype=torch.float64, requires_grad=True)
    loss, peer = exact({}), open_clip().ClipLoss()
    agree(loss, batch_of, lambda x: peer(*normalised(x), log_scale.exp()), columns(2))
    torch.testing.assert_close(loss.scale.log_scale.grad[0], log_scale.grad, rtol=1e-10, atol=0)


def test_siglip_and_the_gradients_of_its_scale_and_bias() -> None:
    log_scale = torch.tensor(math.log(10), dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    loss, peer = exact({"name": "siglip"}), open_clip().SigLipLoss()
    agree(loss, batch_of, lambda x: peer(*normalised(x), log_scale.exp(), bias), columns(2))
    for name, theirs in (("scale.log_scale", log_scale), ("bias", bias)):
        ours = loss.get_parameter(name).grad
        assert ours is not None
        torch.testing.assert_close(ours[0], theirs.grad, rtol=1e-10, atol=0)


# -- pytorch-metric-learning -----------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2])


def test_nt_xent_and_one_way_infonce() -> None:
    two = pml.SelfSupervisedLoss(pml.NTXentLoss(temperature=0.1))
    agree(exact({"name": "nt_xent"}), batch_of, lambda x: two(*x), columns(2))
    one = pml.SelfSupervisedLoss(pml.NTXentLoss(temperature=0.05), symmetric=False)
    agree(exact(MULTIPLE_NEGATIVES), batch_of, lambda x: one(*x), columns(2))


@pytest.mark.parametrize("labels", [LABELS, torch.tensor([0, 0, 0, 1, 1, 2, 3]), torch.tensor([0, 0, 1, 2, 3, 4, 5])])
def test_supcon_singletons_too(labels: Tensor) -> None:
    peer = pml.SupConLoss(temperature=0.1)
    loss = exact({"name": "supcon"})
    agree(loss, lambda x: Batch(x[0], keys=labels), lambda x: peer(x[0], labels), columns(1))
    agree(
        loss,
        lambda x: Batch(x[0], x[1], keys=labels),
        lambda x: peer(torch.cat(x), torch.cat([labels, labels])),
        columns(2),
    )


@pytest.mark.parametrize(
    ("peer", "fields"),
    [
        (pml.CosFaceLoss(3, 6, margin=0.35, scale=64), {"margin": 0.35}),
        # Its margin is in degrees.
        (pml.ArcFaceLoss(3, 6, margin=28.6, scale=64), {"angular_margin": math.radians(28.6)}),
        (pml.ArcFaceLoss(3, 6, margin=60, scale=16), {"angular_margin": math.radians(60), "temperature": 1 / 16}),
    ],
)
def test_margin_softmax(peer: Any, fields: dict[str, Any]) -> None:
    loss = exact({"name": "class_proxies", "classes": 3, **fields})
    proxies = loss.get_parameter("proxies")
    with torch.no_grad():
        peer.W = nn.Parameter(proxies.detach().T.clone())
    given = columns(1)
    given[0][:2] = 0.1 * given[0][:2] - proxies.detach()[LABELS[:2]]  # beyond pi - margin of their classes
    agree(loss, lambda x: Batch(x[0], labels=LABELS), lambda x: peer(x[0], LABELS), given)
    torch.testing.assert_close(proxies.grad, peer.W.grad.T, rtol=1e-9, atol=1e-14)


def test_cross_batch_memory_first_step() -> None:
    labels = torch.arange(7)
    peer = pml.CrossBatchMemory(pml.NTXentLoss(temperature=0.1), 6, memory_size=20)
    agree(
        exact({"name": "cross_batch_memory", "loss": {"name": "nt_xent"}}),
        batch_of,
        lambda x: peer(torch.cat(x), torch.cat([labels, labels])),
        columns(2),
        number=0,  # its queue holds copies of this batch too: candidates get no gradient
    )


def test_cross_batch_memory_of_documents_at_every_step() -> None:
    # Theirs holds the batch's own documents, put in before the loss, and as many older ones as ours.
    peer = pml.CrossBatchMemory(pml.NTXentLoss(temperature=0.05), 6, memory_size=14)
    loss = exact({"name": "cross_batch_memory", "size": 7, "loss": MULTIPLE_NEGATIVES})
    queued = torch.arange(14) >= 7
    for step in range(5):
        labels = torch.arange(7) + 7 * step
        agree(
            loss,
            batch_of,
            lambda x, labels=labels: peer(torch.cat(x), torch.cat([labels, labels]), enqueue_mask=queued),
            [vectors(7, seed=100 * step), vectors(7, seed=100 * step + 1)],
            number=1,
        )
