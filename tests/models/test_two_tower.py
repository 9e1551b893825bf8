"""Two towers, one space of unit vectors."""

import pytest
import torch

from rayemb.models import TwoTower
from tests.models.tiny import CONFIG

PIXELS = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 6], [1, 7, -1], [1, -1, -1], [1, 9, 9]])


def network() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(CONFIG, vocab_size=300).eval()


@pytest.mark.parametrize(
    ("dtype", "expected", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float64, torch.float64, 1e-14),
        (torch.bfloat16, torch.float32, 1e-6),
    ],
)
def test_vectors_have_unit_norm_whatever_the_weights(
    dtype: torch.dtype, expected: torch.dtype, tolerance: float
) -> None:
    for vectors in network().to(dtype)(PIXELS, IDS):
        assert vectors.shape == (4, 8)
        assert vectors.dtype == expected
        assert (vectors.norm(dim=1) - 1).abs().max() < tolerance


def test_both_at_once_is_each_alone() -> None:
    towers = network()
    image, text = towers(PIXELS, IDS)
    assert torch.equal(image, towers.encode_image(PIXELS))
    assert torch.equal(text, towers.encode_text(IDS))


def test_fp64_agrees_with_fp32() -> None:
    for narrow, wide in zip(network()(PIXELS, IDS), network().double()(PIXELS, IDS), strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter() -> None:
    towers = network()
    image, text = towers(PIXELS, IDS)
    (image * text).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in towers.parameters())
