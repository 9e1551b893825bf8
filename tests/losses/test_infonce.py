"""InfoNCE against loops over explicit pairs, torch's cross-entropy and closed forms."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, InfoNCEConfig
from tests.losses.common import FOUR, cosines, exact, gradients, vectors


def one_row(s: Tensor, w: Tensor, out: Tensor, scale: float, margin: float) -> float | None:
    """The definition for one anchor, in Python floats: cosines, weights of positives, candidates left out."""
    logits = {j: scale * (float(s[j]) - (margin if w[j] > 0 else 0.0)) for j in range(len(s)) if w[j] > 0 or not out[j]}
    weights = math.fsum(w.tolist())
    if not weights:
        return None
    total = math.log(math.fsum(math.exp(x) for x in logits.values()))
    return -math.fsum(float(w[j]) * (logits[j] - total) for j in logits) / weights


def by_loops(batch: Batch, weights: Tensor, config: InfoNCEConfig) -> float:
    """The mean over directions, each with a softmax of its own."""
    assert batch.documents is not None
    assert batch.keys is not None
    number = batch.queries.shape[0]
    parts = [batch.documents] if batch.negatives is None else [batch.documents, batch.negatives]
    s = cosines(batch.queries, torch.cat(parts))
    w, out = weights.clone(), torch.zeros(s.shape, dtype=torch.bool)
    for i in range(number):
        for j in range(number):
            if batch.keys[i] == batch.keys[j] and not weights[i, j]:
                w[i, j] = float(config.duplicates == "positive")
                out[i, j] = config.duplicates == "ignore"
    rows = []
    if "query_to_document" in config.directions:
        rows += [one_row(s[i], w[i], out[i], 1 / config.temperature, config.margin) for i in range(number)]
    if "document_to_query" in config.directions:
        rows += [one_row(s[:, j], w[:, j], out[:, j], 1 / config.temperature, config.margin) for j in range(number)]
    counted = [row for row in rows if row is not None]
    return math.fsum(counted) / max(len(counted), 1)


@given(
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from(["positive", "ignore", "negative"]),
    st.sampled_from([FOUR[:1], FOUR[1:2], FOUR[:2]]),
    st.booleans(),
)
def test_it_is_its_definition(
    rows: int, more: int, seed: int, margin: float, duplicates: str, directions: Any, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.eye(rows, rows + more, dtype=torch.float64)
    if weighted:
        weights = torch.rand(rows, rows + more, generator=generator, dtype=torch.float64)
        weights *= torch.rand(rows, rows + more, generator=generator) < 0.3
    batch = Batch(
        vectors(rows, seed=seed),
        vectors(rows, seed=seed + 1),
        negatives=vectors(more, seed=seed + 2) if more else None,
        keys=torch.randint(0, 4, (rows,), generator=generator),
        weights=weights if weighted else None,
    )
    config = {"temperature": 0.2, "margin": margin, "duplicates": duplicates, "directions": directions}
    expected = by_loops(batch, weights, from_mapping(InfoNCEConfig, config))
    assert exact(config)(batch).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 10_000), st.sampled_from(["positive", "ignore"]))
def test_the_four_blocks_are_one_softmax(rows: int, more: int, seed: int, duplicates: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 4, (rows,), generator=generator)
    owners = torch.randint(0, rows, (more,), generator=generator)
    q, d, n = vectors(rows, seed=seed), vectors(rows, seed=seed + 1), vectors(more, seed=seed + 2)
    batch = Batch(q, d, negatives=n, negative_rows=owners, keys=keys)
    losses = []
    for i in range(rows):
        same = [j for j in range(rows) if keys[j] == keys[i]] if duplicates == "positive" else [i]
        others = [j for j in range(rows) if keys[j] != keys[i]]
        qd, dq, qq, dd = (x[i].tolist() for x in (cosines(q, d), cosines(d, q), cosines(q, q), cosines(d, d)))
        qn, dn = cosines(q, n)[i].tolist(), cosines(d, n)[i].tolist()
        # The positives stand in the denominator once in either direction; nothing is compared with itself.
        total = [qd[j] for j in same + others] + [float(cosines(q, d)[j, i]) for j in same + others]
        total += [qq[j] for j in others] + [dd[j] for j in others]
        total += qn + [dn[k] for k in range(more) if owners[k] != i]
        assert dq[i] == pytest.approx(qd[i])
        pull = math.fsum(qd[j] for j in same) / len(same) / 0.2
        losses.append(math.log(math.fsum(math.exp(x / 0.2) for x in total)) - pull)
    loss = exact({"temperature": 0.2, "directions": FOUR, "partition": "joint", "duplicates": duplicates})
    assert loss(batch).item() == pytest.approx(math.fsum(losses) / rows, rel=1e-10)


def test_one_direction_is_torchs_cross_entropy() -> None:
    q, d, n = vectors(5), vectors(5, seed=1), vectors(7, seed=2)
    logits = cosines(q, torch.cat([d, n])) / 0.1
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    loss = exact({"temperature": 0.1, "directions": ["query_to_document"]})
    torch.testing.assert_close(loss(Batch(q, d, negatives=n)), expected, rtol=1e-12, atol=0)


def test_several_positives_are_the_mean_of_the_cross_entropies() -> None:
    q, d = vectors(1), vectors(6, seed=2)
    logits = (cosines(q, d) / 0.1).expand(3, -1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3, 4]))
    loss = exact({"temperature": 0.1, "directions": ["query_to_document"]})
    batch = Batch(q, d[:1], negatives=d[1:], weights=torch.tensor([[0.0, 1, 0, 1, 1, 0]]))
    torch.testing.assert_close(loss(batch), expected, rtol=1e-12, atol=0)


def test_closed_forms() -> None:
    # All vectors alike: log M, for one positive as for all of them (each holds 1 / M of the mass).
    same = torch.ones(4, 3, dtype=torch.float64)
    assert exact({})(Batch(same, same)).item() == pytest.approx(math.log(4))
    assert exact({})(Batch(same, same, keys=torch.zeros(4, dtype=torch.int64))).item() == pytest.approx(math.log(4))
    # Orthogonal pairs at temperature t: log(1 + (M - 1) exp(-1 / t)).
    axes = torch.eye(4, dtype=torch.float64)
    assert exact({"temperature": 0.5})(Batch(axes, axes)).item() == pytest.approx(math.log(1 + 3 * math.exp(-2)))


def test_an_ignored_candidate_might_as_well_not_be_there() -> None:
    q, d, n = vectors(3), vectors(3, seed=1), vectors(2, seed=2)
    config = {"duplicates": "ignore", "directions": ["query_to_document"]}
    batch = Batch(q, d, negatives=n, keys=torch.arange(3), negative_keys=torch.tensor([1, 7]))
    parts = []
    for i in range(3):
        negatives = torch.cat([d[torch.arange(3) != i], n[1:] if i == 1 else n])
        parts.append(exact(config)(Batch(q[[i]], d[[i]], negatives=negatives)).item())
    assert exact(config)(batch).item() == pytest.approx(math.fsum(parts) / 3, rel=1e-12)


def test_what_everyone_ignores_gets_no_gradient() -> None:
    keys = torch.tensor([[0, 9], [1, 9], [2, 9]])  # any equal column will do
    batch = Batch(vectors(3), vectors(3, seed=1), negatives=vectors(1, seed=2), keys=keys)
    found = gradients(exact({"duplicates": "ignore"}), replace(batch, negative_keys=torch.tensor([[7, 9]])))
    assert all(not gradient.any() for gradient in found.values())
    found = gradients(exact({"duplicates": "ignore"}), replace(batch, negative_keys=torch.tensor([[7, 8]])))
    assert all(gradient.any() for gradient in found.values())


def test_policies_for_duplicates() -> None:
    batch = Batch(vectors(4), vectors(4, seed=1), keys=torch.tensor([0, 0, 1, 2]))
    loss = {policy: exact({"duplicates": policy})(batch).item() for policy in ("positive", "ignore", "negative")}
    assert loss["ignore"] < loss["negative"]
    assert loss["positive"] != loss["negative"]
    assert loss["negative"] == exact({})(Batch(batch.queries, batch.documents)).item()


def test_a_margin_makes_it_harder() -> None:
    batch = Batch(vectors(4), vectors(4, seed=1))
    losses = [exact({"margin": margin})(batch).item() for margin in (0.0, 0.1, 0.3)]
    assert losses[0] < losses[1] < losses[2]


def test_swapping_the_sides_swaps_the_directions() -> None:
    q, d = vectors(5), vectors(5, seed=1)
    forward, backward = (exact({"directions": [direction]}) for direction in FOUR[:2])
    torch.testing.assert_close(forward(Batch(q, d)), backward(Batch(d, q)))
    torch.testing.assert_close(exact({})(Batch(q, d)), exact({})(Batch(d, q)))


def test_documents_seek_among_queries_only() -> None:
    q, d, n = vectors(5), vectors(5, seed=1), vectors(4, seed=2)
    loss = exact({"directions": ["document_to_query"]})
    assert torch.equal(loss(Batch(q, d, negatives=n)), loss(Batch(q, d)))


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"temperature": 0.005}, "(top)", "below min_temperature"),
        ({"temperature": 0.0}, "temperature", "greater than 0"),
        ({"directions": []}, "directions", "at least 1"),
        ({"directions": FOUR[:1] * 2}, "(top)", "directions repeat"),
        ({"directions": FOUR}, "(top)", "partition must be joint"),
        ({"directions": FOUR[1:], "partition": "joint"}, "(top)", "needs the direction query_to_document"),
        ({"duplicates": "both"}, "duplicates", "'positive', 'ignore' or 'negative'"),
        ({"margin": 2.0}, "margin", "less than 2"),
    ],
)
def test_a_config_that_makes_no_sense_says_where(config: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        from_mapping(InfoNCEConfig, config)
    assert error.value.problems[0][0] == key
