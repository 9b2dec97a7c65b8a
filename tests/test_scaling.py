"""What stands around Adam in a chain: clipping, learning rates, weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax


def _once(tx: optax.GradientTransformation, updates, params=None):
    return jax.jit(tx.update)(updates, tx.init(updates), params)[0]


def test_clipping_leaves_short_gradients_alone_and_scales_long_ones():
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}
    np.testing.assert_array_equal(_once(adam_jax.clip_by_global_norm(5.0), gradients)["a"], 3.0)
    clipped = _once(adam_jax.clip_by_global_norm(1.0), gradients)
    np.testing.assert_allclose(clipped["a"], 0.6, rtol=1e-6)
    assert clipped["b"].dtype == jnp.bfloat16


def test_clipping_does_not_overflow():
    clipped = _once(adam_jax.clip_by_global_norm(1.0), jnp.full(100, 1e30))
    assert jnp.isfinite(clipped).all()
    assert (clipped > 0).all()


@pytest.mark.parametrize("n", [1, 100])
def test_each_of_n_squares_counts_as_half_the_nth_part_of_the_largest_number_at_most(n: int):
    clipped = _once(adam_jax.clip_by_global_norm(1.0), jnp.full(n, 1e30))
    np.testing.assert_allclose(clipped, 1e30 / np.sqrt(float(jnp.finfo(jnp.float32).max) / 2), rtol=1e-5)


def test_the_norm_is_that_of_trained_leaves_in_float32():
    gradients = {"a": jnp.full(1000, 1 + 2**-7, jnp.bfloat16), "b": jnp.ones(1), "steps": jnp.array([3])}
    clipped = _once(adam_jax.clip_by_global_norm(1.0), gradients)
    np.testing.assert_allclose(clipped["b"], 1 / np.sqrt(1 + 1000 * (1 + 2**-7) ** 2), rtol=1e-6)
    assert clipped["steps"] == 3


def test_clipping_of_nothing_is_nothing():
    for nothing in ({}, {"w": jnp.zeros(0)}):
        assert jax.tree.map(jnp.shape, _once(adam_jax.clip_by_global_norm(1.0), nothing)) == jax.tree.map(jnp.shape, nothing)


def test_clipping_shows_nan_and_infinity():
    for bad in (jnp.nan, jnp.inf):
        assert not jnp.isfinite(_once(adam_jax.clip_by_global_norm(1.0), jnp.array([1.0, bad]))).all()


def test_clipping_at_zero_gradients_has_a_finite_derivative():
    def first(g: jax.Array) -> jax.Array:
        return _once(adam_jax.clip_by_global_norm(1.0), g)[0]

    np.testing.assert_array_equal(jax.grad(first)(jnp.zeros(2)), [1.0, 0.0])


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="XLA of JAX 0.8 does not fuse the norm: 52 bytes and a copy")
@pytest.mark.parametrize("transform", [adam_jax.adam, adam_jax.adamw])
def test_clip_then_adam_moves_44_bytes_a_parameter_and_needs_no_copy(transform):
    params = jnp.ones(1 << 20)
    tx = optax.chain(adam_jax.clip_by_global_norm(1.0), transform(1e-3))
    state = tx.init(params)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    assert analysis["bytes accessed"] / params.size <= 44.1
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 16


def test_the_learning_rate_is_not_rounded_to_the_updates_dtype():
    updates = _once(adam_jax.scale_by_learning_rate(1e-3), jnp.full(1, 1.5, jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16
    assert updates[0] == jnp.bfloat16(-1.5e-3)
    assert _once(optax.scale_by_learning_rate(1e-3), jnp.full(1, 1.5, jnp.bfloat16))[0] != updates[0]


def test_a_schedule_steps_as_the_number_that_it_says():
    for rate in (0.5, -0.5):
        for said in (rate, optax.constant_schedule(rate)):
            updates = _once(adam_jax.scale_by_learning_rate(said), jnp.ones(1))
            np.testing.assert_array_equal(updates, -rate)  # uphill where it is negative


@pytest.mark.parametrize(
    ("make", "g", "sign"), [(adam_jax.add_decayed_weights, 0.0, 1), (adam_jax.scale_by_learning_rate, 1.0, -1)]
)
def test_a_schedule_begins_at_a_count_of_zero_and_goes_on(make: Any, g: float, sign: int):
    tx, p = make(lambda count: 0.5 * count), jnp.ones(1)
    state, found = tx.init(p), []
    for _ in range(3):
        u, state = tx.update(jnp.full(1, g), state, p)
        found.append(sign * float(u[0]))
    assert (found, int(state.count), state.count.dtype) == ([0.0, 0.5, 1.0], 3, jnp.int32)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: {name: name == "w" for name in params}])
def test_weights_decay_where_the_mask_says(mask: Any):
    tx, params = adam_jax.add_decayed_weights(0.5, mask), {"w": jnp.ones(()), "b": jnp.ones(())}
    assert _once(tx, jax.tree.map(jnp.zeros_like, params), params) == {"w": 0.5, "b": 0.0}


@pytest.mark.parametrize("mask", [None, {"w": True}, lambda params: {"w": params["w"].ndim > 0}])
def test_decay_needs_the_params_where_anything_decays(mask: Any):
    tx, params = adam_jax.add_decayed_weights(0.5, mask), {"w": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"weight decay needs the params: call update\(gradients, state, params\)"):
        tx.update(params, tx.init(params))
    assert adam_jax.add_decayed_weights(0.5).update({"w": None}, optax.EmptyState())[0] == {"w": None}


def test_a_mask_of_labels_is_refused():
    for mask in ({"w": True, "b": "no"}, lambda params: dict.fromkeys(params, "no")):
        with pytest.raises(TypeError, match=r"mask must hold True or False, got 'no': label_by_path\(.* makes one"):
            adam_jax.add_decayed_weights(0.5, mask).init({"w": jnp.ones(1), "b": jnp.ones(1)})


def test_weight_decay_of_bfloat16_updates_is_rounded_once():
    u = jnp.ones(1, jnp.bfloat16)
    updates, _ = adam_jax.add_decayed_weights(31 / 97).update(u, optax.EmptyState(), 22 * u)
    assert (updates.dtype, float(updates[0])) == (jnp.bfloat16, 8.0)  # 8.03; in bfloat16 all through 8.0625


def test_leaves_that_are_not_trained_pass_and_no_weight_decays_unless_asked():
    updates = {"w": jnp.ones(1), "steps": jnp.array([3])}
    halved = _once(adam_jax.scale_by_learning_rate(0.5), updates)
    assert (halved["w"], halved["steps"], halved["steps"].dtype) == (-0.5, 3, jnp.int32)
    np.testing.assert_array_equal(_once(adam_jax.add_decayed_weights(), jnp.ones(1), jnp.ones(1)), 1.0)


def test_inverse_sqrt_decay_is_alpha_over_root_t():
    schedule = adam_jax.inverse_sqrt_decay(0.5)
    np.testing.assert_allclose([schedule(t - 1) for t in (1, 4, 100)], [0.5, 0.25, 0.05], rtol=1e-6)


def test_bias_correction_of_a_first_moment_alone_is_one_over_its_weight():
    tx = optax.chain(optax.ema(0.9, debias=False), adam_jax.scale_by_bias_correction(0.9))
    state = tx.init(jnp.zeros(1))
    for _ in range(20):
        updates, state = jax.jit(tx.update)(jnp.ones(1), state)
        np.testing.assert_allclose(updates, 1.0, rtol=2e-6)


def test_bias_correction_follows_schedules_of_both_decays():
    b1, b2 = (lambda t: 0.5 + 0.1 * t), (lambda t: 0.9 - 0.2 * t)
    correct = adam_jax.scale_by_bias_correction(b1, b2)
    assert jax.tree.leaves(correct.init(None)) == [0.0, 0.0, 0.0]
    tx = optax.chain(adam_jax.scale_by_adam(b1, b2, eps=0.0, bias_correction=False), correct)
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jnp.full(1, 3.0), state)
        np.testing.assert_allclose(updates, 1.0, rtol=2e-6)
    assert int(state[1].count) == 3


@pytest.mark.parametrize("make", [adam_jax.scale_by_learning_rate, adam_jax.add_decayed_weights])
def test_a_schedule_in_place_of_a_number_needs_a_state_with_a_count(make: Any):
    g = jnp.ones(2)
    with pytest.raises(
        TypeError, match=r"state must be that of a .* on a schedule, got EmptyState.*: .* was a number at init"
    ):
        make(optax.constant_schedule(0.1)).update(g, make(0.1).init(g), g)
