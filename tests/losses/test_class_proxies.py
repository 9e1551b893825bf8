"""Class proxies against torch's cross-entropy; CosFace and ArcFace as released are in test_peers.py."""

import math

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, ClassProxies, ClassProxiesConfig
from rayemb.parallel import ExchangeError
from tests.losses.common import cosines, exact, gradients, vectors

LABELS = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize(("margin", "angular_margin"), [(0, 0), (0.35, 0), (0, 0.5), (0.2, 0.3)])
def test_it_is_the_cross_entropy_of_the_cosines_less_the_margins(margin: float, angular_margin: float) -> None:
    config = {"name": "class_proxies", "classes": 3, "margin": margin, "angular_margin": angular_margin}
    loss = exact(config)
    queries = vectors(4)
    cosine = cosines(queries, loss.get_parameter("proxies").detach())
    for i, label in enumerate(LABELS.tolist()):
        angle = math.acos(float(cosine[i, label]))
        assert angle < math.pi - angular_margin
        cosine[i, label] = math.cos(angle + angular_margin) - margin
    expected = torch.nn.functional.cross_entropy(64 * cosine, LABELS)
    torch.testing.assert_close(loss(Batch(queries, labels=LABELS)), expected, rtol=1e-10, atol=0)


def test_beyond_pi_less_the_margin_it_goes_on_falling() -> None:
    loss = exact({"name": "class_proxies", "classes": 2, "angular_margin": 0.5, "temperature": 1.0}, dim=3)
    with torch.no_grad():
        loss.get_parameter("proxies").copy_(torch.eye(3)[:2])
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    turning = torch.stack([angles.cos(), angles * 0, angles.sin()], 1)  # from its proxy away, never near the other
    losses = torch.stack([loss(Batch(row[None], labels=torch.tensor([0]))) for row in turning])
    logits = -torch.expm1(losses).log()
    assert (logits.diff() < 0).all()
    torch.testing.assert_close(logits[:100], (angles[:100] + 0.5).cos())
    torch.testing.assert_close(logits[-10:], angles[-10:].cos() - 0.5 * math.sin(0.5))


def test_where_the_query_is_its_proxy_gradients_are_finite() -> None:
    loss = exact({"name": "class_proxies", "classes": 3, "angular_margin": 0.5})
    proxies = loss.get_parameter("proxies").detach()
    for sign in (1, -1):
        found = gradients(loss, Batch(sign * proxies, labels=torch.arange(3)))
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_proxies_are_those_of_the_seed() -> None:
    first, again, other = (ClassProxies(ClassProxiesConfig(classes=3, seed=seed), 6).proxies for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(vectors(4)), "ClassProxies needs labels"),
        (Batch(vectors(4), labels=torch.tensor([0, 1, 2, 3])), "labels are not all from 0 to 2"),
        (Batch(vectors(4), labels=torch.tensor([0, 1, -1, 2])), "labels are not all from 0 to 2"),
        (Batch(vectors(4, 5), labels=LABELS), "queries have 5 dimensions, the proxies 6"),
    ],
)
def test_a_batch_it_cannot_use(batch: Batch, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        exact({"name": "class_proxies", "classes": 3})(batch)


def test_the_number_of_classes_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"classes: Field required"):
        from_mapping(ClassProxiesConfig, {})
