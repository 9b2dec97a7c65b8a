"""The average of the params over training (Section 7.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax


def _train(decay, steps: int = 20):
    tx = optax.chain(adam_jax.adam(0.1), adam_jax.average_params(decay))
    params = {"w": jnp.array([1.0, -2.0]), "n": 3}
    state, history = tx.init(params), []
    for _ in range(steps):
        gradients = {"w": params["w"], "n": np.zeros((), jax.dtypes.float0)}
        updates, state = jax.jit(tx.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(params["w"], np.float64))
    return adam_jax.averaged_params(state, params), np.array(history)


def test_it_is_the_bias_corrected_exponential_average():
    average, history = _train(0.9)
    weights = 0.9 ** np.arange(len(history))[::-1]
    np.testing.assert_allclose(average["w"], weights @ history / weights.sum(), rtol=1e-6)
    assert average["n"] == 3


def test_with_a_growing_decay_it_is_the_arithmetic_mean():
    average, history = _train(lambda count: count / (count + 1.0))
    np.testing.assert_allclose(average["w"], history.mean(0), rtol=1e-5)


def test_before_the_first_step_it_is_the_params():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    average = adam_jax.averaged_params(adam_jax.average_params().init(params), params)
    assert average["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(average["w"], params["w"])
    assert float(adam_jax.average_params().init(params).weight) == 0


def test_low_precision_params_are_averaged_in_float32():
    tx = optax.chain(optax.sgd(1.0), adam_jax.average_params(0.999))
    params = jnp.ones(1, jnp.bfloat16)
    state = tx.init(params)
    for _ in range(3):
        _, state = jax.jit(tx.update)(jnp.zeros(1, jnp.bfloat16), state, params)
    assert state[1].average.dtype == jnp.float32
    np.testing.assert_array_equal(state[1].average, 1.0)


def test_what_is_averaged_is_the_weight_that_apply_updates_makes():
    tx, params = adam_jax.average_params(), jnp.ones(1, jnp.bfloat16)
    updates, state = tx.update(jnp.float32([2**-8 + 2**-20]), tx.init(params), params)  # half a unit and a little
    moved = optax.apply_updates(params, updates)
    assert float(moved[0]) == 1 + 2**-7
    np.testing.assert_array_equal(adam_jax.averaged_params(state, params), moved)


def test_a_leaf_without_an_update_counts_as_it_is():
    tx = optax.chain(adam_jax.adam(0.1), adam_jax.average_params(0.5))
    params = {"w": jnp.ones(1), "frozen": jnp.full(1, 5.0)}
    updates, state = tx.update({"w": jnp.ones(1), "frozen": None}, tx.init(params), params)
    assert updates["frozen"] is None
    average = adam_jax.averaged_params(state, params)
    np.testing.assert_allclose([average["w"][0], average["frozen"][0]], [0.9, 5.0], rtol=1e-6)


@pytest.mark.parametrize("mask", [{"a": True, "rest": False}, {"a": True, "rest": {"b": False, "c": True}}])
def test_masked_leaves_are_the_params_own(mask):
    tx = optax.masked(optax.chain(optax.sgd(0.5), adam_jax.average_params(0.5)), mask)
    params = {"a": jnp.ones(1), "rest": {"b": jnp.ones(1), "c": jnp.ones(1)}}
    _, state = tx.update(params, tx.init(params), params)
    average = adam_jax.averaged_params(state, params)
    assert average["a"] == 0.5
    assert average["rest"]["b"] == 1.0


def test_a_state_without_an_average_is_an_error_and_of_two_one_is_chosen():
    params = jnp.ones(1)
    two = optax.named_chain(("slow", adam_jax.average_params()), ("fast", adam_jax.average_params(0.5)))
    with pytest.raises(ValueError, match="must hold an AverageParamsState, got none: add average_params to the chain"):
        adam_jax.averaged_params(adam_jax.adam().init(params), params)
    state = two.init(params)
    with pytest.raises(ValueError, match=r"holds 2 AverageParamsStates: choose one with where=, part of one of .*fast"):
        adam_jax.averaged_params(state, params)
    with pytest.raises(ValueError, match="averaging needs the params"):
        two.update(params, state)
    for step in (1.0, 2.0):
        _, state = two.update(jnp.full(1, step), state, params)
    np.testing.assert_allclose(
        adam_jax.averaged_params(state, params, where="fast"), 8 / 3, rtol=1e-6
    )  # (2 + 3 b) / (1 + b)
    np.testing.assert_allclose(adam_jax.averaged_params(state, params, where="slow"), 2.5, rtol=1e-3)


def test_a_count_of_zero_starts_the_average_anew():
    params, tx = jnp.ones(1), adam_jax.average_params(0.9)
    _, state = tx.update(jnp.full(1, 7.0), tx.init(params), params)
    state = optax.tree_utils.tree_set(state, count=0)
    np.testing.assert_array_equal(adam_jax.averaged_params(state, params), params)
    _, state = tx.update(jnp.full(1, 2.0), state, params)
    np.testing.assert_array_equal(adam_jax.averaged_params(state, params), 3.0)


def test_a_count_of_zero_starts_the_average_anew_whatever_it_was():
    tx, params = adam_jax.average_params(0.9), jnp.array([1e-9, 3.0])
    state = tx.init(params)._replace(average=jnp.array([jnp.nan, jnp.inf]), weight=jnp.float32(0.5))
    _, state = tx.update(jnp.zeros(2), state, params)
    np.testing.assert_array_equal(adam_jax.averaged_params(state, params), params)


def test_averages_in_two_groups_of_a_partition_are_read_one_after_the_other():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    group = optax.chain(optax.sgd(1.0), adam_jax.average_params(0.5))
    tx = optax.partition({"x": group, "y": group}, {"a": "x", "b": "y"})
    _, state = tx.update({"a": jnp.ones(1), "b": jnp.full(1, 2.0)}, tx.init(params), params)
    with pytest.raises(ValueError, match=r"holds 2 AverageParamsStates: choose one with where=, part of one of .*'x'.*'y'"):
        adam_jax.averaged_params(state, params)
    average = adam_jax.averaged_params(state, params, where="'x'")
    assert (average["a"], average["b"]) == (-1.0, 0.0)  # what is not in the group is the params' own
    average = adam_jax.averaged_params(state, average, where="'y'")
    assert (average["a"], average["b"]) == (-1.0, -2.0)
    with pytest.raises(ValueError, match=r"where must be part of the path of an AverageParamsState .*'x'.*, got 'z'"):
        adam_jax.averaged_params(state, params, where="z")
    with pytest.raises(TypeError, match="where must be a string, part of a path in the state, got 0"):
        adam_jax.averaged_params(state, params, where=0)


def test_params_of_other_shapes_than_the_average_are_refused_with_the_leaf():
    state = adam_jax.average_params().init({"w": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"params must have the average's shape \(1,\) at \['w'\], got \(5,\)"):
        adam_jax.averaged_params(state, {"w": jnp.ones(5)})


@pytest.mark.parametrize("residual", [0, 8, 16])
def test_inside_in_float32_it_is_the_average_of_the_float32_weights(residual: int):
    def run(wrap, params):
        tx = wrap(optax.chain(optax.sgd(1e-4), adam_jax.average_params(0.9)))
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(20):
            updates, state = update(jnp.ones(2000, jnp.float32), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = run(lambda tx: adam_jax.in_float32(tx, residual), jnp.ones(2000, jnp.bfloat16))
    average = adam_jax.averaged_params(state, adam_jax.master_params(state, params))
    exact = adam_jax.averaged_params(*run(lambda tx: tx, jnp.ones(2000))[::-1])
    assert average.dtype == jnp.float32
    if residual == 16:
        np.testing.assert_array_equal(average, exact)
    else:  # right on average: weights are 2^-8 or 2^-16 apart
        np.testing.assert_allclose(average.mean(), exact.mean(), atol=2e-4 if residual == 0 else 1e-6)


def test_until_a_schedule_of_decays_falls_from_one_the_average_is_the_params():
    params, tx = jnp.full(1, 3.0), adam_jax.average_params(lambda count: jnp.where(jnp.asarray(count) < 1, 1.0, 0.5))
    _, state = tx.update(jnp.ones(1), tx.init(params), params)
    np.testing.assert_array_equal(adam_jax.averaged_params(state, params), params)
    _, state = tx.update(jnp.ones(1), state, params)
    np.testing.assert_array_equal(adam_jax.averaged_params(state, params), 4.0)


def test_where_nothing_moves_no_params_are_needed():
    tx = adam_jax.average_params()
    updates, _ = tx.update({"a": None}, tx.init({"a": None}))
    assert updates == {"a": None}
