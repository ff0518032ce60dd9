"""Tables, progress bars and JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sixfold.eval.progress import Progress as ReportProgress

STANDARD_OUTPUT = Path("-")
UNLIMITED = 10_000
SECONDS_BETWEEN_LINES = 30


class Output:
    """Where a command's words and numbers go.

    With ``--json -`` standard output is the JSON document, so tables move to standard error.
    """

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        self.console = Console(stderr=json_file == STANDARD_OUTPUT, highlight=False)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        align: Literal["left", "right"] = "right",
    ) -> None:
        """Print a table: a column of labels, then numbers, or words aligned to the left."""
        # Narrow, so that the widest table fits a terminal of 80 columns.
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, column in enumerate(columns):
            table.add_column(column, justify=align if index else "left")
        for row in rows:
            table.add_row(*row)
        if align == "right":
            self._whole(table)
        else:
            self.console.print(table)

    def _whole(self, table: Table) -> None:
        """Print a table of numbers wider than a narrow terminal rather than cut numbers off."""
        if table.title is not None:
            self.console.print(table.title, style="italic", markup=False)
            table.title = None
        unlimited = self.console.options.update(width=UNLIMITED)
        needed = Measurement.get(self.console, unlimited, table).maximum
        width = max(needed, self.console.width)
        Console(stderr=self.console.stderr, highlight=False, width=width).print(table)

    def say(self, text: str) -> None:
        """Print a line of prose."""
        self.console.print(text, markup=False)

    def json(self, data: Any) -> None:
        """Write the JSON document, if one was asked for."""
        if self.json_file is None:
            return
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        if self.json_file == STANDARD_OUTPUT:
            print(text, end="")
        else:
            self.json_file.write_text(text, encoding="utf-8")


@contextmanager
def progress_bar(label: str) -> Iterator[ReportProgress]:
    """Show on standard error how far a measurement is; yields what it has to call.

    A bar in a terminal. Elsewhere, in a pipe or a log, a line every half a minute.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(label, console).report
        return
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = TextColumn("{task.description}", markup=False)
    with Progress(shown, *columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{label}: {name}")

        yield report


@contextmanager
def waiting(words: str) -> Iterator[Callable[[], None]]:
    """Say in a terminal what is being waited for, until what it yields is called."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda: None
        return
    status = console.status(words)
    status.start()
    try:
        yield status.stop
    finally:
        status.stop()


class _Lines:
    """How far a measurement is, now and then."""

    def __init__(self, label: str, console: Console) -> None:
        self.label, self.console = label, console
        self.begun = self.said = monotonic()

    def report(self, done: int, total: int, name: str) -> None:
        now = monotonic()
        if now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = now
        spent = now - self.begun
        took, left = (timedelta(seconds=round(s)) for s in (spent, spent * (total - done) / done))
        steps = f"{self.label}: {done:,} of {total:,} steps in {took}"
        line = f"{steps}, the last of {name}; {left} left"
        self.console.print(line, markup=False, soft_wrap=True)


def human_bytes(count: float) -> str:
    """Write a number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
