"""A table that begins anew, loses the moments of rows, grows or shrinks is dense float32 Adam that did the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax import tables

HEIGHT, WIDTH, STEPS = 24, 8, 60
SETTINGS = {"learning_rate": 0.1, "eps": 1e-3, "weight_decay": 0.02}
LIMITS = {"float32": 1e-5, "root": 1e-5, "bfloat16": 0.01, "int8": 0.06}  # of the rms of what is moved


def _batches(seed, height=HEIGHT):
    rng = np.random.default_rng(seed)
    ids = (rng.zipf(1.3, (STEPS, 4)) - 1) % height
    return jnp.asarray(ids), jnp.asarray(rng.normal(size=(STEPS, 4, WIDTH)), jnp.float32)


@functools.cache
def _tx(storage="float32", mode="exact", **settings):
    """`row_adam` with jitted functions, and its step."""
    tx = tables.row_adam(**SETTINGS | settings, mode=mode, storage=storage)
    step = jax.jit(lambda table, state, *batch: tx.update(*tx.gather(table, state, batch[0])[1:], *batch))
    return tables.RowAdam(*map(jax.jit, tx)), step


@functools.cache
def _dense():
    """`adamw` and its step."""
    tx = adam_jax.adamw(**SETTINGS)

    @jax.jit
    def step(table, state, ids, gradients):
        updates, state = tx.update(jnp.zeros_like(table).at[ids].add(gradients), state, table)
        return optax.apply_updates(table, updates), state

    return tx, step


def _run(step, carry, batches):
    for batch in zip(*batches, strict=True):
        carry = step(*carry, *batch)
    return carry


def _both(storage, operation, dense_operation, height=HEIGHT):
    """How far the table is from dense Adam's after steps, an operation and more steps; in units of how far it moved."""
    start = jnp.asarray(np.random.default_rng(9).normal(size=(HEIGHT, WIDTH)), jnp.float32)
    (tx, step), (dense, dense_step) = _tx(storage), _dense()
    got = _run(step, (start, tx.init(start)), _batches(0))
    got = tx.flush(*_run(step, operation(tx, *got), _batches(1, height)))[0]
    want = _run(dense_step, (start, dense.init(start)), _batches(0))
    want = _run(dense_step, dense_operation(dense, *want), _batches(1, height))[0]
    assert got.shape == want.shape == (height, WIDTH)
    return float(jnp.sqrt(jnp.mean(jnp.square(got - want)))) / 3.0


def _each_moment(state, function):
    """A dense state, with `function` of both moments."""
    moments = {name: function(optax.tree_utils.tree_get(state, name)) for name in ("mu", "nu")}
    return optax.tree_utils.tree_set(state, **moments)


@pytest.mark.parametrize("storage", LIMITS)
def test_a_restart_is_that_of_dense_adam(storage):
    far = _both(storage, tables.restart, lambda dense, table, _: (table, dense.init(table)))
    assert far < LIMITS[storage]


@pytest.mark.parametrize("storage", LIMITS)
def test_clearing_rows_sets_the_moments_of_dense_adam_to_zero(storage):
    ids = jnp.array([0, 3, 3, 7, -1])

    def clear(_, table, state):
        return table, _each_moment(state, lambda moment: moment.at[ids[:4]].set(0.0))

    assert _both(storage, lambda tx, table, state: tx.clear(table, state, ids), clear) < LIMITS[storage]


@pytest.mark.parametrize("storage", LIMITS)
def test_a_table_that_grows_is_dense_adam_with_zeros_appended_to_its_moments(storage):
    new = jnp.ones((5, WIDTH))

    def grow(_, table, state):
        return jnp.concatenate([table, new]), _each_moment(state, lambda moment: jnp.pad(moment, ((0, 5), (0, 0))))

    assert _both(storage, lambda tx, *carry: tables.grow(tx, *carry, new), grow, HEIGHT + 5) < LIMITS[storage]


@pytest.mark.parametrize("storage", LIMITS)
def test_a_table_that_loses_rows_is_dense_adam_without_them(storage):
    stay = jnp.array([i for i in range(HEIGHT) if i not in (1, 5, 23)])

    def drop(_, table, state):
        return table[stay], _each_moment(state, lambda moment: moment[stay])

    far = _both(storage, lambda tx, *carry: tables.drop(tx, *carry, [5, 1, 23]), drop, HEIGHT - 3)
    assert far < LIMITS[storage]


@pytest.mark.parametrize("mode", ["exact", "lazy"])
@pytest.mark.parametrize("storage", LIMITS)
def test_a_state_whose_count_is_set_to_zero_is_empty(storage, mode):
    tx, step = _tx(storage, mode)
    table = jnp.ones((HEIGHT, WIDTH))
    table, state = tx.flush(*_run(step, (table, tx.init(table)), _batches(2)))
    again = optax.tree_utils.tree_set(state, count=0, mu=jnp.full_like(state.mu, 30_000), nu=jnp.full_like(state.nu, 30_000))
    # rows of the first run that come late, after more updates than it had, are no more than others
    late = jnp.concatenate([jnp.zeros((80, 4), jnp.int32), _batches(3)[0]]), jnp.ones((140, 4, WIDTH))
    got, want = (tx.flush(*_run(step, (table, s), late)) for s in (again, tx.init(table)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_array_equal(got[1].row_count, want[1].row_count)
    rows = tx.gather(table, again, jnp.arange(HEIGHT))[0]
    np.testing.assert_array_equal(rows, table)


def test_a_new_row_is_not_charged_for_the_decay_before_it_came():
    tx, step = _tx(weight_decay=0.1)
    table = jnp.ones((2, 1))
    carry = _run(step, (table, tx.init(table)), (jnp.zeros((100, 1), jnp.int32), jnp.zeros((100, 1, 1))))
    table, state = tables.grow(tx, *carry, jnp.ones((1, 1)))
    np.testing.assert_allclose(table[:, 0], [0.99**100, 0.99**100, 1.0], rtol=1e-6)  # flushed
    np.testing.assert_array_equal(state.row_count, 100)
    np.testing.assert_allclose(tables.drop(tx, *carry, [0])[0], [[0.99**100]], rtol=1e-6)
    carry = _run(step, (table, state), (jnp.zeros((200, 1), jnp.int32), jnp.zeros((200, 1, 1))))
    rows, *_ = tx.gather(*carry, jnp.array([1, 2]))
    np.testing.assert_allclose(rows[:, 0], [0.99**300, 0.99**200], rtol=1e-5)  # .05 where ledgers were padded with zeros


def test_a_narrow_table_without_a_residual_is_widened():
    table = jnp.full((2, 1), 1.5, jnp.bfloat16)
    masters = tables.master_table(table, tables.row_adam().init(table))
    assert masters.dtype == jnp.float32
    np.testing.assert_array_equal(masters, 1.5)


@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_a_recycled_row_in_lazy_mode_starts_its_own_count_anew(mode):
    tx, step = _tx(mode=mode, eps=0.0, weight_decay=0.0)
    table = jnp.zeros((2, 1))
    carry = _run(step, (table, tx.init(table)), (jnp.zeros((500, 1), jnp.int32), jnp.ones((500, 1, 1))))
    table, state = tx.clear(*carry, jnp.array([0]))
    np.testing.assert_array_equal(table, carry[0])
    after, _ = tx.update(table, state, jnp.array([0]), jnp.ones((1, 1)))
    first = 0.1 if mode == "lazy" else 0.1 * 0.1 / np.sqrt(0.001 / (1 - 0.999**501))  # dense Adam's, with its count
    assert float(table[0, 0] - after[0, 0]) == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("residual", [8, 16])
def test_residuals_follow_their_rows(residual):
    tx, step = _tx("int8", learning_rate=1e-3, residual=residual)
    table = jnp.ones((4, WIDTH), jnp.bfloat16)
    ids, gradients = jnp.tile(jnp.arange(4), (9, 1)), jnp.ones((9, 4, WIDTH)) * jnp.arange(4.0)[:, None]
    table, state = tx.flush(*_run(step, (table, tx.init(table)), (ids, gradients)))
    masters = np.asarray(tables.master_table(table, state))
    assert np.any(masters != np.asarray(table, np.float32))
    np.testing.assert_array_equal(tables.master_table(*tables.restart(tx, table, state)), masters)
    low, low_state = tables.drop(tx, table, state, [1])
    np.testing.assert_array_equal(tables.master_table(low, low_state), masters[[0, 2, 3]])
    new = np.random.default_rng(0).normal(size=(9, WIDTH)).astype(np.float32)
    tall = tables.master_table(*tables.grow(tx, low, low_state, new))
    nearest = ((new.view(np.uint32) + np.uint32(128)) & np.uint32(0xFFFFFF00)).view(np.float32) if residual == 8 else new
    np.testing.assert_array_equal(tall, np.concatenate([masters[[0, 2, 3]], nearest]))


def test_surgery_that_cannot_be_done_is_refused():
    tx, table = tables.row_adam(), jnp.ones((3, 2))
    state = tx.init(table)
    with pytest.raises(ValueError, match=r"rows must have shape \(M, 2\)"):
        tables.grow(tx, table, state, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"rows must have shape \(M, 2\)"):
        tables.grow(tx, table, state, jnp.ones(2))
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, 3\), got \[{bad}\]"):
            tables.drop(tx, table, state, [[0, bad]])
    with pytest.raises(ValueError, match="ids must leave a row, got all 3"):
        tables.drop(tx, table, state, [0, 1, 2, 2])
