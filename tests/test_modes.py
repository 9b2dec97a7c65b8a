"""Under JAX's strict promotion, with 64 bits, and under both, everything does what it does without.

What test_contract.py promises is held in each mode by `.ci/run`, which sets JAX_ENABLE_X64 and JAX_NUMPY_DTYPE_PROMOTION.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case

import adam_jax
from adam_jax import online, tables, watch

MODES = {"strict": (False, "strict"), "x64": (True, "standard"), "strict x64": (True, "strict")}


def _towards_one(count: jax.Array) -> jax.Array:
    return 1.0 - 0.1 / (jnp.asarray(count, float) + 1.0)


OTHERS = {
    "injected, eps_hat": Case(
        lambda: optax.inject_hyperparams(adam_jax.scale_by_adam, hyperparam_dtype=jnp.float32)(eps_hat=True), {}, {}
    ),
    "injected, int8": Case(lambda: optax.inject_hyperparams(adam_jax.scale_by_lp, hyperparam_dtype=jnp.float32)(
        3.0, storage=adam_jax.storage.int8(smallest=0)), {}, {}),
    "in_float32": Case(lambda: adam_jax.in_float32(optax.chain(adam_jax.adamw(0.1), adam_jax.average_params())), {}, {}),
    "in_float32, 8": Case(lambda: adam_jax.in_float32(adam_jax.adam(0.1), 8), {}, {}),
    "skip_nonfinite": Case(lambda: adam_jax.skip_nonfinite(adam_jax.adam(0.1), 2), {}, {}),
    "schedules": Case(
        lambda: adam_jax.adamw(
            adam_jax.inverse_sqrt_decay(0.1), b1=optax.linear_schedule(0.8, 0.9, 9), b2=_towards_one,
            weight_decay=optax.constant_schedule(0.1)
        ), {}, {}),
    "NumPy numbers": Case(lambda: optax.chain(
        adam_jax.clip_by_global_norm(np.float64(0.5)),
        adam_jax.adamw(np.float64(0.1), np.float32(0.8), np.float64(0.99), weight_decay=np.float64(0.1)),
    ), {}, {}),
    "integers of NumPy": Case(lambda: optax.chain(
        adam_jax.scale_by_lp(np.int64(3), eps=np.int32(1)), adam_jax.scale_by_adamax(eps=np.array(1)),
        adam_jax.scale_by_adam(eps_root=np.int64(1), storage="root"), adam_jax.scale_by_learning_rate(np.int64(1)),
    ), {}, {}),
    "arrays": Case(lambda: optax.chain(
        adam_jax.clip_by_global_norm(jnp.float32(0.5)), adam_jax.adam(jnp.float32(0.1), jnp.float32(0.8), jnp.float32(0.99))
    ), {}, {}),
}  # fmt: skip
ALIKE = {  # made of parts that are tried
    "adam", "adamw", "nadam", "adamax", "adamaxw", "amsgrad", "scale_by_adam, raw", "scale_by_norm", "scale_by_lp, int8",
    "scale_by_adamax, int8", "scale_by_amsgrad, corrected, root",
}  # fmt: skip
ALL = {name: case for name, case in (CASES | OTHERS).items() if name not in ALIKE}


@contextlib.contextmanager
def _mode(name: str) -> Iterator[None]:
    wide, promotion = MODES[name]
    with jax.enable_x64(wide), jax.numpy_dtype_promotion(promotion):
        yield


def _tree(name: str, factor: float) -> dict[str, Any]:
    dtypes = (jnp.float32, jnp.bfloat16) if ", 8" in name else (jnp.float32, jnp.bfloat16, jnp.float16)
    x = factor * np.array([0.3, -1.2, 0.7, 2.1, -0.4])
    tree: dict[str, Any] = {str(np.dtype(dtype)): jnp.asarray(x, dtype) for dtype in dtypes}
    if not any(narrow in name for narrow in ("int8", "bfloat16")):
        tree["complex"] = jnp.asarray(x + 1j * x[::-1], jnp.complex64)
    return {**tree, "widest": jnp.asarray(x, float), "none": None}


def _played(name: str) -> tuple[Any, Any, Any]:
    """Two steps: the updates of the second, and the types of the state before and after."""
    params, gradients, tx = _tree(name, 1.0), _tree(name, 0.5), ALL[name].make()
    updates, state = gradients, tx.init(params)
    types, update = jax.tree.map(lambda x: x.dtype, state), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(gradients, state, params)
    return updates, types, jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "strict x64") for name in ALL] + [(name, mode) for name in ("nadamw", "arrays") for mode in ("strict", "x64")],
)
def test_modes_of_jax_change_nothing_but_rounding(name: str, mode: str):
    by_default, _, _ = _played(name)
    with _mode(mode):
        updates, before, after = _played(name)
    assert before == after
    for key, plain in by_default.items():
        if plain is not None:
            assert updates[key].dtype == (jnp.float64 if key == "widest" and MODES[mode][0] else plain.dtype)
            tolerance = 2.0**-7 if updates[key].dtype in (jnp.bfloat16, jnp.float16) else 1e-5  # two roundings; a dozen ulp
            np.testing.assert_allclose(*(np.asarray(u, complex) for u in (updates[key], plain)), rtol=tolerance, atol=1e-6)


TABLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "decayed": (jnp.float32, {"weight_decay": 0.1}),
    "lazy int8": (jnp.float32, {"mode": "lazy", "storage": "int8"}),
    "24 bits": (jnp.bfloat16, {"storage": "bfloat16", "residual": 8, "weight_decay": _towards_one}),
    "float16": (jnp.float16, {"storage": "root"}),
    "widest": (float, {"weight_decay": 0.1}),
}


def _table_types(name: str) -> Any:
    """The types of a state before and after everything that is done with tables."""
    dtype, settings = TABLES[name]
    tx = tables.row_adam(lambda count: 0.1 * _towards_one(count), **settings)

    def play() -> tuple[Any, ...]:
        table, ids = jnp.ones((6, 4), dtype), jnp.array([1, 1, 4, -1])
        start = state = tx.init(table)
        rows, table, state = tx.gather(table, state, ids)
        table, state = tx.clear(*tx.update(table, state, ids, rows), jnp.array([1]))
        table, state = tables.drop(tx, *tables.grow(tx, table, state, jnp.ones((2, 4), dtype)), [0, 1])
        return start, state, tables.restart(tx, table, state)[1], tables.master_table(table, state)

    return jax.tree.map(lambda x: x.dtype, jax.eval_shape(play))


@pytest.mark.parametrize("name", TABLES)
def test_modes_of_jax_change_no_type_of_a_table_that_is_not_wider(name: str):
    by_default = _table_types(name)
    for mode in MODES:
        with _mode(mode):
            start, state, again, masters = found = _table_types(name)
        assert start == state == again
        assert state.row_count == state.count == jnp.int32
        if name == "widest" and MODES[mode][0]:
            assert state.mu == state.row_log_keep == masters == jnp.float64
        else:
            assert found == by_default


@pytest.mark.parametrize("mode", MODES)
def test_states_are_watched_and_regret_is_bounded_in_every_mode(mode: str):
    with _mode(mode):
        tx, z = adam_jax.scale_by_adam(b2=0.99), jnp.array([3.0 + 4.0j, 1.0], jnp.complex64)
        updates, state = tx.update(z, tx.init(z))
        seen = watch.watch_adam(learning_rate=0.1)(state, z, z, updates)
        assert seen.overall.step_max == pytest.approx(0.1)
        settings = online.theorem_4_1_settings(0.1, 0.9, 0.5)
        stream, domain = jnp.array([1.0, -1.0, 0.5]), online.Box(-1.0, 1.0)
        game = online.play(lambda x, c: c * x, stream, jnp.zeros(()), adam_jax.adam(b2=0.999, **settings), domain)
        bound = online.theorem_4_1_bound(game, domain, 0.1, 0.9, 0.999, 0.5)
        best = online.best_fixed_point(
            lambda x, c: c * x, stream, 0.0, domain, tolerance=np.float32(1e-3), max_steps=np.int64(100)
        )
        assert np.isfinite(np.asarray(bound.total)).all()
        assert best.params == pytest.approx(-1.0, abs=1e-2)


def test_gradients_wider_than_params_are_taken_under_strict_promotion():
    with _mode("strict x64"):
        tx = optax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.adam(0.1, b2=0.99), adam_jax.average_params(0.9))
        params = {"w": jnp.ones(3, jnp.float32), "h": jnp.ones(3, jnp.float16), "z": jnp.ones(3, jnp.complex64)}
        gradients = {"w": jnp.ones(3, jnp.float64), "h": jnp.ones(3, jnp.float64), "z": jnp.ones(3, jnp.complex128)}
        updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
        average = adam_jax.averaged_params(state, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    for leaf in jax.tree.leaves(average):
        np.testing.assert_allclose(leaf, 0.9, rtol=1e-3)
