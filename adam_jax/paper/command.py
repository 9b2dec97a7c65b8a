"""The command line: `python -m adam_jax paper FIGURE`."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adam_jax.paper import plots, results
from adam_jax.paper.data import Where
from adam_jax.paper.figures import FIGURES
from adam_jax.paper.formats import DataError
from adam_jax.paper.lab import Lab, Plan, length

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run `paper` with these arguments.

    Args:
        argv: what follows `python -m adam_jax paper`.

    Returns:
        The exit status: 0; 2 for wrong arguments, data or output folder; 130 after Ctrl-C.

    Example:
        >>> main(["no-such-figure"])
        2
    """
    console = Console()
    try:
        arguments = _parser().parse_args(argv)
        if arguments.figure == "list":
            console.print(_listing())
            return 0
        names = list(FIGURES) if arguments.figure == "all" else [arguments.figure]
        return max(_one(console, name, arguments, keep_going=len(names) > 1) for name in names)
    except (_UsageError, DataError) as error:
        return _complain(error)
    except OSError as error:
        return _complain(f"{error.filename or 'the output folder'}: {error.strerror or error}")
    except KeyboardInterrupt:
        console.print("stopped; the same command with --resume goes on from here")
        return 130


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m adam_jax paper", description="Reproduce an experiment of the paper.",
        epilog="ADAM_JAX_DATA names a folder in which data is looked for before packages and downloads; "
        "ADAM_JAX_CACHE the folder for downloads.",
    )  # fmt: skip
    parser.add_argument(
        "figure", choices=[*FIGURES, "all", "list"], metavar="FIGURE", help=f"{', '.join(FIGURES)}, all or list"
    )
    parser.add_argument("--quick", action="store_true", help="a short run that shows that everything works")
    parser.add_argument("--data", type=Path, metavar="DIR", help="look for the data in this folder and nowhere else")
    parser.add_argument("--source", choices=["auto", "package", "download"], default="auto",
                        help="where data may come from without --data; 'package' uses no network")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="for pictures and curves (default: out)"
    )
    parser.add_argument(
        "--epochs", type=partial(_at_least, 1), metavar="N", help="passes over the data, in place of the figure's own"
    )
    parser.add_argument(
        "--seeds", type=partial(_at_least, 1), metavar="N", help="curves for each optimizer, in place of the figure's own"
    )
    parser.add_argument("--seed", type=partial(_at_least, 0, most=2**31), default=0, metavar="N", help="the first seed")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run left")
    return parser


def _at_least(least: int, text: str, *, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"must be a whole number of at most {most}, got {text}")
    return value


def _complain(error: object) -> int:
    print("adam_jax paper:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def _one(console: Console, name: str, arguments: argparse.Namespace, keep_going: bool) -> int:
    """Run one figure; with `keep_going`, data that it lacks is reported and the next figure gets its turn."""
    try:
        _run(console, name, arguments)
    except DataError as error:
        if not keep_going:
            raise
        return _complain(f"{name}: {error}")
    return 0


def _run(console: Console, name: str, arguments: argparse.Namespace) -> None:
    stem, work = arguments.out / name, arguments.out / f".unfinished-{name}"
    identity = {"figure": name, "quick": arguments.quick, "epochs": arguments.epochs, "seeds": arguments.seeds,
                "seed": arguments.seed, "data": str(arguments.data), "source": arguments.source}  # fmt: skip
    if arguments.resume and (data := _finished(stem, identity)):
        console.print(f"{name} is finished in {arguments.out}, on {escape(data)}", highlight=False)
        return
    if not arguments.resume and work.exists():
        console.print(f"starting {name} afresh, without --resume: unfinished work in {work} is deleted", highlight=False)
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)  # an output folder that cannot be written is found now, not at the end
    console.rule(f"{name}: {FIGURES[name].title}")
    begin = time.monotonic()
    with _bar(console) as bar:
        where = Where(arguments.data, arguments.source)
        lab = Lab(where, arguments.quick, arguments.epochs, arguments.seeds, arguments.seed, work,
                  partial(_task, bar))  # fmt: skip
        result = FIGURES[name].make(lab)
    paths = results.write(result, partial(plots.save, result), stem.with_name(name + result.suffix), identity)
    _report(console, result, arguments.quick)
    console.print(f"{time.monotonic() - begin:.0f} s; wrote {', '.join(map(str, paths))}", highlight=False)
    shutil.rmtree(work, ignore_errors=True)


def _bar(console: Console) -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn()]  # fmt: skip
    return Progress(*columns, console=console)


def _task(bar: Progress, title: str, steps: int) -> Callable[[int], None]:
    task = bar.add_task(title, total=steps)
    return lambda done: bar.advance(task, done)


def _finished(stem: Path, identity: dict[str, Any]) -> str | None:
    """What the finished figure was made from, or None."""
    for record in (stem.with_name(f"{stem.name}{suffix}.json") for suffix in ("", "_stand_in")):
        try:
            if record.exists() and (content := json.loads(record.read_text()))["identity"] == identity:
                return str(content["settings"]["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{record} is no record of a figure ({error}): delete it") from None
    return None


def _report(console: Console, result: results.Result, quick: bool) -> None:
    for content in result.tables:
        table = Table(*content.columns, title=content.title)
        for row in content.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    plan = Plan(**result.settings["plan"])
    for claim in result.claims:
        verdict = "[green]held here[/]" if claim.held else "[red]did not hold here[/]"
        verdict += " in a quick run, too short to judge by" if quick else f" in {length(plan)}" if plan.whole else ""
        console.print(f"The paper: {escape(claim.text)}: {verdict} ({escape(claim.numbers)})", highlight=False)
    console.print(escape(result.caption), style="dim", highlight=False)


def _listing() -> Table:
    table = Table("figure", "experiment", "needs", "took on two cores")
    for name, figure in FIGURES.items():
        table.add_row(name, figure.title, figure.needs, figure.took)
    return table
