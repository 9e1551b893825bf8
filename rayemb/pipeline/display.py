"""Progress and results on the terminal; plain lines where the output is a file or a job's log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 5.0


class Display:
    """Shows one stage at a time."""

    def __init__(self, console: Console | None = None) -> None:
        # A file or a job's log has no width of its own; 80 columns would cut ids in tables.
        width = None if sys.stdout.isatty() else 120
        self.console = console or Console(highlight=False, soft_wrap=True, width=width)

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        """A progress bar titled `title`; yields the function that moves it: `(done, total, text)`."""
        started = time.monotonic()
        self.console.print(f"[bold]{title}[/bold]")
        if not self.console.is_terminal:
            yield self._lines()
        else:
            columns = (SpinnerColumn(), BarColumn(30), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
            with Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console, transient=True) as bar:
                task = bar.add_task(title, total=None, text="starting")

                def move(done: int, total: int, text: str) -> None:
                    bar.update(task, completed=done, total=total if done else None, text=text)

                yield move
        self.console.print(f"  done in {time.monotonic() - started:.1f} s")

    def result(self, summary: str, uri: str = "") -> None:
        """One line about what came out, and where it lies."""
        self.console.print(f"  {summary}", markup=False)
        if uri:
            self.console.print(f"  → {uri}", markup=False)

    def _lines(self) -> Callable[[int, int, str], None]:
        last, shown = 0.0, ""

        def move(done: int, total: int, text: str) -> None:
            nonlocal last, shown
            now = time.monotonic()
            if text != shown and (now - last >= LINE_EVERY_S or done == total):
                self.console.print(f"  {done}/{total} {text}", markup=False)
                last, shown = now, text

        return move
