"""Model soups: one model whose weights are the mean of several models' weights (Wortsman et al., 2022).

Models that were tuned from the same start often lie in one valley of the loss, and their mean is then as good as the
best of them or better, at the cost of one. Plain torch; where models come from, and what judges a mean, is given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayemb.models.bundle import Model
from rayemb.models.errors import ModelError

_ELSEWHERE = {"source"}  # of pretrained parts: where their weights came from says nothing of what they are
_OWN = {"fingerprint", "temperature", "training", "best", "soup", "config"}  # of one training, or merged by itself


@dataclass(frozen=True)
class WeightMean:
    """The weighted mean of state dicts, one at a time: sums in fp64, 8 bytes a parameter.

    Tensors of integers and booleans, which have no mean, are the first's; each tensor keeps the first's dtype.
    """

    sums: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    total: float

    @classmethod
    def of(cls, state: Mapping[str, Tensor], weight: float = 1.0) -> "WeightMean":
        """The mean of one."""
        sums = {name: value.double() * weight if value.is_floating_point() else value for name, value in state.items()}
        return cls(sums, {name: value.dtype for name, value in state.items()}, weight)

    def plus(self, state: Mapping[str, Tensor], weight: float = 1.0) -> "WeightMean":
        """The mean with one more; `state` has the same names and shapes."""
        sums = {
            name: value + weight * state[name].double() if value.is_floating_point() else value
            for name, value in self.sums.items()
        }
        return WeightMean(sums, self.dtypes, self.total + weight)

    @property
    def state(self) -> dict[str, Tensor]:
        """The mean as a state dict."""
        return {
            name: (value / self.total).to(self.dtypes[name]) if value.is_floating_point() else value
            for name, value in self.sums.items()
        }


@dataclass(frozen=True)
class Greedy:
    """What a greedy choice took: places of the ingredients, the metric of each alone, and that of the mean."""

    taken: list[int]
    alone: list[float]
    score: float


def greedy(count: int, score: Callable[[Sequence[int]], float], *, higher: bool = True) -> Greedy:
    """Which of `count` models go into a mean: the best first, then each with which the metric does not fall.

    `score(places)` is the metric of the mean of those models on held-out rows; it is asked 2 * `count` - 1 times, and
    every question but the first ones is the last accepted places and one more. `higher`: more of the metric is better.
    Recipe 1 of Wortsman et al., 2022.
    """
    sign = 1.0 if higher else -1.0
    alone = [score((place,)) for place in range(count)]
    # Stable: of equals the first.
    first, *others = sorted(range(count), key=lambda place: -sign * alone[place])
    taken, best = [first], alone[first]
    for place in others:
        found = score((*taken, place))
        if sign * found >= sign * best:
            taken.append(place)
            best = found
    return Greedy(taken, alone, best)


def require_alike(first: Model, other: Model, where: str) -> None:
    """Raises ModelError if a mean of the two has no meaning: it names the first parameter or setting that differs."""
    ours, theirs = (_shapes(model) for model in (first, other))
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            raise ModelError(
                f"another architecture: parameter {name} is {_said(theirs, name)} here and {_said(ours, name)} in the "
                "first model",
                where=where,
                fix="average models that were tuned from one start (train.init)",
            )
    if first.tokenizer.to_json() != other.tokenizer.to_json():
        raise ModelError(
            "another tokenizer than the first model's: the same token is another row of the weights",
            where=where,
            fix="average models that were tuned from one start (train.init)",
        )
    if key := _difference(_towers(first), _towers(other)):
        raise ModelError(f"{key} of its towers is not the first model's", where=where, fix="train them alike")


def shared_info(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the trainer recorded of all of them: corpora, losses, settings, a common start. The seed is the first's."""

    def common(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        first, *others = mappings
        return {key: value for key, value in first.items() if all(key in x and x[key] == value for x in others)}

    found = {key: value for key, value in common(infos).items() if key not in _OWN}
    if settings := common([info.get("config", {}) for info in infos]):
        found["config"] = settings
    # An evaluation makes its untrained baseline by it.
    return found | ({"seed": infos[0]["seed"]} if "seed" in infos[0] else {})


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.network.state_dict().items()}


def _towers(model: Model) -> dict[str, Any]:
    return model.network.config.model_dump(mode="json")


def _said(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"of shape {shapes[name]}" if name in shapes else "missing"


def _difference(ours: Any, theirs: Any, key: str = "") -> str | None:
    """The first key at which two nested mappings differ; None where they do not."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return None if ours == theirs else key
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in _ELSEWHERE:
            path = f"{key}.{name}" if key else name
            if found := _difference(ours.get(name), theirs.get(name), path):
                return found
    return None
