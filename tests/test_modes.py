"""Under JAX's strict promotion, with 64 bits, and under both, every transformation does what it does without."""

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

MODES = {"strict": (False, "strict"), "x64": (True, "standard"), "strict x64": (True, "strict")}


def _towards_one(count: jax.Array) -> jax.Array:
    return 1.0 - 0.1 / (jnp.asarray(count, float) + 1.0)


OTHERS = {
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
    "arrays": Case(lambda: optax.chain(
        adam_jax.clip_by_global_norm(jnp.float32(0.5)), adam_jax.adam(jnp.float32(0.1), jnp.float32(0.8), jnp.float32(0.99))
    ), {}, {}),
}  # fmt: skip
ALIKE = ("adam", "nadam", "adamax", "adamaxw", "amsgrad", "scale_by_adam, raw", "scale_by_norm", "scale_by_lp, int8")
ALL = {name: case for name, case in (CASES | OTHERS).items() if name not in ALIKE}  # made of parts that are all tried


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
    state = tx.init(params)
    types, update = jax.tree.map(lambda x: x.dtype, state), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(gradients, state, params)
    return updates, types, jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "strict x64") for name in ALL] + [(name, mode) for name in ("nadamw", "arrays", "in_float32") for mode in MODES],
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
