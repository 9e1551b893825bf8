"""From a draw to a training config, and the trial of a whole space before anything runs."""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rayemb.config import ConfigError, from_mapping
from rayemb.train import TrainConfig
from rayemb.tune.errors import TuneError
from rayemb.tune.space import Draw, Parameter, Space

MOST_CORNERS = 256
_CHOOSERS = ("name", "kind")  # keys by which a mapping says what it is


def applied(base: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`base` with `a.b.c: value` set; another `name` or `kind` replaces its mapping, whose other keys it does not have.

    Raises TuneError for a key that the config does not know, with the nearest one, and for a value that it refuses.
    """
    data = base.model_dump(mode="json")
    known = sorted(_keys(data))
    fresh: set[int] = set()  # mappings that are begun here: what may be in them only the config knows
    # What a mapping is comes before what is in it; for the rest the order is the user's.
    for key in sorted(settings, key=lambda key: 0 if key.rsplit(".", 1)[-1] in _CHOOSERS else 1):
        if not _set(data, key.split("."), settings[key], fresh):
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise TuneError(
                f"the training config has no key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
                where=key,
                fix="see `rayemb config show`",
            )
    try:
        return from_mapping(TrainConfig, data, source="tune")
    except ConfigError as error:
        # The user's key rather than the whole list: of several problems it is the first that he can mend.
        paths = [key for key, _ in error.problems]
        guilty = next((key for key in settings if any(p == key or p.startswith(f"{key}.") for p in paths)), "")
        raise TuneError(error.what, where=guilty or _shown(settings), fix=error.fix) from error


def _set(data: dict[str, Any], path: list[str], value: Any, fresh: set[int]) -> bool:
    node: Any = data
    *parents, leaf = path
    for parent in parents:
        if isinstance(node, list):
            node = node[int(parent)] if parent.isdigit() and int(parent) < len(node) else False
            continue
        if not isinstance(node, dict) or (parent not in node and id(node) not in fresh):
            return False
        if node.get(parent) is None:
            node[parent] = {}
            fresh.add(id(node[parent]))
        node = node[parent]
    if not isinstance(node, dict) or (leaf not in node and id(node) not in fresh):
        return False
    if leaf in _CHOOSERS and node.get(leaf) != value:
        node.clear()
        fresh.add(id(node))
    node[leaf] = value
    return True


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items() if isinstance(values, dict) else ():
        path = f"{prefix}.{name}" if prefix else str(name)
        yield path
        yield from _keys(value, path)


def check_space(base: TrainConfig, space: Space, seed: int = 0) -> list[TrainConfig]:
    """The configs of the space's corners: both ends of each range and every option, together as far as 256 go.

    Raises TuneError naming the parameter whose value the config refuses, or those that do not go together.
    """
    for parameter in space.parameters:
        for end in parameter.distribution.ends:
            draw = {**dict(parameter.needs), parameter.name: end}
            _tried(base, space, parameter, draw)
    corners = []
    for draw in _corners(space, seed):
        try:
            corners.append(applied(base, space.settings(draw)))
        except TuneError as error:
            raise TuneError(
                f"these do not go together: {_shown(space.settings(draw))}: {error.what}",
                where="tune.search",
                fix="narrow one of them, or put one inside an option of the other's choice",
            ) from error
    return corners


def _tried(base: TrainConfig, space: Space, parameter: Parameter, draw: Draw) -> None:
    """Tries one value, whatever other parameters say, with the choices that it needs."""
    alone = Space(tuple(p for p in space.parameters if p.name in draw))
    settings = alone.settings(draw)
    try:
        applied(base, settings)
    except TuneError as error:
        if error.where in settings or "has no key" in error.what:
            what = error.what.removeprefix(f"{error.where}: ")
            raise TuneError(what, where=f"tune.search.{parameter.name}", fix=error.fix) from error
        # Without the others it need not be valid: a choice of losses, say, that one of the ranges is not for.
        if len(space.parameters) == len(draw):
            raise TuneError(error.what, where=f"tune.search.{parameter.name}", fix=error.fix) from error


def _corners(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    ends = [parameter.distribution.ends for parameter in space.parameters]
    names = [parameter.name for parameter in space.parameters]
    if np.prod([float(len(values)) for values in ends]) <= MOST_CORNERS:
        for combination in itertools.product(*ends):
            yield dict(zip(names, combination, strict=True))
        return
    rng = np.random.default_rng(seed)
    for _ in range(MOST_CORNERS):
        yield {name: values[rng.integers(len(values))] for name, values in zip(names, ends, strict=True)}


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
