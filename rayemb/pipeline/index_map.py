"""`rayemb index map`: the map of the run's index, made in this process, and one line about it."""

from rich.console import Console

from rayemb import storage
from rayemb.index import IndexMap, build_map
from rayemb.pipeline.config import RunConfig


def make_map(config: RunConfig, console: Console) -> IndexMap:
    """Makes the map under `index.map` and prints what it is."""
    with storage.environment(config.storage.environment()), console.status("laying out a sample of the rows"):
        made = build_map(config.uri("index"), config.index.map)
    kept = "" if made.neighbours_kept is None else f"; {made.neighbours_kept:.0%} of nearest neighbours kept"
    console.print(
        f"{len(made.ids):,} of {made.rows:,} rows of index {made.index_version} by {made.method}{kept}", markup=False
    )
    return made
