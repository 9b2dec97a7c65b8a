"""The clock of an average: how much it weighs and how far one more value moves it (Section 3). Scalars only.

The paper keeps m_t = b m_{t-1} + (1 - b) g_t and divides by 1 - b^t afterwards. The same numbers come from moving the
*corrected* average by a larger rate in the first steps::

    w_t  = w_{t-1} + (1 - b) (1 - w_{t-1})          the weight of the average: 1 - b^t when b is constant
    mhat = mhat + (1 - b) / w_t * (g_t - mhat)      exactly m_t / w_t

In exact arithmetic nothing changes. In float32 much does: a constant gradient is reproduced to the last bit at every step
and every decay, a decay that changes from step to step is still corrected exactly, and no small error in w_t can bias a
long run, because it only reweighs the average. Without correction the rate is 1 - b and the average is the raw m_t.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adam_jax.moments import accumulator_dtype, average

__all__ = ["Tick", "at", "complement", "corrected_rate", "running_weight", "tick"]


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
    1 - 3e-5 for b = .999. Above one half they are therefore rounded up in the share of steps that makes them right on
    average, with the golden-ratio sequence of the count in place of chance.
    """
    plain = average(weight, 1.0, rate).astype(weight.dtype)
    spacing = jnp.finfo(weight.dtype).eps / 2  # between one half and one
    golden = (jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)) >> 8
    steps = jnp.floor(rate * (1.0 - weight) / spacing + golden.astype(weight.dtype) * 2.0**-24)
    dithered = jnp.minimum(weight + spacing * steps.astype(weight.dtype), 1.0)
    return jnp.where(weight < 0.5, plain, plain + jax.lax.stop_gradient(dithered - plain))


def corrected_rate(rate: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Rate / w_t: the rate of a bias-corrected average, exactly 1 at its first step; zero while nothing has been weighed."""
    empty = jnp.asarray(weight) <= 0
    return jnp.where(empty, 0.0, rate / jnp.where(empty, 1.0, weight))
