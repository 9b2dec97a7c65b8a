"""Walking over the leaves of gradients and states together, and saying which leaf is wrong.

A leaf of the params is *trained* when it is inexact (real or complex). For everything else that a tree of params may hold,
integers, booleans, PRNG keys, the functions of an Equinox model, a state has `ABSENT`, a boolean, so that other trees can be
mapped beside it; where the params have `None`, the state has that. So the state says which leaves are trained.
"""

import functools
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "At",
    "Tree",
    "Unchanged",
    "check_whole",
    "every",
    "is_absent",
    "is_trained",
    "label_by_path",
    "map_params",
    "map_updates",
    "only",
    "replaced",
    "with_paths",
]

Tree = TypeVar("Tree")  # what comes back is a tree like what was given

ABSENT = np.zeros([], bool)  # what a state has for a leaf that is not trained


@jax.tree_util.register_static
class Unchanged:
    """The update of a leaf that cannot be added to, such as a PRNG key: `key + Unchanged()` is the key.

    It is a pytree without leaves, so it crosses `jit` and the other transformations of a chain.
    """

    def __radd__(self, param: Any) -> Any:
        return param

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unchanged)

    def __hash__(self) -> int:
        return hash(Unchanged)


class At:
    """Where a leaf stands: its keys, its number among the trained leaves, and its param where that is given."""

    def __init__(self, keys: tuple[Any, ...], number: int = 0, param: Any = None):
        self.keys, self.number, self.param = keys, number, param

    @functools.cached_property
    def path(self) -> str:
        """As text: "['encoder'][0].w", and "" for the root."""
        return jax.tree_util.keystr(self.keys)

    def __str__(self) -> str:
        return self.path or "the root"


def is_absent(node: Any) -> bool:
    """Whether a state has nothing for a leaf, or for the part of a tree that `optax.masked` keeps out."""
    return node is None or isinstance(node, optax.MaskedNode) or getattr(node, "dtype", None) == np.bool_


def is_trained(leaf: Any) -> bool:
    """Whether a leaf of the params takes part in training: a number, array or `ShapeDtypeStruct` of inexact dtype."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (float, complex))
    return jnp.issubdtype(dtype, jnp.inexact)


def with_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves of a tree with their keys, the same whether a leaf is an array or a variable of `flax.nnx` that holds one.

    `nnx.Optimizer` calls `init` with variables, which are nodes with their array at `.value`, and `update` with arrays.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not any(_VALUE in keys for keys, _ in flat):
        return flat
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    inside = {(*keys, _VALUE) for keys, node in nodes if isinstance(node, nnx.Variable)}

    def own(keys: tuple[Any, ...]) -> tuple[Any, ...]:
        i = next((i for i, key in enumerate(keys) if key == _VALUE and keys[: i + 1] in inside), len(keys))
        return keys[:i] + keys[i + 1 :]

    return [(own(keys), leaf) for keys, leaf in flat]


def every(state: Any, kind: Any, where: str | None, advice: str) -> dict[str, Any]:
    """The nodes of a kind in a state whose path contains `where`, by path; `advice` is for a state that has none."""
    if not (where is None or isinstance(where, str)):
        raise TypeError(f"where must be a string, part of a path in the state, got {where!r}")
    flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, kind))
    found = {jax.tree_util.keystr(keys): node for keys, node in flat if isinstance(node, kind)}
    chosen = {path: node for path, node in found.items() if where is None or where in path}
    name = " or ".join(dict.fromkeys(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))))
    name = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if not found:
        raise ValueError(f"state must hold {name}, got none: {advice}")
    if not chosen:
        raise ValueError(f"where must be part of the path of {name} in the state, one of {list(found)}, got {where!r}")
    return chosen


def only(state: Any, kind: Any, where: str | None, advice: str) -> Any:
    """The one such node."""
    found = every(state, kind, where, advice)
    if len(found) > 1:
        name = type(next(iter(found.values()))).__name__
        raise ValueError(f"state holds {len(found)} {name}s: choose one with where=, part of one of {list(found)}")
    return next(iter(found.values()))


def replaced(state: Any, nodes: Mapping[str, Any]) -> Any:
    """A state with other nodes at some paths, as `every` finds them."""
    kinds = tuple({type(node) for node in nodes.values()})
    flat, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, kinds))
    return jax.tree.unflatten(treedef, [nodes.get(jax.tree_util.keystr(keys), node) for keys, node in flat])


def label_by_path(labels: Mapping[str, Any], default: Any) -> Callable[[Any], Any]:
    """A function from a tree to labels for its leaves, chosen by path: for `optax.partition`, and for masks.

    Args:
        labels: regular expressions and the label of the leaves whose path each finds (`re.search`); the first that does
            counts. A leaf's path is its keys and indices joined by "/": "encoder/layers/0/w".
        default: the label of all other leaves.

    Returns:
        A function of a tree, to a tree of labels like it. It may be asked about a tree from which leaves have been pruned,
        as Optax does; where gradients may be `None` beside params, give `optax.partition` the labels of the params, as a
        tree. Of a whole tree it raises ValueError if an expression finds no path, and if one finds a path that two leaves
        share (keys `1` and `"1"`, or `"a/b"` beside `"a"` with `"b"`). Of a pruned one, as masks inside `optax.partition`
        see, the former is a warning: Optax keeps the place of what it prunes, but a leaf there and a whole part of the tree
        look alike. If all labels are those of leaves, as this function's are, it is a typing error.

    Raises:
        ValueError: if an expression is not a valid one.
        TypeError: if labels are no dictionary with strings for keys.

    Example:
        >>> slow_and_fast = {"slow": optax.adam(1e-4), "fast": optax.adam(1e-3)}
        >>> tx = optax.partition(slow_and_fast, label_by_path({"^embedding/": "slow"}, "fast"))
        >>> label_by_path({"b$": False}, True)({"w": 1.0, "b": 0.0})  # a mask: no decay for biases
        {'b': False, 'w': True}
    """
    if not (isinstance(labels, Mapping) and all(isinstance(expression, str) for expression in labels)):
        raise TypeError(f"labels must be a dictionary from regular expressions to labels, got {labels!r}")
    expressions = {}
    for expression, label in labels.items():
        try:
            expressions[re.compile(expression)] = label
        except re.error as error:
            raise ValueError(f"labels must be regular expressions, got {expression!r}: {error}") from None

    def label(tree: Any) -> Any:
        everything = [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in with_paths(tree, is_absent)]
        paths = [path for path, _ in everything]
        pruned = [path for path, leaf in everything if isinstance(leaf, optax.MaskedNode)]
        for expression in expressions:
            matching = [path for path in paths if expression.search(path)]
            if paths and not matching:
                missed = f"labels must find a leaf each, got {expression.pattern!r}, but the paths are {paths}"
                if not pruned:
                    raise ValueError(missed)
                warnings.warn(f"{missed}, {_UNSEEN.format(pruned[0])}", stacklevel=2)
            shared = next((path for path in matching if paths.count(path) > 1), None)
            if shared:
                raise ValueError(
                    f"labels must tell leaves apart, got {expression.pattern!r}, but two leaves are at {shared}"
                )
        there = [path for path, leaf in everything if not (leaf is None or isinstance(leaf, optax.MaskedNode))]
        found = [next((x for e, x in expressions.items() if e.search(path)), default) for path in there]
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    return label


def check_whole(at: At, x: jax.Array) -> None:
    """Raise ValueError inside `shard_map` where a leaf may be a shard: of that nobody can tell which elements it has.

    Draws count the elements of the whole leaf, and codes have a window of the whole leaf.
    """
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    hidden = bool(manual) and not _varying(jax.lax.axis_index(manual[0]))
    if hidden or _varying(x):
        why = "check_vma=False hides whether it is" if hidden else f"it differs along {', '.join(_varying(x))}"
        raise ValueError(
            f"the leaf at {at} must be whole for unbiased rounding inside shard_map, but {why}: update outside, under jit "
            "with shardings (adam_jax.shardings.state_shardings), or keep moments and weights in float32"
        )


def _varying(x: jax.Array) -> tuple[str, ...]:
    """The mesh axes along which a shard inside `shard_map` differs from others; none where `check_vma=False` hides them."""
    kind: Any = jax.typeof(x)
    return tuple(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)  # jax 0.8 to 0.9: vma


def map_params(function: Callable[[At, Any], Any], params: Any) -> Any:
    """A tree like the params with `function(at, leaf)` for each trained leaf and `ABSENT` for the others."""
    mapped = [function(At(keys), leaf) if is_trained(leaf) else jnp.asarray(ABSENT) for keys, leaf in with_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), mapped)


def map_updates(
    function: Callable[..., tuple], updates: Any, columns: Sequence[Any], params: Any = None, *, always: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """Map `function(at, update, *leaves) -> (update, *leaves)` over the trained leaves of updates and of a state's trees.

    Without trees of a state, the leaves are those whose param is trained. A leaf whose update is `None` stays as it is,
    unless `always`. A leaf that is not trained gets an update of zeros in the dtype of its param, so that
    `optax.apply_updates` leaves it unchanged. Trees that do not match raise ValueError with the path of the first leaf that
    differs.
    """
    flat, treedef = with_paths(updates, _is_leaf), jax.tree.structure(updates, is_leaf=_is_leaf)
    rows = [_matching(tree, updates, treedef, "params given to init") for tree in columns]
    beside = [None] * len(flat) if params is None else _matching(params, updates, treedef, "params")
    done, number = [], 0
    for (keys, g), p, *row in zip(flat, beside, *rows, strict=True):
        at, there = At(keys, number, p), row[0] if row else p if is_trained(p) else None
        if is_absent(there):
            done.append((_untrained(at, g), *row))
            continue
        number += 1
        if g is None and not always:
            done.append((None, *row))
        else:
            _check_gradient(at, g, there)
            done.append(function(at, g, *row))
    new_updates, *new = zip(*done, strict=True) if done else [()] * (1 + len(rows))
    return jax.tree.unflatten(treedef, new_updates), tuple(jax.tree.unflatten(treedef, column) for column in new)


_UNSEEN = (
    "and {} was left out by optax.partition or optax.masked: a typing error, unless that is more than one leaf and has the "
    "path; choose leaf by leaf there, as label_by_path does, and all paths are seen"
)
_VALUE = jax.tree_util.GetAttrKey("value")


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, Unchanged)


def _matching(tree: Any, updates: Any, treedef: Any, name: str) -> list[Any]:
    leaves, found = jax.tree.flatten(tree, is_leaf=_is_leaf)
    if found == treedef:
        return leaves
    ours, theirs = ([jax.tree_util.keystr(k) for k, _ in with_paths(t, _is_leaf)] for t in (updates, tree))
    for path in ours:
        if path not in theirs:
            raise ValueError(f"the gradients have a leaf at {path or 'the root'} that the {name} do not have")
    for path in theirs:
        if path not in ours:
            raise ValueError(f"the gradients have no leaf at {path or 'the root'}, which the {name} have")
    raise ValueError(f"the gradients are a {jax.tree.structure(updates)}, but the {name} a {jax.tree.structure(tree)}")


def _untrained(at: At, g: Any) -> Any:
    if is_trained(g):
        raise ValueError(
            f"the gradients have a {jnp.result_type(g)} leaf at {at}, but the params given to init have no floating-point "
            "leaf there"
        )
    if g is None or isinstance(g, Unchanged) or not hasattr(g, "dtype"):
        return g
    dtype = g.dtype if at.param is None else getattr(at.param, "dtype", None) or jnp.result_type(at.param)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return Unchanged()
    return g if dtype == jax.dtypes.float0 else jnp.zeros(g.shape, dtype)


def _check_gradient(at: At, g: Any, moment: Any) -> None:
    if g is None:
        return
    shape, dtype = np.shape(g), jnp.result_type(g) if not hasattr(g, "dtype") else g.dtype
    if shape != np.shape(moment):
        raise ValueError(f"the gradient at {at} has shape {shape}, but its param had {np.shape(moment)} at init")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"the gradient at {at} has dtype {dtype}, but its param is floating-point: gradients must be, too")
    if jnp.issubdtype(dtype, jnp.complexfloating) != jnp.iscomplexobj(moment):
        raise ValueError(
            f"the gradient at {at} has dtype {dtype}, but its first moment is {moment.dtype}: both or neither are complex"
        )
