"""The best fixed choice for a stream of convex losses, with a certificate, in float64."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from adam_jax import checks
from adam_jax.online.domains import Domain, check_domain
from adam_jax.online.game import Loss, length


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
        tolerance: number > 0, of the mean loss.
        max_steps: of the solver, at least 1.

    Returns:
        A `BestPoint`.

    Raises:
        ValueError: for an empty stream, if the gap is not reached within `max_steps`, or if the mean loss there
            is below its tangent at the start, and so not convex.

    Example:
        >>> from adam_jax.online import Box
        >>> best = best_fixed_point(lambda x, c: (x - c) ** 2, jnp.array([0.0, 1.0]), 0.0, Box(-2.0, 2.0))
        >>> print(best.params.round(3), round(best.loss, 3), best.gap < 1e-6)
        0.5 0.25 True
    """
    check_domain(domain)
    checks.number("tolerance", tolerance, above=0.0, known=True)
    tolerance, max_steps = float(tolerance), checks.whole("max_steps", max_steps, 1)
    length(stream)
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


def minimise(
    value_and_grad: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    x: jax.Array,
    domain: Domain,
    tolerance: float,
    max_steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """FISTA with backtracking and restarts (Beck & Teboulle; O'Donoghue & Candès): the point, value, gap and steps taken."""

    def descend(y: jax.Array, value: jax.Array, g: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        def too_long(rate: jax.Array) -> jax.Array:
            d = domain.project(y - rate * g) - y
            model = value + jnp.vdot(g, d) + jnp.vdot(d, d) / (2 * rate)
            return value_and_grad(y + d)[0] > model + 1e-14 * jnp.abs(value)

        rate = jax.lax.while_loop(too_long, lambda r: r / 2, rate)
        return domain.project(y - rate * g), rate

    def step(carry: tuple) -> tuple:
        x, y, momentum, rate, *_, steps = carry
        value, g = value_and_grad(y)
        new, rate = descend(y, value, g, rate * 1.1)
        restart = jnp.vdot(y - new, new - x) > 0
        momentum = jnp.where(restart, 1.0, momentum)
        following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - x)
        value, g = value_and_grad(new)
        return new, ahead, following, rate, value, domain.gap(new, g), steps + 1

    value, g = value_and_grad(x)
    first = (x, x, jnp.ones_like(value), jnp.ones_like(value), value, domain.gap(x, g), jnp.zeros([], jnp.int32))
    x, _, _, _, value, gap, steps = jax.lax.while_loop(lambda c: (c[5] > tolerance) & (c[6] < max_steps), step, first)
    return x, value, gap, steps
