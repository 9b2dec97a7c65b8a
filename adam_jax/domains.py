"""Bounded convex sets, and the least point of a convex function on one of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Ball", "Box", "minimise"]


class Box(NamedTuple):
    """The domain lower <= theta_i <= upper.

    Attributes:
        lower: number.
        upper: number.
    """

    lower: float
    upper: float

    def check(self) -> None:
        """Raise if the domain is empty, unbounded or not a number."""
        if not (np.isfinite(self.lower) and np.isfinite(self.upper) and self.lower <= self.upper):
            raise ValueError(f"the box is empty or unbounded: lower must be <= upper and both finite, got {self}")

    def project(self, x: jax.Array) -> jax.Array:
        """The nearest point of the domain, in the Euclidean norm and in Adam's norm weighted by sqrt(vhat) alike."""
        return jnp.clip(x, self.lower, self.upper)

    def gap(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Max over z in the domain of <g, x - z>: what a convex function with gradient g at x may still fall."""
        return jnp.sum(jnp.maximum(g * (x - self.lower), g * (x - self.upper)))

    def diameters(self, size: int) -> tuple[float, float]:
        """The largest distance between two points: Euclidean, and in the maximum norm."""
        return (self.upper - self.lower) * size**0.5, self.upper - self.lower


class Ball(NamedTuple):
    """The domain |theta - center| <= radius, Euclidean, over all leaves together.

    Adam's own projection is in the norm weighted by sqrt(vhat), which for a ball is another point; this is the Euclidean
    one, as in projected gradient descent.

    Attributes:
        radius: number.
        center: number.
    """

    radius: float
    center: float = 0.0

    def check(self) -> None:
        """Raise if the domain is empty, unbounded or not a number."""
        if not (np.isfinite(self.radius) and np.isfinite(self.center) and self.radius >= 0):
            raise ValueError(f"the ball is empty or unbounded: radius must be >= 0 and finite, got {self}")

    def project(self, x: jax.Array) -> jax.Array:
        """The nearest point of the domain, in the Euclidean norm."""
        away = x - self.center
        norm = jnp.linalg.norm(away)
        return jnp.where(norm > self.radius, self.center + away * (self.radius / jnp.maximum(norm, self.radius)), x)

    def gap(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Max over z in the domain of <g, x - z>."""
        return jnp.vdot(g, x - self.center) + self.radius * jnp.linalg.norm(g)

    def diameters(self, size: int) -> tuple[float, float]:
        """The largest distance between two points: Euclidean, and in the maximum norm."""
        return 2 * self.radius, 2 * self.radius if size else 0.0


Domain = Box | Ball


def minimise(
    value_and_grad: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    x: jax.Array,
    domain: Domain,
    tolerance: float,
    max_steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Minimise a convex function by FISTA with backtracking and restarts (Beck & Teboulle; O'Donoghue & Candès).

    Args:
        value_and_grad: from a vector to the function's value and gradient.
        x: [d], where to begin, in the domain.
        domain: where to stay.
        tolerance: the gap at which to stop.
        max_steps: the number of steps at which to stop.

    Returns:
        The point, its value, its gap, which bounds how far the value is above the minimum, and the steps taken.

    Example:
        >>> x, *_ = minimise(jax.value_and_grad(lambda x: jnp.sum((x - 3) ** 2)), jnp.zeros(2), Box(0.0, 1.0), 1e-6, 100)
        >>> print(x)
        [1. 1.]
    """

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
