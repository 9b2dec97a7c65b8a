"""How the moments of one leaf are kept between steps: in float32 or wider, bfloat16, eight bits, or a way of your own.

Rounding is without bias (`adam_jax.rounding`). To nearest, a narrow second moment stalls: a step moves it by 1 - b2 of its
value, less than half the distance between two of its numbers, so it never moves at all. It depends on the seed, the count,
the leaf's path and the element's index in the whole array, on nothing else: not on devices, sharding or compilation.

The step taken is that of the moments as they are kept, so a state alone tells what the step was.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from adam_jax import codes, rounding

__all__ = [
    "KeptMoments",
    "Storage",
    "bfloat16",
    "check_choices",
    "chosen",
    "first_windows",
    "has_windows",
    "int8_ratio",
    "int8_root",
    "is_compact",
    "is_function",
    "is_relative",
    "kept_moments",
    "recomputed",
    "state_bytes",
    "zeros",
]

SMALLEST = 4096  # elements: smaller leaves stay float32 beside int8


@dataclasses.dataclass(frozen=True)
class Storage:
    """How one moment array is kept between steps. `mu_dtype` and `nu_dtype` take these; your own are elementwise functions.

    Attributes:
        dtype: of the array in the state, which has the leaf's shape.
        encode: `(x, bits) -> array`: float32 values and 32 random bits each (`rounding.draws`) to what is kept. For second
            moments x is the root s >= 0; for first moments it is m, or m / s. It must take any finite x, should keep the
            mean (round up where bits / 2^32 is among the highest values, as many as the remainder says) and, for second
            moments, should give zero for zero alone.
        decode: `array -> x`, the inverse, float32.
        relative: a first moment is kept as m / s, in [-`codes.largest_ratio`, `codes.largest_ratio`].
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.
        window: for codes that move with the leaf's magnitudes: `(array, window, rate) -> window`, int32[2] to int32[2];
            `encode` and `decode` then get the window as their last argument. See `codes.next_window`.
    """

    dtype: Any
    encode: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]
    relative: bool = False
    smallest: int = 0
    seed: int = 0
    window: Callable[[jax.Array, jax.Array, ArrayLike], jax.Array] | None = None

    def holds(self, leaf: Any) -> bool:
        """Whether a leaf is large enough to be kept so; others stay float32."""
        return np.size(leaf) >= self.smallest


def bfloat16(*, smallest: int = 0, seed: int = 0) -> Storage:
    """Moments in bfloat16, rounded without bias; `jnp.bfloat16` means this with its defaults.

    Args:
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.

    Returns:
        A storage for first and for second moments.

    Example:
        >>> x, bits = jnp.full(4, 1.005), jnp.arange(4, dtype=jnp.uint32) << 30
        >>> print(bfloat16().encode(x, bits))
        [1 1 1.00781 1.00781]
    """

    def encode(x: jax.Array, bits: jax.Array) -> jax.Array:
        return rounding.stochastic(x, bits, 16).astype(jnp.bfloat16)

    return Storage(jnp.dtype(jnp.bfloat16), encode, _widened, smallest=smallest, seed=seed)


def int8_ratio(*, smallest: int = SMALLEST, seed: int = 0) -> Storage:
    """First moments in eight bits, as ratios to the root second moment; `mu_dtype=jnp.int8` means this with its defaults.

    Args:
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.

    Returns:
        A storage for first moments.

    Example:
        >>> print(int8_ratio().dtype, int8_ratio().relative)
        int8 True
    """
    return Storage(jnp.dtype(jnp.int8), codes.encode_ratio, codes.decode_ratio, relative=True, smallest=smallest, seed=seed)


def int8_root(*, smallest: int = SMALLEST, seed: int = 0) -> Storage:
    """Second moments in eight bits, as logarithms of their roots; `nu_dtype=jnp.int8` means this with its defaults.

    A leaf's codes share a window, which moves with its magnitudes. Inside `shard_map` it is that of the whole leaf, alike on
    all shards; not with `check_vma=False`, where each shard would have its own and a state put together could not be read.

    Args:
        smallest: leaves of fewer elements stay float32.
        seed: of the rounding.

    Returns:
        A storage for second moments.

    Example:
        >>> print(int8_root(smallest=0).smallest)
        0
    """
    return Storage(
        jnp.dtype(jnp.int8), codes.encode_root, codes.decode_root, smallest=smallest, seed=seed, window=codes.next_window
    )


def chosen(choice: Any, path: str, *, second: bool) -> Storage | np.dtype | None:
    """What an argument `mu_dtype` or `nu_dtype` means for one leaf.

    Args:
        choice: a dtype, `None`, a `Storage`, or a function from a leaf's path to one of those.
        path: of the leaf.
        second: whether it is for second moments.

    Returns:
        A storage for bfloat16, int8 and float16; otherwise the dtype, or `None`.

    Raises:
        ValueError: for a dtype that cannot hold the moment, and for float64 where JAX is not set up for it.

    Example:
        >>> chosen(jnp.int8, "", second=False).relative
        True
    """
    if isinstance(choice, Storage):
        return choice
    if is_function(choice):
        return chosen(choice(path), path, second=second)
    if choice is None:
        return None
    name, others = ("nu_dtype", "") if second else ("mu_dtype", "float16, ")
    try:
        dtype = np.dtype(choice)
    except TypeError:
        dtype = None
    if dtype == jnp.int8:
        return int8_root() if second else int8_ratio()
    if dtype == jnp.bfloat16:
        return bfloat16()
    if dtype is not None and dtype in (np.float32, np.float64, np.complex64, np.complex128):
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(f"{name} must be a dtype that JAX is set up for, got {dtype}: enable jax_enable_x64 for it")
        return dtype
    if dtype is not None and dtype == np.float16 and not second:
        return Storage(dtype, lambda r, bits: rounding.round_to(r, dtype, bits).astype(dtype), _widened, relative=True)
    allowed = f"float32, float64, bfloat16, {others}int8, a Storage, a function of the path or None"
    raise ValueError(f"{name} must be {allowed}, got {choice if dtype is None else dtype}")


def check_choices(mu_choice: Any, nu_choice: Any) -> None:
    """Find choices that no leaf can be kept by, before there are leaves; what a function chooses is seen when it is asked.

    Args:
        mu_choice: the argument `mu_dtype`, see `chosen`.
        nu_choice: the argument `nu_dtype`.

    Raises:
        ValueError: as `chosen`.

    Example:
        >>> check_choices(jnp.int8, lambda path: jnp.int4)
    """
    for choice, second in ((mu_choice, False), (nu_choice, True)):
        if not is_function(choice):
            chosen(choice, "", second=second)


def is_compact(choice: Any) -> bool:
    """Whether second moments chosen so are kept as roots: they are, unless the choice is a float32 or wider or `None`.

    Args:
        choice: as for `chosen`.

    Returns:
        True for a storage, a function, int8 or bfloat16.

    Example:
        >>> is_compact(jnp.int8), is_compact(jnp.float32), is_compact(None)
        (True, False, False)
    """
    return isinstance(choice if is_function(choice) else chosen(choice, "", second=True), (Storage, Callable))


def is_relative(choice: Any) -> bool:
    """Whether first moments chosen so are kept as ratios to the root second moment in every leaf.

    Args:
        choice: as for `chosen`.

    Returns:
        True for int8 and float16, and for a storage that says so.

    Example:
        >>> is_relative(jnp.int8), is_relative(jnp.bfloat16)
        (True, False)
    """
    keep = None if is_function(choice) else chosen(choice, "", second=False)
    return isinstance(keep, Storage) and keep.relative


def is_function(choice: Any) -> bool:
    """Whether a choice is a function of a leaf's path.

    Args:
        choice: as for `chosen`.

    Returns:
        True for functions; dtypes that can be called are none.

    Example:
        >>> is_function(jnp.float32), is_function(lambda path: jnp.float32)
        (False, True)
    """
    return callable(choice) and not isinstance(choice, type)


def has_windows(choice: Any) -> bool:
    """Whether second moments chosen so may need a window for each leaf.

    Args:
        choice: as for `chosen`.

    Returns:
        True for int8, a storage with a window, or a function.

    Example:
        >>> has_windows(jnp.int8), has_windows(jnp.bfloat16)
        (True, False)
    """
    if is_function(choice):
        return True
    keep = chosen(choice, "", second=True)
    return isinstance(keep, Storage) and keep.window is not None


@dataclasses.dataclass(frozen=True)
class KeptMoments:
    """The moments of one leaf as a state keeps them. Made by `kept_moments`.

    Attributes:
        mu: what is kept of the first moment.
        nus: what is kept of the second moments: Adam has one, AMSGrad two.
        window: int32[len(nus), 2], or None where no window is kept.
        storages: of `mu` and of each of `nus`, None where the values themselves are kept.
        path: of the leaf.
        first_index: of the array's first element, where the array is a part of the leaf.
        later: zero, but known only when `mu` is: XLA writes second moments in place once it no longer reads them for `mu`.
    """

    mu: jax.Array
    nus: tuple[jax.Array, ...]
    window: jax.Array | None
    storages: tuple[Storage | None, ...]
    path: str
    first_index: ArrayLike = 0
    later: ArrayLike = 0

    @property
    def is_exact(self) -> bool:
        """Whether all values are kept as they are."""
        return not any(self.storages)

    def second(self, dtype: DTypeLike) -> tuple[jax.Array, ...]:
        """The second moments, or their roots, in the dtype of the leaf's arithmetic."""
        return tuple(self._load(i + 1, nu).astype(dtype) for i, nu in enumerate(self.nus))

    def first(self, dtype: DTypeLike, size: jax.Array) -> jax.Array:
        """The first moment, in the dtype of the leaf's arithmetic; `size` is the root of the second as kept."""
        mu, keep = self._load(0, self.mu).astype(dtype), self.storages[0]
        return mu * size if keep and keep.relative else mu

    def with_first(self, mu: jax.Array, size: ArrayLike = 1.0, count: ArrayLike = 0) -> "KeptMoments":
        """What is kept after the first moment's step; `size` is the root second moment that belongs to it, not rounded."""
        keep = self.storages[0]
        if not keep or not keep.relative:
            return dataclasses.replace(self, mu=self._save(0, mu, self.mu, count))
        dead = size < jnp.finfo(mu.dtype).tiny
        kept = self._save(0, jnp.where(dead, 0.0, mu / jnp.where(dead, 1.0, size)), self.mu, count)
        split = any(axis is not None for axis in jax.typeof(kept).sharding.spec)  # over explicit axes: it cannot be indexed
        one = jnp.abs(kept[(0,) * kept.ndim].astype(jnp.int32)) if kept.size and not split else 0
        return dataclasses.replace(self, mu=kept, later=jnp.minimum(one, 0))

    def with_second(self, nus: tuple[jax.Array, ...], rate: ArrayLike = 0.0, count: ArrayLike = 0) -> "KeptMoments":
        """What is kept after the second moments' step, which comes after the first's; `rate` is how far they moved."""
        window = self.window
        if window is not None:
            moved = zip(self.storages[1:], self.nus, window, strict=True)
            window = jnp.stack([k.window(nu, w, rate) if k and k.window else w for k, nu, w in moved])
        new = dataclasses.replace(self, window=window)
        saved = (
            new._save(i + 1, nu, old, count + self.later) for i, (nu, old) in enumerate(zip(nus, self.nus, strict=True))
        )
        return dataclasses.replace(new, nus=tuple(saved))

    def _load(self, i: int, kept: jax.Array) -> jax.Array:
        keep = self.storages[i]
        return keep.decode(kept, *self._own_window(i)) if keep else kept

    def _save(self, i: int, x: jax.Array, old: jax.Array, count: ArrayLike) -> jax.Array:
        keep = self.storages[i]
        if not keep:
            return x.astype(old.dtype)
        stream = rounding.stream(keep.seed, f"{i}{self.path}") + jnp.asarray(self.first_index).astype(jnp.uint32)
        bits = rounding.draws(x.shape, stream, count)
        return keep.encode(x.astype(jnp.float32), bits, *self._own_window(i)).astype(keep.dtype)

    def _own_window(self, i: int) -> tuple[jax.Array, ...]:
        keep = self.storages[i]
        return (self.window[i - 1],) if keep and keep.window and self.window is not None else ()


def kept_moments(
    mu_choice: Any, nu_choice: Any, path: str, mu: jax.Array, nus: Sequence[jax.Array], windows: Any, number: int
) -> KeptMoments:
    """The moments of one leaf as a state keeps them.

    Args:
        mu_choice: the argument `mu_dtype`, see `chosen`.
        nu_choice: the argument `nu_dtype`.
        path: of the leaf.
        mu: what is kept of the first moment.
        nus: what is kept of the second moments.
        windows: int32[leaves, len(nus), 2], or an empty tuple.
        number: of the leaf.

    Returns:
        The moments; those of a leaf too small for its storage are the values themselves.

    Raises:
        ValueError: for an array that these choices do not make.

    Example:
        >>> kept = kept_moments(jnp.int8, None, "", jnp.array([80], jnp.int8), [jnp.array([2.0])], (), 0)
        >>> print(kept.first(jnp.float32, jnp.array([2.0])))
        [1.2248507]
    """
    choices = ((mu_choice, mu), *((nu_choice, nu) for nu in nus))
    storages = tuple(_storage_of(choice, path, kept, second=i > 0) for i, (choice, kept) in enumerate(choices))
    if has_windows(nu_choice) != (len(windows) > 0):
        held = "windows" if len(windows) else "no windows"
        raise ValueError(f"nu_dtype must be as it was at init, got {nu_choice}, but the state keeps {held} in nu_window")
    return KeptMoments(mu, tuple(nus), windows[number] if len(windows) else None, storages, path)


def first_windows(choice: Any, leaves: int, moments: int) -> Any:
    """The windows of a state in which nothing is kept yet.

    Args:
        choice: the argument `nu_dtype`, see `chosen`.
        leaves: the number of trained leaves.
        moments: the number of second moments of each.

    Returns:
        int32[leaves, moments, 2], or an empty tuple where there are no windows.

    Example:
        >>> print(first_windows(jnp.int8, 1, 1), first_windows(jnp.bfloat16, 1, 1))
        [[[0 0]]] ()
    """
    return jnp.tile(jnp.array(codes.EVERY_OCTAVE, jnp.int32), (leaves, moments, 1)) if has_windows(choice) else ()


def zeros(keep: Storage | np.dtype | None, leaf: Any, wide: Any) -> jax.Array:
    """What is kept of a moment of zeros.

    Args:
        keep: a storage or a dtype, or `None`, see `chosen`.
        leaf: an array or `ShapeDtypeStruct`, for its shape and sharding.
        wide: the dtype where none was chosen, and of leaves too small for the storage.

    Returns:
        An array of the leaf's shape.

    Example:
        >>> print(zeros(int8_root(smallest=2), jnp.ones(2), jnp.float32))
        [-128 -128]
    """
    if not isinstance(keep, Storage) or not keep.holds(leaf):
        return jnp.zeros_like(leaf, dtype=keep if isinstance(keep, np.dtype) else wide)
    values = jnp.zeros_like(leaf, dtype=jnp.float32)
    window = () if keep.window is None else (jnp.array(codes.EVERY_OCTAVE, jnp.int32),)
    return keep.encode(values, jnp.zeros_like(leaf, dtype=jnp.uint32), *window).astype(keep.dtype)


def recomputed(x: jax.Array, count: ArrayLike) -> jax.Array:
    """The same x, but so that XLA does not see it.

    Where two results need the same quotient, XLA on CPU computes it once and writes an array of float32 to memory, which
    costs more than narrow moments save. Of an x that may be another it computes the quotient again.

    Args:
        x: any shape.
        count: integer scalar >= 0.

    Returns:
        x.

    Example:
        >>> print(recomputed(jnp.array([0.3]), 0))
        [0.3]
    """
    return x * jnp.where(jnp.asarray(count) < 0, 2.0, 1.0).astype(x.dtype)


def state_bytes(tx: Any, params: Any) -> int:
    """How many bytes the state of a transformation takes, without allocating any.

    Args:
        tx: an Optax transformation.
        params: a tree of arrays or `ShapeDtypeStruct`s.

    Returns:
        The number of bytes.

    Example:
        >>> state_bytes(optax.scale_by_adam(), {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
        8000004
    """
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _storage_of(choice: Any, path: str, kept: jax.Array, *, second: bool) -> Storage | None:
    """The storage of an array, or None for values themselves; an error for an array that the choice does not make."""
    keep = chosen(choice, path, second=second)
    if isinstance(keep, Storage) and keep.dtype == kept.dtype:
        return keep  # of whatever size: this may be a shard
    small = not isinstance(keep, Storage) or not keep.holds(kept)
    if small and jnp.issubdtype(kept.dtype, jnp.inexact) and jnp.finfo(kept.dtype).bits >= 32:
        return None
    name = "nu_dtype" if second else "mu_dtype"
    raise ValueError(
        f"{name} must be as it was at init, got {choice}, but the state keeps {kept.dtype} for the leaf at "
        f"{path or 'the root'}"
    )


def _widened(kept: jax.Array) -> jax.Array:
    return kept.astype(jnp.float32)
