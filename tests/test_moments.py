"""The arithmetic on one array."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax import moments


def test_a_constant_is_a_fixed_point_of_every_average_at_every_rate():
    value = jnp.float32(0.1)
    for rate in np.geomspace(1e-7, 1, 40):
        assert moments.average(value, value, rate) == value
        assert moments.root_second_moment(value, value, rate) == value


def test_arithmetic_is_in_float32_at_least_and_complex_numbers_stay_complex():
    for dtype, wide in (("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("complex64", "complex64")):
        assert moments.widened(jnp.ones(2, dtype)).dtype == wide
        assert moments.accumulator_dtype(dtype, jnp.bfloat16) == wide
    assert moments.accumulator_dtype(np.float64) == np.float32  # JAX has no wider one here


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_saturation_keeps_squares_and_differences_finite_and_shows_what_is_not(dtype):
    largest = jnp.finfo(dtype).max
    g = jnp.array([0.0, 1.0, largest, -largest], dtype)
    assert jnp.isfinite(moments.squared(moments.saturate(g, 1))).all()
    assert jnp.isfinite(moments.squared(moments.saturate(g, 4)).sum())
    difference = moments.saturate(g, 0)
    assert jnp.isfinite(difference[2] - difference[3])
    # and no earlier than they must
    np.testing.assert_allclose(difference[2], largest / 2)
    np.testing.assert_allclose(moments.saturate(g, 1)[2], np.sqrt(largest / 2), rtol=1e-6)
    np.testing.assert_allclose(moments.saturate(g, 4)[2], np.sqrt(largest / 8), rtol=1e-6)
    bad = moments.saturate(jnp.array([jnp.inf, -jnp.inf, jnp.nan], dtype), 1)
    assert not jnp.isfinite(bad).any()


@pytest.mark.parametrize("coarse", [False, True])
def test_the_root_form_follows_the_square_form(coarse):
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=(200, 64)) * 10 ** rng.uniform(-3, 3, size=(200, 64)), jnp.float32)
    v, s = jnp.zeros(64), jnp.zeros(64)
    for row in g:
        v, s = moments.second_moment(v, row, 0.01), moments.root_second_moment(s, row, 0.01, coarse=coarse)
    np.testing.assert_allclose(s, jnp.sqrt(v), rtol=3e-6)  # 25 ulp, the rounding of 200 steps of each
    assert moments.root_second_moment(jnp.float32(0), jnp.float32(0), 0.01, coarse=coarse) == 0


def test_lp_at_two_is_the_root_second_moment():
    rng = np.random.default_rng(0)
    s = r = jnp.zeros(64)
    for _ in range(100):
        g = jnp.asarray(rng.normal(size=64) * 10 ** rng.uniform(-3, 3, size=64), jnp.float32)
        s, r = moments.lp_moment(s, g, 2.0, 0.01, np.log(0.99)), moments.root_second_moment(r, g, 0.01)
    np.testing.assert_allclose(s, r, rtol=3e-6)  # as above


@pytest.mark.parametrize("p", [1.0, 2.0, 7.0, 100.0, 1e6])
def test_lp_moments_neither_overflow_nor_vanish(p: float):
    for scale in (1e-35, 1.0, 1e35):
        s = moments.lp_moment(jnp.array([scale]), jnp.array([scale]), p, 0.1, np.log(0.9))
        np.testing.assert_allclose(s, scale, rtol=2e-6)  # the logarithms of 1e35 carry 80 ulp of one


@pytest.mark.parametrize("shape", [(), (3,)])
def test_of_two_arrays_to_choose_from_one_may_be_a_number(shape):
    x = jnp.full(shape, 2.0)
    for a, b in ((x, 3 * x), (x, 1.0), (1.0, x), (x, jnp.float32(1)), (jnp.float32(1), x)):
        for condition in (jnp.full(shape, True), jnp.full(shape, False)):
            np.testing.assert_array_equal(moments.where(condition, a, b), jnp.where(condition, a, b), strict=True)


def test_the_magnitude_is_the_absolute_value():
    for g in (jnp.array([3.0, -4.0, 0.0]), jnp.array([3 - 4j, -4 + 0j, 0j])):
        np.testing.assert_allclose(moments.magnitude(g), np.abs(g), rtol=1e-6)


def test_values_and_derivatives_at_zero_are_zero():
    for function in (
        moments.root,
        moments.magnitude,
        lambda g: moments.magnitude(g * (1 + 2j)),
        lambda g: moments.direction(g * 0, jnp.abs(g), 0.0),
        lambda g: moments.direction(g, g * 0, 0.0),
        lambda g: moments.root_plus(moments.magnitude(g), 0.0),
        lambda g: moments.lp_moment(moments.magnitude(g), g, 3.0, 0.1, np.log(0.9)),
    ):
        of_each_order = [function, jax.grad(function), jax.jacfwd(function), jax.hessian(function)]
        found = jax.jit(lambda x, each=of_each_order: [derivative(x) for derivative in each])(jnp.float32(0))
        np.testing.assert_array_equal(found, 0.0)
    assert jax.grad(moments.magnitude)(0j) == 0


def test_derivatives_of_roots_and_quotients_are_those_of_calculus_wherever_they_are_numbers():
    for v in (4.0, 1e-30, 1e30):
        found = jax.value_and_grad(moments.root)(jnp.float32(v))
        np.testing.assert_allclose(found, (np.sqrt(v), 0.5 / np.sqrt(v)), rtol=1e-6)
    np.testing.assert_array_equal(jax.value_and_grad(moments.root)(jnp.float32(0)), 0.0)
    for scale in (1.0, 1e-25, 1e25):
        by_a, by_b = jax.grad(moments.quotient, (0, 1))(jnp.float32(2 * scale), jnp.float32(3 * scale))
        np.testing.assert_allclose((by_a, by_b), (1 / 3 / scale, -2 / 9 / scale), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(moments.quotient, (0, 1))(jnp.float32(2), jnp.float32(jnp.inf)), 0.0)


def test_a_first_moment_is_cut_at_its_bound_on_both_sides():
    m, size = jnp.array([3.0, -3.0, 1.0, -1.0]), jnp.array([0.5, 0.5, 1.0, 0.0])
    np.testing.assert_array_equal(moments.within(m, size, 2.0), [1.0, -1.0, 1.0, 0.0])
    np.testing.assert_array_equal(moments.within(m, size, 1e30), [3.0, -3.0, 1.0, 0.0])
    np.testing.assert_array_equal(
        moments.within(m + 2j * m, size, 2.0), moments.within(m, size, 2.0) + np.array([1j, -1j, 2j, 0])
    )


def test_averages_of_very_small_numbers_lose_nothing_where_a_move_alone_would_be_flushed_to_zero():
    for scale, rate in itertools.product((1.0, 1e-10, 1e-20, 3e-20, 1e-33, 2e-38), (0.1, 1e-3, 1e-6)):
        mean, value = jnp.float32(3 * scale), jnp.float32(5 * scale)
        found = float(moments.small_average(mean, value, rate))
        np.testing.assert_allclose(found, float(mean) + rate * (float(value) - float(mean)), rtol=1.2e-7)
        both = moments.small_average(mean + 1j * value, value + 1j * mean, rate)
        assert float(both.real) == found
        assert float(both.imag) == float(moments.small_average(value, mean, rate))


def test_a_direction_of_nan_or_inf_is_not_hidden():
    bad = jnp.array([jnp.nan, jnp.inf])
    assert jnp.isnan(moments.direction(bad, bad, 1e-8)).all()


def test_the_moment_of_infinity_is_the_papers():
    u, g = jnp.array([1.0, 4.0], jnp.float32), jnp.array([-3.0, 2.0], jnp.float32)
    np.testing.assert_array_equal(moments.infinity_moment(u, g, 0.25), [3.0, 3.0])  # max(b2 u, |g|), b2 = 3/4
