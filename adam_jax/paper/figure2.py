"""Figure 2: a net with two hidden layers on MNIST, with dropout and with a deterministic cost (Section 6.2)."""

from typing import Any

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.lab import PASSES, Comparison, Lab, Plan, caption, compare, subset
from adam_jax.paper.methods import METHODS
from adam_jax.paper.results import Claim, Curve, Panel, Result
from adam_jax.paper.training import Curves, Job

__all__ = ["fig2a", "fig2b"]

ADAPTIVE = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def fig2a(lab: Lab) -> Result:
    """The net with dropout: AdaGrad, RMSProp, SGD with Nesterov momentum, AdaDelta and Adam.

    Args:
        lab: data, settings and where to train.

    Returns:
        One panel, one table, one claim.

    Example:
        >>> fig2a.__name__
        'fig2a'
    """
    plan = lab.plan(Plan(epochs=200, seeds=3, search=5), Plan(epochs=2, seeds=2, search=1, examples=1280, alphas=3))
    digits = data.mnist(lab.where)
    x, y = subset(digits, plan)
    problem = problems.perceptron(x.shape[1], 10)
    grids = {
        "adagrad": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "rmsprop": ADAPTIVE, "sgd": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        "adadelta": [0.1, 0.3, 1.0, 3.0, 10.0], "adam": ADAPTIVE,
    }  # fmt: skip

    def job(name: str, method: str, grid: Any, seeds: tuple[int, ...], epochs: int) -> Job:
        return Job(name, method, problem, x, y, grid, seeds, epochs, records=4)

    title = f"{digits.title} Multilayer Neural Network + dropout"
    found = compare(lab, plan, title, grids, job)
    over = {name: found.overall(name) for name in grids}
    claim = Claim(
        "Adam converges fastest (lowest mean cost over the run)",
        min(over, key=lambda name: over[name]) == "adam",
        ", ".join(f"{METHODS[name].label} {cost:.4f}" for name, cost in over.items()),
    )
    note = caption(digits, len(x), plan, lab.quick, "dropout 0.5, of the input 0.2")
    panel = Panel(title, PASSES, "training cost", found.lines(), logarithmic=True)
    settings = {"data": digits.name, "source": digits.source, "plan": vars(plan), "alphas": found.alphas,
                "grids": found.grids, "problem": problem.settings}  # fmt: skip
    return Result("Figure 2a", [panel], [found.table], [claim], settings, note, columns=1)


def fig2b(lab: Lab) -> Result:
    """The net with a deterministic cost: Adam against a quasi-Newton method, by iterations and by seconds.

    The paper's rival is SFO; here it is Optax's L-BFGS with its zoom line search on each minibatch.

    Args:
        lab: data, settings and where to train.

    Returns:
        Two panels, one table, three claims.

    Example:
        >>> fig2b.__name__
        'fig2b'
    """
    plan = lab.plan(Plan(epochs=50, seeds=3, search=5), Plan(epochs=2, seeds=2, search=1, examples=640, alphas=2))
    digits = data.mnist(lab.where)
    x, y = subset(digits, plan)
    problem = problems.perceptron(x.shape[1], 10, noise=0.0, input_noise=0.0, l2=1e-4)

    def job(name: str, method: str, grid: Any, seeds: tuple[int, ...], epochs: int) -> Job:
        return Job(name, method, problem, x, y, grid, seeds, epochs, records=5, apart=name.startswith("final"))

    grids = {"lbfgs": [1.0], "adam": ADAPTIVE}
    title = f"{digits.title} Multilayer Neural Network, deterministic cost"
    found = compare(lab, plan, title, grids, job)
    by_seconds = [
        Curve(METHODS[name].label, curves.seconds, curves.costs[:, 0], METHODS[name].colour)
        for name, curves in found.curves.items()
    ]
    panels = [Panel("by " + PASSES, PASSES, "training cost", found.lines(), logarithmic=True),
              Panel("by time", "seconds", "training cost", by_seconds, logarithmic=True)]  # fmt: skip
    rival = "the paper's rival is SFO, which keeps its minibatches; here L-BFGS of Optax, line search on each new minibatch"
    note = caption(digits, len(x), plan, lab.quick, rival)
    settings = {"data": digits.name, "source": digits.source, "plan": vars(plan), "alphas": found.alphas,
                "grids": found.grids, "problem": problem.settings}  # fmt: skip
    return Result(f"Figure 2b: {title}", panels, [found.table], _against_quasi_newton(found), settings, note)


def _against_quasi_newton(found: Comparison) -> list[Claim]:
    adam, other = found.curves["adam"], found.curves["lbfgs"]
    seconds = min(adam.seconds[-1], other.seconds[-1])
    cost, cost_other = _cost_at(adam, seconds), _cost_at(other, seconds)
    ratio = other.seconds[-1] / adam.seconds[-1]
    return [
        Claim(
            "Adam makes faster progress by iterations (lower mean cost over the run)",
            found.overall("adam") < found.overall("lbfgs"),
            f"Adam {found.overall('adam'):.4f}, L-BFGS {found.overall('lbfgs'):.4f}",
        ),
        Claim(
            "Adam makes faster progress by wall-clock time",
            cost < cost_other,
            f"after {seconds:.1f} s Adam {cost:.4f}, L-BFGS {cost_other:.4f}",
        ),
        Claim(
            "the quasi-Newton method is 5 to 10 times slower an iteration",
            bool(5 <= ratio <= 10),
            f"L-BFGS takes {ratio:.1f} times as long as Adam",
        ),
    ]


def _cost_at(curves: Curves, seconds: float) -> float:
    """The mean cost over the seeds that had been reached by then; inf if one of them diverged."""
    cost = float(np.interp(seconds, curves.seconds, curves.costs[:, 0].mean(0)))
    return cost if np.isfinite(curves.costs).all() else float("inf")
