"""Complete optimizers: chains of `adam_jax.transforms`, with the signatures of Optax. No arithmetic here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, family, scaling
from adam_jax.choices import StoragePerLeaf
from adam_jax.transforms import Decay

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
    """Adam (Algorithm 1): a step is -learning_rate * mhat / (sqrt(vhat + eps_root) + eps).

    The one to begin with, at the paper's defaults; for weight decay take `adamw`.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment, in units of the gradients.
        eps_root: number or scalar >= 0 added inside the root, in units of the gradients squared.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        nesterov: use the next step's momentum (Dozat 2016).
        storage: how moments are kept: "float32" (or None; 8 bytes a parameter), "root" (float32, for gradients from 1e-36 to
            1e37), "bfloat16" (4 bytes), "int8" (2 bytes), a `Storage`, or a function from a leaf's path to one of those
            (`scale_by_adam`).
        bias_correction: divide the moments by their weight (Section 3).
        eps_hat: add eps to the uncorrected root, as TensorFlow and Keras do (Section 2's efficient order).

    Returns:
        An Optax transformation.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps.

    Example:
        >>> tx = adam(1e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.001]
    """
    step = family.scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype, storage=storage, nesterov=nesterov, bias_correction=bias_correction, eps_hat=eps_hat
    )
    return optax.chain(step, scaling.scale_by_learning_rate(learning_rate))


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
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): `adam`, less learning_rate * weight_decay * params.

    For models that overfit, and for most transformers. Biases and scales are often left out: `mask`.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment, in units of the gradients.
        eps_root: number or scalar >= 0 added inside the root, in units of the gradients squared.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        weight_decay: decoupled: a step also takes learning_rate * weight_decay * params; number, scalar array or schedule.
        mask: where to decay: a tree of booleans like the params, or a function from params to one; None for everywhere.
        nesterov: use the next step's momentum (Dozat 2016).
        storage: how moments are kept: "float32" (or None; 8 bytes a parameter), "root" (float32, for gradients from 1e-36 to
            1e37), "bfloat16" (4 bytes), "int8" (2 bytes), a `Storage`, or a function from a leaf's path to one of those
            (`scale_by_adam`).
        bias_correction: divide the moments by their weight (Section 3).
        eps_hat: add eps to the uncorrected root, as TensorFlow and Keras do (Section 2's efficient order).

    Returns:
        An Optax transformation; `update` needs the params.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps; from `update`, where the params are not given.

    Example:
        >>> tx = adamw(1e-3, weight_decay=0.1)
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [-0.0001]
    """
    step = family.scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype, storage=storage, nesterov=nesterov, bias_correction=bias_correction, eps_hat=eps_hat
    )
    decay = scaling.add_decayed_weights(weight_decay, mask)
    return optax.chain(step, decay, scaling.scale_by_learning_rate(learning_rate))


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
    """Adam with Nesterov momentum (Dozat 2016): `adam` with the first moment as it will be one step later.

    Where Adam is slow to turn: the newest gradient counts 1 + b1 times as much.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment, in units of the gradients.
        eps_root: number or scalar >= 0 added inside the root, in units of the gradients squared.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        nesterov: use the next step's momentum (Dozat 2016).
        storage: how moments are kept: "float32" (or None; 8 bytes a parameter), "root" (float32, for gradients from 1e-36 to
            1e37), "bfloat16" (4 bytes), "int8" (2 bytes), a `Storage`, or a function from a leaf's path to one of those
            (`scale_by_adam`).

    Returns:
        An Optax transformation.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps.

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
    """Nadam with decoupled weight decay: `nadam`, less learning_rate * weight_decay * params.

    For `nadam`'s uses, with `adamw`'s decay.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment, in units of the gradients.
        eps_root: number or scalar >= 0 added inside the root, in units of the gradients squared.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        weight_decay: decoupled: a step also takes learning_rate * weight_decay * params; number, scalar array or schedule.
        mask: where to decay: a tree of booleans like the params, or a function from params to one; None for everywhere.
        nesterov: use the next step's momentum (Dozat 2016).
        storage: how moments are kept: "float32" (or None; 8 bytes a parameter), "root" (float32, for gradients from 1e-36 to
            1e37), "bfloat16" (4 bytes), "int8" (2 bytes), a `Storage`, or a function from a leaf's path to one of those
            (`scale_by_adam`).

    Returns:
        An Optax transformation; `update` needs the params.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps; from `update`, where the params are not given.

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
    """AdaMax (Algorithm 2): a step is -learning_rate * mhat / u, with u = max(b2 u, |g| + eps).

    Where long steps must be ruled out: none is longer than 1.01 learning rates at the default decays (`adam`: 7.27). The
    paper's default learning rate is twice Adam's.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the infinity norm u, likewise.
        eps: number or scalar >= 0 added to |g| in the maximum, in units of the gradients.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        storage: how first moments and norms are kept: as `adam`'s; "float32" and "root" are the same.
        nesterov: use the next step's momentum (Dozat 2016).

    Returns:
        An Optax transformation.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps.

    Example:
        >>> tx = adamax(2e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.002]
    """
    return optax.chain(
        family.scale_by_adamax(b1, b2, eps, mu_dtype, storage=storage, nesterov=nesterov),
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
    """AdaMax with decoupled weight decay: `adamax`, less learning_rate * weight_decay * params.

    For `adamax`'s uses, with `adamw`'s decay.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the infinity norm u, likewise.
        eps: number or scalar >= 0 added to |g| in the maximum, in units of the gradients.
        weight_decay: decoupled: a step also takes learning_rate * weight_decay * params; number, scalar array or schedule.
        mask: where to decay: a tree of booleans like the params, or a function from params to one; None for everywhere.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        storage: how first moments and norms are kept: as `adam`'s; "float32" and "root" are the same.
        nesterov: use the next step's momentum (Dozat 2016).

    Returns:
        An Optax transformation; `update` needs the params.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps; from `update`, where the params are not given.

    Example:
        >>> tx = adamaxw(2e-3, weight_decay=0.1)
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
        >>> print(updates)
        [-0.0002]
    """
    return optax.chain(
        family.scale_by_adamax(b1, b2, eps, mu_dtype, storage=storage, nesterov=nesterov),
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
    """AMSGrad (Reddi et al. 2018): `adam` divided by the largest second moment so far.

    For streams on which Adam's steps grow back (notebook 7). **Not Optax's numbers by default**: the maximum is PyTorch's
    and Keras's, of uncorrected moments; `max_of="corrected"` is Optax's.

    Args:
        learning_rate: about how far a coordinate moves in a step while its gradient keeps its sign (the paper's alpha), in
            units of the params: number, scalar array or schedule of the count. A negative one climbs.
        b1: decay of the first moment in [0, 1), an average over about 1 / (1 - b1) steps: number, scalar array or schedule.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment, in units of the gradients.
        eps_root: number or scalar >= 0 added inside the root, in units of the gradients squared.
        mu_dtype: dtype of the first moments alone; `storage` is for both.
        bias_correction_mu: divide the first moment by its weight (Section 3).
        bias_correction_nu: the same for the second.
        storage: how moments are kept, as `adam`'s; the maximum adds 4, 2 (bfloat16) or 1 byte (int8) a parameter.
        nesterov: use the next step's momentum (Dozat 2016).
        eps_hat: add eps to the uncorrected root, as TensorFlow and Keras do (Section 2's efficient order).
        max_of: "raw", the maximum of uncorrected second moments, as in PyTorch and Keras; "corrected", that of corrected
            ones, as in Optax.

    Returns:
        An Optax transformation.

    Raises:
        ValueError: for a decay outside [0, 1) or a negative eps.

    Example:
        >>> tx = amsgrad(1e-3)
        >>> updates, _ = tx.update(jnp.array([5.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-0.001]
    """
    corrections: dict[str, Any] = {"bias_correction_mu": bias_correction_mu, "bias_correction_nu": bias_correction_nu}
    choices: dict[str, Any] = {"storage": storage, "nesterov": nesterov, "eps_hat": eps_hat, "max_of": max_of}
    step = family.scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, **corrections, **choices)
    return optax.chain(step, scaling.scale_by_learning_rate(learning_rate))
