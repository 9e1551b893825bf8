"""Which parameters are trained, how fast, and which decay."""

import pytest
import torch

from rayemb.config import ConfigError, load
from rayemb.errors import RayembError
from rayemb.losses import InfoNCEConfig
from rayemb.models import TwoTower
from rayemb.train import TrainConfig
from rayemb.train.objective import Objective
from rayemb.train.parameters import layer_factors, parameter_groups

SMALL = [
    "model={dim: 16, image: {image_size: 16, widths: [8, 16], depths: [1, 1]}}",
    "model.text={width: 16, depth: 2, heads: 2}",
]


def found(*overrides: str) -> dict[str, tuple[float, float]]:
    """Name of each parameter that is trained → the factor of its rate, and its decay."""
    config = load(TrainConfig, None, [*SMALL, *overrides])
    module = Objective(TwoTower(config.model, 64), InfoNCEConfig().build(16))
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: (group["learning_rate_factor"], group["weight_decay"])
        for group in parameter_groups(module, config)
        for parameter in group["params"]
    }


def test_matrices_decay_and_norms_biases_positions_and_temperature_do_not() -> None:
    groups = found()
    assert {factor for factor, _ in groups.values()} == {1.0}
    kept = {name for name, (_, decay) in groups.items() if decay == 0}
    assert {name for name, (_, decay) in groups.items() if decay == 0.1} == groups.keys() - kept
    assert {"network.text.positions", "losses.0.scale.log_scale", "network.text.blocks.1.norm_mlp.weight"} < kept
    assert all("norm" in name or name.endswith(("bias", "positions", "log_scale")) for name in kept)
    decayed = {"network.text.tokens.weight", "network.image_projection.weight", "network.image.layers.0.weight"}
    assert decayed.isdisjoint(kept)


def test_the_first_rule_that_matches_holds() -> None:
    rules = (
        r"parameters=[{pattern: 'text\.blocks\.0', freeze: true}, "
        r"{pattern: '^network\.text', learning_rate_factor: 0.5}, {pattern: 'projection', weight_decay: 0.3}]"
    )
    groups, plain = found(rules), found()
    assert {name for name in plain if name.startswith("network.text.blocks.0.")} == plain.keys() - groups.keys()
    assert groups["network.text.blocks.1.qkv.weight"] == (0.5, 0.1)
    assert groups["network.text_projection.weight"] == (0.5, 0.1)
    assert groups["network.image_projection.weight"] == (1.0, 0.3)


def test_deeper_layers_learn_slower() -> None:
    groups = {name: factor for name, (factor, _) in found("layer_decay=0.5").items()}
    assert groups["network.text.norm.weight"] == groups["losses.0.scale.log_scale"] == 1
    assert groups["network.text.blocks.1.up.weight"] == 0.5
    assert groups["network.text.blocks.0.up.weight"] == 0.25
    assert groups["network.text.tokens.weight"] == groups["network.text.positions"] == 0.125
    # The stem is the first of the convolutional tower's layers: stem, block, norm, reduction, block.
    assert groups["network.image.layers.0.weight"] == 0.5**5
    assert groups["network.image.layers.4.up.weight"] == 0.5


def test_patches_and_positions_lie_below_a_vision_transformer() -> None:
    groups = found("model.image={name: vit, image_size: 16, depth: 2, width: 16, heads: 2}", "layer_decay=0.5")
    assert groups["network.image.patches.weight"] == (0.125, 0.1)
    assert groups["network.image.positions"] == (0.125, 0.0)
    assert groups["network.image.blocks.1.up.weight"] == (0.5, 0.1)


def test_depths_are_read_from_the_names_of_other_libraries_too() -> None:
    names = [
        "network.text.model.embeddings.word_embeddings.weight",
        "network.text.model.encoder.layer.0.attention.query.weight",
        "network.text.model.encoder.layer.1.attention.query.weight",
        "network.text.model.pooler.weight",
        "network.image.trunk.patch_embed.proj.weight",
        "network.image.trunk.blocks.0.mlp.weight",
    ]
    assert list(layer_factors(names, 0.5).values()) == [0.125, 0.25, 0.5, 1.0, 0.25, 0.5]


def test_optimizers_of_whole_matrices_know_the_hidden_ones() -> None:
    config = load(TrainConfig, None, [*SMALL, "optimizer.name=muon", "zero_stage=0"])
    module = Objective(TwoTower(config.model, 64), InfoNCEConfig().build(16))
    hidden = [p for group in parameter_groups(module, config) if group["hidden"] for p in group["params"]]
    linear = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]
    assert {id(p) for p in hidden} == {id(p) for p in linear}


def test_a_rule_that_matches_nothing_is_named() -> None:
    with pytest.raises(RayembError, match=r"parameters\[1\]\.pattern: no parameter matches 'imgae'.*network\."):
        found("parameters=[{pattern: image}, {pattern: imgae}]")
    with pytest.raises(RayembError, match="all parameters are frozen"):
        found("parameters=[{pattern: '', freeze: true}]".replace("''", "'.'"))
    with pytest.raises(ConfigError, match="not a regular expression"):
        found("parameters=[{pattern: '('}]")
