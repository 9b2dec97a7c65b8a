"""Row-sparse Adam is dense Adam, or PyTorch's SparseAdam with its bias correction put right, at the cost of the rows."""

import inspect
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adam_jax
from adam_jax import tables

HEIGHT, WIDTH, BATCH, STEPS = 96, 3, 5, 600
KEPT = ["float32", "root", "bfloat16", "int8"]


def _zipf(seed=0):
    """A table, and ids as those of words: few often, most seldom, some never."""
    rng = np.random.default_rng(seed)
    ids = (rng.zipf(1.3, (STEPS, BATCH)) - 1) % HEIGHT
    table, gradients = rng.normal(size=(HEIGHT, WIDTH)), rng.normal(size=(STEPS, BATCH, WIDTH))
    return jnp.asarray(table, jnp.float32), jnp.asarray(ids), jnp.asarray(gradients, jnp.float32)


def _train(tx, table, ids, gradients):
    """Steps of gather and update in one scan: the rows as read, and the table before and after flush."""

    @jax.jit
    def run(table, ids, gradients):
        def step(carry, batch):
            rows, table, state = tx.gather(*carry, batch[0])
            return tx.update(table, state, *batch), rows

        (table, state), rows = jax.lax.scan(step, (table, tx.init(table)), (ids, gradients))
        return rows, table, *tx.flush(table, state)

    return run(table, ids, gradients)


@pytest.mark.parametrize(
    ("rate", "eps", "weight_decay"),
    [
        (1.0, 1e-8, 0.0),
        (lambda count: 1.0 / jnp.sqrt(count + 1.0), 0.1, 0.02),
        (lambda count: jnp.where(count % 100 < 50, 1.0, 0.1), 1.0, lambda count: 0.01 + 0.0 * count),
    ],
    ids=["plain", "decayed", "schedules of both"],
)
def test_exact_rows_are_those_of_dense_adam(rate, eps, weight_decay):
    table, ids, gradients = _zipf()
    dense = adam_jax.adamw(rate, eps=eps, weight_decay=weight_decay)

    @jax.jit
    def run(table):
        def step(carry, batch):
            table, state = carry
            updates, state = dense.update(jnp.zeros_like(table).at[batch[0]].add(batch[1]), state, table)
            return (optax.apply_updates(table, updates), state), table[batch[0]]

        return jax.lax.scan(step, (table, dense.init(table)), (ids, gradients))

    (want, dense_state), want_rows = run(table)
    tx = tables.row_adam(rate, eps=eps, weight_decay=weight_decay)
    rows, stale, got, state = _train(tx, table, ids, gradients)
    # the promise is 2e-3 of a learning rate; measured 6e-5, most of it the rounding of dense Adam's own 600 steps
    np.testing.assert_allclose(rows, want_rows, atol=3e-4)
    np.testing.assert_allclose(got, want, atol=3e-4)
    assert np.abs(stale - want).max() > 0.01  # or the test would not see a flush that does nothing
    mu, nu = (optax.tree_utils.tree_get(dense_state, name) for name in ("mu", "nu"))
    np.testing.assert_allclose(state.mu, mu, atol=1e-6)
    np.testing.assert_allclose(state.nu, nu, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.row_count, STEPS)


def test_gathering_twice_or_not_at_all_changes_nothing():
    table, ids, gradients = _zipf(1)
    tx = tables.row_adam(1.0)

    @jax.jit
    def run(table, gathers):
        def step(carry, batch):
            for _ in range(2):
                table, state = jax.lax.cond(gathers, lambda c: tx.gather(*c, batch[0])[1:], lambda c: c, carry)
                carry = table, state
            return tx.update(*carry, *batch), None

        carry, _ = jax.lax.scan(step, (table, tx.init(table)), (ids[:100], gradients[:100]))
        return tx.flush(*carry)[0]

    np.testing.assert_allclose(run(table, True), run(table, False), atol=1e-5)  # bands may start elsewhere


@pytest.mark.parametrize("mode", ["exact", "lazy"])
@pytest.mark.parametrize(("storage", "limit", "size"), [("root", 1e-9, 8.2), ("bfloat16", 1e-3, 4.2), ("int8", 2e-2, 2.5)])
def test_narrow_moments_of_rows_lead_where_float32_leads(mode, storage, limit, size):
    rng = np.random.default_rng(4)
    table, ids = jnp.zeros((256, 32)), jnp.asarray((rng.zipf(1.3, (STEPS, 8)) - 1) % 256)
    gradients = rng.normal(size=(STEPS, 8, 32)) * np.exp(2 * rng.normal(size=32))  # of very different sizes inside a row
    gradients = jnp.asarray(gradients, jnp.float32)
    rows, _, want, _ = _train(tables.row_adam(1.0, mode=mode, eps=0.0), table, ids, gradients)
    tx = tables.row_adam(1.0, mode=mode, eps=0.0, storage=storage)
    narrow_rows, _, got, state = _train(tx, table, ids, gradients)
    # measured: bfloat16 2e-4 and 3e-4, int8 7e-3 and 1.1e-2
    assert np.square(narrow_rows - rows).sum() < limit * np.square(rows).sum()
    assert np.square(got - want).sum() < limit * np.square(want).sum()
    assert state.mu.dtype == (jnp.float32 if storage == "root" else jnp.uint16)  # the bits of bfloat16
    # counts take 4 / 32 bytes a parameter, windows 8 / 32
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= size * table.size


@pytest.mark.parametrize(
    ("mode", "dtype", "settings", "writes"),
    [
        ("exact", jnp.float32, {}, True),
        ("exact", jnp.bfloat16, {"residual": 16}, True),
        ("exact", jnp.bfloat16, {"residual": 8}, False),
        ("exact", jnp.float16, {}, False),
        ("exact", jnp.float32, {"storage": "bfloat16"}, False),
        ("lazy", jnp.float32, {}, False),
    ],
)
def test_gathered_rows_are_brought_up_to_date_in_the_table_where_that_rounds_nothing(mode, dtype, settings, writes):
    tx = tables.row_adam(0.1, eps=0.0, mode=mode, **settings)
    table = jnp.ones((3, 1), dtype)
    one = jax.lax.bitcast_convert_type(jnp.ones((3, 1), jnp.bfloat16), jnp.uint16) if "storage" in settings else 1
    state = tx.init(table)
    state = state._replace(count=jnp.int32(5), row_count=jnp.array([1, 5, 0]), mu=state.mu + one, nu=state.nu + one)
    rows, after, new = jax.jit(tx.gather)(table, state, jnp.array([0, 2]))  # of which the second was never touched
    assert (rows[0, 0] < 1) == (mode == "exact")
    assert rows[1, 0] == 1
    if writes:
        np.testing.assert_array_equal(after[::2], rows)
        np.testing.assert_array_equal(new.row_count, 5)
    else:
        jax.tree.map(np.testing.assert_array_equal, (after, new), (table, state))


def test_a_gather_at_a_count_of_zero_reads_the_table_whatever_the_state_holds():
    tx, table = tables.row_adam(0.1, eps=0.0, weight_decay=0.1), jnp.arange(1.0, 7.0).reshape(3, 2)
    old = tx.init(table)._replace(mu=table, nu=table, row_count=jnp.array([3, 4, 5]), log_keep=jnp.array([-3.0, 0.1]))
    rows, after, state = jax.jit(tx.gather)(table, old._replace(row_log_keep=-table), jnp.array([2, 0, -1]))
    np.testing.assert_array_equal(rows, [[5, 6], [1, 2], [0, 0]])
    np.testing.assert_array_equal(after, table)
    np.testing.assert_array_equal((state.mu[::2], state.nu[::2]), 0.0)
    np.testing.assert_array_equal(state.row_count[::2], 0)


@pytest.mark.parametrize(
    ("settings", "dtype", "kept"),
    [
        ({"weight_decay": 0.1}, "float32", "mu:float32 nu:float32 log_keep:2 row_log_keep:2"),
        ({"storage": "bfloat16"}, "float16", "mu:uint16 nu:uint16"),
        ({"storage": "int8", "residual": 8}, "bfloat16", "mu:uint16 row_window:2 residual:uint8"),
        ({"mode": "lazy", "weight_decay": 0.1, "residual": 16}, "bfloat16", "mu:float32 nu:float32 residual:uint16"),
    ],
)
def test_a_state_begins_as_zeros_for_each_row_of_what_is_documented(settings, dtype, kept):
    state = tables.row_adam(**settings).init(jnp.ones((4, 3), dtype))
    there = {"count": ((), jnp.int32), "row_count": ((4,), jnp.int32)}
    for name, what in (part.split(":") for part in kept.split()):
        shape = ((2,) if name == "log_keep" else (4, 2)) if what == "2" else (4, 3)
        there[name] = shape, jnp.dtype(what if what != "2" else "int32" if name == "row_window" else "float32")
    found = {name: x for name, x in state._asdict().items() if isinstance(x, jax.Array) and (x.ndim or name == "count")}
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == there
    assert not any(x.any() for x in found.values())


def test_a_flush_reaches_every_row_of_a_tall_table():
    tx, table = tables.row_adam(0.1), jnp.zeros((2 * tables.rows.CHUNK + 5, 1))
    ones = jnp.ones_like(table)
    state = tx.init(table)._replace(count=jnp.int32(5), mu=ones, nu=ones, row_count=jnp.ones(len(table), jnp.int32))
    table, state = jax.jit(tx.flush)(table, state)
    np.testing.assert_array_equal(state.row_count, 5)
    assert table[0, 0] < 0
    np.testing.assert_allclose(table, np.broadcast_to(table[0], table.shape), rtol=1e-6)


def test_a_flush_of_lazy_rows_is_nothing_at_all():
    tx, table = tables.row_adam(0.1, mode="lazy", storage="int8"), jnp.ones((2, 1))
    state = tx.init(table)._replace(count=jnp.int32(5))
    after, same = tx.flush(table, state)
    assert after is table
    assert all(x is y for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True))


def test_an_empty_list_names_no_row():
    tx, table = tables.row_adam(0.1, weight_decay=0.1), jnp.ones((3, 2))
    rows, *same = jax.eval_shape(lambda table, state: tx.gather(table, state, []), table, tx.init(table))
    assert rows.shape == (0, 2)
    assert jax.tree.map(jnp.shape, tuple(same)) == jax.tree.map(jnp.shape, (table, tx.init(table)))


def test_a_gradient_whose_square_is_infinite_moves_a_row_by_one_learning_rate():
    tx, table = tables.row_adam(0.1, mode="lazy"), jnp.zeros((1, 2))
    table, _ = jax.jit(tx.update)(table, tx.init(table), jnp.array([0]), jnp.array([[1e30, -1e38]]))
    np.testing.assert_allclose(table, [[-0.1, 0.1]], rtol=1e-5)


@pytest.mark.parametrize("narrow", [(0,), (1,), (0, 1)], ids=str)
def test_moments_of_rows_are_kept_in_codes_of_ones_own(narrow):
    half = adam_jax.storage.Code(jnp.float16, lambda x, _: x.astype(jnp.float16), lambda kept: kept.astype(jnp.float32))
    own = adam_jax.storage.Storage(*(half if moment in narrow else None for moment in (0, 1)))
    tx, table = tables.row_adam(0.1, mode="lazy", storage=own), jnp.zeros((2, 2))
    table, state = jax.jit(tx.update)(table, tx.init(table), jnp.array([1]), jnp.array([[3.0, -1.0]]))
    table, state = jax.jit(tx.update)(table, state, jnp.array([1]), jnp.array([[3.0, -1.0]]))
    for moment, kept in enumerate((state.mu, state.nu)):
        assert kept.dtype == (jnp.uint16 if moment in narrow else jnp.float32)  # the bits of float16
    np.testing.assert_allclose(table, [[0, 0], [-0.2, 0.2]], rtol=1e-3)


def test_lazy_rows_are_adam_with_a_count_for_each_row():
    rng = np.random.default_rng(7)
    ids, gradients, value = rng.integers(-1, 6, (20, 4)), rng.normal(size=(20, 4, 3)), rng.normal(size=(5, 3))
    m, v, n = np.zeros((5, 3)), np.zeros((5, 3)), np.zeros((5, 1))
    tx = tables.row_adam(
        lambda count: 0.1 / (count + 1.0), 0.8, 0.9, 1e-2, mode="lazy", weight_decay=lambda count: 1.0 / (count + 1.0)
    )
    gather, update, table = jax.jit(tx.gather), jax.jit(tx.update), jnp.asarray(value, jnp.float32)
    state = tx.init(table)
    for count, (batch, g) in enumerate(zip(ids, gradients, strict=True)):
        rows, table, state = gather(table, state, jnp.asarray(batch))
        table, state = update(table, state, jnp.asarray(batch), jnp.asarray(g, jnp.float32))
        inside = (batch >= 0) & (batch < 5)
        np.testing.assert_allclose(rows, np.where(inside[:, None], value[batch % 5], 0), rtol=1e-5, atol=1e-6)
        for i in np.unique(batch[inside]):
            total = g[batch == i].sum(0)
            m[i], v[i], n[i] = 0.8 * m[i] + 0.2 * total, 0.9 * v[i] + 0.1 * total**2, n[i] + 1
            step = m[i] / (1 - 0.8 ** n[i]) / (np.sqrt(v[i] / (1 - 0.9 ** n[i])) + 1e-2)
            value[i] -= 0.1 / (count + 1) * (step + value[i] / (count + 1))
    np.testing.assert_allclose(table, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.mu, m / (1 - 0.8**n), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.nu, v / (1 - 0.9**n), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal([*state.row_count, state.count], [*n[:, 0], 20])


@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_rows_learn_on_when_counts_are_as_large_as_they_get(mode):
    tx = tables.row_adam(0.1, mode=mode)
    table, last = jnp.ones((1, 1)), jnp.int32(2**31 - 1)
    state = tx.init(table)._replace(count=last, row_count=last[None], mu=table, nu=table)
    table, state = jax.jit(tx.update)(table, state, jnp.array([0]), -table)
    assert state.count == state.row_count == last  # -2^31 takes no step
    np.testing.assert_allclose((state.mu[0, 0], table[0, 0]), [0.8, 0.92], rtol=1e-6)


def test_gathering_rows_with_narrow_moments_rounds_nothing():
    table, ids, gradients = _zipf(5)
    tx = tables.row_adam(1.0, storage="bfloat16")
    state = tx.init(table)
    update, gather = jax.jit(tx.update), jax.jit(tx.gather)
    for i in range(3):
        table, state = update(table, state, ids[i], gradients[i])
    rows, same, kept = gather(table, state, ids[0])
    np.testing.assert_array_equal(same, table)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    np.testing.assert_array_equal(rows, gather(same, kept, ids[0])[0])


def test_lazy_rows_are_torch_sparse_adam_with_a_count_for_each_row():
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle (extra `peers`)")
    table, ids, gradients = _zipf(2)
    steps = 150
    rows = [torch.nn.Parameter(torch.tensor(np.array(row))[None]) for row in table]
    optimizers = [torch.optim.SparseAdam([row], lr=0.1, eps=1e-15) for row in rows]
    for batch, g in zip(np.asarray(ids[:steps]), np.asarray(gradients[:steps]), strict=True):
        for i in np.unique(batch):
            total = torch.tensor(g[batch == i].sum(0))[None]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch warns that sparse checks are off
                rows[i].grad = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), total, (1, WIDTH))
                optimizers[i].step()
    _, _, got, state = _train(tables.row_adam(0.1, eps=1e-15, mode="lazy"), table, ids[:steps], gradients[:steps])
    want = np.concatenate([row.detach().numpy() for row in rows])
    np.testing.assert_allclose(
        got, want, atol=2e-6
    )  # float32 at weights of 1 to 4; eps apart, which PyTorch adds to the raw root
    np.testing.assert_array_equal(
        state.row_count, [sum(i in batch for batch in np.asarray(ids[:steps])) for i in range(HEIGHT)]
    )


def test_a_row_that_comes_late_takes_a_first_step_of_one_learning_rate_and_not_of_three():
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle (extra `peers`)")
    tx = tables.row_adam(0.1, mode="lazy")
    table = jnp.zeros((2, 1))
    state = tx.init(table)
    theirs = torch.nn.Parameter(torch.zeros(2, 1))
    sparse_adam = torch.optim.SparseAdam([theirs], lr=0.1)
    update = jax.jit(tx.update)
    for i in [0] * 3000 + [1]:
        table, state = update(table, state, jnp.array([i]), jnp.ones((1, 1)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.grad = torch.sparse_coo_tensor(torch.tensor([[i]]), torch.ones(1, 1), (2, 1))
            sparse_adam.step()
    assert float(table[1, 0]) == pytest.approx(-0.1, rel=1e-6)
    # (1 - b1) / sqrt(1 - b2), times sqrt(1 - b2^3001) for the moments' global correction
    assert float(theirs[1, 0].detach()) == pytest.approx(-0.1 * 3.162 * 0.975, rel=1e-3)


def _one_update(ids, gradients, height=4, **settings):
    tx = tables.row_adam(1.0, **settings)
    table = jnp.zeros((height, gradients.shape[-1]))
    table, state = jax.jit(tx.update)(table, tx.init(table), ids, gradients)
    return np.asarray(table), state


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32])
def test_ids_outside_the_table_touch_nothing(dtype):
    outside = jnp.array([-1, -2, 4, 100] if jnp.issubdtype(dtype, jnp.signedinteger) else [4, 200, 255, 128], dtype)
    table, _ = _one_update(jnp.concatenate([outside, jnp.array([1], dtype)]), jnp.ones((5, 1)))
    np.testing.assert_allclose(table.ravel(), [0, -1, 0, 0])
    tx = tables.row_adam(1.0)
    full = jnp.ones((4, 1))
    rows, after, state = jax.jit(tx.gather)(full, tx.init(full), outside)
    np.testing.assert_array_equal(rows, 0)
    np.testing.assert_array_equal(after, full)
    np.testing.assert_array_equal(state.row_count, 0)


def test_ids_of_8_bits_name_rows_of_a_table_that_is_taller_than_they_reach():
    table, _ = _one_update(jnp.array([127, -1], jnp.int8), jnp.ones((2, 1)), height=300)
    np.testing.assert_allclose(table[127], -1)
    assert np.count_nonzero(table) == 1


def test_ids_outside_the_table_are_errors_under_checkify():
    tx = tables.row_adam(1.0)
    table = jnp.zeros((4, 1))
    gather = checkify.checkify(jax.jit(lambda ids: tx.gather(table, tx.init(table), ids)[0]))
    update = checkify.checkify(jax.jit(lambda ids: tx.update(table, tx.init(table), ids, jnp.ones((2, 1)))[0]))
    for function in (gather, update):
        assert function(jnp.array([0, 3]))[0].get() is None
        for bad in (-1, 4):
            assert "ids must be in [0, 4)" in str(function(jnp.array([0, bad]))[0].get())
    flush = checkify.checkify(jax.jit(lambda: tx.flush(table, tx.init(table))))
    assert flush()[0].get() is None  # its last chunk reaches past the table


def test_ids_of_any_shape_may_repeat_be_absent_or_outnumber_the_rows():
    gradients = jax.random.normal(jax.random.key(0), (6, 3, 2))
    ids = jax.random.randint(jax.random.key(1), (6, 3), 0, 4)
    table, _ = _one_update(ids, gradients, eps=0.0)  # 18 ids for 4 rows
    dense = jnp.zeros((4, 2)).at[ids].add(gradients)
    np.testing.assert_allclose(table, -np.sign(dense), atol=1e-6)
    table, _ = _one_update(jnp.full(7, 2), jnp.ones((7, 1)))
    np.testing.assert_allclose(table.ravel(), [0, 0, -1, 0])
    table, state = _one_update(jnp.zeros(0, jnp.int32), jnp.ones((0, 1)))
    assert int(state.count) == 1  # dense Adam counts steps with gradient zero, too
    np.testing.assert_array_equal(table, 0)


def test_sums_of_repeated_ids_are_what_a_dense_gradient_holds():
    tx = tables.row_adam(1.0)
    ids, g = jnp.array([3, 1, 3, 3]), jnp.array([[1.0], [5.0], [2.0], [-1.0]])
    _, state = jax.jit(tx.update)(jnp.zeros((4, 1)), tx.init(jnp.zeros((4, 1))), ids, g)
    np.testing.assert_allclose(state.mu.ravel(), [0, 5, 0, 2], rtol=2e-7)  # the first rate is 1 to the last bit but one


def test_the_table_keeps_its_dtype_and_the_arithmetic_is_float32():
    tx = tables.row_adam(1e-2)
    table = jnp.ones((4, 2), jnp.bfloat16)
    state = tx.init(table)
    assert state.mu.dtype == jnp.float32
    rows, table, state = jax.jit(tx.gather)(table, state, jnp.array([0]))
    table, state = jax.jit(tx.update)(table, state, jnp.array([0]), rows.astype(jnp.float16))
    assert (rows.dtype, table.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_a_sum_in_two_parts_loses_nothing_over_a_hundred_thousand_terms():
    terms = jnp.asarray(-1e-6 * np.random.default_rng(0).uniform(0.5, 2, 100_000), jnp.float32)
    parts = jax.jit(lambda x: jax.lax.scan(lambda s, y: (tables.rows._two_sum(s, y), None), jnp.zeros(2), x)[0])(terms)
    assert np.asarray(parts, np.float64).sum() == pytest.approx(np.asarray(terms, np.float64).sum(), rel=1e-9)
    assert abs(parts[1]) < 1e-4 * abs(parts[0])  # the first part is the sum, rounded


def test_weight_decay_is_charged_once_however_often_the_table_is_flushed():
    tx = tables.row_adam(0.1, b1=0.0, weight_decay=0.1)  # without momentum all skipped steps but the first are decay alone
    tx = tables.RowAdam(*map(jax.jit, tx))
    table = jnp.ones((2, 1))
    state = tx.init(table)
    for idle in range(1, 15):
        table, state = tx.update(table, state, jnp.array([0]), jnp.ones((1, 1)))
        if idle % 7 == 0:
            table, state = tx.flush(*tx.flush(table, state))
            np.testing.assert_allclose(table[1], 0.99**idle, rtol=1e-6)


def test_weight_decay_of_a_hundred_thousand_skipped_steps_is_not_rounded_away():
    tx = tables.row_adam(lambda count: 1e-3 / (1.0 + 1e-5 * count), weight_decay=1e-3)
    table = jnp.ones((1, 1))
    nothing = jnp.zeros(0, jnp.int32), jnp.zeros((0, 1))

    @jax.jit
    def run(table):
        carry = jax.lax.fori_loop(0, 100_000, lambda _, carry: tx.update(*carry, *nothing), (table, tx.init(table)))
        return tx.flush(*carry)[0]

    lost = -np.log(np.float64(run(table)[0, 0]))
    want = -np.log1p(-1e-6 / (1 + 1e-5 * np.arange(100_000))).sum()
    assert lost == pytest.approx(want, rel=2e-6)  # a float32 sum of these terms is off by 1e-4


@pytest.mark.parametrize("storage", KEPT)
def test_memory_does_not_grow_with_the_table_and_every_write_is_in_place(storage):
    tx = tables.row_adam(1e-3, weight_decay=0.01, storage=storage)

    def step(table, state, ids):
        rows, table, state = tx.gather(table, state, ids)
        return tx.update(table, state, ids, rows)

    def temporaries(function, height, *args):
        table = jax.ShapeDtypeStruct((height, 16), jnp.float32)
        state = jax.eval_shape(tx.init, table)
        compiled = jax.jit(function, donate_argnums=(0, 1)).lower(table, state, *args).compile()
        memory = compiled.memory_analysis()
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((table, state)))
        assert memory.alias_size_in_bytes == held
        return memory.temp_size_in_bytes

    ids = jax.ShapeDtypeStruct((128,), jnp.int32)
    assert temporaries(step, 10**7, ids) == temporaries(step, 10**4, ids)
    assert temporaries(tx.flush, 10**7) == temporaries(tx.flush, 10**4)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA of JAX 0.10 widens the whole table on CPU")
def test_rows_of_a_bfloat16_table_are_written_in_place():
    tx = tables.row_adam(1e-3, storage="int8")

    def temporaries(height):
        table = jax.ShapeDtypeStruct((height, 16), jnp.bfloat16)
        ids, rows = jax.ShapeDtypeStruct((128,), jnp.int32), jax.ShapeDtypeStruct((128, 16), jnp.bfloat16)
        update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(table, jax.eval_shape(tx.init, table), ids, rows)
        return update.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(10**7) == temporaries(10**4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_table_sharded_over_its_rows_stays_where_it_is(storage, kind):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(kind,))
    table, ids, gradients = _zipf(3)
    tx = tables.row_adam(0.1, weight_decay=0.01, storage=storage)

    @jax.jit
    def steps(table, state, ids, gradients):
        def step(carry, batch):
            rows, table, state = tx.gather(*carry, batch[0])
            return tx.update(table, state, *batch), rows

        return jax.lax.scan(step, (table, state), (ids, gradients))

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, P("rows") if leaf.shape[:1] == (HEIGHT,) else P()))

    split, state = jax.tree.map(place, (table, tx.init(table)))
    args = jax.tree.map(place, (ids[:50], gradients[:50]))
    (want, want_state), want_rows = steps(table, tx.init(table), ids[:50], gradients[:50])
    (got, got_state), rows = steps(split, state, *args)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(rows, want_rows, atol=1e-6)
    assert got.sharding.spec[0] == got_state.mu.sharding.spec[0] == got_state.row_count.sharding.spec[0] == "rows"
    flushed, _ = jax.jit(tx.flush)(got, got_state)
    np.testing.assert_allclose(flushed, jax.jit(tx.flush)(want, want_state)[0], atol=1e-6)
    assert jax.jit(tx.clear)(got, got_state, ids[0])[0].sharding.spec[0] == "rows"
    text = steps.lower(split, state, *args).compile().as_text()
    assert re.findall(rf"\[{HEIGHT}[,\]]", text) == []  # the program of one device holds its share and no more


def test_on_an_explicit_mesh_a_state_begins_sharded_and_rows_are_sharded_as_their_ids():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,))
    table = jax.device_put(jnp.ones((HEIGHT, WIDTH), jnp.bfloat16), NamedSharding(mesh, P("rows")))
    tx = tables.row_adam(0.1, weight_decay=0.01, storage="int8", residual=8)
    for run in (lambda function: function, jax.jit):  # eager and traced
        with jax.set_mesh(mesh):  # which `jit` needs where no argument's numbers are
            state = run(tx.init)(table)
        tall = [leaf for leaf in jax.tree.leaves(state) if leaf.shape[:1] == (HEIGHT,)]
        assert len(tall) == 5
        assert {leaf.sharding.spec[0] for leaf in tall} == {"rows"}
        ids = jax.device_put(jnp.arange(16).reshape(8, 2), NamedSharding(mesh, P("rows")))
        rows, table, state = run(tx.gather)(table, state, ids)
        assert (rows.shape, rows.sharding.spec[0]) == ((8, 2, WIDTH), "rows")
        table, state = run(tx.update)(table, state, ids, jnp.ones_like(rows))
    np.testing.assert_allclose(np.asarray(table, np.float32)[:17:16, 0], [0.8, 1.0], rtol=0.01)


def test_an_equinox_model_trains_beside_a_dense_optimizer():
    class Model(eqx.Module):
        table: jax.Array
        head: eqx.nn.Linear

        def __call__(self, rows):
            return self.head(rows.mean(0))

    tx, dense = tables.row_adam(0.05), adam_jax.adam(0.05)
    keys = jax.random.split(jax.random.key(0))
    model = Model(0.1 * jax.random.normal(keys[0], (50, 4)), eqx.nn.Linear(4, 1, key=keys[1]))
    table, rest = model.table, eqx.tree_at(lambda m: m.table, model, None)
    state = tx.init(table), dense.init(eqx.filter(rest, eqx.is_inexact_array))

    @eqx.filter_value_and_grad
    def loss(rows_and_rest, target):
        rows, rest = rows_and_rest
        return jnp.mean((jax.vmap(rest)(rows)[:, 0] - target) ** 2)

    @eqx.filter_jit(donate="all")
    def step(table, rest, state, ids, target):
        rows, table, row_state = tx.gather(table, state[0], ids)
        value, (row_grads, grads) = loss((rows, rest), target)
        table, row_state = tx.update(table, row_state, ids, row_grads)
        updates, dense_state = dense.update(grads, state[1])
        return value, table, eqx.apply_updates(rest, updates), (row_state, dense_state)

    losses = []
    for i in range(150):
        ids = jax.random.randint(jax.random.key(i), (16, 3), 0, 50)
        value, table, rest, state = step(table, rest, state, ids, (ids < 25).mean(1))
        losses.append(float(value))
    table, _ = tx.flush(table, state[0])
    model = eqx.tree_at(lambda m: m.table, rest, table, is_leaf=lambda leaf: leaf is None)
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:10])
    assert model(model.table[jnp.array([1, 2, 3])])[0] > 0.8


def test_a_flax_nnx_model_trains_beside_a_dense_optimizer():
    class Table(nnx.Variable):
        pass

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.table = Table(0.1 * jax.random.normal(rngs.params(), (50, 4)))
            self.head = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, rows):
            return self.head(rows.mean(-2))[..., 0]

    tx, dense = tables.row_adam(0.05), adam_jax.adam(0.05)
    model = Model(nnx.Rngs(0))
    graph, held, params = nnx.split(model, Table, nnx.Param)
    table = held["table"].get_value()
    state = tx.init(table), dense.init(params)

    @jax.value_and_grad
    def loss(rows_and_params, target):
        rows, params = rows_and_params
        return jnp.mean((nnx.merge(graph, held, params)(rows) - target) ** 2)

    @jax.jit
    def step(table, params, state, ids, target):
        rows, table, row_state = tx.gather(table, state[0], ids)
        value, (row_grads, grads) = loss((rows, params), target)
        table, row_state = tx.update(table, row_state, ids, row_grads)
        updates, dense_state = dense.update(grads, state[1])
        return value, table, optax.apply_updates(params, updates), (row_state, dense_state)

    losses = []
    for i in range(150):
        ids = jax.random.randint(jax.random.key(i), (16, 3), 0, 50)
        value, table, params, state = step(table, params, state, ids, (ids < 25).mean(1))
        losses.append(float(value))
    table, _ = tx.flush(table, state[0])
    nnx.update(model, params)
    model.table.set_value(table)
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:10])
    assert model(model.table.get_value()[jnp.array([1, 2, 3])]) > 0.8


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "dense"}, ValueError, "mode must be one of 'exact', 'lazy'"),
        ({"b1": 1.0}, ValueError, r"b1 must be in \[0, 1\)"),
        ({"b1": 0.99, "b2": 0.95}, ValueError, r"b1 must be below sqrt\(b2\) in exact mode"),
        ({"b1": 0.5, "b2": 0.25}, ValueError, r"b1 must be below sqrt\(b2\) in exact mode"),
        ({"b1": optax.constant_schedule(0.9)}, TypeError, "b1 must be a number or an array"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0"),
        ({"eps": np.nan}, ValueError, "eps must be a finite number >= 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must be a finite number >= 0"),  # a catch-up was 1.9 rates off
        ({"learning_rate": np.inf}, ValueError, "learning_rate must be a finite number >= 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a finite number >= 0"),
        ({"weight_decay": np.nan}, ValueError, "weight_decay must be a finite number >= 0"),
        ({"b2": np.nan}, ValueError, r"b2 must be in \[0, 1\)"),
        ({"storage": "float16"}, ValueError, "storage must be one of 'float32', 'root', 'bfloat16', 'int8'"),
        ({"storage": lambda _: "int8"}, TypeError, "storage must be a name or a Storage"),
        ({"residual": 4}, ValueError, "residual must be 0, 8 or 16"),
        ({"residual": False}, ValueError, "residual must be 0, 8 or 16"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number"),
        ({"lr": 0.5}, TypeError, "did you mean learning_rate"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        tables.row_adam(**settings)


def test_numbers_of_a_table_may_be_traced():
    table, ids = jnp.ones((2, 1)), jnp.zeros(1, jnp.int32)

    def update(*numbers):
        tx = tables.row_adam(*numbers[:4], weight_decay=numbers[4])
        return tx.flush(*tx.update(*tx.gather(table, tx.init(table), ids)[1:], ids, table[:1]))

    for function in (lambda b1: update(0.1, b1, 0.99, 1e-8, 0.1), lambda b2: update(0.1, 0.9, b2, 1e-8, 0.1)):
        jax.eval_shape(function, jnp.float32(0.99))
    after, state = jax.eval_shape(update, *map(jnp.float32, (0.1, 0.9, 0.99, 1e-8, 0.1)))
    assert after.shape == table.shape
    assert state.log_keep.shape == (2,)


def test_defaults_are_those_of_adam_without_weight_decay():
    rows, dense = (inspect.signature(f).parameters for f in (tables.row_adam, adam_jax.adam))
    for name in ("learning_rate", "b1", "b2", "eps", "storage"):
        assert rows[name].default == dense[name].default
    assert [rows[name].default for name in ("mode", "weight_decay", "residual", "seed")] == ["exact", 0.0, 0, 0]


def test_float64_tables_of_numpy_are_taken_as_float32():
    table = np.ones((4, 2))
    state = tables.row_adam(0.1).init(table)  # with a warning, that would be an error here
    assert state.mu.dtype == jnp.float32


def test_arrays_of_numpy_are_taken_outside_of_jit():
    tx = tables.row_adam(0.1)
    table = np.ones((4, 2), np.float32)
    state = jax.tree.map(np.asarray, tx.init(table))
    rows, table, state = tx.gather(table, state, np.array([1]))
    table, state = tx.update(table, state, np.array([1]), np.ones((1, 2), np.float32))
    table, _ = tx.flush(np.asarray(table), jax.tree.map(np.asarray, state))
    np.testing.assert_allclose(table[:2, 0], [1.0, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(rows, 1.0)


def test_tables_ids_and_gradients_that_do_not_fit_are_refused():
    tx = tables.row_adam()
    table = jnp.zeros((4, 2))
    state = tx.init(table)
    with pytest.raises(
        ValueError, match=r"table must be real, of shape \(N, D\) and at least 16 bits a number, got float32\[4\]"
    ):
        tx.init(jnp.zeros(4))
    for shape in ((0, 2), (4, 0), (4, 2, 1)):
        with pytest.raises(ValueError, match=r"table must be real, of shape \(N, D\)"):
            tx.init(jnp.zeros(shape))
    for dtype in (jnp.complex64, jnp.float8_e4m3fn, jnp.int32):
        with pytest.raises(ValueError, match=r"table must be real, .* at least 16 bits"):
            tx.init(jnp.zeros((4, 2), dtype))
    with pytest.raises(ValueError, match="table must be bfloat16 for residual=8"):
        tables.row_adam(residual=8).init(table)
    weights = table.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="residual must be as it was at init, got 0, but the state keeps 16"):
        tx.flush(weights, tables.row_adam(residual=16).init(weights))
    with pytest.raises(TypeError, match="state must be a RowAdamState"):
        tx.flush(table, adam_jax.adam().init(table))
    for other in ({"storage": "root"}, {"storage": "int8"}, {"mode": "lazy"}):
        with pytest.raises(ValueError, match="mode and storage must be as they were at init: the state keeps Exact"):
            tables.row_adam(**other).flush(table, state)
    with pytest.raises(ValueError, match=r"state must be that of a table of shape \[9, 2\], got \[4, 2\]"):
        tx.gather(jnp.zeros((9, 2)), state, jnp.array([1]))
    with pytest.raises(TypeError, match="ids must be integers, got float32"):
        tx.gather(table, state, jnp.array([1.0]))
    with pytest.raises(TypeError, match="ids must be integers, got bool"):
        tx.update(table, state, jnp.array([True]), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"row_grads must be real, of shape \(3, 2\), got float32\[3\]"):
        tx.update(table, state, jnp.arange(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"row_grads must be real, of shape \(3, 2\), got int32\[3, 2\]"):
        tx.update(table, state, jnp.arange(3), jnp.ones((3, 2), jnp.int32))
    with pytest.raises(TypeError, match="ids must be integers, got float32"):
        tx.clear(table, state, jnp.array([1.0]))
    with pytest.raises(ValueError, match=r"table must be real, .* at least 16 bits a number, got int32\[4, 2\]"):
        tx.flush(table.astype(jnp.int32), state)
