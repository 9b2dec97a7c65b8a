"""Low-precision weights that still learn."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    draws = rounding.draws(p.shape, rounding.stream(0, ""), rounding.turn(0))
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

    def both(tx: optax.GradientTransformation) -> tuple[jax.Array, jax.Array]:
        wide, _ = _run(tx, params.astype(jnp.float32), gradients.astype(jnp.float32))
        narrow, state = _run(adam_jax.in_float32(tx, 16), params, gradients)
        return adam_jax.master_params(state, narrow), wide

    # products with powers of two are exact, so no compilation of the formula can round otherwise
    joined, wide = both(optax.sgd(2.0**-10, momentum=0.5))
    np.testing.assert_array_equal(_patterns(joined), _patterns(wide))
    # of Adam two compilations differ in last bits (JAX 0.12); in bfloat16, steps would be off by 2^-9: 1e-4 in all
    np.testing.assert_allclose(*both(optax.adam(1e-3)), rtol=0, atol=1e-6)


def test_24_bit_weights_stay_within_5_percent_of_the_path_of_float32_weights():
    params, gradients = _weights(), _gradients(1000)
    wide, _ = _run(adam_jax.adam(1e-3), params.astype(jnp.float32), gradients)
    tx = adam_jax.in_float32(adam_jax.adam(1e-3), 8)
    narrow, state = _run(tx, params, gradients)
    distance = np.abs(np.asarray(adam_jax.master_params(state, narrow)) - np.asarray(wide)).mean()
    path = np.abs(np.asarray(wide) - np.asarray(params).astype(np.float32)).mean()
    assert distance < 0.05 * path


def test_a_sum_of_24_bits_is_kept_as_it_is_and_not_rounded():
    tx, params = adam_jax.in_float32(optax.identity(), 8), jnp.ones(256, jnp.bfloat16)
    updates, state = jax.jit(tx.update)(jnp.full(256, 2**-15, jnp.float32), tx.init(params), params)
    masters = adam_jax.master_params(state, optax.apply_updates(params, updates))
    np.testing.assert_array_equal(masters, 1 + 2**-15)


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
def test_an_update_of_zero_changes_no_weight(residual):
    params = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
    tx = adam_jax.in_float32(as_they_are, residual)
    moved, _ = _step(tx)(params, tx.init(params), jnp.full(2**16, -0.0))
    wide = params.astype(np.float32)
    normal = (np.abs(wide) >= 2.0**-126) | (wide == 0)  # XLA flushes subnormal numbers on CPU
    np.testing.assert_array_equal(_patterns(moved)[normal], _patterns(params)[normal])


def test_rounding_does_not_depend_on_the_other_leaves_and_does_on_the_seed():
    w, g = _weights(), jnp.full(4096, -1e-3)

    def moved(params, updates, seed=0):
        tx = adam_jax.in_float32(as_they_are, seed=seed)
        return _step(tx)(params, tx.init(params), updates)[0]

    alone = moved({"w": w}, {"w": g})["w"]
    both = moved({"a": w, "w": w}, {"a": g, "w": g})
    np.testing.assert_array_equal(both["w"], alone)
    assert (np.asarray(both["a"]) != np.asarray(alone)).any()
    assert (np.asarray(moved({"w": w}, {"w": g}, 1)["w"]) != np.asarray(alone)).any()
    np.testing.assert_array_equal(moved({"w": w}, {"w": g}, jnp.int32(0))["w"], alone)


@pytest.mark.parametrize(("residual", "most"), [(0, 4.1), (8, 5.1), (16, 6.1)])
def test_weights_and_int8_moments_take_four_to_six_bytes_a_parameter(residual, most):
    tx = adam_jax.in_float32(adam_jax.adam(1e-3, storage="int8"), residual)
    params = jax.ShapeDtypeStruct((2**16,), jnp.bfloat16)
    leaves = jax.tree.leaves((params, jax.eval_shape(tx.init, params)))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**16 <= most


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

        def step(carry, g):  # a loop: XLA of JAX 0.12 takes minutes for five steps of 24-bit weights one after another
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = params.astype(dtype)
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0].astype(jnp.float32)

    tangents = [jax.jvp(lambda r, d=dtype: last(r, params, d), (1e-3,), (1.0,))[1] for dtype in (jnp.bfloat16, jnp.float32)]
    np.testing.assert_allclose(*tangents, rtol=2.0**-6, atol=2.0**-7 * np.abs(gradients).max())  # tangents are bfloat16
    slope = jax.jit(jax.grad(lambda p: (last(1e-3, p, jnp.bfloat16) ** 2).sum()))(params)
    np.testing.assert_allclose(slope.astype(jnp.float32), 2 * last(1e-3, params, jnp.bfloat16), rtol=2.0**-7)
