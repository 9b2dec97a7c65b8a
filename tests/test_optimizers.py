"""The recipes: Optax's signatures, and its numbers where Optax is right."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPTIMIZERS

import adam_jax


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_user_of_optax_changes_one_import(name: str):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (adam_jax, optax))
    positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == [p.name for p in positional]
    for p in theirs.values():
        assert p.name in ours
        if p.name != "learning_rate":  # ours has the paper's as default
            assert ours[p.name].default == p.default


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_agrees_with_optax_to_float32_rounding_where_optax_is_right(name: str):
    # gradients of order one, the default decays, 30 steps: here 1 - b2^t in float32 is off by 7e-6 at most
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(30, 100)), jnp.float32)
    params = jnp.asarray(rng.normal(size=100), jnp.float32)
    settings = {"max_of": "corrected"} if name == "amsgrad" else {}
    ours, theirs = (
        _train(tx, params, gradients) for tx in (getattr(adam_jax, name)(0.1, **settings), getattr(optax, name)(0.1))
    )
    np.testing.assert_allclose(ours, theirs, atol=30 * 0.1 * 1e-5)


def test_weight_decay_is_decoupled_scheduled_and_masked():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = adam_jax.adamw(0.5, weight_decay=lambda count: 0.1 * (count + 1.0), mask={"w": True, "b": False})
    state = tx.init(params)
    for expected in (-0.05, -0.1):
        updates, state = jax.jit(tx.update)(zero, state, params)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], 0)


def test_weight_decay_without_params_says_what_it_needs():
    tx = adam_jax.adamw(0.1)
    with pytest.raises(ValueError, match="weight decay needs the params"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


def _train(tx: optax.GradientTransformation, params: jax.Array, gradients: jax.Array) -> jax.Array:
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0])()
