"""The paper's arithmetic on one array: averages, second moments, norms and the direction of a step.

Every function takes arrays of one shape and scalars, all of one precision, and returns arrays of that shape. Nothing here
knows about trees, states or storage. Averages move as a + rate (x - a): a constant input is a fixed point to the last bit,
which it is not in b a + (1 - b) x, where b and 1 - b rounded to float32 do not add up to one.

Nothing finite makes something non-finite: gradients saturate where their square or a difference of two would overflow, and
quotients by zero are zero. A NaN or an infinity in a gradient is not hidden: it comes out as NaN.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "accumulator_dtype",
    "average",
    "direction",
    "each_part",
    "floating",
    "infinity_moment",
    "lifted",
    "lookahead",
    "lp_moment",
    "magnitude",
    "power_of_two",
    "quotient",
    "root",
    "root_plus",
    "root_second_moment",
    "saturate",
    "second_moment",
    "small_average",
    "squared",
    "times",
    "total",
    "where",
    "widened",
    "within",
]


def accumulator_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype in which arrays of inexact dtypes are computed together: float32 at least, complex stays complex."""
    each = [np.dtype(jax.dtypes.canonicalize_dtype(dtype)) for dtype in dtypes]
    # NumPy promotes what is left, also where JAX is told not to
    return np.result_type(np.float32, *(dtype for dtype in each if dtype.kind == "c" or dtype == np.float64))


def widened(x: ArrayLike) -> jax.Array:
    """An array of any inexact dtype in the dtype of its arithmetic."""
    return jnp.asarray(x, accumulator_dtype(jnp.result_type(x)))


def floating(x: ArrayLike) -> ArrayLike:
    """A number; if it is of an integer dtype, a floating-point one, for strict promotion does not mix the two."""
    return jnp.asarray(x, float) if jnp.issubdtype(getattr(x, "dtype", float), jnp.integer) else x


def average(mean: jax.Array, value: jax.Array, rate: ArrayLike) -> jax.Array:
    """The running average moved towards a new value, a + rate (x - a) (Algorithm 1)."""
    return lax.add(mean, times(rate, lax.sub(value, mean)))


def times(factor: ArrayLike, x: jax.Array) -> jax.Array:
    """A real factor times an array, real or complex."""
    return each_part(lambda part: lax.mul(factor, part), x)


def each_part(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A function of real arrays, of the real and the imaginary part of a complex one."""
    return lax.complex(function(x.real), function(x.imag)) if jnp.iscomplexobj(x) else function(x)


def where(condition: jax.Array, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """`jnp.where` of two arrays of one shape and dtype, of which one may be a number: traced in half the time."""
    like: Any = x if getattr(x, "ndim", -1) >= getattr(y, "ndim", -1) else y
    x, y = (v if getattr(v, "shape", None) == like.shape else lax.full_like(like, v) for v in (x, y))
    return lax.select(condition, x, y)


def small_average(mean: jax.Array, value: jax.Array, rate: ArrayLike) -> jax.Array:
    """`average` without loss for very small numbers, where rate (x - a) would be flushed to zero."""
    return lifted(lambda a, x: average(a, x, rate), mean, value)


def lifted(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A function homogeneous of degree one, on arrays multiplied by a power of two where they are very small.

    Terms that matter in a sum can lie below 1e-38, where processors flush them to zero, although the sum does not.
    """
    largest = functools.reduce(jnp.maximum, map(jnp.abs, arrays))
    small = largest < float(jnp.finfo(largest.dtype).tiny) * 2.0**62
    up, down = (jnp.where(small, factor, 1.0).astype(largest.dtype) for factor in (2.0**60, 2.0**-60))
    return times(down, function(*(times(up, x) for x in arrays)))


def saturate(g: jax.Array, squares: int) -> jax.Array:
    """The gradient, held where its arithmetic stays finite; NaN and infinities pass. Complex numbers saturate in each part.

    `squares` says how many entries are going to be squared and summed: 1 for a second moment (limit sqrt(max / 2), 1.3e19 in
    float32), 0 where only differences are taken (limit max / 2).
    """
    largest = float(jnp.finfo(g.dtype).max) / 2
    limit = (largest / squares) ** 0.5 if squares else largest
    limit = np.asarray(limit, jnp.finfo(g.dtype).dtype)
    return each_part(lambda part: where(lax.is_finite(part), lax.clamp(-limit, part, limit), part), g)


def squared(g: jax.Array) -> jax.Array:
    """|g|^2 as a real array."""
    return g.real * g.real + g.imag * g.imag if jnp.iscomplexobj(g) else lax.mul(g, g)


def total(x: jax.Array) -> jax.Array:
    """The sum of all elements, as `jnp.sum` of float32 or wider, which makes seven times the calls where a shape is new."""
    return lax.reduce(x, np.zeros([], x.dtype), lax.add, tuple(range(x.ndim)))


def magnitude(g: jax.Array) -> jax.Array:
    """|g| as a real array, with derivative zero at zero."""
    if not jnp.iscomplexobj(g):
        return lax.max(g, lax.neg(g))  # at a tie JAX takes the mean of both derivatives; that of `abs` is one
    return where(g == 0, 0.0, jnp.abs(g))


@jax.custom_jvp
def root(v: jax.Array) -> jax.Array:
    """The square root with derivative zero at zero, so that a step at zero gradients can be differentiated."""
    return lax.sqrt(v)


@root.defjvp
def _root_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    zero = primals[0] == 0
    s = jnp.sqrt(jnp.where(zero, 1.0, primals[0]))  # not `root`: older JAX forgets its rule in second derivatives of a scan
    return jnp.where(zero, 0.0, s), jnp.where(zero, 0.0, tangents[0] / (2 * s))


def root_plus(s: jax.Array, eps_root: ArrayLike) -> jax.Array:
    """sqrt(s^2 + eps_root) without squaring a large or a small s."""
    x, y, larger, _ = _over_larger(s, root(jnp.asarray(eps_root, s.dtype)))
    return larger * root(x * x + y * y)


def second_moment(v: jax.Array, g: jax.Array, rate: ArrayLike) -> jax.Array:
    """The average of squared gradients, v + rate (|g|^2 - v) (Algorithm 1)."""
    return average(v, squared(g), rate)


def root_second_moment(s: jax.Array, g: jax.Array, rate: ArrayLike, *, coarse: bool = False) -> jax.Array:
    """The root of the average of squared gradients, kept as a root s: exact from 1e-36 to 1e37 in float32.

    With x and y the gradient and s over the power of two below the larger of them, and q = sqrt(y^2 + rate (x^2 - y^2)),
    the new root over that power is q, written as a small correction to y so that rounding errors do not pile up; `coarse`
    spares the correction where the result is rounded to few bits anyway. Scaling all gradients by 2^k scales s by exactly
    it.
    """
    a = magnitude(g)
    power, inverse = power_of_two(lax.max(a, s))
    x, y = lax.mul(inverse, a), lax.mul(inverse, s)
    if coarse:
        y, x = lax.mul(y, y), lax.mul(x, x)
        return lax.mul(power, root(lax.add(lax.sub(y, lax.mul(rate, y)), lax.mul(rate, x))))
    below = root(y * y + rate * ((x - y) * (x + y))) + y
    return power * (y + rate * (x - y) * ((x + y) / jnp.where(below == 0, 1.0, below)))


def infinity_moment(u: jax.Array, g: jax.Array, rate: ArrayLike, eps: ArrayLike = 0.0) -> jax.Array:
    """The exponentially weighted infinity norm, max(b2 u, |g| + eps) (Algorithm 2, eq. 12); the paper has no eps."""
    return jnp.maximum(u - rate * u, magnitude(g) + eps)


def lp_moment(s: jax.Array, g: jax.Array, p: ArrayLike, rate: ArrayLike, log_keep: ArrayLike) -> jax.Array:
    """The p-th root of the average of |g|^p, (keep s^p + rate |g|^p)^(1/p), for any p >= 1 without overflow (eq. 6-7).

    The larger of s and |g| is factored out and the rest is done in logarithms, so p may be 1 or 1e6; log_keep is
    log(1 - rate), which for large p cannot be found from `rate`.
    """
    a = magnitude(g)
    x, y, larger, dead = _over_larger(a, s)
    tiny = jnp.finfo(s.dtype).tiny
    log_x, log_y = (p * jnp.log(jnp.maximum(part, tiny)) for part in (x, y))
    exponent = jnp.logaddexp(log_keep + log_y, jnp.log(rate) + log_x) / p
    return jnp.where(dead, s, larger + larger * jnp.expm1(exponent))


def lookahead(m: jax.Array, g: jax.Array, rate: ArrayLike, keep: ArrayLike) -> jax.Array:
    """The first moment with the next step's momentum, keep m + rate g (Nadam: Dozat 2016, Algorithm 2)."""
    return times(keep, m) + times(rate, g)


def within(m: jax.Array, size: jax.Array, ratio: ArrayLike) -> jax.Array:
    """A first moment no larger than `ratio`, a finite number, times its size; each part, where m is complex."""
    limit = jnp.asarray(ratio, size.dtype) * size
    return each_part(lambda part: lax.clamp(-limit, part, limit), m)


def direction(m: jax.Array, size: jax.Array, eps: ArrayLike) -> jax.Array:
    """The step's direction m / (size + eps), and zero where size + eps is zero (Algorithm 1, last line)."""
    below = lax.add(size, eps)
    below = where(lax.lt(below, jnp.finfo(below.dtype).tiny), jnp.inf, below)
    return each_part(lambda part: quotient(part, below), m)


@jax.custom_jvp
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """The quotient a / b, whose derivatives, too, stay in range: without b^2, which is not where b is 1e20 or 1e-20."""
    return lax.div(a, b)


@quotient.defjvp
def _quotient_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    ratio, dead = quotient(*primals), jnp.isinf(primals[1])
    b = jnp.where(dead, 1.0, primals[1])
    inverse = power_of_two(b)[1]  # for the derivative of this division has b^2 again
    change = inverse * (tangents[0] - ratio * tangents[1]) / (inverse * b)
    return ratio, jnp.where(dead, 0.0, change)


def _over_larger(a: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """a/M, s/M and M = max(a, s), then where M is too small to divide by; there the quotients are zero and M is one."""
    larger = lax.stop_gradient(jnp.maximum(a, s))
    dead = larger < jnp.finfo(larger.dtype).tiny
    larger = jnp.where(dead, 1.0, larger)
    return jnp.where(dead, 0.0, a / larger), jnp.where(dead, 0.0, s / larger), larger, dead


def power_of_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest power of two that is not above x, and its inverse; for x = 0, zero and a large number."""
    info = jnp.finfo(x.dtype)
    integer = np.dtype(f"int{info.bits}").type
    exponent = integer(((1 << info.nexp) - 1) << info.nmant)
    both = exponent - integer(1 << info.nmant)  # what the exponents of x and 1 / x add up to
    power = lax.bitwise_and(lax.bitcast_convert_type(x, integer), exponent)
    inverse = lax.sub(both, power)
    return lax.bitcast_convert_type(power, x.dtype), lax.bitcast_convert_type(inverse, x.dtype)
