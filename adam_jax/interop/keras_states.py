"""States of Keras 3's Adam and AdamW, which keep raw moments, and with `amsgrad` the largest of raw ones."""

from __future__ import annotations

from typing import Any

import jax
import optax

from adam_jax.interop import raw

__all__ = ["from_keras"]


def from_keras(
    optimizer: Any, tx: optax.GradientTransformation, params: Any, *, order: Any, where: str | None = None
) -> optax.OptState:
    """Go on from Keras 3's Adam or AdamW, with or without `amsgrad`; Keras adds eps to the uncorrected root: `eps_hat=True`.

    Args:
        optimizer: a built `keras.optimizers.Adam` or `AdamW`.
        tx: a transformation of this library with an Adam inside, in whatever storage, that corrects the bias.
        params: the params here.
        order: a tree like the params: of each, its position in `optimizer`'s trainable variables; any number for a param
            that the Adam of `tx` does not train.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them. The others
            start anew; `surgery.read_moments` and `write_moments` put several into one state.

    Returns:
        A state of `tx`, as from `from_torch`.

    Raises:
        ValueError: for another optimizer (Keras' Adamax adds eps outside the maximum), and as `from_torch`.

    Example:
        >>> from adam_jax import scale_by_adam
        >>> class Adam:  # stands for a keras.optimizers.Adam
        ...     iterations, beta_1, beta_2, amsgrad = 1, 0.9, 0.999, False
        ...     _momentums, _velocities = [jnp.array([0.1])], [jnp.array([0.001])]
        >>> print(from_keras(Adam(), scale_by_adam(eps_hat=True), jnp.zeros(1), order=0).mu)
        [1.]
    """
    name = type(optimizer).__name__
    if name not in ("Adam", "AdamW"):
        raise ValueError(f"optimizer must be Keras' Adam or AdamW, got {name}{raw.REFUSED.get(name, '')}")
    fresh = raw.fresh(tx, params, where)
    placed = raw.positions(order, params, fresh.adam)

    def tree(variables: Any) -> Any:
        def pick(keys: Any, position: int) -> Any:
            return raw.array(variables[position]) if raw.path_of(keys) in placed else None

        return jax.tree_util.tree_map_with_path(pick, order)

    first, second = tree(optimizer._momentums), tree(optimizer._velocities)
    largest = tree(optimizer._velocity_hats) if optimizer.amsgrad else None
    count, decays = int(raw.array(optimizer.iterations)), (float(optimizer.beta_1), float(optimizer.beta_2))
    return raw.started(fresh, count, decays, first, second, largest, max_of="raw")
