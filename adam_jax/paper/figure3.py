"""Figure 3: a convolutional net on CIFAR-10, with and without dropout (Section 6.3)."""

from dataclasses import replace
from typing import Any

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.lab import PASSES, Comparison, Lab, Plan, caption, compare, subset
from adam_jax.paper.results import Claim, Curve, Panel, Result
from adam_jax.paper.training import Job

__all__ = ["fig3", "whitened"]

WHITENING = 0.1  # added to the variances, of pixels scaled to variance 1


def fig3(lab: Lab) -> Result:
    """The convolutional net with AdaGrad, SGD with Nesterov momentum and Adam: the first 3 epochs, and all of them.

    Args:
        lab: data, settings and where to train.

    Returns:
        Two panels, two tables, four claims.

    Example:
        >>> fig3.__name__
        'fig3'
    """
    plan = lab.plan(Plan(epochs=45, seeds=2, search=1), Plan(epochs=2, seeds=1, search=1, examples=256, alphas=1))
    images = data.cifar10(lab.where)
    x, y = subset(images, plan)
    x = whitened(x)
    grids = {"adagrad": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "sgd": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
             "adam": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}  # fmt: skip
    found, nets = [], [problems.convolutional(x.shape[1], 10, noise=n, input_noise=0.4 * n) for n in (0.0, 0.5)]
    for problem in nets:

        def job(name: str, method: str, grid: Any, seeds: tuple[int, ...], epochs: int,
                problem: problems.Problem = problem) -> Job:  # fmt: skip
            return Job(name, method, problem, x, y, grid, seeds, epochs, records=10)

        noise = problem.settings["noise"]
        noisy = " + dropout" if noise else ""
        found.append(compare(lab, plan, f"{images.name}, ConvNet{noisy}", grids, job, stem="dropout-" if noise else ""))
    lines = [*found[0].lines(), *found[1].lines(" + dropout", dashed=True)]
    name = "stand-in for CIFAR-10" if images.stand_in else "CIFAR-10"
    panels = [Panel(f"{name} ConvNet, first 3 epochs", PASSES, "training cost", [_until(curve, 3) for curve in lines]),
              Panel(f"{name} ConvNet", PASSES, "training cost", lines, logarithmic=True)]  # fmt: skip
    settings = {"data": images.name, "source": images.source, "stand_in": images.stand_in, "plan": vars(plan),
                "grids": found[0].grids, "alphas": {"plain": found[0].alphas, "dropout": found[1].alphas},
                "problem": {"plain": nets[0].settings, "dropout": nets[1].settings}, "whitening": WHITENING}  # fmt: skip
    claims = [claim for part, noisy in zip(found, ("", " with dropout"), strict=True) for claim in _claims(part, noisy)]
    return Result(
        f"Figure 3: {name}", panels, [part.table for part in found], claims, settings,
        caption(images, len(x), plan, lab.quick, "whitened", "dropout 0.5, of the input 0.2"),
        suffix="_stand_in" if images.stand_in else "",
    )  # fmt: skip


def whitened(x: np.ndarray, eps: float = WHITENING) -> np.ndarray:
    """Whitened images, (x - mean) C^(-1/2), with C the covariance of the pixels plus eps on its diagonal (ZCA).

    Args:
        x: uint8 images [n, ...].
        eps: added to the variances, of pixels scaled to variance 1.

    Returns:
        float32 images, same shape.

    Example:
        >>> x = np.random.default_rng(0).integers(0, 256, (500, 2, 1, 1), dtype=np.uint8)
        >>> white = whitened(x, eps=0.0).reshape(500, 2)
        >>> print(np.round(np.cov(white.T), 2) + 0.0)
        [[1. 0.]
         [0. 1.]]
    """
    flat = x.reshape(len(x), -1).astype(np.float32)
    flat -= flat.mean(0)
    flat /= max(float(flat.std()), 1e-6)
    if len(flat) > flat.shape[1]:
        variances, directions = np.linalg.eigh(flat.T @ flat / (len(flat) - 1))
        white = flat @ (directions / np.sqrt(np.maximum(variances, 0) + eps)) @ directions.T
    else:  # fewer images than pixels: the same matrix, seen from the side of the images
        variances, directions = np.linalg.eigh(flat @ flat.T / (len(flat) - 1))
        white = (directions / np.sqrt(np.maximum(variances, 0) + eps)) @ (directions.T @ flat)
    return white.astype(np.float32).reshape(x.shape)


def _until(curve: Curve, epochs: int) -> Curve:
    kept = curve.x <= epochs
    return replace(curve, x=curve.x[kept], y=curve.y[:, kept])


def _claims(found: Comparison, noisy: str) -> list[Claim]:
    first = {name: found.overall(name, epochs=1) for name in found.curves}
    last = {name: found.final(name) for name in found.curves}
    return [
        Claim(
            f"Adam and AdaGrad lower the cost fastest in the first epoch{noisy}",
            max(first["adam"], first["adagrad"]) < first["sgd"],
            f"mean cost over it: Adam {first['adam']:.4f}, AdaGrad {first['adagrad']:.4f}, SGDNesterov {first['sgd']:.4f}",
        ),
        Claim(
            f"Adam and SGDNesterov pass AdaGrad{noisy} (lower cost in the last epoch)",
            max(last["adam"], last["sgd"]) < last["adagrad"],
            f"Adam {last['adam']:.4f}, SGDNesterov {last['sgd']:.4f}, AdaGrad {last['adagrad']:.4f}",
        ),
    ]
