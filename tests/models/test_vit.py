"""The vision transformer."""

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.models import ViT, ViTConfig

CONFIG = ViTConfig(image_size=16, patch=4, width=24, depth=2, heads=3)


def pixels(rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8, generator=generator)


def tower() -> ViT:
    torch.manual_seed(0)
    return ViT(CONFIG).double()


def test_features_do_not_depend_on_the_batch() -> None:
    features = tower()(pixels())
    assert features.shape == (3, 24)
    torch.testing.assert_close(tower()(pixels()[1:2]), features[1:2], rtol=1e-12, atol=1e-12)


def test_where_a_patch_is_counts() -> None:
    turned = torch.cat([pixels()[..., 4:], pixels()[..., :4]], dim=-1)  # the same patches in other places
    network = tower()
    assert (network(pixels()) - network(turned)).abs().max() > 1e-4
    torch.nn.init.zeros_(network.positions)
    torch.testing.assert_close(network(pixels()), network(turned), rtol=1e-10, atol=1e-10)


def test_every_parameter_learns() -> None:
    network = tower()
    # Not squared: the sum of squares of a normed vector is constant.
    (network(pixels()) ** 3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("wrong", [{"patch": 7}, {"heads": 5}])
def test_what_does_not_divide_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must divide"):
        from_mapping(ViTConfig, wrong)
