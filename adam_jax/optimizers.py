"""Complete optimizers: chains of `adam_jax.transforms`, with the signatures of Optax. No arithmetic here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, scaling, transforms
from adam_jax.transforms import Decay, StoragePerLeaf

__all__ = ["adam", "adamax", "adamaxw", "adamw", "amsgrad", "nadam", "nadamw"]

Rate = ArrayLike | optax.Schedule
Mask = Any | Callable[[Any], Any] | None


@checks.did_you_mean
def adam(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    storage: StoragePerLeaf = None,
    bias_correction: bool = True,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam (Algorithm 1, whose default learning rate is .001). Arguments: `scale_by_adam`.

    Example:
        >>> tx = adam(1e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.001]
    """
    return optax.chain(
        transforms.scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, storage=storage, nesterov=nesterov, bias_correction=bias_correction,
            eps_hat=eps_hat,
        ),
        scaling.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


@checks.did_you_mean
def adamw(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    storage: StoragePerLeaf = None,
    bias_correction: bool = True,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019). Arguments: `scale_by_adam`, `add_decayed_weights`.

    Example:
        >>> tx = adamw(1e-3, weight_decay=0.1)
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [-0.0001]
    """
    return optax.chain(
        transforms.scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, storage=storage, nesterov=nesterov, bias_correction=bias_correction,
            eps_hat=eps_hat,
        ),
        scaling.add_decayed_weights(weight_decay, mask),
        scaling.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


@checks.did_you_mean
def nadam(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = True,
    storage: StoragePerLeaf = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with Nesterov momentum (Dozat 2016). Arguments: `scale_by_adam`.

    Example:
        >>> tx = nadam(1e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.00147368]
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, storage=storage)


@checks.did_you_mean
def nadamw(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    storage: StoragePerLeaf = None,
) -> optax.GradientTransformationExtraArgs:
    """Nadam with decoupled weight decay. Arguments: `scale_by_adam`, `add_decayed_weights`.

    Example:
        >>> tx = nadamw(1e-3, weight_decay=0.1)
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [-0.0001]
    """
    return adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov, storage=storage)


@checks.did_you_mean
def adamax(
    learning_rate: Rate = 2e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax (Algorithm 2, whose default learning rate is .002). Arguments: `scale_by_adamax`.

    Example:
        >>> tx = adamax(2e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.002]
    """
    return optax.chain(
        transforms.scale_by_adamax(b1, b2, eps, mu_dtype, storage=storage, nesterov=nesterov),
        scaling.scale_by_learning_rate(learning_rate),
    )


@checks.did_you_mean
def adamaxw(
    learning_rate: Rate = 2e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    mu_dtype: DTypeLike | None = None,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdaMax with decoupled weight decay. Arguments: `scale_by_adamax`, `add_decayed_weights`.

    Example:
        >>> tx = adamaxw(2e-3, weight_decay=0.1)
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [-0.0002]
    """
    return optax.chain(
        transforms.scale_by_adamax(b1, b2, eps, mu_dtype, storage=storage, nesterov=nesterov),
        scaling.add_decayed_weights(weight_decay, mask),
        scaling.scale_by_learning_rate(learning_rate),
    )


@checks.did_you_mean
def amsgrad(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
    eps_hat: bool = False,
    max_of: Literal["raw", "corrected"] = "raw",
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad (Reddi et al. 2018), in PyTorch's order unless `max_of="corrected"`. Arguments: `scale_by_amsgrad`.

    Example:
        >>> tx = amsgrad(1e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.001]
    """
    return optax.chain(
        transforms.scale_by_amsgrad(
            b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu, storage=storage, nesterov=nesterov,
            eps_hat=eps_hat, max_of=max_of,
        ),
        scaling.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
