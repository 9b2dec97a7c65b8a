"""The paper's arithmetic on one array: running averages, moments and the direction of a step.

Every function here takes arrays of one shape plus scalars and returns arrays of that shape. Nothing knows about pytrees,
optimizer states or storage; `adam_jax.transforms` lifts these functions over trees.

Two choices run through the file.

**Averages correct themselves.** The paper keeps m_t = b1 m_{t-1} + (1 - b1) g_t and divides by 1 - b1^t afterwards
(Algorithm 1). The same numbers come from moving the *corrected* average by a larger first steps' rate::

    w_t  = w_{t-1} + (1 - b) (1 - w_{t-1})          the weight of the average: 1 - b^t when b is constant
    mhat = mhat + (1 - b) / w_t * (g_t - mhat)      exactly m_t / w_t

In exact arithmetic nothing changes. In float32 much does: a constant gradient is reproduced to the last bit at every step
and every decay, a decay that changes from step to step is still corrected exactly, and no small error in w_t can bias a
long run, because it only reweighs the average. Without bias correction the rate is 1 - b and the average is the raw m_t.

**Nothing finite makes something non-finite.** Gradients saturate where their square, or a difference of two of them,
would overflow; quotients by zero are zero. A NaN or an infinity in a gradient is not hidden: it comes out as NaN.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "accumulator_dtype",
    "at",
    "average",
    "complement",
    "corrected_rate",
    "direction",
    "infinity_moment",
    "lifted",
    "lookahead",
    "lp_moment",
    "magnitude",
    "root",
    "root_plus",
    "root_second_moment",
    "running_weight",
    "saturate",
    "second_moment",
    "small_average",
    "squared",
]


def accumulator_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype in which arrays of `dtype` are computed: float32 at least, complex stays complex.

    Args:
        dtype: any inexact dtype.

    Returns:
        float64, complex64 and complex128 unchanged, or halved where JAX is not set up for 64 bits; float32 for every
        narrower real dtype.

    Example:
        >>> print(accumulator_dtype(jnp.bfloat16), accumulator_dtype(jnp.complex64))
        float32 complex64
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating) or dtype == np.float64:
        return dtype
    return np.dtype(np.float32)


def at(value: ArrayLike | Callable[[jax.Array], ArrayLike], count: jax.Array) -> ArrayLike:
    """A hyper-parameter at a count, or at each of several.

    Args:
        value: a number, an array or a schedule, a function of the count.
        count: integers.

    Returns:
        The number or array itself; of a schedule its values, an array like `count`.

    Example:
        >>> print(at(lambda count: 0.5 * count, jnp.arange(3)), at(0.1, jnp.arange(3)))
        [0.  0.5 1. ] 0.1
    """
    if not callable(value):
        return value
    return jax.vmap(value)(count) if jnp.ndim(count) else value(count)


def complement(decay: ArrayLike) -> jax.Array | float:
    """1 - b, without the rounding of b: in Python's float64 where b is a Python number, in float32 at least otherwise.

    Args:
        decay: a scalar or array in [0, 1).

    Returns:
        1 - decay.

    Example:
        >>> complement(0.75)
        0.25
    """
    if isinstance(decay, (int, float)):
        return 1.0 - decay
    decay = jnp.asarray(decay)
    return 1.0 - decay.astype(accumulator_dtype(decay.dtype))


def average(mean: ArrayLike, value: ArrayLike, rate: ArrayLike) -> jax.Array:
    """The running average moved towards a new value: a + rate (x - a).

    Algorithm 1 writes b a + (1 - b) x. This form has the same value and a constant input as its exact fixed point; in the
    other, b and 1 - b rounded to float32 do not add up to one.

    Args:
        mean: the average so far, any shape.
        value: the new value, same shape.
        rate: scalar, 1 - b or its bias-corrected form from `corrected_rate`.

    Returns:
        The new average, same shape.

    Example:
        >>> print(average(jnp.float32(1.0), 3.0, 0.25))
        1.5
    """
    mean = jnp.asarray(mean)
    return mean + rate * (value - mean)


def running_weight(weight: jax.Array, rate: ArrayLike, count: ArrayLike) -> jax.Array:
    """The weight of an average after one more step, w + rate (1 - w): 1 - b^t at a constant decay.

    Near one, the increments of w fall below float32's spacing long before w arrives: rounded to nearest, it would stop at
    1 - 3e-5 for b = .999. Above one half they are therefore rounded up in the share of steps that makes them right on
    average, with the golden-ratio sequence of the count in place of chance.

    Args:
        weight: scalar, w_{t-1} in [0, 1].
        rate: scalar, 1 - b.
        count: integer scalar, the number of steps before this one.

    Returns:
        A scalar, w_t, with the dtype of `weight`.

    Example:
        >>> print(running_weight(jnp.float32(0.0), 0.25, 0))
        0.25
    """
    plain = average(weight, 1.0, rate).astype(weight.dtype)
    spacing = jnp.finfo(weight.dtype).eps / 2  # between one half and one
    golden = (jnp.asarray(count, jnp.uint32) * jnp.uint32(0x9E3779B1)) >> 8
    steps = jnp.floor(rate * (1.0 - weight) / spacing + golden.astype(weight.dtype) * 2.0**-24)
    dithered = jnp.minimum(weight + spacing * steps.astype(weight.dtype), 1.0)
    return jnp.where(weight < 0.5, plain, plain + jax.lax.stop_gradient(dithered - plain))


def corrected_rate(rate: ArrayLike, weight: ArrayLike) -> jax.Array:
    """The rate at which a bias-corrected average moves: (1 - b) / w_t; zero while nothing has been weighed (Section 3).

    Args:
        rate: scalar, 1 - b.
        weight: scalar, w_t *after* this step, from `running_weight`.

    Returns:
        A scalar in [0, 1]: exactly 1 at the first step.

    Example:
        >>> print(corrected_rate(0.1, jnp.float32(0.1)))
        1.0
    """
    empty = jnp.asarray(weight) <= 0
    return jnp.where(empty, 0.0, rate / jnp.where(empty, 1.0, weight))


def saturate(g: jax.Array, squares: int) -> jax.Array:
    """The gradient, held inside the range where its arithmetic stays finite; NaN and infinities pass through unchanged.

    Args:
        g: any shape, real or complex; complex numbers saturate in each part.
        squares: how many entries are going to be squared and summed: 1 for a second moment (limit sqrt(max / 2), 1.3e19 in
            float32), all of them for a norm, 0 where only differences are taken (limit max / 2, 1.7e38 in float32).

    Returns:
        Same shape and dtype.

    Example:
        >>> print(saturate(jnp.float32(1e30), 1), saturate(jnp.float32(jnp.inf), 1))
        1.3043818e+19 inf
    """
    if jnp.iscomplexobj(g):
        return jax.lax.complex(saturate(g.real, squares), saturate(g.imag, squares))
    largest = float(jnp.finfo(g.dtype).max) / 2
    limit = (largest / squares) ** 0.5 if squares else largest
    return jnp.where(jnp.isinf(g), g, jnp.clip(g, -limit, limit))


def squared(g: jax.Array) -> jax.Array:
    """|g|^2 as a real array.

    Args:
        g: any shape, real or complex.

    Returns:
        Same shape, real.

    Example:
        >>> print(squared(jnp.array([3 + 4j])))
        [25.]
    """
    return g.real * g.real + g.imag * g.imag if jnp.iscomplexobj(g) else g * g


def magnitude(g: jax.Array) -> jax.Array:
    """|g| as a real array, with derivative zero at zero.

    Args:
        g: any shape, real or complex.

    Returns:
        Same shape, real.

    Example:
        >>> print(magnitude(jnp.array([3 + 4j])))
        [5.]
    """
    if not jnp.iscomplexobj(g):
        return jnp.maximum(g, -g)  # at a tie JAX takes the mean of both derivatives
    zero = g == 0
    return jnp.where(zero, 0.0, jnp.abs(jnp.where(zero, 1.0, g)))


def root(v: jax.Array) -> jax.Array:
    """The square root with derivative zero at zero, so that a step at zero gradients can be differentiated.

    Args:
        v: non-negative, any shape.

    Returns:
        Same shape.

    Example:
        >>> print(root(jnp.array([0.0, 4.0])), jax.grad(root)(0.0))
        [0. 2.] 0.0
    """
    zero = v == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, v)))


def root_plus(s: jax.Array, eps_root: ArrayLike) -> jax.Array:
    """sqrt(s^2 + eps_root) without squaring a large or a small s.

    Args:
        s: non-negative, any shape.
        eps_root: scalar.

    Returns:
        Same shape.

    Example:
        >>> print(root_plus(jnp.array([3.0, 1e30]), 16.0))
        [5.e+00 1.e+30]
    """
    x, y, larger, _ = _over_larger(s, root(jnp.asarray(eps_root, s.dtype)))
    return larger * root(x * x + y * y)


def second_moment(v: jax.Array, g: jax.Array, rate: ArrayLike) -> jax.Array:
    """The average of squared gradients, v + rate (|g|^2 - v) (Algorithm 1).

    Args:
        v: the average so far, real.
        g: the gradient, same shape, real or complex, saturated for squares.
        rate: scalar from `corrected_rate`, or 1 - b2 for the raw moment.

    Returns:
        The new average, same shape, real.

    Example:
        >>> print(second_moment(jnp.array([0.0]), jnp.array([2.0]), 0.25))
        [1.]
    """
    return average(v, squared(g), rate)


def root_second_moment(s: jax.Array, g: jax.Array, rate: ArrayLike, *, rounded: bool = False) -> jax.Array:
    """The root of the average of squared gradients, kept as a root: exact from 1e-36 to 1e37 in float32.

    With x and y the gradient and s over the power of two below the larger of them, and q = sqrt(y^2 + rate (x^2 - y^2)),
    the new root over that power is q, written as a small correction to y so that its rounding errors do not pile up. Scaling
    all gradients by a power of two scales s by exactly that.

    Args:
        s: root of the average so far, real.
        g: the gradient, same shape, real or complex.
        rate: scalar from `corrected_rate`, or 1 - b2 for the raw moment.
        rounded: the result is going to be rounded to few bits, so spare the correction.

    Returns:
        The new root, same shape, real.

    Example:
        >>> print(root_second_moment(jnp.array([0.0]), jnp.array([1e-30]), 0.25))
        [5.e-31]
    """
    a = magnitude(g)
    power, inverse = _power_of_two(jnp.maximum(a, s))
    x, y = inverse * a, inverse * s
    if rounded:
        return power * root(y * y * (1.0 - rate) + x * x * rate)
    below = root(y * y + rate * ((x - y) * (x + y))) + y
    return power * (y + rate * (x - y) * ((x + y) / jnp.where(below == 0, 1.0, below)))


def lifted(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """A function homogeneous of degree one, on arrays multiplied by a power of two where they are very small.

    Terms that matter in a sum can be below the smallest normal number, 1e-38 in float32, where processors flush them to
    zero, although the sum itself is far above it. Lifted by 2^60 they are not; the result is brought back exactly.

    Args:
        function: takes as many arrays as given, of one shape.
        *arrays: real or complex.

    Returns:
        What the function returns for the arrays, same shape.

    Example:
        >>> print(lifted(lambda a, b: a + 0.001 * b, jnp.float32(1e-36), jnp.float32(1e-36)))
        1.001e-36
    """
    largest = functools.reduce(jnp.maximum, (jnp.abs(part) for x in arrays for part in (x.real, x.imag)))
    small = largest < float(jnp.finfo(largest.dtype).tiny) * 2.0**62
    lifted_by = jnp.where(small, 2.0**60, 1.0)
    return function(*(lifted_by * x for x in arrays)) * jnp.where(small, 2.0**-60, 1.0)


def small_average(mean: jax.Array, value: jax.Array, rate: ArrayLike) -> jax.Array:
    """`average` without loss for very small numbers, where rate (x - a) would be flushed to zero.

    Args:
        mean: the average so far, any shape, real or complex.
        value: the new value, same shape.
        rate: scalar.

    Returns:
        The new average, same shape.

    Example:
        >>> print(small_average(jnp.float32(1e-36), jnp.float32(1.1e-36), 0.01))
        1.001e-36
    """
    return lifted(lambda a, x: average(a, x, rate), mean, value)


def infinity_moment(u: jax.Array, g: jax.Array, rate: ArrayLike, eps: ArrayLike = 0.0) -> jax.Array:
    """The exponentially weighted infinity norm, max(b2 u, |g| + eps) (Algorithm 2, eq. 12).

    Args:
        u: the norm so far, real.
        g: the gradient, same shape, real or complex.
        rate: scalar, 1 - b2. The norm needs no bias correction.
        eps: scalar added to |g|, as in Optax and PyTorch; the paper has none.

    Returns:
        The new norm, same shape, real.

    Example:
        >>> print(infinity_moment(jnp.array([4.0]), jnp.array([-1.0]), 0.25))
        [3.]
    """
    return jnp.maximum(u - rate * u, magnitude(g) + eps)


def lp_moment(s: jax.Array, g: jax.Array, p: ArrayLike, rate: ArrayLike, log_keep: ArrayLike) -> jax.Array:
    """The p-th root of the average of |g|^p, (keep s^p + rate |g|^p)^(1/p), for any p >= 1 without overflow (eq. 6-7).

    The larger of s and |g| is factored out and the rest is done in logarithms, so p may be 1 or 1e6.

    Args:
        s: root of the average so far, real.
        g: the gradient, same shape, real or complex.
        p: scalar >= 1.
        rate: scalar, the weight of |g|^p.
        log_keep: scalar, log(1 - rate), which for large p cannot be found from `rate`.

    Returns:
        The new root, same shape, real.

    Example:
        >>> print(lp_moment(jnp.array([1e30]), jnp.array([1e30]), 8.0, 0.5, jnp.log(0.5)))
        [1.e+30]
    """
    a = magnitude(g)
    x, y, larger, dead = _over_larger(a, s)
    tiny = jnp.finfo(s.dtype).tiny
    log_x, log_y = (p * jnp.log(jnp.maximum(part, tiny)) for part in (x, y))
    exponent = jnp.logaddexp(log_keep + log_y, jnp.log(rate) + log_x) / p
    return jnp.where(dead, s, larger + larger * jnp.expm1(exponent))


def lookahead(m: jax.Array, g: jax.Array, rate: ArrayLike, keep: ArrayLike) -> jax.Array:
    """The first moment with the next step's momentum, keep m + rate g (Nadam: Dozat 2016, Algorithm 2).

    Args:
        m: the first moment, this gradient included.
        g: the gradient, same shape.
        rate: scalar, (1 - b1) / w_t, or 1 - b1 for raw moments.
        keep: scalar, b1 w_t / w_{t+1}, or b1 for raw moments.

    Returns:
        Same shape.

    Example:
        >>> print(lookahead(jnp.array([1.0]), jnp.array([2.0]), 0.25, 0.75))
        [1.25]
    """
    return jnp.asarray(keep * m + rate * g)


def direction(m: jax.Array, size: jax.Array, eps: ArrayLike) -> jax.Array:
    """The step's direction m / (size + eps), and zero where size + eps is zero (Algorithm 1, last line).

    Args:
        m: the first moment, real or complex.
        size: root second moment, or the norm of AdaMax or L^p; same shape, real.
        eps: scalar. For the paper's efficient order (Section 2) it is eps_hat / sqrt(w_t).

    Returns:
        Same shape as m.

    Example:
        >>> print(direction(jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0]), 0.0))
        [0.5 0. ]
    """
    below = size + eps
    dead = below < jnp.finfo(below.dtype).tiny
    return jnp.where(dead, 0.0, m / jnp.where(dead, 1.0, below))


def _over_larger(a: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """a/M, s/M and M = max(a, s), then where M is too small to divide by; there the quotients are zero and M is one."""
    larger = jax.lax.stop_gradient(jnp.maximum(a, s))
    dead = larger < jnp.finfo(larger.dtype).tiny
    larger = jnp.where(dead, 1.0, larger)
    return jnp.where(dead, 0.0, a / larger), jnp.where(dead, 0.0, s / larger), larger, dead


def _power_of_two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest power of two that is not above x, and its inverse; for x = 0, zero and a large number."""
    info = jnp.finfo(x.dtype)
    unsigned = np.dtype(f"uint{info.bits}").type
    exponent = unsigned(((1 << info.nexp) - 1) << info.nmant)
    both = exponent - unsigned(1 << info.nmant)  # what the exponents of x and 1 / x add up to
    power = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), unsigned) & exponent
    return jax.lax.bitcast_convert_type(power, x.dtype), jax.lax.bitcast_convert_type(both - power, x.dtype)
