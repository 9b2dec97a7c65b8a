"""The command line: `python -m adam_jax paper FIGURE`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax

from adam_jax.paper import plots, results, saved
from adam_jax.paper.data import Where
from adam_jax.paper.figures import FIGURES
from adam_jax.paper.formats import DataError
from adam_jax.paper.lab import Lab, conditions
from adam_jax.paper.report import Report

__all__ = ["main"]

MOST_SEEDS, MOST_EPOCHS = 1000, 100_000
DESCRIPTION = """Reproduce an experiment of "Adam: A Method for Stochastic Optimization" (Kingma & Ba, 2015) on real data.

figures:
{figures}
  all     all of them, one after another
  list    what each needs and how long it takes"""
EPILOG = """Each figure is a picture (.png), its curves (.npz) and a record (.json) in the output folder, with the step sizes
tried and, for each of the paper's claims, whether it held. An interrupted run goes on where the same command is given again;
a finished one is left alone. Nothing is overwritten: what other settings or data left is kept under another name.

ADAM_JAX_DATA names a folder in which data is looked for before packages and downloads; ADAM_JAX_CACHE the folder for
downloads."""


def main(argv: Sequence[str]) -> int:
    """Run `paper` with these arguments.

    Args:
        argv: what follows `python -m adam_jax paper`.

    Returns:
        The exit status: 0; 2 for wrong arguments, data or output folder; 130 after Ctrl-C.

    Raises:
        OSError: where the terminal, or what takes its place, cannot be written.

    Example:
        >>> main(["no-such-figure"])
        2
    """
    report = Report()
    try:
        arguments = _parser().parse_args(argv)
        if arguments.figure == "list":
            report.listing(FIGURES.values())
            return 0
        _check_backend()
        names = list(FIGURES) if arguments.figure == "all" else [arguments.figure]
        return max([_one(report, name, arguments, keep_going=len(names) > 1) for name in names])
    except SystemExit:  # argparse has printed its help
        return 0
    except (_UsageError, DataError) as error:
        return _complain(error)
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("adam_jax paper: stopped; the same command goes on from here", file=sys.stderr)
        return 130


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own swallows errors of a full or closed pipe

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<7} {figure.title}" for name, figure in FIGURES.items())
    parser = _Parser(
        prog="python -m adam_jax paper",
        description=DESCRIPTION.format(figures=listing),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("figure", choices=[*FIGURES, "all", "list"], metavar="FIGURE", help=f"{', '.join(FIGURES)}, all or list")
    add("--quick", action="store_true", help="a short run that shows that everything works")
    add("--data", type=_path, metavar="DIR", help="look for the data in this folder and nowhere else")
    sources = "where data may come from without --data; 'package' uses no network"
    add("--source", choices=["auto", "package", "download"], default="auto", help=sources)
    add("--out", type=_path, default=Path("out"), metavar="DIR", help="for pictures and curves (default: out)")
    epochs, seeds = partial(_whole, 1, MOST_EPOCHS), partial(_whole, 1, MOST_SEEDS)
    add("--epochs", type=epochs, metavar="N", help="passes over the data, in place of the figure's own")
    add("--seeds", type=seeds, metavar="N", help="curves for each optimizer, in place of the figure's own")
    add("--seed", type=partial(_whole, 0, 2**31 - 1 - MOST_SEEDS), default=0, metavar="N", help="the first seed")
    add("--fresh", action="store_true", help="start over; what is there is kept under another name")
    return parser


def _whole(least: int, most: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text[:40]}")
    return value


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must name a folder, got {text[:40]!r}")
    return Path(text)


def _check_backend() -> None:
    try:
        jax.devices()
    except RuntimeError as error:  # a variable names one that is not there
        raise _UsageError(f"JAX cannot start, see JAX_PLATFORMS: {error}") from None


def _complain(error: object) -> int:
    print("adam_jax paper:", " ".join(str(error).split()), file=sys.stderr)
    return 2


def _one(report: Report, name: str, arguments: argparse.Namespace, keep_going: bool) -> int:
    """Run one figure; with `keep_going`, data that it lacks is reported and the next figure gets its turn."""
    try:
        _run(report, name, arguments)
    except DataError as error:
        if not keep_going:
            raise
        return _complain(f"{name}: {error}")
    return 0


def _run(report: Report, name: str, arguments: argparse.Namespace) -> None:
    """Arguments, data and the output folder are checked first; only then is earlier work looked at."""
    figure, out = FIGURES[name], arguments.out
    where = Where(arguments.data, arguments.source)
    lab = Lab(where, arguments.quick, arguments.epochs, arguments.seeds, arguments.seed, None, report.progress, report.say)
    plan = lab.plan(figure.full, figure.quick)
    data = figure.data(where, plan)
    identity = {
        "format": saved.FORMAT,
        "figure": name,
        "quick": lab.quick,
        "seed": lab.seed,
        "plan": vars(plan),
        "data": saved.fingerprint(data.x, data.y),
    }
    stem = out / (name + "_stand_in" * data.stand_in)
    out.mkdir(parents=True, exist_ok=True)
    with saved.locked(out, name) as owner:
        if not arguments.fresh and results.finished(stem, identity):
            report.say(f"{name} is finished in {out}, on {data.name}; --fresh starts over")
            return
        work = out / f".unfinished-{name}-{saved.digest(identity)[:12]}"
        _look_at(report, work, owner, arguments.fresh)
        lab = replace(lab, folder=work)
        report.rule(f"{name}: {figure.title}")
        begin = time.monotonic()
        with report.working():
            result = figure.make(lab, plan, data)
        under = conditions(data, plan, lab.quick)
        paths = _keep(report, result, stem, identity, under)
        saved.clear(work)
    report.result(result, under)
    report.say(f"{time.monotonic() - begin:.0f} s; wrote {', '.join(map(str, paths))}")


def _look_at(report: Report, work: Path, owner: int, fresh: bool) -> None:
    """Make the folder of unfinished work of these settings and data, or say what there is, of it and of others'."""
    if fresh and os.path.lexists(work):
        report.say(f"starting over: unfinished work is kept as {saved.aside(work)[0]}")
    if any(saved.folder(work, owner).iterdir()):
        report.say(f"going on with unfinished work in {work}")
    figure = work.name.rsplit("-", 1)[0]
    if others := sorted(str(path) for path in work.parent.glob(f"{figure}-*") if path != work):
        report.say(f"unfinished work of other settings or data is left alone: {', '.join(others[:3])}")


def _keep(report: Report, result: results.Result, stem: Path, identity: dict[str, Any], under: str) -> list[Path]:
    """Write the figure; an earlier one of that name is moved aside first."""
    old = [path for path in results.files(stem) if path.exists() or path.is_symlink()]
    if old:
        moved = ", ".join(path.name for path in saved.aside(*old))
        report.say(f"an earlier {stem.name} is kept as {moved}")
    return results.write(result, partial(plots.save, result), stem, identity, under)
