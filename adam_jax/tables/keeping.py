"""Rows in and out of a table and its state: gathered and scattered, unpacked and rounded, on any mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from adam_jax import codes, moments, norms, rounding
from adam_jax.storage import Kept, Limits, Moving, Storage
from adam_jax.tables.catching_up import Rows
from adam_jax.trees import At

__all__ = ["Exact", "Keeping", "Lazy", "RowAdamState", "on_any_mesh"]


class Exact(NamedTuple):
    """Marks the form of a state that follows dense Adam: rows count its updates."""

    norm: Any


class Lazy(NamedTuple):
    """Marks the form of a state whose rows count their own updates."""

    norm: Any


class RowAdamState(NamedTuple):
    """What the next step of row-sparse Adam needs. N rows of D numbers.

    Attributes:
        count: int32 scalar, the number of updates made; saturates. At zero nothing else in the state counts but `residual`.
        mu: (N, D), first moments, bias-corrected, each row as of its own `row_count`. Moments in 16 bits, and both in
            int8, are kept as their bits, in uint16: XLA on CPU widens a whole array of bfloat16 before it writes rows in it.
        nu: (N, D), second moments, likewise, or what `form` says; nothing where `mu` holds both.
        row_count: (N,) int32. Exact: the update up to which dense Adam has been followed. Lazy: the row's own updates. A row
            at zero has moments of zero, whatever `mu` and `nu` hold.
        log_keep: (2,), the sum of log(1 - lr_t weight_decay) over all updates, as a large and a small part; `None` where
            the weight decay is the number 0 or the mode is lazy.
        row_log_keep: (N, 2), that sum as of `row_count`; or `None`.
        row_window: int32[N, 2], the window of a row's int8 codes (`adam_jax.codes`); or `None`.
        residual: (N, D), uint8 or uint16: what the float32 weights have beyond the bfloat16 table; or `None`.
        form: the mode, what `nu` is and how it is coded: a marker without arrays.
    """

    count: ArrayLike
    mu: jax.Array
    nu: jax.Array
    row_count: jax.Array
    log_keep: jax.Array | None
    row_log_keep: jax.Array | None
    row_window: jax.Array | None = None
    residual: jax.Array | None = None
    form: Any = Exact(norms.Squares())


@dataclasses.dataclass(frozen=True)
class Keeping:
    """How a table and its moments are kept: by the storage of the dense step, each row a leaf with a window of its own.

    Draws are those of the whole table as one leaf: they depend on the seed, the element's index in the table and the count.
    """

    how: Storage
    largest_ratio: Callable[[], jax.Array]
    residual: int  # bits
    seed: int

    def rounds(self, table: jax.Array) -> bool:
        """Whether a row is rounded at random when it is written."""
        return self.how.rounds or (_is_narrow(table.dtype) and self.residual < 16)

    def empty(self, table: jax.Array, *, ledger: bool, form: Any) -> RowAdamState:
        """The state of a table of which no row has been touched."""
        wide = moments.accumulator_dtype(table.dtype)
        mu, nu = (_bits(self.how.empty(table, wide, moment)) for moment in (0, 1))
        return RowAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=mu,
            nu=nu,
            row_count=_column(table, jnp.int32),
            log_keep=jnp.zeros(2, wide) if ledger else None,
            row_log_keep=_column(table, wide, 2) if ledger else None,
            row_window=_column(table, jnp.int32, 2) if self.how.windowed else None,
            residual=jnp.zeros_like(table, dtype=f"uint{self.residual}") if self.residual else None,
            form=form,
        )

    def take(self, table: jax.Array, state: RowAdamState, ids: jax.Array) -> Rows:
        """The rows at `ids`; some row, as if never touched, where an id is the table's height or more."""
        wide = moments.accumulator_dtype(table.dtype)
        inside = jnp.minimum(ids, len(table) - 1)
        one = jnp.where(jnp.asarray(state.count) < 0, 2.0, 1.0)  # though XLA cannot know

        def take(array: jax.Array) -> jax.Array:
            rows = array.at[inside].get(mode="promise_in_bounds")
            exact = jnp.issubdtype(array.dtype, jnp.floating) and not _is_narrow(array.dtype)
            return rows / one.astype(array.dtype) if exact else rows  # for a division, rows come 4 times faster on CPUs

        count = jnp.where(jnp.asarray(state.count) <= 0, 0, state.row_count.at[ids].get(mode="fill", fill_value=0))
        values, mu = take(table), take(state.mu)
        nu = take(state.nu) if state.nu.ndim else state.nu
        window = None if state.row_window is None else take(state.row_window)
        mu, nu = self._loaded(mu, nu, window, count == 0, wide)
        if state.residual is not None:
            values = rounding.join(values, take(state.residual))
        keep = None if state.row_log_keep is None else jnp.where(count[:, None] == 0, 0.0, take(state.row_log_keep))
        return Rows(values.astype(wide), mu, nu, count, keep)

    def rounded(self, ids: jax.Array, rows: Rows, count: ArrayLike) -> tuple[Kept, Rows]:
        """What is kept of the moments of rows, and the rows with moments as they are kept."""
        stream, turn, limits = self.how.stream(At(())), rounding.turn(count), self._limits()
        row = jnp.zeros(rows.mu.shape[1:], rows.mu.dtype)
        templates = [self.how.empty(row, row.dtype, moment) for moment in (0, 1)]

        def one(i: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[Kept, jax.Array, jax.Array]:
            windows = self.how.windows_of((nu,))
            kept = Kept(templates[0], (templates[1],), codes.scale(windows) if self.how.windowed else ())
            own = jnp.asarray(stream) + i.astype(jnp.uint32) * np.uint32(len(mu))  # so that draws go on from row to row
            moving = Moving(lambda _: (nu,), mu, 0.0, own, turn, limits)
            new, mu, (nu,) = self.how.save(kept, mu, moving)
            return Kept(new.mu, new.nus, found=windows), mu, nu

        kept, mu, nu = jax.vmap(one)(ids, rows.mu, rows.nu)
        return kept, rows._replace(mu=mu, nu=nu)

    def put(
        self, table: jax.Array, state: RowAdamState, ids: jax.Array, rows: Rows, kept: Kept, *, unique: bool
    ) -> tuple[jax.Array, RowAdamState]:
        """The rows written back, their moments as they are `kept`; ids that repeat come with equal rows, unless `unique`."""

        def put(array: Any, values: Any) -> Any:
            if array is None or not array.ndim:
                return array
            values = _bits(values) if array.dtype != values.dtype else values
            return array.at[ids].set(values, mode="drop", unique_indices=unique)

        values, residual = self._written(table, ids, rows, state.count)
        state = state._replace(
            mu=put(state.mu, kept.mu),
            nu=put(state.nu, kept.nus[0]),
            row_count=put(state.row_count, rows.count),
            row_log_keep=put(state.row_log_keep, rows.log_keep),
            row_window=put(state.row_window, kept.found[:, 0, :2] if len(kept.found) else None),
            residual=put(state.residual, residual),
        )
        return put(table, values), state

    def _written(self, table: jax.Array, ids: jax.Array, rows: Rows, count: ArrayLike) -> tuple[jax.Array, Any]:
        """Weights and residuals: the exact sum of the values and what they move by, rounded once."""
        if not _is_narrow(table.dtype):
            return rows.now.astype(table.dtype), None
        width = table.shape[1]
        index = ids.astype(jnp.uint32)[:, None] * np.uint32(width) + jnp.arange(width, dtype=jnp.uint32)
        draws = rounding.draws_at(index, jnp.asarray(rounding.stream(self.seed, "table")), rounding.turn(count))
        total, rest = rounding.two_sum(rows.values, jnp.broadcast_to(rows.moved, rows.values.shape))
        if not self.residual:
            return rounding.round_to(total, table.dtype, draws, rest).astype(table.dtype), None
        total = rounding.stochastic(total, draws, 8, rest) if self.residual == 8 else total
        return rounding.split(total, self.residual)

    def _loaded(
        self, mu: jax.Array, nu: jax.Array, window: Any, empty: jax.Array, wide: DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        dtypes, limits = self.how.dtypes(wide), self._limits()

        def one(mu: jax.Array, nu: jax.Array, window: Any, empty: jax.Array) -> tuple[jax.Array, jax.Array]:
            scales = () if window is None else codes.scale(window[None])
            kept = Kept(_floats(mu, dtypes[0]), (_floats(nu, dtypes[1]),), scales)
            mu, (nu,) = self.how.load(self.how.emptied(kept, empty), wide, limits.ratios, limits.mu)
            return mu, nu

        return jax.vmap(one, (0, 0 if nu.ndim else None, 0, 0))(mu, nu, window, empty)

    def _limits(self) -> Limits:
        bound = jnp.minimum(self.largest_ratio(), norms.UNBOUNDED)
        return Limits(bound, ratios=codes.ratios(bound))


def on_any_mesh(
    function: Callable[..., Any], table: jax.Array, state: RowAdamState, *args: jax.Array, rows: Any = None
) -> Any:
    """`function(table, state, *args) -> (table, state)`, before them rows like `rows` where given, on Explicit meshes too.

    There it runs in mode Auto: a table and a state come out as they were sharded, rows as the ids were.
    """
    mesh = jax.typeof(table).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return function(table, state, *args)

    def sharding(x: jax.Array, *more: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*jax.typeof(x).sharding.spec, *more))

    out = jax.tree.map(sharding, (table, state))
    out = out if rows is None else (sharding(rows, jax.typeof(table).sharding.spec[1]), *out)
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=out))(
        table, state, *args
    )  # eager, it wants one mesh for all


def _column(table: jax.Array, dtype: DTypeLike, *more: int) -> jax.Array:
    """Zeros for each row, sharded as the rows are."""
    zeros = jnp.zeros_like(table, dtype=dtype).sum(1, dtype=dtype)  # by default int64 under x64
    return jnp.stack([zeros] * more[0], axis=1) if more else zeros


def _is_narrow(dtype: DTypeLike) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)


def _bits(x: jax.Array) -> jax.Array:
    """16-bit floats as their patterns."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if _is_narrow(x.dtype) else x


def _floats(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype) if _is_narrow(dtype) else x
