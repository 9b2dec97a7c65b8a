"""The members of the Adam family: `transforms.scale_by_norm` with the norm of each, and the arguments that Optax has."""

from __future__ import annotations

from typing import Literal

import optax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, norms
from adam_jax.choices import StoragePerLeaf
from adam_jax.transforms import Decay, scale_by_norm

__all__ = ["scale_by_adam", "scale_by_adamax", "scale_by_amsgrad", "scale_by_lp"]


@checks.did_you_mean
def scale_by_adam(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
    bias_correction: bool = True,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale gradients by Adam (Algorithm 1): mhat / (sqrt(vhat + eps_root) + eps).

    Step bounds (Section 2.1): |update| is 1 for a gradient of constant sign and size, and at most
    (1 - b1) / sqrt(1 - b2) = 3.16 for one that is non-zero at a single step, the paper's "most severe case". That is not
    the supremum over all histories: by Cauchy-Schwarz it is (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) = 7.27, approached
    by gradients that grow by a factor b2 / b1 each step (for b1^2 < b2; there is no bound otherwise).

    Args:
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the second moment.
        eps_root: number or scalar >= 0 added inside the root.
        mu_dtype: dtype of the first moments alone, as in Optax: bfloat16 and float16 are rounded without bias; default
            float32, or the params' own where it is wider. For complex leaves it is the dtype of each part.
        storage: how both moments are kept: "float32" (or None), "root" (float32, sqrt(v) in place of v: exact for gradients
            from 1e-36 to 1e37), "bfloat16" (4 bytes a parameter), "int8" (2 bytes; leaves of fewer than 4096 elements stay
            float32), a `Storage`, or a function from a leaf's path ("['encoder'][0].w") to one of those. Beside narrow
            leaves all second moments are roots. Derivatives pass the rounding of one step; through several steps with narrow
            moments they are an error.
        nesterov: use the next step's momentum (Nadam, Dozat 2016).
        bias_correction: divide the moments by their weight (Section 3). Off, the first update is (1-b1) / sqrt(1-b2).
        eps_hat: add eps to the uncorrected sqrt(v), as in Section 2's efficient order, TensorFlow and Keras.

    Returns:
        A transformation with state `ScaleByAdamState`. Updates have the gradients' dtype; arithmetic is float32 at least.
        Where v itself is kept gradients saturate at 1.3e19 (float32): v stays finite and the coordinate recovers. After a
        constant gradient changes to another, float32 steps stay off by up to 3e-5 at b2 = .999 and 3e-3 at .99999, twice
        that with roots (the docstring of `adam_jax.clock`); those of float64 params do not.

    Raises:
        ValueError: for a decay outside [0, 1), a negative eps or a dtype that cannot hold a moment; from `update`, for
            gradients that do not match the params, and for a state that is kept otherwise, with the path of the leaf.
        TypeError: from `update`, for the state of another transformation.

    Example:
        >>> tx = scale_by_adam()
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([3.0, -0.5])}, tx.init(params))
        >>> print(updates["w"])
        [ 1. -1.]
    """
    checks.flag("bias_correction", bias_correction)
    norm = norms.Square(_number(eps_root, "eps_root"))
    return scale_by_norm(
        norm, b1, b2, eps, mu_dtype=mu_dtype, storage=storage, nesterov=nesterov, correct_mu=bias_correction,
        correct_nu=bias_correction, eps_hat=eps_hat,
    )  # fmt: skip


@checks.did_you_mean
def scale_by_adamax(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by AdaMax (Algorithm 2): mhat / u with u = max(b2 u, |g| + eps).

    Args:
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the infinity norm, likewise.
        eps: number or scalar >= 0 added to |g| inside the maximum, as in Optax and PyTorch. At 0 a coordinate that has
            never had a gradient gets the update 0.
        mu_dtype: dtype of the first moments alone, as `scale_by_adam`.
        storage: how first moments and norms are kept, as `scale_by_adam`; "float32" and "root" are the same. The maximum
            keeps what int8 has rounded up: at constant gradients of unlike sizes steps are 15 % too small on average, those
            of an element up to half, from step 3 to 50; 5 % at step 300; at random gradients .5 % at most.
        nesterov: use the next step's momentum.
        bias_correction: divide the first moment by its weight. The norm needs none (its `nu_weight` is 1).

    Returns:
        A transformation with state `ScaleByAdamState`, where `nu` is the paper's u.

    Raises:
        ValueError: as `scale_by_adam`.

    Example:
        >>> tx = scale_by_adamax()
        >>> updates, _ = tx.update(jnp.array([0.0, -5.0]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [ 0. -1.]
    """
    checks.at_least("eps", eps, 0.0)
    checks.flag("bias_correction", bias_correction)
    return scale_by_norm(
        norms.Infinity(eps), b1, b2, 0.0, mu_dtype=mu_dtype, storage=storage, nesterov=nesterov, correct_mu=bias_correction
    )


@checks.did_you_mean
def scale_by_lp(
    p: ArrayLike,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: DTypeLike | None = None,
    *,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by the L^p generalisation of Adam (Section 7.1, eq. 6-7): mhat / (vhat^(1/p) + eps).

    v = b2^p v + (1 - b2^p) |g|^p, so p = 2 is Adam with decay b2^2 (the paper's parametrisation), and p to infinity is
    AdaMax. The state keeps v^(1/p), which neither overflows nor underflows at any p.

    Args:
        p: number or scalar >= 1.
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the norm *per step*, likewise; the average of p-th powers decays by b2^p.
        eps: number or scalar >= 0 added to the norm.
        mu_dtype: dtype of the first moments alone, as `scale_by_adam`.
        storage: how first moments and norms are kept, as `scale_by_adam`; "float32" and "root" are the same.
        nesterov: use the next step's momentum.
        bias_correction: divide both moments by their weight.

    Returns:
        A transformation with state `ScaleByAdamState`, where `nu` is v^(1/p).

    Raises:
        ValueError: for p < 1, and as `scale_by_adam`.

    Example:
        >>> tx = scale_by_lp(4.0)
        >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [1.]
    """
    checks.at_least("p", p, 1.0)
    checks.flag("bias_correction", bias_correction)
    return scale_by_norm(
        norms.Power(p), b1, b2, eps, mu_dtype=mu_dtype, storage=storage, nesterov=nesterov, correct_mu=bias_correction,
        correct_nu=bias_correction,
    )  # fmt: skip


@checks.did_you_mean
def scale_by_amsgrad(
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
    """Rescale gradients by AMSGrad (Reddi et al. 2018): Adam over the largest second moment so far.

    Args:
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the largest second moment.
        eps_root: number or scalar >= 0 added inside the root.
        mu_dtype: dtype of the first moments alone, as `scale_by_adam`.
        bias_correction_mu: divide the first moment by its weight.
        bias_correction_nu: correct the second moment, as `max_of` says.
        storage: how the moments and the maxima are kept, as `scale_by_adam`.
        nesterov: use the next step's momentum.
        eps_hat: add eps to the uncorrected root, as Keras does.
        max_of: "raw" takes the maximum of the uncorrected moments and corrects that (PyTorch, Keras); "corrected" takes the
            maximum of the corrected ones (Optax).

    Returns:
        A transformation with state `ScaleByAmsgradState`. Second derivatives by b2 overflow where gradients are beyond 1e18
        and the raw squares are kept; "root" is good to 1e30.

    Raises:
        ValueError: for an unknown `max_of`, and as `scale_by_adam`.

    Example:
        >>> tx = scale_by_amsgrad(max_of="corrected")
        >>> state = tx.init(jnp.zeros(1))
        >>> _, state = tx.update(jnp.array([2.0]), state)
        >>> _, state = tx.update(jnp.array([1.0]), state)
        >>> print(state.nu_max)
        [4.]
    """
    checks.one_of("max_of", max_of, ("raw", "corrected"))
    checks.flag("bias_correction_mu", bias_correction_mu)
    checks.flag("bias_correction_nu", bias_correction_nu)
    norm = norms.Largest(norms.Square(_number(eps_root, "eps_root")), raw=max_of == "raw" and bias_correction_nu)
    return scale_by_norm(
        norm, b1, b2, eps, mu_dtype=mu_dtype, storage=storage, nesterov=nesterov, correct_mu=bias_correction_mu,
        correct_nu=bias_correction_nu, eps_hat=eps_hat,
    )  # fmt: skip


def _number(value: ArrayLike, name: str) -> ArrayLike | None:
    """A setting that is checked, and None for the number zero, which need not be computed with."""
    checks.at_least(name, value, 0.0)
    return None if isinstance(value, (int, float)) and value == 0 else value
