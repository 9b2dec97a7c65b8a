"""Figure 1: logistic regression on digits and on film reviews (Section 6.1)."""

from typing import Any

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.lab import PASSES, Comparison, Lab, Plan, caption, compare, subset
from adam_jax.paper.methods import METHODS
from adam_jax.paper.results import Claim, Panel, Result
from adam_jax.paper.training import Job

__all__ = ["DIGITS_GRIDS", "fig1a", "fig1b"]

_ADAPTIVE = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
DIGITS_GRIDS = {"adagrad": [0.03, 0.1, 0.3, 1.0, 3.0], "adagrad_constant": _ADAPTIVE, "sgd": [0.1, 0.3, 1.0, 3.0, 10.0],
                "adam": _ADAPTIVE}  # fmt: skip


def fig1a(lab: Lab) -> Result:
    """Multi-class logistic regression on MNIST at alpha / sqrt(t): Adam, AdaGrad and SGD with Nesterov momentum.

    Args:
        lab: data, settings and where to train.

    Returns:
        One panel, one table, three claims: the paper does not say whether its AdaGrad was annealed too, so both are run.

    Example:
        >>> fig1a.__name__
        'fig1a'
    """
    plan = lab.plan(Plan(epochs=45, seeds=5, search=45), Plan(epochs=3, seeds=3, search=2))
    digits = data.mnist(lab.where)
    x, y = subset(digits, plan)
    problem = problems.logistic(x.shape[1], 10)

    def job(name: str, method: str, grid: Any, seeds: tuple[int, ...], epochs: int) -> Job:
        return Job(name, method, problem, x, y, grid, seeds, epochs, annealed=True, records=4)

    found = compare(lab, plan, f"{digits.name}: logistic regression", DIGITS_GRIDS, job)
    claims = [
        _as_fast_as(found, "sgd", ""),
        _ahead_of_adagrad(found, "adagrad"),
        _ahead_of_adagrad(found, "adagrad_constant"),
    ]
    note = caption(digits, len(x), plan, lab.quick, "alpha/sqrt(t)")
    limits = (0.2, 0.7)
    panel = Panel(f"{digits.title} Logistic Regression", PASSES, "training cost", found.lines(), limits=limits)
    settings = {"data": digits.name, "source": digits.source, "plan": vars(plan), "alphas": found.alphas,
                "grids": found.grids, "problem": problem.settings}  # fmt: skip
    return Result("Figure 1a", [panel], [found.table], claims, settings, note, columns=1)


def fig1b(lab: Lab) -> Result:
    """Logistic regression on film reviews as bags of 10,000 words, with half of the features dropped and without.

    Args:
        lab: data, settings and where to train.

    Returns:
        Two panels, two tables, ten claims. AdaGrad is run as in `fig1a`.

    Example:
        >>> fig1b.__name__
        'fig1b'
    """
    plan = lab.plan(Plan(epochs=160, seeds=3, search=20), Plan(epochs=4, seeds=2, search=2, examples=1280, alphas=3))
    reviews = data.imdb(lab.where, reviews=plan.examples)
    grids = {"adagrad": [0.01, 0.03, 0.1, 0.3, 1.0], "adagrad_constant": [0.003, 0.01, 0.03, 0.1, 0.3],
             "rmsprop": [0.003, 0.01, 0.03, 0.1, 0.3], "sgd": [0.1, 0.3, 1.0, 3.0, 10.0],
             "adam": [0.003, 0.01, 0.03, 0.1, 0.3]}  # fmt: skip
    found, costs = [], [problems.logistic(reviews.x.shape[1], 2, noise=noise, scale=1.0) for noise in (0.5, 0.0)]
    for problem in costs:

        def job(name: str, method: str, grid: Any, seeds: tuple[int, ...], epochs: int,
                problem: problems.Problem = problem) -> Job:  # fmt: skip
            return Job(name, method, problem, reviews.x, reviews.y, grid, seeds, epochs, annealed=True, records=4)

        noise = problem.settings["noise"]
        title = f"{reviews.name}: BoW logistic regression{' + dropout' if noise else ''}"
        found.append(compare(lab, plan, title, grids, job, "dropout-" if noise else ""))
    panels = [
        Panel(f"IMDB BoW feature Logistic Regression{noisy}", PASSES, "training cost", lines, limits=(0.1, 0.6))
        for noisy, lines in ((", dropout", found[0].lines(" + dropout")), ("", found[1].lines()))
    ]
    claims = [claim for part, noisy in zip(found, (" with dropout", ""), strict=True) for claim in _sparse(part, noisy)]
    settings = {"data": reviews.name, "source": reviews.source, "plan": vars(plan), "grids": found[0].grids,
                "alphas": {"dropout": found[0].alphas, "plain": found[1].alphas},
                "problem": {"dropout": costs[0].settings, "plain": costs[1].settings}}  # fmt: skip
    note = caption(reviews, len(reviews.x), plan, lab.quick, "alpha/sqrt(t)")
    return Result("Figure 1b", panels, [part.table for part in found], claims, settings, note)


def _as_fast_as(found: Comparison, rival: str, noisy: str) -> Claim:
    """The paper says "AdaGrad", which here is the better of AdaGrad's two runs."""
    runs = ["adagrad", "adagrad_constant"] if rival == "adagrad" else [rival]
    adam, other = found.overall("adam"), min(map(found.overall, runs))
    name = "AdaGrad" if rival == "adagrad" else METHODS[rival].label
    return Claim(
        f"Adam converges as fast as {name}{noisy} (mean costs over the run within 5 %)",
        bool(np.isfinite(adam)) and abs(adam / other - 1) <= 0.05,
        f"Adam {adam:.4f}, {name} {other:.4f}",
    )


def _ahead_of_adagrad(found: Comparison, adagrad: str) -> Claim:
    adam, sgd, other = (found.overall(name) for name in ("adam", "sgd", adagrad))
    text = f"Adam and SGDNesterov converge faster than {METHODS[adagrad].label} (lower mean cost over the run)"
    return Claim(
        text, max(adam, sgd) < other, f"Adam {adam:.4f}, SGDNesterov {sgd:.4f}, {METHODS[adagrad].label} {other:.4f}"
    )


def _sparse(found: Comparison, noisy: str) -> list[Claim]:
    """Adam beside AdaGrad, and both against each rival; "AdaGrad" is the better of its two runs."""
    cost = {name: found.overall(name) for name in found.curves}
    ours = {"Adam": cost["adam"], "AdaGrad": min(cost["adagrad"], cost["adagrad_constant"])}
    numbers = "mean cost over the run: " + ", ".join(f"{METHODS[name].label} {value:.4f}" for name, value in cost.items())
    return [_as_fast_as(found, "adagrad", noisy)] + [
        Claim(
            f"on sparse features {name} is well ahead of {METHODS[rival].label}{noisy} (by 5 % or more)",
            bool(np.isfinite(value)) and value <= 0.95 * cost[rival], numbers,
        )
        for name, value in ours.items() for rival in ("sgd", "rmsprop")
    ]  # fmt: skip
