"""The command line: `python -m adam_jax bench WHAT`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adam_jax.bench import compiled, correctness, steps, storage, training

__all__ = ["main"]


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def main(argv: Sequence[str]) -> int:
    """Run the comparison named on the command line and print it.

    Args:
        argv: the arguments after `bench`.

    Returns:
        The exit status: 0; 2 for wrong arguments, a compiler that is not installed, or a file that cannot be written; 130
        after Ctrl-C, which prints what `steps` and `storage` have measured before.

    Example:
        >>> main(["correctness", "--list"])  # doctest: +ELLIPSIS
        float32, 3000 steps over six decades: worst error
        ...
        0
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except SystemExit as help_was_printed:
        return int(help_was_printed.code or 0)
    except (_UsageError, compiled.NotInstalledError) as error:
        print(f"adam_jax bench: {error}", file=sys.stderr)
    except OSError as error:
        print(f"adam_jax bench: {error.filename}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def _parser() -> _Parser:
    parser = _Parser(prog="python -m adam_jax bench", description="this library beside its peers")
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=_Parser)

    def add(name: str, text: str, run: Any) -> _Parser:
        one = what.add_parser(name, help=text, description=text)
        one.add_argument("--json", action="store_true", help="print JSON instead of tables")
        one.set_defaults(run=run, status=0)
        return one

    one = add("correctness", "where Optax's Adam goes wrong", _correctness)
    one.add_argument("--list", action="store_true", help="say what would be run")
    one = add("training", "float32 runs against the same in float64: error of the loss; a few minutes", _training)
    one.add_argument("--seeds", type=_count, default=5, metavar="N", help="how many (default 5)")
    one.add_argument("--steps", type=_count, metavar="N", help="of each run (default: 300, or 2000 of the longer one)")
    one.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains it")
    one.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors into this file")
    one = add("steps", "time, bytes and memory of a step on this machine, beside Optax and what is installed", _steps)
    one.add_argument(
        "--shapes",
        choices=list(steps.SHAPES),
        default="one",
        help="one leaf of 16M (default), GPT-2's, 2,000 leaves of 2,000 (compiles for minutes), a table of 1M x 64",
    )
    one.add_argument("--rounds", type=_count, default=25, metavar="N", help="steps that each takes at most (default 25)")
    one.add_argument("--seconds", type=_count, default=10, metavar="N", help="of them, once it has taken three (default 10)")
    one.add_argument("--scale", type=_count, default=1, metavar="N", help="divide the size, to try it")
    one.add_argument("--only", default="", metavar="TEXT", help="forms whose name contains it")
    one.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into this file")
    one = add("storage", "narrow moments beside published 8-bit Adams, when the gradients' scale changes", _storage)
    one.add_argument("--at", type=_count, default=1000, metavar="N", help="the step of the change (default 1000)")
    one.add_argument("--steps", type=_count, default=6000, metavar="N", help="how many (default 6000: some minutes)")
    one.add_argument("--only", default="", metavar="TEXT", help="optimizers whose name contains it")
    one = add("compiled", "bytes and kernels of a step by the compilers of GPU and TPU, which need not be here", _compiled)
    one.add_argument("--on", choices=compiled.TARGETS, nargs="+", default=list(compiled.TARGETS), help="default: all")
    one.add_argument("--only", default="", metavar="TEXT", help="forms whose name contains it")
    one.add_argument("--odd", action="store_true", help="leaves of odd shapes, not one of 16384 x 16384")
    one.add_argument("--leaves", type=_count, metavar="N", help="compile time of this many leaves instead")
    one.add_argument("--unrepeated", action="store_true", help="with --leaves: each of another shape")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")
    return int(text)


def _correctness(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print("\n".join(row.case for row in correctness.CORRECTNESS))
        return 0
    if arguments.json:
        print(json.dumps(list(correctness.rows()), indent=1))
        return 0
    print("| case | optax | adam_jax | exact |\n|---|---|---|---|")
    for row in correctness.rows():
        print(f"| {' | '.join(row.values())} |", flush=True)
    return 0


def _training(arguments: argparse.Namespace) -> int:
    chosen = [problem for problem in training.PROBLEMS if arguments.only in problem.name]
    if not chosen:
        names = ", ".join(problem.name for problem in training.PROBLEMS)
        raise _UsageError(f"argument --only: no problem contains {arguments.only!r}; there are: {names}")
    found, console = {}, Console(stderr=True)
    for problem in chosen:
        found[problem.name] = []
        for seed in range(arguments.seeds):
            with console.status(f"{problem.name}, seed {seed}"):
                found[problem.name].append(training.trained(problem, seed, arguments.steps or problem.steps))
    rows = training.summary(found)
    for row in rows:
        row["shown"] = {lib: "{median:.1e} ({least:.1e} to {most:.1e})".format(**row[lib]) for lib in training.MODULES}
    columns = {"problem": "", "steps": "steps", "seeds": "seeds", "optax": "optax", "adam_jax": "adam_jax"}
    shown = [{**row, **row.pop("shown")} for row in rows]
    title = "float32 against float64: largest relative error of the loss, median (range) over seeds"
    return _put(arguments, rows, _table(title, columns, shown), training.figure(found) if arguments.plot else None)


def _steps(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory on a GPU, too
    measured = steps.measured(arguments.shapes, arguments.only, arguments.rounds, arguments.seconds, arguments.scale)
    rows = _gathered(arguments, measured)
    columns = {
        "form": "",
        "ms": "ms",
        "ratio": "of Optax's",
        "share": "of copy rate",
        "limit": "least",
        "moved": "moved",
        "state": "state",
        "peak": "peak",
        "compile": "compile, s",
    }
    title = f"a step on {jax.devices()[0].device_kind}, medians of up to {arguments.rounds}; bytes a parameter"
    return _put(arguments, rows, _table(title, columns, rows, steps.NOTE), steps.figure(rows) if arguments.plot else None)


def _storage(arguments: argparse.Namespace) -> int:
    if arguments.at >= arguments.steps:
        raise _UsageError(f"argument --at: must come before the last of {arguments.steps} steps, got {arguments.at}")
    rows = _gathered(arguments, storage.rows(arguments.only, arguments.at, arguments.steps))
    shown = [dict(row) for row in rows]
    for row in shown:
        row.update({name: "{worst:.3g}\n→ {last:.3g}".format(**row[name]) for name in storage.GROUPS if name in row})
        row.update({name: "{mean:.0e}\n≤ {worst:.0e}".format(**row[name]) for name in storage.SPREADS if name in row})
    columns = {name: name for name in storage.COLUMNS} | {"form": ""}
    title = f"rms of updates over float32's at the worst of {arguments.steps - arguments.at} steps → in the last 100"
    return _put(arguments, rows, _table(title, columns, shown, storage.NOTE), None)


def _compiled(arguments: argparse.Namespace) -> int:
    shapes = compiled.ODD_SHAPES if arguments.odd else (compiled.SHAPE,)
    rows: list[dict[str, Any]] = []
    for target in arguments.on:
        try:
            if arguments.leaves:
                repeated = not arguments.unrepeated
                rows += compiled.compile_times(target, arguments.only, arguments.leaves, repeated=repeated)
            else:
                rows += compiled.step_rows(target, arguments.only, shapes)
        except compiled.NotInstalledError as error:
            if len(arguments.on) == 1:
                raise
            print(f"adam_jax bench: {error}", file=sys.stderr)
    if arguments.leaves:
        title = f"{arguments.leaves} leaves: seconds to trace and to compile, and how often Optax's"
        names = ("target", "form", "lower", "lower_ratio", "compile", "compile_ratio")
    else:
        title = "one large leaf: bytes a parameter that a step moves, and the least it could"
        names = (
            "target",
            "form",
            *(["shape"] if arguments.odd else []),
            "limit",
            "bytes",
            "kernels",
            "temporaries",
            "seconds",
        )
    return _put(arguments, rows, _table(title, {name: name for name in names}, rows), None)


def _gathered(arguments: argparse.Namespace, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, with a line that says how far it is; after Ctrl-C those that there are."""
    found = []
    try:
        with Console(stderr=True).status("the first") as status:
            for row in rows:
                found.append(row)
                status.update(f"after {row['form']}")
    except KeyboardInterrupt:
        if not found:
            raise
        arguments.status = 130
    return found


def _put(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]], table: Table, drawn: Figure | None) -> int:
    if drawn is not None:
        drawn.savefig(arguments.plot, dpi=150)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        Console(width=max(Console().width, 115)).print(table)  # a row is a row, in a log too
    return arguments.status


def _table(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]], note: str = "") -> Table:
    lines = [note, *(f"{row['form']}: {row['missing']}" for row in rows if "missing" in row)]
    caption = Text("\n".join(filter(None, lines)))  # [storage-peers] is no markup
    table = Table(title=title, caption=caption, caption_justify="left")
    for name, header in columns.items():
        words = name in ("form", "target", "problem")
        table.add_column(header, justify="left" if words else "right", no_wrap=words, overflow="ignore" if words else "fold")
    for row in rows:
        if "missing" not in row:
            table.add_row(*(_shown(row.get(name)) for name in columns))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
