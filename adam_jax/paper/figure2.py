"""Figure 2: a net with two hidden layers on MNIST, with dropout and with a deterministic cost (Section 6.2).

The paper's quasi-Newton method is SFO; here it is Optax's L-BFGS with its zoom line search on each minibatch.
"""

from functools import partial

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.contest import DROPOUT, PASSES, Comparison, Contest, Parts
from adam_jax.paper.lab import MNIST, Figure, Plan, mnist_train
from adam_jax.paper.methods import METHODS
from adam_jax.paper.results import Claim, Curve, Panel
from adam_jax.paper.training import Curves

__all__ = ["FIG2A", "FIG2B"]

_ADAPTIVE = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
_NET = "Multilayer Neural Network"
DROPOUT_GRIDS = {
    "adagrad": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "rmsprop": _ADAPTIVE,
    "sgd": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "adadelta": [0.1, 0.3, 1.0, 3.0, 10.0],
    "adam": _ADAPTIVE,
}


def _dropout_panels(digits: data.Dataset, found: Parts) -> list[Panel]:
    title = f"{digits.title} {_NET} + dropout"
    return [Panel(title, PASSES, "training cost", found[DROPOUT].lines(), logarithmic=True)]


def _adam_first(found: Parts) -> list[Claim]:
    over = {name: found[DROPOUT].overall(name) for name in found[DROPOUT].curves}
    numbers = ", ".join(f"{METHODS[name].label} {cost:.4f}" for name, cost in over.items())
    return [
        Claim("Adam converges fastest (lowest mean cost over the run)", min(over, key=lambda m: over[m]) == "adam", numbers)
    ]


FIG2A = Figure(
    "fig2a",
    "net of 2 x 1000 units with dropout",
    MNIST,
    "--epochs 10, of 200: 58 min beside other work",
    full=Plan(epochs=200, seeds=3, search=5),
    quick=Plan(epochs=2, seeds=2, search=1, examples=1280, alphas=3),
    data=mnist_train,
    make=Contest(
        "Figure 2a",
        _NET,
        DROPOUT_GRIDS,
        {DROPOUT: partial(problems.perceptron, classes=10)},
        _dropout_panels,
        _adam_first,
        {"records": 4},
        ("dropout 0.5, of the input 0.2",),
    ),
)


def _deterministic_panels(digits: data.Dataset, found: Parts) -> list[Panel]:
    name = f"{digits.title} {_NET}, "
    timed = [
        Curve(METHODS[name].label, curves.seconds, curves.costs[:, 0], METHODS[name].colour)
        for name, curves in found[""].curves.items()
    ]
    return [
        Panel(f"{name}by {PASSES}", PASSES, "training cost", found[""].lines(), logarithmic=True),
        Panel(f"{name}by time", "seconds", "training cost", timed, logarithmic=True),
    ]


FIG2B = Figure(
    "fig2b",
    "the same net, deterministic, and L-BFGS",
    MNIST,
    "--epochs 4, of 50: 24 min on one core",
    full=Plan(epochs=50, seeds=3, search=5),
    quick=Plan(epochs=2, seeds=2, search=1, examples=640, alphas=2),
    data=mnist_train,
    make=Contest(
        f"Figure 2b: {_NET}, deterministic cost",
        f"{_NET}, deterministic cost",
        {"lbfgs": [1.0], "adam": _ADAPTIVE},
        {"": partial(problems.perceptron, classes=10, noise=0.0, input_noise=0.0, l2=1e-4)},
        _deterministic_panels,
        lambda found: _against_quasi_newton(found[""]),
        {"records": 5, "apart": True},
        ("the paper's rival is SFO, which keeps its minibatches; here L-BFGS of Optax, line search on each new minibatch",),
    ),
)


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
