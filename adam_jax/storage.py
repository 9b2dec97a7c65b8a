"""How the moments of one leaf are kept between steps: as they are, in bfloat16, in eight bits, or in codes of your own.

Rounding is without bias (`rounding`). To nearest, a narrow second moment stalls: a step moves it by 1 - b2 of its value,
less than half the distance between two of its numbers, so it never moves at all. It depends on the seed, the count, the
leaf's path and the element's index in the whole array, on nothing else: not on devices, sharding or compilation.

Narrow second moments are roots. The step taken is that of the moments as they are kept, so a state alone tells what it was.

On a CPU narrow steps are bound by arithmetic, not by memory. Where there is AVX-512, XLA uses half of it unless told
otherwise, `jax.jit(step, compiler_options={"xla_cpu_prefer_vector_width": 512})`: on two threads of a Xeon a step then takes
1.2 to 1.3 times Optax's in bfloat16, and 1.4 to 1.6 in int8; without, 1.6 to 1.7, and 1.6 to 2.0 (`bench steps`).

To a compiler a leaf in bfloat16 is a hundred operations, one in int8 two hundred, one of Optax's sixteen: a model of 400
leaves takes three to six times as long to compile; in int8 five to eight times on CPU, and up to eleven on GPU (`bench
compiled --leaves 400`). With `smallest` its small leaves stay float32.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, codes, moments, rounding, straight_through, trees
from adam_jax.trees import At

__all__ = [
    "Code",
    "Codes",
    "Int8",
    "Kept",
    "Limits",
    "Moving",
    "Storage",
    "bfloat16",
    "first_codes",
    "int8",
]

SMALLEST = 4096  # elements: smaller leaves stay float32 beside int8
APART = 0x85EBCA6B  # odd, so that multiples of a sequence of draws are as even, and one hash serves all moments of a leaf
NONE = np.int32(0), np.int32(255)  # extremes of no codes at all (`codes.extremes`)
Nus = tuple[jax.Array, ...]
Pair = tuple[Any, Any]


class Bfloat16Codes(NamedTuple):
    """Marks the form of a state whose leaves are bfloat16."""


class Int8Codes(NamedTuple):
    """Marks the form of a state whose leaves are int8."""


class OwnCodes(NamedTuple):
    """Marks the form of a state whose leaves are kept in codes of one's own."""


class Kept(NamedTuple):
    """What a state keeps of one leaf: the first moment and the second ones, of which AMSGrad has two."""

    mu: jax.Array
    nus: Nus
    scales: Any = ()  # int32[len(nus), 4]: of the window of the int8 codes, and of the coming one (`codes.scale`)
    found: Any = ()  # with what is new of int8 codes: the extremes of those before, or of given moments the windows


class Codes(NamedTuple):
    """What a state with narrow leaves keeps besides their moments.

    Attributes:
        bound: scalar, the most that |mu| can be in units of sqrt(nu) (`norms`); the codes of int8 ratios depend on it.
        windows: int32[leaves, moments, 4], where a leaf is int8: the window of its codes, and that of the coming ones.
    """

    bound: jax.Array
    windows: jax.Array

    def after(self, bound: ArrayLike, extremes: dict[int, Sequence[Pair]], moved: ArrayLike, empty: ArrayLike) -> "Codes":
        """After a step, from the extremes of the codes that it read in each leaf; `empty` means that nothing was kept.

        Windows are found for all leaves at once; those of leaves without a gradient stay.
        """
        windows, there = self.windows, np.array([bool(extremes.get(i)) for i in range(len(self.windows))])
        if there.any():
            each = jax.vmap(jax.vmap(codes.coming_window, (0, 0, None)), (0, 0, None))
            found = jnp.stack([x for i in sorted(extremes) for pair in extremes[i] for x in pair])
            # or XLA on GPU would write them out wherever one is used, in a kernel that grows with the leaves
            found = lax.optimization_barrier(found).reshape(there.sum(), -1, 2)[np.maximum(there.cumsum() - 1, 0)]
            found = jnp.where(empty, jnp.array(NONE), found)
            coming = each(found, windows[..., :2], jnp.asarray(moved, jnp.float32))
            moved_on = jnp.concatenate([windows[..., 2:], coming], axis=-1)
            windows = jnp.where(there.reshape(-1, 1, 1), moved_on, windows)
        return Codes(jnp.asarray(bound, self.bound.dtype), windows)


class Limits(NamedTuple):
    """What bounds the first moment and the gradient, in units of the size: scalars."""

    mu: ArrayLike = jnp.inf  # as it is kept
    gradient: ArrayLike = jnp.inf  # which Nadam's look-ahead adds to it
    ratios_before: Any = ()  # `codes.Ratios` of the int8 codes that the state holds
    ratios: Any = ()  # and of those that are written


class Moving(NamedTuple):
    """What a storage needs to know of a step, besides the moments."""

    advance: Callable[[jax.Array], Nus]  # from the gradient to the next second moments
    g: jax.Array
    moved: ArrayLike  # how far they move
    stream: jax.Array  # the leaf's sequence of draws (`rounding`)
    turn: jax.Array  # of the step, in that
    limits: Limits

    def draws(self, moments: int) -> list[jax.Array]:
        """The draws for each of the leaf's moments."""
        first = rounding.draws(self.g.shape, self.stream, self.turn)
        return [first, *(first * np.uint32(pow(APART, moment, 2**32)) for moment in range(1, moments))]


@dataclasses.dataclass(frozen=True)
class Code:
    """One narrow number for each float32 number; elementwise functions.

    Attributes:
        dtype: of what is kept.
        encode: `(x, bits) -> kept`: float32 numbers and 32 random bits each (`rounding.draws`). It must take any finite x
            and should keep the mean: round up where bits / 2^32 is among the highest values, as many as the remainder says.
            Of second moments x is the root s >= 0, and only zero should be given for zero.
        decode: `kept -> x`, float32.
    """

    dtype: Any
    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the moments of a leaf are kept: each in a code, or as they are; `Storage()` keeps both as they are.

    Attributes:
        first: of first moments: a `Code`, a dtype of float32 or wider, or `None` for float32, wider where the param is.
        second: of the roots of second moments: a `Code`, or `None`.
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.
        marker: a NamedTuple's class, of the form of states kept so; with one for each of your own, they are told apart.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> half = Code(jnp.float16, lambda x, bits: x.astype(jnp.float16), lambda kept: kept.astype(jnp.float32))
        >>> print(scale_by_adam(storage=Storage(half, half)).init(jnp.ones(3)).mu.dtype)
        float16
    """

    first: Code | np.dtype | None = None
    second: Code | None = None
    smallest: int = 0
    seed: int = 0
    marker: type = OwnCodes

    def __post_init__(self) -> None:
        checks.whole("smallest", self.smallest, 0)
        checks.whole("seed", self.seed, 0)

    @property
    def narrow(self) -> bool:
        """Whether second moments are rounded to few bits, and so kept as roots."""
        return self.second is not None

    @property
    def windowed(self) -> bool:
        """Whether codes are those of a window, which each leaf has (`Codes`)."""
        return False

    @property
    def is_own(self) -> bool:
        """Whether anything is in codes that are not the library's."""
        return any(isinstance(code, Code) and code not in ROUNDED.values() for code in (self.first, self.second))

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded without bias."""
        return self.narrow or isinstance(self.first, Code)

    def stream(self, at: At) -> ArrayLike:
        """The leaf's sequence of draws, a NumPy number."""
        return rounding.stream(int(self.seed), at.path)

    def dtypes(self, wide: DTypeLike) -> tuple[np.dtype, np.dtype]:
        """Of what is kept of first and second moments whose arithmetic is in `wide`."""
        first = self.first.dtype if isinstance(self.first, Code) else self.first or wide
        if jnp.issubdtype(wide, jnp.complexfloating) and not isinstance(self.first, Code):
            first = moments.accumulator_dtype(first, jnp.complex64)
        return np.dtype(first), np.dtype(self.second.dtype if self.second else jnp.finfo(wide).dtype)

    def zero(self, moment: int, dtype: DTypeLike) -> jax.Array:
        """What is kept of one number that is zero, of the first moment (0) or a second one (1, 2)."""
        code = self._code(moment)
        if code is None or code in ROUNDED.values():
            return jnp.zeros([], dtype)
        encode = jax.jit(code.encode)  # so that it is traced once
        return encode(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.uint32)).astype(dtype)

    def empty(self, leaf: Any, wide: DTypeLike, moment: int) -> jax.Array:
        """What is kept of a moment of zero: an array like a leaf in shape and sharding."""
        dtype = self.dtypes(wide)[min(moment, 1)]
        return jnp.full_like(leaf, self.zero(moment, dtype), dtype=dtype)

    def emptied(self, kept: Kept, empty: ArrayLike) -> Kept:
        """What is kept, or moments of zero where `empty`, a boolean scalar."""
        each = enumerate((kept.mu, *kept.nus))
        mu, *nus = (
            x if trees.is_absent(x) else moments.where(jnp.asarray(empty), self.zero(i, x.dtype), x) for i, x in each
        )
        return kept._replace(mu=mu, nus=tuple(nus))

    def windows_of(self, nus: Nus) -> Any:
        """int32[len(nus), 4]: `Codes.windows` for second moments that are about to be kept, from themselves; or ()."""
        del nus
        return ()

    def load(
        self, kept: Kept, wide: DTypeLike, ratios: Any, limit: ArrayLike | None = None, empty: ArrayLike | None = None
    ) -> tuple[jax.Array, Nus]:
        """The first moment and the second ones, roots where they are narrow, in the dtype of the arithmetic.

        `ratios` are those that int8 codes were written with (`codes.Ratios`); `limit` bounds the first moment, in units of
        the size. Where `empty`, a boolean scalar, they are zero.
        """
        del ratios
        kept = kept if empty is None else self.emptied(kept, empty)
        mu = self.first.decode(kept.mu) if isinstance(self.first, Code) else kept.mu
        nus = [self.second.decode(nu) if self.second else nu for nu in kept.nus]
        mu, nus = mu.astype(wide), tuple(nu.astype(jnp.finfo(wide).dtype) for nu in nus)
        return mu if limit is None or not self.narrow else moments.within(mu, nus[0], limit), nus

    def save(self, kept: Kept, m: jax.Array, moving: Moving) -> tuple[Kept, jax.Array, Nus]:
        """What is kept after a step to the first moment m, and both moments as they are kept."""
        exact = (m, *moving.advance(moving.g))
        # as they are, the moments are what is kept: nothing to trace
        if not self.rounds and all(x.dtype == old.dtype for x, old in zip(exact, (kept.mu, *kept.nus), strict=True)):
            return Kept(m, exact[1:]), m, exact[1:]
        bits, new = moving.draws(1 + len(kept.nus)), []
        for i, (x, old) in enumerate(zip(exact, (kept.mu, *kept.nus), strict=True)):
            code = self._code(i)
            new.append((code.encode(x.astype(jnp.float32), bits[i]) if code else x).astype(old.dtype))
        loaded = self.load(Kept(new[0], tuple(new[1:])), m.dtype, moving.limits.ratios, limit=moving.limits.mu)
        coded = {i: x for i, x in enumerate(new) if self._code(i)}
        (m, nus), coded = straight_through.straight((m, exact[1:]), loaded, coded)
        mu, *kept_nus = (coded.get(i, x) for i, x in enumerate(new))
        return Kept(mu, tuple(kept_nus)), m, nus

    def nearest(self, kept: Kept, m: jax.Array, nus: Nus, ratios: Any) -> Kept:
        """What is kept of given moments, rounded to nearest, in arrays like those of `kept`."""
        del ratios
        new = []
        for i, (x, old) in enumerate(zip((m, *nus), (kept.mu, *kept.nus), strict=True)):
            code = self._code(i)
            new.append((code.encode(x.astype(jnp.float32), _half(x)) if code else x).astype(old.dtype))
        return Kept(new[0], tuple(new[1:]), found=jnp.zeros((len(nus), 4), jnp.int32))

    def bounded(self, g: jax.Array, size: jax.Array, limit: ArrayLike) -> jax.Array:
        """A gradient no larger than it can be for the size as it is kept, which is too small beyond a window of codes."""
        return straight_through.straight(g, moments.within(g, size, limit))[0] if self.narrow else g

    def _code(self, moment: int) -> Code | None:
        """Of the first moment (0) or of a second one."""
        code = self.second if moment else self.first
        return code if isinstance(code, Code) else None


@dataclasses.dataclass(frozen=True)
class Int8(Storage):
    """Both moments of an element in one bfloat16 number, in eight bits each (`codes`): m / s, and s in a window of the leaf.

    `mu` holds the numbers, `nu` nothing, and AMSGrad's `nu_max` codes in int8. Windows are those of whole leaves.
    """

    smallest: int = SMALLEST
    marker: type = Int8Codes

    @property
    def narrow(self) -> bool:
        return True

    @property
    def windowed(self) -> bool:
        return True

    def dtypes(self, wide: DTypeLike) -> tuple[np.dtype, np.dtype]:
        del wide
        return np.dtype(jnp.bfloat16), trees.ABSENT.dtype

    def zero(self, moment: int, dtype: DTypeLike) -> jax.Array:
        return jnp.asarray(-128 if moment > 1 else 0, dtype)

    def empty(self, leaf: Any, wide: DTypeLike, moment: int) -> jax.Array:
        del wide
        dtype = (jnp.bfloat16, bool, jnp.int8)[moment]
        return jnp.asarray(trees.ABSENT) if moment == 1 else jnp.full_like(leaf, self.zero(moment, dtype), dtype=dtype)

    def windows_of(self, nus: Nus) -> jax.Array:
        every = jnp.array(codes.EVERY_OCTAVE, jnp.int32)

        def window(s: jax.Array) -> jax.Array:
            s = moments.where(jnp.isfinite(s), s.astype(jnp.float32), 0.0)  # what is infinite is about to be NaN
            code = codes.encode_root(s, _half(s), codes.scale(every))
            (found,), _ = codes.extremes([codes.pack(code)], jnp.zeros([], jnp.uint32))
            return jnp.tile(codes.coming_window(found, every, 1e-3), 2)

        return jnp.stack([window(s) for s in nus])

    def load(
        self, kept: Kept, wide: DTypeLike, ratios: Any, limit: ArrayLike | None = None, empty: ArrayLike | None = None
    ) -> tuple[jax.Array, Nus]:
        step = ratios.step
        if empty is not None:  # by a scalar that the kernel has anyway: with one more, XLA on TPU makes two kernels
            step = moments.where(jnp.asarray(empty), 0, step)
        mu, size = codes.read(kept.mu, kept.scales[0], step, limit)
        more = zip(_bytes(kept.nus[1:]), kept.scales[1:], strict=True)
        sizes = (size, *(codes.decode_root(jnp.minimum(code, step), scale) for code, scale in more))
        return mu.astype(wide), tuple(s.astype(jnp.finfo(wide).dtype) for s in sizes)

    def save(self, kept: Kept, m: jax.Array, moving: Moving) -> tuple[Kept, jax.Array, Nus]:
        extremes, turn = codes.extremes([kept.mu, *map(codes.pack, _bytes(kept.nus[1:]))], moving.turn)
        bits = moving._replace(turn=turn).draws(1 + len(kept.nus))
        exact, scales, limits = (m, moving.advance(moving.g)), [pair[2:] for pair in kept.scales], moving.limits
        packed, *more = self._written(*exact, bits, scales, limits.ratios)
        nus = kept.nus[0], *more
        loaded = self.load(Kept(packed, nus, scales), m.dtype, limits.ratios, limit=limits.mu)
        (m, sizes), packed = straight_through.straight(exact, loaded, packed)
        return Kept(packed, nus, found=extremes), m, sizes

    def nearest(self, kept: Kept, m: jax.Array, nus: Nus, ratios: Any) -> Kept:
        windows = self.windows_of(nus)
        for s in nus:
            m += s - s  # NaN where either is not finite
        scales = codes.scale(windows)
        packed, *more = self._written(m, nus, [_half(m)] * (1 + len(nus)), scales, ratios)
        return Kept(packed, (kept.nus[0], *more), scales, windows)

    def _written(self, m: jax.Array, nus: Nus, bits: list[jax.Array], scales: Any, ratios: Any) -> list[jax.Array]:
        """The numbers of both moments, and the codes of AMSGrad's second root."""
        size, *more = [s.astype(jnp.float32) for s in nus]
        packed = codes.write(m.astype(jnp.float32), size, bits, scales[0], ratios)
        roots = (codes.encode_root(s, draws, scale) for s, draws, scale in zip(more, bits[2:], scales[1:], strict=True))
        return [packed, *((code - 128).astype(jnp.int8) for code in roots)]


def bfloat16(*, smallest: int = 0, seed: int = 0) -> Storage:
    """Both moments in bfloat16, rounded without bias; `storage="bfloat16"` means this with its defaults.

    Args:
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.

    Returns:
        A storage of 4 bytes a parameter.

    Example:
        >>> x, bits = jnp.full(4, 1.005), jnp.arange(4, dtype=jnp.uint32) << 30
        >>> print(bfloat16().second.encode(x, bits))
        [1 1 1.00781 1.00781]
    """
    code = ROUNDED[np.dtype(jnp.bfloat16)]
    return Storage(code, code, smallest, seed, Bfloat16Codes)


def int8(*, smallest: int = SMALLEST, seed: int = 0) -> Storage:
    """Both moments in eight bits, as logarithmic codes; `storage="int8"` means this with its defaults.

    Args:
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.

    Returns:
        A storage of 2 bytes a parameter and 16 a leaf.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> print(scale_by_adam(storage=int8(smallest=0)).init(jnp.ones(3)).mu)
        [0 0 0]
    """
    return Int8(smallest=smallest, seed=seed)


def _code(dtype: DTypeLike) -> Code:
    """bfloat16 or float16, rounded without bias."""
    return Code(
        np.dtype(dtype),
        lambda x, bits: rounding.round_to(x, dtype, bits).astype(dtype),
        lambda kept: kept.astype(jnp.float32),
    )


ROUNDED = {np.dtype(dtype): _code(dtype) for dtype in (jnp.bfloat16, jnp.float16)}  # once: storages are compared


def first_codes(leaves: int, slots: int) -> Codes:
    """What a state with narrow leaves keeps besides moments of zero."""
    return Codes(jnp.zeros([], jnp.float32), jnp.zeros((leaves, slots, 4), jnp.int32))


def _half(x: jax.Array) -> jax.Array:
    """The draw that rounds to nearest."""
    return jnp.full(x.shape, 2**31, jnp.uint32)


def _bytes(nus: Nus) -> list[jax.Array]:
    """The codes of AMSGrad's second root."""
    return [nu.astype(jnp.int32) + 128 for nu in nus]
