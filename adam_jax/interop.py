"""Moving in from Optax, PyTorch and Keras: their default settings, and their states, both ways where both exist.

Others keep raw moments m and v; here averages are kept corrected, mu = m / w1 and nu = v / w2, with the weights
w1 = 1 - b1^t and w2 = 1 - b2^t. The way back is m = mu * mu_weight, which holds on schedules of decays, too.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import checks, norms, surgery, trees
from adam_jax.averaging import AverageParamsState
from adam_jax.transforms import ScaleByAdamState, ScaleByAmsgradState

__all__ = ["adam_defaults", "from_keras", "from_optax", "from_torch", "to_optax", "to_torch"]

Framework = Literal["tensorflow", "keras", "blocks", "lasagne", "caffe", "mxnet", "torch"]
Transform = Callable[[str, np.ndarray], np.ndarray] | None

# ε̂ stands in eps_hat: all but PyTorch fold the bias correction into the step size, as Section 2 does, and so add ε to the
# uncorrected root.
_DEFAULTS = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_hat": True}
_OWN: dict[str, Any] = {"keras": {"eps": 1e-7}, "blocks": {"learning_rate": 2e-3}, "torch": {"eps_hat": False}}


def adam_defaults(framework: Framework) -> dict[str, Any]:
    """A framework's default settings of Adam, with its placement of epsilon.

    Args:
        framework: "tensorflow" (`tf.train.AdamOptimizer`), "keras" (Keras 3), "blocks", "lasagne", "caffe", "mxnet" or
            "torch" (PyTorch; Lua Torch had the same numbers, with epsilon on the uncorrected root).

    Returns:
        Keyword arguments for `adam`: learning_rate, b1, b2, eps, eps_hat. A new dict at each call.

    Raises:
        ValueError: for a framework that is not listed.

    Example:
        >>> adam_defaults("keras")
        {'learning_rate': 0.001, 'b1': 0.9, 'b2': 0.999, 'eps': 1e-07, 'eps_hat': True}
    """
    checks.one_of("framework", framework, get_args(Framework))
    return _DEFAULTS | _OWN.get(framework, {})


def from_optax(
    state: Any, tx: optax.GradientTransformation, params: Any, b1: float = 0.9, b2: float = 0.999
) -> optax.OptState:
    """Go on from a state of Optax's Adam: a state of `tx` after as many steps, with the same moments.

    Args:
        state: a state with exactly one `optax.ScaleByAdamState` inside, of `optax.adam`, `adamw`, `nadam` or `adamax`.
        tx: a transformation of this library with exactly one Adam inside, in whatever storage.
        params: the params.
        b1: the decay of the first moments that Optax was given: its state does not say.
        b2: that of the second moments.

    Returns:
        A state of `tx`. Counts of schedules are set; averages of params and residuals start anew.

    Raises:
        ValueError: if either state does not hold exactly one Adam, and for moments of another shape than the params.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> params, gradients = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -2.0])}
        >>> _, state = optax.adam(0.1).update(gradients, optax.adam(0.1).init(params))
        >>> tx = optax.scale_by_adam()
        >>> print(to_optax(from_optax(state, scale_by_adam(), params), tx, params).mu["w"])
        [ 0.1 -0.2]
    """
    found = _only(state, optax.ScaleByAdamState)
    return _started(tx, params, int(found.count), (b1, b2), found.mu, found.nu)


def to_optax(state: Any, optax_tx: optax.GradientTransformation, params: Any) -> optax.OptState:
    """Go back to Optax: a state of `optax_tx` after as many steps, with the same moments.

    Args:
        state: a state of this library with exactly one Adam inside.
        optax_tx: `optax.adam`, `adamw`, `nadam`, `adamax`, or a chain with exactly one `optax.scale_by_adam` inside.
        params: the params.

    Returns:
        A state of `optax_tx`.

    Raises:
        ValueError: if either state does not hold exactly one Adam.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> print(to_optax(scale_by_adam().init(jnp.zeros(1)), optax.adam(0.1), jnp.zeros(1))[0].mu)
        [0.]
    """
    kept = _raw(state)
    fresh = optax_tx.init(params)
    old = _only(fresh, optax.ScaleByAdamState)
    new = old._replace(mu=_like(old.mu, kept.mu), nu=_like(old.nu, kept.nu))
    return _at_count(_replaced(fresh, optax.ScaleByAdamState, new), kept.count)


def from_torch(
    state_dict: dict[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    *,
    order: Any,
    transform: Transform = None,
    global_step: bool = False,
) -> optax.OptState:
    """Go on from a state of PyTorch's Adam, AdamW, Adam with L2 decay or AMSGrad, or Adamax.

    Its AdamW is `adamw`, its `weight_decay` of Adam is `chain(add_decayed_weights(...), adam(...))`, its `amsgrad=True` is
    `amsgrad`, whose default order is PyTorch's.

    Args:
        state_dict: `optimizer.state_dict()`, of tensors or NumPy arrays.
        tx: a transformation of this library with exactly one Adam inside, in whatever storage.
        params: the params here.
        order: a tree like the params: of each, its position among the params of the torch optimizer.
        transform: what is done to an array of PyTorch's, given the path of its param, as in "layers/0/w"; such as a
            Linear's transpose, since PyTorch keeps it as (out, in).
        global_step: accept a state of SparseAdam, which corrects all rows by the number of all steps.

    Returns:
        A state of `tx`. Counts of schedules are set; averages of params and residuals start anew.

    Raises:
        ValueError: for NAdam, whose momentum follows another schedule, RAdam, and SparseAdam unless accepted; for params
            with different step counts or decays, with their paths; for moments of another shape; for AMSGrad on one side.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> moments = {"step": np.float32(1), "exp_avg": np.array([0.1]), "exp_avg_sq": np.array([0.001])}
        >>> theirs = {"state": {0: moments}, "param_groups": [{"params": [0], "betas": (0.9, 0.999), "amsgrad": False}]}
        >>> print(from_torch(theirs, scale_by_adam(), jnp.zeros(1), order=0).mu)
        [1.]
    """
    groups = {position: group for group in state_dict["param_groups"] for position in group["params"]}
    placed = _positions(order, params)
    kinds = {_torch_kind(groups[position]) for position in placed.values()}
    if len(kinds) != 1 or kinds & _REFUSED.keys():
        (kind,) = kinds if len(kinds) == 1 else ("groups of several kinds",)
        if kind != "SparseAdam" or not global_step:
            raise ValueError(f"state_dict must be of Adam, AdamW or Adamax, got {kind}{_REFUSED.get(kind, '')}")
    states = {path: state_dict["state"].get(position, {}) for path, position in placed.items()}
    count = _same("step counts", {path: int(_array(s.get("step", 0))) for path, s in states.items()})
    decays = _same("decays", {path: tuple(map(float, groups[position]["betas"])) for path, position in placed.items()})

    def tree(name: str) -> Any:
        def pick(keys: Any, position: int) -> np.ndarray:
            path, array = _path(keys), _array(state_dict["state"][position][name])
            return transform(path, array) if transform else array

        return jax.tree_util.tree_map_with_path(pick, order)

    of_adamax, amsgrad = kinds == {"Adamax"}, bool(groups[next(iter(placed.values()))].get("amsgrad"))
    largest = tree("max_exp_avg_sq") if amsgrad else None
    second = tree("exp_inf" if of_adamax else "exp_avg_sq")
    return _started(tx, params, count, decays, tree("exp_avg"), second, largest, maxima=of_adamax)


def to_torch(state: Any, state_dict: dict[str, Any], params: Any, *, order: Any, transform: Transform = None) -> Any:
    """Go back to PyTorch: what `optimizer.load_state_dict` takes.

    Args:
        state: a state of this library with exactly one Adam inside.
        state_dict: `optimizer.state_dict()` of the torch optimizer to go on with; its settings stay.
        params: the params here.
        order: as for `from_torch`.
        transform: the inverse of that for `from_torch`.

    Returns:
        A dictionary like `state_dict`, of NumPy arrays: `jax.tree.map(torch.tensor, ...["state"])` makes tensors of them.

    Raises:
        ValueError: for a torch optimizer other than Adam, AdamW and Adamax, and as `from_torch`.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> empty = {"state": {}, "param_groups": [{"params": [0], "betas": (0.9, 0.999), "amsgrad": False}]}
        >>> to_torch(scale_by_adam().init(jnp.zeros(1)), empty, jnp.zeros(1), order=0)["state"][0]["exp_avg"]
        array([0.], dtype=float32)
    """
    groups = {position: group for group in state_dict["param_groups"] for position in group["params"]}
    placed = _positions(order, params)
    kind = _same("kinds", {path: _torch_kind(groups[position]) for path, position in placed.items()})
    if kind in _REFUSED:
        raise ValueError(f"state_dict must be of Adam, AdamW or Adamax, got {kind}{_REFUSED[kind]}")
    kept = _raw(state)
    amsgrad = bool(groups[next(iter(placed.values()))].get("amsgrad"))
    _check_largest(given=kept.nu_max is not None, wanted=amsgrad)
    arrays = {"exp_avg": kept.mu, "exp_inf" if kind == "Adamax" else "exp_avg_sq": kept.nu}
    arrays |= {"max_exp_avg_sq": kept.nu_max} if amsgrad else {}
    found: dict[int, dict[str, Any]] = {position: {"step": np.float32(kept.count)} for position in placed.values()}
    for name, tree in arrays.items():
        for keys, array in jax.tree_util.tree_leaves_with_path(tree):
            path = _path(keys)
            if not trees.is_absent(array):
                found[placed[path]][name] = transform(path, array) if transform else array
    return {**state_dict, "state": found}


def from_keras(optimizer: Any, tx: optax.GradientTransformation, params: Any, *, order: Any) -> optax.OptState:
    """Go on from Keras 3's Adam or AdamW, with or without `amsgrad`; Keras adds eps to the uncorrected root: `eps_hat=True`.

    Args:
        optimizer: a built `keras.optimizers.Adam` or `AdamW`.
        tx: a transformation of this library with exactly one Adam inside, in whatever storage.
        params: the params here.
        order: a tree like the params: of each, its position in `optimizer`'s trainable variables.

    Returns:
        A state of `tx`, as from `from_torch`.

    Raises:
        ValueError: for another optimizer (Keras' Adamax adds eps outside the maximum), and as `from_torch`.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> class Adam:  # stands for a keras.optimizers.Adam
        ...     iterations, beta_1, beta_2, amsgrad = 1, 0.9, 0.999, False
        ...     _momentums, _velocities = [np.array([0.1])], [np.array([0.001])]
        >>> print(from_keras(Adam(), scale_by_adam(eps_hat=True), jnp.zeros(1), order=0).mu)
        [1.]
    """
    name = type(optimizer).__name__
    if name not in ("Adam", "AdamW"):
        raise ValueError(f"optimizer must be Keras' Adam or AdamW, got {name}{_REFUSED.get(name, '')}")
    _positions(order, params)
    count = int(_array(optimizer.iterations))

    def tree(variables: Any) -> Any:
        return jax.tree.map(lambda position: _array(variables[position]), order)

    first, second = tree(optimizer._momentums), tree(optimizer._velocities)
    largest = tree(optimizer._velocity_hats) if optimizer.amsgrad else None
    return _started(tx, params, count, (float(optimizer.beta_1), float(optimizer.beta_2)), first, second, largest)


# Dense moments, raw, as all others keep them -------------------------------------------------------------------------------

_ADAMS = (ScaleByAdamState, ScaleByAmsgradState)
_REFUSED = {
    "NAdam": ": its momentum follows another schedule, which no state here can go on with",
    "Nadam": ": its momentum follows another schedule, which no state here can go on with",
    "RAdam": ": it rectifies the step",
    "SparseAdam": ": it corrects all rows by the number of all steps; global_step=True accepts that",
}


def _raw(state: Any) -> Any:
    """`surgery.Moments`, but raw, as others keep them, in float32 or float64."""
    _only(state, _ADAMS)
    held = surgery.read_moments(state)
    if isinstance(held.form, norms.Powers):
        raise ValueError("state must be of Adam, AMSGrad or AdaMax, got L^p Adam's, which has no counterpart elsewhere")
    power = 2 if isinstance(held.form, norms.Roots) else 1

    def raw(tree: Any, weight: Any, power: int = 1) -> Any:
        return jax.tree.map(lambda x: x if trees.is_absent(x) else _scaled(x, weight, power), tree)

    largest = None if held.nu_max is None else raw(held.nu_max, 1.0, power)
    mu, nu = raw(held.mu, held.mu_weight), raw(held.nu, held.nu_weight, power)
    return held._replace(count=int(np.asarray(held.count)), mu=mu, nu=nu, nu_max=largest)


def _started(
    tx: Any, params: Any, count: int, decays: Any, m: Any, v: Any, largest: Any = None, *, maxima: bool | None = None
) -> Any:
    """A state of tx with these raw moments; `maxima`: whether v is AdaMax's norm, None for what tx keeps."""
    fresh = tx.init(params)
    adam = _only(fresh, _ADAMS)
    _check_largest(given=largest is not None, wanted=isinstance(adam, ScaleByAmsgradState))
    if count == 0:
        return fresh
    if maxima is None:
        maxima = isinstance(adam.form, norms.Maxima)
    first, second = _weight(decays[0], count), 1.0 if maxima else _weight(decays[1], count)

    def beside(tree: Any, weight: float) -> Any:  # in the places that the state has
        return jax.tree.map(
            lambda old, x: old if trees.is_absent(old) else _scaled(x, 1.0 / weight), adam.mu, tree, is_leaf=trees.is_absent
        )

    form = norms.Maxima() if maxima else norms.Squares()
    nu_max = None if largest is None else beside(largest, 1.0)
    held = surgery.Moments(jnp.int32(count), beside(m, first), beside(v, second), nu_max, first, second, form)
    placed = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), fresh, surgery.write_moments(fresh, held))
    return _at_count(placed, count)


def _weight(decay: float, count: int) -> float:
    """1 - decay^count, without cancellation."""
    return float(-np.expm1(count * np.log(decay))) if decay > 0 else 1.0


def _scaled(x: Any, factor: Any, power: int = 1) -> np.ndarray:
    x = np.asarray(x)
    wide = np.promote_types(x.dtype, np.float32)
    return (x.astype(np.promote_types(wide, np.float64)) ** power * np.float64(factor)).astype(wide)


def _like(old: Any, new: Any) -> Any:
    """Arrays in the place of Optax's, where these are."""

    def take(keys: Any, old: Any, x: Any) -> Any:
        if trees.is_absent(old):
            return old
        if np.shape(x) != old.shape:
            raise ValueError(f"optax_tx must be for the same params, got {old.shape} for {np.shape(x)} at {_path(keys)}")
        return jax.device_put(jnp.asarray(x, old.dtype), old.sharding)

    return jax.tree_util.tree_map_with_path(take, old, new, is_leaf=trees.is_absent)


def _at_count(state: Any, count: Any) -> Any:
    """The state with every count set, but for those of averages, which start anew."""

    def counted(node: Any) -> Any:
        if not hasattr(node, "_fields"):
            return node
        fields = {name: _at_count(value, count) for name, value in zip(node._fields, node, strict=True)}
        if "count" in fields and not isinstance(node, AverageParamsState):
            fields["count"] = jnp.asarray(count, node.count.dtype)
        return type(node)(**fields)

    return jax.tree.map(counted, state, is_leaf=lambda node: hasattr(node, "_fields"))


def _only(state: Any, kind: Any) -> Any:
    found = [n for n in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, kind)) if isinstance(n, kind)]
    if len(found) != 1:
        names = (f"{k.__module__.split('.')[0]}.{k.__name__}" for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"state must hold exactly one {' or '.join(names)}, got {len(found)}")
    return found[0]


def _replaced(state: Any, kind: Any, new: Any) -> Any:
    return jax.tree.map(lambda n: new if isinstance(n, kind) else n, state, is_leaf=lambda n: isinstance(n, kind))


def _check_largest(*, given: bool, wanted: bool) -> None:
    if given != wanted:
        has, not_ = ("states to start from", "tx") if given else ("tx", "states to start from")
        raise ValueError(f"both or neither must be AMSGrad: the {has} keep a maximum, the {not_} do not")


# Positions, paths and kinds ----------------------------------------------------------------------------------------------


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _positions(order: Any, params: Any) -> dict[str, int]:
    if jax.tree.structure(order) != jax.tree.structure(params):
        raise ValueError(f"order must be a tree like the params, {jax.tree.structure(params)}, got {order!r}")
    return {_path(keys): position for keys, position in jax.tree_util.tree_leaves_with_path(order)}


def _same(what: str, found: dict[str, Any]) -> Any:
    """What all params have; an error that names two that differ."""
    (path, first), *others = found.items()
    for other, value in others:
        if value != first:
            raise ValueError(f"all params must have the same {what}, got {first} at {path} and {value} at {other}")
    return first


def _torch_kind(group: dict[str, Any]) -> str:
    """Which of PyTorch's optimizers a group of params is of, by its settings: a state dict does not say."""
    if "momentum_decay" in group:
        return "NAdam"
    if "betas" not in group or "amsgrad" in group:
        return "Adam" if "betas" in group else "an optimizer without betas"
    if "weight_decay" not in group:
        return "SparseAdam"
    return "RAdam" if "decoupled_weight_decay" in group else "Adamax"


def _array(x: Any) -> np.ndarray:
    """A tensor of PyTorch, a variable of Keras or an array, as NumPy's; bfloat16, which NumPy lacks, as float32."""
    x = getattr(x, "value", x)
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    return np.array(x)  # a copy: PyTorch goes on writing in its own
