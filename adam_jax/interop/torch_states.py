"""States of PyTorch's Adam, AdamW, Adamax and AMSGrad, which keep raw moments, and the largest of raw ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from adam_jax import checks
from adam_jax.interop import raw

__all__ = ["from_torch", "to_torch"]

Transform = Callable[[str, np.ndarray], np.ndarray] | None


def from_torch(
    state_dict: dict[str, Any],
    tx: optax.GradientTransformation,
    params: Any,
    *,
    order: Any,
    transform: Transform = None,
    global_step: bool = False,
    where: str | None = None,
) -> optax.OptState:
    """Go on from a state of PyTorch's Adam, AdamW, Adam with L2 decay or AMSGrad, or Adamax.

    Its AdamW is `adamw`, its `weight_decay` of Adam is `chain(add_decayed_weights(...), adam(...))`, its `amsgrad=True` is
    `amsgrad`, whose default order is PyTorch's.

    Args:
        state_dict: `optimizer.state_dict()`, of tensors or NumPy arrays.
        tx: a transformation of this library with an Adam inside, in whatever storage, that corrects the bias.
        params: the params here.
        order: a tree like the params: of each, its position among the params of the torch optimizer; any number for a param
            that the Adam of `tx` does not train.
        transform: what is done to an array of PyTorch's, given the path of its param, as in "layers/0/w"; such as a
            Linear's transpose, since PyTorch keeps it as (out, in).
        global_step: accept a state of SparseAdam, which corrects all rows by the number of all steps.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them. The others
            start anew; `surgery.read_moments` and `write_moments` put several into one state.

    Returns:
        A state of `tx`. Counts of schedules are set; averages of params, residuals and gradients that are being
        accumulated start anew.

    Raises:
        ValueError: for NAdam, whose momentum follows another schedule, RAdam, and SparseAdam unless accepted; for params
            with different step counts or decays, with their paths; for moments of another shape; for AMSGrad on one side,
            or with `max_of="corrected"`; if `tx` holds no Adam, or several and `where` does not choose one; for a dict
            that is not an optimizer's.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> moments = {"step": np.float32(1), "exp_avg": np.array([0.1]), "exp_avg_sq": np.array([0.001])}
        >>> theirs = {"state": {0: moments}, "param_groups": [{"params": [0], "betas": (0.9, 0.999), "amsgrad": False}]}
        >>> print(from_torch(theirs, scale_by_adam(), jnp.zeros(1), order=0).mu)
        [1.]
    """
    checks.flag("global_step", global_step)
    fresh = raw.fresh(tx, params, where)
    groups = _groups(state_dict)
    placed = raw.positions(order, params, fresh.adam)
    kinds = {_kind(groups[position]) for position in placed.values()}
    if len(kinds) != 1 or kinds & raw.REFUSED.keys():
        (kind,) = kinds if len(kinds) == 1 else ("groups of several kinds",)
        if kind != "SparseAdam" or not global_step:
            raise ValueError(f"state_dict must be of Adam, AdamW or Adamax, got {kind}{raw.REFUSED.get(kind, '')}")
    states = {path: state_dict["state"].get(position, {}) for path, position in placed.items()}
    count = _same("step counts", {path: int(raw.array(s.get("step", 0))) for path, s in states.items()})
    decays = _same("decays", {path: tuple(map(float, groups[position]["betas"])) for path, position in placed.items()})

    def tree(name: str) -> Any:
        def pick(keys: Any, _: int) -> np.ndarray | None:
            path = raw.path_of(keys)
            if path not in placed or not count:
                return None
            found = raw.array(states[path][name])
            return transform(path, found) if transform else found

        return jax.tree_util.tree_map_with_path(pick, order)

    of_adamax, amsgrad = kinds == {"Adamax"}, bool(groups[next(iter(placed.values()))].get("amsgrad"))
    largest = tree("max_exp_avg_sq") if amsgrad else None
    second = tree("exp_inf" if of_adamax else "exp_avg_sq")
    return raw.started(fresh, count, decays, tree("exp_avg"), second, largest, max_of="raw", maxima=of_adamax)


def to_torch(
    state: Any,
    state_dict: dict[str, Any],
    params: Any,
    *,
    order: Any,
    transform: Transform = None,
    where: str | None = None,
) -> dict[str, Any]:
    """Go back to PyTorch: what `optimizer.load_state_dict` takes.

    Args:
        state: a state of this library with an Adam inside, of a transformation that corrects the bias.
        state_dict: `optimizer.state_dict()` of the torch optimizer to go on with; its settings stay, and so do
            the states of params that the Adam of `state` does not train.
        params: the params here.
        order: as for `from_torch`.
        transform: the inverse of that for `from_torch`.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them.

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
    groups = _groups(state_dict)
    held = raw.dense(state, where, max_of="raw")
    placed = raw.positions(order, params, held)
    kind = _same("kinds", {path: _kind(groups[position]) for path, position in placed.items()})
    if kind in raw.REFUSED:
        raise ValueError(f"state_dict must be of Adam, AdamW or Adamax, got {kind}{raw.REFUSED[kind]}")
    amsgrad = bool(groups[next(iter(placed.values()))].get("amsgrad"))
    raw.check_largest(given=held.nu_max is not None, wanted=amsgrad)
    arrays = {"exp_avg": held.mu, "exp_inf" if kind == "Adamax" else "exp_avg_sq": held.nu}
    arrays |= {"max_exp_avg_sq": held.nu_max} if amsgrad else {}
    found: dict[int, dict[str, Any]] = {position: {"step": np.float32(held.count)} for position in placed.values()}
    for name, tree in arrays.items():
        for keys, array in jax.tree_util.tree_leaves_with_path(tree):
            path = raw.path_of(keys)
            if path in placed:
                found[placed[path]][name] = transform(path, array) if transform else array
    return {**state_dict, "state": {**state_dict["state"], **found}}


def _groups(state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The group of each param, by its position."""
    if not (isinstance(state_dict, dict) and {"state", "param_groups"} <= state_dict.keys()):
        keys = f"a dict of {list(state_dict)}" if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"state_dict must be an optimizer's, with state and param_groups, got {keys}")
    return {position: group for group in state_dict["param_groups"] for position in group["params"]}


def _same(what: str, found: dict[str, Any]) -> Any:
    """What all params have; an error that names two that differ."""
    (path, first), *others = found.items()
    for other, value in others:
        if value != first:
            raise ValueError(f"all params must have the same {what}, got {first} at {path} and {value} at {other}")
    return first


def _kind(group: dict[str, Any]) -> str:
    """Which of PyTorch's optimizers a group of params is of, by its settings: a state dict does not say."""
    if "momentum_decay" in group:
        return "NAdam"
    if "betas" not in group or "amsgrad" in group:
        return "Adam" if "betas" in group else "an optimizer without betas"
    if "weight_decay" not in group:
        return "SparseAdam"
    return "RAdam" if "decoupled_weight_decay" in group else "Adamax"
