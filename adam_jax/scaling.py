"""The parts of a chain around `scale_by_adam`: each multiplies updates by a scalar, or adds a multiple of the params.

Arithmetic is float32 at least and updates keep their dtype, whatever the dtype of a learning rate or a weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_jax import checks, clock, moments, trees

__all__ = [
    "ScaleByBiasCorrectionState",
    "add_decayed_weights",
    "clip_by_global_norm",
    "inverse_sqrt_decay",
    "scale_by_bias_correction",
    "scale_by_learning_rate",
]

Scalar = ArrayLike | optax.Schedule


class ScaleByBiasCorrectionState(NamedTuple):
    """The weights of the averages being corrected.

    Attributes:
        count: int32 scalar, the number of updates made.
        mu_weight: scalar, 1 - b1^t at a constant b1.
        nu_weight: scalar, 1 - b2^t at a constant b2; 1 where there is no second moment.
    """

    count: ArrayLike
    mu_weight: jax.Array
    nu_weight: jax.Array


def scale_by_bias_correction(b1: Scalar, b2: Scalar | None = None) -> optax.GradientTransformationExtraArgs:
    """Multiply updates made of raw moments by alpha_t / alpha = sqrt(1 - b2^t) / (1 - b1^t) (Section 2, last paragraph).

    `chain(scale_by_adam(b1, b2, bias_correction=False), scale_by_bias_correction(b1, b2))` is Adam in the paper's efficient
    order, with eps added to the uncorrected root: `scale_by_adam(b1, b2, eps_hat=True)`.

    Args:
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the second moment, likewise; `None` for a first moment alone (momentum): 1 / (1 - b1^t).

    Returns:
        A transformation with state `ScaleByBiasCorrectionState`.

    Raises:
        ValueError: for a decay outside [0, 1).

    Example:
        >>> tx = scale_by_bias_correction(0.9)
        >>> updates, _ = tx.update(jnp.array([0.1]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [1.]
    """
    checks.decay("b1", b1)
    if b2 is not None:
        checks.decay("b2", b2)

    def init_fn(params: Any) -> ScaleByBiasCorrectionState:
        del params
        return ScaleByBiasCorrectionState(jnp.zeros([], jnp.int32), jnp.zeros([]), jnp.zeros([]))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        count = state.count
        mu = clock.tick(clock.complement(clock.at(b1, count)), state.mu_weight, count)
        nu = clock.tick(1.0 if b2 is None else clock.complement(clock.at(b2, count)), state.nu_weight, count)
        factor = clock.corrected_rate(moments.root(nu.weight), mu.weight)
        state = ScaleByBiasCorrectionState(optax.safe_increment(count), mu.weight, nu.weight)
        return _scale(factor, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Multiply all gradients by min(1, max_norm / global norm), one scalar, which XLA fuses into the step that follows.

    The norm is taken in float32 at least and does not overflow: the square of each of n entries counts max / 2n at most, so
    that gradients of 1e30 are scaled down, not zeroed.

    Args:
        max_norm: number or scalar >= 0.

    Returns:
        A transformation without state. A NaN in any gradient makes all updates NaN, an infinity stays one.

    Raises:
        ValueError: for a negative max_norm.

    Example:
        >>> tx = clip_by_global_norm(1.0)
        >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [0.6 0.8]
    """
    checks.at_least("max_norm", max_norm, 0.0)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        trained = [moments.widened(u) for u in jax.tree.leaves(updates) if trees.is_trained(u)]
        size = 2 * max(1, sum(u.size for u in trained))
        widest = moments.accumulator_dtype(*(jnp.finfo(u.dtype).dtype for u in trained))
        squares = [jnp.asarray(_sum_of_squares(u, size), widest) for u in trained]
        norm = moments.root(_sum(squares))
        most = jnp.asarray(max_norm, norm.dtype)
        return _scale(jnp.where(norm <= most, 1.0, most / jnp.where(norm <= most, 1.0, norm)), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def scale_by_learning_rate(learning_rate: Scalar) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by -learning_rate, in float32 at least whatever the updates' dtype.

    `optax.scale_by_learning_rate` rounds the learning rate to the updates' dtype first: by up to 0.2 % in bfloat16 (2^-9).

    Args:
        learning_rate: number, scalar array or schedule of the count; a negative one climbs.

    Returns:
        A transformation; its state holds a count where the learning rate is a schedule.

    Raises:
        ValueError: for a learning rate in a dtype narrower than float32.

    Example:
        >>> tx = scale_by_learning_rate(inverse_sqrt_decay(0.5))
        >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.5]
    """
    checks.scalar("learning_rate", learning_rate)

    def init_fn(params: Any) -> Any:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)) if callable(learning_rate) else optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params, extra_args
        if not callable(learning_rate):
            return _scale(-jnp.asarray(learning_rate), updates), state
        count = _count("learning_rate", state)
        return _scale(-jnp.asarray(learning_rate(count)), updates), optax.ScaleByScheduleState(optax.safe_increment(count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_decayed_weights(
    weight_decay: Scalar = 0.0, mask: Any | Callable[[Any], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Add weight_decay * params to updates, in float32 at least: before the learning rate, it is AdamW's decay.

    Args:
        weight_decay: number, scalar array or schedule of the count.
        mask: tree of booleans with the params' structure, or a function from params to one: where to decay.

    Returns:
        A transformation; its state holds a count where the decay is a schedule.

    Raises:
        ValueError: from `update`, where the params are not given.
        TypeError: from `init`, for a mask of strings.

    Example:
        >>> tx = add_decayed_weights(0.5)
        >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [1.5]
    """
    checks.scalar("weight_decay", weight_decay, 0.0)

    def init_fn(params: Any) -> Any:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)) if callable(weight_decay) else optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        _need_params(updates, params)
        amount = clock.at(weight_decay, _count("weight_decay", state)) if callable(weight_decay) else weight_decay

        def decay(at: trees.At, u: ArrayLike) -> tuple[jax.Array]:
            wide = moments.widened(u)
            decayed = wide + moments.times(jnp.asarray(amount, wide.real.dtype), jnp.asarray(at.param, wide.dtype))
            return (decayed.astype(jnp.result_type(u)),)

        updates, _ = trees.map_updates(decay, updates, (), params)
        if callable(weight_decay):
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    if mask is None:
        return tx

    def masked(params: Any) -> Any:  # Optax asks a mask about the gradients, of which some may be `None`
        chosen = mask(params) if callable(mask) else mask
        wrong = next((leaf for leaf in jax.tree.leaves(chosen) if isinstance(leaf, str)), None)
        if wrong is not None:
            raise TypeError(f"mask must hold True or False, got {wrong!r}: label_by_path({{'b$': False}}, True) makes one")
        return optax.masked(tx, chosen)

    def masked_update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        _need_params(updates, params)
        return masked(params).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(lambda params: masked(params).init(params), masked_update)


def inverse_sqrt_decay(alpha: ArrayLike) -> optax.Schedule:
    """The step size alpha / sqrt(t) of Section 4 and Figure 1; t = 1 at the first update, where the count is 0.

    Args:
        alpha: number or scalar > 0, the first step size.

    Returns:
        A schedule of the count, float32 (float64 under `jax_enable_x64`).

    Raises:
        ValueError: for a negative alpha.

    Example:
        >>> print(inverse_sqrt_decay(0.1)(3))
        0.05
    """
    checks.at_least("alpha", alpha, 0.0)

    def schedule(count: ArrayLike) -> jax.Array:
        root = jnp.sqrt(jnp.asarray(count, float) + 1.0)
        return jnp.asarray(alpha, root.dtype) / root

    return schedule


def _need_params(updates: Any, params: Any) -> None:
    if params is None and jax.tree.leaves(updates):
        raise ValueError("weight decay needs the params: call update(gradients, state, params)")


def _count(name: str, state: Any) -> jax.Array:
    """The count of a schedule."""
    if not isinstance(state, optax.ScaleByScheduleState):
        raise TypeError(f"state must be that of a {name} on a schedule, got {state}: {name} was a number at init")
    return jnp.asarray(state.count)


def _scale(factor: ArrayLike, updates: Any) -> Any:
    """Multiply the trained leaves by one scalar, in the dtype of their arithmetic; each keeps its own dtype."""

    def scale(u: ArrayLike) -> jax.Array:
        wide = moments.widened(u)
        return moments.times(jnp.asarray(factor, jnp.finfo(wide.dtype).dtype), wide).astype(jnp.result_type(u))

    return jax.tree.map(lambda u: scale(u) if trees.is_trained(u) else u, updates)


def _sum_of_squares(u: jax.Array, size: int) -> jax.Array:
    """In one pass, and a form that XLA fuses into the reduction: clipping u itself would be written to memory first."""
    square = moments.squared(u)
    return moments.total(jax.lax.min(square, np.asarray(float(jnp.finfo(u.dtype).max) / size, square.dtype)))


def _sum(numbers: list[jax.Array]) -> jax.Array:
    """The sum of scalars. On CPU in a loop, for XLA would add them up again in every kernel that needs the sum."""

    def add(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda total, y: (total + y, None), jnp.zeros([], x.dtype), x)[0]

    return jax.lax.platform_dependent(jnp.stack(numbers), cpu=add, default=jnp.sum) if numbers else jnp.zeros([])
