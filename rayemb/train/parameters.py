"""Which parameters are trained, how fast, and which decay: the groups that an optimizer gets."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, field_validator
from torch import nn

from rayemb.config import Config
from rayemb.errors import RayembError

if TYPE_CHECKING:
    from rayemb.train.config import TrainConfig

# Offsets of positions are vectors of their own, not a map: they do not decay, as biases do not.
POSITIONS = re.compile(r"(^|\.)((\w+_)?positions|position_embeddings?|pos_embed|wpe)(\.weight)?$")
BLOCK = re.compile(r"^(?P<stack>.*?)\.(blocks|layers|layer)\.(?P<number>\d+)\.")
EMBEDDING = re.compile(
    r"(^|\.)(tokens|patches|positions|embed\w*|\w+_embed\w*|wte|wpe|cls_token|class_token|stem)(\.|$)"
)


class ParameterRule(Config):
    """What is special about the parameters whose name a pattern matches."""

    pattern: str = Field(
        min_length=1,
        description=r"regular expression, searched in names such as network.image.layers.0.weight: ^network\.image\.",
    )
    learning_rate_factor: float = Field(1.0, gt=0, description="times the schedule's rate")
    weight_decay: float | None = Field(None, ge=0, description="instead of the optimizer's; null for what it has")
    freeze: bool = Field(False, description="keep the weights as they are; a tower that is frozen costs no backward")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern


class _Kind(NamedTuple):
    """What the parameters of a group have in common."""

    learning_rate_factor: float
    weight_decay: float
    matrices: bool  # a map, not a norm's scale, a bias, positions or a temperature
    hidden: bool  # the weight of a linear layer, for optimizers that see whole matrices


def parameter_groups(module: nn.Module, config: "TrainConfig") -> list[dict[str, Any]]:
    """The optimizer's groups of all parameters that are trained; freezes those that the rules freeze.

    Raises RayembError for a rule that matches nothing, and if nothing is left to train.
    """
    named = dict(module.named_parameters())
    rules = _matched(list(named), config.parameters)
    factors = layer_factors(list(named), config.layer_decay)
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    groups: dict[_Kind, dict[str, Any]] = {}
    for name, parameter in named.items():
        rule = rules.get(name)
        if rule is not None and rule.freeze:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and not POSITIONS.search(name)
        decay = config.optimizer.weight_decay if matrix else 0.0
        kind = _Kind(
            learning_rate_factor=factors[name] * (rule.learning_rate_factor if rule else 1.0),
            weight_decay=decay if rule is None or rule.weight_decay is None else rule.weight_decay,
            matrices=matrix,
            # Where it makes no difference it makes no group: each is an exchange of its own under ZeRO.
            hidden=config.optimizer.whole_matrices and id(parameter) in linear,
        )
        groups.setdefault(kind, {"params": [], **kind._asdict()})["params"].append(parameter)
    if not groups:
        raise RayembError(
            "all parameters are frozen", where="train.parameters", fix="leave a tower or a projection to train"
        )
    return list(groups.values())


def check_rules(module: nn.Module, rules: Sequence[ParameterRule]) -> None:
    """Raises RayembError for a rule that matches no parameter of `module`."""
    _matched([name for name, _ in module.named_parameters()], rules)


def layer_factors(names: Sequence[str], decay: float) -> dict[str, float]:
    """The factor of each parameter's rate by its depth: `decay` for a tower's last block, its square below, ...

    The depth is read from the name (`.blocks.<n>.`, `.layers.<n>.`, `.layer.<n>.`); embeddings lie below the first
    block of their tower, all else (final norms, projections, losses) is at the top: 1.
    """
    found = {name: match for name in names if (match := BLOCK.match(name))}
    depths: dict[str, int] = {}
    for match in found.values():
        depths[match["stack"]] = max(depths.get(match["stack"], 0), int(match["number"]) + 1)
    factors = dict.fromkeys(names, 1.0)
    for name in names:
        if name in found:
            factors[name] = decay ** (depths[found[name]["stack"]] - int(found[name]["number"]))
        elif EMBEDDING.search(name) and (stack := _nearest(name, list(depths))) is not None:
            factors[name] = decay ** (depths[stack] + 1)
    return factors


def _nearest(name: str, stacks: Sequence[str]) -> str | None:
    """The stack of blocks that shares most of its path with `name`; None if none shares two steps."""

    def shared(stack: str) -> int:
        count = 0
        for one, other in zip(name.split("."), stack.split("."), strict=False):
            if one != other:
                break
            count += 1
        return count

    best = max(stacks, key=shared, default=None)
    return best if best is not None and shared(best) >= min(2, best.count(".") + 1) else None


def _matched(names: Sequence[str], rules: Sequence[ParameterRule]) -> dict[str, ParameterRule]:
    """The first rule that matches, of each name that has one."""
    chosen: dict[str, ParameterRule] = {}
    for number, rule in enumerate(rules):
        matches = [name for name in names if re.search(rule.pattern, name)]
        if not matches:
            raise RayembError(
                f"no parameter matches {rule.pattern!r}",
                where=f"train.parameters[{number}].pattern",
                fix=f"names are such as {', '.join(names[:: max(1, len(names) // 4)][:4])}",
            )
        for name in matches:
            chosen.setdefault(name, rule)
    return chosen
