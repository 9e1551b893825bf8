"""Cross-batch memory against a queue in plain Python; the released one is in test_peers.py."""

import math
from collections import deque
from typing import Any

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, CrossBatchMemoryConfig
from rayemb.parallel import ExchangeError
from tests.losses.common import cosines, exact, gradients, surprise, vectors

INNER: dict[str, Any] = {"temperature": 0.2, "directions": ["query_to_document"], "duplicates": "ignore"}


def of(size: int, **loss: Any) -> dict[str, Any]:
    return {"name": "cross_batch_memory", "size": size, "loss": {**INNER, **loss}}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("with_keys", [True, False])
def test_the_last_documents_are_further_negatives(size: int, with_keys: bool) -> None:
    loss, queue = exact(of(size)), deque[tuple[torch.Tensor, int]](maxlen=size)
    for step, rows in enumerate([3, 4, 0, 3, 2, 5]):
        q, d = vectors(rows, seed=2 * step), vectors(rows, seed=2 * step + 1)
        keys = torch.arange(rows) + 2 * step
        expected = []
        for i in range(rows):
            found = [(d[j], int(keys[j])) for j in range(rows) if j != i] + list(queue)
            negatives = [row for row, key in found if not with_keys or key != int(keys[i])]
            s = cosines(q[[i]], torch.stack([d[i], *negatives]))[0] / 0.2
            expected.append(surprise(float(s[0]), s[1:].tolist()))
        value = loss(Batch(q, d, keys=keys if with_keys else None)).item()
        assert value == pytest.approx(math.fsum(expected) / max(rows, 1), rel=1e-6, abs=1e-12)
        queue.extend(zip(d, keys.tolist(), strict=True))


def test_the_first_step_is_the_plain_loss_gradients_too() -> None:
    batch = Batch(vectors(4), vectors(4, seed=1))
    for inner in (INNER, {"name": "nt_xent"}, {"name": "siglip"}, {"name": "rzenembed"}):
        loss, plain = exact({"name": "cross_batch_memory", "loss": inner}), exact(inner)
        found, expected = gradients(loss, batch), gradients(plain, batch)
        assert torch.equal(exact({"name": "cross_batch_memory", "loss": inner})(batch), plain(batch))
        for name in ("queries", "documents"):
            assert torch.equal(found[name], expected[name])


def test_what_is_remembered_has_no_gradient_and_is_a_copy() -> None:
    loss = exact(of(8))
    first = Batch(vectors(3).requires_grad_(), vectors(3, seed=1).requires_grad_())
    value = loss(first)
    second = loss(Batch(vectors(3, seed=2), vectors(3, seed=3).requires_grad_()))
    value.backward()  # after the queue has been written to
    before = [x.grad.clone() for x in (first.queries, first.documents) if x is not None and x.grad is not None]
    second.backward()
    after = [x.grad for x in (first.queries, first.documents) if x is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if b is not None)
    assert len(before) == 2


def test_the_queue_is_in_the_checkpoint() -> None:
    loss, again = exact(of(5)), exact(of(5))
    for step in range(3):
        loss(Batch(vectors(4, seed=step), vectors(4, seed=step + 50), keys=torch.arange(4)))
    again.load_state_dict(loss.state_dict())
    batch = Batch(vectors(4, seed=9), vectors(4, seed=10), keys=torch.arange(4))
    for _ in range(2):
        assert torch.equal(again(batch), loss(batch))


def test_vectors_are_remembered_by_their_direction() -> None:
    short, long = exact(of(8)), exact(of(8))
    documents, batch = vectors(4, seed=1), Batch(vectors(4, seed=2), vectors(4, seed=3))
    short(Batch(vectors(4), documents))
    long(Batch(vectors(4), documents * 100))
    torch.testing.assert_close(short(batch), long(batch))
    torch.testing.assert_close(long.get_buffer("vectors").norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_16_bit_vectors_meet_their_own_kind() -> None:
    loss = exact(of(8)).float()
    for step in range(2):
        rows = [vectors(4, seed=2 * step + k, dtype=torch.bfloat16).requires_grad_() for k in range(2)]
        loss(Batch(rows[0], rows[1])).backward()
        assert rows[0].grad is not None
        assert rows[0].grad.dtype == torch.bfloat16
        assert rows[0].grad.isfinite().all()


def test_prefixes_of_the_memory_are_those_of_its_vectors() -> None:
    config = {"name": "cross_batch_memory", "size": 6, "loss": {"name": "matryoshka", "dims": [2, 6], "loss": INNER}}
    loss = exact(config)
    old, batch = vectors(3, seed=1), Batch(vectors(3, seed=2), vectors(3, seed=3))
    loss(Batch(vectors(3), old))
    parts = []
    for dim in (2, 6):
        s = cosines(batch.queries[:, :dim], torch.cat([batch.documents, old])[:, :dim]) / 0.2  # type: ignore[list-item]
        parts.append(torch.nn.functional.cross_entropy(s, torch.arange(3)).item())
    assert loss(batch).item() == pytest.approx(sum(parts), rel=1e-6)


def test_a_step_that_is_refused_is_not_remembered() -> None:
    loss = exact(of(5))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(ExchangeError):
        loss(Batch(vectors(3), torch.zeros(3, 6)))
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(vectors(3)), "CrossBatchMemory needs documents"),
        (Batch(vectors(3), vectors(3), keys=torch.zeros(3, 5, dtype=torch.int64)), "4 keys of a document, keys has 5"),
    ],
)
def test_a_batch_it_cannot_use(batch: Batch, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        exact(of(5))(batch)


def test_the_size_is_positive() -> None:
    with pytest.raises(ConfigError, match="size: Input should be greater than or equal to 1"):
        from_mapping(CrossBatchMemoryConfig, {"size": 0, "loss": {}})


def test_a_validation_loss_leaves_no_trace() -> None:
    loss = exact(of(8)).eval()
    batch = Batch(vectors(3), vectors(3, seed=1))
    values = [loss(batch).item() for _ in range(2)]
    assert values[0] == values[1]
    assert int(loss.seen) == 0
