"""Where each array of an optimizer's state lives: beside its param, and with ZeRO-1 split over data-parallel devices too.

JAX's types know where an array lives on a mesh of explicit axes, and `zeros_like(param)` has the param's type. So shardings
are read off the types of `tx.init` on such a mesh, whatever the params' own mesh is: nothing is matched by name. The runtime
is JAX's; all that it needs to be told is where states, gradients and params are to be.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adam_jax import checks

__all__ = ["gradient_shardings", "state_shardings", "unsplit_leaves"]

Axes = str | Sequence[str] | None
Spec = tuple[tuple[str, ...], ...]  # for each dimension, the mesh axes that it is split over


def state_shardings(tx: Any, params: Any, *, zero1: Axes = None) -> Any:
    """Where each array of `tx.init(params)` is to live: beside its param.

    Without it, `jax.jit(tx.init)(params)` puts the whole state on one device of a mesh of Auto axes, because zeros depend on
    no param. Moments, codes, residuals and averages get their params' shardings; counts, weights and windows are whole.

    Args:
        tx: any Optax transformation, or anything with an `init(params)`.
        params: a tree of arrays or `ShapeDtypeStruct`s with `NamedSharding`s on one mesh; leaves without one are replicated.
        zero1: a mesh axis, or several, to split what follows a param over as well (ZeRO-1). Each goes to a dimension that it
            divides; a leaf without one stays as it is (`unsplit_leaves`). The step then needs `gradient_shardings`.

    Returns:
        A tree of `NamedSharding`s like `tx.init(params)`: `out_shardings` of `jit(tx.init)` and of the step, and where to
        restore a checkpoint.

    Raises:
        ValueError: if no leaf has a `NamedSharding`, for leaves on several meshes, and for an axis that the mesh has not.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        >>> params = {"w": jax.device_put(jnp.zeros((16, 4)), NamedSharding(mesh, PartitionSpec()))}
        >>> tx = optax.adam(1e-3)
        >>> state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, zero1="data"))(params)
        >>> state[0].mu["w"].addressable_shards[0].data.shape
        (2, 4)
    """
    mesh, _ = _mesh_and_axes(params, zero1)
    return jax.tree.map(lambda leaf: _placed(mesh, _spec(leaf)), _abstract_state(tx, params, zero1))


def gradient_shardings(params: Any, *, zero1: Axes = None) -> Any:
    """Where gradients, and the params that updates are computed with, meet the moments of `state_shardings`.

    The state's shardings alone do not decide what is sent. With gradients and params constrained to these shardings, and new
    params to these and then to their own, a step sends what ZeRO-1 needs, one reduce-scatter of gradients and one all-gather
    of params in their dtype, and takes the replicated run's values in every bit (but for the order in which a global norm is
    summed and, on CPUs, last bits of shards below 64 numbers, which XLA compiles otherwise)::

        place = jax.lax.with_sharding_constraint
        split = gradient_shardings(params, zero1="data")
        whole = jax.tree.map(lambda p: p.sharding, params)

        def step(params, state, batch):
            gradients, mine = place((jax.grad(loss)(params, batch), params), (split, split))
            updates, state = tx.update(gradients, state, mine)
            return place(place(optax.apply_updates(mine, updates), split), whole), state

    On a mesh of explicit axes, `jax.sharding.reshard` takes the place of `with_sharding_constraint`.

    Runtimes sum in an order of their own, which the number of processes may change. Gradients of each device's share of the
    batch, moved as they are and summed at home, have one order, and as many bytes are sent. Where `shares` is a batch of
    shape (devices, share, ...), split over its first dimension as `rows` says::

        each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, shares)
        moved = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), split)
        gradients = jax.tree.map(lambda g: g.mean(0), place(place(each, rows), moved))

    Args:
        params: as for `state_shardings`.
        zero1: likewise.

    Returns:
        A tree of `NamedSharding`s like `params`, with `None` for leaves that are no arrays.

    Raises:
        ValueError: as `state_shardings`.

    Example:
        >>> mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        >>> params = {"w": jax.device_put(jnp.zeros((4, 16)), NamedSharding(mesh, PartitionSpec(None, "model")))}
        >>> print(*gradient_shardings(params, zero1="data")["w"].spec)
        None ('model', 'data')
    """
    mesh, axes = _mesh_and_axes(params, zero1)
    return jax.tree.map(lambda p: _placed(mesh, _split(mesh, p, axes)) if _is_array(p) else None, params)


def unsplit_leaves(tx: Any, params: Any, *, zero1: Axes = None) -> dict[str, int]:
    """What `state_shardings` could not split: JAX has no uneven shardings, so a leaf that no axis divides stays whole.

    Args:
        tx: as for `state_shardings`.
        params: likewise.
        zero1: likewise.

    Returns:
        For each array of the state, scalars left out, that is split over none of the axes in `zero1` (of the mesh, where
        `zero1` is `None`): its path, as in "0/mu/w", and the bytes of it that every device holds.

    Raises:
        ValueError: as `state_shardings`.

    Example:
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        >>> params = jax.device_put({"w": jnp.zeros((16, 4)), "b": jnp.zeros(3)}, NamedSharding(mesh, PartitionSpec()))
        >>> unsplit_leaves(optax.adam(1e-3), params, zero1="data")
        {'0/mu/b': 12, '0/nu/b': 12}
    """
    mesh, axes = _mesh_and_axes(params, zero1)
    wanted = set(axes or mesh.axis_names)
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(_abstract_state(tx, params, zero1)):
        over = {axis for dimension in _spec(leaf) for axis in dimension}
        if leaf.ndim and not over & wanted:
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            found[path] = leaf.size * leaf.dtype.itemsize // math.prod(mesh.shape[axis] for axis in over)
    return found


def _abstract_state(tx: Any, params: Any, zero1: Axes) -> Any:
    """`tx.init(params)` as `ShapeDtypeStruct`s with shardings, found by JAX's types on a mesh of explicit axes."""
    mesh, axes = _mesh_and_axes(params, zero1)
    explicit = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    flat, treedef = jax.tree.flatten(params)
    typed = {
        i: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=_placed(explicit, _split(mesh, p, axes)))
        for i, p in enumerate(flat)
        if _is_array(p)
    }

    def init(typed: dict[int, Any]) -> Any:  # what is no array, such as a function of a model, is not traced
        return tx.init(treedef.unflatten([typed.get(i, p) for i, p in enumerate(flat)]))

    try:
        with jax.sharding.use_abstract_mesh(explicit):
            return jax.eval_shape(init, typed)
    except Exception as error:
        error.add_note("(from tx.init, traced on a mesh of explicit axes: each of its arrays must be made from one param)")
        raise


def _mesh_and_axes(params: Any, zero1: Axes) -> tuple[Mesh | AbstractMesh, tuple[str, ...]]:
    """The mesh of the params, and the axes named by `zero1`."""
    shardings = [getattr(p, "sharding", None) for p in jax.tree.leaves(params)]
    meshes = list(dict.fromkeys(s.mesh for s in shardings if isinstance(s, NamedSharding)))
    if len(meshes) != 1:
        raise ValueError(
            f"params must have NamedShardings on one mesh, got {len(meshes)} meshes: place them with "
            "jax.device_put(params, NamedSharding(mesh, spec)), or give ShapeDtypeStructs with such shardings"
        )
    if not (zero1 is None or isinstance(zero1, (str, Sequence))):
        raise TypeError(f"zero1 must be a mesh axis, or several, got {zero1!r}")
    axes = () if zero1 is None else (zero1,) if isinstance(zero1, str) else tuple(zero1)
    for axis in axes:
        checks.one_of("zero1", axis, meshes[0].axis_names)
    if len(set(axes)) < len(axes):
        raise ValueError(f"zero1 must name each mesh axis once, got {axes}")
    return meshes[0], axes


def _split(mesh: Mesh | AbstractMesh, p: Any, axes: tuple[str, ...]) -> Spec:
    """The spec of a param, and of `axes` as many on top as it has dimensions that they divide."""
    spec = _spec(p)
    axes = tuple(axis for axis in axes if not any(axis in names for names in spec))

    def parts(names: tuple[str, ...]) -> int:
        return math.prod(mesh.shape[axis] for axis in names)

    def with_axes(goes: tuple[int | None, ...]) -> Spec:
        return tuple(
            names + tuple(axis for axis, to in zip(axes, goes, strict=True) if to == d) for d, names in enumerate(spec)
        )

    def divides(new: Spec) -> bool:
        return all(size and size % parts(names) == 0 for size, names in zip(p.shape, new, strict=True))

    def gain(goes: tuple[int | None, ...]) -> tuple[int, list[int]]:  # the most parts, then of the largest dimensions
        sizes = (p.shape[d] // parts(spec[d]) for d in goes if d is not None)
        return parts(tuple(axis for axis, to in zip(axes, goes, strict=True) if to is not None)), sorted(sizes, reverse=True)

    everywhere = itertools.product((None, *range(len(spec))), repeat=len(axes))
    return with_axes(max((goes for goes in everywhere if divides(with_axes(goes))), key=gain, default=(None,) * len(axes)))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _spec(leaf: Any) -> Spec:
    sharding = getattr(leaf, "sharding", None)
    entries = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    names = (() if e is None else e if isinstance(e, tuple) else (e,) for e in entries)
    return (*names, *((),) * (len(leaf.shape) - len(entries)))


def _placed(mesh: Mesh | AbstractMesh, spec: Spec) -> NamedSharding:
    while spec and not spec[-1]:
        spec = spec[:-1]
    return NamedSharding(mesh, PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in spec)))
