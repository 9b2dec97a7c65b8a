"""Row-sparse Adam: tables of which each step touches a few rows, at a cost that does not depend on the table's height.

Dense Adam moves every row at every step, also those whose gradient is zero: the moments decay, the row goes on moving
along its old first moment, and AdamW's decay shrinks it. Over k skipped steps all of this depends on the row's own
moments and on scalars, so it can wait until somebody looks at the row: that is `mode="exact"`, which equals dense Adam.
`mode="lazy"` leaves out what untouched rows do, as PyTorch's SparseAdam and TensorFlow Addons' LazyAdam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import checkify
from jax.typing import ArrayLike

from adam_jax import checks, clock, moments, norms
from adam_jax.choices import Choice, StorageLike
from adam_jax.storage import Kept
from adam_jax.tables.catching_up import Rows, Settings, catch_up, log_decay, tick
from adam_jax.tables.keeping import Exact, Keeping, Lazy, RowAdamState, on_any_mesh
from adam_jax.trees import At

__all__ = ["RowAdam", "row_adam"]

Rate = ArrayLike | optax.Schedule

CHUNK = 4096  # rows that `flush` takes at a time


class RowAdam(NamedTuple):
    """The five functions of a row-sparse optimizer; `row_adam` documents them.

    Attributes:
        init: `init(table) -> state`.
        gather: `gather(table, state, ids) -> (rows, table, state)`.
        update: `update(table, state, ids, row_grads) -> (table, state)`.
        flush: `flush(table, state) -> (table, state)`.
        clear: `clear(table, state, ids) -> (table, state)`.
    """

    init: Callable[[jax.Array], RowAdamState]
    gather: Callable[[jax.Array, RowAdamState, jax.Array], tuple[jax.Array, jax.Array, RowAdamState]]
    update: Callable[[jax.Array, RowAdamState, jax.Array, jax.Array], tuple[jax.Array, RowAdamState]]
    flush: Callable[[jax.Array, RowAdamState], tuple[jax.Array, RowAdamState]]
    clear: Callable[[jax.Array, RowAdamState, jax.Array], tuple[jax.Array, RowAdamState]]


@checks.did_you_mean
def row_adam(
    learning_rate: Rate = 1e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    mode: Literal["exact", "lazy"] = "exact",
    weight_decay: Rate = 0.0,
    storage: StorageLike = None,
    residual: Literal[0, 8, 16] = 0,
    seed: int = 0,
) -> RowAdam:
    """Adam for a table of rows, at the cost of the rows touched (Algorithm 1; its sparse gradients are Section 6.1's).

    A step is: `gather` the rows that the batch needs, differentiate the loss with respect to those rows, `update`::

        rows, table, state = tx.gather(table, state, ids)
        table, state = tx.update(table, state, ids, jax.grad(loss)(rows))

    and before the table is read in any other way (evaluation, a checkpoint), `table, state = tx.flush(table, state)`.

    `mode="exact"`: rows as gathered, and the table after `flush`, are those of `adam_jax.adam` (with a weight decay, of
    `adam_jax.adamw`) fed the dense gradient, zeros included; `mu` and `nu` after `flush` are its moments. The docstring of
    `catching_up` bounds the difference. `mode="lazy"`: untouched rows stay as they are, as with PyTorch's SparseAdam, but a
    row's moments are corrected by the number of *its own* updates. SparseAdam corrects by the number of all updates, and
    its first step of a row that comes late is up to (1 - b1) / sqrt(1 - b2) = 3.16 learning rates.

    Each function takes and returns the whole table, and jitted with `donate_argnums=(0, 1)` works in place (before jax 0.12
    XLA on CPU copies a bfloat16 table). All work inside `jit` and `scan`, and on a table sharded over its rows, on meshes of
    type Auto and Explicit. Ids may have any integer dtype and any shape, and may repeat: their gradients are summed. An id
    that is negative or not below N touches nothing: its gathered row is zero and its gradient is dropped, so that -1 can
    fill up a batch. Under `checkify` it is an error.

    **Narrow tables.** Rows of a bfloat16 or float16 table are computed in float32 and rounded without bias when they are
    written, as by `in_float32`; a residual keeps float32 weights beside a bfloat16 table (`master_table`). What rounds is
    written by `update`, `flush` and `clear` alone: `gather` then reads what dense Adam has, in the table's nearest numbers.

    **Surgery.** `clear` takes away the moments of some rows, as if dense Adam's were set to zero there: recycled entries
    start anew. `adam_jax.tables` has `restart`, `grow` and `drop`. A count set to zero restarts, too; in exact mode `flush`
    before.

    Args:
        learning_rate: number, scalar array or schedule of the count, >= 0: to climb, as `adam` does at a negative rate, hand
            over -row_grads. A rate that changes must be a schedule: skipped steps are charged with what it says for their
            count, while an array holds for all of them.
        b1: decay of the first moment in [0, 1): number or scalar array. In exact mode b1^2 < b2, else a row without
            gradients would speed up for ever.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment.
        mode: "exact" or "lazy".
        weight_decay: decoupled, as AdamW's: number, scalar array or schedule of the count, >= 0, with lr_t weight_decay < 1.
            In lazy mode only the touched rows decay.
        storage: how both moments are kept, as for `scale_by_adam`, but no function of a path: a table is a single leaf.
            Its `smallest` does not count: a table of any size, also one that grows, is kept as asked. Narrow moments are
            rounded without bias when a row is written; int8 needs 8 bytes a row for its windows.
        residual: 0, 8 or 16, the bits that are kept of each weight beside a bfloat16 table.
        seed: integer >= 0, of the rounding of a narrow table.

    Returns:
        A `RowAdam` with state `RowAdamState`. A table of N rows, (N, D), is real, of 16 bits or wider; moments and
        arithmetic are float32 at least.

    Raises:
        ValueError: for a decay outside [0, 1), b1^2 >= b2 in exact mode, a setting that is negative or not finite, an
            unknown mode, storage or residual; from the functions, for a table that is not (N, D) and real, or not bfloat16
            beside a residual, for ids or gradients of the wrong shape, a state of another mode or storage.
        TypeError: for decays that are schedules and storages that are functions; from the functions, for ids that are not
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
    choice = _checked_settings(learning_rate, b1, b2, eps, mode, weight_decay, storage, residual, seed)
    how, exact = choice.of(At(())), mode == "exact"
    norm = norms.Root(coarse=how.narrow) if choice.rooted else norms.Square()
    form = (Exact if exact else Lazy)(norm.form(choice.codes()))
    settings = Settings(learning_rate, b1, b2, eps, weight_decay, norm)
    tables = _Tables(settings, Keeping(how, settings.largest_ratio, residual, seed), exact, form)
    return RowAdam(tables.init, tables.gather, tables.update, tables.flush, tables.clear)


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What `row_adam` returns the methods of."""

    settings: Settings
    keeping: Keeping
    exact: bool
    form: Any

    def init(self, table: jax.Array) -> RowAdamState:
        _check_table(table, self.keeping.residual)
        return self.keeping.empty(jnp.asarray(table), ledger=self.exact and self.settings.decays(), form=self.form)

    def gather(self, table: jax.Array, state: RowAdamState, ids: jax.Array) -> tuple[jax.Array, jax.Array, RowAdamState]:
        def gathered(table: jax.Array, state: RowAdamState, ids: jax.Array) -> tuple[jax.Array, jax.Array, RowAdamState]:
            flat = _inside(table, ids)
            found = self._take(table, state, flat)
            state = state._replace(count=_after(jnp.asarray(state.count), found.count))
            if self.exact and not self.keeping.rounds(table):
                table, state = self._write(table, state, flat, found)
            rows = jnp.where((flat < len(table))[:, None], found.now, 0.0)
            return rows.astype(table.dtype).reshape(*ids.shape, table.shape[1]), table, state

        table, state, ids = self._checked(table, state, ids)
        return on_any_mesh(gathered, table, state, ids, rows=ids)

    def update(
        self, table: jax.Array, state: RowAdamState, ids: jax.Array, row_grads: jax.Array
    ) -> tuple[jax.Array, RowAdamState]:
        def updated(table: jax.Array, state: RowAdamState, ids: jax.Array, g: jax.Array) -> tuple[jax.Array, RowAdamState]:
            state, flat = _begun(state), _inside(table, ids)
            rows = self.keeping.take(table, state, flat)
            unique, sums, scratch = _summed(state.row_count, flat, rows.count, g.reshape(-1, table.shape[1]))
            rows = self._caught_up(rows, state)
            state = _counted(self.settings, state)._replace(row_count=scratch)
            rows, kept = _stepped(self.settings, self.keeping, unique, rows, sums, state)
            return self.keeping.put(table, state, unique, rows, kept, unique=True)

        table, state, ids = self._checked(table, state, ids)
        return on_any_mesh(updated, table, state, ids, _checked_gradients(table, ids, row_grads))

    def flush(self, table: jax.Array, state: RowAdamState) -> tuple[jax.Array, RowAdamState]:
        def flushed(table: jax.Array, state: RowAdamState) -> tuple[jax.Array, RowAdamState]:
            return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-len(table) // CHUNK)), chunk, (table, state))

        def chunk(i: jax.Array, carry: tuple[jax.Array, RowAdamState]) -> tuple[jax.Array, RowAdamState]:
            table, state = carry
            ids = i * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
            behind = state.row_count.at[ids].get(mode="fill", fill_value=0) < state.count  # others are not rounded again
            return self._write(table, state, jnp.where(behind, ids, len(table)), self._take(table, state, ids))

        table, state, _ = self._checked(table, state, jnp.zeros(0, jnp.int32))
        return on_any_mesh(flushed, table, state) if self.exact else (table, state)

    def clear(self, table: jax.Array, state: RowAdamState, ids: jax.Array) -> tuple[jax.Array, RowAdamState]:
        def cleared(table: jax.Array, state: RowAdamState, ids: jax.Array) -> tuple[jax.Array, RowAdamState]:
            flat = _inside(table, ids)
            rows = self._take(table, state, flat)
            count = rows.count if self.exact else jnp.zeros_like(rows.count)
            rows = rows._replace(mu=jnp.zeros_like(rows.mu), nu=jnp.zeros_like(rows.nu), count=count)
            return self._write(table, state, flat, rows)

        table, state, ids = self._checked(table, state, ids)
        return on_any_mesh(cleared, table, state, ids)

    def _caught_up(self, rows: Rows, state: RowAdamState) -> Rows:
        return catch_up(self.settings, rows, state.count, state.log_keep) if self.exact else rows

    def _take(self, table: jax.Array, state: RowAdamState, ids: jax.Array) -> Rows:
        return self._caught_up(self.keeping.take(table, state, ids), state)

    def _write(self, table: jax.Array, state: RowAdamState, ids: jax.Array, rows: Rows) -> tuple[jax.Array, RowAdamState]:
        kept, rows = self.keeping.rounded(ids, rows, state.count)
        return self.keeping.put(table, state, ids, rows, kept, unique=False)

    def _checked(self, table: ArrayLike, state: Any, ids: ArrayLike) -> tuple[jax.Array, RowAdamState, jax.Array]:
        """All as arrays of JAX, once they are known to belong together."""
        _check_table(table, self.keeping.residual)
        if not isinstance(state, RowAdamState):
            raise TypeError(f"state must be a RowAdamState, as init makes it, got {type(state).__name__}")
        if jax.tree.structure(state.form) != jax.tree.structure(self.form):
            raise ValueError(
                f"mode and storage must be as they were at init: the state keeps {state.form}, this optimizer {self.form}"
            )
        low = 0 if state.residual is None else jnp.iinfo(state.residual.dtype).bits
        if low != self.keeping.residual:
            raise ValueError(f"residual must be as it was at init, got {self.keeping.residual}, but the state keeps {low}")
        if jnp.shape(state.mu) != jnp.shape(table):
            shapes = [list(jnp.shape(x)) for x in (table, state.mu)]
            raise ValueError(f"state must be that of a table of shape {shapes[0]}, got {shapes[1]}")
        table, ids = jnp.asarray(table), jnp.asarray(ids)
        if ids.size and not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        known, height = _is_known(table, ids), jnp.int32(len(table))
        checkify.debug_check(jnp.all(known), "ids must be in [0, {height}), got {ids}", height=height, ids=ids)
        return table, jax.tree.map(jnp.asarray, state), ids


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


def _after(count: jax.Array, row_count: jax.Array) -> jax.Array:
    """The same count, known when those of rows have been read, so that XLA need not copy what it writes later."""
    return count + jnp.minimum(jnp.min(row_count, initial=0), 0)  # which is zero


def _begun(state: RowAdamState) -> RowAdamState:
    """The state; if its count is zero, with no row touched yet."""
    empty = jnp.asarray(state.count) <= 0
    row_count = jax.lax.cond(empty, jnp.zeros_like, lambda count: count, state.row_count)
    return state._replace(
        row_count=row_count, log_keep=None if state.log_keep is None else jnp.where(empty, 0.0, state.log_keep)
    )


def _counted(settings: Settings, state: RowAdamState) -> RowAdamState:
    """The state's scalars after one more update."""
    count = jnp.asarray(state.count)
    if state.log_keep is not None:
        rate, decay = clock.at(settings.learning_rate, count), clock.at(settings.weight_decay, count)
        state = state._replace(log_keep=_two_sum(state.log_keep, log_decay(rate, decay, state.log_keep.dtype)))
    return state._replace(count=optax.safe_increment(count))


def _stepped(
    settings: Settings, keeping: Keeping, ids: jax.Array, rows: Rows, gradients: jax.Array, state: RowAdamState
) -> tuple[Rows, Kept]:
    """Algorithm 1 on the rows touched, whose weights are those of their own count. `state` counts this update already."""
    dtype, norm = rows.mu.dtype, settings.norm
    number, before = jnp.asarray(optax.safe_increment(rows.count)), jnp.asarray(state.count) - 1
    m, v = (tick(b, number, dtype) for b in (settings.b1, settings.b2))
    g = moments.saturate(gradients, norm.squares)
    mu, (nu,) = norm.average(rows.mu, g, m.moved), norm.advance((rows.nu,), g, v)
    kept, rows = keeping.rounded(ids, rows._replace(mu=mu, nu=nu), state.count)  # the step is that of the moments as kept
    step = moments.direction(rows.mu, norm.size((rows.nu,), v), jnp.asarray(settings.eps, dtype))
    if settings.decays():
        step += jnp.asarray(clock.at(settings.weight_decay, before), dtype) * rows.now
    moved = rows.moved - jnp.asarray(clock.at(settings.learning_rate, before), dtype) * step
    ledger = rows.log_keep
    if state.log_keep is not None and ledger is not None:
        ledger = jnp.where(number[:, None] > 0, state.log_keep, ledger)  # of itself, so that XLA writes it in place
    return rows._replace(moved=moved, count=number, log_keep=ledger), kept


def _two_sum(total: jax.Array, term: jax.Array) -> jax.Array:
    """A sum kept as a large and a small part, (2,), after one more term: nothing is lost over millions of steps."""
    large = total[0] + term
    return jnp.stack([large, total[1] + (term - (large - total[0]))])


def _checked_settings(
    learning_rate: Rate, b1: Any, b2: Any, eps: Any, mode: str, weight_decay: Rate, storage: Any, residual: int, seed: int
) -> Choice:
    """How moments are kept, once all settings are known to make sense."""
    checks.one_of("mode", mode, ("exact", "lazy"))
    for name, decay in (("b1", b1), ("b2", b2)):
        if callable(decay):
            raise TypeError(f"{name} must be a number or an array, got {decay!r}: row_adam takes no schedules of decays")
        checks.decay(name, decay)
    checks.at_least("eps", eps, 0.0)
    checks.scalar("learning_rate", learning_rate, 0.0)
    checks.scalar("weight_decay", weight_decay, 0.0)
    if mode == "exact" and isinstance(b1, (int, float)) and isinstance(b2, (int, float)) and b1 * b1 >= b2:
        raise ValueError(f"b1 must be below sqrt(b2) in exact mode, got b1={b1} and b2={b2}")
    if residual not in (0, 8, 16) or isinstance(residual, bool):
        raise ValueError(f"residual must be 0, 8 or 16, the bits that are kept of each weight, got {residual!r}")
    checks.seed("seed", seed)
    choice = Choice(storage)
    if choice.by_path:
        raise TypeError(f"storage must be a name or a Storage, got {storage!r}: a table is a single leaf")
    return choice


def _check_table(table: ArrayLike, residual: int) -> None:
    dtype = jnp.result_type(table)
    real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    if jnp.ndim(table) != 2 or 0 in jnp.shape(table) or not real:
        raise ValueError(
            f"table must be real, of shape (N, D) and at least 16 bits a number, got {dtype}{list(jnp.shape(table))}"
        )
    if residual and dtype != jnp.bfloat16:
        raise ValueError(f"table must be bfloat16 for residual={residual}, got {dtype}")


def _is_known(table: jax.Array, ids: jax.Array) -> jax.Array:
    if not ids.size:
        return jnp.ones(ids.shape, bool)
    return (ids >= 0) & (ids <= min(len(table) - 1, int(jnp.iinfo(ids.dtype).max)))


def _inside(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The ids flat, with the table's height for every one that names no row."""
    return jnp.where(_is_known(table, ids), ids.astype(jnp.int32), len(table)).ravel()


def _checked_gradients(table: jax.Array, ids: jax.Array, row_grads: ArrayLike) -> jax.Array:
    """The gradients in the dtype of the arithmetic."""
    wanted = (*ids.shape, table.shape[1])
    dtype = jnp.result_type(row_grads)
    if jnp.shape(row_grads) != wanted or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"row_grads must be real, of shape {wanted}, got {dtype}{list(jnp.shape(row_grads))}")
    return jnp.asarray(row_grads).astype(moments.accumulator_dtype(table.dtype))
