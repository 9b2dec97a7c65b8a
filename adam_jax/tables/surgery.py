"""Tables that change while they are trained: begun anew, with rows more or fewer, and read as the float32 weights they are.

Each function flushes first, so that no skipped step is charged to the wrong rows; `RowAdam.clear` needs no flush.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adam_jax import moments, rounding
from adam_jax.tables.keeping import Exact, RowAdamState
from adam_jax.tables.rows import RowAdam

__all__ = ["drop", "grow", "master_table", "restart"]


def restart(tx: RowAdam, table: jax.Array, state: RowAdamState) -> tuple[jax.Array, RowAdamState]:
    """Begin anew from the table as it is now: a count of zero, no moments, the weights of 24 or 32 bits kept.

    Args:
        tx: the optimizer.
        table: (N, D).
        state: its state.

    Returns:
        The table, flushed, and a new state.

    Example:
        >>> from adam_jax.tables import row_adam
        >>> tx, table = row_adam(0.1), jnp.zeros((2, 1))
        >>> table, state = tx.update(table, tx.init(table), jnp.array([0]), jnp.ones((1, 1)))
        >>> table, state = restart(tx, table, state)
        >>> print(table[:, 0], state.count)
        [-0.1  0. ] 0
    """
    table, state = tx.flush(table, state)
    return table, tx.init(table)._replace(residual=state.residual)


def grow(tx: RowAdam, table: jax.Array, state: RowAdamState, rows: ArrayLike) -> tuple[jax.Array, RowAdamState]:
    """Append rows that have had no gradient: dense Adam's with zeros appended to its moments (in lazy mode, new rows).

    They are not charged for the weight decay before they came.

    Args:
        tx: the optimizer.
        table: (N, D).
        state: its state.
        rows: (M, D), rounded to nearest where the table is narrower.

    Returns:
        A table (N + M, D), flushed, and its state.

    Raises:
        ValueError: for rows of another width.

    Example:
        >>> from adam_jax.tables import row_adam
        >>> tx, table = row_adam(0.1, weight_decay=0.5), jnp.ones((2, 1))
        >>> table, state = tx.update(table, tx.init(table), jnp.array([0]), jnp.ones((1, 1)))
        >>> table, state = grow(tx, table, state, jnp.ones((1, 1)))
        >>> print(tx.flush(table, state)[0][:, 0])
        [0.85 0.95 1.  ]
    """
    if jnp.shape(rows)[1:] != jnp.shape(table)[1:]:
        raise ValueError(f"rows must have shape (M, {jnp.shape(table)[1]}), as the table has, got {list(jnp.shape(rows))}")
    table, state = tx.flush(table, state)
    more, low = jnp.asarray(rows).astype(table.dtype), None
    if state.residual is not None:
        bits = jnp.iinfo(state.residual.dtype).bits
        x = jnp.asarray(rows, jnp.float32)
        half = jnp.full(x.shape, 2**31, jnp.uint32)
        more, low = rounding.split(rounding.stochastic(x, half, 8) if bits == 8 else x, bits)
    new = tx.init(more)
    if isinstance(state.form, Exact):  # dense Adam has seen them at every step, with a gradient of zero
        new = new._replace(count=state.count, log_keep=state.log_keep)
        _, new = tx.clear(more, new, jnp.arange(len(more)))  # written as zeros, in any code, and charged from now on
    new = new._replace(residual=low)
    return jnp.concatenate([table, more]), _by_row(lambda a, b: jnp.concatenate([a, b]), state, new)


def drop(tx: RowAdam, table: jax.Array, state: RowAdamState, ids: ArrayLike) -> tuple[jax.Array, RowAdamState]:
    """Take rows away; those that stay keep their order, their values and their moments.

    Args:
        tx: the optimizer.
        table: (N, D).
        state: its state.
        ids: integers in [0, N), not traced.

    Returns:
        A lower table, flushed, and its state.

    Raises:
        ValueError: for an id outside the table, and if no row is left.

    Example:
        >>> from adam_jax.tables import row_adam
        >>> tx, table = row_adam(0.1), jnp.arange(3.0)[:, None]
        >>> table, state = drop(tx, table, tx.init(table), [1])
        >>> print(table[:, 0], state.row_count.shape)
        [0. 2.] (2,)
    """
    gone = np.asarray(ids, np.int64)
    if np.any((gone < 0) | (gone >= len(table))):
        raise ValueError(f"ids must be in [0, {len(table)}), got {gone[(gone < 0) | (gone >= len(table))]}")
    stay = np.setdiff1d(np.arange(len(table)), gone)
    if not len(stay):
        raise ValueError(f"ids must leave a row, got all {len(table)}")
    table, state = tx.flush(table, state)
    return jnp.asarray(table)[stay], _by_row(lambda array: jnp.asarray(array)[stay], state)


def master_table(table: jax.Array, state: RowAdamState) -> jax.Array:
    """The float32 weights that are being trained: the table, with what a residual keeps of it; `flush` before.

    Args:
        table: (N, D).
        state: its state.

    Returns:
        An array like the table, float32 where that is narrower.

    Example:
        >>> from adam_jax.tables import row_adam
        >>> tx, table = row_adam(1e-4, residual=16), jnp.ones((1, 1), jnp.bfloat16)
        >>> table, state = tx.update(table, tx.init(table), jnp.array([0]), jnp.ones((1, 1)))
        >>> print(table[0], master_table(table, state)[0])
        [1] [0.9999]
    """
    if state.residual is not None:
        return rounding.join(jnp.asarray(table), jnp.asarray(state.residual))
    return jnp.asarray(table).astype(moments.accumulator_dtype(table.dtype))


def _by_row(function: Callable[..., jax.Array], *states: RowAdamState) -> RowAdamState:
    """The first state, with a function of all that these have for each row."""
    names = ("mu", "nu", "row_count", "row_log_keep", "row_window", "residual")
    there = [name for name in names if getattr(states[0], name) is not None and jnp.ndim(getattr(states[0], name))]
    return states[0]._replace(**{name: function(*(getattr(state, name) for state in states)) for name in there})
