"""Steps with a NaN or an infinity in them are as if they had not been."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

import adam_jax

BAD = [np.nan, np.inf, -np.inf]


def _gradients(step: int, bad: float | None = None, leaf: str = "b"):
    rng = np.random.default_rng(step)
    tree = {"a": rng.normal(size=4).astype(np.float32), "b": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)}
    if bad is not None:
        tree[leaf] = jnp.asarray(tree[leaf]).ravel().at[1].set(bad).reshape(tree[leaf].shape)
    return tree


PARAMS = {"a": jnp.ones(4), "b": jnp.ones((2, 3), jnp.bfloat16)}


@pytest.mark.parametrize("name", [*CASES, "optax.adam", "optax.lion", "injected", "averaged"])
def test_a_bad_step_is_as_if_it_had_not_been_bit_for_bit(name: str):
    other = {
        "optax.adam": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
        "optax.lion": lambda: optax.lion(0.1),
        "injected": lambda: optax.inject_hyperparams(adam_jax.adam, hyperparam_dtype=jnp.float32)(0.1),
        "averaged": lambda: optax.chain(adam_jax.adam(adam_jax.inverse_sqrt_decay(0.1)), adam_jax.average_params()),
    }
    tx = adam_jax.skip_nonfinite(CASES[name].make() if name in CASES else other[name]())
    update = jax.jit(tx.update)
    with_bad = without = tx.init(PARAMS)
    for step in range(6):
        updates, without = update(_gradients(step), without, PARAMS)
        if step % 2:
            zeros, with_bad = update(_gradients(step, BAD[step % 3]), with_bad, PARAMS)
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(zeros))
        same, with_bad = update(_gradients(step), with_bad, PARAMS)
        chex.assert_trees_all_equal(same, updates)
    chex.assert_trees_all_equal(with_bad.inner_state, without.inner_state)
    assert (with_bad.total, with_bad.consecutive, without.total) == (3, 0, 0)


def test_its_state_can_be_donated():
    tx = adam_jax.skip_nonfinite(adam_jax.adam(0.1))
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step(_gradients(0), tx.init(PARAMS), PARAMS)
    step(_gradients(1), state, PARAMS)


def test_a_skipped_step_changes_no_bit_of_a_weight():
    tx = adam_jax.skip_nonfinite(adam_jax.adam(0.1))
    params = jnp.array([-0.0, 0.0, 1.0])
    updates, _ = jax.jit(tx.update)(jnp.full(3, jnp.inf), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.asarray(moved).view(np.int32), np.asarray(params).view(np.int32))


def test_the_host_can_read_that_it_is_stuck():
    tx = adam_jax.skip_nonfinite(adam_jax.adam(0.1), max_consecutive=2)
    update, state, stuck = jax.jit(tx.update), tx.init(PARAMS), []
    for step, bad in enumerate([np.nan, None, np.inf, np.nan, np.nan, None]):
        _, state = update(_gradients(step, bad), state, PARAMS)
        stuck.append(bool(state.stuck))
        if state.stuck:
            with pytest.raises(FloatingPointError, match="not finite for"):
                adam_jax.raise_if_stuck((state,))
    assert stuck == [False, False, False, True, True, False]
    for free in (state, tx.init(PARAMS)):
        adam_jax.raise_if_stuck(free)
    with pytest.raises(ValueError, match="max_consecutive must be a whole number >= 1, got 0"):
        adam_jax.skip_nonfinite(optax.sgd(1.0), 0)
    with pytest.raises(TypeError, match=r"tx must be an Optax transformation, with init and update, got 0\.001"):
        adam_jax.skip_nonfinite(1e-3)
    with pytest.raises(ValueError, match="state must hold a SkipNonfiniteState, got none: wrap the transformation"):
        adam_jax.raise_if_stuck(optax.sgd(1.0).init(PARAMS))


@pytest.mark.parametrize("inner", [adam_jax.adam(1e-3), optax.adam(1e-3)], ids=["adam_jax", "optax"])
def test_it_makes_no_copy_of_the_state_and_asks_nothing_of_the_host(inner):
    params = jnp.ones(1 << 20)
    tx = adam_jax.skip_nonfinite(inner)
    state = tx.init(params)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    memory = lowered.compile().memory_analysis()
    # the update itself leaves the conditional through memory, 4 bytes a parameter; the state's 8 are updated in place
    assert memory.temp_size_in_bytes < 4.1 * params.size
    assert memory.alias_size_in_bytes >= 12 * params.size
    assert "callback" not in lowered.as_text()


def test_skipping_works_in_scan_and_vmap():
    tx = adam_jax.skip_nonfinite(adam_jax.adam(0.1))
    gradients = jnp.array([[1.0, 1.0], [jnp.nan, 1.0], [1.0, jnp.inf]]).T  # a row a run

    def play(gs: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(())), gs)[1]

    np.testing.assert_allclose(jax.jit(jax.vmap(play))(gradients), [[-0.1, 0.0, -0.1], [-0.1, -0.1, 0.0]], rtol=1e-6)


def test_of_many_runs_at_once_the_longest_stuck_is_told():
    tx = adam_jax.skip_nonfinite(optax.sgd(1.0), max_consecutive=2)
    step = jax.vmap(lambda g, state: tx.update(g, state)[1])
    state = jax.vmap(tx.init)(jnp.zeros((3, 2)))
    for bad in ([0, jnp.nan, 0], [0, jnp.nan, 0], [jnp.nan, jnp.nan, 0]):
        state = step(jnp.array(bad)[:, None] * jnp.ones(2), state)
    with pytest.raises(FloatingPointError, match=r"not finite for 3 steps in a row \(3 in all\)"):
        adam_jax.raise_if_stuck(state)


def test_a_step_of_nothing_trained_is_taken():
    tx = adam_jax.skip_nonfinite(adam_jax.scale_by_adam())
    _, state = tx.update({"n": np.zeros((), jax.dtypes.float0)}, tx.init({"n": 3}))
    assert (int(state.total), int(state.inner_state.count)) == (0, 1)


def test_a_state_whose_dtype_drifts_inside_stays_as_it_was_at_init():
    drifting = optax.GradientTransformation(
        lambda _: jnp.zeros([], jnp.bfloat16), lambda u, s, _=None: (u, s + jnp.float32(1))
    )
    tx = adam_jax.skip_nonfinite(drifting)
    for g, count in ((1.0, 1), (np.nan, 0)):
        _, state = tx.update(jnp.float32(g), tx.init(jnp.float32(0)))
        assert (state.inner_state.dtype, int(state.inner_state)) == (jnp.bfloat16, count)


def test_a_number_of_python_in_a_state_stays_that_number():
    tx = adam_jax.skip_nonfinite(optax.GradientTransformation(lambda _: 3, lambda u, s, _=None: (u, s)))
    for g in (1.0, np.nan):
        _, state = tx.update(jnp.float32(g), tx.init(jnp.float32(0)))
        assert state.inner_state == 3


def test_a_random_key_inside_stays_where_a_step_is_skipped():
    tx = adam_jax.skip_nonfinite(optax.add_noise(0.1, 0.5, jax.random.key(0)))
    _, before = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    for g, is_skipped in ((jnp.array([1.0, jnp.nan]), True), (jnp.ones(2), False)):
        _, after = tx.update(g, before)
        assert (after.inner_state.rng_key == before.inner_state.rng_key) == is_skipped


@pytest.mark.parametrize("wrap", [adam_jax.skip_nonfinite, adam_jax.in_float32])
def test_extra_arguments_reach_what_takes_them_and_no_other(wrap):
    def update(u, state, _=None, *, factor):
        return factor * u, state

    p = jnp.ones(2)
    for inner, expected in ((optax.GradientTransformationExtraArgs(lambda _: (), update), 3.0), (optax.scale(1.0), 1.0)):
        tx = wrap(inner)
        np.testing.assert_array_equal(tx.update(p, tx.init(p), p, factor=3.0)[0], expected)


def test_of_several_the_one_that_is_stuck_is_named_and_one_can_be_asked_about():
    tx = optax.named_chain(
        ("a", adam_jax.skip_nonfinite(optax.sgd(1.0))), ("b", adam_jax.skip_nonfinite(optax.scale(jnp.inf), 1))
    )
    tx = optax.named_chain(("first", tx), ("then", adam_jax.skip_nonfinite(optax.sgd(1.0), 1)))
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    adam_jax.raise_if_stuck(state, where="'first'")
    with pytest.raises(FloatingPointError, match=r"not finite for 1 step \(1 in all\) at \['then'\]"):
        adam_jax.raise_if_stuck(state)
    _, state = tx.update(jnp.ones(2), state)
    with pytest.raises(FloatingPointError, match=r"not finite for 2 steps in a row \(2 in all\) at \['then'\]"):
        adam_jax.raise_if_stuck(state, where="then")
    with pytest.raises(ValueError, match=r"where must be part of the path of a SkipNonfiniteState .*'first'.*, got 'last'"):
        adam_jax.raise_if_stuck(state, where="last")
