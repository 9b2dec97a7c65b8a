"""Figure 3: a convolutional net on CIFAR-10, with and without dropout (Section 6.3)."""

from dataclasses import replace
from functools import partial

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.contest import DROPOUT, PASSES, Comparison, Contest, Parts
from adam_jax.paper.lab import Figure, Plan
from adam_jax.paper.results import Claim, Curve, Panel

__all__ = ["FIG3", "whitened"]

WHITENING = 0.1  # added to the variances, of pixels scaled to variance 1
GRIDS = {
    "adagrad": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "sgd": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "adam": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3],
}


def whitened(x: np.ndarray, eps: float = WHITENING) -> np.ndarray:
    """Whitened images, (x - mean) C^(-1/2), with C the covariance of the pixels plus eps on its diagonal (ZCA).

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


def _panels(images: data.Dataset, found: Parts) -> list[Panel]:
    lines = [*found[""].lines(), *found[DROPOUT].lines(DROPOUT, dashed=True)]
    name = "stand-in for CIFAR-10" if images.stand_in else "CIFAR-10"
    return [
        Panel(f"{name} ConvNet, first 3 epochs", PASSES, "training cost", [_until(curve, 3) for curve in lines]),
        Panel(f"{name} ConvNet", PASSES, "training cost", lines, logarithmic=True),
    ]


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


FIG3 = Figure(
    "fig3",
    "convolutional net",
    "CIFAR-10's archive, or its stand-in in scikit-image and scikit-learn",
    "--epochs 5 --seeds 1, of 45 and 2: 114 min on one core",
    full=Plan(epochs=45, seeds=2, search=1),
    quick=Plan(epochs=2, seeds=1, search=1, examples=256, alphas=1),
    data=lambda where, _: data.cifar10(where),
    make=Contest(
        "Figure 3",
        "ConvNet",
        GRIDS,
        {
            "": partial(problems.convolutional, classes=10, noise=0.0, input_noise=0.0),
            DROPOUT: partial(problems.convolutional, classes=10),
        },
        _panels,
        lambda found: [claim for noisy, part in found.items() for claim in _claims(part, noisy and " with dropout")],
        {"records": 10},
        (f"whitened, {WHITENING:g} added to the variances", "dropout 0.5, of the input 0.2"),
        whitened,
    ),
)
