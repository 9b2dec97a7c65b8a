"""Sums over the coordinates of one leaf of Adam's state, all in one pass over its moments.

This is what `adam_jax.diagnostics` measures from. One variadic reduction reads each moment once; partial sums of blocks
keep float32 accurate and stay on the device that holds the block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adam_jax import moments

__all__ = ["SNR_EDGES", "Sums", "Terms", "ToSteps", "add", "leaf_sums"]

#: Edges of the bins in which signal-to-noise ratios are counted, half an octave apart.
SNR_EDGES = np.exp2(np.arange(-16, 7) / 2)

_BLOCK = 4096  # entries summed one after the other in float32 before partial sums are added up
_NEAR = 0.99  # what counts as being at a bound


class ToSteps(NamedTuple):
    """The factors that lead from stored moments to the paper's quantities and to the step, as float32 scalars."""

    to_mhat: ArrayLike  # stored first moment to mhat
    to_size: ArrayLike  # stored size, a root already, to sqrt(vhat)
    size_to_size: ArrayLike  # the same for the size that divides the step; AMSGrad has another
    from_mhat: ArrayLike  # mhat to what the step uses
    from_size: ArrayLike
    eps: ArrayLike
    eps_root: ArrayLike
    bound: ArrayLike  # in units of the step size


class Terms(NamedTuple):
    """Each coordinate's part of the sums, or the sums: those of two leaves add up, except the largest."""

    snr: jax.Array
    step: jax.Array
    mu: jax.Array
    nu: jax.Array
    gradient: jax.Array
    product: jax.Array
    param: jax.Array
    update: jax.Array
    at_alpha: jax.Array
    at_bound: jax.Array
    eps_dominated: jax.Array
    dead: jax.Array
    nonfinite: jax.Array
    at_least: jax.Array | tuple[jax.Array, ...]  # coordinates with SNR at least each edge
    largest: jax.Array


_FLOATS, _COUNTS = 8, 5  # of the fields above


class Sums(NamedTuple):
    """`Terms` summed, in few arrays, which XLA compiles faster; or those of several leaves, stacked."""

    floats: jax.Array  # [.., 8]
    counts: jax.Array  # [.., 5 + edges]
    largest: jax.Array  # [..]

    def terms(self) -> Terms:
        """The sums by name; for stacked leaves [leaves], and `at_least` [edges, leaves]."""
        counts = self.counts.T
        return Terms._make([*self.floats.T, *counts[:_COUNTS], counts[_COUNTS:], self.largest])


def leaf_sums(
    mu: jax.Array,
    nu: jax.Array,
    nu_max: jax.Array,
    others: Sequence[jax.Array | None],
    k: ToSteps,
    *,
    rooted: bool,
    plain: bool,
) -> Sums:
    """The sums of one leaf: one pass, in blocks.

    Args:
        mu: first moment as stored, any shape, real or complex.
        nu: second moment as stored, same shape, real.
        nu_max: the second moment that divides the step, same shape; `nu` itself except in AMSGrad.
        others: gradients, params and updates of the same shape, or `None` for each that is not measured.
        k: how to read the moments.
        rooted: whether the second moments are stored as roots.
        plain: whether eps_root is the number zero.

    Returns:
        `Sums` of scalars and one vector.

    Example:
        >>> one = jnp.ones(3)
        >>> k = ToSteps(1.0, 1.0, 1.0, 1.0, 1.0, eps=0.0, eps_root=0.0, bound=3.0)
        >>> print(leaf_sums(2 * one, 4 * one, 4 * one, [None] * 3, k, rooted=False, plain=True).terms().snr)
        3.0
    """
    separate = nu_max is not nu
    arrays = [mu, nu, *([nu_max] if separate else []), *(x for x in others if x is not None)]

    def terms(arrays: list[jax.Array]) -> Terms:
        mu, nu, *rest = (_float32(x) for x in arrays)
        nu_max = rest.pop(0) if separate else nu
        g, p, u = (None if x is None else rest.pop(0) for x in others)
        return _terms(mu, nu, nu_max, g, p, u, k, rooted=rooted, plain=plain)

    return add([_reduce(terms(part), axes) for part, axes in _blocks(arrays)])


def add(parts: Sequence[Sums]) -> Sums:
    """The sums of several leaves together.

    Args:
        parts: at least one.

    Returns:
        `Sums` of the same shapes.

    Example:
        >>> part = Sums(jnp.ones(8), jnp.ones(28), jnp.ones([]))
        >>> print(add([part, part]).floats)
        [2. 2. 2. 2. 2. 2. 2. 2.]
    """
    floats, counts, largest = (jnp.stack(x) for x in zip(*parts, strict=True))
    return Sums(floats.sum(0), counts.sum(0), largest.max(0))


def _terms(
    mu: jax.Array,
    nu: jax.Array,
    nu_max: jax.Array,
    g: jax.Array | None,
    p: jax.Array | None,
    u: jax.Array | None,
    k: ToSteps,
    *,
    rooted: bool,
    plain: bool,
) -> Terms:
    """Each coordinate's part of each sum. Cheap operations only: see `_inverse`."""
    finite = jnp.isfinite(mu.real) & jnp.isfinite(mu.imag) & jnp.isfinite(nu) & jnp.isfinite(nu_max)
    mu, nu, nu_max = (jnp.where(finite, x, 0.0) for x in (mu, nu, nu_max))
    mhat = mu * k.to_mhat
    size = (nu if rooted else nu * _inverse_root(nu)) * k.to_size
    snr = moments.magnitude(mhat) * _inverse(size)
    if plain and nu_max is nu:
        divisor = size * k.from_size
    else:
        largest = (nu_max if rooted else nu_max * _inverse_root(nu_max)) * k.size_to_size * k.from_size
        divisor = largest if plain else moments.root_plus(largest, k.eps_root)
    step = moments.magnitude(mhat * k.from_mhat) * _inverse(divisor + k.eps)
    zero = jnp.zeros_like(snr)
    return Terms(
        snr=snr, step=step * step, mu=moments.squared(mhat), nu=size * size,
        gradient=zero if g is None else moments.squared(g),
        product=zero if g is None else (mhat * jnp.conj(g)).real,
        param=zero if p is None else moments.squared(p),
        update=zero if u is None else moments.squared(u),
        at_alpha=_count(step >= _NEAR), at_bound=_count(step >= _NEAR * k.bound),
        eps_dominated=_count(finite & (divisor < k.eps)), dead=_count(finite & (nu == 0)), nonfinite=_count(~finite),
        at_least=tuple(_count(snr >= edge) for edge in SNR_EDGES.astype(np.float32)), largest=step,
    )  # fmt: skip


def _count(condition: jax.Array) -> jax.Array:
    return condition.astype(jnp.int32)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)


def _inverse(x: jax.Array) -> jax.Array:
    """1/x for 0 < x, and 0 for 0, to float32's last bits, by Newton's steps from the bits of x.

    XLA computes a division, or a root, once and writes it to memory when several sums need it; multiplications it repeats
    inside one pass over the state.
    """
    small, large = 2.0**-125, 2.0**125
    y = jnp.clip(x, small, large)
    guess = jax.lax.bitcast_convert_type(0x7EF311C3 - jax.lax.bitcast_convert_type(y, jnp.int32), jnp.float32)
    for _ in range(3):
        guess = guess * (2.0 - y * guess)
    return jnp.where(x < small, 0.0, guess)


def _inverse_root(x: jax.Array) -> jax.Array:
    """1/sqrt(x) for 0 < x, and 0 for 0, likewise."""
    small = 2.0**-125
    y = jnp.clip(x, small, 2.0**126)
    guess = jax.lax.bitcast_convert_type(0x5F3759DF - (jax.lax.bitcast_convert_type(y, jnp.int32) >> 1), jnp.float32)
    for _ in range(3):
        guess = guess * (1.5 - (0.5 * y * guess) * guess)
    return jnp.where(x < small, 0.0, guess)


def _blocks(arrays: list[jax.Array]) -> list[tuple[list[jax.Array], int]]:
    """The arrays of a leaf with how many of their last axes make a block of about `_BLOCK` entries.

    Where the last axes are too long one of them is split, and where that does not divide, the leaf is cut in two. Axes are
    never merged, so that a sharded axis stays sharded.
    """
    shape = arrays[0].shape
    axis, inner = len(shape), 1
    while axis > 0 and inner < _BLOCK:
        axis -= 1
        inner *= shape[axis]
    if inner <= 4 * _BLOCK:
        return [(arrays, len(shape) - axis)]
    inside = inner // shape[axis]
    wanted = -(-_BLOCK // inside)
    split = next((d for d in range(wanted, 4 * wanted) if shape[axis] % d == 0), None)
    if split:
        blocked = (*shape[:axis], shape[axis] // split, split, *shape[axis + 1 :])
        return [([x.reshape(blocked) for x in arrays], len(shape) - axis)]
    whole = shape[axis] // wanted * wanted
    head = [jax.lax.slice_in_dim(x, 0, whole, axis=axis) for x in arrays]
    tail = [jax.lax.slice_in_dim(x, whole, None, axis=axis) for x in arrays]
    return _blocks(head) + _blocks(tail)


def _reduce(terms: Terms, axes: int) -> Sums:
    """Add up the last axes of all terms in one pass, then what is left of each."""
    flat = jax.tree.leaves(terms)

    def combine(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return *(x + y for x, y in zip(a[:-1], b[:-1], strict=True)), jnp.maximum(a[-1], b[-1])

    zeros = tuple(jnp.zeros([], x.dtype) for x in flat)
    ndim = flat[0].ndim
    rows = jax.lax.reduce(tuple(flat), zeros, combine, tuple(range(ndim - axes, ndim)))
    floats, counts = (jnp.stack(x).sum(tuple(range(1, 1 + ndim - axes))) for x in (rows[:_FLOATS], rows[_FLOATS:-1]))
    return Sums(floats, counts.astype(jnp.float32), rows[-1].max(initial=0.0))
