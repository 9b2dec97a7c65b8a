"""Theorem 4.1 as the paper states it: its schedules, and its bound beside what was measured.

**Theorem 4.1 is not true as stated.** What is known, precisely:

* Reddi, Kale & Kumar ("On the Convergence of Adam and Beyond", 2018): the proof adds up
  (sqrt(v_t)/alpha_t - sqrt(v_{t-1})/alpha_{t-1}) |theta_t - theta*|^2 as if each difference were non-negative. For Adam it
  need not be, because v can fall. For every b1 < sqrt(b2) there is a stream of convex losses, `reddi_losses` being one for
  b1 = 0, on which Adam's R(T)/T does not go to zero. AMSGrad, which divides by the largest v so far, restores the sign.
* Bock, Goppold & Weiss ("An improvement of the convergence proof of the ADAM-Optimizer", 2018) found further mistakes in
  the lemmas under the theorem and left one of them open; Akrout & Tweed (2021) showed that conjecture false.
* Lemma 10.3, sum_t sqrt(g_t^2 / t) <= 2 G_inf |g_{1:T}|, fails already at T = 1 for any |g| < 1/2: it then
  says |g| <= 2 g^2. In the same way the second term of the bound grows with the square of the losses' scale, and regret
  with the scale itself.

The bound is computed here because the paper states it: to see how far above, or below, the measured regret it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax import checks, scaling
from adam_jax.online.domains import Domain, check_domain
from adam_jax.online.game import Game


class RegretBound(NamedTuple):
    """The right-hand side of Theorem 4.1 at every T, as [T] arrays.

    Attributes:
        distance: D^2 / (2 alpha (1 - b1)) sum_i sqrt(T vhat_{T,i}).
        gradient: alpha (1 + b1) G_inf / ((1 - b1) sqrt(1 - b2) (1 - gamma)^2) sum_i |g_{1:T,i}|, gamma = b1^2 / sqrt(b2).
        decay: sum_i D_inf^2 G_inf sqrt(1 - b2) / (2 alpha (1 - b1) (1 - lam)^2), the same at every T.
        total: their sum.
    """

    distance: jax.Array
    gradient: jax.Array
    decay: jax.Array
    total: jax.Array


def theorem_4_1_settings(alpha: float, b1: float, lam: float) -> dict[str, optax.Schedule]:
    """The schedules of Theorem 4.1: alpha_t = alpha / sqrt(t) and b1_t = b1 lam^(t-1).

    Args:
        alpha: number > 0.
        b1: number in [0, 1).
        lam: number in (0, 1).

    Returns:
        `learning_rate` and `b1`, to pass to `adam` or `amsgrad`.

    Raises:
        ValueError: for numbers outside those ranges.

    Example:
        >>> settings = theorem_4_1_settings(0.1, 0.9, 0.5)
        >>> print(settings["learning_rate"](3), settings["b1"](1))
        0.05 0.45
    """
    _check_theorem(alpha, b1, 0.999, lam)
    return {"learning_rate": scaling.inverse_sqrt_decay(alpha), "b1": lambda count: b1 * lam ** jnp.asarray(count, float)}


def theorem_4_1_bound(game: Game, domain: Domain, alpha: float, b1: float, b2: float, lam: float) -> RegretBound:
    """The right-hand side of Theorem 4.1 at every T, from the gradients of a game. The theorem is false: see the module.

    The third term is written with 1 - b1 in its denominator, as the paper's proof has it.

    Args:
        game: played by Adam with `theorem_4_1_settings`.
        domain: its D and D_inf bound the distances between iterates.
        alpha: number > 0.
        b1: number in [0, 1), with b1^2 < sqrt(b2).
        b2: number in [0, 1).
        lam: number in (0, 1).

    Returns:
        A `RegretBound`; G_inf is the largest |g| of the game.

    Raises:
        ValueError: for numbers outside those ranges, or b1^2 >= sqrt(b2).

    Example:
        >>> from adam_jax.online import Box, play
        >>> stream = jnp.array([1.0, -1.0])
        >>> game = play(lambda x, c: c * x, stream, jnp.float32(0.0), optax.sgd(0.5), Box(-1.0, 1.0))
        >>> print(theorem_4_1_bound(game, Box(-1.0, 1.0), 0.5, 0.0, 0.75, 0.5).distance.round(3))
        [4.    5.657]
    """
    _check_theorem(alpha, b1, b2, lam)
    check_domain(domain)
    g = jnp.asarray(game.gradients, float)
    steps, size = g.shape
    far, far_inf = domain.diameters(size)
    largest = jnp.abs(g).max()
    gamma = b1**2 / b2**0.5

    def accumulate(carry: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        v, weight, total = carry
        v, weight, total = v + (1 - b2) * (g * g - v), weight + (1 - b2) * (1 - weight), total + g * g
        return (v, weight, total), (jnp.sqrt(v / weight).sum(), jnp.sqrt(total).sum())

    zeros = jnp.zeros(size)
    _, (sizes, norms) = jax.lax.scan(accumulate, (zeros, jnp.zeros([]), zeros), g)
    distance = far**2 / (2 * alpha * (1 - b1)) * jnp.sqrt(jnp.arange(1.0, steps + 1)) * sizes
    gradient = alpha * (1 + b1) * largest / ((1 - b1) * (1 - b2) ** 0.5 * (1 - gamma) ** 2) * norms
    third = size * far_inf**2 * largest * (1 - b2) ** 0.5 / (2 * alpha * (1 - b1) * (1 - lam) ** 2)
    decay = jnp.full(steps, third)
    return RegretBound(distance, gradient, decay, distance + gradient + decay)


def _check_theorem(alpha: float, b1: float, b2: float, lam: float) -> None:
    checks.number("alpha", alpha, above=0.0, known=True)
    checks.number("b1", b1, at_least=0.0, below=1.0, known=True)
    checks.number("b2", b2, at_least=0.0, below=1.0, known=True)
    checks.number("lam", lam, above=0.0, below=1.0, known=True)
    if b1**2 >= b2**0.5:
        raise ValueError(f"Theorem 4.1 needs b1^2 < sqrt(b2), got b1={b1} and b2={b2}")
