"""Hyper-parameters as data: traced, vmapped, injected and changed without a retrace, float32 whatever the params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OPTIMIZERS

import adam_jax

every_optimizer = pytest.mark.parametrize("case", [CASES[name] for name in OPTIMIZERS], ids=OPTIMIZERS)


@every_optimizer
def test_new_numbers_do_not_retrace(case):
    traces = []

    @jax.jit
    def step(numbers, gradients, state, params):
        traces.append(1)
        return case.make(**numbers).update(gradients, state, params)

    params = jnp.ones(3)
    state = case.make().init(params)
    results = []
    for factor in (1.0, 0.5, 0.25):
        numbers = {name: jnp.float32(value * factor) for name, value in case.numbers.items()}
        updates, state = step(numbers, params, state, params)
        results.append(np.asarray(updates))
    assert len(traces) == 1
    assert not np.allclose(results[0], results[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_optimizer
def test_injected_numbers_may_be_changed_without_a_retrace(case, dtype):
    tx = optax.inject_hyperparams(case.factory, hyperparam_dtype=jnp.float32)(**case.numbers, **case.choices)
    params, traces = jnp.ones(3, dtype), []

    @jax.jit
    def step(state):
        traces.append(1)
        return tx.update(params, state, params)

    updates, state = step(tx.init(params))
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    still, state = step(state)
    assert len(traces) == 1
    assert updates.dtype == still.dtype == dtype
    assert (updates != 0).all()
    assert (still == 0).all()
    assert all(value.dtype == jnp.float32 for value in state.hyperparams.values())


def test_numbers_rounded_to_bfloat16_by_injection_are_an_error_not_a_wrong_decay():
    tx = optax.inject_hyperparams(adam_jax.adamw)(1e-3)  # Optax rounds b2 = .999 to 1 here
    params = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"must be float32 or wider, got bfloat16"):
        tx.update(params, tx.init(params), params)


@every_optimizer
def test_numbers_may_be_vmapped(case):
    params = jnp.ones(3)
    table = {name: jnp.float32(value) * jnp.array([1.0, 0.5]) for name, value in case.numbers.items()}

    def play(numbers):
        tx = case.make(**numbers)
        return jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], tx.init(params), jnp.ones((4, 3)))[1]

    together = jax.jit(jax.vmap(play))(table)
    for run in range(2):
        alone = jax.jit(play)({name: values[run] for name, values in table.items()})
        np.testing.assert_allclose(together[run], alone, rtol=1e-6)


def test_a_learning_rate_below_float16_is_not_lost_on_the_way():
    params = jnp.full(1, 1e-3, jnp.float16)
    tx = adam_jax.adam(1e-5)
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    np.testing.assert_allclose(updates.astype(jnp.float32), -1e-5, rtol=1e-2)  # float16 is subnormal here
