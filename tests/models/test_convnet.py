"""The image tower."""

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.models import ConvNet, ConvNetConfig

SMALL = ConvNetConfig(image_size=16, patch=2, widths=(8, 12), depths=(1, 2))


@pytest.mark.parametrize(
    "config",
    [SMALL, ConvNetConfig(image_size=8, patch=4, widths=(5,), depths=(1,)), ConvNetConfig(depths=(1, 0, 1))],
)
def test_shape_and_dtype(config: ConvNetConfig) -> None:
    network = ConvNet(config).eval()
    pixels = torch.randint(0, 256, (3, 3, config.image_size, config.image_size), dtype=torch.uint8)
    assert network(pixels).shape == (3, config.widths[-1])
    assert network.features == config.widths[-1]
    assert network(pixels).dtype == torch.float32
    assert network.double()(pixels).dtype == torch.float64


def test_a_vector_does_not_depend_on_its_batch() -> None:
    network = ConvNet(SMALL).double().eval()
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(network(pixels)[2:3], network(pixels[2:3]), rtol=1e-12, atol=1e-12)


def test_the_picture_matters() -> None:
    network = ConvNet(SMALL).eval()
    white, black = network(torch.stack([torch.full((3, 16, 16), 255), torch.zeros(3, 16, 16)]).to(torch.uint8))
    assert (white - black).abs().max() > 1e-4


def test_the_memory_layout_of_the_pixels_does_not_matter() -> None:
    network = ConvNet(SMALL).double().eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(network(pixels), network(pixels.contiguous(memory_format=torch.channels_last)))


def test_all_parameters_learn() -> None:
    network = ConvNet(SMALL)
    network(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)).pow(2).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_stages_must_agree() -> None:
    with pytest.raises(ConfigError, match="widths has 3 stages, depths 2"):
        from_mapping(ConvNetConfig, {"depths": [1, 2]})


def test_the_size_must_fit_the_stages() -> None:
    with pytest.raises(ConfigError, match="multiple of patch"):
        from_mapping(ConvNetConfig, {"image_size": 50})
