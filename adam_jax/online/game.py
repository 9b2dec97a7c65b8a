"""Online convex optimisation (Section 4): the game, what was paid, and the stream on which Adam fails.

At each step t a player chooses params theta_t in a domain, then sees the convex loss f_t and pays f_t(theta_t). Regret is
what was paid beyond the best fixed choice, R(T) = sum_t f_t(theta_t) - min_theta sum_t f_t(theta).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from adam_jax import checks
from adam_jax.online.domains import Domain, check_domain

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
        ValueError: for a start outside the domain, an empty stream or one of unequal lengths, or losses found not
            to be convex, with the steps where they are not.

    Example:
        >>> from adam_jax.online import Box
        >>> stream = jnp.array([1.0, 1.0, 1.0])
        >>> game = play(lambda x, c: c * x, stream, jnp.float32(1.0), optax.sgd(0.5), Box(0.0, 1.0))
        >>> print(game.losses)
        [1.  0.5 0. ]
    """
    pairs = checks.whole("convexity_pairs", convexity_pairs, 0, 10**6)
    checks.transformation("tx", tx)
    if domain is not None:
        check_domain(domain)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, start))
    if domain is not None and not jnp.allclose(domain.project(flat), flat, atol=1e-6):
        raise ValueError(f"start must lie inside the domain {domain}")
    if not callable(loss):
        loss, stream = _one_of(loss), jnp.arange(len(loss))
    steps = length(stream)

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
    if pairs and steps > 1:
        _check_convex(loss, stream, unravel, game, pairs)
    return game


def _one_of(losses: Sequence[Callable[[Any], jax.Array]]) -> Loss:
    return lambda params, t: jax.lax.switch(t, list(losses), params)


def length(stream: Any) -> int:
    """The number of steps of a stream."""
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
        scale = (
            jnp.abs(game.losses[t])
            + jnp.abs(there)
            + jnp.sum(jnp.abs(game.gradients[t]) * (jnp.abs(game.iterates[s]) + jnp.abs(game.iterates[t])), -1)
        )
        return game.losses[t] + slope - there, scale

    gap, scale = (np.asarray(x) for x in below(game, stream))
    worst = int(np.argmax(gap - 1e-4 * scale))
    if gap[worst] > 1e-4 * scale[worst]:
        raise ValueError(
            f"losses must be convex: loss {t[worst]} at theta_{s[worst]} is {gap[worst]:.3g} below its tangent at "
            f"theta_{t[worst]}"
        )


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
        >>> from adam_jax.online import Box
        >>> stream = jnp.array([1.0, 1.0, 1.0])
        >>> game = play(lambda x, c: c * x, stream, jnp.float32(1.0), optax.sgd(0.5), Box(0.0, 1.0))
        >>> print(regret(game, lambda x, c: c * x, stream, 0.0))
        [1.  1.5 1.5]
    """
    fixed = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), best)
    paid = jax.jit(jax.vmap(loss, in_axes=(None, 0)))(fixed, stream)
    return np.cumsum(np.asarray(game.losses, np.float64) - np.asarray(paid, np.float64))


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
        c: number > period - 1: otherwise the best fixed choice is not -1.
        period: at least 2.

    Returns:
        [steps] float32, for `linear_losses`.

    Raises:
        ValueError: for numbers outside those ranges.

    Example:
        >>> print(reddi_losses(4))
        [ 4. -1. -1.  4.]
    """
    checks.whole("steps", steps, 1)
    checks.number("c", c, above=checks.whole("period", period, 2) - 1, known=True)
    return jnp.where(jnp.arange(steps) % period == 0, c, -1.0).astype(jnp.float32)
