"""The bound on |m| / s, which narrow moments rely on, is the supremum over all histories of gradients and of decays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from adam_jax import clock, moments, norms, storage

STEPS = 60
SCHEDULES = {
    "constant": lambda _: (0.9, 0.999),
    "no momentum": lambda _: (0.0, 0.999),
    "heavy momentum": lambda _: (0.98, 0.95),
    "b2 falls": lambda t: (0.9, 0.999 if t < 40 else 0.9),
    "b1 rises": lambda t: (0.5 if t < 40 else 0.99, 0.999),
    "both wander": lambda t: (0.5 + 0.45 * np.sin(t), 0.9 + 0.09 * np.cos(2.0 * t)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cube(norms.Norm):
    """A norm of a user's own, written without a word on bounds: (average of |g|^3)^(1/3), corrected."""

    @property
    def exponent(self):
        """The p of the norm."""
        return 3.0

    def advance(self, nus, g, t):
        """The average of |g|^3, of which the root is kept."""
        return ((nus[0] ** 3 + t.moved * (jnp.abs(g) ** 3 - nus[0] ** 3)) ** (1 / 3),)

    def size_scale(self, weight):
        """As the root of a multiple."""
        return weight ** (1 / 3)


def _supremum(p, decays, *, corrected=True, own=False):
    """The largest m / s at each step, over all gradients, from what each of them weighs (Hölder), in float64."""
    alphas, betas, found, w1, w2 = [], [], [], 0.0, 0.0
    for b1, b2 in decays:
        b2 = b2 if own or np.isinf(p) else b2**p
        alphas = [a * b1 for a in alphas] + [1 - b1]
        betas = [b * b2 for b in betas] + [1.0 if np.isinf(p) else 1 - b2]
        w1, w2 = w1 * b1 + 1 - b1, 1.0 if np.isinf(p) else w2 * b2 + 1 - b2
        a, b = np.array(alphas), np.array(betas)
        if p == 1:
            ratio = (a / b).max()
        else:
            q = 1.0 if np.isinf(p) else p / (p - 1)
            ratio = ((a / b ** (0.0 if np.isinf(p) else 1 / p)) ** q).sum() ** (1 / q) if not np.isinf(p) else (a / b).sum()
        found.append(ratio * (w2 ** (0.0 if np.isinf(p) else 1 / p) / w1 if corrected else 1.0))
    return np.array(found)


def _bounds(norm, decays, *, corrected=True):
    """What the carried bound says at each step."""
    weights, bound, found = (jnp.float32(0), jnp.float32(0)), jnp.float32(0), []
    for count, (b1, b2) in enumerate(decays):
        m = clock.tick(1 - b1, weights[0], count, corrected=corrected)
        v = norm.tick(1 - b2, weights[1], count, corrected=corrected)
        bound, weights = norm.next_ratio(bound, m.moved, v), (m.weight, v.weight)
        found.append(float(bound))
    return np.array(found)


NORMS = {
    "p = 1": (norms.Power(1.0), 1.0, False),
    "p = 1.5": (norms.Power(1.5), 1.5, False),
    "root": (norms.Root(), 2.0, True),
    "square": (norms.Square(), 2.0, True),
    "p = 3": (norms.Power(3.0), 3.0, False),
    "p = 1e5": (norms.Power(1e5), 1e5, False),
    "infinity": (norms.Infinity(), np.inf, False),
    "a user's own": (Cube(), 3.0, True),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NORMS)
def test_the_carried_bound_is_the_supremum_over_all_gradients_whatever_the_decays(name, schedule):
    norm, p, own = NORMS[name]
    decays = [SCHEDULES[schedule](t) for t in range(STEPS)]
    expected = _supremum(p if p < 1e4 else np.inf, decays, own=own)  # at p = 1e5 the norm is that of infinity, to 1e-4
    np.testing.assert_allclose(_bounds(norm, decays), expected, rtol=3e-3 if p > 1e4 and np.isfinite(p) else 2e-4)


def test_without_correction_the_bound_is_that_of_raw_moments():
    decays = [SCHEDULES["both wander"](t) for t in range(STEPS)]
    expected = _supremum(2.0, decays, own=True, corrected=False)
    np.testing.assert_allclose(_bounds(norms.Root(), decays, corrected=False), expected, rtol=2e-4)


@pytest.mark.parametrize("name", NORMS)
def test_at_constant_decays_the_bound_comes_to_the_largest(name):
    norm, p, own = NORMS[name]
    b1, b2 = (0.5, 0.9) if own or np.isinf(p) else (0.5, 0.9 ** (1 / max(p if p < 100 else 1.0, 1.0)))
    limit = float(norm.largest_ratio(jnp.float32(1 - b1), jnp.float32(1 - b2)))
    bounds = _bounds(norm, [(b1, b2)] * 200)
    np.testing.assert_allclose(bounds[-1], limit, rtol=1e-4)
    assert np.isfinite(limit)


def test_a_multiple_of_a_moment_has_a_size_and_a_kept_number_to_match():
    for norm, size, kept in (
        (norms.Square(), 2, 4),
        (norms.Root(), 2, 2),
        (norms.Infinity(), 1, 1),
        (norms.Power(4.0), np.sqrt(2), np.sqrt(2)),
        (norms.Largest(norms.Square()), 2, 4),
        (norms.Largest(norms.Root()), 2, 2),
    ):
        np.testing.assert_allclose((norm.size_scale(4.0), norm.scale(4.0)), (size, kept), rtol=1e-6)


def test_the_largest_ratio_is_that_of_cauchy_and_schwarz_and_infinite_for_heavy_momentum():
    found = norms.Root().largest_ratio(jnp.float32(0.1), jnp.float32(0.001))
    assert float(found) == pytest.approx(0.1 / np.sqrt(0.001 * (1 - 0.81 / 0.999)), rel=1e-4)
    for b1, b2 in ((0.98, 0.95), (0.9, 0.0), (0.99, 0.9)):
        assert np.isinf(norms.Root().largest_ratio(jnp.float32(1 - b1), jnp.float32(1 - b2)))
    assert float(norms.Root().largest_ratio(jnp.float32(1), jnp.float32(1))) == pytest.approx(1)  # no averages at all
    assert np.isinf(norms.Root().largest_ratio(jnp.float32(0.1), jnp.float32(0)))  # of a norm that never moves


def test_a_bound_without_limit_stays_a_number_and_comes_down_with_the_decays():
    tick = clock.tick(0.1, jnp.float32(1), 5000)
    bound = jax.lax.fori_loop(0, 3000, lambda _, bound: norms.Root().next_ratio(bound, 0.01, tick), jnp.float32(1))
    assert float(bound) == pytest.approx(norms.UNBOUNDED)
    for new in (0.0, 1.0):  # a norm that never moves, or that forgets at once
        for before in (0.0, bound):
            assert (
                0
                <= float(norms.Root().next_ratio(before, 0.1, clock.tick(new, jnp.float32(1), 9)))
                <= 1.01 * norms.UNBOUNDED
            )
    bound = norms.Root().next_ratio(bound, 1.0, clock.tick(0.001, jnp.float32(1), 5000))
    assert float(bound) == pytest.approx(1 / np.sqrt(0.001), rel=1e-4)


def test_a_bound_stays_where_neither_moment_moves():
    bound = norms.Root().next_ratio(5.0, 0.0, clock.tick(0.0, jnp.float32(1), 9))
    assert float(bound) == pytest.approx(5.0)


@pytest.mark.parametrize("eps_root", [None, 0.5])
def test_sizes_are_those_of_the_paper_and_of_amsgrad_whether_squares_are_kept_or_roots(eps_root):
    for norm in (norms.Square(eps_root), norms.Root(eps_root), norms.Root(eps_root, coarse=True)):
        v = weight = largest = largest_hat = 0.0
        ways = (norm, norms.Largest(norm), norms.Largest(norm, raw=False))
        kept = [((jnp.float32(0),) * way.slots, jnp.float32(0)) for way in ways]
        for count, g in enumerate((3.0, -1.0, 0.1, 0.2)):
            v, weight = 0.9 * v + 0.1 * g * g, 0.9 * weight + 0.1
            largest, largest_hat = max(largest, v), max(largest_hat, v / weight)
            for i, (way, square) in enumerate(zip(ways, (v / weight, largest / weight, largest_hat), strict=True)):
                tick = way.tick(0.1, kept[i][1], count)
                kept[i] = way.advance(kept[i][0], jnp.float32(g), tick), tick.weight
                np.testing.assert_allclose(way.size(kept[i][0], tick), np.sqrt(square + (eps_root or 0.0)), rtol=1e-6)


def test_first_moments_beside_roots_move_even_where_a_move_alone_would_be_flushed_to_zero():
    for norm in (norms.Root(), norms.Power(3.0), norms.Largest(norms.Root())):
        np.testing.assert_allclose(norm.average(jnp.float32(3e-38), jnp.float32(5e-38), 0.1), 3.2e-38, rtol=1e-6)


def test_one_gradient_may_move_the_norm_of_infinity_all_the_way():
    for norm in (norms.Infinity(), norms.Largest(norms.Infinity())):
        tick = norm.tick(0.001, jnp.float32(0.5), 7)
        assert (float(tick.moved), float(tick.rate)) == (1.0, np.float32(0.001))


def test_a_norm_is_coarse_where_it_is_asked_to_be_and_nowhere_else():
    for norm in (norms.Root(1e-9), norms.Square(1e-9)):
        for made, coarse in ((norm.rooted(), False), (norm.rooted(coarse=True), True), (norm.rooted(coarse=False), False)):
            assert made == norms.Root(1e-9, coarse)
        for raw in (True, False):
            assert norms.Largest(norm, raw).rooted() == norms.Largest(norms.Root(1e-9), raw)
            assert norms.Largest(norm, raw).rooted(coarse=True) == norms.Largest(norms.Root(1e-9, coarse=True), raw)
    assert not norms.Root().coarse


def test_the_largest_is_of_raw_moments_unless_it_is_asked_for_as_they_are_kept():
    assert norms.Largest(norms.Square()) == norms.Largest(norms.Square(), raw=True)
    for of, corrected in ((norms.Square(), norms.CorrectedSquares), (norms.Root(), norms.CorrectedRoots)):
        assert norms.Largest(of).form is of.form
        assert norms.Largest(of, raw=False).form is corrected


@pytest.mark.parametrize("name", NORMS)
def test_gradients_come_as_near_to_the_bound_as_rounding_allows_and_no_nearer(name):
    """The gradients that attain Hölder's bound, fed to the norm itself."""
    norm, p, own = NORMS[name]
    decays = [SCHEDULES["both wander"](t) for t in range(STEPS)]
    keep = [(b1, b2 if own or np.isinf(p) or p > 1e4 else b2**p) for b1, b2 in decays]
    a = np.array([(1 - b1) * np.prod([x for x, _ in keep[t + 1 :]]) for t, (b1, _) in enumerate(keep)])
    if np.isinf(p) or p > 1e4:
        g = np.array([1 / np.prod([y for _, y in keep[t + 1 :]]) for t in range(STEPS)])
    elif p == 1:
        b = np.array([(1 - b2) * np.prod([y for _, y in keep[t + 1 :]]) for t, (_, b2) in enumerate(keep)])
        g = np.where(np.arange(STEPS) == (a / b).argmax(), 1.0, 0.0)
    else:
        b = np.array([(1 - b2) * np.prod([y for _, y in keep[t + 1 :]]) for t, (_, b2) in enumerate(keep)])
        g = (a / b) ** (1 / (p - 1))
    m, nus, weights = jnp.float32(0), (jnp.float32(0),), (jnp.float32(0), jnp.float32(0))
    second: Any = None
    for count, (x, (b1, b2)) in enumerate(zip(g / g.max(), decays, strict=True)):
        first = clock.tick(1 - b1, weights[0], count)
        second = norm.tick(1 - b2, weights[1], count)
        m, nus = moments.average(m, jnp.float32(x), first.moved), norm.advance(nus, jnp.float32(x), second)
        weights = first.weight, second.weight
    bound = _bounds(norm, decays)[-1]
    assert float(m) <= bound * float(norm.size(nus, second)) * (1 + 1e-4)
    assert float(m) >= bound * float(norm.size(nus, second)) * (1 - 4e-3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RawCube(Cube):
    """The same without correction."""

    @property
    def corrected(self):
        """No."""
        return False


@pytest.mark.parametrize("make", [lambda norm: norm, norms.Largest], ids=["itself", "its largest"])
def test_a_norm_of_ones_own_can_be_left_uncorrected(make):
    for norm, step in ((Cube(), 1.0), (RawCube(), 0.001 ** (-1 / 3))):
        tx = adam_jax.scale_by_norm(make(norm), eps=0.0)
        np.testing.assert_allclose(tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))[0], step, rtol=1e-5)


@pytest.mark.parametrize("how", ["bfloat16", storage.int8(smallest=0)], ids=["bfloat16", "int8"])
def test_a_norm_of_ones_own_is_bounded_in_few_bits_as_in_float32(how):
    n, limit = 256, float(Cube().largest_ratio(jnp.float32(0.1), jnp.float32(0.01)))
    grow = (0.99 / 0.9) ** 0.5  # Hölder's worst case: gradients grow by (b2 / b1)^(1 / (p - 1)) a step
    gradients = jnp.asarray(grow ** (np.arange(400.0) - 400), jnp.float32)[:, None] * jnp.ones(n)
    updates = []
    for storage_ in (how, None):
        tx = adam_jax.scale_by_norm(Cube(), 0.9, 0.99, 0.0, storage=storage_)
        play = jax.jit(lambda g, tx=tx: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])
        updates.append(np.asarray(play(gradients)))
    narrow, exact = updates
    assert narrow.max() <= limit * (1 + 1e-5)
    assert exact[-1].max() > 0.97 * limit  # it is attained
    assert narrow[-1].mean() > 0.85 * limit
