"""Reading and writing the moments in a state, however they are kept: for new neurons, dead ones, and states of others."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adam_jax import codes, moments, norms, trees
from adam_jax.choices import StoragePerLeaf, held_by
from adam_jax.scaling import ScaleByBiasCorrectionState
from adam_jax.storage import Codes, Kept
from adam_jax.transforms import ScaleByAdamState, ScaleByAmsgradState

__all__ = ["Moments", "read_moments", "restart", "write_moments"]

_STATES = (ScaleByAdamState, ScaleByAmsgradState)
_ADVICE = "pass the state of a chain with scale_by_adam or its family"


def restart(state: trees.Tree, *, where: str | None = None) -> trees.Tree:
    """A state in which nothing has been averaged yet; schedules of the learning rate, averages of params and masters go on.

    At a count of zero nothing counts that a state holds besides, so counts are all that is set. Optax's
    `optax.tree_utils.tree_set(state, count=0)` sets those of schedules, too, but misses what stands deeper than another
    count: Adam in `inject_hyperparams`, and a chain in `in_float32`.

    Args:
        state: any optimizer state with Adam or one of its family inside; it may be traced.
        where: only those whose path contains this: of a group of `optax.partition`, "'slow'".

    Returns:
        A state like `state`.

    Raises:
        ValueError: for a state without Adam, or without one at `where`.

    Example:
        >>> from adam_jax import adam
        >>> tx = adam(1.0)
        >>> _, state = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(tx.update(jnp.array([-1.0]), restart(state))[0])
        [1.]
    """
    kinds = (*_STATES, ScaleByBiasCorrectionState)
    chosen = trees.every(state, kinds, where, _ADVICE)
    return trees.replaced(state, {path: node._replace(count=jnp.zeros_like(node.count)) for path, node in chosen.items()})


class Moments(NamedTuple):
    """The moments of a state as plain arrays, float32 or wider.

    Attributes:
        count: int32 scalar, the number of updates made.
        mu: a tree like the params: first moments, bias-corrected where the transformation corrects; raw ones are mu *
            mu_weight.
        nu: likewise the second moments or norms, real; what they are `form` says.
        nu_max: the largest second moments so far, of AMSGrad; else `None`.
        mu_weight: scalar, the weight of the first average, 1 - b1^t at a constant b1.
        nu_weight: scalar, the same for the second.
        form: the marker of the state: `adam_jax.norms.Squares` where nu is v, `Roots` where it is its root.
    """

    count: ArrayLike
    mu: Any
    nu: Any
    nu_max: Any
    mu_weight: ArrayLike
    nu_weight: ArrayLike
    form: Any


def read_moments(state: Any, *, where: str | None = None, storage: StoragePerLeaf = None) -> Moments:
    """The moments in a state as plain arrays, whatever they are kept in.

    Args:
        state: a `ScaleByAdamState` or `ScaleByAmsgradState`, or any optimizer state with exactly one inside.
        where: which one, in a state that holds several: a part of its path, as the error message lists them.
        storage: as given to the transformation, needed only where leaves are kept in codes of your own.

    Returns:
        The moments; change them, and give them to `write_moments`.

    Raises:
        ValueError: for a state without Adam, or with several and no `where`.

    Example:
        >>> from adam_jax import adam
        >>> tx = adam(storage="int8")
        >>> params = {"w": jnp.zeros((64, 64))}
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        ...
        >>> held = read_moments(state)
        >>> dead = jnp.arange(64) < 8  # these rows start anew
        >>> mu, nu = (jax.tree.map(lambda x: jnp.where(dead[:, None], 0.0, x), tree) for tree in (held.mu, held.nu))
        >>> state = write_moments(state, held._replace(mu=mu, nu=nu))
        >>> print(read_moments(state).mu["w"][0, 0], read_moments(state).mu["w"][8, 0] > 0.9)
        0.0 True
    """
    node = trees.only(state, _STATES, where, _ADVICE)
    columns = [node.mu, node.nu, *([node.nu_max] if isinstance(node, ScaleByAmsgradState) else [])]
    scales, ratios = ((), ()) if node.codes == () else (codes.scale(node.codes.windows), codes.ratios(node.codes.bound))

    def read(at: trees.At, mu: jax.Array, *nus: jax.Array) -> tuple[jax.Array, ...]:
        kept = Kept(mu, nus, scales[at.number] if len(scales) else ())
        how = held_by(at, kept, node.form, storage)
        m, s = how.load(how.emptied(kept, jnp.asarray(node.count) <= 0), _wide(kept), ratios)
        return m, *s

    mu, nu, *largest = _map(read, columns)
    return Moments(node.count, mu, nu, largest[0] if largest else None, node.mu_weight, node.nu_weight, node.form)


def write_moments(
    state: trees.Tree, held: Moments, *, where: str | None = None, storage: StoragePerLeaf = None
) -> trees.Tree:
    """A state with these moments in place of its own, kept as it keeps them.

    To grow a leaf, or to shrink one, write padded or cut moments into a fresh `tx.init(params)` of the new params. A moment
    of zero is nothing: an element whose moments are both zero has had no gradient.

    Args:
        state: as for `read_moments`; its dtypes and its form say how the moments are kept. Narrow ones are rounded to
            nearest.
        held: what to write; arrays of the shapes that the state has. Its `form` must be the state's norm.
        where: which Adam, in a state that holds several.
        storage: as given to the transformation, needed only where leaves are kept in codes of your own.

    Returns:
        A state like `state`.

    Raises:
        ValueError: as `read_moments`; for trees or shapes that are not the state's, with the path of the leaf; for the
            moments of another norm.

    Example:
        >>> from adam_jax import adam
        >>> tx, small, large = adam(), jnp.zeros(2), jnp.zeros(3)
        >>> _, state = tx.update(jnp.ones(2), tx.init(small))
        >>> held = read_moments(state)
        >>> grown = held._replace(mu=jnp.append(held.mu, 0.0), nu=jnp.append(held.nu, 0.0))
        >>> print(read_moments(write_moments(tx.init(large), grown)).mu)
        [1. 1. 0.]
    """
    node = trees.only(state, _STATES, where, _ADVICE)
    columns = [node.mu, node.nu, *([node.nu_max] if isinstance(node, ScaleByAmsgradState) else [])]
    given = [held.mu, held.nu, *([held.nu_max] if isinstance(node, ScaleByAmsgradState) else [])]
    change = _change(held.form, node.form)
    values = [_values(name, tree, node.mu) for name, tree in zip(("mu", "nu", "nu_max"), given, strict=False)]
    windows, bound, ratios = [], None, ()
    if node.codes != ():
        bound = jnp.maximum(node.codes.bound, _largest_ratio(values[0], [change(x) for x in values[1]]))
        ratios = codes.ratios(bound)

    def write(at: trees.At, mu: jax.Array, *nus: jax.Array) -> tuple[jax.Array, ...]:
        kept = Kept(mu, nus)
        m, *s = (column[at.number] for column in values)
        new = held_by(at, kept, node.form, storage).nearest(kept, m, tuple(change(x) for x in s), ratios)
        windows.append(new.found)
        return new.mu, *new.nus

    new = _map(write, columns)
    fields = dict(zip(("mu", "nu", "nu_max"), new, strict=False))
    kept_codes = () if bound is None else Codes(bound, jnp.stack(windows) if windows else node.codes.windows)
    weights = {name: jnp.asarray(getattr(held, name), getattr(node, name).dtype) for name in ("mu_weight", "nu_weight")}
    written = node._replace(**fields, **weights, count=jnp.asarray(held.count, jnp.int32), codes=kept_codes)
    return jax.tree.map(lambda x: written if x is node else x, state, is_leaf=lambda x: isinstance(x, _STATES))


def _map(function: Any, columns: list[Any]) -> list[Any]:
    """Map `function(at, *leaves)` over the trained leaves of a state's trees; others stay."""
    rows, number = [], 0
    for (keys, first), *rest in zip(trees.with_paths(columns[0]), *map(jax.tree.leaves, columns[1:]), strict=True):
        if trees.is_absent(first):
            rows.append((first, *rest))
            continue
        rows.append(function(trees.At(keys, number), first, *rest))
        number += 1
    new = zip(*rows, strict=True) if rows else [()] * len(columns)
    return [jax.tree.unflatten(jax.tree.structure(columns[0]), column) for column in new]


def _wide(kept: Kept) -> np.dtype:
    """The dtype of the arithmetic of a leaf that is kept so."""
    kinds = (x.dtype for x in (kept.mu, *kept.nus))
    return moments.accumulator_dtype(*(dtype for dtype in kinds if jnp.issubdtype(dtype, jnp.inexact)))


def _values(name: str, tree: Any, mu: Any) -> list[jax.Array]:
    """The leaves of a tree of moments that are trained in a state."""
    if jax.tree.structure(tree) != jax.tree.structure(mu):
        raise ValueError(f"{name} must be a tree like the state's {jax.tree.structure(mu)}, got {jax.tree.structure(tree)}")
    found = []
    for (keys, old), new in zip(trees.with_paths(mu), jax.tree.leaves(tree), strict=True):
        if trees.is_absent(old):
            continue
        if np.shape(new) != old.shape:
            raise ValueError(f"{name} must have the state's shape {old.shape} at {trees.At(keys)}, got {np.shape(new)}")
        found.append(jnp.asarray(new))
    return found


def _change(given: Any, held: Any) -> Any:
    """The function that makes second moments of one form those of another."""
    if type(given) is type(held):
        return lambda nu: nu
    pairs = ({norms.Squares, norms.Roots}, {norms.CorrectedSquares, norms.CorrectedRoots})
    if {type(given), type(held)} in pairs:
        return jnp.sqrt if isinstance(given, norms.Squares) else jnp.square
    raise ValueError(f"moments must be of the norm that the state has, {held}, got {given}")


def _largest_ratio(mu: list[jax.Array], size: list[jax.Array]) -> jax.Array:
    """The most that |mu| is in units of the size, which bounds what narrow moments may hold."""
    each = [
        jnp.max(jnp.where(s > 0, jnp.abs(m) / jnp.where(s > 0, s, 1), 0), initial=0) for m, s in zip(mu, size, strict=True)
    ]
    return jnp.max(jnp.stack(each)).astype(jnp.float32) if each else jnp.float32(0.0)
