"""The oracle: the paper's algorithms as it prints them, in longdouble, one line for each of the paper's.

Nothing here is shared with the library: raw averages, explicit powers, division by 1 - b^t.
"""

from collections.abc import Callable, Sequence

import numpy as np

Decay = float | Callable[[int], float]
REAL = np.longdouble


def _weights(decays: Sequence[float]) -> np.ndarray:
    """1 - b1 b2 ... bt for each t; computed as the sum of what each gradient weighs, without cancellation."""
    weights, weight = [], REAL(0)
    for decay in decays:
        weight = weight * REAL(decay) + (1 - REAL(decay))
        weights.append(weight)
    return np.array(weights)


def _decays(decay: Decay, steps: int) -> list[float]:
    return [float(decay(t)) if callable(decay) else decay for t in range(steps)]


def adam(
    gradients: np.ndarray,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    bias_correction: bool = True,
    eps_hat: bool = False,
    nesterov: bool = False,
    maximum: str | None = None,
) -> np.ndarray:
    """Updates of Algorithm 1 for gradients of shape (steps, ...); `maximum` makes it AMSGrad."""
    gradients = np.asarray(gradients)
    gradients = gradients.astype(np.clongdouble if np.iscomplexobj(gradients) else REAL)
    steps = len(gradients)
    b1s, b2s = _decays(b1, steps + 1), _decays(b2, steps)
    w1, w2 = _weights(b1s), _weights(b2s)
    m, v, largest = np.zeros_like(gradients[0]), np.zeros(gradients[0].shape, REAL), np.zeros(gradients[0].shape, REAL)
    updates = []
    for t, g in enumerate(gradients):
        m = b1s[t] * m + (1 - REAL(b1s[t])) * g
        v = b2s[t] * v + (1 - REAL(b2s[t])) * np.abs(g) ** 2
        mhat, vhat = m, v
        if bias_correction:
            mhat, vhat = m / w1[t], v / w2[t]
        if maximum == "raw":
            largest = np.maximum(largest, v)
            vhat = largest / w2[t]
        elif maximum == "corrected":
            largest = np.maximum(largest, vhat)
            vhat = largest
        if nesterov:
            next_weight, this_weight = (w1[t + 1], w1[t]) if bias_correction else (1, 1)
            mhat = b1s[t + 1] * m / next_weight + (1 - REAL(b1s[t])) * g / this_weight  # Dozat 2016, Algorithm 2
        below = eps / np.sqrt(w2[t]) if eps_hat and bias_correction else eps
        updates.append(_divide(mhat, np.sqrt(vhat + eps_root) + below))
    return np.array(updates)


def adamax(gradients: np.ndarray, b1: Decay = 0.9, b2: Decay = 0.999, eps: float = 0.0) -> np.ndarray:
    """Updates of Algorithm 2."""
    gradients = np.asarray(gradients).astype(REAL)
    b1s, b2s = _decays(b1, len(gradients)), _decays(b2, len(gradients))
    w1 = _weights(b1s)
    m, u, updates = np.zeros_like(gradients[0]), np.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients):
        m = b1s[t] * m + (1 - REAL(b1s[t])) * g
        u = np.maximum(REAL(b2s[t]) * u, np.abs(g) + eps)
        updates.append(_divide(m / w1[t], u))
    return np.array(updates)


def lp(gradients: np.ndarray, p: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> np.ndarray:
    """Updates of equations 6-7, with the bias correction that Section 3 would give them."""
    gradients = np.asarray(gradients).astype(REAL)
    m, v, updates = np.zeros_like(gradients[0]), np.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - REAL(b1)) * g
        v = REAL(b2) ** p * v + (1 - REAL(b2) ** p) * np.abs(g) ** p
        updates.append(_divide(m / (1 - REAL(b1) ** t), (v / (1 - REAL(b2) ** (p * t))) ** (1 / REAL(p)) + eps))
    return np.array(updates)


def _divide(m: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below == 0, 0, m / np.where(below == 0, 1, below))
