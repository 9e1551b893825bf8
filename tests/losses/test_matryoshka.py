"""Matryoshka against card S095's checks; the released one is in test_peers.py."""

from typing import Any

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, FocalConfig, MatryoshkaConfig
from rayemb.parallel import ExchangeError
from tests.losses.common import EVERY, built, everything, exact, gradients, vectors

INNER: dict[str, Any] = {"temperature": 0.2}
INSIDE = [name for name in EVERY if name not in ("class_proxies", "cross_batch_memory", "matryoshka", "starbucks")]


def of(*dims: int, loss: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"name": "matryoshka", "dims": dims, "loss": INNER if loss is None else loss, **fields}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_the_whole_vector_it_is_the_inner_loss_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    batch = everything(5, dtype=dtype)
    loss, plain = built(of(6, loss=EVERY[name])), built(EVERY[name])
    assert torch.equal(loss(batch), plain(batch))
    found = gradients(plain, batch)
    for key, gradient in gradients(loss, batch).items():
        assert torch.equal(gradient, found[key.removeprefix("loss.")])


def test_it_is_the_weighted_sum_over_prefixes_each_normalised_anew() -> None:
    q, d, n = vectors(5), vectors(5, seed=1), vectors(3, seed=2)
    total = torch.zeros((), dtype=torch.float64)
    for dim, weight in ((2, 0.5), (3, 1.0), (6, 0.25)):
        a, b, c = (x[:, :dim] / x[:, :dim].norm(dim=1, keepdim=True) for x in (q, d, n))
        forward = torch.nn.functional.cross_entropy(a @ torch.cat([b, c]).T / 0.2, torch.arange(5))
        total += weight * (forward + torch.nn.functional.cross_entropy(b @ a.T / 0.2, torch.arange(5))) / 2
    loss = exact(of(2, 3, 6, weights=[0.5, 1.0, 0.25]))
    torch.testing.assert_close(loss(Batch(q, d, negatives=n)), total, rtol=1e-12, atol=0)


def test_it_is_additive_and_the_order_is_irrelevant() -> None:
    batch = Batch(vectors(5), vectors(5, seed=1))
    parts = [exact(of(dim))(batch).item() for dim in (2, 3, 6)]
    assert exact(of(2, 3, 6))(batch).item() == pytest.approx(sum(parts), rel=1e-12)
    torch.testing.assert_close(exact(of(6, 2, 3))(batch), exact(of(2, 3, 6))(batch), rtol=1e-14, atol=0)


def test_a_coordinate_gets_gradient_only_from_prefixes_that_reach_it() -> None:
    batch = everything(5)
    for dims in ((2, 4), (4,)):
        for name in ("queries", "documents", "negatives"):
            assert not gradients(exact(of(*dims)), batch)[name][:, 4:].any()
    nested, whole = gradients(exact(of(2, 4, 6)), batch), gradients(exact(INNER), batch)
    for name in ("queries", "documents", "negatives"):
        assert torch.equal(nested[name][:, 4:], whole[name][:, 4:])
        assert not torch.equal(nested[name][:, :4], whole[name][:, :4])


def test_the_guide_and_soft_labels_keep_their_size() -> None:
    batch = Batch(vectors(4), vectors(4, seed=1), guide=Batch(vectors(4, 9, 2), vectors(4, 9, 3)))
    gist = {"name": "gist_embed", "temperature": 0.2}
    parts = [exact(gist)(batch.prefix(dim)).item() for dim in (2, 6)]
    assert exact(of(2, 6, loss=gist))(batch).item() == pytest.approx(sum(parts), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        ({"dims": []}, "dims", "at least 1"),
        ({"dims": [2, 2]}, "(top)", r"different and positive, got \[2, 2\]"),
        ({"dims": [0]}, "(top)", r"different and positive, got \[0\]"),
        ({"dims": [2, 3], "weights": [1.0]}, "(top)", "2 positive numbers"),
        ({"dims": [2], "weights": [0.0]}, "(top)", "1 positive numbers"),
    ],
)
def test_a_config_that_makes_no_sense(config: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        from_mapping(MatryoshkaConfig, {"loss": {}, **config})
    assert error.value.problems[0][0] == key


def test_a_prefix_longer_than_the_vector() -> None:
    message = "matryoshka.dims has 6, the vectors have 4 dimensions"
    config = from_mapping(MatryoshkaConfig, {"dims": [2, 6], "loss": {}})
    assert config.misfit(4) == FocalConfig(loss=config).misfit(4) == message
    assert config.misfit(6) is None
    with pytest.raises(ExchangeError, match=message):
        exact(of(2, 6))(Batch(vectors(3, 4), vectors(3, 4)))


def test_a_prefix_without_a_direction() -> None:
    documents = vectors(3)
    documents[1, :2] = 0
    assert exact(of(3, 6))(Batch(vectors(3), documents)).isfinite()
    with pytest.raises(ExchangeError, match="the first 2 coordinates: documents row 1 is a zero vector"):
        exact(of(2, 6))(Batch(vectors(3), documents))
