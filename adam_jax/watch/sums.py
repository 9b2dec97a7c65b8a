"""Sums over the coordinates of one leaf of Adam's state, all in one pass over its moments.

One variadic reduction reads each moment once, as it is kept, and decodes it on the way; partial sums of blocks keep float32
accurate and stay on the device that holds the block.

XLA vectorises a reduction on CPU only if its reducer has a single operation on floats. So each block is summed as many times
as there are float sums, in rows of which each adds up one of them and a part of the counts; a block stays in the cache
meanwhile. Though everything is computed several times, it is four times as fast as in one scalar loop.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adam_jax import moments
from adam_jax.watch.leaves import WatchedLeaf

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
    """The sums by name: those of two leaves add up, except the largest."""

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
    at_least: jax.Array  # coordinates with SNR at least each edge
    largest: jax.Array


_FLOATS, _COUNTS = 8, 5  # of the fields above


class _Coordinates(NamedTuple):
    """What each coordinate adds to the sums."""

    floats: tuple[jax.Array | None, ...]  # in the order of `Terms`, None for what is not measured
    conditions: tuple[jax.Array, ...]  # to be counted, likewise
    snr: jax.Array
    step: jax.Array


class Sums(NamedTuple):
    """`Terms` summed, in few arrays, which XLA compiles faster; or those of several leaves, stacked."""

    floats: jax.Array  # [.., 8]
    counts: jax.Array  # [.., 5 + edges]
    largest: jax.Array  # [..]

    def terms(self) -> Terms:
        """The sums by name; for stacked leaves [leaves], and `at_least` [edges, leaves]."""
        counts = self.counts.T
        return Terms._make([*self.floats.T, *counts[:_COUNTS], counts[_COUNTS:], self.largest])


def leaf_sums(leaf: WatchedLeaf, others: Sequence[jax.Array | None], k: ToSteps, *, rooted: bool, plain: bool) -> Sums:
    """The sums of one leaf, beside its gradients, params and updates where given: one pass, in blocks.

    `rooted` says that second moments are stored as roots or other sizes, `plain` that eps_root is the number zero.
    """
    mu, nus = leaf.kept.mu, leaf.kept.nus
    is_array = [nu.shape == mu.shape for nu in nus]  # int8 leaves keep both moments in one array
    arrays = [mu, *(nu for nu, there in zip(nus, is_array, strict=True) if there), *(x for x in others if x is not None)]

    def coordinates(arrays: list[jax.Array]) -> _Coordinates:
        mu, *rest = arrays
        parts = tuple(rest.pop(0) if there else nu for nu, there in zip(nus, is_array, strict=True))
        g, p, u = (None if x is None else _float32(rest.pop(0)) for x in others)
        m, sizes = leaf.read(leaf.kept._replace(mu=mu, nus=parts))
        return _coordinates(m, [s if rooted else s * _inverse_root(s) for s in sizes], g, p, u, k, plain=plain)

    rows = 4 + sum(number for x, number in zip(others, (2, 1, 1), strict=True) if x is not None)
    return add([_reduce(coordinates(_in_rows(part, axes, rows)), axes) for part, axes in _blocks(arrays)])


def add(parts: Sequence[Sums]) -> Sums:
    """The sums of several leaves together."""
    floats, counts, largest = (jnp.stack(x) for x in zip(*parts, strict=True))
    return Sums(floats.sum(0), counts.sum(0), largest.max(0))


def _coordinates(
    mu: jax.Array,
    sizes: list[jax.Array],
    g: jax.Array | None,
    p: jax.Array | None,
    u: jax.Array | None,
    k: ToSteps,
    *,
    plain: bool,
) -> _Coordinates:
    """Each coordinate's part of each sum. Cheap operations only: see `_inverse`."""
    finite = functools.reduce(jnp.logical_and, (jnp.isfinite(x) for x in (mu.real, mu.imag, *sizes)))
    mu, *sizes = (jnp.where(finite, x, 0.0) for x in (mu, *sizes))
    mhat, size = moments.times(k.to_mhat, mu), sizes[0] * k.to_size
    snr = moments.magnitude(mhat) * _inverse(size)
    if plain and len(sizes) == 1:
        divisor = size * k.from_size
    else:
        largest = sizes[-1] * k.size_to_size * k.from_size
        divisor = largest if plain else moments.root_plus(largest, k.eps_root)
    step = moments.magnitude(moments.times(k.from_mhat, mhat)) * _inverse(divisor + k.eps)
    floats = (
        snr,
        step * step,
        moments.squared(mhat),
        size * size,
        None if g is None else moments.squared(g),
        None if g is None else (mhat * jnp.conj(g)).real,
        None if p is None else moments.squared(p),
        None if u is None else moments.squared(u),
    )
    conditions = (step >= _NEAR, step >= _NEAR * k.bound, finite & (divisor < k.eps), finite & (sizes[0] == 0), ~finite)
    return _Coordinates(floats, conditions, snr, step)


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


def _in_rows(arrays: list[jax.Array], axes: int, rows: int) -> list[jax.Array]:
    """The arrays with one more axis, before the last `axes`, along which they repeat."""
    shape = arrays[0].shape
    axis = len(shape) - axes
    return [jnp.broadcast_to(jnp.expand_dims(x, axis), (*shape[:axis], rows, *shape[axis:])) for x in arrays]


def _reduce(coordinates: _Coordinates, axes: int) -> Sums:
    """Add up the last axes in one pass, a float sum and a part of the counts in each row, then what is left of each."""
    shape = coordinates.snr.shape
    at = len(shape) - axes - 1
    measured = {i: x for i, x in enumerate(coordinates.floats) if x is not None}
    rows = len(measured)
    number = np.arange(rows, dtype=np.int32).reshape(rows, *[1] * axes)
    row = jnp.zeros_like(coordinates.snr, dtype=jnp.int32) + number  # sharded as those

    def of_row(choices: Sequence[jax.Array]) -> jax.Array:
        chosen = jnp.zeros_like(choices[0])
        for i, choice in enumerate(choices):
            chosen = jnp.where(row == i, choice, chosen)
        return chosen

    def columns(count: int) -> list[range]:  # the numbers of what the rows count, one column after the other
        return [range(start, min(start + rows, count)) for start in range(0, count, rows)]

    edges = [jnp.float32(edge) for edge in SNR_EDGES]
    counts = [of_row([coordinates.conditions[i] for i in column]) for column in columns(_COUNTS)]
    counts += [coordinates.snr >= of_row([edges[i] for i in column]) for column in columns(len(edges))]
    values = of_row(list(measured.values()))
    bits = jax.lax.bitcast_convert_type(coordinates.step, jnp.int32)  # ordered as the steps, none of which is negative
    operands = (values, *(x.astype(jnp.int32) for x in counts), bits)
    zeros = tuple(jnp.zeros([], x.dtype) for x in operands)
    floats, *ints, largest = jax.lax.reduce(operands, zeros, _combine, tuple(range(at + 1, len(shape))))
    floats = jnp.zeros(_FLOATS, jnp.float32).at[np.array(list(measured))].set(floats.sum(tuple(range(at))))
    ints = jnp.stack(ints).sum(tuple(range(1, 1 + at))).astype(jnp.float32)
    parts = ints[: len(columns(_COUNTS))].ravel()[:_COUNTS], ints[len(columns(_COUNTS)) :].ravel()[: len(edges)]
    return Sums(floats, jnp.concatenate(parts), jax.lax.bitcast_convert_type(largest.max(initial=0), jnp.float32))


def _combine(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return *(x + y for x, y in zip(a[:-1], b[:-1], strict=True)), jnp.maximum(a[-1], b[-1])
