"""Catching up k skipped steps at once is what k steps with a zero gradient do, for any history, schedule and eps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax import clock, norms
from adam_jax.tables import catching_up

STARTS = (1, 2, 3, 10, 30, 100, 1000)


def _worst_ratio(s, b1, b2):
    """The largest |mhat| / sqrt(vhat) that any s gradients can leave (Cauchy-Schwarz)."""
    first, second = ((1 - b) / -np.expm1(s * np.log(b)) for b in (b1, b2))
    return np.sqrt(first**2 / second * ((b1 * b1 / b2) ** np.arange(s)).sum())


def _step_by_step(value, mu, nu, s, count, settings):
    """The paper's loop in float64, on corrected moments, with gradient zero."""
    rate, b1, b2, eps, decay, _ = settings
    m, v = np.float64(mu) * (1 - b1**s), np.float64(nu) * (1 - b2**s)
    for t in range(s + 1, count + 1):
        lr, wd = (x(t - 1) if callable(x) else x for x in (rate, decay))
        m, v = b1 * m, b2 * v
        below = np.sqrt(v / (1 - b2**t)) + eps
        value = value - lr * (np.divide(m / (1 - b1**t), below, where=below > 0, out=np.zeros_like(m)) + wd * value)
    return value, m / (1 - b1**count), v / (1 - b2**count)


def _case(b1, b2, s):
    """A row whose first moments are as large as they can be, with roots from far below eps to far above."""
    roots = np.logspace(-6, 6, 49)
    mu = (roots * _worst_ratio(s, b1, b2)).astype(np.float32)
    return np.zeros_like(mu), mu, (roots**2).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _catch_up(settings, rows, count, log_keep):
    return catching_up.catch_up(settings, rows, count, log_keep)


def _caught_up(settings, s, count, value, mu, nu):
    decays = settings.decays()
    ledger = [None, None]
    if decays:
        rates, decay = (np.float64(clock.at(x, np.arange(count))) for x in (settings.learning_rate, settings.weight_decay))
        logs = np.log1p(-rates * decay)
        ledger = [jnp.array([total, total - np.float32(total)], jnp.float32) for total in (logs[:s].sum(), logs.sum())]
    rows = catching_up.Rows(*(jnp.asarray(a, jnp.float32)[None] for a in (value, mu, nu)), jnp.array([s]), None)
    if decays:
        rows = rows._replace(log_keep=ledger[0][None])
    out = _catch_up(settings, rows, count, ledger[1])
    return [np.asarray(a[0], np.float64) for a in (out.now, out.mu, out.nu)]


# Bounds: the worst found over these histories, with a margin of 2; the docstring's own bound is for all of them.
BOUNDS = {
    (0.9, 0.999): 1.5e-4,
    (0.9, 0.99): 3e-4,
    (0.9, 0.95): 8e-5,
    (0.99, 0.999): 2e-3,
    (0.5, 0.9): 1.5e-5,
    (0.3, 0.1): 1e-6,
    (0.05, 0.003): 1e-6,
}


@pytest.mark.parametrize(("b1", "b2"), BOUNDS)
def test_a_catch_up_follows_every_history_and_every_eps(b1, b2):
    for s in STARTS:
        for skip in (0, 1, 2, 5, 40, 800):
            settings = catching_up.Settings(1.0, b1, b2, 1.0, 0.0)
            row = _case(b1, b2, s)
            got, want = _caught_up(settings, s, s + skip, *row), _step_by_step(*row, s, s + skip, settings)
            # float32 rounds a displacement of up to 200 learning rates to 2e-5 of them
            np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=BOUNDS[b1, b2], err_msg=f"{s} then {skip}")
            # exp(x) in float32 is off by x/2 ulp: at x = 8 that is 5e-7; what is left then does not matter
            np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6 * np.abs(row[1]).max())
            np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-6 * np.abs(row[2]).max())


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_a_catch_up_follows_second_moments_that_vanish_long_before_the_first(eps):
    settings = catching_up.Settings(1.0, 0.1, 0.0105, eps, 0.0)
    row = _case(0.1, 0.0105, 3)
    got, want = _caught_up(settings, 3, 123, *row), _step_by_step(*row, 3, 123, settings)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-4)


SCHEDULES = {
    "inverse square root": lambda t: 1.0 / (t + 1.0) ** 0.5,
    "one step in seven": lambda t: (t % 7 == 0) * 1.0,
    "steps": lambda t: 0.1 ** (t // 100),
}


@pytest.mark.parametrize("decay", [0.0, 0.3, lambda t: 0.3 / (t + 1.0)], ids=["none", "constant", "falling"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_catch_up_follows_schedules_and_weight_decay(schedule, decay):
    settings = catching_up.Settings(schedule, 0.9, 0.999, 1e-2, decay)
    for s in (1, 20, 500):
        value, mu, nu = _case(0.9, 0.999, s)
        row = value + 1.0, mu, nu
        got, want = _caught_up(settings, s, s + 300, *row), _step_by_step(*row, s, s + 300, settings)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1.2e-4)  # as above


@pytest.mark.parametrize("count", [1, 40, 5000])
def test_the_decay_of_a_row_that_was_never_touched_is_the_product_over_all_steps(count):
    settings = catching_up.Settings(lambda t: 0.1 / (1.0 + t), 0.9, 0.999, 0.0, 0.1)
    value, *_ = _caught_up(settings, 0, count, np.ones(1), np.zeros(1), np.zeros(1))
    want = np.prod(1 - 0.01 / (1.0 + np.arange(count)))
    np.testing.assert_allclose(value, want, rtol=1e-6)  # one float32 exponential of a sum kept in two parts


def test_a_catch_up_of_roots_is_that_of_their_squares_and_counts_the_steps():
    settings = catching_up.Settings(1.0, 0.9, 0.999, 1e-2, 0.0)
    value, mu, nu = (jnp.asarray(x)[None] for x in _case(0.9, 0.999, 5))
    squares, roots = (
        _catch_up(settings._replace(norm=norm), catching_up.Rows(value, mu, kept, jnp.array([5]), None), 45, None)
        for norm, kept in ((norms.Square(), nu), (norms.Root(), jnp.sqrt(nu)))
    )
    np.testing.assert_allclose(roots.now, squares.now, rtol=1e-5)
    np.testing.assert_allclose(roots.nu, jnp.sqrt(squares.nu), rtol=1e-5)
    np.testing.assert_array_equal((squares.count, roots.count), 45)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_a_catch_up_at_traced_settings_is_that_at_numbers(b1):
    numbers = 0.1, b1, 0.99, 1e-2, 0.1
    value, mu, nu = (jnp.stack([x, x]) for x in _case(0.9, 0.99, 5))
    ledger = jnp.zeros((2, 2))

    def catch_up(*numbers):
        rows = catching_up.Rows(value + 1.0, mu, nu, jnp.array([5, 45]), ledger)
        return catching_up.catch_up(catching_up.Settings(*numbers), rows, 45, ledger[0] + 40 * np.log(0.99))

    want, got = jax.jit(lambda: catch_up(*numbers))(), jax.jit(catch_up)(*numbers)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, want)


@pytest.mark.parametrize("shape", [(0.5, 0.5), (3.0, 1.0), (1.0, 9.0), (0.2, 5.0)], ids=str)
def test_two_nodes_have_the_sums_of_all_steps_of_a_band(shape):
    rng = np.random.default_rng(0)
    y, c, x_first = rng.beta(*shape, (9, 30)), rng.random((9, 30)), np.linspace(0.5, 3, 9)
    c[0, 1:], c[1, :] = 0.0, 0.0  # a single step, and none
    sums = catching_up._Sums(jnp.zeros(9), tuple(jnp.asarray((c * y**i).sum(1), jnp.float32) for i in range(4)))
    nodes = catching_up._two_nodes(sums, jnp.asarray(x_first, jnp.float32))
    x = x_first[:, None] * (1.0 + y)
    for i in range(4):
        got, want = sum(np.float64(c) * np.float64(x) ** i for c, x in nodes), (c * x**i).sum(1)
        np.testing.assert_allclose(got, want, rtol=3e-5)


@pytest.mark.parametrize("off", [-1e-7, 1e-7])
def test_two_nodes_that_rounding_has_led_astray_weigh_nothing(off):
    powers = tuple(jnp.full(1, power, jnp.float32) for power in (1.0, 0.25, 0.25**2 + 2.0**-27, 0.25**3 + off))
    (c1, x1), (c2, x2) = catching_up._two_nodes(catching_up._Sums(jnp.zeros(1), powers), jnp.full(1, 2.0))
    assert min(x1, x2) >= 2
    np.testing.assert_allclose(c1 / (0.5 + x1) + c2 / (0.5 + x2), 1 / (0.5 + 2.5), rtol=1e-6)


def test_decays_are_not_rounded_to_float32():
    settings = catching_up.Settings(1.0, 0.9, 0.9999, 1.0, 0.0)
    *_, nu = _caught_up(settings, 1000, 41_000, *np.ones((3, 1)))
    want = 0.9999**40_000 * (1 - 0.9999**1000) / (1 - 0.9999**41_000)
    np.testing.assert_allclose(nu, want, rtol=1e-5)  # off by 7e-4 at the float32 number next to .9999


def test_the_steps_left_out_by_the_cut_move_no_coordinate_by_more_than_it_says():
    def cut(b1, b2):
        return int(catching_up._cut(catching_up.Settings(1.0, b1, b2, 1e-8, 0.0)))

    for b1, b2 in ((0.9, 0.999), (0.99, 0.999), (0.5, 0.9), (0.0, 0.999), (0.1, 0.9), (0.2, 0.9), (0.02, 0.5)):
        last = cut(b1, b2)
        bound = (1 - b1) / np.sqrt((1 - b2) * (1 - b1 * b1 / b2))
        left, more = (bound * ((b1 / np.sqrt(b2)) ** np.arange(k + 1, 50 * last + 1)).sum() for k in (last, last - 2))
        assert left <= catching_up.CUT < more  # and there are no more steps than that takes
    assert cut(0.9, 0.999) == 151
    assert cut(jnp.float32(0.9), jnp.float32(0.999)) in (151, 152)  # the same for traced decays


def test_a_catch_up_has_no_loop_over_the_steps_skipped():
    settings = catching_up.Settings(1.0, 0.9, 0.999, 1e-8, 0.0)
    row = jnp.ones((1, 1))
    far, near = (
        _catch_up(settings, catching_up.Rows(row, row, row, jnp.array([1000]), None), count, None)
        for count in (2_000_000_000, 1152)
    )
    np.testing.assert_array_equal(far.now, near.now)  # two billion steps would not end
    assert float(far.mu[0, 0]) == 0.0


@pytest.mark.parametrize("skip", [40, 150, 1000, 100_000])
@pytest.mark.parametrize("shrink", [1e-6, 1e-7, 2.5e-8])
def test_a_weight_decay_below_half_a_unit_of_float32_acts_over_many_skipped_steps(skip, shrink):
    settings = catching_up.Settings(1.0, 0.9, 0.999, 1e-8, shrink)
    values = 1.5 + jnp.arange(512)[None] / 512  # of many roundings; one has half a unit
    log_keep = skip * np.log1p(-shrink)
    ledger = jnp.array([log_keep, log_keep - np.float32(log_keep)], jnp.float32)
    zero = jnp.zeros_like(values)
    rows = catching_up.Rows(values, zero, zero, jnp.array([1]), jnp.zeros((1, 2)))
    after = _catch_up(settings, rows, 1 + skip, ledger).now
    shrunk = np.log(np.asarray(after, np.float64) / np.asarray(values)).mean()
    assert abs(shrunk / log_keep - 1) < 1e-3  # of single factors 1.19 at 1e-7, and none at 2.5e-8


@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_a_weight_decay_that_takes_all_of_a_weight_leaves_nothing_and_no_nan(rate):
    assert -np.inf < catching_up.log_decay(rate, 1.0, jnp.float32) < np.log(2e-6)
