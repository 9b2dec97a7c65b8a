"""Optimizers side by side at their best step sizes: the template that Figures 1 to 3 fill."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from adam_jax.paper.data import Dataset
from adam_jax.paper.lab import Lab, Plan, caption, subset
from adam_jax.paper.methods import METHODS
from adam_jax.paper.problems import Problem
from adam_jax.paper.results import Claim, Curve, Panel, Result, Table
from adam_jax.paper.training import Curves, Job

__all__ = ["DROPOUT", "PASSES", "Comparison", "Contest", "compare"]

PASSES = "iterations over entire data set"
DROPOUT = " + dropout"  # ends what is said of a cost with dropout


@dataclass(frozen=True)
class Comparison:
    """Optimizers at their best step sizes."""

    curves: dict[str, Curves]  # by method, one setting each
    alphas: dict[str, float]  # the best step size by method
    grids: dict[str, list[float]]  # the step sizes tried by method
    table: Table  # the step sizes tried, the cost each led to, and the costs of the best over the seeds

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
            Curve(method.label + suffix, curves.passes, curves.costs[:, 0], method.colour, dashed or method.dashed)
            for method, curves in ((METHODS[name], curves) for name, curves in self.curves.items())
        ]


Parts = Mapping[str, Comparison]


@dataclass(frozen=True)
class Contest:
    """What Figures 1 to 3 have in common: a grid of step sizes for each optimizer, and one or two costs."""

    title: str  # of the figure
    model: str  # what is trained, as tables call it
    grids: Mapping[str, Sequence[float]]  # step sizes by method
    # "" and, with dropout, `DROPOUT`, to a function from the number of inputs to a problem
    problems: Mapping[str, Callable[[int], Problem]]
    panels: Callable[[Dataset, Parts], list[Panel]]  # from the data and the comparisons to what is drawn
    claims: Callable[[Parts], list[Claim]]  # from the comparisons to what is judged
    training: Mapping[str, Any]  # further settings of every job
    remarks: tuple[str, ...]  # end the caption
    prepare: Callable[[np.ndarray], np.ndarray] = lambda x: x  # changes the features before they are trained on

    def __call__(self, lab: Lab, plan: Plan, data: Dataset) -> Result:
        """Search, train, draw and judge."""
        x, y = subset(data, plan)
        x = self.prepare(x)
        problems = {noisy: build(x.shape[1]) for noisy, build in self.problems.items()}
        found = {}
        for noisy, problem in problems.items():
            job = partial(Job, problem=problem, x=x, y=y, **self.training)
            found[noisy] = compare(lab, plan, f"{data.name}: {self.model}{noisy}", self.grids, job, noisy and "dropout-")
        panels = self.panels(data, found)
        settings = {
            "data": data.name,
            "source": data.source,
            "stand_in": data.stand_in,
            "plan": vars(plan),
            "grids": found[""].grids if "" in found else found[DROPOUT].grids,
            "alphas": _each({noisy: part.alphas for noisy, part in found.items()}),
            "problem": _each({noisy: problem.settings for noisy, problem in problems.items()}),
        }
        tables = [part.table for part in found.values()]
        note = caption(data, len(x), plan, lab.quick, *self.remarks)
        title = self.title + (": stand-in for the paper's data" if data.stand_in else "")
        return Result(title, panels, tables, self.claims(found), settings, note, columns=len(panels))


def _each(values: dict[str, Any]) -> Any:
    """For the record: by "plain" and "dropout", or the value itself where there is one."""
    named = {noisy.strip(" +") or "plain": value for noisy, value in values.items()}
    return named if len(named) > 1 else next(iter(named.values()))


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
        job: gives the job; called with name, method, grid, seeds and epochs, and in a search with apart=False.
        stem: begins the job's name, where a figure makes several comparisons.

    Returns:
        The comparison.

    Example:
        >>> from adam_jax.paper import problems
        >>> x, y = np.eye(4, dtype=np.uint8) * 255, np.arange(4, dtype=np.int32)
        >>> job = partial(Job, problem=problems.logistic(4, 4), x=x, y=y, batch=2)
        >>> compare(Lab(), Plan(1, 2, 1), "demo", {"adam": [0.1, 1.0]}, job).alphas
        {'adam': 0.1}
    """
    seeds = lab.seeds_of(plan)
    grids = {method: _middle(grid, plan.alphas) for method, grid in grids.items()}
    searches = {
        m: job(
            name=f"search-{stem}{m}",
            method=m,
            grid={"alpha": np.array(grid)},
            seeds=seeds[:1],
            epochs=plan.search,
            apart=False,
        )
        for m, grid in grids.items()
        if len(grid) > 1
    }
    costs = [curves.last[0] for curves in lab.train(f"{title}: step sizes", list(searches.values()))]
    found = dict(zip(searches, costs, strict=True))
    alphas = {m: float(grid[int(np.argmin(found[m])) if m in found else 0]) for m, grid in grids.items()}
    finals = [
        job(name=f"final-{stem}{m}", method=m, grid={"alpha": np.array([alpha])}, seeds=seeds, epochs=plan.epochs)
        for m, alpha in alphas.items()
    ]
    curves = dict(zip(grids, lab.train(f"{title}: curves", finals), strict=True))
    return Comparison(curves, alphas, grids, _table(title, plan, grids, found, alphas, curves))


def _table(title: str, plan: Plan, grids: Any, found: Any, alphas: Any, curves: dict[str, Curves]) -> Table:
    rows = []
    for name, grid in grids.items():
        tried = "  ".join(f"{alpha:g}: {cost:.4g}" for alpha, cost in zip(grid, found.get(name, ()), strict=False))
        edge = " (edge of grid)" if len(grid) > 1 and alphas[name] in (grid[0], grid[-1]) else ""
        last = curves[name].last
        spread = f"{last.mean():.4f} ({last.min():.4f} to {last.max():.4f})"
        best, seconds = f"{alphas[name]:g}{edge}", f"{curves[name].seconds[-1]:.3g}"
        rows.append([METHODS[name].label, tried or "not searched", best, spread, seconds])
    tried, spread = f"alpha: cost after a search of {plan.search} epochs", f"cost in epoch {plan.epochs}, {plan.seeds} seeds"
    return Table(title, ["optimizer", tried, "best alpha", spread, "s a seed"], rows)


def _middle(grid: Sequence[float], count: int | None) -> list[float]:
    first = 0 if count is None else max(0, (len(grid) - count + 1) // 2)
    return list(grid[first : len(grid) if count is None else first + count])
