"""Low-precision weights that still learn."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax import rounding

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


def _sums(dtype):
    """All weights of a dtype with updates of every relation to them; these and the sums are zero or from 3e-36 to 1e38."""
    rng = np.random.default_rng(0)
    p = np.arange(2**16, dtype=np.uint16).view(dtype)
    p = p[_is_inside(p)]
    wide = p.astype(np.float32)
    exponents = [-60, -30, -24, -20, -17, -16, -12, -9, -8, -4, -1, 0, 1, 4, 9, 16, 17, 24, 30]
    multiples = [-(2**17), -300, -3, -2, -1, 0, 2, 4, 6, 300, 2**12, 2**15, 2**17]
    with np.errstate(over="ignore", under="ignore"):
        near = [np.ldexp(wide * rng.normal(size=wide.shape).astype(np.float32), e) for e in exponents]
        cancel = [-wide * np.float32(1 + k * 2.0**-24) for k in multiples]
        u = np.stack([*near, *cancel, -np.nextafter(wide, np.float32(0)), -np.nextafter(wide, np.float32(np.inf))])
        sums = wide + u
    u = np.where(_is_inside(u) & _is_inside(sums), u, np.float32(0))
    return jnp.asarray(np.broadcast_to(p, u.shape)), jnp.asarray(u)


def _is_inside(x):
    with np.errstate(invalid="ignore"):
        size = np.abs(x.astype(np.float32))
    return (size == 0) | ((size >= 2.0**-118) & (size < min(1e38, float(jnp.finfo(x.dtype).max))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_apply_updates_lands_on_the_weight_that_the_rounding_chose(dtype):
    p, u = _sums(dtype)
    tx = adam_jax.in_float32(as_they_are)
    moved, _ = _step(tx)(p, tx.init(p), u)
    draws = rounding.draws(p.shape, rounding.stream(0, ""), 0)
    total, rest = jax.jit(rounding.two_sum)(p.astype(jnp.float32), u)
    chosen = jax.jit(rounding.round_to, static_argnums=1)(total, dtype, draws, rest)
    np.testing.assert_array_equal(np.asarray(moved).astype(np.float32), chosen)


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0xFFFF])
def test_weight_and_residual_are_the_float32_sum_whatever_the_weight_and_the_update(low):
    p, u = _sums(jnp.bfloat16)
    masters = jnp.asarray((np.asarray(p).view(np.uint16).astype(np.uint32) << 16 | low).view(np.float32))
    masters = jnp.where(jnp.abs(masters) < 2.0**-118, 0.0, masters)
    u = jnp.where(_is_inside(np.asarray(masters) + np.asarray(u)), u, 0.0)
    tx = adam_jax.in_float32(as_they_are, 16)
    weight, state = adam_jax.set_master_params(tx.init(p), masters)
    moved, state = _step(tx)(weight, state, u)
    expected = jax.jit(jnp.add)(masters, u)
    np.testing.assert_array_equal(moved, rounding.split(expected, 16)[0])
    np.testing.assert_array_equal(adam_jax.master_params(state, moved), expected)


def _weights(dtype=jnp.bfloat16, shape=(4096,), seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)


def _gradients(steps, shape=(4096,), seed=1):
    """Gradients with a constant part and noise, differently scaled in each coordinate; float32."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=shape))
    return jnp.asarray(scale * (1 + rng.normal(size=(steps, *shape))), jnp.float32)


@pytest.mark.parametrize("rate", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("residual", "dtype"), [(0, jnp.bfloat16), (0, jnp.float16), (8, jnp.bfloat16)])
def test_weights_move_as_far_as_float32_weights(residual, dtype, rate):
    params, gradients = _weights(dtype), jnp.ones((1000, 4096), jnp.float32)
    start = np.asarray(params).astype(np.float32)
    wide, _ = _run(adam_jax.adam(rate), jnp.asarray(start), gradients)
    narrow, _ = _run(adam_jax.in_float32(adam_jax.adam(rate), residual), params, gradients)
    ratio = (np.asarray(narrow).astype(np.float32) - start).mean() / (np.asarray(wide) - start).mean()
    assert abs(ratio - 1) < 0.02
    if dtype == jnp.bfloat16 and rate == 1e-4:
        plain, _ = _run(optax.adam(rate), params, gradients.astype(dtype))
        assert abs((np.asarray(plain).astype(np.float32) - start).mean()) < 0.1 * abs((np.asarray(wide) - start).mean())


RUNS = {
    "ours": lambda: adam_jax.adam(1e-3),
    "optax": lambda: optax.adam(1e-3),
    "schedule": lambda: adam_jax.adam(optax.cosine_decay_schedule(1e-2, 300)),
    "clip and decay": lambda: optax.chain(
        adam_jax.clip_by_global_norm(1.0), adam_jax.adamw(optax.linear_schedule(1e-2, 0.0, 300), weight_decay=0.3)
    ),
    "optax adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.3)),
    "lamb": lambda: optax.lamb(1e-2),
}


@pytest.mark.parametrize("name", RUNS)
def test_sixteen_bits_of_residual_are_the_float32_run_bit_for_bit(name):
    masters, gradients = {"w": _weights(jnp.float32), "b": _weights(jnp.float32, (64,), 5)}, _gradients(300)
    gradients = {"w": gradients, "b": gradients[:, :64]}
    wide, _ = _run(RUNS[name](), masters, gradients)
    tx = adam_jax.in_float32(RUNS[name](), 16)
    params, state = adam_jax.set_master_params(tx.init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), masters)), masters)
    params, state = _run(tx, params, gradients, state)
    joined = adam_jax.master_params(state, params)
    for leaf in ("w", "b"):
        np.testing.assert_array_equal(_patterns(joined[leaf]), _patterns(wide[leaf]))
        np.testing.assert_array_equal(_patterns(params[leaf]), _patterns(rounding.split(wide[leaf], 16)[0]))


def test_bfloat16_gradients_are_computed_with_as_if_they_were_float32():
    params, gradients = _weights(), _gradients(100).astype(jnp.bfloat16)
    wide, _ = _run(optax.adam(1e-3), params.astype(jnp.float32), gradients.astype(jnp.float32))
    narrow, state = _run(adam_jax.in_float32(optax.adam(1e-3), 16), params, gradients)
    np.testing.assert_array_equal(_patterns(adam_jax.master_params(state, narrow)), _patterns(wide))


def test_24_bit_weights_stay_within_5_percent_of_the_path_of_float32_weights():
    params, gradients = _weights(), _gradients(1000)
    wide, _ = _run(adam_jax.adam(1e-3), params.astype(jnp.float32), gradients)
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), 8)
    narrow, state = _run(tx, params, gradients)
    distance = np.abs(np.asarray(adam_jax.master_params(state, narrow)) - np.asarray(wide)).mean()
    path = np.abs(np.asarray(wide) - np.asarray(params).astype(np.float32)).mean()
    assert distance < 0.05 * path


def test_starting_from_float32_weights_keeps_24_bits_of_them():
    masters = _weights(jnp.float32)
    tx = adam_jax.in_float32(as_they_are, 8)
    params, state = adam_jax.set_master_params(tx.init(masters.astype(jnp.bfloat16)), masters)
    error = np.abs(np.asarray(adam_jax.master_params(state, params)) - np.asarray(masters))
    assert (error <= 2.0**-16 * np.abs(np.asarray(masters))).all()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_weight_decay_far_below_half_a_unit_acts(residual):
    params = jnp.full(4096, 1.5, jnp.bfloat16)  # spacing 1/128; the decay is 1.5e-5 a step
    gradients = jnp.zeros((1000, 4096), jnp.bfloat16)
    narrow, state = _run(adam_jax.in_float32(optax.adamw(1e-4, weight_decay=0.1), residual), params, gradients)
    shrunk = np.log(np.asarray(adam_jax.master_params(state, narrow)).astype(np.float64).mean() / 1.5)
    assert abs(shrunk + 1e-2) < 0.02 * 1e-2  # without a residual: 4096 weights, half a step each
    plain, _ = _run(optax.adamw(1e-4, weight_decay=0.1), params, gradients)
    np.testing.assert_array_equal(plain, params)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_infinities_and_nan_pass_through_and_other_weights_go_on(residual):
    params = jnp.array([1.0, jnp.inf, -jnp.inf, jnp.nan, 1.0, 1.0, 1.0], jnp.bfloat16)
    updates = jnp.array([0.5, 1.0, 1.0, 1.0, jnp.inf, jnp.nan, -jnp.inf], jnp.float32)
    expected = np.array([1.5, np.inf, -np.inf, np.nan, np.inf, np.nan, -np.inf], np.float32)
    tx = adam_jax.in_float32(as_they_are, residual)
    step = _step(tx)
    moved, state = step(params, tx.init(params), updates)
    np.testing.assert_array_equal(moved.astype(jnp.float32), expected)
    moved, _ = step(moved, state, jnp.zeros(7))
    np.testing.assert_array_equal(moved.astype(jnp.float32), expected)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_leaves_of_float32_and_untrained_leaves_pass_through(residual):
    params = {"w": jnp.ones(3, jnp.bfloat16), "scale": jnp.ones(3), "steps": jnp.array(3), "none": None}
    gradients = {
        "w": jnp.ones(3, jnp.bfloat16),
        "scale": jnp.ones(3),
        "steps": np.zeros((), jax.dtypes.float0),
        "none": None,
    }
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    updates: Any = jax.jit(tx.update)(gradients, tx.init(params), params)[0]
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["scale"], jnp.full(3, -1e-3))
    assert updates["none"] is None


@pytest.mark.parametrize("residual", RESIDUALS)
def test_an_update_of_zero_changes_no_weight(residual):
    params = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    tx = adam_jax.in_float32(as_they_are, residual)
    moved, _ = _step(tx)(params, tx.init(params), jnp.full(2**16, -0.0))
    wide = params.astype(np.float32)
    normal = (np.abs(wide) >= 2.0**-126) | (wide == 0)  # XLA flushes subnormal numbers on CPU
    np.testing.assert_array_equal(_patterns(moved)[normal], _patterns(params)[normal])


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


def test_rounding_does_not_depend_on_the_other_leaves_and_does_on_the_seed():
    w, g = _weights(), jnp.full(4096, -1e-3)

    def moved(params, updates, seed=0):
        tx = adam_jax.in_float32(as_they_are, seed=seed)
        return _step(tx)(params, tx.init(params), updates)[0]

    alone = moved({"w": w}, {"w": g})["w"]
    np.testing.assert_array_equal(moved({"a": w, "w": w}, {"a": g, "w": g})["w"], alone)
    assert (np.asarray(moved({"w": w}, {"w": g}, 1)["w"]) != np.asarray(alone)).any()
    np.testing.assert_array_equal(moved({"w": w}, {"w": g}, jnp.int32(0))["w"], alone)


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


@pytest.mark.parametrize(("residual", "most"), [(0, 4.1), (8, 5.1), (16, 6.1)])
def test_weights_and_int8_moments_take_four_to_six_bytes_a_parameter(residual, most):
    tx = adam_jax.in_float32(adam_jax.adam(1e-3, mu_dtype="int8", nu_dtype="int8"), residual)
    params = jax.ShapeDtypeStruct((2**16,), jnp.bfloat16)
    leaves = jax.tree.leaves((params, jax.eval_shape(tx.init, params)))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**16 <= most


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
def test_states_keep_their_types_start_from_shapes_and_are_mapped_by_optax(residual):
    params = {"w": _weights(), "scale": jnp.ones(3)}
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    state = tx.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tx.init(shapes)) == types
    _, new = _step(tx)(params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), new) == types

    def like_its_param(leaf, param):
        return leaf is None or leaf.shape == param.shape

    # a residual is None where the param is float32, hence is_leaf
    mapped = optax.tree_utils.tree_map_params(
        tx, like_its_param, state, params, transform_non_params=lambda _: True, is_leaf=lambda leaf: leaf is None
    )
    assert all(jax.tree.leaves(mapped))


def test_errors_say_what_is_wrong():
    params = {"w": jnp.ones(2, jnp.float16)}
    with pytest.raises(ValueError, match=r"residual must be 0, 8 or 16, .* got 4"):
        adam_jax.in_float32(as_they_are, 4)
    with pytest.raises(ValueError, match=r"seed must be an integer, got 0.5"):
        adam_jax.in_float32(as_they_are, seed=0.5)
    with pytest.raises(ValueError, match=r"with a residual needs weights of bfloat16, .* got float16 at \['w'\]"):
        adam_jax.in_float32(as_they_are, 16).init(params)
    with pytest.raises(ValueError, match=r"weights of bfloat16 or float16, .* got float8_e5m2 at \['w'\]"):
        adam_jax.in_float32(as_they_are).init({"w": jnp.ones(2, jnp.float8_e5m2)})
    tx = adam_jax.in_float32(as_they_are)
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="must keep a residual, .* without one, cast the masters"):
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


@pytest.mark.parametrize(("residual", "dtype"), [(0, jnp.bfloat16), (0, jnp.float16), (8, jnp.bfloat16)])
def test_updates_down_to_a_twenty_millionth_of_a_weight_act_as_they_should(residual, dtype):
    rates = np.array([1e-6, -1e-6, 1e-7, -1e-7, 5e-8, -5e-8])  # the last are below half a unit of float32
    start = jnp.concatenate([_weights(dtype, (6144,)), jnp.ones(2048, dtype)])
    params = jnp.tile(start, (len(rates), 1))
    wide = np.asarray(params).astype(np.float64)
    tx, u = adam_jax.in_float32(as_they_are, residual), jnp.asarray(wide * rates[:, None], jnp.float32)

    @jax.jit
    def run(params, state):
        def body(_, carry):
            updates, state = tx.update(u, carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, 10_000, body, (params, state))

    moved, state = run(params, tx.init(params))
    moved = np.asarray(adam_jax.master_params(state, moved)).astype(np.float64)
    ratio = ((moved - wide) / wide).mean(1) / (10_000 * rates)
    # four deviations of as many independent draws, which are fewer the coarser the grid
    np.testing.assert_allclose(ratio, 1, atol=4 * (10_000 * 8192 * 2.0**7 * 5e-8) ** -0.5)
    np.testing.assert_allclose(ratio[:2], 1, atol=0.02)


@pytest.mark.parametrize("period", [89, 144, 233, 256])
def test_a_weight_that_moves_once_in_a_while_is_rounded_without_resonance(period):
    params = jnp.full(2048, 1.5, jnp.bfloat16)  # a spacing of 2^-7
    tx = adam_jax.in_float32(as_they_are)

    @jax.jit
    def run(params, state):
        def body(carry, t):
            u = jnp.full(2048, jnp.where(t % period == 0, 0.2 * 2.0**-7, 0.0))
            updates, state = tx.update(u, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, state), jnp.arange(64 * period))[0][0]

    units = (np.asarray(run(params, tx.init(params))).astype(np.float64) - 1.5) * 2.0**7
    independent = (64 * 0.2 * 0.8) ** 0.5
    assert np.sqrt(((units - 64 * 0.2) ** 2).mean()) < 1.15 * independent
    assert np.abs(units - 64 * 0.2).max() < 6 * independent


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_count_wraps_and_the_weights_go_on(residual):
    params = _weights()
    tx = adam_jax.in_float32(as_they_are, residual)
    state = tx.init(params)._replace(count=jnp.int32(2**31 - 2))
    start = np.asarray(params).astype(np.float64)
    moved, state = _run(tx, params, jnp.full((400, 4096), 1e-4), state)
    assert int(state.count) == -(2**31) + 398
    assert abs((np.asarray(adam_jax.master_params(state, moved)) - start).mean() / 0.04 - 1) < 0.02


@pytest.mark.parametrize("residual", RESIDUALS)
def test_derivatives_are_those_of_the_mean_of_the_rounding(residual):
    params, gradients = _weights(), _gradients(5)

    def last(rate, params, dtype):
        tx = adam_jax.in_float32(optax.sgd(rate), residual)
        params, state = params.astype(dtype), tx.init(params.astype(dtype))
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params.astype(jnp.float32)

    tangents = [jax.jvp(lambda r, d=dtype: last(r, params, d), (1e-3,), (1.0,))[1] for dtype in (jnp.bfloat16, jnp.float32)]
    np.testing.assert_allclose(*tangents, rtol=2.0**-6, atol=2.0**-7 * np.abs(gradients).max())  # tangents are bfloat16
    slope = jax.jit(jax.grad(lambda p: (last(1e-3, p, jnp.bfloat16) ** 2).sum()))(params)
    np.testing.assert_allclose(slope.astype(jnp.float32), 2 * last(1e-3, params, jnp.bfloat16), rtol=2.0**-7)


def test_averages_inside_are_of_the_float32_weights_and_outside_of_the_rounded_ones():
    params, gradients = _weights(), _gradients(200)
    averaging = optax.chain(adam_jax.adam(1e-3), adam_jax.average_params(0.99))
    wide, state = _run(averaging, params.astype(jnp.float32), gradients)
    expected = adam_jax.averaged_params(state, wide)
    for residual, tolerance in ((16, 0.0), (8, 1e-4), (0, 2e-3)):
        narrow, state = _run(adam_jax.in_float32(averaging, residual), params, gradients)
        average = adam_jax.averaged_params(state, adam_jax.master_params(state, narrow))
        assert average.dtype == jnp.float32
        assert np.abs(np.asarray(average) - np.asarray(expected)).mean() <= tolerance
    outside = optax.chain(adam_jax.in_float32(adam_jax.adam(1e-3), 16), adam_jax.average_params(0.99))
    narrow, state = _run(outside, params, gradients)
    average = adam_jax.averaged_params(state, adam_jax.master_params(state, narrow))
    assert np.abs(np.asarray(average) - np.asarray(expected)).mean() > 1e-4


@pytest.mark.parametrize("residual", [8, 16])
def test_where_says_which_of_several_states_is_meant(residual):
    params = {"w": _weights(), "b": _weights(shape=(64,))}
    groups = {
        "slow": adam_jax.in_float32(adam_jax.adam(1e-5), residual),
        "fast": adam_jax.in_float32(optax.sgd(1e-4), residual),
    }
    tx = optax.partition(groups, {"w": "slow", "b": "fast"})
    moved, state = _run(tx, params, {"w": _gradients(20), "b": _gradients(20, (64,))})
    with pytest.raises(ValueError, match=r"where must be .* got None; there are .*'fast'.*'slow'"):
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
            np.testing.assert_array_equal(_patterns(adam_jax.set_master_params(state, masters)[0]["w"]), _patterns(moved["w"]))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_optax_maps_states_of_bfloat16_params_with_more_trees(residual):
    params = {"w": _weights(), "b": _weights(shape=(3,))}
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), residual)
    state = tx.init(params)
    names = {"w": "of w", "b": "of b"}
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf, name: (leaf.shape, name), state, names)
    assert mapped.residual == (None if residual == 0 else {"w": ((4096,), "of w"), "b": ((3,), "of b")})
