"""Low-precision weights beside the rest of a chain: wrappers, groups, shardings, other leaves, and what is said."""

import contextlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adam_jax

RESIDUALS = (0, 8, 16)
as_they_are = optax.identity()  # inside in_float32: the gradients are the updates


def _step(tx):
    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _run(tx, params, gradients, state=None):
    """The params and the state after one step for each gradient, in one compiled loop."""
    state = tx.init(params) if state is None else state

    @jax.jit
    def run(params, state):
        def body(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, state), gradients)[0]

    return run(params, state)


def _patterns(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def _weights(dtype=jnp.bfloat16, shape=(4096,), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)


def _gradients(steps, shape=(4096,), seed=1):
    """Gradients with a constant part and noise, differently scaled in each coordinate; float32."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=shape))
    return jnp.asarray(scale * (1 + rng.normal(size=(steps, *shape))), jnp.float32)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_leaves_of_float32_and_untrained_leaves_pass_through(residual):
    params = {"w": jnp.ones(3, jnp.bfloat16), "scale": jnp.ones(3), "steps": jnp.array(3), "none": None, "number": 2.0}
    gradients = {
        "w": jnp.ones(3, jnp.bfloat16),
        "scale": jnp.ones(3),
        "steps": np.zeros((), jax.dtypes.float0),
        "none": None,
        "number": jnp.float32(1),
    }
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    updates: Any = jax.jit(tx.update)(gradients, tx.init(params), params)[0]
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["scale"], jnp.full(3, -1e-3))
    assert updates["none"] is None


@pytest.mark.parametrize("residual", [0, 8])
def test_rounding_is_the_same_on_one_device_and_on_any_sharding_of_eight(residual):
    params = {"a": _weights(shape=(16, 24)), "b": _weights(shape=(8,), seed=3)}
    gradients = {"a": _gradients(1, shape=(16, 24))[0], "b": _gradients(1, shape=(8,))[0]}
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)

    def run(params, gradients):
        step, state = _step(tx), jax.jit(tx.init)(params)
        for _ in range(3):
            params, state = step(params, state, gradients)
        return params

    expected = run(params, gradients)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    shardings = {"a": NamedSharding(mesh, PartitionSpec("y", "x")), "b": NamedSharding(mesh, PartitionSpec(("x", "y")))}
    sharded = run(jax.device_put(params, shardings), jax.device_put(gradients, shardings))
    assert sharded["a"].sharding.is_equivalent_to(shardings["a"], 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_patterns(a), _patterns(b)), sharded, expected)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_inside_shard_map_shards_of_weights_are_refused_where_they_are_rounded_at_random(residual):
    tx, params = adam_jax.in_float32(as_they_are, residual), jnp.ones(64, jnp.bfloat16)
    mesh, state = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), tx.init(params)
    specs = jax.tree.map(lambda leaf: PartitionSpec(*"x"[: leaf.ndim]), state)
    step = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(PartitionSpec("x"), specs, PartitionSpec("x")), out_specs=(PartitionSpec("x"), specs)
    )
    with contextlib.nullcontext() if residual == 16 else pytest.raises(ValueError, match="must be whole for unbiased"):
        jax.eval_shape(step, params, state, params)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_optax_wrappers_around_a_rounding_chain_work(residual):
    params, nan = _weights(), jnp.full(4096, jnp.nan, jnp.bfloat16)
    g = _gradients(1)[0].astype(jnp.bfloat16)

    def make(learning_rate):
        return adam_jax.in_float32(optax.adam(learning_rate), residual)

    skipping = adam_jax.in_float32(optax.apply_if_finite(optax.adam(1e-2), 3), residual)
    step, state = _step(skipping), skipping.init(params)
    after, state = step(params, state, nan)
    np.testing.assert_array_equal(after, params)
    after, state = step(after, state, g)
    direct = make(1e-2)
    expected, _ = _step(direct)(params, direct.init(params), g)
    counted: Any = direct.init(params)
    counted = counted._replace(count=jnp.int32(1))  # the rounding has counted the skipped step
    np.testing.assert_array_equal(after, _step(direct)(params, counted, g)[0])

    injected = adam_jax.in_float32(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), residual)
    moved, _ = _step(injected)(params, injected.init(params), g)
    # the learning rate is an array there, and XLA multiplies by it in another order: one unit in the last place of float32
    assert (np.asarray(moved) != np.asarray(expected)).sum() <= 4

    masked = optax.masked(make(1e-2), {"w": True, "frozen": False})
    tree = {"w": params, "frozen": params}
    moved, state = _step(masked)(tree, masked.init(tree), {"w": g, "frozen": jnp.zeros_like(g)})
    np.testing.assert_array_equal(moved["frozen"], params)
    assert (np.asarray(moved["w"]) != np.asarray(params)).any()
    if residual:
        masters = adam_jax.master_params(state, moved)
        assert masters["w"].dtype == jnp.float32
        assert masters["frozen"].dtype == jnp.bfloat16
        again, _ = adam_jax.set_master_params(state, masters)
        np.testing.assert_array_equal(again["w"], moved["w"])

    accumulating = adam_jax.in_float32(optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), residual)
    state = accumulating.init(params)
    half, state = _step(accumulating)(params, state, g)
    np.testing.assert_array_equal(half, params)
    whole, _ = _step(accumulating)(half, state, g)
    assert np.abs(np.asarray(whole, np.float32) - np.asarray(expected, np.float32)).max() <= 2.0**-5


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_skipped_step_leaves_weights_and_state_bit_for_bit(residual):
    params, g = _weights(), _gradients(1)[0].astype(jnp.bfloat16)
    rounded = adam_jax.in_float32(adam_jax.adamw(1e-3), residual)
    step = _step(adam_jax.skip_nonfinite(rounded))
    first, state = step(params, adam_jax.skip_nonfinite(rounded).init(params), g)
    second, skipped = step(first, state, g.at[0].set(jnp.nan))
    np.testing.assert_array_equal(_patterns(second), _patterns(first))
    jax.tree.map(np.testing.assert_array_equal, skipped.inner_state, state.inner_state)
    assert int(skipped.total) == 1


@pytest.mark.parametrize("residual", RESIDUALS)
def test_states_keep_their_types_and_start_from_shapes(residual):
    params = {"w": _weights(), "scale": jnp.ones(3)}
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    state = tx.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tx.init(shapes)) == types
    _, new = _step(tx)(params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), new) == types


def test_errors_say_what_is_wrong():
    params = {"w": jnp.ones(2, jnp.float16)}
    with pytest.raises(ValueError, match=r"residual must be 0, 8 or 16, .* got 4"):
        adam_jax.in_float32(as_they_are, 4)
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 0\.5"):
        adam_jax.in_float32(as_they_are, seed=0.5)
    with pytest.raises(ValueError, match=r"with a residual needs weights of bfloat16, .* got float16 at \['w'\]"):
        adam_jax.in_float32(as_they_are, 16).init(params)
    with pytest.raises(ValueError, match=r"weights of bfloat16 or float16, .* got float8_e5m2 at \['w'\]"):
        adam_jax.in_float32(as_they_are).init({"w": jnp.ones(2, jnp.float8_e5m2)})
    tx = adam_jax.in_float32(as_they_are)
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"must keep a residual, .* without one, cast the masters"):
        adam_jax.set_master_params(tx.init(params), params)
    narrow = {"w": jnp.ones(2, jnp.bfloat16)}
    wide = {"w": jnp.ones(2, jnp.float32)}  # what eqx.apply_updates would make of them
    tx = adam_jax.in_float32(as_they_are, 16)
    with pytest.raises(ValueError, match=r"param at \['w'\] is float32, but was not at init: .* optax.apply_updates"):
        tx.update(wide, tx.init(narrow), wide)
    with pytest.raises(ValueError, match=r"the param at \['w'\] is bfloat16, but was not at init"):
        tx.update(wide, tx.init(wide), narrow)
    with pytest.raises(ValueError, match="must hold an InFloat32State, got none: train with in_float32"):
        adam_jax.master_params(optax.adam(1.0).init(narrow), narrow)
    with pytest.raises(ValueError, match=r"masters must be float32 of shape \(2,\) at \['w'\], got bfloat16"):
        adam_jax.set_master_params(tx.init(narrow), narrow)
    with pytest.raises(ValueError, match=r"must be float32 of shape \(2,\) at \['w'\], got float32 of shape \(1, 2\)"):
        adam_jax.set_master_params(tx.init(narrow), {"w": jnp.ones((1, 2))})


def test_weights_that_a_mask_leaves_out_are_their_own_masters():
    params = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(2, jnp.bfloat16)}
    state = optax.masked(adam_jax.in_float32(as_they_are, 16), {"w": True, "v": False}).init(params)
    masters = adam_jax.master_params(state, params)
    assert (masters["w"].dtype, masters["v"].dtype) == (jnp.float32, jnp.bfloat16)
    masters["w"] = masters["w"] + 2**-20
    params, state = adam_jax.set_master_params(state, masters)
    assert (params["w"].dtype, params["v"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, adam_jax.master_params(state, params), masters)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_difference_and_the_bits_survive_in_exported_gpu_and_tpu_lowerings(residual):
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    params = jnp.ones(8, jnp.bfloat16)
    state = tx.init(params)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for platform in ("cuda", "tpu"):
        text = jax.export.export(jax.jit(step), platforms=[platform])(params, state, params).mlir_module()
        for operation in ("stablehlo.subtract", "stablehlo.bitcast_convert", "stablehlo.shift_right_logical"):
            assert operation in text
        last_add = [line for line in text.splitlines() if "stablehlo.add" in line and "tensor<8xf32>" in line][-1]
        assert "bf16" not in last_add  # p + u is a float32 sum


def test_averages_inside_are_of_the_float32_weights_and_outside_of_the_rounded_ones():
    params, gradients = _weights(), _gradients(200)
    averaging = optax.chain(adam_jax.adam(1e-5), adam_jax.average_params(0.99))
    wide, state = _run(averaging, params.astype(jnp.float32), gradients)
    expected = adam_jax.averaged_params(state, wide)
    for residual, tolerance in ((16, 0.0), (8, 1e-4), (0, 5e-3)):  # without a residual the weights are off by so much
        narrow, state = _run(adam_jax.in_float32(averaging, residual), params, gradients)
        average = adam_jax.averaged_params(state, adam_jax.master_params(state, narrow))
        assert average.dtype == jnp.float32
        assert np.abs(np.asarray(average) - np.asarray(expected)).mean() <= tolerance
    outside = optax.chain(adam_jax.in_float32(adam_jax.adam(1e-5), 16), adam_jax.average_params(0.99))
    narrow, state = _run(outside, params, gradients)
    average = adam_jax.averaged_params(state, adam_jax.master_params(state, narrow))
    assert np.abs(np.asarray(average) - np.asarray(expected)).mean() > 2e-4


@pytest.mark.parametrize("residual", [8, 16])
def test_where_says_which_of_several_states_is_meant(residual):
    params = {"w": _weights(), "b": _weights(shape=(64,))}
    groups = {
        "slow": adam_jax.in_float32(adam_jax.adam(1e-5), residual),
        "fast": adam_jax.in_float32(optax.sgd(1e-4), residual),
    }
    tx = optax.partition(groups, {"w": "slow", "b": "fast"})
    moved, state = _run(tx, params, {"w": _gradients(20), "b": _gradients(20, (64,))})
    with pytest.raises(ValueError, match=r"state holds 2 InFloat32States: choose one with where=.*'fast'.*'slow'"):
        adam_jax.master_params(state, moved)
    with pytest.raises(ValueError, match="got 'medium'"):
        adam_jax.set_master_params(state, moved, where="medium")
    slow = adam_jax.master_params(state, moved, where="slow")
    assert (slow["w"].dtype, slow["b"].dtype) == (jnp.float32, jnp.bfloat16)
    again, new = adam_jax.set_master_params(state, jax.tree.map(lambda p: 2 * p, slow), where="slow")
    np.testing.assert_array_equal(adam_jax.master_params(new, again, where="slow")["w"], 2 * slow["w"])
    np.testing.assert_array_equal(
        adam_jax.master_params(new, moved, where="fast")["b"], adam_jax.master_params(state, moved, where="fast")["b"]
    )


@pytest.mark.parametrize("residual", RESIDUALS)
def test_accumulated_gradients_outside_move_weights_at_every_other_step(residual):
    params, g = _weights(), _gradients(1)[0].astype(jnp.bfloat16)
    tx = optax.MultiSteps(adam_jax.in_float32(adam_jax.adam(1e-2), residual), 2).gradient_transformation()
    half, state = _step(tx)(params, tx.init(params), g)
    np.testing.assert_array_equal(_patterns(half), _patterns(params))
    whole, state = _step(tx)(half, state, g)
    once = adam_jax.in_float32(adam_jax.adam(1e-2), residual)
    expected, _ = _step(once)(params, once.init(params), g)
    np.testing.assert_array_equal(_patterns(whole), _patterns(expected))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("x64", [False, True])
def test_strict_promotion_and_64_bits_change_nothing(residual, x64):
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(x64):
        params = {"w": _weights(), "scale": jnp.ones(3), "key": jax.random.key(0), "steps": jnp.array(3)}
        none = np.zeros((), jax.dtypes.float0)
        gradients = {"w": params["w"], "scale": jnp.ones(3), "key": none, "steps": none}
        tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
        updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
        assert updates["w"].dtype == jnp.float32
        assert updates["scale"].dtype == params["scale"].dtype
        moved = {name: (params[name].astype(updates[name].dtype) + updates[name]) for name in ("w", "scale")}
        moved = {"key": params["key"], "steps": params["steps"] + updates["steps"]} | moved
        moved["w"] = moved["w"].astype(jnp.bfloat16)
        assert int(moved["steps"]) == 3
        masters = adam_jax.master_params(state, moved)
        drift = masters["w"] - params["w"].astype(jnp.float32) + 1e-3 * jnp.sign(params["w"]).astype(jnp.float32)
        assert abs(float(drift.mean())) < 1e-4
        if residual:
            np.testing.assert_array_equal(
                _patterns(adam_jax.set_master_params(state, masters)[0]["w"]), _patterns(moved["w"])
            )


@pytest.mark.parametrize("residual", RESIDUALS)
def test_optax_maps_states_with_more_trees(residual):
    params = {"w": _weights(), "b": jnp.ones(3), "steps": jnp.array(3)}
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    state = tx.init(params)
    names = {"w": "of w", "b": "of b", "steps": "of steps"}
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf, name: (leaf.shape, name), state, names)
    assert mapped.residual == (
        None if residual == 0 else {"w": ((4096,), "of w"), "b": ((), "of b"), "steps": ((), "of steps")}
    )
