"""The clock of an average: how much it weighs and how far one more value moves it (Section 3). Scalars only.

The paper keeps m_t = b m_{t-1} + (1 - b) g_t and divides by 1 - b^t afterwards. The same numbers come from moving the
*corrected* average by a larger rate in the first steps::

    w_t  = w_{t-1} + (1 - b) (1 - w_{t-1})          the weight of the average: 1 - b^t when b is constant
    mhat = mhat + (1 - b) / w_t * (g_t - mhat)      exactly m_t / w_t

In exact arithmetic nothing changes. In float32 much does: a constant gradient is reproduced to the last bit at every step
and every decay, a decay that changes from step to step is still corrected exactly, and no small error in w_t can bias a
long run, because it only reweighs the average. Without correction the rate is 1 - b and the average is the raw m_t.

What float32 cannot do is come all the way to a new constant: an average stops where its next move is below half its spacing,
up to 2^-24 / (1 - b) of its value away, 6e-5 at b = .999 and 6e-3 at .99999. A step is then off by half of that where v is
kept, by all of it where its root is. Any float32 average stops so, Optax's too; a dither, as the weight has, would be
arithmetic for each element. float64 params do not: their moments are float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_jax.moments import accumulator_dtype, power_of_two

__all__ = ["Tick", "at", "complement", "corrected_rate", "next_count", "running_weight", "tick"]


class Tick(NamedTuple):
    """One step of the clock; scalars."""

    rate: jax.Array  # 1 - b
    weight: jax.Array  # w_t, of all values so far
    moved: jax.Array  # how far the average moves towards the new value: (1 - b) / w_t, or 1 - b where nothing is corrected
    kept: jax.Array  # w_{t-1} / w_t, what the weight before is of the weight now; 1 where nothing is corrected


def tick(rate: ArrayLike, weight: ArrayLike, count: ArrayLike, *, corrected: bool = True) -> Tick:
    """One more value at the rate 1 - b, after `count` values of total weight `weight`; at count 0 nothing weighs."""
    weight = jnp.asarray(weight)
    before, rate = jnp.where(jnp.asarray(count) <= 0, 0.0, weight), jnp.asarray(rate, weight.dtype)
    now = running_weight(before, rate, count)
    if not corrected:
        return Tick(rate, now, rate, jnp.ones_like(now))
    kept = jnp.where(before <= 0, 1.0, corrected_rate(before, now))
    return Tick(rate, now, corrected_rate(rate, now), kept)


def at(value: ArrayLike | Callable[[jax.Array], ArrayLike], count: ArrayLike) -> ArrayLike:
    """A hyper-parameter at a count, or at each of several: a schedule's value there, or the number or array itself."""
    if not callable(value):
        return value
    count = jnp.asarray(count)
    return jax.vmap(value)(count) if count.ndim else value(count)


def complement(decay: ArrayLike) -> jax.Array | float:
    """1 - b, without the rounding of b: in Python's float64 where b is a Python number, in float32 at least otherwise."""
    if isinstance(decay, (int, float)):
        return 1.0 - decay
    decay = jnp.asarray(decay)
    return 1.0 - decay.astype(accumulator_dtype(decay.dtype))


def running_weight(weight: jax.Array, rate: ArrayLike, count: ArrayLike) -> jax.Array:
    """The weight of an average after one more step, w + rate (1 - w): 1 - b^t at a constant decay.

    Near one, the increments of w fall below float32's spacing long before w arrives: rounded to nearest, it would stop at
    1 - 3e-5 for b = .999; for b = 1 - 1e-7 it would be off by 2 % on its way to one half. Above one half, and where they are
    that small, they are therefore rounded up in the share of steps that makes them right on average, with the golden-ratio
    sequence of the count in place of chance.
    """
    plain = (weight + rate * (1.0 - weight)).astype(weight.dtype)
    info = jnp.finfo(weight.dtype)
    spacing = power_of_two(jnp.maximum(weight, info.tiny / info.eps))[0] * info.eps
    golden = (jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)) >> 8
    steps = jnp.floor(rate * (1.0 - weight) / spacing + golden.astype(weight.dtype) * 2.0**-24)
    dithered = weight + spacing * steps.astype(weight.dtype)
    nearest = (weight < 0.5) & (steps > 4096)  # off by 1e-4 of a step at most
    return jnp.where(nearest, plain, plain + jax.lax.stop_gradient(dithered - plain))


def next_count(count: ArrayLike) -> jax.Array:
    """One more; after int32's largest number 2^16 less, so that it stays large and draws, which it makes, go on."""
    count = jnp.asarray(count)
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count == largest, largest - (2**16 - 1), count + 1).astype(count.dtype)


def corrected_rate(rate: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Rate / w_t: the rate of a bias-corrected average, exactly 1 at its first step; zero while nothing has been weighed."""
    empty = jnp.asarray(weight) <= 0
    return jnp.where(empty, 0.0, rate / jnp.where(empty, 1.0, weight))
