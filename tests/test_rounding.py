"""Fewer bits without bias, and without loss."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adam_jax import rounding

# every upper half of a float32 pattern, with the lower halves at which something changes
LOW_16 = np.array([0x0000, 0x0001, 0x007F, 0x0080, 0x7FFF, 0x8000, 0x8001, 0xFF80, 0xFFFF], np.uint32)
LOW_8 = np.array([0x0000, 0x0100, 0x7F00, 0x8000, 0x8100, 0xFF00], np.uint32)
HIGH = np.arange(2**16, dtype=np.uint32)[:, None] << 16


def _numbers(low: np.ndarray) -> np.ndarray:
    return (HIGH | low).reshape(-1).view(np.float32)


def _bfloat16(patterns: np.ndarray) -> np.ndarray:
    """The value of bfloat16 patterns as float64, by the definition of the format."""
    patterns = patterns.astype(np.int64)
    exponent, significand = (patterns >> 7) & 0xFF, patterns & 0x7F
    size = np.where(exponent == 0, significand, significand | 0x80) * 2.0 ** (np.maximum(exponent, 1) - 134.0)
    size = np.where(exponent == 0xFF, np.where(significand == 0, np.inf, np.nan), size)
    return np.where(patterns >> 15 == 1, -size, size)


@pytest.mark.parametrize(("bits", "low"), [(16, LOW_16), (8, LOW_8)])
def test_a_split_number_is_joined_again_bit_for_bit(bits, low):
    x = _numbers(low)
    weight, residual = jax.jit(rounding.split, static_argnums=1)(x, bits)
    assert weight.dtype == jnp.bfloat16
    assert residual.dtype == f"uint{bits}"
    joined = np.asarray(jax.jit(rounding.join)(weight, residual))
    nan = np.isnan(x)
    np.testing.assert_array_equal(joined[~nan].view(np.uint32), x[~nan].view(np.uint32))
    assert np.isnan(joined[nan]).all()
    assert np.isnan(np.asarray(weight).astype(np.float32)[nan]).all()


@pytest.mark.parametrize(("bits", "low"), [(16, LOW_16), (8, LOW_8)])
def test_the_weight_of_a_split_is_the_nearest_bfloat16_number(bits, low):
    x = _numbers(low)
    x = np.sort(x[~np.isnan(x)])
    patterns = np.asarray(jax.jit(rounding.split, static_argnums=1)(x, bits)[0]).view(np.uint16)
    weight, exact = _bfloat16(patterns), x.astype(np.float64)
    assert (np.diff(weight[np.isfinite(weight)]) >= 0).all()  # monotone
    np.testing.assert_array_equal(np.signbit(weight), np.signbit(exact))
    infinite = np.isinf(weight)
    np.testing.assert_array_equal(infinite, np.abs(exact) >= 2.0**128 - 2.0**119)  # half a step below 2^128, and beyond
    weight, exact, patterns = weight[~infinite], exact[~infinite], patterns[~infinite]
    away = _bfloat16(np.minimum(patterns & 0x7FFF, 0x7F7E) + 1)
    inwards = _bfloat16(np.maximum(patterns & 0x7FFF, 1) - 1)
    error = np.abs(weight - exact)
    assert (error <= np.abs(away - np.abs(exact)))[(patterns & 0x7FFF) < 0x7F7F].all()
    assert (error <= np.abs(inwards - np.abs(exact)))[(patterns & 0x7FFF) > 0].all()


def test_the_weight_of_a_split_differs_from_ties_to_even_at_ties_alone():
    x = _numbers(LOW_16)
    x = x[~np.isnan(x)]
    weight = np.asarray(jax.jit(rounding.split, static_argnums=1)(x, 16)[0]).view(np.uint16)
    even = x.astype(jnp.bfloat16).view(np.uint16)  # ml_dtypes rounds ties to even
    tie_above_even = (x.view(np.uint32) & 0x1FFFF) == 0x08000
    np.testing.assert_array_equal(weight, even + tie_above_even)


def test_the_derivative_of_a_joined_number_is_that_of_its_weight():
    weight, residual = rounding.split(jnp.float32([3.14159265, -2.5, 0.0]), 16)
    np.testing.assert_array_equal(
        jax.grad(lambda w: jnp.sum(rounding.join(w, residual) * jnp.arange(3.0)))(weight), [0, 1, 2]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_widening_changes_no_number(dtype):
    x = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16 if dtype == jnp.bfloat16 else np.float16).astype(dtype)
    np.testing.assert_array_equal(rounding.widen(jnp.asarray(x)), x.astype(np.float32))


def test_a_weight_zeroed_by_hand_joins_to_zero_and_not_to_nan():
    for zero in (0.0, -0.0):
        joined = rounding.join(jnp.full(2**16, zero, jnp.bfloat16), jnp.arange(2**16).astype(jnp.uint16))
        assert np.abs(np.asarray(joined)).max() < 2.0**-126


@pytest.mark.parametrize("drop", [8, 16])
def test_the_probability_of_rounding_up_is_exactly_the_fraction_dropped(drop):
    # all draws that differ in the bits that are looked at
    bits = jnp.arange(2**drop, dtype=jnp.uint32) << (32 - drop)
    stochastic = jax.jit(rounding.stochastic, static_argnums=2)
    for pattern in (0x3F800000, 0x3F801234, 0x3F808000, 0xBF80FFFF, 0x3FFFFFFF, 0x00801234, 0x7F7E1234, 0x7F7F0001):
        x = np.uint32(pattern).view(np.float32)
        rounded = np.asarray(stochastic(jnp.full(bits.shape, x), bits, drop)).view(np.uint32)
        cut = pattern >> drop << drop
        assert set(rounded.tolist()) <= {cut, cut + 2**drop}
        saturated = cut + 2**drop == 0x7F800000
        assert (rounded != cut).sum() == (0 if saturated else pattern - cut)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_lands_on_one_of_the_two_neighbours(dtype):
    x = _numbers(LOW_16)
    x = x[np.isfinite(x) & ((np.abs(x) >= 2.0**-126) | (x == 0))]
    largest = float(jnp.finfo(dtype).max)
    bits = rounding.draws(x.shape, rounding.stream(3, "x"), rounding.turn(7))
    rounded = np.asarray(jax.jit(rounding.round_to, static_argnums=1)(x, dtype, bits))
    np.testing.assert_array_equal(rounded, rounded.astype(dtype).astype(np.float32))  # on the grid
    inside = np.abs(x) <= largest
    np.testing.assert_array_equal(rounded[~inside], np.sign(x[~inside]) * largest)
    x, rounded = x[inside], rounded[inside]
    nearest = x.astype(dtype)
    before = np.where(nearest.astype(np.float32) <= x, nearest, np.nextafter(nearest, dtype(-np.inf)))
    after = np.where(nearest.astype(np.float32) >= x, nearest, np.nextafter(nearest, dtype(np.inf)))
    assert (rounded >= before.astype(np.float32)).all()
    assert (rounded <= after.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_infinities_and_nan_pass_through_rounding(dtype):
    low = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)  # NaN by its lowest bit alone
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, -jnp.nan, *low], jnp.float32)
    for bits in (0, 2**31, 2**32 - 1):
        rounded = jax.jit(rounding.round_to, static_argnums=1)(x, dtype, jnp.full(6, bits, jnp.uint32))
        np.testing.assert_array_equal(rounded, x)


def test_draws_are_unbiased_to_3e_5_over_100_thousand_steps():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=256), jnp.float32)
    pattern = np.asarray(x).view(np.uint32)
    name = rounding.stream(0, "['w']")

    @jax.jit
    def times_up(x):
        def body(count, times):
            rounded = rounding.stochastic(x, rounding.draws(x.shape, name, rounding.turn(count)), 16)
            return times + (jnp.abs(rounded) > jnp.abs(x))

        return jax.lax.fori_loop(0, 100_000, body, jnp.zeros(x.shape, jnp.int32))

    bias = np.asarray(times_up(x)) / 100_000 - (pattern & 0xFFFF) / 2**16  # in steps of the grid
    assert np.abs(bias).max() < 3e-5  # 2.7e-5 for the worst of 256 elements; independent draws: 1.6e-3 for one


def test_draws_are_uniform_over_elements_and_unlike_between_leaves_and_seeds():
    names = [rounding.stream(0, "b"), *(rounding.stream(seed, "a") for seed in (0, 1, 64, 2**31))]
    columns = np.stack([np.asarray(rounding.draws((2**16,), name, rounding.turn(5))) for name in names]) / 2**32
    histogram = np.stack([np.histogram(column, 64, (0, 1))[0] for column in columns])
    assert ((histogram - 1024) ** 2 / 1024).sum(1).max() < 120  # chi-squared with 63 degrees of freedom: 1 in 2e5
    correlation = np.corrcoef(np.concatenate([columns, np.roll(columns, 1, axis=1)])) - np.eye(10)
    assert np.abs(correlation).max() < 5 / 2**8  # five standard deviations
    assert len(np.unique(columns[0])) > 2**16 * 0.999


def test_draws_are_the_same_in_every_version_so_that_saved_runs_go_on():
    name = rounding.stream(7, "['w']")
    assert int(name) == 0xED60F3A7
    np.testing.assert_array_equal(
        rounding.draws((2, 2), name, rounding.turn(1_000_001)), [[0x93F2737C, 0xF7C01C4E], [0xEA884D01, 0x7F03DFB9]]
    )
    for seed in (jnp.int32(7), 7 + 2**32):
        assert int(rounding.stream(seed, "['w']")) == int(name)


def test_draws_are_those_of_the_global_index_on_any_sharding():
    shape, name = (16, 24), rounding.stream(0, "w")
    flat = np.asarray(rounding.draws((16 * 24,), name, rounding.turn(3)))
    np.testing.assert_array_equal(rounding.draws(shape, name, rounding.turn(3)).reshape(-1), flat)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    for spec in (PartitionSpec("x"), PartitionSpec("x", "y"), PartitionSpec(None, ("x", "y"))):
        sharded = jax.jit(rounding.draws, static_argnums=0, out_shardings=NamedSharding(mesh, spec))(
            shape, name, rounding.turn(3)
        )
        np.testing.assert_array_equal(np.asarray(sharded).reshape(-1), flat)


def test_a_scalar_is_drawn_for_as_a_leaf_of_one_element_is():
    for name in (rounding.stream(0, "a"), rounding.stream(0, "b")):
        alone = rounding.draws((), name, rounding.turn(3))
        assert int(alone) == int(rounding.draws((1,), name, rounding.turn(3))[0])


def test_draws_of_leaves_of_billions_of_elements_are_those_of_the_index_modulo_2_to_the_32():
    name, turn = rounding.stream(0, "w"), rounding.turn(5)
    for width, index in ((3 * 2**14, 3 * 2**30), (2**16, 0), (2**17, 0)):
        row = jax.jit(lambda width=width: rounding.draws((2, 2**16, width), name, turn)[1, 0, :4])()  # the rest is not made
        np.testing.assert_array_equal(
            row, rounding.draws_at(jnp.uint32(index) + jnp.arange(4, dtype=jnp.uint32), name, turn)
        )


def _errors(counts):
    """For 512 elements, how far the number of draws below a threshold is off, and the deviation of independent draws."""
    p = np.random.default_rng(2).uniform(0.02, 0.98, size=512)
    index, thresholds = jnp.arange(512, dtype=jnp.uint32), jnp.asarray((p * 2**32).astype(np.uint32))

    @jax.jit
    def below(counts):
        turns = rounding.turn(counts)[None]
        return (rounding.draws_at(index[:, None], rounding.stream(0, "w"), turns) < thresholds[:, None]).sum(1)

    times = np.stack([np.asarray(below(row)) for row in counts])
    n = counts.shape[1]
    return times - n * p, np.sqrt(n * p * (1 - p))


def test_an_element_that_moves_once_in_a_thousand_steps_or_less_is_rounded_as_if_by_independent_draws():
    periods = np.arange(1, 1001)[:, None]
    for start in (0, 3_000_001):
        error, deviation = _errors(start + periods * np.arange(100))
        rms = np.sqrt(((error / deviation) ** 2).mean(1))
        assert rms.max() < 1.25  # 512 elements give 3 percent of noise; a golden-ratio sequence has 9 at Fibonacci numbers
        assert rms.mean() < 1.02
        assert np.abs(error / deviation).max() < 7.5  # no single element is caught, either: the binomial tails


def test_consecutive_draws_are_spread_as_evenly_as_can_be():
    starts = np.array([[0], [777_777], [2**31 - 500], [2**32 - 500]], np.uint64)
    for n, most in ((100, 1.0), (1000, 1.2), (20_000, 1.4)):
        error, deviation = _errors((starts + np.arange(n, dtype=np.uint64)).astype(np.uint32))
        assert np.sqrt((error**2).mean(1)).max() < most  # in draws; of independent ones 4, 13 and 58
        assert np.sqrt((deviation**2).mean()) > 3 * most


def test_draws_go_on_where_the_count_wraps():
    last = jnp.int32(2**31 - 1)
    draws = [
        rounding.draws((4096,), rounding.stream(0, "w"), rounding.turn(count))
        for count in (last - 1, last, last + jnp.int32(1))
    ]
    for a, b in itertools.pairwise(draws):
        assert (np.asarray(a) != np.asarray(b)).mean() > 0.99
    np.testing.assert_array_equal(
        draws[2], rounding.draws((4096,), rounding.stream(0, "w"), rounding.turn(jnp.uint32(2**31)))
    )


def test_draws_of_different_elements_are_uncorrelated_at_every_lag():
    n = 2**17
    counts = (0, 1, 2, 5, 1000, 54321)
    lags = {1: [], 2: [], 3: []}
    for count in counts:
        u = np.asarray(rounding.draws((n,), rounding.stream(0, "w"), rounding.turn(count))) / 2**32
        for wave in lags:
            spectrum = np.abs(np.fft.fft(np.exp(2j * np.pi * wave * u), 2 * n)) ** 2
            lags[wave].append(np.fft.ifft(spectrum)[1 : n // 2] / np.sqrt(n))
    for correlations in lags.values():
        assert np.abs(np.mean(correlations, 0)).max() * len(counts) ** 0.5 < 5.5  # deviations; 4.1 is usual in 65,000 lags


def test_a_kernel_draws_for_its_block_what_the_whole_leaf_draws():
    def kernel(stream, out):
        row = pallas.program_id(0) * 8 + jax.lax.broadcasted_iota(jnp.int32, (8, 128), 0)
        index = (row * 128 + jax.lax.broadcasted_iota(jnp.int32, (8, 128), 1)).astype(jnp.uint32)
        out[...] = rounding.draws_at(index, stream[0], rounding.turn(77))

    name = rounding.stream(0, "w")
    drawn = pallas.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((32, 128), jnp.uint32),
        grid=(4,),
        in_specs=[pallas.BlockSpec((1,), lambda _: (0,))],
        out_specs=pallas.BlockSpec((8, 128), lambda i: (i, 0)),
        interpret=True,
    )(name[None])
    np.testing.assert_array_equal(drawn, rounding.draws((32, 128), name, rounding.turn(77)))


@pytest.mark.parametrize("drop", [8, 13, 15, 16])
def test_the_exact_sum_is_rounded_up_with_its_own_probability_and_not_with_that_of_the_float32_sum(drop):
    rng = np.random.default_rng(drop)
    a = rng.choice([1.0, -1.0, 0.5, 1.5, 1 + 2.0**-7, 1.1e-26, 3.0], 4000).astype(np.float32)
    b = (a * rng.choice([-1, 1], 4000) * 2.0 ** rng.uniform(-38, -1, 4000)).astype(np.float32)
    total, rest = jax.jit(rounding.two_sum)(a, b)
    exact = np.abs(a.astype(np.float64) + b)
    np.testing.assert_array_equal(np.abs(np.asarray(total, np.float64) + np.asarray(rest)), exact)
    stochastic = jax.jit(rounding.stochastic, static_argnums=2)
    down = np.abs(np.asarray(stochastic(total, jnp.zeros(4000, jnp.uint32), drop, rest)))
    up = np.abs(np.asarray(stochastic(total, jnp.full(4000, 2**32 - 1, jnp.uint32), drop, rest)))
    above = (down.view(np.uint32) + np.uint32(2**drop)).view(np.float32)
    assert (down <= exact).all()
    assert (above > exact - 2.0**-40 * down).all()
    low, high = np.zeros(4000, np.uint64), np.full(4000, 2**32, np.uint64)  # the least bits that round up, by bisection
    for _ in range(33):
        middle = (low + high) // 2
        rounded = stochastic(total, jnp.asarray(np.minimum(middle, 2**32 - 1).astype(np.uint32)), drop, rest)
        raised = (np.abs(np.asarray(rounded)) > down) & (middle < 2**32)
        low, high = np.where(raised, low, np.minimum(middle + 1, high)), np.where(raised, middle, high)
    probability = 1 - high / 2**32
    np.testing.assert_allclose(
        probability, (exact - down) / (above.astype(np.float64) - down), rtol=0, atol=0.5001 * 2.0 ** -(drop + 16)
    )
    assert ((up == above) | (probability == 0)).all()


@pytest.mark.parametrize("drop", [8, 13, 16])
def test_nothing_finite_is_rounded_to_infinity_even_with_a_rest(drop):
    largest = np.uint32(0x7F800000 - 2**drop).view(np.float32)
    for x in (largest, -largest, np.finfo(np.float32).max, -np.finfo(np.float32).max):
        rest = np.float32(np.sign(x) * 2.0**100)
        rounded = rounding.stochastic(jnp.float32(x), jnp.uint32(2**32 - 1), drop, jnp.float32(rest))
        assert rounded == np.sign(x) * largest


def test_a_rest_counts_in_float16_too():
    x, bits = rounding.number(jnp.uint32(0x3F801FFF)), jnp.uint32(1 << 18)  # an eighth of what raises it by itself
    assert rounding.round_to(x, jnp.float16, bits) == 1
    assert rounding.round_to(x, jnp.float16, bits, jnp.float32(0.75 * 2**-23)) == 1 + 2**-10


@pytest.mark.parametrize("drop", [8, 16])
def test_the_smallest_numbers_are_rounded_to_a_neighbour_even_with_a_rest(drop):
    x = jnp.float32(2.0) ** jnp.arange(-125, -60) * 1.7
    x = jnp.concatenate([x, -x])
    down = rounding.pattern(x) >> drop << drop
    for rest in (x * 2.0**-30, x * -(2.0**-30)):
        for bits, expected in ((0, down), (2**32 - 1, down + np.uint32(2**drop))):
            rounded = rounding.stochastic(x, jnp.full(x.shape, bits, jnp.uint32), drop, rest)
            np.testing.assert_array_equal(rounding.pattern(rounded), expected)
