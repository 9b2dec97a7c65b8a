"""Steps that should not have happened: gradients with a NaN or an infinity in them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from adam_jax import checks, moments, trees

__all__ = ["SkipNonfiniteState", "raise_if_stuck", "skip_nonfinite"]


class SkipNonfiniteState(NamedTuple):
    """The state of the transformation inside, and how often it was left alone.

    Attributes:
        inner_state: the state inside.
        consecutive: int32 scalar, steps skipped since the last one taken.
        total: int32 scalar, steps skipped in all.
        stuck: boolean scalar, whether `consecutive` has reached `max_consecutive`.
    """

    inner_state: Any
    consecutive: jax.Array
    total: jax.Array
    stuck: jax.Array


def skip_nonfinite(
    tx: optax.GradientTransformation, max_consecutive: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Leave out every step whose gradients hold a NaN or an infinity, as if it had not been, bit for bit.

    On such a step the update is -0.0, which changes no weight, and nothing inside moves: no moment, no count, no schedule,
    no average. The choice is made on the device, and the state is not copied for it.

    Args:
        tx: any Optax transformation; usually the whole chain.
        max_consecutive: how many steps in a row may be skipped before the state says `stuck`. Skipping goes on; the host can
            read `stuck`, or call `raise_if_stuck`, when it suits. `None`: never.

    Returns:
        A transformation with state `SkipNonfiniteState`.

    Raises:
        TypeError: if tx is no transformation.
        ValueError: if max_consecutive is not a whole number of at least one.

    Example:
        >>> tx = skip_nonfinite(optax.adam(0.1), max_consecutive=2)
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params), params)
        >>> print(updates["w"], state.total, state.stuck)
        [-0. -0.] 1 False
    """
    checks.transformation("tx", tx)
    if max_consecutive is not None:
        checks.whole("max_consecutive", max_consecutive, 1)
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> SkipNonfiniteState:
        consecutive, total = (jnp.zeros([], jnp.int32) for _ in range(2))  # two arrays, since each may be donated
        return SkipNonfiniteState(inner.init(params), consecutive, total, jnp.zeros([], bool))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, SkipNonfiniteState]:
        good, before = _all_finite(updates), state.inner_state

        @jax.jit  # so that it is traced once
        def step() -> tuple[Any, Any]:
            new_updates, new_inner = inner.update(updates, before, params, **extra_args)
            return new_updates, jax.tree.map(_as_before, new_inner, before)

        nothing = jax.tree.map(lambda u: lax.full(u.shape, -0.0, u.dtype), jax.eval_shape(step)[0])

        def branch(good: jax.Array) -> tuple[Any, Any]:  # writes the state in place on CPU, and not on TPU
            return lax.cond(good, step, lambda: (nothing, before))

        def choose(good: jax.Array) -> tuple[Any, Any]:
            return jax.tree.map(functools.partial(moments.where, good), step(), (nothing, before))

        new_updates, new_inner = lax.platform_dependent(good, cpu=branch, default=choose)
        consecutive = jnp.where(good, 0, optax.safe_increment(state.consecutive))
        total = jnp.where(good, state.total, optax.safe_increment(state.total))
        stuck = jnp.zeros([], bool) if max_consecutive is None else consecutive >= max_consecutive
        return new_updates, SkipNonfiniteState(new_inner, consecutive, total, stuck)

    return optax.GradientTransformationExtraArgs(init, update)


def raise_if_stuck(state: Any, *, where: str | None = None) -> None:
    """Raise on the host if a `skip_nonfinite` has skipped `max_consecutive` steps in a row; waits for the device.

    Args:
        state: an optimizer state with any number of `SkipNonfiniteState` inside.
        where: only those whose path contains this.

    Raises:
        FloatingPointError: with the path and the number of steps skipped.
        ValueError: if the state holds none, or none at `where`.

    Example:
        >>> tx = skip_nonfinite(optax.sgd(0.1), max_consecutive=1)
        >>> _, state = tx.update(jnp.array([jnp.inf]), tx.init(jnp.zeros(1)))
        >>> raise_if_stuck(state)
        Traceback (most recent call last):
        ...
        FloatingPointError: gradients were not finite for 1 step (1 in all)
    """
    for path, skip in trees.every(state, SkipNonfiniteState, where, "wrap the transformation in skip_nonfinite").items():
        if jnp.any(skip.stuck):
            at, row = f" at {path}" if path else "", int(jnp.max(skip.consecutive))
            steps = "1 step" if row == 1 else f"{row} steps in a row"
            raise FloatingPointError(f"gradients were not finite for {steps} ({jnp.max(skip.total)} in all){at}")


def _all_finite(updates: Any) -> jax.Array:
    """By a sum of zeros, NaN where anything is not finite: XLA takes that and a norm in one pass, and not booleans."""
    wide = [moments.widened(g) for g in jax.tree.leaves(updates) if trees.is_trained(g)]
    sums = [moments.total(lax.mul(g, np.zeros([], g.dtype))) for g in wide]
    found = [lax.eq(total, np.zeros([], total.dtype)) for total in sums]
    good = jnp.all(jnp.stack(found)) if found else jnp.ones([], bool)
    # or XLA on GPU takes a fifth longer to compile, to see whether each leaf should find this again
    return lax.optimization_barrier(good)


def _as_before(new: jax.Array, old: jax.Array) -> jax.Array:
    """A new state's array in the dtype it had at init; some of Optax's transformations let it drift."""
    return new if jnp.result_type(new) == jnp.result_type(old) else new.astype(old.dtype)
