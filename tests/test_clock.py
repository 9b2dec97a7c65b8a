"""The clock of an average (Section 3)."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax import clock, moments


@pytest.mark.parametrize("decay", [0.9, 0.999, 1 - 1e-5, 1 - 1e-7])
def test_complement_keeps_the_digits_that_float32_would_lose(decay: float):
    assert clock.complement(decay) == 1 - decay
    traced = jax.jit(clock.complement)(jnp.float32(decay))
    assert traced == 1 - float(np.float32(decay))  # exact for the float32 that arrived
    narrow = jnp.bfloat16(1 - decay)  # of which one minus it has more digits
    assert clock.complement(narrow) == np.float32(1) - np.float32(narrow)


def test_the_first_corrected_rate_is_exactly_one():
    for rate in np.geomspace(1e-7, 1, 40).astype(np.float32):
        weight = moments.average(jnp.float32(0), 1.0, rate)
        assert clock.corrected_rate(rate, weight) == 1


def test_nothing_weighed_has_a_rate_of_zero_and_not_an_infinite_one():
    for weight in (0.0, jnp.float32(0)):
        assert clock.corrected_rate(0.1, weight) == 0
    assert jax.grad(lambda rate: clock.corrected_rate(rate, jnp.float32(0)))(0.1) == 0
    assert clock.running_weight(jnp.float32(0), 0.0, 3) == 0


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
    for weight in (0.7, np.float32(0.7), jnp.float32(0.7)):
        t = clock.tick(0.1, weight, 0)
        assert (t.moved, t.kept) == (1, 1)
        assert t.weight == jnp.float32(0.1)


def test_a_schedule_is_asked_at_one_count_or_at_each_of_several():
    assert clock.at(lambda count: count / 2, 3) == 1.5
    np.testing.assert_array_equal(clock.at(lambda count: jax.lax.cond(count > 3, lambda: 1.0, lambda: 0.0), [2, 4]), [0, 1])
    assert clock.at(0.25, 3) == 0.25


def test_derivatives_of_the_weight_are_those_of_the_average_that_it_is():
    for weight, count in ((0.7, 3), (1 - 1e-5, 9)):
        by_weight, by_rate = jax.grad(clock.running_weight, (0, 1))(jnp.float32(weight), 0.1, count)
        np.testing.assert_allclose((by_weight, by_rate), (0.9, 1 - weight), rtol=1e-2)


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


@pytest.mark.parametrize(("decay", "steps"), [(1 - 1e-7, 2_000_000), (1 - 1e-6, 2_000_000), (0.999, 5000), (0.9, 30)])
def test_the_weight_is_right_below_one_half_and_near_one(decay: float, steps: int):
    def step(weight: jax.Array, count: jax.Array) -> tuple[jax.Array, None]:
        return clock.running_weight(weight, 1 - decay, count), None

    weight, _ = jax.jit(lambda: jax.lax.scan(step, jnp.float32(0), jnp.arange(steps)))()
    # measured 1.6e-6 at worst; rounded to nearest, 2e-2 for the first of them
    np.testing.assert_allclose(weight, -np.expm1(steps * np.log1p(decay - 1)), rtol=3e-6)


def test_a_count_at_the_end_of_int32_goes_on_among_large_ones():
    largest = 2**31 - 1
    counts = [largest - 1, largest, largest - 2**16 + 1]
    for before, after in itertools.pairwise(counts):
        assert int(clock.next_count(jnp.int32(before))) == after
    assert clock.next_count(jnp.int32(3)).dtype == jnp.int32
    assert int(clock.next_count(0)) == 1


@pytest.mark.parametrize(("decay", "steps"), [(0.999, 30_000), (0.9999, 200_000)])
def test_after_a_constant_gradient_changes_a_step_is_off_by_what_the_docstring_says(decay: float, steps: int):
    levels = jnp.geomspace(0.25, 4.0, 33)

    def off(tx: Any) -> float:
        def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
            updates, state = tx.update(jnp.where(count < 3, 1.0, levels), carry[0])
            return (state, updates), None

        (_, updates), _ = jax.jit(lambda: jax.lax.scan(step, (tx.init(levels), levels), jnp.arange(steps)))()
        return float(jnp.abs(updates - 1).max())

    limit = 2**-24 / (1 - decay)
    square, root, optax_ = (
        off(make(b2=decay, eps=0.0, **how))
        for make, how in (
            (adam_jax.scale_by_adam, {}),
            (adam_jax.scale_by_adam, {"storage": "root"}),
            (optax.scale_by_adam, {}),
        )
    )
    assert square < limit / 2 * (1 + 1e-2)  # measured .98 and .88 of it
    assert limit / 2 < root < limit  # measured .99 and .80 of it
    assert limit / 8 < optax_ < 3 * limit  # measured .30 and .56 of it
