"""Moments read, changed and written, in every storage, beside dense float32 moments that were changed alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax import norms, storage
from adam_jax.surgery import read_moments, restart, write_moments

STORAGES = {
    "float32": {},
    "root": {"storage": "root"},
    "bfloat16": {"storage": "bfloat16"},
    "bfloat16 mu": {"mu_dtype": jnp.bfloat16},
    "int8": {"storage": storage.int8(smallest=0)},
    "by path": {"storage": lambda path: "int8" if "w" in path else "float32"},
}
TOLERANCE = {"float32": 1e-6, "root": 1e-6, "bfloat16": 0.05, "bfloat16 mu": 0.05, "int8": 0.15, "by path": 0.15}
every_storage = pytest.mark.parametrize("name", STORAGES)
every_make = pytest.mark.parametrize("make", [adam_jax.scale_by_adam, adam_jax.scale_by_amsgrad, adam_jax.scale_by_adamax])
SHAPE = (64, 128)


def _gradients(t: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(t), 2)
    return {"w": jax.random.normal(keys[0], SHAPE), "b": jax.random.normal(keys[1], (3,))}


def _run(tx: Any, state: Any, steps: range, change: Any = lambda g: g) -> tuple[Any, Any]:
    update, updates = jax.jit(tx.update), None
    for t in steps:
        updates, state = update(change(_gradients(t)), state)
    return updates, state


@every_storage
@every_make
def test_moments_that_are_read_and_written_back_are_the_same(name: str, make: Any):
    tx = make(**STORAGES[name])
    _, state = _run(tx, tx.init(_gradients(0)), range(8))
    held = read_moments((state, ()))
    again = read_moments(write_moments(tx.init(_gradients(0)), held))
    for field in ("mu", "nu", "nu_max"):
        a, b = getattr(held, field), getattr(again, field)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-30), a, b)
    same, _ = _run(tx, write_moments(tx.init(_gradients(0)), held), range(8, 9))
    went_on, _ = _run(tx, state, range(8, 9))
    # the window of int8 codes is found anew, so a draw may fall otherwise: two codes of the ratio near one
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE[name]), same, went_on)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_written_moments_are_rounded_to_the_nearest_that_can_be_kept(name: str):
    size, ratio = np.geomspace(0.01, 1, 4001), np.random.default_rng(0).permutation(np.linspace(0.02, 1, 4001))
    leaf = jnp.asarray(size, jnp.float32)
    tx = adam_jax.scale_by_amsgrad(**STORAGES[name])
    _, state = tx.update(leaf, tx.init(leaf))
    held = read_moments(write_moments(state, read_moments(state)._replace(mu=leaf * ratio, nu=leaf, nu_max=leaf)))
    found = {"bfloat16": (size * ratio, held.mu), "int8": (ratio, held.mu / held.nu)}
    for given, kept in (found[name], (size, held.nu), (size, held.nu_max)):
        levels = np.unique(np.float32(kept))
        levels = levels[np.insert(np.diff(levels) > 1e-6 * levels[1:], 0, True)]  # quotients of one code differ in last bits
        assert 50 < len(levels) < 3000
        above = np.clip(np.searchsorted(levels, given), 1, len(levels) - 1)
        nearest = np.minimum(np.abs(given - levels[above]), np.abs(given - levels[above - 1]))
        # nearest in units of codes, which double their distance inside a cell now and then
        np.testing.assert_array_less(np.abs(given - kept), 1.4 * nearest + 1e-6 * given)


@every_storage
def test_given_moments_may_be_in_a_ratio_that_the_decays_would_never_make(name: str):
    tx = adam_jax.scale_by_adam(**STORAGES[name])
    _, state = _run(tx, tx.init(_gradients(0)), range(1), lambda g: jax.tree.map(lambda x: 1e-3 * x, g))
    held = read_moments(state)
    size = jnp.sqrt(held.nu["w"]) if isinstance(held.form, norms.Squares) else held.nu["w"]
    given = held._replace(mu={**held.mu, "w": held.mu["w"].at[0].set(-20 * size[0])})
    state = write_moments(state, given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.06), read_moments(state).mu, given.mu)
    updates, _ = _run(tx, state, range(1), lambda g: jax.tree.map(jnp.zeros_like, g))
    expected = -20 * (0.09 / 0.19) / np.sqrt(0.000999 / 0.001999)  # what an average of one step loses in another
    np.testing.assert_allclose(updates["w"][0], expected, rtol=0.15)


@every_storage
def test_leaves_that_are_not_trained_are_passed_by(name: str):
    tx = adam_jax.scale_by_adam(**STORAGES[name])
    w, b = _gradients(1).values()
    params = {"a": w, "empty": jnp.zeros((0, 3)), "ids": jnp.arange(3), "none": None, "w": 2 * w, "z": b}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update({**params, "ids": np.zeros(3, jax.dtypes.float0)}, state)
    held = read_moments(state)
    again = read_moments(write_moments(state, held._replace(mu=jax.tree.map(lambda x: x, held.mu))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), held, again)
    np.testing.assert_allclose(jnp.abs(again.mu["w"]).mean(), 2 * jnp.abs(again.mu["a"]).mean(), rtol=0.02)
    for nothing in (tx.init({"ids": jnp.arange(3)}), tx.init({})):
        assert jax.tree.structure(write_moments(nothing, read_moments(nothing))) == jax.tree.structure(nothing)


@every_storage
def test_a_state_at_a_count_of_zero_is_read_as_empty(name: str):
    tx = adam_jax.scale_by_amsgrad(**STORAGES[name])
    _, state = _run(tx, tx.init(_gradients(0)), range(2))
    held = read_moments(state._replace(count=jnp.zeros([], jnp.int32)))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), (held.mu, held.nu, held.nu_max))


@every_storage
@pytest.mark.parametrize("make", [adam_jax.scale_by_adam, adam_jax.scale_by_amsgrad])
def test_second_moments_that_are_not_finite_show_in_their_own_elements_and_in_no_other(name: str, make: Any):
    tx = make(**STORAGES[name])
    _, state = _run(tx, tx.init(_gradients(0)), range(3))
    held = read_moments(state)
    spoilt = held.nu["w"].at[0, 0].set(jnp.nan).at[0, 1].set(jnp.inf)
    updates, _ = _run(tx, write_moments(state, held._replace(nu=dict(held.nu, w=spoilt))), range(3, 4))
    expected, _ = _run(tx, state, range(3, 4))
    assert np.isnan(updates["w"][0, :2]).all()
    np.testing.assert_allclose(updates["w"][1:], expected["w"][1:], atol=TOLERANCE[name])


@every_storage
@every_make
def test_cleared_elements_start_as_dense_float32_moments_cleared_alike(name: str, make: Any):
    dead = jnp.arange(SHAPE[0])[:, None] < 8

    def clear(tree: Any) -> Any:
        return None if tree is None else {**tree, "w": jnp.where(dead, 0.0, tree["w"])}

    updates = []
    for how in (STORAGES[name], {}):
        tx = make(**how)
        _, state = _run(tx, tx.init(_gradients(0)), range(8))
        held = read_moments(state)
        state = write_moments(state, held._replace(mu=clear(held.mu), nu=clear(held.nu), nu_max=clear(held.nu_max)))
        updates.append(_run(tx, state, range(8, 10))[0]["w"])
    narrow, wide = updates
    assert float(jnp.sqrt(jnp.mean((narrow - wide) ** 2) / jnp.mean(wide**2))) < TOLERANCE[name]
    assert float(jnp.abs(narrow[:8].mean() - wide[:8].mean())) < TOLERANCE[name]


@every_storage
def test_a_leaf_grows_and_shrinks_as_dense_float32_moments_do(name: str):
    updates = []
    for how in (STORAGES[name], {}):
        tx = adam_jax.scale_by_adam(**how)
        _, state = _run(tx, tx.init(_gradients(0)), range(8))
        held = read_moments(state)
        wider = {"w": ((0, 0), (0, 128)), "b": ((0, 0),)}
        grown = [
            jax.tree.map(jnp.pad, tree, wider, is_leaf=lambda x: isinstance(x, jax.Array)) for tree in (held.mu, held.nu)
        ]
        params = {"w": jnp.zeros((64, 256)), "b": jnp.zeros(3)}
        state = write_moments(tx.init(params), held._replace(mu=grown[0], nu=grown[1]))
        g = jax.tree.map(jnp.ones_like, params)
        updates.append(jax.jit(tx.update)(g, state)[0]["w"])
        held = read_moments(state)
        cut = [{**tree, "w": tree["w"][:, 128:]} for tree in (held.mu, held.nu)]
        small = write_moments(tx.init(_gradients(0)), held._replace(mu=cut[0], nu=cut[1]))
        assert all((x == 0).all() for x in jax.tree.leaves((read_moments(small).mu["w"], read_moments(small).nu["w"])))
    narrow, wide = updates
    np.testing.assert_allclose(narrow[:, 128:], wide[:, 128:], atol=TOLERANCE[name] * 3.2)  # steps of 3.16, one code
    assert float(jnp.sqrt(jnp.mean((narrow - wide) ** 2) / jnp.mean(wide**2))) < TOLERANCE[name]


def test_squares_can_be_written_as_roots_and_back():
    squares, roots = adam_jax.scale_by_adam(), adam_jax.scale_by_adam(storage="root")
    _, state = _run(squares, squares.init(_gradients(0)), range(4))
    held = read_moments(state)
    as_roots = write_moments(roots.init(_gradients(0)), held)
    np.testing.assert_allclose(read_moments(as_roots).nu["w"] ** 2, held.nu["w"], rtol=3e-7)
    u, _ = _run(squares, state, range(4, 5))
    v, _ = _run(roots, as_roots, range(4, 5))
    np.testing.assert_allclose(u["w"], v["w"], rtol=1e-6)


@every_storage
def test_moments_of_any_storage_can_be_written_into_any_other(name: str):
    for other in ("float32", "root", "int8"):
        one, two = adam_jax.scale_by_adam(**STORAGES[name]), adam_jax.scale_by_adam(**STORAGES[other])
        _, state = _run(one, one.init(_gradients(0)), range(4), lambda g: jax.tree.map(lambda x: 1e3 * x, g))
        moved = write_moments(two.init(_gradients(0)), _spread(read_moments(state)))
        u, _ = _run(one, write_moments(state, _spread(read_moments(state))), range(4, 5))
        v, _ = _run(two, moved, range(4, 5))
        narrow = {name, other} - {"float32", "root"}
        np.testing.assert_allclose(u["w"], v["w"], rtol=0.15 if narrow else 2e-6, atol=0.1 if narrow else 0)


def _spread(held: Any) -> Any:
    """First moments of one row ten times as large, a ratio beyond that of the decays."""
    return held._replace(mu={**held.mu, "w": held.mu["w"].at[3].mul(10.0)})


def test_what_does_not_fit_is_refused_with_the_leaf():
    tx = adam_jax.scale_by_adam()
    state = tx.init(_gradients(0))
    held = read_moments(state)
    with pytest.raises(ValueError, match=r"mu must have the state's shape \(64, 128\) at \['w'\], got \(2,\)"):
        write_moments(state, held._replace(mu={**held.mu, "w": jnp.zeros(2)}))
    with pytest.raises(ValueError, match="nu must be a tree like the state's"):
        write_moments(state, held._replace(nu=None))
    with pytest.raises(ValueError, match="mu must be a tree like the state's"):
        write_moments(state, held._replace(mu=held.mu["w"]))
    with pytest.raises(ValueError, match="moments must be of the norm that the state has"):
        write_moments(state, held._replace(form=norms.Maxima()))
    with pytest.raises(ValueError, match="state must hold a ScaleByAdamState or ScaleByAmsgradState, got none"):
        read_moments(optax.sgd(1.0).init(_gradients(0)))


@every_storage
def test_a_restarted_state_is_a_fresh_one_whatever_it_holds(name: str):
    tx = (adam_jax.scale_by_amsgrad if name == "int8" else adam_jax.scale_by_adam)(**STORAGES[name])
    fresh = tx.init(_gradients(0))
    _, used = _run(tx, fresh, range(4), lambda g: jax.tree.map(lambda x: 1e3 * x, g))
    steps = []
    for state in (fresh, restart(used)):  # one leaf has its first gradient later
        _, state = _run(tx, state, range(9, 10), lambda g: {**g, "b": None})
        steps.append(_run(tx, state, range(10, 12)))
    jax.tree.map(np.testing.assert_array_equal, *steps)


INSIDE = {
    "chain": lambda: adam_jax.adam(0.1),
    "in_float32": lambda: adam_jax.in_float32(adam_jax.adam(0.1)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adam_jax.adam, hyperparam_dtype=jnp.float32)(0.1),
    "MultiSteps": lambda: optax.MultiSteps(adam_jax.adam(0.1), 1).gradient_transformation(),
    "skip_nonfinite": lambda: adam_jax.skip_nonfinite(adam_jax.adam(0.1)),
    "partition": lambda: optax.partition({"all": adam_jax.adam(0.1)}, "all"),
    "raw": lambda: optax.chain(
        adam_jax.scale_by_adam(bias_correction=False), adam_jax.scale_by_bias_correction(0.9, 0.999), optax.scale(-0.1)
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_adam_is_restarted_inside_any_wrapper(name: str):
    tx, params, g = optax.with_extra_args_support(INSIDE[name]()), {"w": jnp.ones(2)}, {"w": jnp.full(2, 5.0)}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(jax.tree.map(jnp.negative, g), state, params)
    updates, _ = tx.update(g, jax.jit(restart)(state), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)


def test_a_restart_leaves_schedules_and_averages_alone_and_can_choose():
    def one() -> Any:
        return optax.chain(adam_jax.adam(optax.linear_schedule(1.0, 0.0, 10)), adam_jax.average_params(0.5))

    tx, params = optax.named_chain(("first", one()), ("second", one())), {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(5):
        _, state = tx.update(params, state, params)
    new = restart(state, where="'second'")
    assert (read_moments(new, where="'first'").count, read_moments(new, where="'second'").count) == (5, 0)
    assert [int(x) for x in jax.tree.leaves(new["second"]) if x.dtype == jnp.int32] == [0, 5, 5]
    with pytest.raises(ValueError, match=r"where must be part of the path of a ScaleByAdamState .*'first'.*, got 'third'"):
        restart(state, where="third")
    with pytest.raises(ValueError, match=r"state must hold a ScaleByAdamState or .*, got none: pass the state of a chain"):
        restart(optax.adam(1.0).init(params))


def test_moments_of_one_of_two_adams_are_read_and_written_by_where():
    tx, params = optax.named_chain(("a", adam_jax.adam(0.1)), ("b", adam_jax.adam(0.1))), {"w": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params)
    held = read_moments(state, where="'a'")
    new = write_moments(state, held._replace(mu=jax.tree.map(jnp.zeros_like, held.mu)), where="'a'")
    assert (read_moments(new, where="'a'").mu["w"] == 0).all()
    assert (read_moments(new, where="'b'").mu["w"] != 0).all()
    with pytest.raises(ValueError, match=r"state holds 2 ScaleByAdamStates: choose one with where=, part of one of .*'a'"):
        read_moments(state)
