"""Steps that should not have happened: gradients with a NaN or an infinity in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_jax import trees

__all__ = ["SkipNonfiniteState", "raise_if_stuck", "skip_nonfinite"]


class SkipNonfiniteState(NamedTuple):
    """The state of the transformation inside, and how often it was left alone.

    Attributes:
        inner_state: the state inside; with `per_leaf=True` a tuple with one for each leaf of the params.
        consecutive: int32 scalar, steps skipped since the last one taken; with `per_leaf=True` a tuple of scalars.
        total: int32 scalar, steps skipped in all, likewise.
        stuck: boolean scalar, whether `consecutive` has reached `max_consecutive`, likewise.
    """

    inner_state: Any
    consecutive: Any
    total: Any
    stuck: Any


def skip_nonfinite(
    tx: optax.GradientTransformation, max_consecutive: int | None = None, *, per_leaf: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Leave out every step whose gradients hold a NaN or an infinity, as if it had not been, bit for bit.

    On such a step the update is -0.0, which changes no weight, and nothing inside moves: no moment, no count, no schedule,
    no average. The choice is made on the device, and the state is not copied for it.

    Args:
        tx: any Optax transformation; usually the whole chain.
        max_consecutive: how many steps in a row may be skipped before the state says `stuck`. Skipping goes on; the host can
            read `stuck`, or call `raise_if_stuck`, when it suits. `None`: never.
        per_leaf: decide for each leaf of the params alone. Then `tx` runs once for each leaf, on a tree that has `None` in
            place of the others, with a state of its own: a norm over "all" gradients is a norm over one leaf.
            (`optax.tree_utils.tree_map_params` does not see through it.)

    Returns:
        A transformation with state `SkipNonfiniteState`.

    Raises:
        ValueError: if max_consecutive is below one.

    Example:
        >>> tx = skip_nonfinite(optax.adam(0.1), max_consecutive=2)
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params), params)
        >>> print(updates["w"], state.total, state.stuck)
        [-0. -0.] 1 False
    """
    if max_consecutive is not None and max_consecutive < 1:
        raise ValueError(f"max_consecutive must be None or at least 1, got {max_consecutive}")
    inner = optax.with_extra_args_support(tx)

    def init_one(params: Any) -> SkipNonfiniteState:
        consecutive, total = (jnp.zeros([], jnp.int32) for _ in range(2))  # two arrays, since each may be donated
        return SkipNonfiniteState(inner.init(params), consecutive, total, jnp.zeros([], bool))

    def update_one(updates: Any, state: Any, params: Any, **extra_args: Any) -> tuple[Any, SkipNonfiniteState]:
        good = _all_finite(updates)

        def take() -> tuple[Any, Any]:
            new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
            return new_updates, jax.tree.map(_as_before, new_inner, state.inner_state)

        def skip() -> tuple[Any, Any]:
            return jax.tree.map(lambda u: jnp.full_like(u, -0.0), jax.eval_shape(take)[0]), state.inner_state

        new_updates, new_inner = jax.lax.cond(good, take, skip)
        consecutive = jnp.where(good, 0, optax.safe_increment(state.consecutive))
        total = jnp.where(good, state.total, optax.safe_increment(state.total))
        stuck = jnp.zeros([], bool) if max_consecutive is None else consecutive >= max_consecutive
        return new_updates, SkipNonfiniteState(new_inner, consecutive, total, stuck)

    def init_each(params: Any) -> SkipNonfiniteState:
        return _transpose([init_one(tree) for tree in _one_by_one(params)])

    def update_each(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, SkipNonfiniteState]:
        alone = _one_by_one(updates)
        if len(alone) != len(state.total):
            raise ValueError(f"the gradients have {len(alone)} leaves, but the params given to init {len(state.total)}")
        params_alone = [None] * len(alone) if params is None else _one_by_one(params)
        states = [SkipNonfiniteState(*fields) for fields in zip(*state, strict=True)]
        pairs = [update_one(*one, **extra_args) for one in zip(alone, states, params_alone, strict=True)]
        leaves = [trees.leaves(tree)[i] for i, (tree, _) in enumerate(pairs)]
        return jax.tree.unflatten(trees.structure(updates), leaves), _transpose([s for _, s in pairs])

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, SkipNonfiniteState]:
        return update_one(updates, state, params, **extra_args)

    if per_leaf:
        return optax.GradientTransformationExtraArgs(init_each, update_each)
    return optax.GradientTransformationExtraArgs(init_one, update_fn)


def raise_if_stuck(state: Any) -> None:
    """Raise on the host if a `skip_nonfinite` has skipped `max_consecutive` steps in a row; waits for the device.

    Args:
        state: an optimizer state with any number of `SkipNonfiniteState` inside.

    Raises:
        FloatingPointError: with the number of steps skipped.

    Example:
        >>> tx = skip_nonfinite(optax.sgd(0.1), max_consecutive=1)
        >>> _, state = tx.update(jnp.array([jnp.inf]), tx.init(jnp.zeros(1)))
        >>> raise_if_stuck(state)
        Traceback (most recent call last):
        ...
        FloatingPointError: gradients were not finite for 1 steps in a row (1 in all)
    """

    def is_skip(node: Any) -> bool:
        return isinstance(node, SkipNonfiniteState)

    for skip in filter(is_skip, jax.tree.leaves(state, is_leaf=is_skip)):
        for consecutive, total, stuck in zip(*map(jax.tree.leaves, skip[1:]), strict=True):
            if jnp.any(stuck):
                raise FloatingPointError(
                    f"gradients were not finite for {jnp.max(consecutive)} steps in a row ({jnp.max(total)} in all)"
                )


def _all_finite(updates: Any) -> jax.Array:
    checks = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates) if trees.is_trained(g)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones([], bool)


def _as_before(new: jax.Array, old: jax.Array) -> jax.Array:
    """A new state's array in the dtype it had at init; some of Optax's transformations let it drift."""
    return new if jnp.result_type(new) == jnp.result_type(old) else new.astype(old.dtype)


def _one_by_one(tree: Any) -> list[Any]:
    """For each leaf, the tree with `None` in place of all others."""
    leaves, structure = trees.leaves(tree), trees.structure(tree)
    return [
        jax.tree.unflatten(structure, [leaf if i == kept else None for i, leaf in enumerate(leaves)])
        for kept in range(len(leaves))
    ]


def _transpose(states: list[SkipNonfiniteState]) -> SkipNonfiniteState:
    return SkipNonfiniteState(*(tuple(getattr(state, field) for state in states) for field in SkipNonfiniteState._fields))
