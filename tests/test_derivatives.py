"""Derivatives through the step: of any order, with respect to everything, finite at zero gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import adam_jax

HYPER = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-3}
FACTORIES = {
    "adam": adam_jax.adam,
    "adam, root": functools.partial(adam_jax.adam, storage="root"),
    "adamw, nesterov": functools.partial(adam_jax.adamw, nesterov=True, weight_decay=0.1),
    "adamax": adam_jax.adamax,
    "amsgrad": adam_jax.amsgrad,
    "lp": lambda learning_rate, **kw: optax.chain(
        adam_jax.scale_by_lp(3.0, **kw), adam_jax.scale_by_learning_rate(learning_rate)
    ),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def _final_loss(factory, start, scale, hyper, steps: int = 5) -> jax.Array:
    """The loss after some steps on a quadratic whose gradients are multiplied by `scale`."""
    tx = factory(**hyper)

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(scale * (params - jnp.sin(1.0 + t)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(float(steps)))
    return jnp.sum((params - 0.3) ** 2)


@pytest.mark.usefixtures("float64")
@every_factory
def test_derivatives_equal_finite_differences_in_float64(factory):
    start, scale = jnp.array([1.0, -2.0, 0.5]), jnp.array([1.0, 2.0, 0.1])
    hyper = {name: jnp.asarray(value) for name, value in HYPER.items()}
    loss = jax.jit(functools.partial(_final_loss, factory))
    check_grads(loss, (start, scale, hyper), order=1, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("factory", [FACTORIES["adam"], FACTORIES["adam, root"]], ids=["square", "root"])
def test_second_derivatives_too(factory):
    start, scale = jnp.array([1.0, -2.0, 0.5]), jnp.array([1.0, 2.0, 0.1])
    loss = jax.jit(lambda start, rate: _final_loss(factory, start, scale, HYPER | {"learning_rate": rate}))
    check_grads(loss, (start, jnp.asarray(0.1)), order=2, modes=("rev",), atol=1e-4, rtol=1e-4)


@every_factory
def test_derivatives_are_finite_at_zero_gradients_without_eps_root(factory):
    hyper = {name: jnp.float32(value) for name, value in HYPER.items()}

    def loss(start, scale, hyper):
        return _final_loss(factory, start, scale, hyper, steps=3)

    at = (jnp.array([1.0, 0.0]), jnp.zeros(2), hyper)
    for derivative in (jax.grad, jax.jacfwd):
        found = jax.jit(derivative(loss, argnums=(0, 1, 2)))(*at)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    second = jax.jit(jax.jacfwd(jax.grad(loss, argnums=0)))(*at)
    assert jnp.isfinite(second).all()


def test_the_derivative_through_500_steps_is_finite():
    grad = jax.jit(jax.grad(lambda rate: _final_loss(adam_jax.adam, jnp.ones(4), 1.0, {"learning_rate": rate}, 500)))
    assert np.isfinite(grad(0.01))
