"""Small matrices beside frozen ones: LoRA on the towers, through the `peft` library (Hu et al., 2022).

Adapters are of the training alone: what is saved is merged into plain weights, which everything downstream reads.
"""

import importlib.util
import re
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from rayemb.config import Config
from rayemb.errors import RayembError
from rayemb.models import TwoTower
from rayemb.train.parameters import BLOCK

TOWERS = ("image", "text")


class LoRAConfig(Config):
    """Each adapted map W becomes W + alpha / rank * B A, of which only A and B learn.

    A tower with adapters is frozen otherwise; poolings, projections, temperatures and a tower without any are trained
    as ever (`train.parameters` freezes them).
    """

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, description="rows of A and columns of B")
    alpha: float = Field(16.0, gt=0, description="what B A is multiplied by, times the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on what goes into A")
    targets: str = Field(
        r"^network\.text\.",
        min_length=1,
        description="regular expression, searched in the names of the linear layers of the towers' blocks, such as "
        "network.text.blocks.0.qkv; those that match are adapted",
    )

    @field_validator("targets")
    @classmethod
    def _compiles(cls, targets: str) -> str:
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"{targets!r} is not a regular expression: {error}") from error
        return targets


def add_adapters(network: TwoTower, config: LoRAConfig, seed: int) -> int:
    """Puts adapters into the towers of `network` and freezes what else these towers have; gives their number.

    The network's vectors stay as they are: B begins with zeros. Raises RayembError if nothing matches or `peft` is
    missing.
    """
    if importlib.util.find_spec("peft") is None:
        raise RayembError(
            "adapters need the library peft", where="train.adapters", fix="pip install 'rayemb[adapters]'"
        )
    import peft

    found = {tower: _linear(getattr(network, tower), f"network.{tower}.") for tower in TOWERS}
    chosen = {tower: [name for name in names if _matches(config, tower, name)] for tower, names in found.items()}
    if not any(chosen.values()):
        names = [f"network.{tower}.{name}" for tower in TOWERS for name in found[tower]]
        raise RayembError(
            f"no linear layer of a block matches {config.targets!r}",
            where="train.adapters.targets",
            fix=f"names are such as {', '.join(names[:: max(1, len(names) // 4)][:4])}",
        )
    # The same ones in every worker, and in the one that takes a checkpoint up again.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tower, names in chosen.items():
            if names:
                settings = peft.LoraConfig(
                    r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names
                )
                # In place; all of this tower but the adapters is frozen by it.
                peft.inject_adapter_in_model(settings, getattr(network, tower))
    return sum(map(len, chosen.values()))


def merged(network: TwoTower, config: LoRAConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain weights of `network` from those of the same network with adapters; `network` gets them too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    add_adapters(network, config, seed=0)
    network.load_state_dict(weights)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, layer.get_base_layer())
    return network.state_dict()


def _linear(tower: nn.Module | None, prefix: str) -> list[str]:
    """The names, within a tower, of the linear layers of its blocks."""
    modules = tower.named_modules() if tower is not None else ()
    return [name for name, part in modules if isinstance(part, nn.Linear) and BLOCK.match(f"{prefix}{name}")]


def _matches(config: LoRAConfig, tower: str, name: str) -> bool:
    return re.search(config.targets, f"network.{tower}.{name}") is not None
