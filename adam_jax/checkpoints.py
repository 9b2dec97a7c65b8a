"""What a checkpointer does not know: what the arrays of a state mean, written down, and compared before they are read.

Saving and restoring is Orbax's. It casts arrays saved in another dtype without a word, and squares read as roots have the
same dtype: the step would be wrong, and nothing would say so. A restored state has the markers of the state that was asked
for, so no step can tell either: what a state means must be saved beside it, and compared before it is read. With Orbax's
`CheckpointManager`, on any number of devices and processes::

    def save(manager, step, tx, params, state):
        meaning = ocp.args.JsonSave(describe_state(tx, params))
        manager.save(step, args=ocp.args.Composite(meaning=meaning, run=ocp.args.StandardSave((params, state))))

    def restore(manager, step, tx, params):  # params: arrays, or ShapeDtypeStructs with shardings, where they are to be
        check_state(manager.restore(step, args=ocp.args.Composite(meaning=ocp.args.JsonRestore()))["meaning"], tx, params)
        like = jax.tree.map(_struct, jax.eval_shape(tx.init, params), state_shardings(tx, params))
        return manager.restore(step, args=ocp.args.Composite(run=ocp.args.StandardRestore((params, like))))["run"]

    def _struct(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
"""

from typing import Any

import jax

__all__ = ["check_state", "describe_state"]

FORMAT = 1


def describe_state(tx: Any, params: Any) -> dict[str, Any]:
    """What `tx.init(params)` would be, to be saved beside a state: plain data, for JSON.

    Args:
        tx: any Optax transformation.
        params: a tree of arrays or `ShapeDtypeStruct`s.

    Returns:
        A dictionary with a format version, the dtype and shape of each leaf by its path, and the kind of each state, with
        how its second moments are kept where it says so.

    Example:
        >>> description = describe_state(optax.scale_by_adam(), {"w": jnp.zeros((2, 3))})
        >>> description["leaves"][".mu['w']"], description["states"]
        (['float32', [2, 3]], {'': 'ScaleByAdamState'})
    """
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        "format": FORMAT,
        "leaves": {jax.tree_util.keystr(keys): [str(leaf.dtype), list(leaf.shape)] for keys, leaf in leaves},
        "states": _kinds(state, ""),
    }


def check_state(description: dict[str, Any], tx: Any, params: Any) -> None:
    """Raise unless a state that was saved means what a state of `tx` would.

    Args:
        description: from `describe_state`, when the state was saved.
        tx: the transformation to go on with.
        params: a tree of arrays or `ShapeDtypeStruct`s.

    Raises:
        ValueError: for another format, chain, dtype, shape or form (squares, roots, codes), with the path of the first leaf
            that differs.

    Example:
        >>> saved = describe_state(optax.scale_by_adam(), jnp.zeros(3))
        >>> check_state(saved, optax.scale_by_adam(mu_dtype=jnp.bfloat16), jnp.zeros(3))
        Traceback (most recent call last):
        ...
        ValueError: the state at .mu was saved as float32[3], but tx keeps bfloat16[3] there: go on with the tx that saved it
    """
    if description.get("format") != FORMAT:
        raise ValueError(
            f"description must have format {FORMAT}, which this version reads, got {description.get('format')!r}"
        )
    wanted = describe_state(tx, params)
    for part in ("leaves", "states"):
        saved, new = description[part], wanted[part]
        for path in dict.fromkeys([*new, *saved]):
            if saved.get(path) != new.get(path):
                raise ValueError(
                    f"the state at {path or 'the root'} was saved as {_said(saved.get(path))}, but tx keeps "
                    f"{_said(new.get(path))} there: go on with the tx that saved it"
                )


def _kinds(node: Any, path: str) -> dict[str, str]:
    """The names of all NamedTuples in a state, with their `form`, the marker of how second moments are kept."""
    if not hasattr(node, "_fields"):
        inner = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda n: hasattr(n, "_fields"))
        inner = [(path + jax.tree_util.keystr(keys), n) for keys, n in inner if hasattr(n, "_fields")]
        return {key: kind for at, n in inner for key, kind in _kinds(n, at).items()}
    form = getattr(node, "form", None)
    found = {path: type(node).__name__ + ("" if form is None else f", {form}")}
    for name, value in zip(node._fields, node, strict=True):
        if name != "form":
            found |= _kinds(value, f"{path}.{name}")
    return found


def _said(what: Any) -> str:
    return "nothing" if what is None else what if isinstance(what, str) else f"{what[0]}{what[1]}"
