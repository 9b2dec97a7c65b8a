"""What Adam is doing, read from its state: the quantities the paper reasons with (Sections 2.1 and 3).

`watch_adam(...)` takes the settings of the transform and returns a function of a state. That function is pure, makes one
pass over each moment, and can be jitted with the step, stacked by `lax.scan` or called every hundredth step; nothing is
stored in the state and nothing is paid when it is not called.

Everything is measured in float32. Sums of squares, and so norms and cosines, are those of numbers from 1e-19 to 1e19.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_jax import checks, moments, storage, trees
from adam_jax.faults import SkipNonfiniteState
from adam_jax.storage import KeptMoments
from adam_jax.transforms import Decay, Kept, ScaleByAdamState, ScaleByAmsgradState
from adam_jax.watch.sums import SNR_EDGES, Sums, ToSteps, add, leaf_sums

__all__ = ["SNR_EDGES", "SNR_LEVELS", "Diagnostics", "Leaves", "Measurements", "watch_adam"]

Form = Literal["square", "root", "max"] | float

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


def watch_adam(
    form: Form,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    *,
    mu_dtype: Kept = None,
    nu_dtype: Kept = None,
    learning_rate: ArrayLike | optax.Schedule = 1.0,
    bias_correction: bool = True,
    eps_hat: bool = False,
    max_of: Literal["raw", "corrected"] = "raw",
    where: str | None = None,
) -> Callable[..., Diagnostics]:
    """A function that reads what Adam is doing from an optimizer state: `watch(state, gradients, params, updates)`.

    A state does not say how it was made, so give the settings that the transform was given, and `form`, which has no
    default because v read as sqrt(v) is a plausible number and a wrong one.

    The paper's bound on |Delta| is not the supremum over all histories; that one is by Cauchy-Schwarz (Adam; Hölder for
    L^p) alpha (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 7.27 alpha at the defaults, and for AdaMax alpha (1 - b1) /
    (1 - b1 / b2), 1.01 alpha. With `nesterov=True` the steps reported are those before the look-ahead: pass `updates`.

    Moments are read as they are kept, which is how the step used them: int8 ones cost 2 bytes a parameter to read.
    The rows of a `row_adam` in exact mode are dense Adam's after its `flush`: read them as
    `ScaleByAdamState(state.count, state.mu, state.nu, 1.0, 1.0)`; without a flush, each row is as of its last update.

    Args:
        form: what `nu` holds. "square": v, from `scale_by_adam` and `scale_by_amsgrad`, and Optax's own Adam; "root":
            sqrt(v), from the same with `root=True`; "max": u, from `scale_by_adamax`; a number p: `scale_by_lp(p)`.
            With a compact `nu_dtype` "square" and "root" are the same: such moments are always kept as roots.
        b1: decay of the first moment: number, scalar array or schedule of the count.
        b2: decay of the second moment, likewise.
        eps: number or scalar, added to the root; not used with "max", whose u contains it.
        eps_root: number or scalar, added inside the root.
        mu_dtype: as given to the transform.
        nu_dtype: as given to the transform.
        learning_rate: number, scalar array or schedule of the count; at 1 steps are in units of alpha.
        bias_correction: as given to the transform.
        eps_hat: as given to the transform.
        max_of: as given to `scale_by_amsgrad`.
        where: which Adam, in a state that holds several: a part of its path, as the error message lists them.

    Returns:
        A pure function of `(state, gradients=None, params=None, updates=None)`, the last three trees like the params,
        which returns `Diagnostics`. The state may be any optimizer state, sharded or not; it must hold one Adam of this
        library or of Optax. Wanting gradients, params or updates measured costs reading them once.

    Raises:
        ValueError: for settings that `scale_by_adam` refuses; from the function, for a state without Adam or with
            several, for moments that `mu_dtype` and `nu_dtype` do not make, and for trees that do not match the state,
            with the path of the leaf.

    Example:
        >>> tx = optax.adam(0.1)
        >>> g = {"w": jnp.array([3.0, -0.5])}
        >>> _, state = tx.update(g, tx.init(g))
        >>> seen = jax.jit(watch_adam("square", learning_rate=0.1))(state, g)
        >>> print(f"{seen.overall.snr_mean:.2f} {seen.overall.step_max:.2f} {seen.overall.cosine:.2f}")
        1.00 0.10 1.00
    """
    _check(form, b1, b2, eps, eps_root, learning_rate, max_of)
    checks.flag("bias_correction", bias_correction)
    checks.flag("eps_hat", eps_hat)
    storage.check_choices(mu_dtype, nu_dtype)
    rooted = form != "square" or storage.is_compact(nu_dtype)

    def watch(state: Any, gradients: Any = None, params: Any = None, updates: Any = None) -> Diagnostics:
        node = _find(state, where)
        last = jnp.maximum(jnp.asarray(node.count) - 1, 0)
        rate1, rate2 = (jnp.asarray(moments.complement(moments.at(b, last)), jnp.float32) for b in (b1, b2))
        bound, supremum = _bounds(form, rate1, rate2)
        alpha = jnp.asarray(moments.at(learning_rate, last), jnp.float32)
        mu_weight, nu_weight = _weights(node, rate1, rate2)
        k = _settings(node, form, mu_weight, nu_weight, bias_correction, eps_hat, max_of)
        k = k._replace(eps=0.0 if form == "max" else k.eps * eps, eps_root=eps_root, bound=bound)
        k = k._replace(largest_ratio=supremum if isinstance(form, str) else jnp.inf)
        k = ToSteps(*(jnp.asarray(value, jnp.float32) for value in k))
        plain = isinstance(eps_root, (int, float)) and eps_root == 0
        given = [None if tree is None else _by_path(tree) for tree in (gradients, params, updates)]
        paths, sizes, sums = [], [], []
        for kept in _leaves(node, mu_dtype, nu_dtype):
            others = [None if tree is None else _lookup(tree, kept) for tree in given]
            paths.append(kept.path)
            sizes.append(kept.mu.size)
            sums.append(leaf_sums(kept, others, k, rooted=rooted, plain=plain))
        known = tuple(tree is not None for tree in given)
        everything = [*sums, add(sums)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *everything)
        measured = _measure(stacked, jnp.array([*sizes, sum(sizes)], jnp.float32), alpha, known)
        leaves, overall = (jax.tree.map(lambda x, part=part: x[part], measured) for part in (slice(-1), -1))
        return Diagnostics(
            jnp.asarray(node.count), mu_weight, nu_weight, alpha, alpha * bound, alpha * supremum, _skipped(state), overall,
            Leaves(leaves, tuple(paths)),
        )  # fmt: skip

    return watch


def _check(form: Any, b1: Any, b2: Any, eps: Any, eps_root: Any, learning_rate: Any, max_of: Any) -> None:
    if not isinstance(form, str):
        checks.number("form, as the p of scale_by_lp,", form, at_least=1.0, known=True)
    else:
        checks.one_of("form", form, ("square", "root", "max"))
    checks.decay("b1", b1)
    checks.decay("b2", b2)
    checks.at_least("eps", eps, 0.0)
    checks.at_least("eps_root", eps_root, 0.0)
    checks.scalar("learning_rate", learning_rate, 0.0)
    checks.one_of("max_of", max_of, ("raw", "corrected"))


def _bounds(form: Form, rate1: jax.Array, rate2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Section 2.1's bound and the supremum, in units of alpha. By Hölder, with c_i the weights of g_i in m and in v."""
    keep1, keep2 = 1.0 - rate1, 1.0 - rate2
    if form == "max":
        return jnp.ones([]), _geometric(rate1, keep1 / keep2)
    p = 2.0 if isinstance(form, str) else float(form)
    if not isinstance(form, str):
        rate2, keep2 = -jnp.expm1(p * jnp.log1p(-rate2)), keep2**p
    spike = rate1 / rate2 ** (1.0 / p)  # the gradient is non-zero at one step only
    if p == 1.0:  # the largest quotient of two weights
        return jnp.maximum(1.0, spike), jnp.where(keep1 <= keep2, spike, jnp.inf)
    q = p / (p - 1.0)
    return jnp.maximum(1.0, spike), spike * _geometric(1.0, (keep1 / keep2 ** (1.0 / p)) ** q) ** (1.0 / q)


def _geometric(first: ArrayLike, ratio: jax.Array) -> jax.Array:
    return jnp.where(ratio < 1.0, first / jnp.where(ratio < 1.0, 1.0 - ratio, 1.0), jnp.inf)


def _find(state: Any, where: str | None) -> Any:
    """The state of the one Adam in `state` whose path contains `where`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_adam)
    found = {jax.tree_util.keystr(path): node for path, node in flat if _is_adam(node)}
    chosen = {path: node for path, node in found.items() if where is None or where in path}
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    if not found:
        raise ValueError("state must hold an Adam, got none: pass the state of a chain with scale_by_adam or its family")
    if not chosen:
        raise ValueError(f"where must be part of the path of an Adam in the state, one of {list(found)}, got {where!r}")
    raise ValueError(f"state holds {len(chosen)} Adams: choose one with where=, part of one of {list(chosen)}")


def _is_adam(node: Any) -> bool:
    return isinstance(node, (ScaleByAdamState, ScaleByAmsgradState, optax.ScaleByAdamState))


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
        return node.mu_weight, node.nu_weight
    weight1, weight2 = (-jnp.expm1(node.count * jnp.log1p(-rate)) for rate in (rate1, rate2))
    return weight1, weight2


def _settings(
    node: Any, form: Form, mu_weight: jax.Array, nu_weight: jax.Array, bias_correction: bool, eps_hat: bool, max_of: str
) -> ToSteps:
    """The factors between what is stored, the paper's mhat and sqrt(vhat), and what the step divides."""
    power = float("inf") if form == "max" else 2.0 if isinstance(form, str) else float(form)
    correct1 = moments.corrected_rate(1.0, mu_weight)
    correct2 = moments.corrected_rate(1.0, nu_weight) ** (1.0 / power) if power != float("inf") else 1.0
    raw = isinstance(node, optax.ScaleByAdamState) or not bias_correction
    to_mhat, to_size = (correct1, correct2) if raw else (1.0, 1.0)
    largest = correct2 if isinstance(node, ScaleByAmsgradState) and max_of == "raw" and bias_correction else to_size
    back1, back2 = (1.0, 1.0) if bias_correction else (mu_weight, moments.corrected_rate(1.0, correct2))
    at_eps = correct2 if eps_hat and bias_correction else 1.0
    return ToSteps(to_mhat, to_size, largest, back1, back2, at_eps, 0.0, 1.0, jnp.inf)


def _leaves(node: Any, mu_dtype: Kept, nu_dtype: Kept) -> list[KeptMoments]:
    """The moments of each trained leaf: one second moment, or AMSGrad's two, of which the last divides."""
    from_optax = isinstance(node, optax.ScaleByAdamState)
    if from_optax and nu_dtype is not None:
        raise ValueError(f"nu_dtype must be None for Optax's Adam, which has no such argument, got {nu_dtype}")
    columns = [_by_path(tree) for tree in (node.mu, node.nu, *([node.nu_max] if hasattr(node, "nu_max") else []))]
    rows = [(path, *(column[path] for column in columns)) for path, mu in columns[0].items() if mu is not None]
    if not rows:
        raise ValueError("the Adam in state must have trained at least one leaf, got none")
    if from_optax:  # the numbers themselves, in whatever dtype
        return [KeptMoments(mu, tuple(nus), None, (None, None), path) for path, mu, *nus in rows]
    return [
        storage.kept_moments(mu_dtype, nu_dtype, path, mu, nus, node.nu_window, i) for i, (path, mu, *nus) in enumerate(rows)
    ]


def _by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {trees.path_of(path): leaf for path, leaf in flat}


def _lookup(tree: dict[str, Any], kept: KeptMoments) -> jax.Array:
    """The leaf of a tree that belongs to a leaf's moments; no gradient counts as zero."""
    at, shape = kept.path or "the root", kept.mu.shape
    if kept.path not in tree:
        raise ValueError(f"the state has a leaf at {at} that a tree given beside it does not have")
    leaf = tree[kept.path]
    if leaf is None:
        return jnp.zeros_like(kept.mu, dtype=jnp.float32)
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
        size=size, snr_mean=t.snr / jnp.maximum(live, 1.0), snr_quantiles=jax.vmap(_quantiles)(at_least),
        snr_histogram=at_least - jnp.pad(at_least[:, 1:], ((0, 0), (0, 1))), step_rms=alpha * step * jnp.sqrt(share),
        step_max=alpha * t.largest, at_alpha=t.at_alpha * share, at_bound=t.at_bound * share,
        eps_dominated=t.eps_dominated * share, dead=t.dead * share, nonfinite=t.nonfinite, mu_norm=mu, nu_norm=nu,
        gradient_norm=g if gradients else None,
        cosine=t.product * moments.corrected_rate(1.0, mu) * moments.corrected_rate(1.0, g) if gradients else None,
        param_norm=p if params else None, update_norm=u if updates else None,
        update_ratio=(u if updates else alpha * step) * moments.corrected_rate(1.0, p) if params else None,
    )  # fmt: skip


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
