"""Vision networks of `transformers` as image towers: their own outputs, from their own directories."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from rayemb.config import ConfigError, from_mapping
from rayemb.models import Model, ModelError, TextTokenizer, TokenizerConfig, TwoTowerConfig
from rayemb.models.pretrained_images import PretrainedImageConfig

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WIDE = {**SMALL, "intermediate_size": 48}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", **WIDE},
    "clip": {"model_type": "clip_vision_model", **WIDE},
    "siglip": {"model_type": "siglip_vision_model", **WIDE},
    "dinov2": {"model_type": "dinov2_with_registers", **SMALL},
    "convnext": {"model_type": "convnextv2", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}
CASES = [
    ("vit", "cls"),
    ("vit", "mean"),
    ("vit", "pooled"),
    ("clip", "pooled"),
    ("siglip", "mean"),
    ("siglip", "pooled"),
    ("dinov2", "cls"),
    ("dinov2", "mean"),
    ("convnext", "mean"),
    ("convnext", "pooled"),
    ("resnet", "pooled"),
]
TOKENIZER = TextTokenizer.train(["a red heart", "blue star"] * 3, TokenizerConfig(vocab_size=512, max_length=10))
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def pixels(side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)


def prepared(side: int = 32) -> Tensor:
    colours = [torch.tensor(values)[:, None, None] for values in (MEAN, STD)]
    return (pixels(side) / 255 - colours[0]) / colours[1]


def library(architecture: dict[str, Any], folder: Path) -> Any:
    """The library's own network with random weights, saved as anyone would find it."""
    torch.manual_seed(0)
    settings = dict(architecture)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    network = transformers.AutoModel.from_config(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return network


def model(source: Path | None, **image: Any) -> Model:
    towers = {"dim": 8, "image": {"name": "transformers", "source": source and str(source), "image_size": 32, **image}}
    towers |= {"text": {"width": 16, "depth": 1, "heads": 2}, "tokenizer": {"max_length": 10}}
    return Model.create(from_mapping(TwoTowerConfig, towers), TOKENIZER, 0)


@pytest.mark.parametrize(("name", "features"), CASES)
def test_its_features_are_the_librarys(name: str, features: str, tmp_path: Path) -> None:
    theirs = library(NETWORKS[name], tmp_path)
    mine = model(tmp_path, features=features)
    with torch.no_grad():
        found = mine.network.image(pixels())
        out = theirs(pixel_values=prepared())
    states = out.last_hidden_state
    if features == "pooled":
        expected = out.pooler_output.flatten(1)
    elif features == "cls":
        expected = states[:, 0]
    else:
        expected = states.mean((2, 3)) if states.ndim == 4 else states[:, -16:].mean(1)
    assert found.shape == (3, mine.network.image.features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # All that is to be trained has a gradient: what the features do not read is frozen.
    mine.network.train().encode_image(pixels()).sum().backward()
    image = list(mine.network.image.parameters())
    assert [p.requires_grad for p in image] == [p.grad is not None for p in image]
    assert sum(p.requires_grad for p in image) > 0.7 * len(image)


def test_it_is_saved_with_all_that_it_needs(tmp_path: Path) -> None:
    library(NETWORKS["vit"], tmp_path / "source")
    made = model(tmp_path / "source")
    made.save(str(tmp_path / "model"))
    (tmp_path / "source").rename(tmp_path / "gone")
    again = Model.load(str(tmp_path / "model"))
    rows = pixels().numpy()
    assert np.array_equal(again.embed_pixels(rows), made.embed_pixels(rows))
    assert again.network.config.image == made.network.config.image
    assert again.network.config.image.mean == MEAN  # type: ignore[union-attr]
    assert not [name for name in again.network.state_dict() if name.endswith((".mean", ".std"))]


def test_the_image_tower_of_a_whole_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=WIDE)).eval()
    clip.save_pretrained(tmp_path)
    mine = model(tmp_path, features="pooled", mean=MEAN, std=STD)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values=prepared()).pooler_output
        torch.testing.assert_close(mine.network.image(pixels()), expected, rtol=1e-5, atol=1e-5)


def test_a_pooler_that_is_not_read_may_be_missing(tmp_path: Path) -> None:
    settings = dict(NETWORKS["vit"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    one, two = model(tmp_path), model(tmp_path)
    assert all(torch.equal(value, two.network.state_dict()[name]) for name, value in one.network.state_dict().items())
    with pytest.raises(ModelError, match="2 weights are missing, the first is pooler"):
        model(tmp_path, features="pooled")


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2"])
def test_positions_are_interpolated_for_other_sizes(name: str, tmp_path: Path) -> None:
    theirs = library(NETWORKS[name], tmp_path)
    mine = model(tmp_path, image_size=48, features="mean")
    more = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = theirs(pixel_values=prepared(48), **more).last_hidden_state
        torch.testing.assert_close(mine.network.image(pixels(48)), states[:, -36:].mean(1), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a source, or an architecture"):
        model(None)
    with pytest.raises(ModelError, match="ResNetModel has no class token"):
        model(None, architecture=NETWORKS["resnet"])
    with pytest.raises(ModelError, match="SiglipVisionModel has no class token"):
        model(None, architecture=NETWORKS["siglip"])
    with pytest.raises(ModelError, match="cannot build a 'no_such_network'"):
        model(None, architecture={"model_type": "no_such_network"})
    with pytest.raises(ModelError, match="a 'bert' takes no images"):
        model(None, architecture={"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 24})
    library(NETWORKS["vit"], tmp_path)
    other = PretrainedImageConfig(architecture=NETWORKS["clip"], image_size=32).build()
    with pytest.raises(ModelError, match="weights are missing"):
        other.load(str(tmp_path))  # type: ignore[operator]
