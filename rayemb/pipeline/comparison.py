"""`rayemb compare`: whether one model is better than another, on the terminal, and as one page."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayemb.evaluate.compare import SuiteComparison, compare_reports, p_text, write_comparison
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.page import figure_text, signed_text

_STYLES = {"better": "green", "worse": "red"}


def compare(
    reports: Sequence[str],
    console: Console,
    *,
    metrics: Sequence[str] = (),
    confidence: float = 0.95,
    out: str | None = None,
) -> SuiteComparison:
    """Compares reports A B, A2 B2, ... and prints what is different; `out`: also written as a page in this folder.

    Raises EvaluateError where they do not compare.
    """
    if len(reports) % 2:
        raise EvaluateError(
            f"{len(reports)} reports are no pairs", where="compare", fix="name them as A B, then A2 B2 of another seed"
        )
    pairs = [(reports[i], reports[i + 1]) for i in range(0, len(reports), 2)]
    found = compare_reports(pairs, metrics=metrics, confidence=confidence)
    show(found, console)
    if out:
        console.print(f"page {write_comparison(out, found)}", markup=False)
    return found


def show(found: SuiteComparison, console: Console) -> None:
    """Prints a row a figure, and the verdict in a line."""
    table = Table()
    for name in ("task", "metric", "A", "B", "A − B", f"{found.confidence:.0%} interval", "p (Holm)", "A is"):
        table.add_column(name, justify="left" if name in ("task", "metric", "A is") else "right")
    for each in found.figures:
        ends = f"{signed_text(each.low)} to {signed_text(each.high)}"
        numbers = (figure_text(each.a), figure_text(each.b), signed_text(each.difference), ends, p_text(each.p))
        verdict = Text(each.verdict, style=_STYLES.get(each.verdict, "dim"))
        table.add_row(Text(each.task), Text(each.metric), *map(Text, numbers), verdict)
    console.print(table)
    console.print(f"A: {found.names[0]}; B: {found.names[1]}", markup=False)
    for note in found.notes:
        console.print(note, markup=False)
    console.print(found.summary, markup=False)
