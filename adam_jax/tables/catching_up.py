"""What dense Adam does to the rows of a table while their gradient is zero, for any number of steps at once.

Let mhat and vhat be a row's corrected moments after step s, its last, and w1, w2 their weights (`clock`). Without
gradients, dense Adam's step s + j subtracts lr_{s+j} times

    p_j mhat / (sqrt(vhat) / x_j + eps)  =  C_j mhat / (sqrt(vhat) + eps x_j),        C_j = p_j x_j,
    p_j = b1^j w1_s / w1_{s+j},    x_j = sqrt(w2_{s+j} / (b2^j w2_s)),

where C_j and x_j are one number a row. So a sum over j costs numbers a row, not numbers an element, if the 1 / (r + eps x_j)
can be replaced by few fractions. They can: over a *band* of steps in which x_j changes little, a Gauss rule with two nodes,
found from sum C_j x_j^i for i < 4, stands for all of them. Three facts bound the work and the error, in learning rates:

* *Cut.* |m| <= B sqrt(v) for the raw moments of any history (`norms`), B = 7.27 at the default decays, so that step s + j
  moves a coordinate by at most B rho^j / w1_{s+j}, rho = b1 / sqrt(b2). The steps after the first K together move it by less
  than B rho^(K+1) / (1 - rho) / w1_K; K is chosen to make that 1e-5 (151 steps at the default decays). Decay of the weights
  has no cut: its logarithms are added up in the state.
* *Gauss.* A rule with two nodes errs by f''''/4! times the integral of a squared monic quadratic, for f(x) = 1 / (r + eps x)
  and x in [a, kappa a] at most (kappa - 1)^4 / 780 of what the band would add if eps were 0. It is exact where eps is
  negligible, where it outweighs the root, and for bands of two steps.
* *Bands.* A band that starts after j steps has max(2, s + j) steps and at most .35 / -log b2, so kappa <= sqrt(2 e^.35) =
  1.69, and less than 1.2 once s > 200: there one band holds all K steps. Against a sum step by step, the worst over all
  histories, s and eps was 1e-4 at b1 = .9 and 1e-3 at b1 = .99 (b2 = .999; `tests/test_catching_up.py`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import clock, moments, norms
from adam_jax.clock import Tick
from adam_jax.norms import Norm

__all__ = ["Rows", "Settings", "catch_up", "log_decay", "tick"]

CUT = 1e-5  # what the steps left out of a catch-up may add up to, in learning rates
UNROLL = 4  # steps in one turn of the innermost loop
LEAST = 1.2e-38  # a float32 number that processors without subnormal numbers have


class Settings(NamedTuple):
    """The numbers of Adam; learning rate and weight decay may be schedules of the count."""

    learning_rate: ArrayLike | optax.Schedule
    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    weight_decay: ArrayLike | optax.Schedule
    norm: Norm = norms.Square()  # what is kept of the second moment: v, or its root

    def decays(self) -> bool:
        """Whether there is a weight decay: whether it is anything but the number 0."""
        return not (isinstance(self.weight_decay, (int, float)) and self.weight_decay == 0)

    def largest_ratio(self) -> jax.Array:
        """The most that |m| / sqrt(v) can be, corrected or not.

        Corrected moments have sqrt((1 - x) (1 - y)) / (1 - sqrt(x y)) <= 1 of it, where x = b2^t and y = (b1^2 / b2)^t.
        """
        return self.norm.largest_ratio(clock.complement(self.b1), clock.complement(self.b2))


class Rows(NamedTuple):
    """R rows of D numbers with all that belongs to them, in the dtype of their arithmetic."""

    values: jax.Array  # (R, D), the rows themselves
    mu: jax.Array  # (R, D), first moments, bias-corrected
    nu: jax.Array  # (R, D), second moments, likewise; or their roots (`Settings.norm`)
    count: jax.Array  # (R,) integers, the updates that values and moments have seen; zero moments where that is 0
    log_keep: jax.Array | None  # (R, 2), the sum of log(1 - lr_t weight_decay) over those updates in two parts
    moved: jax.Array | float = 0.0  # (R, D), what is still to be added to the values

    @property
    def now(self) -> jax.Array:
        """(R, D), the values with what is to be added."""
        return self.values + self.moved


def catch_up(settings: Settings, rows: Rows, count: ArrayLike, log_keep: jax.Array | None) -> Rows:
    """Rows as dense Adam has them after `count` updates, those since their own count with gradient zero (Algorithm 1).

    `log_keep` (2,) is the sum of `log_decay` over all updates in two parts, `None` without decay. No row's count is above
    `count`. The values stay; what the steps add to them is in `moved`.
    """
    dtype = rows.mu.dtype
    now = jnp.asarray(count)
    skipped = now - rows.count
    start = jnp.maximum(rows.count, 1)  # a row that was never touched has no moments, and any weight will do
    steps = jnp.where(rows.count > 0, jnp.minimum(skipped, _cut(settings)), 0)
    moved, log_kept = _moved(settings, rows, start, steps)
    ledger = rows.log_keep
    if log_keep is not None and ledger is not None:
        # one exponential of the sum: a factor for each step would be rounded each time, and always the same way
        all_kept = jnp.where(steps == skipped, log_kept, (log_keep - ledger).sum(axis=1))
        moved += moved * jnp.expm1(all_kept - log_kept)[:, None] + rows.values * jnp.expm1(all_kept)[:, None]
        ledger = jnp.where(skipped[:, None] >= 0, log_keep, ledger)  # of itself, so that XLA writes it in place
    until, passed = jnp.maximum(now, 1), skipped.astype(dtype)
    ratio1 = _weight(settings.b1, start, dtype) / _weight(settings.b1, until, dtype)
    kept1 = jnp.exp(passed * _log(settings.b1, dtype)) * ratio1
    ratio2 = _weight(settings.b2, start, dtype) / _weight(settings.b2, until, dtype)
    root2 = jnp.exp(0.5 * passed * _log(settings.b2, dtype)) * jnp.sqrt(ratio2)
    kept2 = jnp.asarray(settings.norm.scale(root2)) ** 2  # of v or of its root
    return Rows(rows.values, kept1[:, None] * rows.mu, kept2[:, None] * rows.nu, jnp.maximum(rows.count, now), ledger, moved)


def tick(decay: ArrayLike, count: jax.Array, dtype: DTypeLike) -> Tick:
    """The clock of rows at their own counts >= 1, (R, 1) each, at a constant decay.

    In closed form, where `clock` goes from step to step: a row that skipped thousands of steps does not go through them.
    """
    rate, weight = jnp.asarray(clock.complement(decay), dtype), _weight(decay, count, dtype)[:, None]
    return Tick(rate, weight, clock.corrected_rate(rate, weight), jnp.ones_like(weight))


def log_decay(rate: ArrayLike, weight_decay: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """The logarithm of 1 - lr weight_decay, finite also where that is not positive."""
    shrink = jnp.asarray(rate, dtype) * jnp.asarray(weight_decay, dtype)
    return jnp.log1p(-jnp.minimum(shrink, 1.0 - 1e-6))


def _moved(settings: Settings, rows: Rows, start: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each row's `steps` skipped steps add to its values, beside their decay, and the logarithm of that decay."""
    dtype = rows.mu.dtype
    longest = jnp.max(steps, initial=0)
    size = settings.norm.size((rows.nu,), settings.norm.full(1.0))  # of which no norm of a table needs the clock
    most = (-0.35 / _log(settings.b2, dtype)).astype(jnp.int32)

    def move(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        done, moved, log_kept = carry
        earliest = jnp.min(jnp.where(steps > done, start, 2**30), initial=2**30)
        after = jnp.minimum(done + jnp.maximum(jnp.minimum(earliest + done, most), 2), longest)
        sums, x_first = _band(settings, start, jnp.minimum(steps, after), done, after, dtype)
        moved = moved * jnp.exp(sums.log_kept)[:, None]
        for c, x in _two_nodes(sums, x_first):
            eps = jnp.asarray(settings.eps, dtype) * x[:, None]
            moved -= c[:, None] * moments.direction(rows.mu, size, eps)
        return after, moved, log_kept + sums.log_kept

    start_of_loop = (jnp.zeros_like(longest), jnp.zeros_like(rows.values), jnp.zeros(len(steps), dtype))
    _, moved, log_kept = jax.lax.while_loop(lambda carry: carry[0] < longest, move, start_of_loop)
    return moved, log_kept


class _Sums(NamedTuple):
    """A band of skipped steps, as numbers a row."""

    log_kept: jax.Array  # the logarithm of the product of 1 - lr weight_decay
    powers: tuple[jax.Array, ...]  # sums of C y^i for i < 4, where y = x / x_first - 1


def _band(
    settings: Settings, start: jax.Array, steps: jax.Array, done: jax.Array, after: jax.Array, dtype: DTypeLike
) -> tuple[_Sums, jax.Array]:
    """Steps done + 1 to after, of which a row takes those up to its `steps`, and x at the first of them."""
    log_b1, log_b2 = _log(settings.b1, dtype), _log(settings.b2, dtype)
    w1, w2 = _weight(settings.b1, start, dtype), _weight(settings.b2, start, dtype)

    def root_weight2(j: jax.Array) -> jax.Array:  # of w2_{s+j}, without a difference of numbers close to one
        return jnp.sqrt(w2 + (1.0 - w2) * _weight(settings.b2, j, dtype))

    first = done + 1
    root_first = root_weight2(first)

    def add(j: jax.Array, sums: _Sums) -> _Sums:
        taken = j <= steps
        rate = jnp.asarray(clock.at(settings.learning_rate, start + j - 1), dtype)
        w1_now, root_now = w1 + (1.0 - w1) * _weight(settings.b1, j, dtype), root_weight2(j)
        decay = jnp.exp(j.astype(dtype) * (log_b1 - 0.5 * log_b2))
        c = jnp.where(taken, rate * decay * (w1 / w1_now) * (root_now / jnp.sqrt(w2)), 0.0)
        y = root_now * (jnp.exp(0.5 * (first - j).astype(dtype) * log_b2) / root_first) - 1.0
        powers = (c, c * y, c * y * y, c * y * y * y)
        if not settings.decays():
            return sums._replace(powers=tuple(s + p for s, p in zip(sums.powers, powers, strict=True)))
        log_keep = log_decay(rate, clock.at(settings.weight_decay, start + j - 1), dtype)
        keep = jnp.where(taken, jnp.exp(log_keep), 1.0)
        return _Sums(
            sums.log_kept + jnp.where(taken, log_keep, 0.0),
            tuple(s * keep + p for s, p in zip(sums.powers, powers, strict=True)),
        )

    def turn(i: jax.Array, sums: _Sums) -> _Sums:
        for part in range(UNROLL):
            sums = add(first + UNROLL * i + part, sums)
        return sums

    zero = jnp.zeros(len(steps), dtype)
    turns = (after - done + UNROLL - 1) // UNROLL
    sums = jax.lax.fori_loop(0, turns, turn, _Sums(zero, (zero,) * 4))
    x_first = jnp.exp(jnp.minimum(-0.5 * first.astype(dtype) * log_b2, 60.0)) * root_first / jnp.sqrt(w2)
    return sums, x_first


def _two_nodes(sums: _Sums, x_first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The Gauss rule (C, x), (C, x) of a band: the same sums of C x^i for i < 4 as all its steps have."""
    total, *higher = sums.powers
    mean, second, third = (s / jnp.where(total > 0, total, 1.0) for s in higher)
    variance = second - mean * mean
    single = variance < 1e-9  # all steps at one x, as far as float32 can tell
    spread = jnp.sqrt(jnp.where(single, 1.0, variance))
    half_skew = 0.5 * (third - 3.0 * mean * second + 2.0 * mean**3) / spread**3
    far = jnp.abs(half_skew) + jnp.sqrt(1.0 + half_skew * half_skew)
    up = jnp.where(half_skew > 0, far, 1.0 / far)  # from the mean to the upper node, in spreads; to the lower it is 1 / up
    spread = jnp.where(single, 0.0, spread)
    low, high = jnp.maximum(mean - spread / up, 0.0), mean + spread * up  # one that rounding has led astray weighs nothing
    share = 1.0 / (1.0 + up * up)
    return (total * (1.0 - share), x_first * (1.0 + low)), (total * share, x_first * (1.0 + high))


def _cut(settings: Settings) -> jax.Array:
    """K: the steps after the first K skipped ones move no coordinate by more than `CUT` learning rates in all."""
    log_rho = _log(settings.b1, jnp.float32) - 0.5 * _log(settings.b2, jnp.float32)
    return jnp.ceil(jnp.log(CUT * -jnp.expm1(log_rho) / settings.largest_ratio()) / log_rho).astype(jnp.int32)


def _weight(decay: ArrayLike, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The weight of an average of `count` values at a constant decay, 1 - b^count (Section 3)."""
    return -jnp.expm1(count.astype(dtype) * _log(decay, dtype))


def _log(decay: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """The logarithm of b; for b = 0 a number so low that its exponential is nearly that, and 0 times it is 0."""
    if isinstance(decay, (int, float)):
        return jnp.asarray(math.log(max(decay, LEAST)), dtype)
    return jnp.log(jnp.maximum(jnp.asarray(decay, dtype), LEAST))
