"""GISTEmbed against card S188's numbers and loops; the released one is in test_peers.py."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayemb.losses import Batch
from rayemb.parallel import ExchangeError
from tests.losses.common import cosines, exact, gradients, vectors, with_gram

GIST: dict[str, Any] = {"name": "gist_embed", "temperature": 0.5}
FAR = torch.eye(6, dtype=torch.float64)


def card_batch(guide: Batch) -> Batch:
    """Card S188's blocks at temperature 1: q-p [[.9, .5], [.4, .8]], q-q .3, p-p .2.

    No vectors have just these cosines (the Gram matrix is indefinite): they have half of them, at temperature 0.5.
    """
    gram = torch.tensor([[2, 0.3, 0.9, 0.5], [0.3, 2, 0.4, 0.8], [0.9, 0.4, 2, 0.2], [0.5, 0.8, 0.2, 2]]) / 2
    rows = with_gram(gram.tolist())
    return Batch(rows[:2], rows[2:], guide=guide)


def by_loops(batch: Batch, margin: float, relative: bool, queries: bool, documents: bool) -> float:
    """The four blocks at temperature 0.5, entry by entry."""
    guide = batch.guide
    assert guide is not None
    assert batch.documents is not None
    assert guide.documents is not None
    q, d, gq, gd = batch.queries, batch.documents, guide.queries, guide.documents
    blocks = [(cosines(q, d), cosines(gq, gd), False)]
    if batch.negatives is not None and guide.negatives is not None:
        blocks.append((cosines(q, batch.negatives), cosines(gq, guide.negatives), False))
    blocks += [(cosines(q, q), cosines(gq, gq), True)] if queries else []
    blocks += [(cosines(d, d), cosines(gd, gd), True)] if documents else []
    losses = []
    for i in range(len(q)):
        own = float(blocks[0][1][i, i])
        above = own - margin * (abs(own) if relative else 1)
        kept = [float(blocks[0][0][i, i])]
        for at, (s, g, itself) in enumerate(blocks):
            for j in range(s.shape[1]):
                left_out = g[i, j] > above or (i == j and (itself or at == 0))
                kept += [] if left_out else [float(s[i, j])]
        losses.append(math.log(math.fsum(math.exp(x / 0.5) for x in kept)) - kept[0] / 0.5)
    return math.fsum(losses) / len(losses)


def test_the_cards_numbers() -> None:
    nothing = card_batch(Batch(FAR[:2], FAR[:2]))
    assert exact(GIST)(nothing).item() == pytest.approx(1.01889, abs=1e-5)
    # A guide that finds p2 closer to q1 (.6) than p1 (.5).
    guide = with_gram([[1, 0, 0.5, 0.6], [0, 1, 0, 0.7], [0.5, 0, 1, 0], [0.6, 0.7, 0, 1]])
    assert exact(GIST)(card_batch(Batch(guide[:2], guide[2:]))).item() == pytest.approx(0.87717, abs=1e-5)


@given(
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 0.2]),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_its_definition(
    rows: int, with_negatives: bool, queries: bool, documents: bool, margin: float, relative: bool, seed: int
) -> None:
    q, d, n, gq, gd, gn = (vectors(rows, 4, seed=6 * seed + k) for k in range(6))
    batch = Batch(q, d, guide=Batch(gq, gd))
    if with_negatives:
        batch = Batch(q, d, negatives=n, guide=Batch(gq, gd, negatives=gn))
    strategy = "relative" if relative else "absolute"
    config = {**GIST, "margin": margin, "margin_strategy": strategy}
    loss = exact({**config, "contrast_queries": queries, "contrast_documents": documents}, dim=4)
    assert loss(batch).item() == pytest.approx(by_loops(batch, margin, relative, queries, documents), rel=1e-10)


@pytest.mark.parametrize("dim", [3, 64, 768, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guide_that_finds_all_texts_alike_vetoes_nothing_but_the_texts_themselves(
    dim: int, dtype: torch.dtype
) -> None:
    alike = vectors(1, dim, dtype=dtype).expand(2, dim)
    assert exact(GIST)(card_batch(Batch(alike, alike.clone()))).item() == pytest.approx(1.01889, abs=1e-5)
    batch = replace(card_batch(Batch(alike, alike.clone(), negatives=alike)), negatives=vectors(2, 4))
    unlike = replace(batch, guide=Batch(FAR[:2], FAR[:2], negatives=FAR[2:4]))
    assert exact(GIST)(batch).item() == exact(GIST)(unlike).item()


def test_a_guide_for_which_everything_is_closer_leaves_nothing_to_learn() -> None:
    rows = vectors(1, 5).expand(3, 5)
    batch = Batch(vectors(3), vectors(3, seed=1), negatives=vectors(3, seed=2))
    # Own pairs are at -1, queries, documents and hard negatives at 1; equal keys take out the other documents.
    batch = replace(batch, guide=Batch(rows, -rows, negatives=rows), keys=torch.zeros(3, dtype=torch.int64))
    assert exact(GIST)(batch).item() == 0
    assert not any(gradient.any() for gradient in gradients(exact(GIST), batch).values())


def test_what_is_vetoed_gets_no_gradient() -> None:
    # The guide finds the query at .6 from its document, at .8 from one hard negative and at -.8 from the other.
    guide = torch.tensor([[0.6, 0.8, 0.0], [1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    batch = Batch(vectors(1), vectors(1, seed=1), negatives=vectors(2, seed=2))
    twice = Batch(guide[:1], guide[1:2], negatives=torch.stack([guide[2], -guide[2]]))
    found = gradients(exact(GIST), replace(batch, guide=twice))
    assert not found["negatives"][0].any()
    assert found["negatives"][1].any()


def test_a_margin_never_takes_the_own_document_out() -> None:
    batch = card_batch(Batch(FAR[:2], FAR[:2]))
    value = exact({**GIST, "margin": 1.0})(batch)  # threshold 0: only the own documents are above
    assert value.item() == pytest.approx(1.01889, abs=1e-5)


def test_with_a_guide_that_vetoes_nothing_and_one_block_it_is_infonce() -> None:
    batch = Batch(vectors(6), vectors(6, seed=1), negatives=vectors(6, seed=2))
    batch = replace(batch, guide=Batch(FAR, FAR, negatives=-FAR))
    config = {"temperature": 0.3, "learnable_temperature": False}
    loss = exact({"name": "gist_embed", **config, "contrast_queries": False, "contrast_documents": False})
    plain = exact({**config, "directions": ["query_to_document"]})
    assert torch.equal(loss(batch), plain(batch))


def test_equal_keys_are_left_out_as_well() -> None:
    batch = replace(card_batch(Batch(FAR[:2], FAR[:2])), keys=torch.tensor([5, 5]))
    assert exact(GIST)(batch).item() == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(FAR, FAR), "guide's vectors of queries and documents"),
        (Batch(FAR, FAR, guide=Batch(FAR)), "guide's vectors of queries and documents"),
        (Batch(FAR, FAR, guide=Batch(FAR[:5], FAR[:5])), "the guide's queries are not the batch's"),
        (Batch(FAR, FAR, negatives=FAR, guide=Batch(FAR, FAR)), "the guide's negatives are not the batch's"),
        (Batch(FAR, FAR, memory=FAR, guide=Batch(FAR, FAR)), "use it without a memory"),
    ],
)
def test_a_batch_it_cannot_use(batch: Batch, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        exact(GIST)(batch)
