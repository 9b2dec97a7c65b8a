"""What Adam is doing, read from its state: the quantities the paper reasons with (Sections 2.1 and 3).

`watch_adam(...)` returns a function of a state. That function is pure, makes one pass over each moment, and can be jitted
with the step, stacked by `lax.scan` or called every hundredth step; nothing is stored in the state for it.

Everything is measured in float32. Sums of squares, and so norms and cosines, are those of numbers from 1e-19 to 1e19.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_jax import checks, clock, moments, norms, trees
from adam_jax.choices import StoragePerLeaf
from adam_jax.faults import SkipNonfiniteState
from adam_jax.transforms import Decay, ScaleByAdamState, ScaleByAmsgradState
from adam_jax.watch.leaves import WatchedLeaf, watched_leaves
from adam_jax.watch.sums import SNR_EDGES, Sums, ToSteps, add, leaf_sums

#: Levels of `Measurements.snr_quantiles`.
SNR_LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])


class Measurements(NamedTuple):
    """One leaf, or all of them together. All scalars are float32; shares are of all coordinates.

    Attributes:
        size: number of coordinates.
        snr_mean: mean signal-to-noise ratio |mhat| / sqrt(vhat) of the live coordinates, those with v > 0.
        snr_quantiles: [5] at `SNR_LEVELS`, interpolated in the histogram: within a factor 1.42 of the true ones, but for
            those below `SNR_EDGES[0]` = 0.004, of which no more is known.
        snr_histogram: [24] counts of live coordinates: below `SNR_EDGES[0]`, between neighbouring edges, above the last.
        step_rms: root mean square of the effective step |Delta| = learning_rate |mhat| / (sqrt(vhat) + eps).
        step_max: the largest effective step.
        at_alpha: share of coordinates whose step is at least .99 learning_rate.
        at_bound: share whose step is at least .99 of the paper's bound.
        eps_dominated: share with sqrt(vhat) < eps, where the step is no longer invariant to the gradients' scale.
        dead: share with v = 0: no gradient yet, or one too small for the state.
        nonfinite: number of coordinates with a NaN or infinity in a moment; the other numbers leave them out.
        mu_norm: Euclidean norm of mhat.
        nu_norm: Euclidean norm of sqrt(vhat), or of the norm that stands for it.
        gradient_norm: of the gradients, where given.
        cosine: between mhat and the gradients, where given; 0 where either is zero.
        param_norm: of the params, where given.
        update_norm: of the updates, where given.
        update_ratio: norm of the step (the updates, if given) over the norm of the params, where those are given.
    """

    size: jax.Array
    snr_mean: jax.Array
    snr_quantiles: jax.Array
    snr_histogram: jax.Array
    step_rms: jax.Array
    step_max: jax.Array
    at_alpha: jax.Array
    at_bound: jax.Array
    eps_dominated: jax.Array
    dead: jax.Array
    nonfinite: jax.Array
    mu_norm: jax.Array
    nu_norm: jax.Array
    gradient_norm: jax.Array | None = None
    cosine: jax.Array | None = None
    param_norm: jax.Array | None = None
    update_norm: jax.Array | None = None
    update_ratio: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaves(Mapping[str, Measurements]):
    """The measurements of each leaf, by path: a mapping, and a pytree whose arrays hold all leaves along one axis.

    Attributes:
        measured: `Measurements` with one more axis, the leaves: the last of the scalars, the last but one of the others.
        paths: the leaves' paths, in that order.
    """

    measured: Measurements
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, path: str) -> Measurements:
        if path not in self.paths:
            raise KeyError(path)
        i = self.paths.index(path)
        vectors = {"snr_quantiles": self.measured.snr_quantiles, "snr_histogram": self.measured.snr_histogram}
        scalars = jax.tree.map(lambda x: x[..., i], self.measured._replace(**dict.fromkeys(vectors)))
        return scalars._replace(**{name: x[..., i, :] for name, x in vectors.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


class Diagnostics(NamedTuple):
    """What `watch_adam` reads from a state.

    Attributes:
        count: int32 scalar, the number of updates made.
        mu_weight: scalar, the weight of the first average, 1 - b1^t at a constant b1.
        nu_weight: scalar, the same for the second.
        learning_rate: scalar, the step size alpha in which the steps are expressed.
        bound: scalar, Section 2.1's bound on |Delta|: alpha max(1, (1 - b1) / sqrt(1 - b2)); alpha for AdaMax.
        supremum: scalar, the least bound that holds for every history of gradients; infinite where there is none.
        skipped: scalar, steps skipped so far, where the state counts them; else `None`.
        overall: `Measurements` of all leaves together.
        leaves: `Measurements` of each leaf: `leaves["['w']"]`.
    """

    count: ArrayLike
    mu_weight: jax.Array
    nu_weight: jax.Array
    learning_rate: jax.Array
    bound: jax.Array
    supremum: jax.Array
    skipped: jax.Array | None
    overall: Measurements
    leaves: Leaves


class Watch(Protocol):
    """Reads a state; made by `watch_adam`."""

    def __call__(self, state: Any, gradients: Any = None, params: Any = None, updates: Any = None) -> Diagnostics:
        """What Adam is doing; the last three are trees like the params, each read once where given."""
        ...


def watch_adam(
    learning_rate: ArrayLike | optax.Schedule = 1.0,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    p: ArrayLike | None = None,
    storage: StoragePerLeaf = None,
    bias_correction: bool = True,
    eps_hat: bool = False,
    max_of: Literal["raw", "corrected"] = "raw",
    where: str | None = None,
) -> Watch:
    """A function that reads what Adam is doing from an optimizer state: `watch(state, gradients, params, updates)`.

    The state says which norm it holds and how it is kept. Give the numbers that the transform was given: `watch_adam(1e-3)`
    beside `adam(1e-3)`.

    The paper's bound on |Delta| is not the supremum over all histories: that one is by Hölder (`adam_jax.norms`) 7.27 alpha
    at Adam's defaults, and for AdaMax alpha (1 - b1) / (1 - b1 / b2), 1.01 alpha. With `nesterov=True` the steps reported
    are those before the look-ahead: pass `updates`. Moments are read as the step used them: int8 at 2 bytes a parameter.

    Args:
        learning_rate: number, scalar array or schedule of the count, at least 0; at 1 steps are in units of alpha.
        b1: decay of the first moment: number, scalar array or schedule of the count.
        b2: decay of the second moment, likewise.
        eps: number or scalar, added to the root; not used for AdaMax, whose u contains it.
        eps_root: number or scalar, added inside the root.
        p: as given to `scale_by_lp`, for such a state only.
        storage: as given to the transform, needed only where moments are kept in codes of your own.
        bias_correction: as given to the transform.
        eps_hat: as given to the transform.
        max_of: as given to `scale_by_amsgrad`.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them.

    Returns:
        A pure function of a state, any optimizer state, sharded or not, that holds one Adam of this library or of Optax. It
        returns `Diagnostics`.

    Raises:
        ValueError: for settings that `scale_by_adam` refuses; from the function, for a state without Adam or with several,
            for a `p` or `storage` that it needs or that do not fit, and for trees that do not match the state, with the
            path of the leaf.

    Example:
        >>> tx = optax.adam(0.1)
        >>> g = {"w": jnp.array([3.0, -0.5])}
        >>> _, state = tx.update(g, tx.init(g))
        >>> seen = jax.jit(watch_adam(0.1))(state, g)
        >>> print(f"{seen.overall.snr_mean:.2f} {seen.overall.step_max:.2f} {seen.overall.cosine:.2f}")
        1.00 0.10 1.00
    """
    checks.scalar("learning_rate", learning_rate, 0.0)
    for name, decay in {"b1": b1, "b2": b2}.items():
        checks.decay(name, decay)
    for name, number in {"eps": eps, "eps_root": eps_root}.items():
        checks.at_least(name, number, 0.0)
    if p is not None:
        checks.at_least("p", p, 1.0)
    is_corrected = checks.flag("bias_correction", bias_correction)
    is_hat = checks.flag("eps_hat", eps_hat) and is_corrected
    checks.one_of("max_of", max_of, ("raw", "corrected"))

    def watch(state: Any, gradients: Any = None, params: Any = None, updates: Any = None) -> Diagnostics:
        node = trees.only(state, _ADAMS, where, "pass the state of a chain with scale_by_adam or its family")
        norm, last = _norm_of(node, p), jnp.maximum(jnp.asarray(node.count) - 1, 0)
        rate1, rate2 = (jnp.asarray(clock.complement(clock.at(b, last)), jnp.float32) for b in (b1, b2))
        # of a gradient that is non-zero at one step only
        spike = rate1 * clock.corrected_rate(1.0, norm.shares(norm.full(rate2))[1])
        bound, supremum = jnp.maximum(1.0, spike), norm.largest_ratio(rate1, rate2)
        alpha = jnp.asarray(clock.at(learning_rate, last), jnp.float32)
        mu_weight, nu_weight = _weights(node, rate1, rate2)
        k = _settings(node, norm, mu_weight, nu_weight, is_corrected=is_corrected, is_raw=max_of == "raw")
        at_eps = clock.corrected_rate(1.0, norm.size_scale(nu_weight)) if is_hat else 1.0
        k = k._replace(eps=0.0 if isinstance(norm, norms.Infinity) else at_eps * eps, eps_root=eps_root, bound=bound)
        k, plain = ToSteps(*(jnp.asarray(x, jnp.float32) for x in k)), isinstance(eps_root, (int, float)) and eps_root == 0
        given = [None if tree is None else _by_path(tree) for tree in (gradients, params, updates)]
        leaves, rooted = watched_leaves(node, storage), not isinstance(norm, norms.Square)
        beside = [[None if tree is None else _lookup(tree, leaf) for tree in given] for leaf in leaves]
        sums = [leaf_sums(*both, k, rooted=rooted, plain=plain) for both in zip(leaves, beside, strict=True)]
        sizes = [leaf.kept.mu.size for leaf in leaves]
        known = tuple(tree is not None for tree in given)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *sums, add(sums))
        measured = _measure(stacked, jnp.array([*sizes, sum(sizes)], jnp.float32), alpha, known)
        each, overall = (jax.tree.map(lambda x, part=part: x[part], measured) for part in (slice(-1), -1))
        return Diagnostics(
            count=jnp.asarray(node.count),
            mu_weight=mu_weight,
            nu_weight=nu_weight,
            learning_rate=alpha,
            bound=alpha * bound,
            supremum=alpha * supremum,
            skipped=_skipped(state),
            overall=overall,
            leaves=Leaves(each, tuple(leaf.path for leaf in leaves)),
        )

    return watch


_ADAMS = (ScaleByAdamState, ScaleByAmsgradState, optax.ScaleByAdamState)
_NORMS: dict[type, Any] = {
    norms.Squares: norms.Square,
    norms.CorrectedSquares: norms.Square,
    norms.Roots: norms.Root,
    norms.CorrectedRoots: norms.Root,
    norms.Maxima: norms.Infinity,
}


def _norm_of(node: Any, p: ArrayLike | None) -> norms.Norm:
    """The norm whose sizes a state holds, AMSGrad's being those of Adam."""
    form = type(getattr(node, "form", norms.Squares()))
    if (form is norms.Powers) != (p is not None):
        given, held = ("must be given, as to scale_by_lp,", "") if p is None else ("must be None", "no ")
        raise ValueError(f"p {given} for a state that holds {held}L^p norms, got {p}")
    return norms.Power(moments.floating(p)) if p is not None else _NORMS[form]()


def _skipped(state: Any) -> jax.Array | None:
    """Steps skipped, by whatever in the state counts them."""

    def is_counter(node: Any) -> bool:
        return isinstance(node, (SkipNonfiniteState, optax.ApplyIfFiniteState))

    nodes = [node for node in jax.tree.leaves(state, is_leaf=is_counter) if is_counter(node)]
    totals = [node.total if isinstance(node, SkipNonfiniteState) else node.total_notfinite for node in nodes]
    return sum((jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(totals)), jnp.zeros([])) if nodes else None


def _weights(node: Any, rate1: jax.Array, rate2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of the averages; Optax keeps none, and corrects by 1 - b^t."""
    if not isinstance(node, optax.ScaleByAdamState):
        empty = jnp.asarray(node.count) <= 0
        return jnp.where(empty, 0.0, node.mu_weight), jnp.where(empty, 0.0, node.nu_weight)
    weight1, weight2 = (-jnp.expm1(node.count * jnp.log1p(-rate)) for rate in (rate1, rate2))
    return weight1, weight2


def _settings(
    node: Any, norm: norms.Norm, mu_weight: jax.Array, nu_weight: jax.Array, *, is_corrected: bool, is_raw: bool
) -> ToSteps:
    """The factors between what is stored, the paper's mhat and sqrt(vhat), and what the step divides."""
    correct1 = clock.corrected_rate(1.0, mu_weight)
    correct2 = clock.corrected_rate(1.0, norm.size_scale(nu_weight))
    holds_raw = isinstance(node, optax.ScaleByAdamState) or not is_corrected
    to_mhat, to_size = (correct1, correct2) if holds_raw else (1.0, 1.0)
    largest = correct2 if isinstance(node, ScaleByAmsgradState) and is_raw and is_corrected else to_size
    back1, back2 = (1.0, 1.0) if is_corrected else (mu_weight, clock.corrected_rate(1.0, correct2))
    return ToSteps(to_mhat, to_size, largest, back1, back2, 0.0, 0.0, 1.0)


def _by_path(tree: Any) -> dict[str, Any]:
    return {trees.At(keys).path: leaf for keys, leaf in trees.with_paths(tree, lambda leaf: leaf is None)}


def _lookup(tree: dict[str, Any], of: WatchedLeaf) -> jax.Array:
    """The leaf of a tree that belongs to a leaf's moments; no gradient counts as zero."""
    at, shape = of.path or "the root", of.kept.mu.shape
    if of.path not in tree:
        raise ValueError(f"the state has a leaf at {at} that a tree given beside it does not have")
    leaf = tree[of.path]
    if leaf is None:
        return jnp.zeros_like(of.kept.mu, dtype=jnp.float32)
    if np.shape(leaf) != shape or not trees.is_trained(leaf):
        raise ValueError(f"the leaf at {at} must be inexact of shape {shape}, got {jax.typeof(leaf)}")
    return jnp.asarray(leaf)


def _measure(sums: Sums, size: jax.Array, alpha: jax.Array, known: tuple[bool, ...]) -> Measurements:
    """The measurements that a reader wants, from the sums; the first axis is the leaves'."""
    t = sums.terms()
    share = 1.0 / jnp.maximum(size, 1.0)
    live = size - t.dead - t.nonfinite
    at_least = jnp.concatenate([live[None], jnp.asarray(t.at_least)]).T
    gradients, params, updates = known
    mu, nu, step, g, p, u = (jnp.sqrt(x) for x in (t.mu, t.nu, t.step, t.gradient, t.param, t.update))
    return Measurements(
        size=size,
        snr_mean=t.snr / jnp.maximum(live, 1.0),
        snr_quantiles=jax.vmap(_quantiles)(at_least),
        snr_histogram=at_least - jnp.pad(at_least[:, 1:], ((0, 0), (0, 1))),
        step_rms=alpha * step * jnp.sqrt(share),
        step_max=alpha * t.largest,
        at_alpha=t.at_alpha * share,
        at_bound=t.at_bound * share,
        eps_dominated=t.eps_dominated * share,
        dead=t.dead * share,
        nonfinite=t.nonfinite,
        mu_norm=mu,
        nu_norm=nu,
        gradient_norm=g if gradients else None,
        cosine=t.product * clock.corrected_rate(1.0, mu) * clock.corrected_rate(1.0, g) if gradients else None,
        param_norm=p if params else None,
        update_norm=u if updates else None,
        update_ratio=(u if updates else alpha * step) * clock.corrected_rate(1.0, p) if params else None,
    )


def _quantiles(at_least: jax.Array) -> jax.Array:
    """Quantiles of the SNR from the numbers of coordinates at or above 0 and each edge, geometric between two edges."""
    edges = jnp.asarray(np.concatenate([[2.0**-30], SNR_EDGES, [SNR_EDGES[-1] * 2**0.5]]), jnp.float32)
    below = (at_least[0] - jnp.append(at_least, 0.0)) / jnp.maximum(at_least[0], 1.0)  # non-decreasing, from 0 to 1
    levels = jnp.asarray(SNR_LEVELS, jnp.float32)
    upper = jnp.clip(jnp.searchsorted(below, levels, side="left"), 1, below.size - 1)
    low, high = below[upper - 1], below[upper]
    part = (levels - low) / jnp.maximum(high - low, 1e-12)
    first = edges[1] * part  # linear in the bin that reaches down to zero
    between = edges[upper - 1] * (edges[upper] / edges[upper - 1]) ** part
    return jnp.where(at_least[0] > 0, jnp.where(upper == 1, first, between), 0.0)
