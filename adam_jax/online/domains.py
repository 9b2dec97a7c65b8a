"""Bounded convex sets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Ball", "Box", "Domain"]


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
