"""Walking over the leaves of gradients and states together, and saying which leaf is wrong.

A leaf is *trained* when it is inexact (real or complex). Everything else that a tree of params may hold, `None`, integers,
booleans, PRNG keys, the functions of an Equinox model, has `None` where a state would have an array.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "Unchanged",
    "is_absent",
    "is_trained",
    "label_by_path",
    "leaves",
    "map_params",
    "map_updates",
    "path_of",
    "structure",
]


@jax.tree_util.register_static
class Unchanged:
    """The update of a leaf that cannot be added to, such as a PRNG key: `key + Unchanged()` is the key.

    It is a pytree without leaves, so it crosses `jit` and the other transformations of a chain.

    Example:
        >>> 3 + Unchanged()
        3
    """

    def __radd__(self, param: Any) -> Any:
        return param

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unchanged)

    def __hash__(self) -> int:
        return hash(Unchanged)


def is_absent(node: Any) -> bool:
    """Whether a state has nothing for a leaf, or for the part of a tree that `optax.masked` keeps out.

    Args:
        node: of a state's tree.

    Returns:
        True for `None` and `optax.MaskedNode`.

    Example:
        >>> is_absent(None), is_absent(optax.MaskedNode()), is_absent(0)
        (True, True, False)
    """
    return node is None or isinstance(node, optax.MaskedNode)


def is_trained(leaf: Any) -> bool:
    """Whether a leaf of the params takes part in training: a number, array or `ShapeDtypeStruct` of inexact dtype.

    Args:
        leaf: anything.

    Returns:
        True for real and complex floating-point leaves.

    Example:
        >>> is_trained(jnp.zeros(2)), is_trained(3), is_trained(None)
        (True, False, False)
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, (float, complex))
    return jnp.issubdtype(dtype, jnp.inexact)


def path_of(keys: Sequence[Any], *, separator: str | None = None) -> str:
    """The path of a leaf as text, the same whether the leaf is an array or a variable of `flax.nnx` that holds one.

    `nnx.Optimizer` calls `init` with variables, which are nodes with their array at `.value`, and `update` with arrays.

    Args:
        keys: of the leaf, from `jax.tree_util`.
        separator: between plain keys, as in "encoder/0/w"; None for "['encoder'][0]['w']".

    Returns:
        The path; "" for the root.

    Example:
        >>> tree = {"a": [1]}
        >>> [(keys, _)] = jax.tree_util.tree_leaves_with_path(tree)
        >>> path_of(keys), path_of(keys, separator="/")
        ("['a'][0]", 'a/0')
    """
    keys = tuple(keys)
    if keys[-1:] == (jax.tree_util.GetAttrKey("value"),):
        keys = keys[:-1]
    if separator is None:
        return jax.tree_util.keystr(keys)
    return jax.tree_util.keystr(keys, simple=True, separator=separator)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, `None` and `Unchanged` among them.

    Args:
        tree: any tree.

    Returns:
        As many as `structure(tree)` has.

    Example:
        >>> leaves({"a": 1, "b": None})
        [1, None]
    """
    return jax.tree.leaves(tree, is_leaf=_is_leaf)


def structure(tree: Any) -> Any:
    """The structure of a tree in which `None` and `Unchanged` are leaves.

    Args:
        tree: any tree.

    Returns:
        A `PyTreeDef`.

    Example:
        >>> structure({"a": 1, "b": None}) == structure({"a": None, "b": 2})
        True
    """
    return jax.tree.structure(tree, is_leaf=_is_leaf)


def label_by_path(labels: Mapping[str, Any], default: Any) -> Callable[[Any], Any]:
    """A function from a tree to labels for its leaves, chosen by path: for `optax.partition`, and for masks.

    Args:
        labels: regular expressions and the label of the leaves whose path each finds (`re.search`); the first that does
            counts. A leaf's path is its keys and indices joined by "/": "encoder/layers/0/w".
        default: the label of all other leaves.

    Returns:
        A function of a tree, to a tree of labels like it. It raises ValueError if an expression finds no path.

    Raises:
        ValueError: if an expression is not a valid one.

    Example:
        >>> slow_and_fast = {"slow": optax.adam(1e-4), "fast": optax.adam(1e-3)}
        >>> tx = optax.partition(slow_and_fast, label_by_path({"^embedding/": "slow"}, "fast"))
        >>> label_by_path({"b$": False}, True)({"w": 1.0, "b": 0.0})  # a mask: no decay for biases
        {'b': False, 'w': True}
    """
    expressions = {}
    for expression, label in labels.items():
        try:
            expressions[re.compile(expression)] = label
        except re.error as error:
            raise ValueError(f"labels must be regular expressions, got {expression!r}: {error}") from None

    def label(tree: Any) -> Any:
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = [path_of(keys, separator="/") for keys, _ in with_paths]
        for expression in expressions:
            if not any(expression.search(path) for path in paths):
                raise ValueError(f"labels must find a leaf each, got {expression.pattern!r}, but the paths are {paths}")
        found = [next((x for e, x in expressions.items() if e.search(path)), default) for path in paths]
        return jax.tree.unflatten(treedef, found)

    return label


def map_params(function: Callable[[str, Any], Any], params: Any) -> Any:
    """A tree with `function(path, leaf)` for each trained leaf and `None` for the others.

    Args:
        function: takes the leaf's path, as text, and the leaf.
        params: any tree.

    Returns:
        A tree like `params`.

    Example:
        >>> map_params(lambda path, leaf: path, {"w": 1.0, "steps": 3})
        {'steps': None, 'w': "['w']"}
    """
    paths, flat, treedef = _flatten(params)
    mapped = [function(path, leaf) if is_trained(leaf) else None for path, leaf in zip(paths, flat, strict=True)]
    return jax.tree.unflatten(treedef, mapped)


def map_updates(
    function: Callable[..., tuple], updates: Any, trees: Sequence[Any], params: Any = None, *, always: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """Map `function(update, *leaves) -> (update, *leaves)` over the trained leaves.

    A leaf whose update is `None` stays as it is. A leaf that is not trained gets an update of zeros, in the dtype of its
    param, so that `optax.apply_updates` leaves it unchanged.

    Args:
        function: takes the update and one leaf of each tree, as arrays; returns as many.
        updates: tree of gradients or updates.
        trees: state trees made by `map_params` of params like `updates`.
        params: the params, if at hand: they give the dtype of leaves that are not trained.
        always: call the function where the update is `None`, too.

    Returns:
        The new updates, and a tuple of the new trees.

    Raises:
        ValueError: if the trees do not match, naming the path of the first leaf that differs.

    Example:
        >>> map_updates(lambda g, m: (g + m, g), {"w": 1.0}, [{"w": 2.0}])
        ({'w': 3.0}, ({'w': 1.0},))
    """
    paths, flat, treedef = _flatten(updates)
    columns = [_matching(tree, updates) for tree in trees]
    flat_params = [None] * len(flat) if params is None else _flatten(params)[1]
    if len(flat_params) != len(flat):
        raise ValueError(_difference(updates, params, "params"))
    rows = []
    for path, g, p, *row in zip(paths, flat, flat_params, *columns, strict=True):
        if not is_trained(row[0]):
            rows.append((_untrained(path, g, p), *row))
        elif g is None:
            rows.append(function(g, *row) if always else (None, *row))
        else:
            _check_gradient(path, g, row[0])
            rows.append(function(g, *row))
    new_updates, *new_trees = ([row[i] for row in rows] for i in range(1 + len(columns)))
    return jax.tree.unflatten(treedef, new_updates), tuple(jax.tree.unflatten(treedef, tree) for tree in new_trees)


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return [path_of(keys) for keys, _ in with_paths], [leaf for _, leaf in with_paths], treedef


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, Unchanged)


def _matching(tree: Any, updates: Any) -> list[Any]:
    _, flat, treedef = _flatten(tree)
    if treedef != _flatten(updates)[2]:
        raise ValueError(_difference(updates, tree, "params given to init"))
    return flat


def _difference(updates: Any, tree: Any, name: str) -> str:
    ours, theirs = _flatten(updates)[0], _flatten(tree)[0]
    for path in ours:
        if path not in theirs:
            return f"the gradients have a leaf at {path or 'the root'} that the {name} do not have"
    for path in theirs:
        if path not in ours:
            return f"the gradients have no leaf at {path or 'the root'}, which the {name} have"
    return f"the gradients are a {jax.tree.structure(updates)}, but the {name} a {jax.tree.structure(tree)}"


def _untrained(path: str, g: Any, p: Any) -> Any:
    if is_trained(g):
        raise ValueError(
            f"the gradients have a {jnp.result_type(g)} leaf at {path or 'the root'}, but the params given to init have "
            "no floating-point leaf there"
        )
    if g is None or isinstance(g, Unchanged) or not hasattr(g, "dtype"):
        return g
    dtype = g.dtype if p is None else jnp.result_type(p) if not hasattr(p, "dtype") else p.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return Unchanged()
    return g if dtype == jax.dtypes.float0 else jnp.zeros(g.shape, dtype)


def _check_gradient(path: str, g: Any, moment: Any) -> None:
    shape, dtype = np.shape(g), jnp.result_type(g) if not hasattr(g, "dtype") else g.dtype
    where = f"the gradient at {path or 'the root'}"
    if shape != np.shape(moment):
        raise ValueError(f"{where} has shape {shape}, but its param had {np.shape(moment)} at init")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"{where} has dtype {dtype}, but its param is floating-point: gradients must be, too")
    if jnp.issubdtype(dtype, jnp.complexfloating) != jnp.iscomplexobj(moment):
        raise ValueError(f"{where} has dtype {dtype}, but its first moment is {moment.dtype}: both or neither are complex")
