"""What the command says: tables, verdicts and progress, on a terminal or in a log."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from adam_jax.paper.lab import Figure
from adam_jax.paper.results import Result

__all__ = ["Report"]

EVERY = 60.0  # seconds between two lines of progress in a log


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the process here, without a word


class Report:
    """Prints to standard output; text is text, whatever brackets it has."""

    def __init__(self) -> None:
        self.console = _Console(markup=False, emoji=False, highlight=False)
        if not self.console.is_terminal and not os.environ.get("COLUMNS"):
            self.console.width = 125
        self.bars: Progress | None = None

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True)

    def rule(self, title: str) -> None:
        """Print what begins."""
        self.console.rule(Text(title))

    def listing(self, figures: Iterable[Figure]) -> None:
        """Print the registry."""
        table = Table("figure", "experiment", "needs", "took on two cores")
        for figure in figures:
            table.add_row(figure.name, figure.title, figure.needs, figure.took)
        self.console.print(table)

    def result(self, result: Result, under: str) -> None:
        """Print tables and verdicts; `under` says what differs from the paper's experiment."""
        for content in result.tables:
            table = Table(*content.columns, title=Text(content.title))
            for row in content.rows:
                table.add_row(*row)
            self.console.print(table)
        self.say(f"The paper's claims, {under or 'in its own experiment'}:")
        for claim in result.claims:
            verdict = ("held", "green") if claim.held else ("did not hold", "yellow" if under else "red")
            self.console.print(Text.assemble("  ", verdict, f": {claim.text}: {claim.numbers}"), soft_wrap=True)
        if "other data" in under:
            self.say(
                "Other data is another experiment: a claim that fails on it is not refuted, nor one that holds confirmed."
            )
        self.console.print(Text(result.caption, "dim"), soft_wrap=True)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside, `progress` may be shown."""
        if not self.console.is_terminal:
            yield
            return
        shortened = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        name, left = TextColumn("{task.description}", markup=False, table_column=shortened), TextColumn("left")
        columns = [name, BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn(), left, TimeRemainingColumn()]
        with Progress(*columns, console=self.console, expand=True) as self.bars:
            yield
        self.bars = None

    def progress(self, title: str, steps: int) -> Callable[[int], None]:
        """A bar on a terminal, and in a log a line a minute and one at the end; returns what is told of steps done."""
        if not self.bars:
            return _Lines(self, title, steps).advance
        bars, task = self.bars, self.bars.add_task(title, total=steps)
        return lambda done: bars.advance(task, done)


class _Lines:
    """Progress as lines."""

    def __init__(self, report: Report, title: str, steps: int) -> None:
        self.report, self.title, self.steps, self.done = report, title, steps, 0
        self.begin = self.said = time.monotonic()

    def advance(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if done and (now - self.said >= EVERY or self.done >= self.steps):
            self.said = now
            share = f"{self.done:,} of {self.steps:,} steps, {100 * self.done // self.steps} %"
            self.report.say(f"{self.title}: {share}, {now - self.begin:.0f} s")
