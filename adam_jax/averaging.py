"""Temporal averaging of the params (Section 7.2): a transformation that only watches, and its reader."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adam_jax import checks, moments, trees

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
        rate = moments.complement(moments.at(decay, state.count))
        weight = moments.running_weight(state.weight, rate, state.count)
        corrected = moments.corrected_rate(rate, weight)

        def step(u: ArrayLike | None, a: jax.Array, p: ArrayLike) -> tuple[ArrayLike | None, jax.Array, ArrayLike]:
            moved = (jnp.asarray(p) + (0 if u is None else u)).astype(jnp.result_type(p)).astype(a.dtype)
            return u, moments.average(a, moved, jnp.asarray(corrected, jnp.finfo(a.dtype).dtype)), p

        updates, (average, _) = trees.map_updates(step, updates, [state.average, params], always=True)
        return updates, AverageParamsState(average, weight, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_params(state: Any, params: Any) -> Any:
    """The averaged params in a state, in the params' dtypes; the params themselves before the first step.

    Args:
        state: an `AverageParamsState`, or any optimizer state with exactly one inside. Of a `flax.nnx.Optimizer` it is
            `nnx.as_pure(optimizer.opt_state)`; then give `nnx.as_pure(params)`, too.
        params: the current params.

    Returns:
        A tree like `params`; leaves that are not trained are the params' own.

    Raises:
        ValueError: if the state holds no `AverageParamsState`, or several.

    Example:
        >>> params = {"w": jnp.ones(1), "steps": 3}
        >>> averaged_params(average_params().init(params), params)
        {'steps': 3, 'w': Array([1.], dtype=float32)}
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_average) if _is_average(s)]
    if len(found) != 1:
        raise ValueError(
            f"state must hold exactly one AverageParamsState, got {len(found)}: add average_params to the chain"
        )
    average, weight, _ = found[0]
    return jax.tree.map(
        lambda a, p: p if trees.is_absent(a) else jnp.where(weight > 0, a.astype(jnp.result_type(p)), p),
        average, params, is_leaf=trees.is_absent,
    )  # fmt: skip


def _is_average(node: Any) -> bool:
    return isinstance(node, AverageParamsState)
