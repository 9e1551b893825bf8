"""The search space: `loss.temperature: loguniform(0.01, 0.5)`, choices, and choices that bring keys of their own.

A space is a flat list of parameters. One that lies inside an option of a choice needs that option: it is drawn only
where the choice fell so. A searcher draws numbers, and labels of options; `Space.settings` makes of them the keys of
the training config, so that every searcher, conditional or not, speaks of the same thing.
"""

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Name → number of arguments. The names and their meaning are Ray Tune's own (`ray.tune.uniform`, ...): the upper end
# of randint and lograndint is not drawn, quniform and qloguniform round to multiples of their third argument.
DISTRIBUTIONS = {
    "uniform": 2,
    "loguniform": 2,
    "quniform": 3,
    "qloguniform": 3,
    "randint": 2,
    "lograndint": 2,
    "randn": 2,
    "choice": 1,
    "grid_search": 1,
}
CHOICES = ("choice", "grid_search")
_LITERALS = {"null": None, "none": None, "true": True, "false": False}
_FAR = 3.0  # standard deviations of randn that are tried beforehand

Draw = Mapping[str, Any]  # name of a parameter → a number, or the label of an option


@dataclass(frozen=True)
class Option:
    """What a choice may fall on: a plain value, or a mapping of further keys, as `constants` and parameters within."""

    label: str
    value: Any = None
    constants: tuple[tuple[str, Any], ...] | None = None  # key of the config, value; None: a plain value


@dataclass(frozen=True)
class Distribution:
    """A distribution as it was written. `numbers` of a range, `options` of a choice."""

    kind: str
    numbers: tuple[float, ...] = ()
    options: tuple[Option, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers."""
        return self.kind in ("randint", "lograndint")

    @property
    def logarithmic(self) -> bool:
        """Whether it is uniform in the logarithm."""
        return "log" in self.kind

    @property
    def step(self) -> float | None:
        """What values are multiples of."""
        return self.numbers[2] if self.kind.startswith("q") else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest value; None for a choice, and where there are none."""
        if self.kind in CHOICES or self.kind == "randn":
            return None
        low, high = self.numbers[:2]
        return (int(low), int(high) - 1) if self.whole else (low, high)

    @property
    def ends(self) -> list[Any]:
        """The draws that are tried beforehand: both ends of a range, every option's label."""
        if self.kind in CHOICES:
            return [option.label for option in self.options]
        if self.kind == "randn":
            mean, deviation = self.numbers
            return [mean - _FAR * deviation, mean + _FAR * deviation]
        assert self.bounds is not None
        return list(self.bounds)

    def option(self, label: Any) -> Option:
        """The option of that label."""
        return next(option for option in self.options if option.label == str(label))

    def value(self, drawn: Any) -> Any:
        """A drawn number as the config takes it: plain, rounded to the step, within the bounds."""
        number = float(drawn)
        if self.step:
            number = round(number / self.step) * self.step
        if self.bounds:
            number = min(max(number, self.bounds[0]), self.bounds[1])
        # As short as the digits that were written: 0.1 * 3 is no value that anyone asked for.
        return round(number) if self.whole else float(f"{number:.12g}")

    def domain(self) -> Any:
        """The same as Ray Tune's domain; a choice is one of labels."""
        from ray import tune

        if self.kind in CHOICES:
            return tune.choice([option.label for option in self.options])
        return getattr(tune, self.kind)(*self.numbers)

    def __str__(self) -> str:
        inner = ", ".join(f"{number:g}" for number in self.numbers) or ", ".join(o.label for o in self.options)
        return f"{self.kind}([{inner}])" if self.options else f"{self.kind}({inner})"


@dataclass(frozen=True)
class Parameter:
    """What is drawn. `name` is its own; `key` of the config it sets; `needs`: choices and the labels they must have."""

    name: str
    key: str
    distribution: Distribution
    needs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Space:
    """All parameters, a choice before what depends on it."""

    parameters: tuple[Parameter, ...]

    @property
    def described(self) -> dict[str, str]:
        """Name → text, for the record."""
        return {parameter.name: str(parameter.distribution) for parameter in self.parameters}

    @property
    def conditional(self) -> bool:
        """Whether any parameter depends on another."""
        return any(parameter.needs for parameter in self.parameters)

    def active(self, draw: Draw) -> Iterator[Parameter]:
        """The parameters that the draw's choices leave in play."""
        for parameter in self.parameters:
            if all(str(draw.get(name)) == label for name, label in parameter.needs):
                yield parameter

    def settings(self, draw: Draw) -> dict[str, Any]:
        """Keys of the training config and their values, of the active parameters alone."""
        found: dict[str, Any] = {}
        for parameter in self.active(draw):
            distribution = parameter.distribution
            if distribution.kind not in CHOICES:
                found[parameter.key] = distribution.value(draw[parameter.name])
                continue
            option = distribution.option(draw[parameter.name])
            if option.constants is None:
                found[parameter.key] = option.value
            else:
                found |= dict(option.constants)
        return found

    def points(self) -> list[dict[str, str]]:
        """Every combination of the choices, where there is nothing else: a grid, inner choices only where active."""
        return list(_points(self, self.parameters, {}))

    def grid(self) -> list[dict[str, str]]:
        """Every combination of the keys written as grid_search, which are walked through in turn."""
        walked = tuple(p for p in self.parameters if p.distribution.kind == "grid_search")
        return list(_points(self, walked, {})) if walked else [{}]


def _points(space: Space, parameters: Sequence[Parameter], draw: dict[str, str]) -> Iterator[dict[str, str]]:
    if not parameters:
        yield draw
        return
    first, rest = parameters[0], parameters[1:]
    if not all(draw.get(name) == label for name, label in first.needs):
        yield from _points(space, rest, draw)
        return
    for option in first.distribution.options:
        yield from _points(space, rest, {**draw, first.name: option.label})


def plain(value: Any) -> Any:
    """A number or a text without numpy's types around it."""
    return value.item() if isinstance(value, np.generic) else value


def parse_space(search: Mapping[str, Any]) -> Space:
    """The space of a `search:` block. Raises ValueError naming the key and what is wrong."""
    parameters: list[Parameter] = []
    for key, written in search.items():
        _read(key, key, written, (), parameters)
    return Space(tuple(parameters))


def _read(name: str, key: str, written: Any, needs: tuple[tuple[str, str], ...], found: list[Parameter]) -> None:
    """Adds the parameter that is `written` at a key, and those within its options, to `found`."""
    try:
        kind, arguments = _call(written)
        if kind not in CHOICES:
            found.append(Parameter(name, key, _range(kind, arguments), needs))
            return
        options = _options(kind, arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    place, labels = len(found), _labels(options)
    read: list[Option] = []
    for label, option in zip(labels, options, strict=True):
        if not isinstance(option, Mapping):
            read.append(Option(label, option))
            continue
        constants: dict[str, Any] = {}
        inner = (*needs, (name, label))
        for path, value in _flat(option, key):
            if _is_distribution(value):
                _read(f"{name}[{label}].{path.removeprefix(f'{key}.')}", path, value, inner, found)
            else:
                constants[path] = value
        read.append(Option(label, None, tuple(constants.items())))
    if "grid_search" in [p.distribution.kind for p in found[place:]] and kind == "choice":
        raise ValueError(f"{name}: a grid_search inside a choice; write the outer one as grid_search too")
    found.insert(place, Parameter(name, key, Distribution(kind, (), tuple(read)), needs))


def _call(written: Any) -> tuple[str, list[Any]]:
    """`("loguniform", [0.01, 0.5])` of a text, or of YAML's `{choice: [...]}`; nothing is evaluated."""
    if isinstance(written, Mapping):
        if len(written) == 1 and (kind := next(iter(written))) in CHOICES:
            return kind, [written[kind]]
        raise ValueError(f"a mapping here is {{choice: [...]}} or {{grid_search: [...]}}, not {dict(written)!r}")
    what = f"{written!r} is not a distribution such as uniform(0, 1)"
    if not isinstance(written, str):
        raise ValueError(f"{what}; a fixed value belongs in tune.set")
    try:
        call = ast.parse(written.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(what) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise ValueError(what)
    if call.func.id not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {call.func.id!r}; known: {', '.join(DISTRIBUTIONS)}")
    return call.func.id, [_plain(argument, written) for argument in call.args]


def _plain(node: ast.expr, text: str) -> Any:
    """A value of the text: literals, bare words, lists, mappings, and distributions as text again."""
    if isinstance(node, ast.Name):
        return _LITERALS.get(node.id.lower(), node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain(item, text) for item in node.elts]
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(_plain(key, text)): _plain(value, text) for key, value in pairs if key is not None}
    if isinstance(node, ast.Attribute):  # loss.temperature
        return ast.unparse(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DISTRIBUTIONS:
        return ast.unparse(node)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"the arguments of {text!r} must be plain values") from error


def _range(kind: str, arguments: Sequence[Any]) -> Distribution:
    if len(arguments) != DISTRIBUTIONS[kind]:
        raise ValueError(f"{kind} takes {DISTRIBUTIONS[kind]} arguments, got {len(arguments)}")
    written = f"{kind}({', '.join(str(argument) for argument in arguments)})"
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in arguments):
        raise ValueError(f"the arguments of {written} must be finite numbers")
    if kind == "randn":
        if arguments[1] <= 0:
            raise ValueError(f"the standard deviation of {written} must be above 0")
        return Distribution(kind, tuple(arguments))
    low, high = arguments[:2]
    if low == high:
        raise ValueError(f"the range of {written} is empty; a fixed value belongs in tune.set")
    if low > high:
        raise ValueError(f"the range of {written} is inverted: the lower end is not below the upper")
    if "log" in kind and low <= 0:
        raise ValueError(f"the lower end of {written} must be above 0")
    if kind in ("randint", "lograndint") and not all(float(n).is_integer() for n in arguments):
        raise ValueError(f"{written} is of whole numbers")
    if kind.startswith("q") and not 0 < arguments[2] <= high - low:
        raise ValueError(f"the step of {written} must be above 0 and fit into the range")
    return Distribution(kind, tuple(arguments))


def _options(kind: str, arguments: Sequence[Any]) -> list[Any]:
    if len(arguments) != 1 or not isinstance(arguments[0], list | tuple):
        raise ValueError(f"{kind} takes a list")
    options = list(arguments[0])
    if not options:
        raise ValueError(f"the list of {kind} is empty")
    written = [repr(option) for option in options]  # to Python, 1 and true are equal
    if twice := [option for number, option in enumerate(options) if written[number] in written[:number]]:
        raise ValueError(f"{twice[0]!r} is in the list of {kind} twice")
    return options


def _labels(options: Sequence[Any]) -> list[str]:
    """A text for each option: its name or kind where it has one, else its value; never one for two."""
    labels: list[str] = []
    for option in options:
        named = option.get("name", option.get("kind")) if isinstance(option, Mapping) else option
        if isinstance(named, bool) or (named is None and not isinstance(option, Mapping)):
            label = {True: "true", False: "false", None: "null"}[named]
        else:
            label = f"option {len(labels) + 1}" if named is None or _is_distribution(named) else str(named)
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{prefix}.{name}"
        if isinstance(value, Mapping) and value and not _is_distribution(value):
            yield from _flat(value, path)
        else:
            yield path, value


def _is_distribution(value: Any) -> bool:
    if isinstance(value, Mapping):
        return len(value) == 1 and next(iter(value)) in CHOICES
    return isinstance(value, str) and value.split("(", 1)[0].strip() in DISTRIBUTIONS and "(" in value
