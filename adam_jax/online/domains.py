"""Bounded convex sets."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adam_jax import checks


@dataclasses.dataclass(frozen=True)
class Box:
    """The domain lower <= theta_i <= upper.

    Attributes:
        lower: finite number.
        upper: finite number, at least `lower`.

    Raises:
        ValueError: for a box that is empty or unbounded.
    """

    lower: float
    upper: float

    def __post_init__(self) -> None:
        """Refuse a box that is empty or unbounded."""
        checks.number("lower", self.lower, known=True)
        checks.number("upper", self.upper, known=True)
        if self.lower > self.upper:
            raise ValueError(f"lower must be <= upper, or the box is empty, got {self.lower} and {self.upper}")

    def project(self, x: jax.Array) -> jax.Array:
        """The nearest point of the domain, in the Euclidean norm and in Adam's norm weighted by sqrt(vhat) alike."""
        return jnp.clip(x, self.lower, self.upper)

    def gap(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Max over z in the domain of <g, x - z>: what a convex function with gradient g at x may still fall."""
        return jnp.sum(jnp.maximum(g * (x - self.lower), g * (x - self.upper)))

    def diameters(self, size: int) -> tuple[float, float]:
        """The largest distance between two points: Euclidean, and in the maximum norm."""
        return (self.upper - self.lower) * size**0.5, self.upper - self.lower


@dataclasses.dataclass(frozen=True)
class Ball:
    """The domain |theta - center| <= radius, Euclidean, over all leaves together.

    Adam's own projection is in the norm weighted by sqrt(vhat), which for a ball is another point; this is the Euclidean
    one, as in projected gradient descent.

    Attributes:
        radius: finite number, at least 0.
        center: finite number.

    Raises:
        ValueError: for a ball that is empty or unbounded.
    """

    radius: float
    center: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a ball that is empty or unbounded."""
        checks.number("radius", self.radius, at_least=0.0, known=True)
        checks.number("center", self.center, known=True)

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


def check_domain(domain: Any) -> None:
    """A `Box` or a `Ball`."""
    if not isinstance(domain, Domain):
        raise TypeError(f"domain must be a Box or a Ball, got {domain!r}")
