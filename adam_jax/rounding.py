"""Rounding ONE array to fewer bits: without bias, or without loss.

**Without bias**: up or down at random. The draw of element i at step t is x_t = turn(t) + hash(stream, i) followed by two
steps x ^= x c with even c, where turn(t) is the count with its 32 bits in reverse order, van der Corput's sequence. In
all of these a bit of the result depends on itself and on lower bits only, so 2^k consecutive steps from a multiple of 2^k
still give each value of the top k bits once: over *consecutive* steps the error of a mean of n draws falls as log(n) / n,
where that of independent draws falls as 1 / sqrt(n). But the low bits, of which the top ones are functions, are the *high*
bits of the count: the draws of an element that moves every k steps are as good as independent, for every k (a golden-ratio
sequence repeats itself after 144 steps, plain van der Corput after 2^k). No key is kept, and the bits are the same on any
sharding, since i is the index in the whole array.

**Without loss**: a float32 number is split into the nearest bfloat16 one and the bits that are left over.

All but `two_sum` is arithmetic on bit patterns: adding to the pattern of a float and dropping its low bits rounds its
magnitude, carries into the exponent included. There is no floating-point identity that a compiler could simplify.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "draws",
    "draws_at",
    "join",
    "number",
    "pattern",
    "round_to",
    "split",
    "stochastic",
    "stream",
    "turn",
    "two_sum",
    "widen",
]

EXPONENT = np.uint32(0x7F800000)
SIGN = np.uint32(0x80000000)


def stream(seed: ArrayLike, path: str) -> ArrayLike:
    """The name of a leaf's sequence of draws, uint32: a hash of the seed and the path, so no leaf shares another's.

    A prefix of the path tells apart what is rounded for one leaf.

    Example:
        >>> print(stream(0, "['w']") == stream(0, "['b']"))
        False
    """
    host = isinstance(seed, int)  # then nothing is traced
    seed = np.array([seed % 2**32], np.uint32) if host else jnp.asarray(seed).astype(jnp.uint32).reshape(1)
    return _hash(_hash(seed + np.uint32(0x9E3779B9)) + np.uint32(zlib.crc32(path.encode())))[0]


def turn(count: ArrayLike) -> jax.Array:
    """Whose turn it is at step `count`, an integer scalar that may wrap: its 32 bits in reverse order, uint32."""
    x = jnp.asarray(count).astype(jnp.uint32)
    for shift, low in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = ((x >> shift) & np.uint32(low)) | ((x & np.uint32(low)) << shift)
    return (x >> 16) | (x << 16)


def draws(shape: tuple[int, ...], stream: ArrayLike, turn: ArrayLike) -> jax.Array:
    """32 uniform bits for each element of an array of this shape, that of the whole array, at the step's turn.

    Example:
        >>> pair = jnp.stack([draws((2,), stream(0, "w"), turn(count)) for count in (0, 1)])
        >>> print((pair >> 31).sum(0))  # of two consecutive steps one draw is in the upper half
        [1 1]
    """
    index, stride = jnp.asarray(stream, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = lax.iota(jnp.uint32, shape[axis])
        along = lax.mul(along, np.uint32(stride % 2**32)) if stride > 1 else along
        if axis == 0:  # on TPU an array beside the kernel: so the stream is no operand of its own
            along = lax.add(along, jnp.asarray(stream, jnp.uint32))
        along = lax.broadcast_in_dim(along, shape, (axis,))
        index = lax.add(index, along) if stride > 1 else along
        stride *= shape[axis]
    return _drawn(index, turn)


def draws_at(index: jax.Array, stream: ArrayLike, turn: ArrayLike) -> jax.Array:
    """The draws of the elements with these indices, uint32: what a kernel on a block of a leaf calls.

    `turn` and `stream` are scalars or arrays of the rank of `index`.
    """
    return _drawn(index + stream, turn)


def stochastic(x: jax.Array, bits: jax.Array, drop: int, rest: jax.Array | None = None) -> jax.Array:
    """Drop the `drop` low bits of float32 numbers, 1 to 16, rounding the magnitude up with a probability equal to those.

    NaN stays NaN, infinities stay, and nothing finite becomes infinite. `rest`, less than a unit in the last place of x, is
    what x lacks of the number to round (`two_sum`), taken to 2^-16 of that unit (for |x| >= 1e-26).

    Example:
        >>> x = jnp.full(100_000, 1.001, jnp.float32)
        >>> rounded = stochastic(x, draws(x.shape, stream(0, ""), turn(0)), 16)
        >>> print(jnp.unique(rounded), f"{rounded.mean():.4f}")
        [1.        1.0078125] 1.0010
    """
    if rest is None:
        raised = lax.shift_right_logical(bits, np.uint32(32 - drop))
    elif drop < 15:
        raised = _bits_of(_signed(bits >> np.uint32(16 - drop)) + _units(x, rest) >> 16)
    else:  # where that sum would not fit
        low = _signed(bits << np.uint32(drop) >> np.uint32(16))
        raised = (bits >> np.uint32(32 - drop)) + _bits_of(low + _units(x, rest) >> 16)
    cut = number(lax.bitwise_and(lax.add(pattern(x), raised), np.uint32(2**32 - 2**drop)))
    largest = np.uint32(0x7F800000 - 2**drop).view(np.float32)
    return lax.select(lax.is_finite(x), lax.clamp(-largest, cut, largest), x)


def round_to(x: jax.Array, dtype: DTypeLike, bits: jax.Array, rest: jax.Array | None = None) -> jax.Array:
    """Round float32 numbers to those of bfloat16 or float16, as float32, up or down at random, without bias.

    Finite numbers beyond the dtype's largest become the largest. Subnormal numbers of float16 are rounded to as any others;
    those of bfloat16 are also float32's, and exist where the processor has them.

    Example:
        >>> print(round_to(jnp.float32(1e5), jnp.float16, jnp.uint32(0)))
        65504.0
    """
    if dtype == jnp.bfloat16:
        return stochastic(x, bits, 16, rest)
    # below 2^-14 the grid of float16 is even, with the spacing that it has just above 2^-14: round there and come back
    offset = jnp.where(jnp.abs(x) < 2.0**-14, number((pattern(x) & SIGN) | pattern(jnp.float32(2.0**-14))), 0.0)
    lifted, more = two_sum(x, offset)
    rounded = stochastic(lifted, bits, 13, more if rest is None else more + rest) - offset
    return jnp.where(jnp.isinf(x), x, jnp.clip(rounded, -65504.0, 65504.0))


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum of two float32 numbers and what it lacks of the exact one (Knuth).

    Example:
        >>> print(*two_sum(jnp.float32(1.0), jnp.float32(1e-9)))
        1.0 1e-09
    """
    total = a + b
    b_there = total - a
    return total, (a - (total - b_there)) + (b - b_there)


def split(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Split float32 numbers into the nearest bfloat16 and the low half of their pattern: all 16 `bits`, or the top 8.

    With 8 bits the patterns' low 8 bits should be zero; they are cut. A NaN is made NaN again. The weight is
    (pattern + 2^15) >> 16, so ties go away from zero. Ties to even could not be undone: 65537 float32 numbers round to each
    even bfloat16 number then, one more than 16 bits can tell apart.

    Example:
        >>> print(*split(jnp.float32(1 + 2**-8 + 2**-20), 16))
        1.00781 32776
    """
    whole = jnp.where(jnp.isnan(x), pattern(jnp.float32(jnp.nan)), pattern(x))
    residual = (whole >> (16 - bits)).astype(f"uint{bits}")
    low = residual.astype(jnp.uint32) << (16 - bits)  # the weight from the residual as kept: XLA on TPU writes both at once
    weight = whole - low + ((low >> 15) << 16)
    return lax.bitcast_convert_type((weight >> 16).astype(jnp.uint16), jnp.bfloat16), residual


@jax.custom_jvp
def join(weight: jax.Array, residual: jax.Array) -> jax.Array:
    """The float32 numbers that `split` took apart. Its derivative is that of the weight, cast.

    Example:
        >>> print(join(*split(jnp.float32(3.14159265), 16)))
        3.1415927
    """
    bits = jnp.iinfo(residual.dtype).bits
    low = residual.astype(jnp.uint32) << (16 - bits)
    high = lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32)
    raised = jnp.where(high & np.uint32(0x7FFF) == 0, 0, low >> 15)  # a zero never is, unless someone zeroed the weight
    return number(((high - raised) << 16) | low)


@join.defjvp
def _join_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return join(*primals), tangents[0].astype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """bfloat16 or float16 as float32; by bits, since XLA may drop a rounding that is cast back."""
    return join(x, jnp.zeros(x.shape, jnp.uint8)) if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def pattern(x: jax.Array) -> jax.Array:
    """The bits of float32 numbers, uint32."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def number(bits: jax.Array) -> jax.Array:
    """The float32 numbers with these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def _drawn(x: jax.Array, turn: ArrayLike) -> jax.Array:
    x = lax.mul(x, np.uint32(0x9E3779B1))
    x = lax.add(lax.bitwise_xor(x, lax.shift_right_logical(x, np.uint32(16))), jnp.asarray(turn, jnp.uint32))
    x = lax.bitwise_xor(x, lax.mul(x, np.uint32(0x6C50B47C)))
    return lax.bitwise_xor(x, lax.mul(x, np.uint32(0xB82F1E52)))


def _units(x: jax.Array, rest: jax.Array) -> jax.Array:
    """What the magnitude of x lacks, in 2^-16 of a unit in its last place, towards zero where `rest` leads there: int32."""
    inwards = _signed(pattern(x) ^ pattern(rest)) >> 31  # -1 or 0
    place = (pattern(x) + _bits_of(inwards)) & EXPONENT  # below a power of two units are half as large
    part = jnp.abs(rest) * number(np.uint32(293 << 23) - jnp.maximum(place, np.uint32(40 << 23)))  # 2^16 / the unit
    return ((part + 0.5).astype(jnp.int32) ^ inwards) - inwards


def _signed(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _bits_of(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _hash(x: Any) -> Any:
    """A hash of 32 bits to 32 bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
