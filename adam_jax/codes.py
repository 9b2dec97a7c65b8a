"""Eight-bit codes of the moments of ONE array, and the one bfloat16 number that holds both: arithmetic on bit patterns.

**Second moments** are kept as the root s = sqrt(v), in the top bits of its float32 pattern, which is a logarithmic code: 8,
16 or 32 numbers an octave in a window of 32, 16 or 8 octaves, whichever the magnitudes in the leaf fit in, with some
headroom above the leaf's largest. The window is two integers a leaf; it moves by whole octaves, which changes no number
inside. It is chosen from codes that are in memory before the step begins, so that a step is one pass: those of two steps
ago. The first two steps, and those after one that left the window upwards, use one number an octave and all octaves of
float32. A positive root never becomes zero, however small: what lies below the window is kept as the window's lowest number.

**First moments** are kept as the ratio m / s to a root inside the window, which Hölder bounds (`norms`): in steps of 0.0006
near zero that grow to 0.31 near 7.42, where the bound is 7.27, and wider ones where it is larger. So they need no scale, and
a first moment follows its second: whatever rounding does to s, m / s stays what it was. Only where s is raised to the
window's lowest number is it m that stays: such steps are too small, never too large, at all decays.

**What is lost.** Below the window, under 1e-7 of the leaf's largest, elements move too little: rms of steps over float32's
.76 at 1e-7, .11 at 1e-8, .0003 at 1e-12. A window for each row of a leaf (16 bytes a row; data for a kernel) would make
that 1.01 where whole rows are so small, .0004 where they are mixed, and would give rows a meaning: so leaves have one
window, and rows of tables their own. Where a history attains the bound itself, cutting codes above it takes half of their
rounding: steps are at most 2 % too small there (at b1 = .93, b2 = .95; uncut within .4 %).

**Both** make one bfloat16 number: the code of s, 1 to 254, is its exponent, sign and code of m / s are its other bits; zero
is zero and NaN is NaN. Every pattern is an ordinary number, so that compilers see a conversion; arrays of eight bits cannot
be written in place beside those of 32 on TPU.

Operations are those of `jax.lax` where each leaf is traced: the operators of arrays make four times the calls. And they are
few kinds: each kind is lowered once a shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from adam_jax.moments import where

__all__ = [
    "Ratios",
    "coming_window",
    "decode_ratio",
    "decode_root",
    "encode_ratio",
    "encode_root",
    "extremes",
    "pack",
    "raised",
    "ratios",
    "read",
    "scale",
    "write",
]

FINEST, COARSEST = 5, 3  # bits after the octave in a code of s
EVERY_OCTAVE = (0, 0)  # the window of the first steps
HEADROOM = 4  # octaves above the leaf's largest s, at a rate of 1/1000
OFFSET = np.float32(0.0085)  # added to |m| / s, so that the pattern of the sum is linear near zero and logarithmic above
RATIO_BASE = OFFSET.view(np.int32)
MOST_RATIOS, FEWEST_RATIOS = 13, 8  # codes an octave for |m| / s: 127 of them reach to 7.42 and to 512
LARGEST = 254  # code of s
Scale = jax.Array | Sequence[jax.Array]  # int32[2] or two scalars (`scale`)
Pair = tuple[jax.Array, jax.Array]


class Ratios(NamedTuple):
    """The codes of |m| / s: int32 scalars."""

    octave: jax.Array  # how many codes an octave has
    step: jax.Array  # the distance of two codes, in units of the last place, above 2^19


def ratios(bound: ArrayLike) -> Ratios:
    """As many codes an octave as are possible if 127 of them shall reach the bound."""
    octave = jnp.clip(127.0 / jnp.log2(1.0 + bound / float(OFFSET)), FEWEST_RATIOS, MOST_RATIOS).astype(jnp.int32)
    return Ratios(octave, 2**23 // octave + 1)


def encode_ratio(r: jax.Array, bits: jax.Array, ratios: Ratios) -> jax.Array:
    """|m| / s, float32, as int32 from 0 to 127, where it saturates; `bits` are uint32 draws."""
    above = lax.add(_pattern(lax.add(lax.min(lax.abs(r), np.float32(512.0)), OFFSET)), np.negative(RATIO_BASE))
    return lax.min(_right(lax.add(lax.mul(above, ratios.octave), _fraction(bits, 9)), 23), np.int32(127))


def decode_ratio(code: jax.Array, step: jax.Array) -> jax.Array:
    """The |m| / s, float32, that a code stands for, at the `step` of its ratios."""
    return lax.add(_number(lax.add(lax.mul(code, step), RATIO_BASE)), np.negative(OFFSET))


def scale(windows: jax.Array) -> jax.Array:
    """What the codes of windows, int32[..., 2 n], stand for: a pair for each pair, for all leaves at once.

    A window is the biased exponent of its lowest octave, and the bits after it; its scale is the pattern of its lowest
    number, and a shift. The pattern of the code c, from 1 to 254, is lowest + ((c - 1) << shift). With one scalar more in a
    leaf's kernel, such as lowest - (1 << shift), XLA on TPU makes two of it.
    """
    start, fine = windows[..., 0::2], windows[..., 1::2]
    return jnp.stack([start << 23, 23 - fine], axis=-1).reshape(windows.shape)


def encode_root(s: jax.Array, bits: jax.Array, scale: Scale) -> jax.Array:
    """A root, float32, as int32: 0 for zero, 1 for the window's lowest number and all below it, and up; without bias inside.

    NaN becomes the lowest.
    """
    return where(s == 0, 0, where(s != s, 1, _of_raised(raised(s, scale), bits, scale)))


def decode_root(code: jax.Array, scale: Scale) -> jax.Array:
    """The root, float32, that a code stands for in its window."""
    return where(lax.eq(code, np.int32(0)), 0.0, _positive(code, scale))


def raised(s: jax.Array, scale: Scale) -> jax.Array:
    """The patterns of roots, of those below the window's lowest number its pattern."""
    return lax.max(_pattern(s), scale[0])


def write(m: jax.Array, s: jax.Array, bits: Sequence[jax.Array], scale: Scale, ratios: Ratios) -> jax.Array:
    """The bfloat16 numbers of moments m and s, float32, NaN where m is not finite; `bits` are the draws of m and of s."""
    size, nothing = raised(s, scale), lax.full_like(s, 0.0)
    root, ratio = _of_raised(size, bits[1], scale), encode_ratio(lax.div(m, _number(size)), bits[0], ratios)
    number = _number(lax.bitwise_or(_left(root, 23), _left(ratio, 16)))
    number = lax.select(lax.lt(m, nothing), lax.neg(number), number)
    number = lax.select(lax.lt(nothing, s), number, nothing)  # of a root of zero no ratio is kept
    return lax.convert_element_type(lax.add(number, lax.sub(m, m)), jnp.bfloat16)


def read(packed: jax.Array, scale: Scale, step: jax.Array, limit: ArrayLike | None = None) -> tuple[jax.Array, jax.Array]:
    """The moments m and s, float32, that bfloat16 numbers stand for, |m| cut at `limit` s; all are zero if `step` is."""
    number = lax.convert_element_type(packed, jnp.float32)
    both = lax.min(_right(_pattern(lax.abs(number)), 16), step)  # which is above all of them
    root, ratio = _right(both, 7), decode_ratio(lax.bitwise_and(both, np.int32(127)), step)
    there, nothing = lax.gt(root, np.int32(0)), lax.full_like(number, 0.0)
    ratio = ratio if limit is None else lax.min(ratio, jnp.asarray(limit, ratio.dtype))
    s = lax.select(there, _positive(root, scale), nothing)
    return lax.select(there, lax.mul(lax.mul(lax.sign(number), ratio), s), nothing), s


def pack(root: jax.Array) -> jax.Array:
    """Codes of roots alone as the bfloat16 numbers whose `extremes` are theirs."""
    return _number(_left(root, 23)).astype(jnp.bfloat16)


def coming_window(
    extremes: jax.Array | Sequence[jax.Array], window: jax.Array | Sequence[jax.Array], rate: ArrayLike
) -> jax.Array:
    """The window for coming codes of a leaf: as fine as its magnitudes allow, with headroom for gradients to come.

    `extremes` are those of codes in `window`; `rate` is how far a step moves the second moment. The headroom above the
    largest s is 4 octaves at a rate of 1/1000, room for gradients 500 times as large, and half an octave more with each
    doubling of the rate. One octave to spare at the bottom is asked of a finer window before it is taken, so that it does
    not come and go. All octaves, with one number each, if all codes are zero or one is at the window's top.
    """
    (top, bottom), (start, fine) = extremes, window
    high, low = ((top - 1) >> fine) + start, ((bottom - 1) >> fine) + start
    low = jnp.where(bottom == 1, low - 1, low)  # the lowest code may stand for less than it says
    headroom = HEADROOM + jnp.ceil(jnp.log2(jnp.maximum(rate, 1e-3) * 1e3) / 2).astype(jnp.int32)
    needed = high - low + 1 + headroom
    finer = jnp.int32(COARSEST)
    for bits in range(COARSEST + 1, FINEST + 1):
        finer = jnp.where(needed + jnp.where(fine >= bits, 0, 1) <= 256 >> bits, bits, finer)
    lost = (top == 0) | ((top == LARGEST) & (fine > 0))
    start = jnp.clip(high + 1 + headroom - (256 >> finer), 1, 255 - (256 >> finer))
    return jnp.where(lost, jnp.array(EVERY_OCTAVE, jnp.int32), jnp.stack([start, finer]))


def extremes(packed: Sequence[jax.Array], turn: jax.Array) -> tuple[list[Pair], jax.Array]:
    """The highest and the lowest code of a positive root, 0 and 255 where there is none: int32 scalars for each array.

    XLA makes one kernel of it and of the step if this is one reduction of pairs; on TPU, if it is two, of numbers. On GPU
    one of the pair is complex: of real numbers XLA would write out the step of sixteen, and compile it twice as long.
    On CPU a reduction is vectorized, and ten times faster, in eight bits. With them comes the same `turn` (`rounding`); on
    CPU it is known only when they are, so that XLA writes the codes, then read, in place.
    """

    def pairs(x: jax.Array) -> Pair:
        code, one = lax.shift_right_logical(lax.bitcast_convert_type(x, jnp.uint16), np.uint16(7)), np.uint8(1)
        code = lax.convert_element_type(code, jnp.uint8)
        # zero and NaN, 0 and 255, are among the lowest of the former and the highest of the latter
        pair, both = (lax.add(code, one), lax.sub(code, one)), lambda a, b: (lax.max(a[0], b[0]), lax.min(a[1], b[1]))
        found = lax.reduce(pair, (one, np.uint8(254)), both, tuple(range(x.ndim)))
        top, bottom = (lax.convert_element_type(y, jnp.int32) for y in found)
        return lax.sub(top, np.int32(1)), lax.add(bottom, np.int32(1))

    def sizes(x: jax.Array) -> Pair:
        size = lax.abs(lax.convert_element_type(x, jnp.float32))
        return where(lax.lt(size, np.float32(jnp.inf)), size, 0.0), where(lax.gt(size, np.float32(0)), size, jnp.inf)

    def parts(x: jax.Array) -> Pair:
        def both(a: Pair, b: Pair) -> Pair:
            return lax.complex(lax.max(lax.real(a[0]), lax.real(b[0])), lax.imag(a[0])), lax.min(a[1], b[1])

        top, bottom = sizes(x)
        pair, none = (lax.complex(top, lax.full_like(top, 0)), bottom), (np.complex64(0), np.float32(jnp.inf))
        top, bottom = lax.reduce(pair, none, both, tuple(range(x.ndim)))
        return _right(_pattern(lax.real(top)), 23), _right(_pattern(bottom), 23)

    def apart(x: jax.Array) -> Pair:
        top, bottom = sizes(x)
        top = lax.reduce(top, np.float32(0), lax.max, tuple(range(x.ndim)))
        bottom = lax.reduce(bottom, np.float32(jnp.inf), lax.min, tuple(range(x.ndim)))
        return _right(_pattern(top), 23), _right(_pattern(bottom), 23)

    def on_cpu(turn: jax.Array, *packed: jax.Array) -> tuple[list, jax.Array]:
        found = [pairs(x) for x in packed]
        return found, lax.add(turn, lax.convert_element_type(lax.min(found[0][0], np.int32(0)), turn.dtype))

    def on_tpu(turn: jax.Array, *packed: jax.Array) -> tuple[list, jax.Array]:
        return [apart(x) for x in packed], turn

    def on_gpu(turn: jax.Array, *packed: jax.Array) -> tuple[list, jax.Array]:
        return [parts(x) for x in packed], turn

    return lax.platform_dependent(turn, *packed, cpu=on_cpu, tpu=on_tpu, default=on_gpu)


def _of_raised(pattern: jax.Array, bits: jax.Array, scale: Scale) -> jax.Array:
    """The code of a root that is no less than the window's lowest number."""
    above = lax.sub(pattern, scale[0])
    code = _right(lax.add(above, _fraction(bits, lax.sub(np.int32(32), scale[1]))), scale[1])
    return lax.add(lax.min(code, np.int32(LARGEST - 1)), np.int32(1))


def _positive(code: jax.Array, scale: Scale) -> jax.Array:
    return _number(lax.add(lax.shift_left(lax.add(code, np.int32(-1)), scale[1]), scale[0]))


def _fraction(bits: jax.Array, drop: ArrayLike) -> jax.Array:
    """Draws without their `drop` low bits, int32."""
    return _right(_pattern(bits), drop)


def _left(x: jax.Array, by: int) -> jax.Array:
    return lax.shift_left(x, np.int32(by))


def _right(x: jax.Array, by: ArrayLike) -> jax.Array:
    """Shifted as if without a sign, for draws have the highest bit."""
    return lax.shift_right_logical(x, np.int32(by) if isinstance(by, int) else by)


def _pattern(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _number(pattern: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(pattern, jnp.float32)
