"""Derivatives through moments that are kept in few bits.

They pass the rounding of a step as if it were not there; they are those of its mean. From one step to the next they would
have to be kept in the same few bits, so there they are an error, and never zero or wrong in silence.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["opened", "straight"]

UNDIFFERENTIABLE = (
    "storage must be 'float32' or 'root', and mu_dtype None or float32, to differentiate through more than one step, got "
    "moments kept in few bits as {}, which hold no derivatives: or stop them there with jax.lax.stop_gradient(state)"
)


@jax.custom_jvp
def straight(exact: Any, rounded: Any, kept: Any = ()) -> tuple[Any, Any]:
    """The rounded arrays, with the derivatives of the exact ones, and what is kept of them.

    Where the exact ones are differentiated, what is kept is marked by a derivative of zero, for `opened` to refuse.
    """
    del exact
    return rounded, kept


@straight.defjvp
def _straight_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    _, rounded, kept = primals
    mark = jnp.mean(sum(0.0 * t for t in jax.tree.leaves(tangents[0])))  # not a constant, which reverse mode would drop
    for x in jax.tree.leaves(kept):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(UNDIFFERENTIABLE.format(x.dtype))  # integers cannot be marked
    marks = jax.tree.map(lambda x: jnp.full(x.shape, mark, x.dtype), kept)
    return (rounded, kept), (jax.tree.map(lambda x, t: t.astype(x.dtype), rounded, tangents[0]), marks)


@jax.custom_jvp
def opened(kept: Any) -> Any:
    """What a step begins with, which may not depend on anything that is differentiated."""
    return kept


@opened.defjvp
def _opened_jvp(primals: tuple, tangents: tuple) -> Any:
    del tangents
    inexact = [x.dtype for x in jax.tree.leaves(primals) if jnp.issubdtype(x.dtype, jnp.inexact)]
    raise ValueError(UNDIFFERENTIABLE.format(min(inexact, key=lambda dtype: dtype.itemsize)))
