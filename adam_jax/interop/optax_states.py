"""States of Optax's Adam and AMSGrad, which keep raw moments, and the largest of corrected ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax import checks, trees
from adam_jax.interop import raw

__all__ = ["from_optax", "to_optax"]


def from_optax(
    state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    where: str | None = None,
) -> optax.OptState:
    """Go on from a state of Optax's Adam: a state of `tx` after as many steps, with the same moments.

    Args:
        state: a state with an `optax.ScaleByAdamState` inside, of `optax.adam`, `adamw`, `nadam` or `adamax`, or with a
            `ScaleByAmsgradState` of `optax.amsgrad`, which is `amsgrad(max_of="corrected")`.
        tx: a transformation of this library with an Adam inside, in whatever storage, that corrects the bias.
        params: the params.
        b1: the decay of the first moments that Optax was given: its state does not say.
        b2: that of the second moments.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them. The others
            start anew; `surgery.read_moments` and `write_moments` put several into one state.

    Returns:
        A state of `tx`. Counts of schedules are set; averages of params, residuals and gradients that are being
        accumulated start anew.

    Raises:
        ValueError: if either state holds no Adam, or several and `where` does not choose one; for moments of another shape
            than the params; for AMSGrad on one side; for decays outside [0, 1).

    Example:
        >>> from adam_jax import scale_by_adam
        >>> params, gradients = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -2.0])}
        >>> _, state = optax.adam(0.1).update(gradients, optax.adam(0.1).init(params))
        >>> tx = optax.scale_by_adam()
        >>> print(to_optax(from_optax(state, scale_by_adam(), params), tx, params).mu["w"])
        [ 0.1 -0.2]
    """
    checks.decay("b1", b1)
    checks.decay("b2", b2)
    found = raw.chosen(state, raw.OPTAXS, where)
    largest = getattr(found, "nu_max", None)
    return raw.started(
        raw.fresh(tx, params, where, state), int(found.count), (b1, b2), found.mu, found.nu, largest, max_of="corrected"
    )


def to_optax(state: Any, optax_tx: optax.GradientTransformation, params: Any, *, where: str | None = None) -> optax.OptState:
    """Go back to Optax: a state of `optax_tx` after as many steps, with the same moments.

    Args:
        state: a state of this library with an Adam inside, of a transformation that corrects the bias.
        optax_tx: `optax.adam`, `adamw`, `nadam`, `adamax`, `amsgrad`, or a chain with one inside.
        params: the params.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them.

    Returns:
        A state of `optax_tx`.

    Raises:
        ValueError: if either state holds no Adam, or several and `where` does not choose one; for AMSGrad on one side, or
            of uncorrected moments.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> print(to_optax(scale_by_adam().init(jnp.zeros(1)), optax.adam(0.1), jnp.zeros(1))[0].mu)
        [0.]
    """
    fresh = optax_tx.init(params)
    held = raw.dense(state, where, fresh, max_of="corrected")
    old = raw.chosen(fresh, raw.OPTAXS, where)
    raw.check_largest(given=held.nu_max is not None, wanted=hasattr(old, "nu_max"))
    columns = {"mu": held.mu, "nu": held.nu} | ({} if held.nu_max is None else {"nu_max": held.nu_max})
    new = {name: _like(getattr(old, name), tree) for name, tree in columns.items()}
    count = jnp.asarray(held.count, jnp.int32)
    return raw.begun(raw.Fresh(fresh, old._replace(count=count, **new)), old, held.count)


def _like(old: Any, new: Any) -> Any:
    """Arrays in the place of Optax's, where these are."""

    def take(keys: Any, old: Any, x: Any) -> Any:
        if trees.is_absent(old):
            return old
        if np.shape(x) != old.shape:
            raise ValueError(
                f"optax_tx must be for the same params, got {old.shape} for {np.shape(x)} at {raw.path_of(keys)}"
            )
        return raw.in_place_of(old, jnp.asarray(x, old.dtype))

    return jax.tree_util.tree_map_with_path(take, old, new, is_leaf=trees.is_absent)
