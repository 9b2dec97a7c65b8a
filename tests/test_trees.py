"""Trees with leaves that are not trained, and trees that do not match."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OPTIMIZERS

import adam_jax
from adam_jax import trees

every_optimizer = pytest.mark.parametrize("case", [CASES[name] for name in OPTIMIZERS], ids=OPTIMIZERS)
PARAMS = {
    "w": jnp.ones((2, 3)),
    "steps": jnp.arange(4),
    "flags": jnp.array([True, False]),
    "key": jax.random.key(0),
    "nothing": None,
    "empty": jnp.zeros((0, 2)),
    "scalar": 2.0,
}


@every_optimizer
def test_leaves_that_are_not_trained_have_no_state_and_stay_as_they_are(case):
    tx = case.make()

    def loss(params):
        noise = jax.random.normal(params["key"], (2, 3))
        return jnp.sum(params["w"] * noise) + params["scalar"] ** 2 + jnp.sum(params["steps"] * 0.0)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(loss, allow_int=True)(params)
        assert gradients["steps"].dtype == jax.dtypes.float0
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for leaf in ("steps", "flags", "key", "nothing"):
        assert trees.is_absent(optax.tree_utils.tree_get(state, "mu")[leaf])
        assert trees.is_absent(optax.tree_utils.tree_get(state, "nu")[leaf])
    for _ in range(3):
        params, state = step(params, state)
    for leaf in ("steps", "flags", "key", "empty"):
        chex.assert_trees_all_equal(params[leaf], PARAMS[leaf])
    assert not (params["w"] == PARAMS["w"]).any()


def test_integer_leaves_stay_as_they_are_eagerly_too():
    tx = adam_jax.adamw(0.1)
    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    gradients = {"w": jnp.ones(2), "n": np.zeros(3, jax.dtypes.float0)}
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(moved["n"], params["n"])
    assert moved["n"].dtype == params["n"].dtype


def test_none_in_params_in_gradients_and_in_both():
    params = {"a": jnp.ones(2), "b": None, "c": jnp.ones(3)}
    tx = adam_jax.adam(0.1)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)({"a": jnp.ones(2), "b": None, "c": None}, state, params)
    assert updates["b"] is None
    assert updates["c"] is None
    np.testing.assert_allclose(updates["a"], -0.1)
    chex.assert_trees_all_equal(after[0].mu["c"], state[0].mu["c"])  # no gradient, no change


@every_optimizer
def test_an_equinox_model_may_be_given_whole(case):
    tx = case.make()
    model = eqx.nn.MLP(2, 1, 4, 1, activation=jax.nn.tanh, key=jax.random.key(0))
    state = tx.init(model)

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(2))))(model)
        updates, state = tx.update(gradients, state, model)
        return eqx.apply_updates(model, updates), state

    moved, _ = step(model, state)
    assert moved.activation is model.activation
    assert not (moved.layers[0].weight == model.layers[0].weight).all()


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            {"w": jnp.ones(3), "more": {"b": jnp.ones(2)}},
            r"the gradient at \['w'\] has shape \(3,\), but its param had \(2,\)",
        ),
        ({"w": jnp.ones(2)}, r"the gradients have no leaf at \['more'\]\['b'\], which the params given to init have"),
        (
            {"w": jnp.ones(2), "more": {"c": jnp.ones(2)}},
            r"a leaf at \['more'\]\['c'\] that the params given to init do not",
        ),
        (
            {"w": jnp.arange(2), "more": {"b": jnp.ones(2)}},
            r"the gradient at \['w'\] has dtype int32, but its param is float",
        ),
        ({"w": jnp.ones(2) + 1j, "more": {"b": jnp.ones(2)}}, r"the gradient at \['w'\] has dtype complex64, but its first"),
        ([jnp.ones(2), jnp.ones(2)], r"the gradients have a leaf at \[0\] that the params given to init do not have"),
    ],
)
def test_gradients_that_do_not_match_name_the_first_leaf(gradients, message: str):
    params = {"w": jnp.ones(2), "more": {"b": jnp.ones(2)}}
    tx = adam_jax.scale_by_adam()
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.update)(gradients, tx.init(params))


def test_a_gradient_for_a_leaf_that_was_not_trained_is_an_error():
    tx = adam_jax.scale_by_adam()
    with pytest.raises(ValueError, match=r"a float32 leaf at \['n'\], but the params given to init have no floating-point"):
        tx.update({"n": jnp.ones(3)}, tx.init({"n": jnp.arange(3)}))


def test_paths_choose_learning_rates_decays_and_masks():
    params = {"embedding": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2), "b": jnp.ones(2)}}
    no_bias = adam_jax.label_by_path({"/b$": False}, True)
    choose = adam_jax.label_by_path({"^embedding/": "slow"}, "rest")
    tx = optax.partition(
        {"slow": adam_jax.adam(0.01, b2=0.9), "rest": adam_jax.adamw(0.1, weight_decay=1.0, mask=no_bias)}, choose
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["embedding"]["w"], -0.01, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["w"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["b"], -0.1, rtol=1e-6)


def test_a_path_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"must find a leaf each, got 'decoder', but the paths are \['w'\]"):
        adam_jax.label_by_path({"decoder": 1}, 0)({"w": 1.0})
    with pytest.raises(ValueError, match="must be regular expressions, got"):
        adam_jax.label_by_path({"(": 1}, 0)
