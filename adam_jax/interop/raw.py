"""Dense raw moments, as all others keep them.

Others keep raw moments m and v; here averages are kept corrected, mu = m / w1 and nu = v / w2, with the weights
w1 = 1 - b1^t and w2 = 1 - b2^t. The way back is m = mu * mu_weight, which holds on schedules of decays, too.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import norms, surgery, trees
from adam_jax.averaging import AverageParamsState
from adam_jax.transforms import ScaleByAdamState, ScaleByAmsgradState

OURS = (ScaleByAdamState, ScaleByAmsgradState)
OPTAXS = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)
REFUSED = {
    "NAdam": ": its momentum follows another schedule, which no state here can go on with",
    "Nadam": ": its momentum follows another schedule, which no state here can go on with",
    "RAdam": ": it rectifies the step",
    "SparseAdam": ": it corrects all rows by the number of all steps; global_step=True accepts that",
}
MaxOf = Literal["raw", "corrected"]  # what the others' AMSGrad takes the maximum of


class Fresh(NamedTuple):
    """A state of no steps, and the Adam in it that is meant."""

    state: Any
    adam: Any


def fresh(tx: Any, params: Any, where: str | None, other: Any = ()) -> Fresh:
    """A state of tx, and the Adam in it that is meant; `where` may be for the `other` state alone."""
    state = tx.init(params)
    adam = chosen(state, OURS, where)
    _check_where(where, state, other)
    return Fresh(state, adam)


def chosen(state: Any, kinds: tuple[type, ...], where: str | None) -> Any:
    """The one node of these kinds, whatever `where` says, or that of several which it says."""
    found = trees.every(state, kinds, None, f"it must be of {kinds[0].__module__.split('.')[0]}")
    return next(iter(found.values())) if len(found) == 1 else trees.only(state, kinds, where, "")


def dense(state: Any, where: str | None, other: Any = (), *, max_of: MaxOf) -> Any:
    """`surgery.Moments`, but raw, as others keep them, in float32 or float64; `where` may be for the `other` state alone."""
    held = surgery.read_moments(chosen(state, OURS, where))
    _check_where(where, state, other)
    if isinstance(held.form, norms.Powers):
        raise ValueError("state must be of Adam, AMSGrad or AdaMax, got L^p Adam's, which has no counterpart elsewhere")
    _check_max_of(held.form, max_of, given=held.nu_max is not None)
    power = 2 if isinstance(held.form, norms.Roots) else 1

    def raw(tree: Any, weight: Any, power: int = 1) -> Any:
        return jax.tree.map(lambda x: x if trees.is_absent(x) else _scaled(x, weight, power), tree)

    largest = None if held.nu_max is None else raw(held.nu_max, 1.0, power)
    mu, nu = raw(held.mu, held.mu_weight), raw(held.nu, held.nu_weight, power)
    return held._replace(count=int(np.asarray(held.count)), mu=mu, nu=nu, nu_max=largest)


def started(
    fresh: Fresh, count: int, decays: Any, m: Any, v: Any, largest: Any, *, max_of: MaxOf, maxima: bool | None = None
) -> Any:
    """A state with these raw moments; `maxima`: whether v is AdaMax's norm, None for what the state keeps."""
    adam = fresh.adam
    check_largest(given=largest is not None, wanted=isinstance(adam, ScaleByAmsgradState))
    _check_max_of(adam.form, max_of, given=largest is not None)
    if count == 0:
        return fresh.state
    if maxima is None:
        maxima = isinstance(adam.form, norms.Maxima)
    first, second = _weight(decays[0], count), 1.0 if maxima else _weight(decays[1], count)

    def beside(tree: Any, weight: float) -> Any:  # in the places that the state has
        return jax.tree.map(
            lambda old, x: old if trees.is_absent(old) else _scaled(x, 1.0 / weight), adam.mu, tree, is_leaf=trees.is_absent
        )

    squares = norms.Squares if largest is None or max_of == "raw" else norms.CorrectedSquares
    form = norms.Maxima() if maxima else squares()
    nu_max = None if largest is None else beside(largest, 1.0)
    held = surgery.Moments(jnp.int32(count), beside(m, first), beside(v, second), nu_max, first, second, form)
    new = jax.tree.map(in_place_of, adam, surgery.write_moments(adam, held))
    return begun(fresh._replace(adam=new), adam, count)


def begun(fresh: Fresh, old: Any, count: int) -> Any:
    """The state with a new Adam for the old one, and all counts set but those of averages and of other Adams."""

    def counted(node: Any) -> Any:
        if node is old:
            return fresh.adam
        if not hasattr(node, "_fields") or isinstance(node, (*OURS, *OPTAXS, AverageParamsState)):
            return node
        fields = {name: walked(value) for name, value in zip(node._fields, node, strict=True)}
        for name in {"count", "gradient_step"} & fields.keys():
            fields[name] = in_place_of(fields[name], jnp.asarray(count, fields[name].dtype))
        return type(node)(**fields)

    def walked(tree: Any) -> Any:
        return jax.tree.map(counted, tree, is_leaf=lambda node: hasattr(node, "_fields"))

    return walked(fresh.state)


def in_place_of(old: jax.Array, new: Any) -> jax.Array:
    """A new array where the old one was put; what was put nowhere, as the counts beside sharded moments, goes anywhere."""
    return jax.device_put(new, old.sharding) if old.committed else jnp.asarray(new)


def check_largest(*, given: bool, wanted: bool) -> None:
    """Raise unless both sides are AMSGrad, or neither."""
    if given != wanted:
        has, not_ = ("states to start from", "tx") if given else ("tx", "states to start from")
        raise ValueError(f"both or neither must be AMSGrad: the {has} keep a maximum, the {not_} do not")


def positions(order: Any, params: Any, adam: Any) -> dict[str, int]:
    """By path, the position of each param that an Adam trains."""
    if jax.tree.structure(order) != jax.tree.structure(params):
        raise ValueError(f"order must be a tree like the params, {jax.tree.structure(params)}, got {order!r}")
    flat, _ = jax.tree_util.tree_flatten_with_path(adam.mu, is_leaf=trees.is_absent)
    trained = {path_of(keys) for keys, leaf in flat if not trees.is_absent(leaf)}
    if not trained:
        raise ValueError("params must have a leaf that the Adam trains, got none")
    every = {path_of(keys): position for keys, position in jax.tree_util.tree_leaves_with_path(order)}
    return {path: position for path, position in every.items() if path in trained}


def path_of(keys: Any) -> str:
    """A leaf's path as users see it: "layers/0/w"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def array(x: Any) -> np.ndarray:
    """A tensor of PyTorch, a variable of Keras or an array, as NumPy's; bfloat16, which NumPy lacks, as float32."""
    x = getattr(x, "value", x)
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return np.array(x)  # a copy: PyTorch goes on writing in its own


def _check_max_of(form: Any, max_of: MaxOf, *, given: bool) -> None:
    held = "corrected" if isinstance(form, (norms.CorrectedSquares, norms.CorrectedRoots)) else "raw"
    if given and held != max_of:
        raise ValueError(f"max_of must be {max_of!r}, as the others' AMSGrad has it, got {held!r}")


def _check_where(where: str | None, *states: Any) -> None:
    """Raise unless `where` is part of the path of an Adam in one of the states."""
    if where is not None:
        trees.every(states, (*OURS, *OPTAXS), where, "")


def _weight(decay: float, count: int) -> float:
    """1 - decay^count, without cancellation."""
    return float(-np.expm1(count * np.log(decay))) if decay > 0 else 1.0


def _scaled(x: Any, factor: Any, power: int = 1) -> np.ndarray:
    x = np.asarray(x)
    wide = np.promote_types(x.dtype, np.float32)
    return (x.astype(np.promote_types(wide, np.float64)) ** power * np.float64(factor)).astype(wide)
