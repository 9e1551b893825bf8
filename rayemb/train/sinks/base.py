"""What every place that metrics go to has in common."""

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayemb.config import Config
from rayemb.errors import RayembError

Row = Mapping[str, Any]


class SinkError(RayembError):
    """A sink that cannot be used here."""


@dataclass(frozen=True)
class Run:
    """The run whose metrics these are: its folder, its name, its config as plain values, its tags."""

    uri: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """The config as flat `a.b.c` → text."""
        return flat(self.config)


class Sink(ABC):
    """A place that metrics go to; it lives in one thread, and may fail: then its run goes on without it."""

    @abstractmethod
    def begin(self, run: Run, step: int | None) -> None:
        """Rows of `run` after `step` come next: those that are there of later steps are void. None: all are good."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Takes rows; when it returns they are where they should be, or will be after `close`."""

    @abstractmethod
    def close(self) -> None:
        """After the last row."""


class SinkConfig(Config, ABC):
    """Base of the configs of sinks."""

    @abstractmethod
    def build(self) -> Sink:
        """The sink. Raises SinkError where its package is not installed."""

    def abandon(self, run: str) -> None:
        """The run of that name was stopped for good: where runs have a state, it is no longer running."""
        return


def require(package: str, name: str) -> None:
    """Raises SinkError if `package`, which the sink `name` needs, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SinkError(
            f"the sink {name} needs the package {package}",
            where="train.logging.sinks",
            fix="pip install 'rayemb[tracking]', or take the sink out",
        )


def figures(row: Row) -> dict[str, float]:
    """The finite numbers of a row by name, without its step and time; true is 1."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, int | float) and math.isfinite(value)
    }


def plain_name(name: str) -> str:
    """A metric's name as trackers accept it: `val/recall@1` is `val/recall_at_1` there."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b.c` → text of the value."""
    if not isinstance(values, Mapping):
        return {prefix: str(values)}
    found: dict[str, str] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
