"""Narrow moments beside float32 ones where the defaults end: other decays, schedules, rare gradients, very long runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from adam_jax import norms, storage

NARROW = {"bfloat16": {"storage": "bfloat16"}, "int8": {"storage": storage.int8(smallest=0)}}
every_storage = pytest.mark.parametrize("how", NARROW.values(), ids=NARROW)
Gradient = Callable[[jax.Array], jax.Array]


def _both(make: Callable[..., Any], how: dict[str, Any], gradient: Gradient, steps: int, since: int = 0) -> Any:
    """Sums over the steps from `since` on of |u| and u^2 for each element: of narrow moments, and of float32 ones."""
    pair = make(eps=0.0, **how), make(eps=0.0, storage="root")
    zero = jnp.zeros(gradient(jnp.int32(0)).shape)

    def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
        states, sums = [], []
        for tx, state, total in zip(pair, *carry, strict=True):
            u, state = tx.update(gradient(t), state)
            u = jnp.where((t >= since) & (gradient(t) != 0), u, 0.0)
            states.append(state)
            sums.append(total + jnp.stack([jnp.abs(u), u * u]))
        return (states, sums), None

    start = [tx.init(zero) for tx in pair], [jnp.stack([zero, zero])] * 2
    (_, sums), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))(start)
    return np.asarray(sums)


def _normal(t: jax.Array, n: int = 1024) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), t), (n,))


@every_storage
@pytest.mark.parametrize(("b1", "b2"), [(0.98, 0.95), (0.99, 0.9)])
def test_heavy_momentum_is_followed_and_what_lies_below_the_window_moves_too_little_never_too_much(b1, b2, how):
    below = jnp.arange(1024) % 2 == 1

    def make(**settings: Any) -> Any:
        return adam_jax.scale_by_adam(b1, b2, **settings)

    # b1^2 >= b2, so that m / s is not bounded: after 2500 steps at .99 and .9 its bound is beyond float32
    narrow, exact = _both(make, how, lambda t: _normal(t) * jnp.where(below, 1e-12, 1.0), 2500, 2000)[:, 1]
    size = np.sqrt([narrow[~below].sum() / exact[~below].sum(), narrow[below].sum() / exact[below].sum()])
    assert size[0] == pytest.approx(1, abs=0.06 if how is NARROW["int8"] else 0.01)  # measured at most 1.025
    assert size[1] == pytest.approx(1, abs=0.01) if how is NARROW["bfloat16"] else size[1] < 0.01  # measured 1e-3


SCHEDULES: dict[str, tuple[Any, Any]] = {
    "b2 falls": (0.9, lambda t: jnp.where(t < 100, 0.999, 0.9)),
    "b1 rises": (lambda t: jnp.where(t < 100, 0.5, 0.99), 0.999),
}


@every_storage
@pytest.mark.parametrize(
    ("make", "nesterov"),
    [(adam_jax.scale_by_adam, False), (adam_jax.scale_by_adam, True), (adam_jax.scale_by_adamax, False)],
    ids=["adam", "nadam", "adamax"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moments_made_under_other_decays_are_not_cut(schedule, make, nesterov, how):
    """Gradients that grow nearly as Hölder's worst case does; at the bound itself it would cut half of the rounding."""
    b1, b2 = SCHEDULES[schedule]
    at = [np.array([float(b(t)) if callable(b) else b for t in range(121)]) for b in (b1, b2)]
    weights = [(1 - b[:-1]) * np.append(np.cumprod(b[1:-1][::-1])[::-1], 1.0) for b in at]
    adamax = make is adam_jax.scale_by_adamax
    worst = (1 - at[1][:-1]) / weights[1] if adamax else weights[0] / weights[1]
    gradients = jnp.asarray((worst / worst.max()) ** 0.8, jnp.float32)[:, None] * jnp.ones(2048)
    updates = []
    for settings in (how, {"storage": "root"}):
        tx = make(b1, b2, eps=0.0, nesterov=nesterov, **settings)
        run = jax.jit(lambda g, tx=tx: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])
        updates.append(np.asarray(run(gradients)))
    narrow, exact = updates
    np.testing.assert_allclose(narrow[-15:].mean(1), exact[-15:].mean(1), rtol=0.04)
    now = norms.Infinity() if adamax else norms.Root()
    today = float(now.largest_ratio(*(jnp.float32(1 - b[-2]) for b in at)))
    if not nesterov and not adamax:
        assert exact[-1].mean() > 2 * today  # which today's decays alone would not allow


def test_adamaxs_maximum_keeps_for_a_while_what_int8_rounded_up():
    """At constant gradients, steps over float32's: those that `scale_by_adamax` states."""
    g = jnp.asarray(10.0 ** np.random.default_rng(0).uniform(-2, 0, 8192), jnp.float32)

    def steps(tx: Any) -> np.ndarray:
        return np.asarray(jax.jit(lambda: jax.lax.scan(lambda s, _: tx.update(g, s)[::-1], tx.init(g), length=300)[1])())

    ratios = steps(adam_jax.scale_by_adamax(storage="int8")) / steps(adam_jax.scale_by_adamax())
    means = ratios.mean(1)
    assert 0.83 < means[2:50].min() < means[2:50].max() < 0.88
    assert means[299] == pytest.approx(0.95, abs=0.01)
    assert 0.49 < ratios.min() < 0.51


@every_storage
@pytest.mark.parametrize("kind", ["sparse", "Cauchy"])
@pytest.mark.parametrize(("b1", "b2"), [(0.0, 0.999), (0.5, 0.9999), (0.9, 0.9999)])
def test_rare_and_heavy_tailed_gradients_are_followed_at_all_decays(b1, b2, kind, how):
    def gradient(t: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(3), t)
        rare = jnp.where(jax.random.uniform(key, (512,)) < 1 / 200, 1.0, 0.0)
        return rare if kind == "sparse" else jax.random.cauchy(key, (512,))

    narrow, exact = _both(lambda **how: adam_jax.scale_by_adam(b1, b2, **how), how, gradient, 1500, 300)[:, 1]
    # measured 1.021 at worst; with the codes of the default decays .63 and .39
    assert np.sqrt(narrow.sum() / exact.sum()) == pytest.approx(1, abs=0.03)


PERIODS = (1, 89, 100, 144, 233, 377)


@every_storage
def test_gradients_that_come_every_k_steps_are_followed_whatever_k(how):
    periods = jnp.tile(jnp.array(PERIODS), 128)
    sums = _both(
        lambda **how: adam_jax.scale_by_adam(b2=0.9999, **how),
        how,
        lambda t: jnp.where(t % periods == 0, 1.0, 0.0),
        15_000,
        5000,
    )
    ratio = (sums[0, 0] / sums[1, 0]).reshape(-1, len(PERIODS))  # of an element's mean step to that of float32
    # measured 1.02 and .84 to 1.24 in int8; draws that resonate had a mean of 1.57 and elements from .95 to 2.28 at 144
    assert np.abs(ratio.mean(0) - 1).max() < 0.03
    assert np.abs(ratio - 1).max() < (0.35 if how is NARROW["int8"] else 0.05)


@every_storage
def test_the_first_steps_of_heavy_momentum_are_not_cut(how):
    """There the bound grows from step to step, and a constant gradient is nearly what attains it."""
    tx = adam_jax.scale_by_adam(0.98, 0.95, eps=0.0, **how)
    state = tx.init(jnp.zeros(4096))
    for _ in range(4):
        updates, state = tx.update(jnp.full(4096, 0.37), state)
        assert float(updates.mean()) == pytest.approx(1, abs=0.03)  # from a bound of zero the second would be .71


@every_storage
@pytest.mark.parametrize(("b1", "b2"), [(0.0, 0.9), (0.93, 0.95)])
def test_where_a_history_attains_the_bound_no_step_passes_it_and_none_is_two_percent_short_on_average(b1, b2, how):
    # Cauchy-Schwarz: gradients that grow by b2 / b1 each step
    gradients = jnp.asarray((b2 / max(b1, 1e-9)) ** np.arange(-299.0, 1.0), jnp.float32)[:, None] * jnp.ones(2048)
    tx = adam_jax.scale_by_adam(b1, b2, eps=0.0, **how)
    updates = jax.jit(lambda g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])(gradients)[-1]
    limit = float(norms.Root().largest_ratio(jnp.float32(1 - b1), jnp.float32(1 - b2)))
    assert float(updates.max()) <= limit * (1 + 1e-5)
    assert float(updates.mean()) > 0.98 * limit


@every_storage
def test_rounding_goes_on_at_the_end_of_int32(how):
    """A count that stood still there would draw the same for ever: steps would be .62 of what they should."""
    gradients = _normal(jnp.int32(0), 3000 * 512).reshape(3000, 512)
    tx = adam_jax.scale_by_adam(eps=0.0, **how)

    @jax.jit
    def size(count: jax.Array) -> jax.Array:
        state = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(gradients[0]), gradients[:50])[0]
        state = state._replace(count=count, mu_weight=jnp.float32(1), nu_weight=jnp.float32(1))
        state, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, gradients)
        return jnp.sqrt(jnp.mean(updates[-1000:] ** 2))

    assert float(size(jnp.int32(2**31 - 60))) == pytest.approx(float(size(jnp.int32(10**6))), rel=0.02)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.98, 0.95)])
def test_codes_stay_the_same_at_constant_decays_and_are_finite_where_ratios_have_no_bound(b1, b2):
    tx = adam_jax.scale_by_adam(b1, b2, **NARROW["int8"])
    state, bounds = tx.init(jnp.zeros(4)), []
    for _ in range(3):
        _, state = jax.jit(tx.update)(jnp.ones(4), state)
        bounds.append(float(state.codes.bound))
    if b1**2 < b2:
        assert set(bounds) == {float(norms.Root().largest_ratio(1 - b1, 1 - b2))}
    else:
        assert 1.0 == bounds[0] < bounds[1] < bounds[2] < 1.001
    _, state = jax.jit(tx.update)(jnp.ones(4), state._replace(count=jnp.int32(0)))
    assert float(state.codes.bound) == bounds[0]  # a restart forgets what was possible before


@every_storage
@pytest.mark.parametrize("times", [10.0, 1e4])
def test_the_step_of_nadam_at_a_sudden_gradient_is_that_of_float32(how, times):
    def gradient(t):
        return jnp.full(64, jnp.where(t == 300, times, 1.0))

    got, want = _both(functools.partial(adam_jax.scale_by_adam, nesterov=True), how, gradient, 301, since=300)
    np.testing.assert_allclose(got[0].mean(), want[0].mean(), rtol=0.03)  # with 1e4 int8 was at 2.7 times of it


@every_storage
@pytest.mark.parametrize("nesterov", [False, True])
def test_where_a_schedule_stops_the_second_moment_steps_are_those_of_float32(how, nesterov):
    def gradient(t):
        return jnp.full(64, jnp.where(t > 6, 30.0, 1.0))

    make = functools.partial(
        adam_jax.scale_by_adam, 0.9, lambda t: jnp.where(jnp.asarray(t) < 5, 0.9, 1.0), nesterov=nesterov
    )
    got, want = _both(make, how, gradient, 12, since=7)
    np.testing.assert_allclose(got[-1].mean(), want[-1].mean(), rtol=0.05)  # a tenth of it, where gradients were cut
