"""What an experiment is given: data, settings, a way to train with a progress bar; and the steps that most of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adam_jax.paper.data import Dataset, Where
from adam_jax.paper.methods import METHODS
from adam_jax.paper.results import Curve, Table
from adam_jax.paper.training import Curves, Job, train

__all__ = ["PASSES", "Comparison", "Lab", "Plan", "caption", "compare", "length", "subset"]

PASSES = "iterations over entire data set"
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Plan:
    """How long an experiment runs.

    Attributes:
        epochs: passes over the data for the curves.
        seeds: how many curves an optimizer has.
        search: passes over the data for each step size of the grid, one seed.
        examples: how many examples to use; None for all.
        alphas: how many step sizes from the middle of each grid to try; None for all. With one there is no search.
        whole: the epochs of the figure at its full length, where this plan is for fewer.
    """

    epochs: int
    seeds: int
    search: int
    examples: int | None = None
    alphas: int | None = None
    whole: int | None = None


@dataclass(frozen=True)
class Lab:
    """What an experiment is given.

    Attributes:
        where: where data is looked for.
        quick: whether the short plan is asked for.
        epochs: replaces the plan's, if given.
        seeds: replaces the plan's, if given.
        seed: the first seed.
        folder: for unfinished work; None keeps nothing.
        progress: from a title and a number of steps to a function that is told of steps done.
    """

    where: Where = field(default_factory=Where)
    quick: bool = False
    epochs: int | None = None
    seeds: int | None = None
    seed: int = 0
    folder: Path | None = None
    progress: Progress = lambda _title, _steps: lambda _done: None

    def plan(self, full: Plan, quick: Plan) -> Plan:
        """The plan to follow."""
        plan = quick if self.quick else full
        epochs = self.epochs or plan.epochs
        whole = full.epochs if epochs < full.epochs else None
        return replace(plan, epochs=epochs, search=min(plan.search, epochs), seeds=self.seeds or plan.seeds, whole=whole)

    def seeds_of(self, plan: Plan) -> tuple[int, ...]:
        """The seeds of a plan."""
        return tuple(range(self.seed, self.seed + plan.seeds))

    def train(self, title: str, jobs: Sequence[Job]) -> list[Curves]:
        """Train jobs one after another under one progress bar."""
        advance = self.progress(title, sum(job.work for job in jobs))
        return [train(job, advance=advance, folder=self.folder) for job in jobs]


@dataclass(frozen=True)
class Comparison:
    """Optimizers at their best step sizes.

    Attributes:
        curves: by method, one setting each.
        alphas: the best step size by method.
        grids: the step sizes tried by method.
        table: the step sizes tried, the cost each led to, and the costs of the best over the seeds.
    """

    curves: dict[str, Curves]
    alphas: dict[str, float]
    grids: dict[str, list[float]]
    table: Table

    def final(self, method: str) -> float:
        """Mean cost over the last epoch and the seeds."""
        return float(self.curves[method].last.mean())

    def overall(self, method: str, epochs: float = np.inf) -> float:
        """Mean cost over the whole run, or its first epochs, and the seeds; inf if one of them diverged."""
        curves = self.curves[method]
        cost = float(curves.costs[..., curves.passes <= epochs].mean())
        return cost if np.isfinite(cost) else float("inf")

    def lines(self, suffix: str = "", dashed: bool = False) -> list[Curve]:
        """One curve for each method."""
        return [
            Curve(METHODS[name].label + suffix, curves.passes, curves.costs[:, 0], METHODS[name].colour,
                  dashed or METHODS[name].dashed)
            for name, curves in self.curves.items()
        ]  # fmt: skip


def compare(
    lab: Lab, plan: Plan, title: str, grids: Mapping[str, Sequence[float]], job: Callable[..., Job], stem: str = ""
) -> Comparison:
    """Find each optimizer's best step size on a grid with one seed, then train it there with every seed.

    The best is the one with the lowest training cost over the last epoch of the search. One on the edge of its grid is
    marked, because a better one may lie beyond.

    Args:
        lab: where to train.
        plan: for how long.
        title: of the experiment.
        grids: step sizes by method.
        job: called with name, method, grid, seeds and epochs; gives the job.
        stem: begins the job's name, where a figure makes several comparisons.

    Returns:
        The comparison.

    Example:
        >>> from adam_jax.paper import problems
        >>> x, y = np.eye(4, dtype=np.uint8) * 255, np.arange(4, dtype=np.int32)
        >>> def job(name, method, grid, seeds, epochs):
        ...     return Job(name, method, problems.logistic(4, 4), x, y, grid, seeds, epochs, batch=2)
        ...
        >>> compare(Lab(), Plan(1, 2, 1), "demo", {"adam": [0.1, 1.0]}, job).alphas
        {'adam': 0.1}
    """
    seeds = lab.seeds_of(plan)
    grids = {method: _middle(grid, plan.alphas) for method, grid in grids.items()}
    wide = {method: {"alpha": np.array(grid)} for method, grid in grids.items() if len(grid) > 1}
    searches = [job(f"search-{stem}{m}", m, grid, seeds[:1], plan.search) for m, grid in wide.items()]
    found = dict(zip(wide, (c.last[0] for c in lab.train(f"{title}: step sizes", searches)), strict=True))
    alphas = {m: float(grid[int(np.argmin(found[m])) if m in found else 0]) for m, grid in grids.items()}
    finals = [job(f"final-{stem}{m}", m, {"alpha": np.array([alpha])}, seeds, plan.epochs) for m, alpha in alphas.items()]
    curves = dict(zip(grids, lab.train(f"{title}: curves", finals), strict=True))
    return Comparison(curves, alphas, grids, _table(title, plan, grids, found, alphas, curves))


def _table(title: str, plan: Plan, grids: Any, found: Any, alphas: Any, curves: dict[str, Curves]) -> Table:
    rows = []
    for name, grid in grids.items():
        tried = "  ".join(f"{alpha:g}: {cost:.4g}" for alpha, cost in zip(grid, found.get(name, ()), strict=False))
        edge = " (edge of grid)" if len(grid) > 1 and alphas[name] in (grid[0], grid[-1]) else ""
        last = curves[name].last
        rows.append([
            METHODS[name].label, tried or "not searched", f"{alphas[name]:g}{edge}",
            f"{last.mean():.4f} ({last.min():.4f} to {last.max():.4f})", f"{curves[name].seconds[-1]:.3g}",
        ])  # fmt: skip
    columns = ["optimizer", f"alpha: cost after a search of {plan.search} epochs", "best alpha",
               f"cost in epoch {plan.epochs}, {plan.seeds} seeds", "s a seed"]  # fmt: skip
    return Table(title, columns, rows)


def _middle(grid: Sequence[float], count: int | None) -> list[float]:
    first = 0 if count is None else max(0, (len(grid) - count + 1) // 2)
    return list(grid[first : len(grid) if count is None else first + count])


def subset(data: Dataset, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """As many examples as the plan wants, drawn at random with a fixed seed.

    Args:
        data: a data set.
        plan: its `examples` counts.

    Returns:
        Features and labels.

    Example:
        >>> digits = Dataset("d", "s", np.zeros((5, 2), np.uint8), np.zeros(5, np.int32))
        >>> [part.shape for part in subset(digits, Plan(1, 1, 1, examples=3))]
        [(3, 2), (3,)]
    """
    if plan.examples is None or plan.examples >= len(data.x):
        return data.x, data.y
    rows = np.random.default_rng(0).permutation(len(data.x))[: plan.examples]
    return data.x[rows], data.y[rows]


def caption(data: Dataset, examples: int, plan: Plan, quick: bool, *more: str) -> str:
    """The line under a picture: what was trained on, and how.

    Args:
        data: the data set.
        examples: how many of its examples were used.
        plan: the plan followed.
        quick: whether it was the short one.
        more: further remarks.

    Returns:
        One to three lines.

    Example:
        >>> digits = Dataset("MNIST", "a package", np.zeros((5, 2), np.uint8), np.zeros(5, np.int32))
        >>> caption(digits, 5, Plan(9, 1, 2), False)
        'MNIST (a package); 5 examples, minibatch 128; 9 epochs; 1 seed; step size from 2 epochs'
    """
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds, band from least to greatest"
    search = [f"step size from {plan.search} epochs"] if plan.search and plan.alphas != 1 else []
    parts = [f"{data.name} ({data.source})", f"{examples:,} examples, minibatch 128", length(plan), seeds, *search, *more]
    return ("QUICK RUN, too short to judge by. " if quick else "") + "; ".join(parts)


def length(plan: Plan) -> str:
    """How long a plan is, of how much.

    Args:
        plan: the plan.

    Returns:
        A few words.

    Example:
        >>> length(Plan(10, 3, 5, whole=200))
        '10 epochs of 200'
    """
    return f"{plan.epochs} epochs" + (f" of {plan.whole}" if plan.whole else "")
