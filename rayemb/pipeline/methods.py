"""What rayemb has of the literature, read off the code, so that the list cannot drift from it."""

import typing
from dataclasses import dataclass

from rich.table import Table

from rayemb.config.literature import literature
from rayemb.curate import AnyStep
from rayemb.data.samplers import AnySampler
from rayemb.losses import AnyLoss
from rayemb.train.config import AnyObjective
from rayemb.train.optimizers import AnyOptimizer
from rayemb.tune.schedulers import AnyScheduler, NoneConfig
from rayemb.tune.search import AnySearcher, GridConfig

# Family → the union of its configs. A family that joins adds a line.
FAMILIES = {
    "losses": AnyLoss,
    "objectives": AnyObjective,
    "curation": AnyStep,
    "samplers": AnySampler,
    "optimizers": AnyOptimizer,
    "searchers": AnySearcher,
    "schedulers": AnyScheduler,
}
# No paper stands behind these.
PLAIN = (GridConfig, NoneConfig)


@dataclass(frozen=True)
class Method:
    """One method: what a config calls it, what it is, where it comes from and which test shows it."""

    family: str
    name: str
    summary: str
    source: str
    card: str
    test: str


def methods() -> list[Method]:
    """Every method that a config can name, by family and name, but for `PLAIN`."""
    found = [
        _method(family, config)
        for family, union in FAMILIES.items()
        for config in typing.get_args(typing.get_args(union)[0])
        if config not in PLAIN
    ]
    return sorted(found, key=lambda method: (method.family, method.name))


def _method(family: str, config: type) -> Method:
    known = literature(config)
    summary = " ".join((config.__doc__ or "").split("\n\n")[0].split())
    *rooms, stem = config.__module__.split(".")[1:]
    name = config.model_fields["name"].default  # type: ignore[attr-defined]
    return Method(
        family=family,
        name=name,
        summary=summary,
        source=known.source,
        card=known.card,
        test=f"tests/{'/'.join(rooms)}/test_{stem}.py",
    )


def table(rows: list[Method]) -> Table:
    """The methods as a table."""
    out = Table(pad_edge=False)
    for title, whole in (("name", True), ("what it does", False), ("source", False), ("card", True)):
        out.add_column(title, no_wrap=whole)
    for row in rows:
        out.add_row(f"{row.family}/{row.name}", row.summary, row.source, row.card)
    return out
