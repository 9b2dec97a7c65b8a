"""Derivatives through moments that are kept in few bits.

They pass the rounding of a step as if it were not there; they are those of its mean. From one step to the next they would
have to be kept in the same few bits, so there they are an error, and never zero or wrong in silence.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["opened", "sealed", "straight"]

UNDIFFERENTIABLE = (
    "storage must be 'float32' or 'root', and mu_dtype None or float32, to differentiate through more than one step, got "
    "moments kept in few bits as {}, which hold no derivatives: or stop them there with jax.lax.stop_gradient(state)"
)


@jax.custom_jvp
def straight(exact: Any, rounded: Any) -> Any:
    """The rounded arrays, with the derivatives of the exact ones."""
    del exact
    return rounded


@straight.defjvp
def _straight_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return primals[1], jax.tree.map(lambda x, t: t.astype(x.dtype), primals[1], tangents[0])


@jax.custom_jvp
def sealed(kept: jax.Array, exact: Any) -> jax.Array:
    """What is kept of moments; where these are differentiated, marked by a derivative of zero, for `opened` to refuse."""
    del exact
    return kept


@sealed.defjvp
def _sealed_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(primals[0].dtype, jnp.inexact):
        raise ValueError(UNDIFFERENTIABLE.format(primals[0].dtype))  # integers cannot be marked
    mark = sum(0.0 * t for t in jax.tree.leaves(tangents[1]))  # not a constant, which reverse mode would drop
    return primals[0], jnp.asarray(mark, primals[0].dtype)


@jax.custom_jvp
def opened(kept: jax.Array) -> jax.Array:
    """What a step begins with, which may not depend on anything that is differentiated."""
    return kept


@opened.defjvp
def _opened_jvp(primals: tuple, tangents: tuple) -> Any:
    del tangents
    raise ValueError(UNDIFFERENTIABLE.format(primals[0].dtype))
