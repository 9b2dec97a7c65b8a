"""The clock of an average (Section 3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax import clock, moments


@pytest.mark.parametrize("decay", [0.9, 0.999, 1 - 1e-5, 1 - 1e-7])
def test_complement_keeps_the_digits_that_float32_would_lose(decay: float):
    assert clock.complement(decay) == 1 - decay
    traced = jax.jit(clock.complement)(jnp.float32(decay))
    assert traced == 1 - float(np.float32(decay))  # exact for the float32 that arrived


def test_the_first_corrected_rate_is_exactly_one():
    for rate in np.geomspace(1e-7, 1, 40).astype(np.float32):
        weight = moments.average(jnp.float32(0), 1.0, rate)
        assert clock.corrected_rate(rate, weight) == 1


def test_the_corrected_average_is_the_raw_one_over_its_weight():
    values = np.random.default_rng(0).normal(size=50)
    raw = weight = 0.0
    mean, running = jnp.float32(0), jnp.float32(0)
    for value in values:
        raw, weight = 0.9 * raw + 0.1 * value, 0.9 * weight + 0.1
        running = moments.average(running, 1.0, 0.1)
        mean = moments.average(mean, jnp.float32(value), clock.corrected_rate(0.1, running))
        np.testing.assert_allclose(mean, raw / weight, atol=3e-7)  # a few ulp of values of order one


def test_a_count_of_zero_starts_anew_whatever_the_weight():
    t = clock.tick(0.1, jnp.float32(0.7), 0)
    assert (t.moved, t.kept) == (1, 1)
    assert t.weight == jnp.float32(0.1)


def test_without_correction_the_rate_is_that_of_the_decay():
    t = clock.tick(0.1, jnp.float32(0.5), 3, corrected=False)
    assert t.moved == jnp.float32(0.1)
    np.testing.assert_allclose(t.weight, 0.55, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.99999])
def test_what_is_kept_and_what_is_new_add_up(decay: float):
    rate, weight = clock.complement(decay), jnp.float32(0)
    for count in range(20):
        t = clock.tick(rate, weight, count)
        if count:  # w_t = (1 - rate) w_{t-1} + rate
            np.testing.assert_allclose((1 - rate) * t.kept + t.moved, 1, rtol=1e-5)
        weight = t.weight
