"""Trees, dtypes, settings and faults drawn by Hypothesis, against the contract and the oracle.

A normal run tries 100 histories and 30 trees; `ADAM_JAX_FUZZ=2000 python -m pytest tests/test_fuzz.py` tries that many of
each kind.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import adam_jax

LONG = int(os.environ.get("ADAM_JAX_FUZZ", "0"))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
EPSILON = {jnp.float32: 2.0**-19, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-10}  # of a step: 32 float32 ulp; one rounding
FACTORIES = {
    "adam": adam_jax.adam,
    "adamw": adam_jax.adamw,
    "nadam": adam_jax.nadam,
    "adamax": adam_jax.adamax,
    "amsgrad": adam_jax.amsgrad,
}


def _settings(normal: int):
    return settings(
        max_examples=LONG or normal,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# every float32 there is but NaN and the infinities: zeros of both signs, subnormals, the largest
ANY_FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@functools.partial(jax.jit, static_argnames="nesterov")
def _play_root(gradients, b1, b2, eps, *, nesterov):
    tx = adam_jax.scale_by_adam(b1, b2, eps, nesterov=nesterov, storage="root")
    return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(gradients[0]), gradients)[::-1]


@_settings(100)
@given(
    gradients=hnp.arrays(np.float32, (4, 8), elements=ANY_FLOAT32),
    b1=st.floats(0, 0.99),
    b2=st.floats(0.01, 0.9999),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1.0]),
    nesterov=st.booleans(),
)
def test_the_root_form_is_the_paper_over_the_whole_range_of_float32(gradients, b1, b2, eps, nesterov):
    tiny, half = np.finfo(np.float32).tiny, np.finfo(np.float32).max / 2
    b1, b2, eps = (float(np.float32(number)) for number in (b1, b2, eps))
    updates, state = _play_root(gradients, b1, b2, eps, nesterov=nesterov)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    # subnormal numbers count as zero, and the largest saturate
    seen = np.clip(np.where(np.abs(gradients) < tiny, 0, gradients), -half, half)
    exact = reference.adam(seen, b1, b2, eps, nesterov=nesterov)
    scale = np.maximum(np.abs(exact), 1)
    # moments below 1e-30 lose digits to flushing once they have decayed; their steps are compared in the other tests
    lively = np.maximum.accumulate(np.abs(seen), 0) > 1e-30
    lively |= np.maximum.accumulate(np.abs(seen), 0) == 0
    error = np.where(lively, np.abs(np.array(updates) - exact) / scale, 0)
    spread = 1 / np.sqrt((1 - b2) * b2**3)  # how far a step can exceed one
    assert np.max(error) <= 64 * 2.0**-24 * spread


leaves = st.tuples(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)
)
odd_leaves = st.sampled_from([None, "integers", "flags"])
trees = st.recursive(
    leaves | odd_leaves,
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=5,
)


def _is_leaf(spec) -> bool:
    return spec is None or isinstance(spec, (str, tuple))


def _times(gradients, factor: float):
    return jax.tree.map(lambda g: g * factor if jnp.issubdtype(g.dtype, jnp.inexact) else g, gradients)


def _params(spec):
    kinds = {"integers": jnp.arange(2), "flags": jnp.array(True), None: None}
    return kinds[spec] if not isinstance(spec, tuple) else jnp.ones(spec[2], spec[0])


def _gradient(rng: np.random.Generator, spec):
    if spec is None:
        return None
    if isinstance(spec, str):
        return np.zeros(2 if spec == "integers" else (), jax.dtypes.float0)
    return jnp.asarray(rng.normal(size=spec[2]) * 10 ** rng.uniform(-2, 2), spec[1])


@pytest.mark.parametrize("name", FACTORIES)
@_settings(6)
@given(
    spec=trees,
    faults=st.lists(st.sampled_from(["fine", "fine", "nan", "inf"]), min_size=1, max_size=4),
    numbers=st.fixed_dictionaries({"b1": st.floats(0, 0.95), "b2": st.floats(0.5, 0.999), "eps": st.floats(1e-9, 1e-2)}),
    seed=st.integers(0, 2**16),
)
def test_any_tree_of_any_dtypes_under_any_faults_keeps_the_contract(name, spec, faults, numbers, seed):
    rng = np.random.default_rng(seed)
    scale = {"fine": 1.0, "nan": np.nan, "inf": np.inf}
    params = jax.tree.map(_params, spec, is_leaf=_is_leaf)
    inexact = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    tx = adam_jax.skip_nonfinite(FACTORIES[name](0.1, **numbers))
    state, update = tx.init(params), jax.jit(tx.update)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    taken, updates = [], None
    for fault in faults:
        gradients = jax.tree.map(lambda s: _gradient(rng, s), spec, is_leaf=_is_leaf)
        last, state = update(_times(gradients, scale[fault]), state, params)
        if fault == "fine" or not inexact:
            taken.append(gradients)
            updates = last
        else:
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(last))
        moved = optax.apply_updates(params, last)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), moved) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert int(state.total) == len(faults) - len(taken)
    if updates is None or name != "adam":
        return
    for position, g in enumerate(jax.tree.leaves(taken[-1])):
        if jnp.issubdtype(g.dtype, jnp.inexact) and g.size:
            history = np.array([np.asarray(jax.tree.leaves(tree)[position].astype(jnp.float32)) for tree in taken])
            exact = -0.1 * reference.adam(history, **numbers)[-1]
            found = np.asarray(jax.tree.leaves(updates)[position].astype(jnp.float32))
            tolerance = EPSILON[g.dtype.type]
            np.testing.assert_allclose(found, exact.astype(float), rtol=2 * tolerance, atol=0.1 * 2.0**-19)
