"""The step of the Adam family over pytrees, once: a norm divides, two clocks weigh, a storage keeps.

`scale_by_norm` is Algorithm 1 for any norm, and `family` has its members. The arithmetic is in `moments`, what divides in
`norms`, how moments are kept in `storage`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from adam_jax import checks, clock, codes, moments, norms, rounding, straight_through, trees
from adam_jax.choices import Choice, StoragePerLeaf
from adam_jax.clock import Tick
from adam_jax.norms import Norm
from adam_jax.storage import Codes, Kept, Limits, Moving, Storage, first_codes

__all__ = ["Decay", "ScaleByAdamState", "ScaleByAmsgradState", "scale_by_norm"]

Decay = ArrayLike | optax.Schedule


class ScaleByAdamState(NamedTuple):
    """What the next step of Adam, AdaMax or L^p Adam needs.

    Attributes:
        count: int32 scalar, the number of updates made; from 2^31 - 1 on it stays within 2^16 of that. At zero nothing else
            in the state counts: setting it to zero, as `adam_jax.surgery.restart` does, restarts.
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

    moved: ArrayLike  # how far the first moment moves
    v: Tick  # the second moment's clock
    keeps: Any  # what a step without a gradient would leave of the first moment, for Nadam's look-ahead
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
    norm = jax.tree.map(moments.floating, norm.rooted() if choice.rooted else norm)
    state_type: Any = ScaleByAdamState if norm.slots == 1 else ScaleByAmsgradState
    ahead = _look_ahead if nesterov else _as_it_is

    def init(params: Any) -> Any:
        mu, *nus = (_empty(choice, i, params) for i in range(1 + norm.slots))
        trained = sum(not trees.is_absent(leaf) for leaf in jax.tree.leaves(mu))
        codes = first_codes(trained, norm.slots) if choice.narrow else ()
        form = norm.form(choice.codes(mu))
        return state_type(jnp.zeros([], jnp.int32), mu, *nus, jnp.zeros([]), jnp.zeros([]), codes, form)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        _check(state, state_type, lambda mu: norm.form(choice.codes(mu)))
        count, mu, *nus, _, _, codes, form = state
        m, v = _ticks(norm, b1, b2, state, correct_mu=correct_mu, correct_nu=correct_nu)
        keeps = _keeps(b1, m, count, correct_mu=correct_mu) if nesterov else None
        scale = clock.corrected_rate(1.0, norm.size_scale(v.weight)) if eps_hat and correct_nu else 1.0
        k = _Scalars(m.moved, v, keeps, jnp.asarray(eps, jnp.result_type(m.weight)) * scale)
        limits = _limits(norm, codes, m, v, count) if choice.narrow else None
        empty, turn = jnp.asarray(count) <= 0, rounding.turn(count)
        if choice.narrow:  # where nothing is kept, there are no windows
            codes = codes._replace(windows=jnp.where(empty, 0, codes.windows))
        leaves = _of_leaves(choice, mu, nus, codes, jnp.asarray(count))
        extremes: dict[int, Any] = {}

        def step(at: trees.At, g: ArrayLike | None, *kept: jax.Array) -> tuple[Any, ...]:
            how, stream, old = leaves[at.number]
            if g is None:  # a state that counts as empty is emptied here, too
                held = Kept(kept[0], kept[1:])
                held = lax.cond(empty, lambda: how.emptied(held, True), lambda: held)
                return None, held.mu, *held.nus
            if how.rounds:
                trees.check_whole(at, jnp.asarray(g))
            of_leaf = norm.rooted(coarse=True) if how.narrow else norm
            u, new = _jitted(how, ahead)(of_leaf, jnp.asarray(g), old, k, limits, empty, turn, stream)
            extremes[at.number] = new.found
            return u, new.mu, *new.nus

        updates, kept = trees.map_updates(step, updates, (mu, *nus), params, always=True)
        if limits is not None:
            codes = codes.after(limits.mu, extremes, v.moved, empty)
        return updates, state_type(clock.next_count(count), *kept, m.weight, v.weight, codes, form)

    return optax.GradientTransformationExtraArgs(init, update)


def _empty(choice: Choice, moment: int, params: Any) -> Any:
    """A tree like the params of what is kept of moments of zero."""

    def empty(at: trees.At, leaf: Any) -> jax.Array:
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        return choice.new(at, leaf).empty(leaf, moments.accumulator_dtype(leaf.dtype), moment)

    return trees.map_params(empty, params)


def _ticks(norm: Norm, b1: Decay, b2: Decay, state: Any, *, correct_mu: bool, correct_nu: bool) -> tuple[Tick, Tick]:
    """The clocks of the first and of the second moment in one step."""
    count = state.count
    rate1, rate2 = (clock.complement(clock.at(b, count)) for b in (b1, b2))
    m = clock.tick(rate1, state.mu_weight, count, corrected=correct_mu)
    return m, norm.tick(rate2, state.nu_weight, count, corrected=correct_nu)


def _keeps(b1: Decay, m: Tick, count: ArrayLike, *, correct_mu: bool) -> jax.Array:
    """What one more step, without a gradient, would leave of the first moment."""
    after = clock.tick(clock.complement(clock.at(b1, clock.next_count(count))), m.weight, 1, corrected=correct_mu)
    return (1.0 - after.rate) * after.kept


def _of_leaves(choice: Choice, mu: Any, nus: list[Any], held: Any, count: jax.Array) -> list[tuple[Storage, Any, Kept]]:
    """How each trained leaf is kept, its sequence of draws, and what is kept of it.

    What differs between leaves comes in arrays from behind a barrier, or XLA on GPU would make it a constant of each kernel,
    and leaves of one shape could not share theirs.
    """
    columns = zip(trees.with_paths(mu), *map(jax.tree.leaves, nus), strict=True)
    there = [(trees.At(keys), Kept(leaf, tuple(rest))) for (keys, leaf), *rest in columns if not trees.is_absent(leaf)]
    how = [choice.old(at, kept) for at, kept in there]
    if not any(storage.rounds for storage in how):
        return [(storage, np.uint32(0), kept) for storage, (_, kept) in zip(how, there, strict=True)]
    streams = np.array([storage.stream(at) for storage, (at, _) in zip(how, there, strict=True)], np.uint32)
    data = _as_data([streams, codes.scale(held.windows)] if choice.narrow else [streams], count)
    opened = iter(straight_through.opened([kept for storage, (_, kept) in zip(how, there, strict=True) if storage.rounds]))
    found = []
    for storage, (_, kept), (stream, *scales) in zip(how, there, data, strict=True):
        kept = next(opened) if storage.rounds else kept
        found.append((storage, stream, kept._replace(scales=scales[0]) if storage.windowed else kept))
    return found


def _as_data(arrays: list[Any], count: jax.Array) -> list[tuple[jax.Array, ...]]:
    """The elements of arrays along their first axis, from where XLA does not look for their values.

    That is behind a barrier, or on CPU, which drops barriers, in a branch.
    """

    def each(arrays: Any) -> list[tuple[jax.Array, ...]]:
        return [tuple(lax.index_in_dim(x, i, keepdims=False) for x in arrays) for i in range(len(arrays[0]))]

    def branch(count: jax.Array, *arrays: jax.Array) -> list[Any]:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(each, arrays))
        return lax.cond(count < 0, lambda: zeros, lambda: each(arrays))

    def barrier(_: jax.Array, *arrays: jax.Array) -> list[Any]:
        return lax.optimization_barrier(each(arrays))

    return lax.platform_dependent(count, *arrays, cpu=branch, default=barrier)


@functools.lru_cache
def _jitted(how: Storage, ahead: Ahead) -> Callable[..., tuple[jax.Array, Kept]]:
    """`_leaf_step`, so that leaves of one shape are traced once; each call costs two fifths more with static arguments."""
    return jax.jit(functools.partial(_leaf_step, how, ahead))


def _leaf_step(
    how: Storage, ahead: Ahead, norm: Norm, g: jax.Array, kept: Kept, k: _Scalars, limited: Limits | None, empty: jax.Array,
    turn: jax.Array, stream: jax.Array,
) -> tuple[jax.Array, Kept]:  # fmt: skip
    """Algorithm 1 on one leaf; what differs between leaves of one shape is data."""
    # jnp's functions are jitted each by itself, and would be traced once a shape; loops in codes of one's own stay loops
    with contextlib.nullcontext() if how.is_own else jax.disable_jit():
        wide, limits = moments.accumulator_dtype(g.dtype, kept.mu.dtype), limited or Limits()
        norm, k, limits = jax.tree.map(functools.partial(_cast, jnp.finfo(wide).dtype), (norm, k, limits))
        gradient = moments.saturate(g.astype(wide), norm.squares)
        kept = kept._replace(scales=_elements(kept.scales))
        m, nus = how.load(kept, wide, limits.ratios_before, empty=empty)
        m = norm.average(m, gradient, k.moved)
        moving = Moving(lambda g: norm.advance(nus, g, k.v), gradient, k.v.moved, stream, turn, limits)
        kept, m, new = how.save(kept, m, moving)  # the step is that of the moments as they are kept
        m = ahead(m, gradient, k, functools.partial(how.bounded, size=new[0], limit=limits.gradient))
        return moments.direction(m, norm.size(new, k.v), k.eps).astype(g.dtype), kept


def _elements(x: Any) -> list[list[jax.Array]]:
    """The elements of a matrix."""
    at = [[(i, j) for j in range(x.shape[1])] for i in range(len(x))]
    return [[lax.squeeze(lax.slice(x, (i, j), (i + 1, j + 1)), (0, 1)) for i, j in row] for row in at]


def _as_it_is(m: jax.Array, *_: Any) -> jax.Array:
    return m


def _look_ahead(m: jax.Array, g: jax.Array, k: _Scalars, bounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The first moment with the next step's momentum, b1_{t+1} (Dozat 2016, Algorithm 2)."""
    return moments.lookahead(m, bounded(g), k.moved, k.keeps)


def _limits(norm: Norm, held: Codes, m: Tick, v: Tick, count: jax.Array) -> Limits:
    """What bounds the first moment after a step and its gradient, whatever came before, and the codes of the moment."""
    cast = functools.partial(_cast, jnp.result_type(m.weight))
    norm, before = jax.tree.map(cast, norm), jnp.where(count <= 0, 0.0, cast(held.bound))
    constant = norm.largest_ratio(m.rate, v.rate)
    bound = norm.next_ratio(before, m.moved, v)
    bound = jnp.where(jnp.isinf(constant), bound, jnp.maximum(bound, constant))
    most, bound = norm.most_of_gradient(v), bound.astype(held.bound.dtype)
    return lax.stop_gradient(Limits(bound, most, codes.ratios(held.bound), codes.ratios(bound)))


def _cast(dtype: np.dtype, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x if x.dtype == dtype or jnp.issubdtype(x.dtype, jnp.integer) else x.astype(dtype)


def _check(state: Any, state_type: type, form_of: Callable[[Any], Any]) -> None:
    if not isinstance(state, state_type):
        got, advice = type(state).__name__, ""
        if type(state).__module__.startswith("optax"):
            got, advice = f"Optax's {got}", ": adam_jax.interop.from_optax makes one of it"
        raise TypeError(f"state must be a {state_type.__name__}, as init makes it, got {got}{advice}")
    form = form_of(state.mu)
    if jax.tree.structure(state.form) != jax.tree.structure(form):
        path = next((jax.tree_util.keystr(keys) for keys, _ in trees.with_paths(state.mu)), "")
        name = "max_of" if isinstance(state.form, type(form)) != isinstance(form, type(state.form)) else "storage"
        raise ValueError(
            f"{name} must be as it was at init: the state keeps {state.form} from {path or 'the root'} on, but this "
            f"transformation {form}"
        )
