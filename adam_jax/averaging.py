"""Temporal averaging of the params (Section 7.2): a transformation that only watches, and its reader."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_jax import checks, clock, moments, trees

__all__ = ["AverageParamsState", "average_params", "averaged_params"]


class AverageParamsState(NamedTuple):
    """The average of the params over the steps so far.

    Attributes:
        average: a tree like the params, bias-corrected, float32 at least; `None` for leaves that are not trained.
        weight: scalar, the total weight in `average`, 1 - decay^t at a constant decay.
        count: int32 scalar, the number of updates made.
    """

    average: Any
    weight: jax.Array
    count: ArrayLike


def average_params(decay: ArrayLike | optax.Schedule = 0.999) -> optax.GradientTransformationExtraArgs:
    """Keep the exponential average of the params, bias-corrected (Section 7.2); goes last in a chain, changes no update.

    thetabar_t = decay thetabar_{t-1} + (1 - decay) theta_t, divided by 1 - decay^t. With the schedule
    `lambda t: t / (t + 1)` it is the arithmetic mean of all params so far (Polyak-Ruppert).

    The average of low-precision weights is that of their float32 ones if it stands inside:
    `in_float32(optax.chain(adam(1e-3), average_params()))`, read by `averaged_params(state, master_params(state, params))`.
    Outside it averages the rounded weights.

    Args:
        decay: in [0, 1): number, scalar array or schedule of the count.

    Returns:
        A transformation with state `AverageParamsState`; read it with `averaged_params`. `update` needs the params.

    Raises:
        ValueError: for a decay outside [0, 1); from `update`, where the params are not given.

    Example:
        >>> tx = optax.chain(optax.sgd(1.0), average_params(0.9))
        >>> params = jnp.zeros(1)
        >>> updates, state = tx.update(jnp.ones(1), tx.init(params), params)
        >>> print(averaged_params(state, params))
        [-1.]
    """
    checks.decay("decay", decay)

    def init_fn(params: Any) -> AverageParamsState:
        average = trees.map_params(
            lambda _, leaf: jnp.zeros_like(leaf, dtype=moments.accumulator_dtype(jnp.result_type(leaf))), params
        )
        return AverageParamsState(average, jnp.zeros([]), jnp.zeros([], jnp.int32))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        if params is None and jax.tree.leaves(updates):
            raise ValueError("averaging needs the params: call update(gradients, state, params)")
        t = clock.tick(clock.complement(clock.at(decay, state.count)), state.weight, state.count)

        def step(at: trees.At, u: ArrayLike | None, a: jax.Array) -> tuple[ArrayLike | None, jax.Array]:
            moved = _applied(jnp.asarray(at.param), u).astype(a.dtype)
            a = jnp.where(state.count <= 0, 0.0, a)
            return u, moments.average(a, moved, jnp.asarray(t.moved, jnp.finfo(a.dtype).dtype))

        updates, (average,) = trees.map_updates(step, updates, [state.average], params, always=True)
        return updates, AverageParamsState(average, t.weight, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_params(state: Any, params: trees.Tree, *, where: str | None = None) -> trees.Tree:
    """The averaged params in a state, in the params' dtypes; the params themselves before the first step.

    Args:
        state: an `AverageParamsState`, or any optimizer state with exactly one inside. Of a `flax.nnx.Optimizer` it is
            `nnx.as_pure(optimizer.opt_state)`; then give `nnx.as_pure(params)`, too.
        params: the current params.
        where: which average, in a state that holds several: a part of its path, as the error message lists them.

    Returns:
        A tree like `params`; leaves that are not trained are the params' own.

    Raises:
        ValueError: if the state holds no `AverageParamsState`, or several and `where` does not choose one; for params of
            other shapes.

    Example:
        >>> params = {"w": jnp.ones(1), "steps": 3}
        >>> averaged_params(average_params().init(params), params)
        {'steps': 3, 'w': Array([1.], dtype=float32)}
    """
    advice = "add average_params to the chain"
    average, weight, count = trees.only(state, AverageParamsState, where, advice)
    begun = (weight > 0) & (count > 0)

    def read(keys: Any, a: jax.Array, p: ArrayLike) -> ArrayLike:
        if trees.is_absent(a):
            return p
        if np.shape(p) != np.shape(a):
            raise ValueError(f"params must have the average's shape {a.shape} at {trees.At(keys)}, got {np.shape(p)}")
        return jnp.where(begun, a.astype(jnp.result_type(p)), p)

    return jax.tree_util.tree_map_with_path(read, average, params, is_leaf=trees.is_absent)


def _applied(p: jax.Array, u: ArrayLike | None) -> jax.Array:
    """The param after its update, as `optax.apply_updates` rounds it."""
    if u is None:
        return p
    wide = moments.accumulator_dtype(p.dtype, jnp.result_type(u))
    return (p.astype(wide) + jnp.asarray(u, wide)).astype(p.dtype)
