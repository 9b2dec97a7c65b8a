"""The window of octaves of an int8 leaf: as fine as the magnitudes allow, with room above, found again when it is lost."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from adam_jax import codes
from adam_jax.storage import first_codes, int8

FINENESS = (3, 4, 5)  # 8, 16 or 32 numbers an octave in a window of 32, 16 or 8 octaves


def _code(octave: int, window: tuple[int, int]) -> int:
    """The lowest code of an octave."""
    start, fine = window
    return ((octave - start) << fine) + 1


def _coming(high: int, low: int, window: tuple[int, int], rate: float = 1e-3) -> tuple[int, int]:
    extremes = jnp.array([_code(high, window), _code(low, window)])
    start, fine = np.asarray(codes.coming_window(extremes, jnp.array(window), rate))
    return int(start), int(fine)


@pytest.mark.parametrize(("rate", "headroom"), [(1e-4, 4), (1e-3, 4), (2e-3, 5), (4e-3, 5), (0.01, 6), (0.1, 8), (1.0, 9)])
@pytest.mark.parametrize("spread", [0, 2, 3, 5, 9, 11, 20, 27, 40])
def test_a_window_is_the_finest_that_holds_the_leaf_and_the_headroom(spread, rate, headroom):
    high = 150
    start, fine = _coming(high, high - spread, codes.EVERY_OCTAVE, rate)
    needed = spread + 1 + headroom
    assert fine == max([bits for bits in FINENESS if needed + 1 <= 256 >> bits], default=3)  # one octave to spare
    assert start + (256 >> fine) - 1 == high + headroom  # the window ends with the headroom
    assert start <= high - spread or needed > 32


@pytest.mark.parametrize("bits", [4, 5])
def test_a_finer_window_is_kept_until_the_leaf_no_longer_fits_and_taken_with_an_octave_to_spare(bits):
    octaves, high = 256 >> bits, 150
    fits = octaves - 1 - 4  # octaves between the highest and the lowest root that fit exactly
    inside, coarser = (high + 4 - octaves + 1, bits), (high + 4 - (512 >> bits) + 1, bits - 1)
    lower = (inside[0] - 1, bits)  # of a leaf that has grown by an octave since
    # the lowest code may stand for less than it says, and then counts as one octave lower
    for low, window, expected in (
        (high - fits, coarser, bits - 1),
        (high - fits + 1, coarser, bits),
        (high - fits + 1, inside, bits),
        (high - fits, inside, bits - 1),
        (high - fits, lower, bits),
        (high - fits + 1, (inside[0] + 1, bits), bits),
    ):
        assert _coming(high, low, window)[1] == expected


@pytest.mark.parametrize(("lowest", "fine"), [(64, 3), (65, 4)])
def test_the_last_code_of_an_octave_is_of_that_octave_and_the_next_of_the_next(lowest, fine):
    """From the fourth or the fifth octave of a window of 16 up to the last, of which 12 are left below the headroom."""
    assert int(codes.coming_window(jnp.array([241, lowest]), jnp.array([100, 4]), 1e-3)[1]) == fine


def test_a_window_that_was_left_upwards_or_holds_nothing_becomes_all_octaves():
    window = jnp.array([120, 4])
    for top, bottom, lost in ((codes.LARGEST, 90, True), (codes.LARGEST - 1, 90, False), (0, 255, True)):
        found = tuple(np.asarray(codes.coming_window(jnp.array([top, bottom]), window, 1e-3)))
        assert (found == codes.EVERY_OCTAVE) == lost
    # in the window of all octaves the highest code is a number as any other
    assert tuple(np.asarray(codes.coming_window(jnp.array([254, 250]), jnp.array(codes.EVERY_OCTAVE), 1e-3))) != (0, 0)


@pytest.mark.parametrize("high", [1, 3, 253, 254])
def test_windows_at_the_ends_of_float32_stay_among_its_numbers(high):
    start, fine = _coming(high, high, codes.EVERY_OCTAVE)
    assert 1 <= start <= high <= start + (256 >> fine) - 1 <= 254  # 255 is the exponent of infinity
    s = codes.decode_root(jnp.array([1, 254]), codes.scale(jnp.array([start, fine])))
    assert np.isfinite(np.asarray(s)).all()


@pytest.mark.parametrize("window", [(110, 3), (120, 5), codes.EVERY_OCTAVE])
def test_roots_below_the_window_are_raised_to_its_lowest_number_and_others_stay(window):
    lowest = 2.0 ** (window[0] - 127) if window[0] else 0.0
    s = jnp.array([0.0, 1e-30, lowest / 2, lowest, 1.5 * lowest, 1.0, 1e30])
    scale = codes.scale(jnp.array(window))
    np.testing.assert_array_equal(codes.raised(s, scale).view(jnp.float32), np.maximum(s, lowest))
    np.testing.assert_array_equal(codes.decode_root(jnp.ones(1, jnp.int32), scale), lowest)


def test_a_new_state_begins_with_the_window_of_all_octaves():
    np.testing.assert_array_equal(first_codes(2, 1).windows, np.tile(codes.EVERY_OCTAVE, (2, 1, 2)))


def test_given_moments_get_the_window_that_training_chooses_at_the_default_decays():
    (window,) = np.asarray(int8().windows_of((jnp.array([1.0, 0.3, 0.0]),)))
    assert (window[0] + (256 >> window[1]) - 1, window[1]) == (127 + codes.HEADROOM, codes.FINEST)
    np.testing.assert_array_equal(window[2:], window[:2])


def test_ratios_are_as_fine_as_the_bound_allows():
    bounds = np.array([0.5, 1.0, 7.27, 7.42, 8.0, 31.6, 100.0, 400.0, 1e4, 1e30])
    found = np.array([int(codes.ratios(bound).octave) for bound in bounds])
    assert (found == np.clip(127 / np.log2(1 + bounds / 0.0085), 8, 13).astype(int)).all()
    for n in range(9, 14):  # and from where on they are one less
        last = 0.0085 * (2 ** (127 / n) - 1)
        assert [int(codes.ratios(x * last).octave) for x in (0.9998, 1.0002)] == [n, n - 1]
    for bound, n in zip(bounds, found, strict=True):
        step = codes.ratios(bound).step
        assert float(codes.decode_ratio(jnp.int32(127), step)) >= bound or n == 8
        assert 0 < int(step) * n - 2**23 <= n  # units: the least that are more than an n-th of an octave
        # one more would not reach, or reach by less than a thousandth
        assert n == 13 or float(codes.decode_ratio(jnp.int32(127), jnp.int32(2**23 // (n + 1) + 1))) < bound * 1.001
    r, half = jnp.array([8.0, 1e9, jnp.inf]), jnp.full(3, 2**31, jnp.uint32)
    np.testing.assert_array_equal(codes.encode_ratio(r, half, codes.ratios(7.27)), 127)
    np.testing.assert_array_equal(codes.encode_ratio(100 * r, half, codes.ratios(400.0)), 127)


def test_one_gradient_400_times_all_before_is_remembered():
    """It is inside the headroom: its root is 12.6 times those before. Cut at less, later steps would be too large."""
    narrow: Any = adam_jax.scale_by_adam(eps=0.0, storage="int8")
    exact: Any = adam_jax.scale_by_adam(eps=0.0)

    def step(states: Any, t: jax.Array) -> tuple[Any, Any]:
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (4096,)) * jnp.where(t == 100, 400.0, 1.0)
        u, first = narrow.update(g, states[0])
        v, second = exact.update(g, states[1])
        return (first, second), jnp.sqrt(jnp.mean(u * u) / jnp.mean(v * v))

    start = narrow.init(jnp.zeros(4096)), exact.init(jnp.zeros(4096))
    size = np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(220))[1])(start))
    assert np.abs(size - 1).max() < 0.2  # measured .11; with two octaves of headroom for four, 2
