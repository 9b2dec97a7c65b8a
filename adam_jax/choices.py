"""What the arguments `storage` and `mu_dtype` mean for a leaf, and how a leaf of a state is kept."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adam_jax import moments, trees
from adam_jax.storage import ROUNDED, Bfloat16Codes, Code, Int8, Int8Codes, Kept, Storage, bfloat16, int8
from adam_jax.trees import At

__all__ = ["Choice", "StorageLike", "StoragePerLeaf", "held_by", "state_bytes"]

NAMES = ("float32", "root", "bfloat16", "int8")


class CodesByPath(NamedTuple):
    """Marks the form of a state whose leaves are kept as a function of their path says.

    Attributes:
        own: for each trained leaf, the marker of its storage where that has codes of one's own; () where no leaf's has.
    """

    own: tuple[Any, ...] = ()


StorageLike = Literal["float32", "root", "bfloat16", "int8"] | Storage | None
StoragePerLeaf = StorageLike | Callable[[str], StorageLike]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the arguments `storage` and `mu_dtype` mean, resolved once; a function of the path is asked leaf by leaf.

    Attributes:
        storage: as given.
        mu_dtype: as given.

    Raises:
        ValueError: for arguments that no leaf can be kept by.
    """

    storage: StoragePerLeaf
    mu_dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.storage is not None and self.mu_dtype is not None:
            raise ValueError(
                f"mu_dtype is for the first moment alone and must be None with storage, got mu_dtype={self.mu_dtype} and "
                f"storage={self.storage!r}: storage says how both are kept"
            )
        if not self.by_path:
            self._named(self.storage)

    @property
    def by_path(self) -> bool:
        """Whether a function of the path chooses."""
        return callable(self.storage) and not isinstance(self.storage, type)

    @property
    def rooted(self) -> bool:
        """Whether second moments are kept as roots, in all leaves: beside narrow ones also where they are float32."""
        return self.storage not in (None, "float32", Storage())

    @property
    def narrow(self) -> bool:
        """Whether leaves may be narrow."""
        return self.by_path or self._named(self.storage).narrow

    def codes(self, mu: Any = ()) -> Any:
        """The marker of the form of a state kept so, whose first moments are `mu`."""
        if not self.by_path:
            how = self._named(self.storage)
            return how.marker() if how.narrow or how.is_own else ()
        each = [self.of(At(keys)) for keys, leaf in trees.with_paths(mu) if not trees.is_absent(leaf)]
        own = any(how.is_own for how in each)
        return CodesByPath(tuple(how.marker() if how.is_own else () for how in each) if own else ())

    def new(self, at: At, leaf: Any) -> Storage:
        """How a leaf of the params is going to be kept."""
        storage = self.of(at)
        if np.size(leaf) < storage.smallest:
            return Storage()
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) and storage.dtypes(np.complex64)[0].kind != "c":
            raise ValueError(
                f"{self._name} must be float32 for the complex leaf at {at}, got {self._got(at)}: keep that leaf so by a "
                "function of the path, or split it with optax.contrib.split_real_and_imaginary"
            )
        return storage

    def old(self, at: At, kept: Kept) -> Storage:
        """How a leaf of a state is kept; an error if these arguments do not make that."""
        storage, exact = self.of(at), Storage()
        if _is_kept_by(storage, kept):
            return storage  # of whatever size: this may be a shard
        if np.size(kept.mu) < storage.smallest and _is_kept_by(exact, kept):
            return exact
        raise ValueError(
            f"{self._name} must be as it was at init, got {self._got(at)}, but the state keeps {kept.mu.dtype} and "
            f"{kept.nus[0].dtype} at {at}"
        )

    @property
    def _name(self) -> str:
        return "mu_dtype" if self.mu_dtype is not None else "storage"

    def _got(self, at: At) -> Any:
        return self.mu_dtype if self.mu_dtype is not None else self.of(at) if self.by_path else self.storage

    def of(self, at: At) -> Storage:
        """What was asked for a leaf, of whatever size and dtype."""
        choose: Any = self.storage
        return self._named(choose(at.path) if self.by_path else choose)

    def _named(self, storage: Any) -> Storage:
        if isinstance(storage, Storage):
            return storage
        if storage is not None and not (isinstance(storage, str) and storage in NAMES):
            names = ", ".join(map(repr, NAMES))
            raise ValueError(f"storage must be one of {names}, a Storage, a function of the path or None, got {storage!r}")
        if storage in ("bfloat16", "int8"):
            return bfloat16() if storage == "bfloat16" else int8()
        return Storage(_first(self.mu_dtype))


def held_by(at: At, kept: Kept, form: Any, given: StoragePerLeaf = None) -> Storage:
    """How a leaf of a state is kept, as its arrays tell; in codes of one's own only what was `given` can."""
    marker = getattr(form, "codes", ())
    if isinstance(marker, CodesByPath):
        marker = marker.own[at.number] if marker.own else ()
    if type(marker) not in (tuple, Bfloat16Codes, Int8Codes):
        if given is not None and type(marker) is Choice(given).of(at).marker:
            return Choice(given).old(at, kept)
        raise ValueError(
            f"storage must be given, as to the transformation, for codes of your own, {type(marker).__name__}, at {at}, "
            f"got {given!r}"
        )
    for storage in (Int8(), bfloat16(), Storage(), Storage(ROUNDED[np.dtype(jnp.bfloat16)]), *_PLAIN):
        if _is_kept_by(storage, kept):
            return storage
    raise ValueError(
        f"storage must be given, as to the transformation: the state keeps {kept.mu.dtype} and {kept.nus[0].dtype} at {at}"
    )


def _first(choice: Any) -> Code | np.dtype | None:
    """What `mu_dtype` means."""
    try:
        dtype = None if choice is None else np.dtype(choice)
    except TypeError:
        dtype = np.dtype(object)
    if dtype is None or dtype in (jnp.bfloat16, np.float16):
        return None if dtype is None else ROUNDED[dtype]
    if dtype not in (np.float32, np.float64, np.complex64, np.complex128):
        raise ValueError(f"mu_dtype must be float32, float64, bfloat16 or float16, got {choice}: storage= has int8 moments")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"mu_dtype must be a dtype that JAX is set up for, got {dtype}: enable jax_enable_x64 for it")
    return np.dtype(jnp.finfo(dtype).dtype)


def _is_kept_by(storage: Storage, kept: Kept) -> bool:
    mu, nu = kept.mu.dtype, kept.nus[0].dtype
    wide = nu if storage.first is not None else mu
    if not storage.narrow and not (jnp.issubdtype(wide, jnp.inexact) and moments.accumulator_dtype(wide) == wide):
        return False
    if jnp.issubdtype(mu, jnp.complexfloating):
        wide = moments.accumulator_dtype(wide, jnp.complex64)
    return storage.dtypes(wide) == (mu, nu)


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


_PLAIN = [Storage(first) for first in (ROUNDED[np.dtype(np.float16)], np.dtype(np.float32), np.dtype(np.float64))]
