"""The step of the Adam family over pytrees, once: a norm divides, two clocks weigh, a storage keeps.

`scale_by_norm` is Algorithm 1 for any norm; `scale_by_adam`, `scale_by_adamax`, `scale_by_lp` and `scale_by_amsgrad` are its
members, each a line. The arithmetic is in `moments`, what divides in `norms`, how moments are kept in `storage`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, clock, codes, moments, norms, trees
from adam_jax.clock import Tick
from adam_jax.norms import Norm
from adam_jax.storage import Choice, Codes, Kept, Limits, Moving, Storage, StorageLike, first_codes

__all__ = [
    "Decay",
    "ScaleByAdamState",
    "ScaleByAmsgradState",
    "StoragePerLeaf",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_lp",
    "scale_by_norm",
]

Decay = ArrayLike | optax.Schedule
StoragePerLeaf = StorageLike | Callable[[str], StorageLike]


class ScaleByAdamState(NamedTuple):
    """What the next step of Adam, AdaMax or L^p Adam needs.

    Attributes:
        count: int32 scalar, the number of updates made; saturates. At zero nothing else in the state counts: setting it to
            zero, as `adam_jax.surgery.restart` does, restarts.
        mu: first moments, a tree like the params: bias-corrected (the paper's mhat), raw where correction is off.
        nu: second moments, likewise (vhat), or what `form` says.
        mu_weight: scalar, the total weight of the gradients in `mu`, 1 - b1^t at a constant b1; raw m_t = mu * mu_weight.
        nu_weight: scalar, the same for `nu`.
        codes: `adam_jax.storage.Codes` where leaves may be narrow, else ().
        form: what `nu` is, v or its root or another norm, and how it is coded: a marker without arrays (`adam_jax.norms`).
    """

    count: ArrayLike
    mu: Any
    nu: Any
    mu_weight: jax.Array
    nu_weight: jax.Array
    codes: Any = ()
    form: Any = norms.Squares()


class ScaleByAmsgradState(NamedTuple):
    """`ScaleByAdamState` and `nu_max`, the largest second moment so far, in the order that `max_of` names."""

    count: ArrayLike
    mu: Any
    nu: Any
    nu_max: Any
    mu_weight: jax.Array
    nu_weight: jax.Array
    codes: Any = ()
    form: Any = norms.Squares()


class _Scalars(NamedTuple):
    """What one step needs besides arrays."""

    m: Tick  # of the first moment
    v: Tick  # of the second
    after: Tick  # of the first moment, one step later
    eps: ArrayLike


Ahead = Callable[..., jax.Array]  # (m, g, scalars, bounded) to the moment that the step is made from


def scale_by_norm(
    norm: Norm,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    mu_dtype: DTypeLike | None = None,
    storage: StoragePerLeaf = None,
    nesterov: bool = False,
    correct_mu: bool = True,
    correct_nu: bool = True,
    eps_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rescale gradients to mhat / (size + eps), where a norm says what the size of recent gradients is (Algorithm 1).

    Args:
        norm: a norm of `adam_jax.norms`, or one of your own.
        b1: decay of the first moment in [0, 1): number, scalar array or schedule of the count.
        b2: decay of the norm, likewise.
        eps: number or scalar >= 0 added to the size.
        mu_dtype: as `scale_by_adam`.
        storage: as `scale_by_adam`.
        nesterov: use the next step's momentum (Nadam, Dozat 2016).
        correct_mu: divide the first moment by its weight (Section 3).
        correct_nu: the same for the second.
        eps_hat: add eps to the uncorrected size.

    Returns:
        A transformation with state `ScaleByAdamState`, or `ScaleByAmsgradState` for a norm that keeps two arrays.

    Raises:
        ValueError: as `scale_by_adam`.

    Example:
        >>> tx = scale_by_norm(norms.Largest(norms.Infinity()))  # AMSGrad's maximum over AdaMax's norm
        >>> updates, _ = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [ 1. -1.]
    """
    checks.decay("b1", b1)
    checks.decay("b2", b2)
    checks.at_least("eps", eps, 0.0)
    for name, flag in {"nesterov": nesterov, "correct_mu": correct_mu, "correct_nu": correct_nu, "eps_hat": eps_hat}.items():
        checks.flag(name, flag)
    choice = Choice(storage, mu_dtype)
    norm = norm.rooted() if choice.rooted else norm
    form = norm.form(choice.codes)
    state_type = ScaleByAdamState if norm.slots == 1 else ScaleByAmsgradState
    ahead = _look_ahead if nesterov else _as_it_is

    def init(params: Any) -> Any:
        def empty(moment: int, at: trees.At, leaf: Any) -> jax.Array:
            leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
            return choice.new(at, leaf).empty(leaf, moments.accumulator_dtype(leaf.dtype), moment)

        mu, *nus = (trees.map_params(functools.partial(empty, i), params) for i in range(1 + norm.slots))
        trained = sum(not trees.is_absent(leaf) for leaf in jax.tree.leaves(mu))
        codes = first_codes(trained, norm.slots) if choice.narrow else ()
        return state_type(jnp.zeros([], jnp.int32), mu, *nus, jnp.zeros([]), jnp.zeros([]), codes, form)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        _check(state, state_type, form)
        count, mu, *nus, mu_weight, nu_weight, codes, _ = state
        rate1, rate2 = (clock.complement(clock.at(b, count)) for b in (b1, b2))
        m = clock.tick(rate1, mu_weight, count, corrected=correct_mu)
        v = norm.tick(rate2, nu_weight, count, corrected=correct_nu)
        next_rate = clock.complement(clock.at(b1, optax.safe_increment(jnp.asarray(count))))
        after = clock.tick(next_rate, m.weight, 1, corrected=correct_mu) if nesterov else m
        scale = clock.corrected_rate(1.0, norm.size_scale(v.weight)) if eps_hat and correct_nu else 1.0
        k = _Scalars(m, v, after, jnp.asarray(eps, jnp.result_type(m.weight)) * scale)
        limits = _limits(norm, codes, k, count) if choice.narrow else Limits()
        if choice.narrow:  # where nothing is kept, there are no windows
            codes = codes._replace(windows=jnp.where(jnp.asarray(count) <= 0, 0, codes.windows))
        leaves = _of_leaves(choice, mu, nus, codes)
        extremes: dict[int, jax.Array] = {}

        def step(at: trees.At, g: ArrayLike | None, *kept: jax.Array) -> tuple[Any, ...]:
            how, stream, windows = leaves[at.number]
            if g is None:  # a state that counts as empty is emptied here, too
                held = Kept(kept[0], kept[1:])
                held = jax.lax.cond(jnp.asarray(count) <= 0, lambda: how.emptied(held, True), lambda: held)
                return None, held.mu, *held.nus
            of_leaf = norm.rooted(coarse=True) if how.narrow else norm
            u, new = _leaf_step(
                how, ahead, of_leaf, jnp.asarray(g), Kept(kept[0], kept[1:], windows), k, limits, count, stream
            )
            extremes[at.number] = new.windows
            return u, new.mu, *new.nus

        updates, kept = trees.map_updates(step, updates, (mu, *nus), params, always=True)
        if choice.narrow:
            codes = codes.after(limits.mu, extremes, v.moved)
        return updates, state_type(optax.safe_increment(count), *kept, m.weight, v.weight, codes, form)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_leaves(choice: Choice, mu: Any, nus: list[Any], codes: Any) -> list[tuple[Storage, Any, Any]]:
    """How each trained leaf is kept, its sequence of draws and its windows.

    What differs between leaves comes in arrays from behind a barrier, or XLA on GPU would make it a constant of each kernel,
    and leaves of one shape could not share theirs.
    """
    columns = zip(trees.with_paths(mu), *map(jax.tree.leaves, nus), strict=True)
    there = [(trees.At(keys), Kept(leaf, tuple(rest))) for (keys, leaf), *rest in columns if not trees.is_absent(leaf)]
    how = [choice.old(at, kept) for at, kept in there]
    if not any(storage.rounds for storage in how):
        return [(storage, np.uint32(0), ()) for storage in how]
    streams = jnp.asarray(np.array([storage.stream(at) for storage, (at, _) in zip(how, there, strict=True)], np.uint32))
    data = [(streams[i], codes.windows[i] if choice.narrow else ()) for i in range(len(how))]
    return [(storage, *own) for storage, own in zip(how, jax.lax.optimization_barrier(data), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _leaf_step(
    how: Storage, ahead: Ahead, norm: Norm, g: jax.Array, kept: Kept, k: _Scalars, limits: Limits, count: jax.Array,
    stream: jax.Array,
) -> tuple[jax.Array, Kept]:  # fmt: skip
    """Algorithm 1 on one leaf. Jitted, so that leaves of one shape are traced once; all that differs between them is data."""
    wide = moments.accumulator_dtype(g.dtype, kept.mu.dtype)
    norm, k, limits = jax.tree.map(functools.partial(_cast, jnp.finfo(wide).dtype), (norm, k, limits))
    gradient = moments.saturate(g.astype(wide), norm.squares)
    kept = how.emptied(kept, count <= 0)
    m, nus = how.load(kept, wide, limits.ratios_before)
    m = norm.average(m, gradient, k.m.moved)
    moving = Moving(lambda g: norm.advance(nus, g, k.v), gradient, k.v.moved, stream, count, limits)
    kept, m, new = how.save(kept, m, moving)  # the step is that of the moments as they are kept
    m = ahead(m, gradient, k, functools.partial(how.bounded, size=new[0], limit=limits.ahead))
    return moments.direction(m, norm.size(new, k.v), k.eps).astype(g.dtype), kept


def _as_it_is(m: jax.Array, *_: Any) -> jax.Array:
    return m


def _look_ahead(m: jax.Array, g: jax.Array, k: _Scalars, bounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The first moment with the next step's momentum, b1_{t+1} (Dozat 2016, Algorithm 2)."""
    return bounded(moments.lookahead(m, g, k.m.moved, (1.0 - k.after.rate) * k.after.kept))


def _limits(norm: Norm, held: Codes, k: _Scalars, count: jax.Array) -> Limits:
    """What bounds the first moment after a step, whatever the gradients and the decays were, and the codes for it."""
    cast = functools.partial(_cast, jnp.result_type(k.m.weight))
    norm, before = jax.tree.map(cast, norm), jnp.where(count <= 0, 0.0, cast(held.bound))
    constant = norm.largest_ratio(k.m.rate, k.v.rate)
    bound = norm.next_ratio(before, k.m.moved, k.v)
    bound = jnp.where(jnp.isinf(constant), bound, jnp.maximum(bound, constant))
    spike = clock.corrected_rate(1.0, norm.shares(k.v)[1])
    ahead = (1.0 - k.after.rate) * k.after.kept * bound + k.m.moved * spike
    bound = bound.astype(held.bound.dtype)
    return Limits(bound, ahead, codes.ratios(held.bound), codes.ratios(bound))


def _cast(dtype: np.dtype, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(dtype)


def _check(state: Any, state_type: type, form: Any) -> None:
    if not isinstance(state, state_type):
        got, advice = type(state).__name__, ""
        if type(state).__module__.startswith("optax"):
            got, advice = f"Optax's {got}", ": adam_jax.interop.from_optax makes one of it"
        raise TypeError(f"state must be a {state_type.__name__}, as init makes it, got {got}{advice}")
    if jax.tree.structure(state.form) != jax.tree.structure(form):
        path = next((jax.tree_util.keystr(keys) for keys, _ in trees.with_paths(state.mu)), "")
        raise ValueError(
            f"storage must be as it was at init: the state keeps {state.form} from {path or 'the root'} on, but this "
            f"transformation {form}"
        )


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
        mu_dtype: dtype of the first moments alone, as in Optax: bfloat16 and float16 are rounded without bias; default float32,
            or the params' own where it is wider. For complex leaves it is the dtype of each part.
        storage: how both moments are kept: "float32" (or None), "root" (float32, sqrt(v) in place of v: exact for gradients from
            1e-36 to 1e37), "bfloat16" (4 bytes a parameter), "int8" (2 bytes; leaves of fewer than 4096 elements stay float32),
            a `Storage`, or a function from a leaf's path ("['encoder'][0].w") to one of those. Beside narrow leaves all second
            moments are roots.
        nesterov: use the next step's momentum (Nadam, Dozat 2016).
        bias_correction: divide the moments by their weight (Section 3). Off, the first update is (1-b1) / sqrt(1-b2).
        eps_hat: add eps to the uncorrected sqrt(v), as in Section 2's efficient order, TensorFlow and Keras.

    Returns:
        A transformation with state `ScaleByAdamState`. Updates have the gradients' dtype; arithmetic is float32 at least.
        Where v itself is kept gradients saturate at 1.3e19 (float32): v stays finite and the coordinate recovers.

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
        storage: how first moments and norms are kept, as `scale_by_adam`; "float32" and "root" are the same.
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
    norm = norms.Largest(norms.Square(_number(eps_root, "eps_root")), raw=max_of == "raw" and bias_correction_nu)
    return scale_by_norm(
        norm, b1, b2, eps, mu_dtype=mu_dtype, storage=storage, nesterov=nesterov, correct_mu=bias_correction_mu,
        correct_nu=bias_correction_nu, eps_hat=eps_hat,
    )  # fmt: skip


def _number(value: ArrayLike, name: str) -> ArrayLike | None:
    """A setting that is checked, and None for the number zero, which need not be computed with."""
    checks.at_least(name, value, 0.0)
    return None if isinstance(value, (int, float)) and value == 0 else value
