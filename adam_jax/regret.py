r"""Online convex optimisation (Section 4): the game, its regret, Theorem 4.1's bound, and where Adam fails.

At each step t a player chooses params theta_t in a domain, then sees the convex loss f_t and pays f_t(theta_t). Regret is
what was paid beyond the best fixed choice, R(T) = sum_t f_t(theta_t) - min_theta sum_t f_t(theta).

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

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from adam_jax import checks, scaling
from adam_jax.domains import Domain, minimise

__all__ = [
    "BestPoint",
    "Game",
    "RegretBound",
    "best_fixed_point",
    "linear_losses",
    "play",
    "reddi_losses",
    "regret",
    "theorem_4_1_bound",
    "theorem_4_1_settings",
]

Loss = Callable[[Any, Any], jax.Array]


class Game(NamedTuple):
    """A game as played; memory is 8 bytes a step and param.

    Attributes:
        losses: [T] float32, f_t(theta_t).
        iterates: [T, d] float32, theta_t, all leaves in one vector; all inside the domain.
        gradients: [T, d] float32, the gradient of f_t at theta_t.
        last: the params after the last step, as a tree.
    """

    losses: jax.Array
    iterates: jax.Array
    gradients: jax.Array
    last: Any


class BestPoint(NamedTuple):
    """The best fixed choice for a stream.

    Attributes:
        params: a tree like the start, float64 NumPy arrays.
        loss: its mean loss.
        gap: certified: the mean loss is at most this much above the true minimum, whatever the solver did.
        steps: steps of accelerated projected gradient descent taken.
    """

    params: Any
    loss: float
    gap: float
    steps: int


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


def play(
    loss: Loss | Sequence[Callable[[Any], jax.Array]],
    stream: Any,
    start: Any,
    tx: optax.GradientTransformation,
    domain: Domain | None = None,
    *,
    convexity_pairs: int = 256,
) -> Game:
    """Play a stream of convex losses with any Optax transform, projecting onto the domain after each step.

    Losses are checked for convexity where the game went: f_t(theta_s) >= f_t(theta_t) + <g_t, theta_s - theta_t> at
    random pairs of steps (s, t). That can refute convexity, not prove it.

    Args:
        loss: `loss(params, example)`, a scalar; or a sequence of functions of the params, one a step, and `stream=None`.
        stream: a tree of arrays whose first axis is time.
        start: the params at the first step, inside the domain.
        tx: the player.
        domain: `Box`, `Ball`, or `None` for no projection.
        convexity_pairs: how many pairs of steps to check; 0 for none.

    Returns:
        A `Game`.

    Raises:
        ValueError: for an empty domain, a start outside it, an empty stream or one of unequal lengths, or losses found not
            to be convex, with the steps where they are not.

    Example:
        >>> import adam_jax
        >>> stream = jnp.array([1.0, 1.0, 1.0])
        >>> game = play(lambda x, c: c * x, stream, jnp.float32(1.0), optax.sgd(0.5), adam_jax.Box(0.0, 1.0))
        >>> print(game.losses)
        [1.  0.5 0. ]
    """
    _check_domain(domain)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, start))
    if domain is not None and not jnp.allclose(domain.project(flat), flat, atol=1e-6):
        raise ValueError(f"start must lie inside the domain {domain}")
    if not callable(loss):
        loss, stream = _one_of(loss), jnp.arange(len(loss))
    steps = _length(stream)

    def turn(carry: tuple[Any, Any], example: Any) -> tuple[tuple[Any, Any], tuple[jax.Array, ...]]:
        params, state = carry
        paid, g = jax.value_and_grad(loss)(params, example)
        updates, state = tx.update(g, state, params)
        moved, _ = ravel_pytree(optax.apply_updates(params, updates))
        moved = moved if domain is None else domain.project(moved)
        return (unravel(moved), state), (paid, ravel_pytree(params)[0], ravel_pytree(g)[0])

    first = unravel(flat)
    (last, _), trace = jax.jit(lambda carry, xs: jax.lax.scan(turn, carry, xs))((first, tx.init(first)), stream)
    losses, iterates, gradients = trace
    game = Game(losses, iterates, gradients, last)
    if convexity_pairs and steps > 1:
        _check_convex(loss, stream, unravel, game, convexity_pairs)
    return game


def _one_of(losses: Sequence[Callable[[Any], jax.Array]]) -> Loss:
    return lambda params, t: jax.lax.switch(t, list(losses), params)


def _check_domain(domain: Domain | None) -> None:
    if domain is not None:
        domain.check()


def _length(stream: Any) -> int:
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(stream)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"stream must hold arrays with one first axis, the steps, at least one; got {sorted(lengths)}")
    return lengths.pop()


def _check_convex(loss: Loss, stream: Any, unravel: Callable[[jax.Array], Any], game: Game, pairs: int) -> None:
    """Raise where a loss at another iterate lies below its tangent by more than rounding."""
    steps = len(game.losses)
    t, s = np.random.default_rng(0).integers(0, steps, (2, pairs))

    @jax.jit
    def below(game: Game, stream: Any) -> tuple[jax.Array, jax.Array]:
        there = jax.vmap(lambda x, t: loss(unravel(x), jax.tree.map(lambda leaf: leaf[t], stream)))(game.iterates[s], t)
        slope = jnp.sum(game.gradients[t] * (game.iterates[s] - game.iterates[t]), -1)
        scale = jnp.abs(game.losses[t]) + jnp.abs(there) + jnp.sum(
            jnp.abs(game.gradients[t]) * (jnp.abs(game.iterates[s]) + jnp.abs(game.iterates[t])), -1
        )  # fmt: skip
        return game.losses[t] + slope - there, scale

    gap, scale = (np.asarray(x) for x in below(game, stream))
    worst = int(np.argmax(gap - 1e-4 * scale))
    if gap[worst] > 1e-4 * scale[worst]:
        raise ValueError(
            f"losses must be convex: loss {t[worst]} at theta_{s[worst]} is {gap[worst]:.3g} below its tangent at "
            f"theta_{t[worst]}"
        )


def best_fixed_point(
    loss: Loss, stream: Any, start: Any, domain: Domain, *, tolerance: float = 1e-6, max_steps: int = 20_000
) -> BestPoint:
    """The params of the domain with the least mean loss over a stream, to a certified tolerance, in float64.

    FISTA with restarts, stopped by the gap max_z <g, theta - z>: for convex losses the mean loss is within it of the
    minimum.

    Args:
        loss: `loss(params, example)`, convex and differentiable.
        stream: a tree of arrays whose first axis is time.
        start: params where to begin, of any dtype.
        domain: `Box` or `Ball`.
        tolerance: of the mean loss.
        max_steps: of the solver.

    Returns:
        A `BestPoint`.

    Raises:
        ValueError: for an empty domain or stream, if the gap is not reached within `max_steps`, or if the mean loss there
            is below its tangent at the start, and so not convex.

    Example:
        >>> import adam_jax
        >>> best = best_fixed_point(lambda x, c: (x - c) ** 2, jnp.array([0.0, 1.0]), 0.0, adam_jax.Box(-2.0, 2.0))
        >>> print(best.params.round(3), round(best.loss, 3), best.gap < 1e-6)
        0.5 0.25 True
    """
    domain.check()
    _length(stream)
    with _enable_x64(True):
        wide = jax.tree.map(_float64, stream)
        flat, unravel = ravel_pytree(jax.tree.map(_float64, start))

        def mean(x: jax.Array, stream: Any) -> jax.Array:
            return jax.vmap(lambda example: loss(unravel(x), example))(stream).mean()

        @jax.jit
        def solve(start: jax.Array, stream: Any) -> tuple[jax.Array, ...]:
            f = jax.value_and_grad(lambda x: mean(x, stream))
            x, value, gap, steps = minimise(f, start, domain, tolerance, max_steps)
            first, g = f(start)
            return x, value, gap, steps, first + jnp.vdot(g, x - start) - value, jnp.abs(first) + jnp.abs(value)

        x, value, gap, steps, below, scale = solve(domain.project(flat), wide)
        if below > 1e-9 * scale:
            raise ValueError(f"losses must be convex: the mean loss is {below:.3g} below its tangent at the start")
        if not gap <= tolerance:
            raise ValueError(f"tolerance {tolerance:g} was not reached in max_steps={max_steps}: the gap is {gap:.3g}")
        return BestPoint(jax.tree.map(np.asarray, unravel(x)), float(value), float(gap), int(steps))


def _enable_x64(value: bool) -> Any:
    home = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # where it was before 0.8
    return home.enable_x64(value)


def _float64(x: ArrayLike) -> jax.Array:
    x = np.asarray(x)
    return jnp.asarray(x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x)


def regret(game: Game, loss: Loss, stream: Any, best: Any) -> np.ndarray:
    """What was paid beyond a fixed choice, after each step: sum_{s <= t} f_s(theta_s) - f_s(best).

    Args:
        game: as played on this stream.
        loss: `loss(params, example)`.
        stream: a tree of arrays whose first axis is time.
        best: the fixed params, such as `best_fixed_point(...).params`. The last entry is R(T) only for the best choice of
            the whole stream; earlier ones are lower bounds of R(t), whose best choice is another.

    Returns:
        [T] float64.

    Example:
        >>> import adam_jax
        >>> stream = jnp.array([1.0, 1.0, 1.0])
        >>> game = play(lambda x, c: c * x, stream, jnp.float32(1.0), optax.sgd(0.5), adam_jax.Box(0.0, 1.0))
        >>> print(regret(game, lambda x, c: c * x, stream, 0.0))
        [1.  1.5 1.5]
    """
    fixed = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), best)
    paid = jax.jit(jax.vmap(loss, in_axes=(None, 0)))(fixed, stream)
    return np.cumsum(np.asarray(game.losses, np.float64) - np.asarray(paid, np.float64))


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
    return {"learning_rate": scaling.inverse_sqrt_decay(alpha), "b1": lambda count: b1 * lam**count}


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
        >>> import adam_jax
        >>> stream = jnp.array([1.0, -1.0])
        >>> game = play(lambda x, c: c * x, stream, jnp.float32(0.0), optax.sgd(0.5), adam_jax.Box(-1.0, 1.0))
        >>> print(theorem_4_1_bound(game, adam_jax.Box(-1.0, 1.0), 0.5, 0.0, 0.75, 0.5).distance.round(3))
        [4.    5.657]
    """
    _check_theorem(alpha, b1, b2, lam)
    domain.check()
    g = jnp.asarray(game.gradients, jnp.float32)
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
    checks.at_least("alpha", alpha, 0.0)
    checks.decay("b1", b1)
    checks.decay("b2", b2)
    if not (alpha > 0 and 0 < lam < 1):
        raise ValueError(f"alpha must be > 0 and lam in (0, 1), got {alpha} and {lam}")
    if b1**2 >= b2**0.5:
        raise ValueError(f"Theorem 4.1 needs b1^2 < sqrt(b2), got b1={b1} and b2={b2}")


def linear_losses(params: jax.Array, slope: jax.Array) -> jax.Array:
    """f_t(x) = c_t x.

    Args:
        params: scalar, x.
        slope: scalar, c_t.

    Returns:
        Scalar.

    Example:
        >>> print(linear_losses(jnp.float32(2.0), jnp.float32(3.0)))
        6.0
    """
    return params * slope


def reddi_losses(steps: int, c: float = 4.0, period: int = 3) -> jax.Array:
    """Slopes of a stream of linear losses on [-1, 1] on which Adam does not converge (Reddi et al. 2018, Theorem 1).

    c at every `period`-th step, the first included, and -1 at the others. For c > period - 1 the best fixed choice is -1.
    At period 3, b1 = 0, b2 = 1 / (1 + c^2) and alpha / sqrt(t), Adam ends every period at +1, the worst choice.

    Args:
        steps: how many.
        c: number > period - 1.
        period: at least 2.

    Returns:
        [steps] float32, for `linear_losses`.

    Raises:
        ValueError: if c is not greater than period - 1.

    Example:
        >>> print(reddi_losses(4))
        [ 4. -1. -1.  4.]
    """
    if not (period >= 2 and c > period - 1):
        raise ValueError(f"c must be > period - 1 and period >= 2, got c={c} and period={period}")
    return jnp.where(jnp.arange(steps) % period == 0, c, -1.0).astype(jnp.float32)
