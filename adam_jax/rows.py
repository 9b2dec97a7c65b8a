"""Row-sparse Adam: tables of which each step touches a few rows, at a cost that does not depend on the table's height.

Dense Adam moves every row at every step, also those whose gradient is zero: the moments decay, the row goes on moving
along its old first moment, and AdamW's decay shrinks it. Over k skipped steps all of this depends on the row's own
moments and on scalars, so it can wait until somebody looks at the row: that is `mode="exact"`, which equals dense Adam.
`mode="lazy"` leaves out what untouched rows do, as PyTorch's SparseAdam and TensorFlow Addons' LazyAdam.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, codes, moments, skipped, storage
from adam_jax.skipped import Rows, Settings
from adam_jax.storage import Storage

__all__ = ["RowAdam", "RowAdamState", "row_adam"]

Rate = ArrayLike | optax.Schedule
Kept = DTypeLike | Storage | None

CHUNK = 4096  # rows that `flush` takes at a time


class RowAdamState(NamedTuple):
    """What the next step of row-sparse Adam needs. N rows of D numbers.

    Attributes:
        count: int32 scalar, the number of updates made; saturates.
        mu: (N, D), first moments, bias-corrected, each row as of its own `row_count`.
        nu: (N, D), second moments, likewise; their roots where `nu_dtype` is narrow. Moments in bfloat16 and float16 are
            kept as their bits, in uint16: XLA on CPU widens a whole array of such numbers before it writes rows in it.
        row_count: (N,) int32. Exact: the update up to which dense Adam has been followed. Lazy: the row's own updates.
        log_keep: (2,), the sum of log(1 - lr_t weight_decay) over all updates, as a large and a small part; `None` where
            the weight decay is the number 0 or the mode is lazy.
        row_log_keep: (N, 2), that sum as of `row_count`; or `None`.
        row_window: int32[N, 1, 2], the windows of int8 codes of `nu`, one a row; or `None`.
    """

    count: ArrayLike
    mu: jax.Array
    nu: jax.Array
    row_count: jax.Array
    log_keep: jax.Array | None
    row_log_keep: jax.Array | None
    row_window: jax.Array | None = None


class RowAdam(NamedTuple):
    """The four functions of a row-sparse optimizer; `row_adam` documents them.

    Attributes:
        init: `init(table) -> state`.
        gather: `gather(table, state, ids) -> (rows, table, state)`.
        update: `update(table, state, ids, row_grads) -> (table, state)`.
        flush: `flush(table, state) -> (table, state)`.
    """

    init: Callable[[jax.Array], RowAdamState]
    gather: Callable[[jax.Array, RowAdamState, jax.Array], tuple[jax.Array, jax.Array, RowAdamState]]
    update: Callable[[jax.Array, RowAdamState, jax.Array, jax.Array], tuple[jax.Array, RowAdamState]]
    flush: Callable[[jax.Array, RowAdamState], tuple[jax.Array, RowAdamState]]


def row_adam(
    learning_rate: Rate = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    mode: Literal["exact", "lazy"] = "exact",
    weight_decay: Rate = 0.0,
    mu_dtype: Kept = None,
    nu_dtype: Kept = None,
) -> RowAdam:
    """Adam for a table of rows, at the cost of the rows touched (Algorithm 1; its sparse gradients are Section 6.1's).

    A step is: `gather` the rows that the batch needs, differentiate the loss with respect to those rows, `update`::

        rows, table, state = tx.gather(table, state, ids)
        table, state = tx.update(table, state, ids, jax.grad(loss)(rows))

    and before the table is read in any other way (evaluation, a checkpoint), `table, state = tx.flush(table, state)`.

    `mode="exact"`: rows as gathered, and the table after `flush`, are those of `adam_jax.adam` (with a weight decay, of
    `adam_jax.adamw`) fed the dense gradient, zeros included; `mu` and `nu` after `flush` are its moments. The module's
    docstring bounds the difference. `mode="lazy"`: untouched rows stay as they are, as with PyTorch's SparseAdam, but a
    row's moments are corrected by the number of *its own* updates. SparseAdam corrects by the number of all updates, and
    its first step of a row that comes late is up to (1 - b1) / sqrt(1 - b2) = 3.16 learning rates.

    Each function takes and returns the whole table, and jitted with `donate_argnums=(0, 1)` works in place. All four work
    inside `jit` and `scan` and on a table sharded over its rows (mesh axes of type Auto). Ids may have any integer dtype and
    any shape, and may repeat: their gradients are summed. An id that is negative or not below N touches nothing: its
    gathered row is zero and its gradient is dropped, so that -1 can fill up a batch. Under `checkify` it is an error.

    Args:
        learning_rate: number, scalar array or schedule of the count, >= 0. A rate that changes must be a schedule: skipped
            steps are charged with what it says for their count, while an array holds for all of them.
        b1: decay of the first moment in [0, 1): number or scalar array. In exact mode b1^2 < b2, else a row without
            gradients would speed up for ever.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment.
        mode: "exact" or "lazy".
        weight_decay: decoupled, as AdamW's: number, scalar array or schedule of the count, with lr_t weight_decay < 1. In
            lazy mode only the touched rows decay.
        mu_dtype: how first moments are kept, as for `scale_by_adam`: a dtype or a `Storage`. Narrow ones are rounded without
            bias when a row is written, which `gather` does not do then; int8 needs 8 bytes a row for its windows.
        nu_dtype: how second moments are kept, likewise.

    Returns:
        A `RowAdam` with state `RowAdamState`. A table of N rows, (N, D), is real and of any floating dtype; moments and
        arithmetic are float32 at least.

    Raises:
        ValueError: for a decay outside [0, 1), b1^2 >= b2 in exact mode, a negative eps, an unknown mode, a dtype that
            cannot hold a moment; from the four functions, for a table that is not (N, D) and real, ids or gradients of the
            wrong shape.
        TypeError: for decays that are schedules and dtypes that are functions; from the four functions, for ids that are not
            integers.

    Example:
        >>> tx = row_adam(0.1)
        >>> table = jnp.zeros((3, 1))
        >>> state = tx.init(table)
        >>> table, state = tx.update(table, state, jnp.array([0, 0]), jnp.array([[1.0], [2.0]]))
        >>> table, state = tx.update(table, state, jnp.array([1]), jnp.array([[1.0]]))
        >>> rows, table, state = tx.gather(table, state, jnp.array([0, 1, -1]))
        >>> print([f"{row[0]:.3f}" for row in rows])
        ['-0.167', '-0.074', '0.000']
    """
    checks.one_of("mode", mode, ("exact", "lazy"))
    for name, decay in (("b1", b1), ("b2", b2)):
        if callable(decay):
            raise TypeError(f"{name} must be a number or an array, got {decay!r}: row_adam takes no schedules of decays")
        checks.decay(name, decay)
    checks.at_least("eps", eps, 0.0)
    checks.scalar("learning_rate", learning_rate)
    checks.scalar("weight_decay", weight_decay)
    if mode == "exact" and isinstance(b1, (int, float)) and isinstance(b2, (int, float)) and b1 * b1 >= b2:
        raise ValueError(f"b1 must be below sqrt(b2) in exact mode, got b1={b1} and b2={b2}")
    settings = Settings(learning_rate, b1, b2, eps, weight_decay)
    keeping = _Keeping(_checked_dtype("mu_dtype", mu_dtype), _checked_dtype("nu_dtype", nu_dtype), b1, b2)
    exact = mode == "exact"

    def init(table: jax.Array) -> RowAdamState:
        return _init(keeping, table, ledger=exact and settings.decays())

    def gather(table: jax.Array, state: RowAdamState, ids: jax.Array) -> tuple[jax.Array, jax.Array, RowAdamState]:
        table, state = _checked(table, state)
        flat = _checked_ids(table, ids)
        found = _take(keeping, table, state, flat)
        if exact:
            found = _caught_up(settings, found, state)
            if not keeping.rounds:
                table, state = _put(keeping, table, state, flat, found, unique=False)
        rows = found.values
        rows = jnp.where((flat < len(table))[:, None], rows, 0.0)
        return rows.astype(table.dtype).reshape(*jnp.shape(ids), table.shape[1]), table, state

    def update(
        table: jax.Array, state: RowAdamState, ids: jax.Array, row_grads: jax.Array
    ) -> tuple[jax.Array, RowAdamState]:
        table, state = _checked(table, state)
        gradients = _checked_gradients(table, ids, row_grads)
        flat = _checked_ids(table, ids)
        rows = _take(keeping, table, state, flat)
        unique, sums, row_count = _summed(state.row_count, flat, rows.count, gradients)
        if exact:
            rows = _caught_up(settings, rows, state)
        state = _counted(settings, state)._replace(row_count=row_count)
        return _put(keeping, table, state, unique, _stepped(settings, rows, sums, state), unique=True)

    def flush(table: jax.Array, state: RowAdamState) -> tuple[jax.Array, RowAdamState]:
        table, state = _checked(table, state)

        def catch_up(i: jax.Array, carry: tuple[jax.Array, RowAdamState]) -> tuple[jax.Array, RowAdamState]:
            table, state = carry
            ids = i * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
            rows = _caught_up(settings, _take(keeping, table, state, ids), state)
            return _put(keeping, table, state, ids, rows, unique=False)

        chunks = -(-len(table) // CHUNK) if exact else 0
        return jax.lax.fori_loop(0, chunks, catch_up, (table, state))

    return RowAdam(init, _on_any_mesh(gather, rows=True), _on_any_mesh(update), _on_any_mesh(flush))


def _init(keeping: "_Keeping", table: jax.Array, *, ledger: bool) -> RowAdamState:
    _check_table(table)
    dtype = moments.accumulator_dtype(table.dtype)
    none = jnp.zeros_like(table, dtype=jnp.int32).sum(1)  # a zero for each row, beside it on a mesh
    mu, nu = (storage.zeros(keep, table, dtype) for keep in (keeping.mu, keeping.nu))
    windows = isinstance(keeping.nu, Storage) and keeping.nu.window and nu.dtype == keeping.nu.dtype
    return RowAdamState(
        count=jnp.zeros([], jnp.int32),
        mu=mu,
        nu=nu,
        row_count=none,
        log_keep=jnp.zeros(2, dtype) if ledger else None,
        row_log_keep=jnp.zeros((len(table), 2), dtype) + none[:, None].astype(dtype) if ledger else None,
        row_window=storage.first_windows(keeping.nu, len(table), 1) + none[:, None, None] if windows else None,
    )


def _on_any_mesh(function: Callable[..., Any], *, rows: bool = False) -> Callable[..., Any]:
    """On a mesh of explicit axes, the same as on Auto ones: results lie as table and state do, `rows` as ids."""

    @functools.wraps(function)
    def on_any_mesh(table: jax.Array, state: RowAdamState, *rest: Any) -> Any:
        place = jax.typeof(table).sharding if hasattr(table, "aval") else None
        if place is None or not place.mesh.explicit_axes:
            return function(table, state, *rest)
        out: Any = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (table, state))
        if rows:
            out = (PartitionSpec(*jax.typeof(rest[0]).sharding.spec, place.spec[1]), *out)
        with jax.sharding.use_abstract_mesh(place.mesh):
            return jax.sharding.auto_axes(function, out_sharding=out)(table, state, *rest)

    return on_any_mesh


# Moments as numbers, and as they are kept ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Keeping:
    """How moments are kept between steps; each row counts as a leaf with a window of its own."""

    mu: Storage | np.dtype | None
    nu: Storage | np.dtype | None
    b1: ArrayLike
    b2: ArrayLike

    @property
    def rounds(self) -> bool:
        return isinstance(self.mu, Storage) or isinstance(self.nu, Storage)

    @property
    def roots(self) -> bool:
        return isinstance(self.nu, Storage)

    def load(self, ids: jax.Array, rows: Rows, window: jax.Array | None, dtype: DTypeLike) -> Rows:
        """First and second moments, from what is kept of them."""
        if not self.rounds:
            return rows._replace(mu=rows.mu.astype(dtype), nu=rows.nu.astype(dtype))
        ratio = codes.largest_ratio(moments.complement(self.b1), moments.complement(self.b2))

        def one(i: jax.Array, mu: jax.Array, nu: jax.Array, window: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            kept = self._kept(i, mu, nu, window)
            (second,) = kept.second(dtype)
            size = second if self.roots else moments.root(second)
            return codes.within(kept.first(dtype, size), size, ratio), size * size if self.roots else second

        mu, nu = jax.vmap(one)(ids, rows.mu, rows.nu, window)
        return rows._replace(mu=mu, nu=nu)

    def save(self, ids: jax.Array, rows: Rows, state: RowAdamState) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What is kept of the moments of rows, and the windows."""
        if not self.rounds:
            return rows.mu, rows.nu, None

        def one(i: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
            size, window = moments.root(nu), None
            old = jnp.zeros_like(nu, dtype=state.nu.dtype)
            if state.row_window is not None and isinstance(self.nu, Storage):  # found anew from the row
                window = jnp.array([codes.EVERY_OCTAVE], jnp.int32)
                old = self.nu.encode(size, jnp.zeros(nu.shape, jnp.uint32), window[0])
            kept = self._kept(i, jnp.zeros_like(mu, dtype=state.mu.dtype), old, window)
            kept = kept.with_first(mu, size, state.count)
            kept = kept.with_second((size if self.roots else nu,), 0.0, state.count)
            return kept.mu, kept.nus[0], kept.window

        return jax.vmap(one)(ids, rows.mu, rows.nu)

    def _kept(self, i: jax.Array, mu: jax.Array, nu: jax.Array, window: jax.Array | None) -> storage.KeptMoments:
        windows = () if window is None else window[None]
        kept = storage.kept_moments(self.mu, self.nu, "", mu, (nu,), windows, 0)
        return dataclasses.replace(kept, first_index=i.astype(jnp.uint32) * len(mu))


# Rows in and out of the table ---------------------------------------------------------------------------------------------


def _take(keeping: _Keeping, table: jax.Array, state: RowAdamState, ids: jax.Array) -> Rows:
    """The rows at `ids`; some row, as if never touched, where an id is the table's height or more."""
    dtype = moments.accumulator_dtype(table.dtype)
    inside = jnp.minimum(ids, len(table) - 1)
    one = storage.recomputed(jnp.ones([], dtype), state.count)  # though XLA cannot know

    def take(array: jax.Array) -> jax.Array:
        rows = array.at[inside].get(mode="promise_in_bounds")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return rows
        return rows / one.astype(array.dtype)  # gathered for a division, rows come 4 times faster on CPUs

    count = state.row_count.at[ids].get(mode="fill", fill_value=0)
    keep, window = (None if array is None else take(array) for array in (state.row_log_keep, state.row_window))
    rows = Rows(take(table).astype(dtype), take(state.mu), take(state.nu), count, keep)
    return keeping.load(inside, rows, window, dtype)


def _put(
    keeping: _Keeping, table: jax.Array, state: RowAdamState, ids: jax.Array, rows: Rows, *, unique: bool
) -> tuple[jax.Array, RowAdamState]:
    """The rows written back; ids that repeat come with equal rows, unless `unique`."""

    def put(array: jax.Array | None, values: jax.Array | None) -> Any:
        if array is None or values is None:
            return None
        return array.at[ids].set(values.astype(array.dtype), mode="drop", unique_indices=unique)

    mu, nu, window = keeping.save(ids, rows, state)
    state = state._replace(
        mu=put(state.mu, mu),
        nu=put(state.nu, nu),
        row_count=put(state.row_count, rows.count),
        row_log_keep=put(state.row_log_keep, rows.log_keep),
        row_window=put(state.row_window, window),
    )
    return put(table, rows.values), state


def _summed(
    row_count: jax.Array, ids: jax.Array, count: jax.Array, gradients: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each id once, the others replaced by ids beyond the table, all different; and for each the sum of its gradients.

    There is no sort. All ids write their position in the batch over their row's count; of those that are equal one is read
    back, and takes the gradients of all. The third result holds what was written, until the counts are written again.
    """
    height, position = len(row_count), jnp.arange(len(ids), dtype=row_count.dtype)
    after_reading = position + jnp.minimum(count, 0)  # counts are never negative: XLA need not copy what was read before
    scratch = row_count.at[ids].set(after_reading, mode="drop")
    taker = jnp.where(ids < height, scratch.at[ids].get(mode="fill", fill_value=0), position)
    unique = jnp.where(taker == position, ids, height + position)
    return unique, jnp.zeros_like(gradients).at[taker].add(gradients), scratch


# The step -----------------------------------------------------------------------------------------------------------------


def _caught_up(settings: Settings, rows: Rows, state: RowAdamState) -> Rows:
    return skipped.catch_up(settings, rows, state.count, state.log_keep)


def _counted(settings: Settings, state: RowAdamState) -> RowAdamState:
    """The state's scalars after one more update."""
    count = jnp.asarray(state.count)
    if state.log_keep is not None:
        rate, decay = moments.at(settings.learning_rate, count), moments.at(settings.weight_decay, count)
        state = state._replace(log_keep=_two_sum(state.log_keep, skipped.log_decay(rate, decay, state.log_keep.dtype)))
    return state._replace(count=optax.safe_increment(state.count))


def _stepped(settings: Settings, rows: Rows, gradients: jax.Array, state: RowAdamState) -> Rows:
    """Algorithm 1 on the rows touched, whose weights are those of their own count. `state` counts this update already."""
    dtype = rows.mu.dtype
    number = rows.count + 1
    rate1, rate2 = (
        moments.corrected_rate(jnp.asarray(moments.complement(b), dtype), skipped.weight(b, number, dtype))[:, None]
        for b in (settings.b1, settings.b2)
    )
    g = moments.saturate(gradients, 1)
    mu = moments.average(rows.mu, g, rate1)
    nu = moments.second_moment(rows.nu, g, rate2)
    step = moments.direction(mu, moments.root(nu), jnp.asarray(settings.eps, dtype))
    before = jnp.asarray(state.count) - 1
    if settings.decays():
        step += jnp.asarray(moments.at(settings.weight_decay, before), dtype) * rows.values
    values = rows.values - jnp.asarray(moments.at(settings.learning_rate, before), dtype) * step
    ledger = rows.log_keep
    if state.log_keep is not None and ledger is not None:
        ledger = jnp.where(number[:, None] > 0, state.log_keep, ledger)
    return Rows(values, mu, nu, number, ledger)


def _two_sum(total: jax.Array, term: jax.Array) -> jax.Array:
    """A sum kept as a large and a small part, (2,), after one more term: nothing is lost over millions of steps."""
    large = total[0] + term
    return jnp.stack([large, total[1] + (term - (large - total[0]))])


# What is refused ----------------------------------------------------------------------------------------------------------


def _checked_dtype(name: str, choice: Kept) -> Storage | np.dtype | None:
    if storage.is_function(choice):
        raise TypeError(f"{name} must be a dtype or a Storage, got {choice!r}: a table is a single leaf")
    keep = storage.chosen(choice, "", second=name == "nu_dtype")
    return _in_bits(keep) if isinstance(keep, Storage) and keep.dtype in (jnp.bfloat16, jnp.float16) else keep


def _in_bits(keep: Storage) -> Storage:
    """The same storage, in the bit patterns of its numbers."""

    def encode(*args: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(keep.encode(*args), jnp.uint16)

    def decode(kept: jax.Array, *args: jax.Array) -> jax.Array:
        return keep.decode(jax.lax.bitcast_convert_type(kept, keep.dtype), *args)

    return dataclasses.replace(keep, dtype=jnp.dtype(jnp.uint16), encode=encode, decode=decode)


def _check_table(table: ArrayLike) -> None:
    if jnp.ndim(table) != 2 or 0 in jnp.shape(table) or not jnp.issubdtype(jnp.result_type(table), jnp.floating):
        raise ValueError(f"table must be real, of shape (N, D), got {jnp.result_type(table)}{list(jnp.shape(table))}")


def _checked(table: ArrayLike, state: RowAdamState) -> tuple[jax.Array, RowAdamState]:
    """Both as arrays of JAX, once they are known to belong together."""
    _check_table(table)
    if jnp.shape(state.mu) != jnp.shape(table):
        raise ValueError(f"state must be that of a table of shape {list(jnp.shape(table))}, got {list(jnp.shape(state.mu))}")
    return jax.tree.map(jnp.asarray, (table, state))


def _checked_ids(table: jax.Array, ids: ArrayLike) -> jax.Array:
    """The ids flat, with the table's height for every one that names no row."""
    ids = jnp.asarray(ids)
    if ids.size == 0:
        return jnp.zeros(0, jnp.int32)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    flat = ids.ravel()
    known = (flat >= 0) & (flat <= min(len(table) - 1, int(jnp.iinfo(flat.dtype).max)))
    checkify.debug_check(jnp.all(known), "ids must be in [0, {height}), got {ids}", height=jnp.int32(len(table)), ids=ids)
    return jnp.where(known, flat.astype(jnp.int32), len(table))


def _checked_gradients(table: jax.Array, ids: ArrayLike, row_grads: ArrayLike) -> jax.Array:
    """The gradients as (B, D), in the dtype of the arithmetic."""
    wanted = (*jnp.shape(ids), table.shape[1])
    dtype = jnp.result_type(row_grads)
    if jnp.shape(row_grads) != wanted or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"row_grads must be real, of shape {wanted}, got {dtype}{list(jnp.shape(row_grads))}")
    return jnp.asarray(row_grads).astype(moments.accumulator_dtype(table.dtype)).reshape(-1, table.shape[1])
