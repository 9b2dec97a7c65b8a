"""Gradient transformations over pytrees: the arithmetic of `adam_jax.moments`, lifted once.

`scale_by_adam`, `scale_by_adamax`, `scale_by_lp` and `scale_by_amsgrad` differ in one thing: how the size of recent
gradients is measured. Each writes that down as two functions of one array, and `_scale_by_moments` does the rest: trees,
dtypes, decays, bias correction.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, codes, moments, storage, trees
from adam_jax.storage import Storage

__all__ = [
    "ScaleByAdamState",
    "ScaleByAmsgradState",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_lp",
]

Decay = ArrayLike | optax.Schedule
Leaf = jax.Array
Nus = tuple[Leaf, ...]
Keep = DTypeLike | Storage | None
Kept = Keep | Callable[[str], Keep]


class ScaleByAdamState(NamedTuple):
    """What the next step of Adam, AdaMax or L^p Adam needs.

    Attributes:
        count: int32 scalar, the number of updates made; saturates.
        mu: first moments, a tree like the params: bias-corrected (the paper's mhat), raw where correction is off.
        nu: second moments, likewise (vhat); with `root=True` their square roots, for AdaMax and L^p the norms u.
        mu_weight: scalar, the total weight of the gradients in `mu`, 1 - b1^t at a constant b1; raw m_t = mu * mu_weight.
        nu_weight: scalar, the same for `nu`.
        nu_window: int32[leaves, 1, 2], the windows of int8 codes (`adam_jax.storage`); `()` where no leaf can have one.
    """

    count: ArrayLike
    mu: Any
    nu: Any
    mu_weight: jax.Array
    nu_weight: jax.Array
    nu_window: Any = ()


class ScaleByAmsgradState(NamedTuple):
    """`ScaleByAdamState` and the largest second moment so far, in the order that `max_of` names."""

    count: ArrayLike
    mu: Any
    nu: Any
    nu_max: Any
    mu_weight: jax.Array
    nu_weight: jax.Array
    nu_window: Any = ()


class _Scalars(NamedTuple):
    """What one update needs besides the arrays; cast to the dtype of each leaf's arithmetic."""

    mu_rate: ArrayLike  # how far the first moment moves towards the gradient
    mu_keep: ArrayLike  # Nadam's share of the first moment, b1 w_t / w_{t+1}
    b1_rate: ArrayLike  # 1 - b1
    b2_rate: ArrayLike  # 1 - b2
    nu_rate: ArrayLike  # how far the second moment moves
    nu_kept: ArrayLike  # w_{t-1} / w_t
    nu_weight: ArrayLike  # w_t
    eps: ArrayLike
    eps_root: ArrayLike
    rounded: bool = False  # whether the second moments are going to be rounded


class _Size(NamedTuple):
    """How a member of the family measures the size of recent gradients, on one array."""

    advance: Callable[[Nus, Leaf, _Scalars], Nus]  # the second moments after one more gradient
    read: Callable[[Nus, _Scalars], Leaf] = lambda nus, _: nus[0]  # what the first moment is divided by, before eps
    rate: Callable[[ArrayLike], ArrayLike] = lambda b2_rate: b2_rate  # the weight of one more gradient
    root: Callable[[Leaf], Leaf] = lambda nu: nu  # the size that `nus[0]` stands for
    ratio: Callable[[_Scalars], ArrayLike] = lambda _: jnp.inf  # the most that |m| can be, in units of that size
    spike: Callable[[_Scalars], ArrayLike] = lambda _: jnp.inf  # and the most that the last |g| can be


def scale_by_adam(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    *,
    nu_dtype: Kept = None,
    nesterov: bool = False,
    bias_correction: bool = True,
    eps_hat: bool = False,
    root: bool = False,
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
        mu_dtype: how first moments are kept: a dtype, a `Storage`, or a function from a leaf's path to one of those; default
            float32, or the params' own where it is wider. For complex leaves it is the dtype of each part. bfloat16 is
            rounded without bias; int8 and float16 keep the ratio to the root second moment (`adam_jax.storage`).
        nu_dtype: how second moments are kept (real, also for complex leaves), likewise; other than float32 or wider, as
            their roots, as with `root=True`. Leaves of fewer than 4096 elements stay float32 beside int8.
        nesterov: use the next step's momentum (Nadam, Dozat 2016).
        bias_correction: divide the moments by their weight (Section 3). Off, the first update is (1-b1) / sqrt(1-b2).
        eps_hat: add eps to the uncorrected sqrt(v), as in Section 2's efficient order, TensorFlow and Keras.
        root: keep sqrt(v) instead of v: exact for gradients from 1e-36 to 1e37, at a little more arithmetic.

    Returns:
        A transformation with state `ScaleByAdamState`. Updates have the gradients' dtype; arithmetic is float32 at least.
        With `root=False` gradients saturate at 1.3e19 (float32): v stays finite and the coordinate recovers.

    Raises:
        ValueError: for a decay outside [0, 1), a negative eps or a dtype that cannot hold a moment; from `update`, for
            gradients that do not match the params, with the path of the leaf.

    Example:
        >>> tx = scale_by_adam()
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([3.0, -0.5])}, tx.init(params))
        >>> print(updates["w"])
        [ 1. -1.]
    """

    def advance(nus: Nus, g: Leaf, k: _Scalars) -> Nus:
        return (_next_moment(nus[0], g, k, rooted=root),)

    def read(nus: Nus, k: _Scalars) -> Leaf:
        return _root_of(nus[0], k.eps_root, rooted=root, plain=_is_zero(eps_root))

    checks.at_least("eps_root", eps_root, 0.0)
    root = root or storage.is_compact(nu_dtype)
    size = _Size(
        advance, read, root=lambda nu: nu if root else moments.root(nu), ratio=_cauchy_schwarz, spike=_largest_gradient
    )
    return _scale_by_moments(
        ScaleByAdamState, size, b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov=nesterov,
        correct_mu=bias_correction, correct_nu=bias_correction, eps_hat=eps_hat, squares=not root,
    )  # fmt: skip


def scale_by_adamax(
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 0.0,
    mu_dtype: Kept = None,
    *,
    nu_dtype: Kept = None,
    nesterov: bool = False,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients by AdaMax (Algorithm 2): mhat / u with u = max(b2 u, |g| + eps).

    Args:
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the infinity norm, likewise.
        eps: number or scalar >= 0 added to |g| inside the maximum, as in Optax and PyTorch. At 0 a coordinate that has
            never had a gradient gets the update 0.
        mu_dtype: dtype of the first moments; default float32, or the params' own where it is wider.
        nu_dtype: dtype of the infinity norms, likewise.
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

    def advance(nus: Nus, g: Leaf, k: _Scalars) -> Nus:
        return (moments.infinity_moment(nus[0], g, k.b2_rate, eps),)

    checks.at_least("eps", eps, 0.0)
    size = _Size(advance, rate=lambda _: 1.0, ratio=_largest_of_infinity, spike=lambda _: 1.0)
    return _scale_by_moments(
        ScaleByAdamState, size, b1, b2, 0.0, 0.0, mu_dtype, nu_dtype,
        nesterov=nesterov, correct_mu=bias_correction, correct_nu=False,
    )  # fmt: skip


def scale_by_lp(
    p: ArrayLike,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: Kept = None,
    *,
    nu_dtype: Kept = None,
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
        mu_dtype: dtype of the first moments; default float32, or the params' own where it is wider.
        nu_dtype: dtype of the norms, likewise.
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
    if storage.is_relative(mu_dtype) and not (isinstance(p, (int, float)) and p >= 2):
        raise ValueError(f"p must be a Python number >= 2 for mu_dtype={mu_dtype}, got {p}")

    def advance(nus: Nus, g: Leaf, k: _Scalars) -> Nus:
        log_keep = p * jnp.log1p(-jnp.asarray(k.b2_rate)) + jnp.log(k.nu_kept)
        return (moments.lp_moment(nus[0], g, p, k.nu_rate, log_keep),)

    return _scale_by_moments(
        ScaleByAdamState, _Size(advance, rate=lambda b2_rate: -jnp.expm1(p * jnp.log1p(-b2_rate))), b1, b2, eps, 0.0,
        mu_dtype, nu_dtype, nesterov=nesterov, correct_mu=bias_correction, correct_nu=bias_correction,
    )  # fmt: skip


def scale_by_amsgrad(
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
    """Rescale gradients by AMSGrad (Reddi et al. 2018): Adam over the largest second moment so far.

    Args:
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the second moment, likewise.
        eps: number or scalar >= 0 added to the root of the largest second moment.
        eps_root: number or scalar >= 0 added inside the root.
        mu_dtype: dtype of the first moments; default float32, or the params' own where it is wider.
        bias_correction_mu: divide the first moment by its weight.
        bias_correction_nu: correct the second moment, as `max_of` says.
        nu_dtype: dtype of the second moments and their maxima, likewise.
        nesterov: use the next step's momentum.
        root: keep roots of second moments, as in `scale_by_adam`.
        max_of: "raw" takes the maximum of the uncorrected moments and corrects that (PyTorch); "corrected" takes the
            maximum of the corrected ones (Optax).

    Returns:
        A transformation with state `ScaleByAmsgradState`.

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
    rescales = max_of == "raw" and bias_correction_nu

    def weight(k: _Scalars) -> ArrayLike:  # of the quantity whose maximum is kept
        return (jnp.sqrt(k.nu_weight) if root else k.nu_weight) if rescales else 1.0

    def advance(nus: Nus, g: Leaf, k: _Scalars) -> Nus:
        nu = _next_moment(nus[0], g, k, rooted=root)
        return nu, jnp.maximum(nus[1], nu * weight(k))

    def read(nus: Nus, k: _Scalars) -> Leaf:
        largest = nus[1] * moments.corrected_rate(1.0, weight(k))
        return _root_of(largest, k.eps_root, rooted=root, plain=_is_zero(eps_root))

    checks.at_least("eps_root", eps_root, 0.0)
    root = root or storage.is_compact(nu_dtype)
    size = _Size(advance, read, root=lambda nu: nu if root else moments.root(nu))
    if bias_correction_mu == bias_correction_nu:
        size = size._replace(ratio=_cauchy_schwarz, spike=_largest_gradient)
    elif storage.is_relative(mu_dtype):
        raise ValueError(f"bias_correction_mu and bias_correction_nu must be equal for mu_dtype={mu_dtype}")
    return _scale_by_moments(
        ScaleByAmsgradState, size, b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov=nesterov,
        correct_mu=bias_correction_mu, correct_nu=bias_correction_nu, squares=not root,
    )  # fmt: skip


def _scale_by_moments(
    state_type: Callable[..., Any],
    size: _Size,
    b1: Decay,
    b2: Decay,
    eps: ArrayLike,
    eps_root: ArrayLike,
    mu_dtype: Kept,
    nu_dtype: Kept,
    *,
    nesterov: bool,
    correct_mu: bool,
    correct_nu: bool,
    eps_hat: bool = False,
    squares: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The step that all members of the family share; `squares` says whether the gradient is going to be squared."""
    checks.decay("b1", b1)
    checks.decay("b2", b2)
    checks.at_least("eps", eps, 0.0)
    storage.check_choices(mu_dtype, nu_dtype)
    adaptive = 2 if state_type is ScaleByAmsgradState else 1

    def init_fn(params: Any) -> Any:
        mu = trees.map_params(lambda path, leaf: _zeros("mu_dtype", mu_dtype, path, leaf), params)
        nus = [
            trees.map_params(lambda path, leaf: _zeros("nu_dtype", nu_dtype, path, leaf).real, params)
            for _ in range(adaptive)
        ]
        windows = storage.first_windows(nu_dtype, len(jax.tree.leaves(mu)), adaptive)
        return state_type(jnp.zeros([], jnp.int32), mu, *nus, jnp.zeros([]), jnp.zeros([]), windows)

    def scalars(state: Any) -> tuple[_Scalars, jax.Array, jax.Array]:
        b1_rate = moments.complement(moments.at(b1, state.count))
        b2_rate = moments.complement(moments.at(b2, state.count))
        nu_rate = size.rate(b2_rate)
        mu_weight = moments.running_weight(state.mu_weight, b1_rate, state.count)
        nu_weight = moments.running_weight(state.nu_weight, nu_rate, state.count)
        k = _Scalars(b1_rate, 1.0 - b1_rate, b1_rate, b2_rate, nu_rate, 1.0, nu_weight, eps, eps_root)
        if correct_mu:
            next_weight = moments.average(mu_weight, 1.0, b1_rate)
            k = k._replace(
                mu_rate=moments.corrected_rate(b1_rate, mu_weight),
                mu_keep=(1.0 - b1_rate) * moments.corrected_rate(mu_weight, next_weight),
            )
        if correct_nu:
            first = state.nu_weight <= 0  # nothing is kept then, and any finite nu_kept will do
            k = k._replace(
                nu_rate=moments.corrected_rate(nu_rate, nu_weight),
                nu_kept=jnp.where(first, 1.0, moments.corrected_rate(state.nu_weight, nu_weight)),
            )
            if eps_hat:
                k = k._replace(eps=eps * moments.corrected_rate(1.0, moments.root(nu_weight)))
        return k, mu_weight, nu_weight

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        k, mu_weight, nu_weight = scalars(state)

        def step(g: ArrayLike, place: _Place, m: Leaf, *nus: Leaf) -> tuple[Any, ...]:
            wide = jnp.promote_types(moments.accumulator_dtype(jnp.result_type(g)), place.dtype)
            real = jnp.finfo(wide).dtype
            gradient = moments.saturate(jnp.asarray(g, wide), int(squares))
            kept = storage.kept_moments(mu_dtype, nu_dtype, place.path, m, nus, state.nu_window, place.number)
            kk = _Scalars(*(jnp.asarray(scalar, real) for scalar in k[:-1]), rounded=any(kept.storages[1:]))
            old = kept.second(real)
            toward = moments.small_average if kept.is_exact and not squares else moments.average
            mu = toward(kept.first(wide, size.root(old[0])), gradient, kk.mu_rate)
            if kept.is_exact:
                new = size.advance(old, gradient, kk)
                kept = kept.with_first(mu).with_second(new)
            else:  # the step is that of the moments as they are kept: the arrays before that are not written to memory
                apart = size.advance(old, storage.recomputed(gradient, state.count), kk)
                kept = kept.with_first(mu, size.root(apart[0]), state.count)
                kept = kept.with_second(size.advance(old, gradient, kk), kk.nu_rate, state.count)
                new = kept.second(real)
                mu = codes.within(kept.first(wide, size.root(new[0])), size.root(new[0]), size.ratio(kk))
            ahead = moments.lookahead(mu, gradient, kk.mu_rate, kk.mu_keep) if nesterov else mu
            if nesterov and not kept.is_exact:
                ahead = codes.within(ahead, size.root(new[0]), _largest_ahead(size, kk))
            u = moments.direction(ahead, size.read(new, kk), kk.eps)
            return u.astype(jnp.result_type(g)), dataclasses.replace(place, window=kept.window), kept.mu, *kept.nus

        columns = (_places(state.mu), *state[1 : 2 + adaptive])
        new_updates, (places, *new_trees) = trees.map_updates(step, updates, columns, params)
        windows = state.nu_window
        if len(windows):
            moved = jax.tree.leaves(places)
            windows = jnp.stack([windows[p.number] if p.window is None else p.window for p in moved])
        return new_updates, state_type(optax.safe_increment(state.count), *new_trees, mu_weight, nu_weight, windows)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What `trees` and `storage` need to know of a trained leaf; int8 moments do not tell that they are of one."""

    path: str
    number: int  # among the trained leaves
    shape: tuple[int, ...]
    dtype: np.dtype  # of the leaf's arithmetic
    window: jax.Array | None = None  # the new one


def _places(mu: Any) -> Any:
    numbers = itertools.count()

    def place(path: Any, m: Leaf) -> _Place:
        return _Place(trees.path_of(path), next(numbers), jnp.shape(m), moments.accumulator_dtype(m.dtype))

    return jax.tree_util.tree_map_with_path(place, mu)


def _cauchy_schwarz(k: _Scalars) -> ArrayLike:
    return codes.largest_ratio(k.b1_rate, k.b2_rate)


def _largest_gradient(k: _Scalars) -> ArrayLike:
    """1 / sqrt(rate), because v' >= rate |g|^2."""
    return jnp.sqrt(moments.corrected_rate(1.0, k.nu_rate))


def _largest_ahead(size: _Size, k: _Scalars) -> jax.Array:
    """The most that the look-ahead can be: none unless both of its parts have one, even if one of them counts zero."""
    ratio, spike = jnp.asarray(size.ratio(k)), jnp.asarray(size.spike(k))
    return jnp.where(jnp.isinf(ratio) | jnp.isinf(spike), jnp.inf, k.mu_keep * ratio + k.mu_rate * spike)


def _largest_of_infinity(k: _Scalars) -> ArrayLike:
    """(1 - b1) / (1 - b1 / b2): as `codes.largest_ratio`, from |m'| <= ((1 - a) C / b2 + a) u'."""
    b1_rate, b2_rate = jnp.asarray(k.b1_rate), jnp.asarray(k.b2_rate)
    room = 1.0 - (1.0 - b1_rate) / (1.0 - b2_rate)
    bounded = room > 0
    return jnp.where(bounded, b1_rate / jnp.where(bounded, room, 1.0), jnp.inf)


def _is_zero(value: ArrayLike) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _next_moment(nu: Leaf, g: Leaf, k: _Scalars, *, rooted: bool) -> Leaf:
    if rooted:
        return moments.root_second_moment(nu, g, k.nu_rate, rounded=k.rounded)
    return moments.second_moment(nu, g, k.nu_rate)


def _root_of(nu: Leaf, eps_root: ArrayLike, *, rooted: bool, plain: bool) -> Leaf:
    """sqrt(v + eps_root) where `nu` is v, or its root; `plain` says that eps_root is the number zero."""
    if not rooted:
        return moments.root(nu + eps_root)
    return nu if plain else moments.root_plus(nu, eps_root)


def _zeros(name: str, choice: Kept, path: str, leaf: Any) -> jax.Array:
    """What is kept of a moment of zero: float32 at least, or as chosen; of complex leaves `choice` is each part's dtype."""
    wide = moments.accumulator_dtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))
    keep = storage.chosen(choice, path, second=name == "nu_dtype")
    is_complex = jnp.issubdtype(wide, jnp.complexfloating)
    if is_complex and isinstance(keep, Storage):
        raise ValueError(f"{name} must be float32 or float64 for the complex leaf at {path or 'the root'}, got {keep.dtype}")
    if isinstance(keep, np.dtype):
        real = jnp.finfo(keep).dtype
        keep = jnp.promote_types(real, jnp.complex64) if is_complex else real
    return storage.zeros(keep, leaf, wide)
