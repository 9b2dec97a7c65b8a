"""Rounding ONE array to fewer bits: without bias, or without loss.

**Without bias**: up or down at random, and element i of a leaf is rounded at step t with frac(hash(seed, leaf, i) + t phi),
as a 32-bit integer. Over the steps that is a low-discrepancy sequence: every number of draws in a row is spread over [0, 1)
as evenly as can be, so the error of a mean of n roundings falls as log(n) / n, where that of independent draws falls as
1 / sqrt(n). Over the elements it is a hash. No key is kept, and the bits are the same on any sharding, since i is the index
in the whole array.

**Without loss**: a float32 number is split into the nearest bfloat16 one and the bits that are left over.

All arithmetic is on bit patterns: adding to the pattern of a float and dropping its low bits rounds its magnitude, carries
into the exponent included. Nothing here is a floating-point identity that a compiler could simplify.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

__all__ = ["draws", "join", "round_to", "split", "stochastic", "stream"]

PHI = np.uint32(0x9E3779B9)  # (sqrt(5) - 1) / 2 as a fraction of 2^32, made odd
EXPONENT = np.uint32(0x7F800000)
SIGN = np.uint32(0x80000000)


def stream(seed: ArrayLike, path: str) -> jax.Array:
    """The name of a leaf's sequence of draws: a hash of the seed and of the leaf's path, so no leaf shares another's.

    Args:
        seed: integer, Python's or an array.
        path: the leaf's path, as text; a prefix tells apart what is rounded for one leaf.

    Returns:
        uint32 scalar.

    Example:
        >>> print(stream(0, "['w']") == stream(0, "['b']"))
        False
    """
    seed = jnp.asarray(seed).astype(jnp.uint32)
    return _hash(_hash(seed + PHI) + np.uint32(zlib.crc32(path.encode())))


def draws(shape: tuple[int, ...], stream: jax.Array, count: ArrayLike) -> jax.Array:
    """32 uniform bits for each element: frac(hash(stream, index) + count phi) as a fraction of 2^32.

    Args:
        shape: of the whole array; under `shard_map`, where that is not known, of the shard.
        stream: uint32 scalar from `stream`.
        count: integer scalar, the step.

    Returns:
        uint32 array. `(bits >> 8) * 2.0**-24` is uniform in [0, 1) as float32.

    Example:
        >>> a, b = (draws((2,), stream(0, "w"), count) for count in (0, 1))
        >>> print((b - a) * 2.0**-32)
        [0.618034 0.618034]
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return _hash(index + stream) + jnp.asarray(count).astype(jnp.uint32) * PHI


def stochastic(x: jax.Array, bits: jax.Array, drop: int) -> jax.Array:
    """Drop the `drop` low bits of float32 numbers, rounding the magnitude up with probability equal to what is dropped.

    Args:
        x: float32, any shape. NaN stays NaN, infinities stay, and nothing finite becomes infinite.
        bits: uint32 from `draws`, same shape.
        drop: how many of the 23 bits of the significand to drop, 1 to 22.

    Returns:
        float32, same shape; the dropped bits are zero.

    Example:
        >>> x = jnp.full(100_000, 1.001, jnp.float32)
        >>> rounded = stochastic(x, draws(x.shape, stream(0, ""), 0), 16)
        >>> print(jnp.unique(rounded), f"{rounded.mean():.4f}")
        [1.        1.0078125] 1.0010
    """
    pattern = _pattern(x)
    keep = np.uint32(2**32 - 2**drop)
    largest = EXPONENT - np.uint32(2**drop)  # of the numbers left; it, infinities and NaN are cut, not raised
    quiet = jnp.minimum(pattern & ~keep, 1) << 22  # a NaN with no other bit stays one; the largest numbers have that bit
    up = jnp.where(pattern & ~SIGN >= largest, pattern | quiet, pattern + (bits >> np.uint32(32 - drop)))
    return _number(up & keep)


def round_to(x: jax.Array, dtype: DTypeLike, bits: jax.Array) -> jax.Array:
    """Round float32 numbers to those of bfloat16 or float16, up or down at random, without bias.

    Args:
        x: float32, any shape. Finite numbers beyond the dtype's largest become the largest.
        dtype: bfloat16 or float16. Subnormal numbers of float16 are rounded to as any others; those of bfloat16 are also
            float32's, and exist where the processor has them.
        bits: uint32 from `draws`, same shape.

    Returns:
        float32, same shape, exactly on the grid of `dtype`.

    Example:
        >>> print(round_to(jnp.float32(1e5), jnp.float16, jnp.uint32(0)))
        65504.0
    """
    if dtype == jnp.bfloat16:
        return stochastic(x, bits, 16)
    # below 2^-14 the grid of float16 is even, with the spacing that it has just above 2^-14: round there and come back
    offset = _number((_pattern(x) & SIGN) | _pattern(jnp.float32(2.0**-14)))
    small = jnp.abs(x) < 2.0**-14
    rounded = stochastic(jnp.where(small, x + offset, x), bits, 13)
    rounded = jnp.where(small, rounded - offset, rounded)
    return jnp.where(jnp.isinf(x), x, jnp.clip(rounded, -65504.0, 65504.0))


def split(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Split float32 numbers into bfloat16 ones, rounded to nearest, and the low half of their pattern, all of it or the top.

    The weight is (pattern + 2^15) >> 16, so ties go away from zero. Ties to even could not be undone: 65537 float32
    numbers round to each even bfloat16 number then, one more than 16 bits can tell apart.

    Args:
        x: float32, any shape. With `bits=8`, patterns whose low 8 bits are zero; others are cut.
        bits: 16 or 8, the size of the residual.

    Returns:
        bfloat16 and uint16 or uint8 arrays, from which `join` makes x again; a NaN is made NaN again.

    Example:
        >>> print(*split(jnp.float32(1 + 2**-8 + 2**-20), 16))
        1.00781 32776
    """
    pattern = jnp.where(jnp.isnan(x), _pattern(jnp.float32(jnp.nan)), _pattern(x))
    weight = ((pattern + np.uint32(0x8000)) >> 16).astype(jnp.uint16)
    residual = (pattern & np.uint32(0xFFFF)) >> (16 - bits)
    return jax.lax.bitcast_convert_type(weight, jnp.bfloat16), residual.astype(f"uint{bits}")


def join(weight: jax.Array, residual: jax.Array) -> jax.Array:
    """The float32 numbers that `split` took apart.

    Args:
        weight: bfloat16, any shape.
        residual: uint16 or uint8, same shape.

    Returns:
        float32, same shape.

    Example:
        >>> print(join(*split(jnp.float32(3.14159265), 16)))
        3.1415927
    """
    bits = jnp.iinfo(residual.dtype).bits
    low = residual.astype(jnp.uint32) << (16 - bits)
    high = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32)
    raised = jnp.where(high & np.uint32(0x7FFF) == 0, 0, low >> 15)  # a zero never is, unless someone zeroed the weight
    return _number(((high - raised) << 16) | low)


def _hash(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 but for its last fold, which changes none of the 16 top bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)


def _pattern(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _number(pattern: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(pattern, jnp.float32)
