"""`rayemb report`: training runs on the terminal, and as one page."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayemb.evaluate.page import figure_text
from rayemb.train.report import Comparison, Value, compare, write_page


def report(uris: Sequence[str], console: Console, *, out: str | None = None) -> Comparison:
    """Prints the runs at `uris` side by side; `out`: also written as a page with curves to this URI.

    Raises ReportError where no run has reported anything, StorageError.
    """
    comparison = compare(uris)
    show(comparison, console)
    if out:
        console.print(f"page {write_page(out, comparison)}", markup=False)
    return comparison


def show(comparison: Comparison, console: Console) -> None:
    """Prints the last and the best values, and the settings that differ."""
    values = _table("metric", comparison)
    for name in comparison.metrics:
        values.add_row(Text(name), *(_cell(run.value(name)) for run in comparison.runs))
    console.print(values)
    if comparison.differences:
        settings = _table("setting", comparison)
        for key, found in comparison.differences.items():
            settings.add_row(Text(key), *(Text(value) for value in found))
        console.print(settings)


def _table(first: str, comparison: Comparison) -> Table:
    table = Table()
    table.add_column(first)
    for run in comparison.runs:
        table.add_column(Text(run.name), justify="right")
    return table


def _cell(value: Value | None) -> Text:
    if value is None:
        return Text("")
    best = f"\nbest {figure_text(value.best)} at {value.best_step}" if value.best is not None else ""
    return Text(figure_text(value.last) + best)
