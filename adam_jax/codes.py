"""Eight-bit codes of the moments of ONE array: arithmetic on the bit patterns of float32.

**Second moments** are kept as the root s = sqrt(v). Eight bits hold the top bits of its float32 pattern, which is a
logarithmic code: 8, 16 or 32 numbers an octave in a window of 32, 16 or 8 octaves, whichever the magnitudes in the leaf fit
in, with some headroom above the leaf's largest. The window is two integers a leaf; it moves by whole octaves, which changes
no number inside. It is chosen from the codes of the step before, so the very first step, and a step after one that left the
window upwards, use one number an octave and all octaves of float32. A positive root never becomes zero, however small: what
lies below the window is kept as the window's lowest number, and its steps are too small, never too large.

**First moments** are kept as the ratio m / s, which Cauchy-Schwarz bounds (`largest_ratio`), in steps of 0.0006 near zero up
to 0.31 near the largest, 7.42. So they need no scale, and a first moment follows its second: whatever rounding does to s,
m / s stays what it was.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["decode_ratio", "decode_root", "encode_ratio", "encode_root", "largest_ratio", "next_window", "within"]

FINEST, COARSEST = 5, 3  # bits after the octave in a code of s
EVERY_OCTAVE = (0, 0)  # the window of the first step
HEADROOM = 4  # octaves above the leaf's largest s, at a rate of 1/1000
OFFSET = 0.0085  # added to |m| / s, so that the pattern of the sum is linear near zero and logarithmic above
RATIOS = 13  # codes an octave for |m| / s, the most for which 127 codes reach beyond 7.27
RATIO_STEP, RATIO_BASE = 2**23 // RATIOS + 1, int(np.float32(OFFSET).view(np.int32))


def encode_ratio(r: jax.Array, bits: jax.Array) -> jax.Array:
    """A first moment's ratio in eight bits: the sign, and 127 steps from 0 to 7.42 that grow from 0.0006 to 0.31.

    Args:
        r: float32, any shape; beyond 7.42 it saturates.
        bits: uint32 from `rounding.draws`, same shape.

    Returns:
        int8, same shape; zero for zero, -128 for NaN.

    Example:
        >>> print(encode_ratio(jnp.array([0.0, 1.0, -7.0]), jnp.zeros(3, jnp.uint32)))
        [   0   89 -125]
    """
    above = _pattern(jnp.minimum(jnp.abs(r), 8.0) + OFFSET) - RATIO_BASE
    code = jnp.minimum((above * RATIOS + (bits >> 9).astype(jnp.int32)) >> 23, 127)
    code = jnp.where(r < 0, -code, code).astype(jnp.int8)
    return jnp.where(jnp.isnan(r), jnp.int8(-128), code)  # a choice comes last, so that XLA keeps it rather than repeat it


def decode_ratio(code: jax.Array) -> jax.Array:
    """The ratio that a code of `encode_ratio` stands for.

    Args:
        code: int8, any shape.

    Returns:
        float32, same shape.

    Example:
        >>> print(decode_ratio(jnp.array([0, 89, -125], jnp.int8)))
        [ 0.         0.9585794 -6.805066 ]
    """
    wide = code.astype(jnp.int32)
    size = _number(jnp.abs(wide) * RATIO_STEP + RATIO_BASE) - OFFSET
    return jnp.where(wide == -128, jnp.nan, jnp.where(wide < 0, -size, size))


def encode_root(s: jax.Array, bits: jax.Array, window: jax.Array) -> jax.Array:
    """A root second moment in eight bits: the octave and its next few bits, rounded without bias inside the window.

    Args:
        s: float32 >= 0, any shape. Below the window it becomes the window's lowest number (NaN too), above the highest.
        bits: uint32 from `rounding.draws`, same shape.
        window: int32[2]: the exponent (of float32, biased) of the lowest octave, and the bits after the octave.

    Returns:
        int8, same shape: -128 for zero, -127 for 2^(lowest - 127), and up.

    Example:
        >>> print(encode_root(jnp.array([0.0, 1e-9, 1.0, 1.5]), jnp.zeros(4, jnp.uint32), jnp.array([120, 3])))
        [-128 -127  -71  -67]
    """
    drop = 23 - window[1]
    above = jnp.where(jnp.isnan(s), 0, jnp.maximum(_pattern(s) - (window[0] << 23), 0))
    code = jnp.minimum((above + (bits >> (32 - drop).astype(jnp.uint32)).astype(jnp.int32)) >> drop, 254)
    return jnp.where(s == 0, jnp.int8(-128), (code - 127).astype(jnp.int8))


def decode_root(code: jax.Array, window: jax.Array) -> jax.Array:
    """The root second moment that a code of `encode_root` stands for.

    Args:
        code: int8, any shape.
        window: int32[2], that of the code.

    Returns:
        float32, same shape.

    Example:
        >>> print(decode_root(jnp.array([-128, -127, -71, -67], jnp.int8), jnp.array([120, 3])))
        [0.        0.0078125 1.        1.5      ]
    """
    wide = code.astype(jnp.int32)
    return jnp.where(wide == -128, 0.0, _number(((wide + 127) << (23 - window[1])) + (window[0] << 23)))


def next_window(code: jax.Array, window: jax.Array, rate: ArrayLike) -> jax.Array:
    """The window for the next codes of a leaf: as fine as its magnitudes allow, with headroom for the coming gradients.

    The headroom above the leaf's largest s is 4 octaves at a rate of 1/1000, and half an octave more with each doubling of
    the rate: room for gradients 500 times the largest s. One octave to spare at the bottom is asked of a finer window
    before it is taken, so that it does not come and go.

    Args:
        code: int8, the leaf's codes.
        window: int32[2], that of the codes.
        rate: scalar in [0, 1]: how far the coming step moves the second moment.

    Returns:
        int32[2]; all octaves, with one number each, if all codes are zero or one is at the window's top.

    Example:
        >>> code = encode_root(jnp.full(9, 1.0), jnp.zeros(9, jnp.uint32), jnp.array([0, 0]))
        >>> print(next_window(code, jnp.array([0, 0]), 0.001))
        [124   5]
    """
    fine = window[1]
    top, bottom = _extremes(code)
    highest, lowest = (((x >> fine) + window[0]) for x in (top, bottom))
    lowest = jnp.where((bottom == 0) & (fine > 0), lowest - 1, lowest)  # the lowest code may stand for less than it says
    headroom = HEADROOM + jnp.ceil(jnp.log2(jnp.maximum(rate, 1e-3) * 1e3) / 2).astype(jnp.int32)
    needed = highest - lowest + 1 + headroom
    finer = jnp.int32(COARSEST)
    for bits in range(COARSEST + 1, FINEST + 1):
        finer = jnp.where(needed + jnp.where(fine >= bits, 0, 1) <= 256 >> bits, bits, finer)
    lost = (top < 0) | ((top == 254) & (fine > 0))
    start = jnp.clip(highest + 1 + headroom - (256 >> finer), 1, 255 - (256 >> finer))
    return jnp.where(lost, jnp.array(EVERY_OCTAVE, jnp.int32), jnp.stack([start, finer]))


def largest_ratio(b1_rate: ArrayLike, b2_rate: ArrayLike) -> jax.Array:
    """The most that |m| / s can be: (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), infinite where b1^2 >= b2.

    By Cauchy-Schwarz on weights: a step moves m by a rate a and v by a rate c, and if |m| <= C s before, then after it
    |m'|^2 <= ((1 - a)^2 C^2 / (1 - c) + a^2 / c) v'. The fixed point of that for a = 1 - b1, c = 1 - b2 is this bound; the
    larger rates of the first corrected steps lead to no more. It needs of the past only |m| <= C s, never how m and s came
    about, so whatever rounding did to them, holding m inside C s before each step bounds every step.

    Args:
        b1_rate: scalar, 1 - b1.
        b2_rate: scalar, 1 - b2.

    Returns:
        float32 scalar.

    Example:
        >>> print(largest_ratio(0.1, 0.001))
        7.2702904
    """
    b1_rate, b2_rate = jnp.asarray(b1_rate, jnp.float32), jnp.asarray(b2_rate, jnp.float32)
    room = 1.0 - (1.0 - b1_rate) ** 2 / (1.0 - b2_rate)
    bounded = (room > 0) & (b2_rate > 0)
    return jnp.where(bounded, b1_rate / jnp.sqrt(jnp.where(bounded, b2_rate * room, 1.0)), jnp.inf)


def _extremes(code: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest and the lowest code of a positive root, as numbers from 0 to 254; -1 and 255 where there is none.

    One reduction of pairs: of two reductions XLA on CPU makes the second, which also subtracts, ten times slower.
    """
    pairs = (code, code - jnp.int8(1))  # zeros wrap to the highest
    top, bottom = jax.lax.reduce(
        pairs,
        (jnp.int8(-128), jnp.int8(127)),
        lambda a, b: (jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])),
        tuple(range(code.ndim)),
    )
    axes = _manual_axes(code)
    if axes:  # inside `shard_map` too, a window is that of the whole leaf
        top, bottom = jax.lax.pmax(top, axes), jax.lax.pmin(bottom, axes)
    return top.astype(jnp.int32) + 127, bottom.astype(jnp.int32) + 128


def _manual_axes(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes along which a shard inside `shard_map` differs from others; none where `check_vma=False` hides them."""
    kind: Any = jax.typeof(x)
    return tuple(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)  # jax 0.8 to 0.9: vma


def within(mu: jax.Array, size: jax.Array, ratio: ArrayLike) -> jax.Array:
    """A first moment as kept, no larger than it can be for its second: rounding may have passed that.

    Args:
        mu: first moment, any shape.
        size: root of the second, same shape.
        ratio: scalar, the most that |mu| / size can be, such as `largest_ratio`; may be infinite.

    Returns:
        Same shape as `mu`.

    Example:
        >>> print(within(jnp.array([9.0, -1.0]), jnp.array([1.0, 1.0]), 7.27))
        [ 7.27 -1.  ]
    """
    ratio = jnp.asarray(ratio)
    limit = jnp.where(jnp.isinf(ratio), jnp.inf, ratio * size)
    return jnp.clip(mu, -limit, limit)


def _pattern(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _number(pattern: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(pattern.astype(jnp.int32), jnp.float32)
