"""Complete optimizers: chains of `adam_jax.transforms`, with the signatures of Optax. No arithmetic here."""

from collections.abc import Callable
from typing import Any, Literal

import optax
from jax.typing import ArrayLike

from adam_jax import scaling, transforms
from adam_jax.transforms import Decay, Kept

__all__ = ["adam", "adamax", "adamaxw", "adamw", "amsgrad", "nadam", "nadamw"]

Rate = ArrayLike | optax.Schedule
Mask = Any | Callable[[Any], Any] | None


def adam(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    *,
    nesterov: bool = False,
    nu_dtype: Kept = None,
    bias_correction: bool = True,
    eps_hat: bool = False,
    root: bool = False,
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
            b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov, bias_correction=bias_correction,
            eps_hat=eps_hat, root=root,
        ),
        scaling.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def adamw(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    nu_dtype: Kept = None,
    bias_correction: bool = True,
    eps_hat: bool = False,
    root: bool = False,
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
            b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov, bias_correction=bias_correction,
            eps_hat=eps_hat, root=root,
        ),
        scaling.add_decayed_weights(weight_decay, mask),
        scaling.scale_by_learning_rate(learning_rate),
    )  # fmt: skip


def nadam(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    *,
    nesterov: bool = True,
    nu_dtype: Kept = None,
    root: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam with Nesterov momentum (Dozat 2016). Arguments: `scale_by_adam`.

    Example:
        >>> tx = nadam(1e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.00147368]
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype, root=root)


def nadamw(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = True,
    nu_dtype: Kept = None,
    root: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Nadam with decoupled weight decay. Arguments: `scale_by_adam`, `add_decayed_weights`.

    Example:
        >>> tx = nadamw(1e-3, weight_decay=0.1)
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [-0.0001]
    """
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov, nu_dtype=nu_dtype, root=root
    )


def adamax(
    learning_rate: Rate = 2e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    mu_dtype: Kept = None,
    nu_dtype: Kept = None,
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
        transforms.scale_by_adamax(b1, b2, eps, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov),
        scaling.scale_by_learning_rate(learning_rate),
    )


def adamaxw(
    learning_rate: Rate = 2e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: Rate = 1e-4,
    mask: Mask = None,
    *,
    mu_dtype: Kept = None,
    nu_dtype: Kept = None,
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
        transforms.scale_by_adamax(b1, b2, eps, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov),
        scaling.add_decayed_weights(weight_decay, mask),
        scaling.scale_by_learning_rate(learning_rate),
    )


def amsgrad(
    learning_rate: Rate = 1e-3,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    nu_dtype: Kept = None,
    nesterov: bool = False,
    root: bool = False,
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
            b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu, nu_dtype=nu_dtype, nesterov=nesterov,
            root=root, max_of=max_of,
        ),
        scaling.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
