"""Low-precision weights that still learn: any Optax transformation, run as if the params were float32.

Adding an update below half its spacing, 1/512 of the weight, changes no bfloat16 weight. `in_float32` rounds the exact sum
at random, without bias, or keeps the low bits of a float32 weight beside the bfloat16 one. Its updates are the float32
difference q - p of the new weight and the old one, and p + fl(q - p) rounds to q, so that the stock `optax.apply_updates`,
`(p + u).astype(p.dtype)`, lands on exactly the weight it chose: if |q| >= |p|, fl errs by 2^-23 |q| at most, and weights
are 2^-11 |q| apart or more; if |q| < |p| < 2^(e+1), q is a multiple of 2^(e-24), and the difference is exact. (Below 3e-36,
where differences are subnormal, some processors leave the weight where it was; above 1e38 they can overflow.)
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_jax import checks, rounding, trees

__all__ = ["InFloat32State", "in_float32", "master_params", "set_master_params"]

State = TypeVar("State")
ADVICE = "train with in_float32(tx, residual=8 or 16)"


class InFloat32State(NamedTuple):
    """The state of what runs in float32, and what the weights lack of float32."""

    inner_state: Any
    count: ArrayLike  # int32 scalar, the number of updates made; it wraps
    residual: Any  # like the params, uint16 or uint8, the bits after the first 16; a boolean for other leaves; or None


def in_float32(
    tx: optax.GradientTransformation, residual: int = 0, seed: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    """Run `tx` as if the params were float32, then round: gradients, weights and state are float32 inside.

    * `residual=0`, bfloat16 and float16: the new weight is a neighbour of the exact sum, the upper one with a probability
      equal to the remainder, so that updates of 1e-8 of a weight act as they should on average. Nothing is kept.
    * `residual=8`, bfloat16: weights of 24 bits in 3 bytes, rounded to these without bias.
    * `residual=16`, bfloat16: the float32 run of `tx`, bit for bit, in 4 bytes (for weights from 3e-36 to 1e38).

    Draws depend on the seed, the count, the leaf's path and the element's index in the whole leaf, so replicas and shardings
    agree; shards inside `shard_map` are refused. Leaves of float32 and wider, infinities and NaN pass through; finite sums
    stay finite. Derivatives are those of the mean: they pass a rounding as if it were not there.

    Everything that changes updates belongs into `tx`, and so do `inject_hyperparams`, which casts the learning rate to the
    gradients' dtype, `apply_if_finite`, and `average_params`, which averages the float32 weights there; what scales or clips
    after the rounding undoes it. Equinox's `apply_updates` does not cast. Under `jax_numpy_dtype_promotion="strict"` write
    out Optax's: `(p.astype(u.dtype) + u).astype(p.dtype)`.

    Args:
        tx: any Optax transformation, with the learning rate; what it gets are float32 gradients and weights.
        residual: 0, 8 or 16, the bits that are kept of each weight beside the param.
        seed: integer, Python's or an array; of use with residual 0 and 8.

    Returns:
        A transformation with state `InFloat32State`, whose updates are float32; `update` needs the params. In a new state
        the float32 weights are the params; `set_master_params` starts from others.

    Raises:
        TypeError: for a seed that is no integer.
        ValueError: for another `residual`; from `init` and `update`, for weights narrower than
            float32 of a dtype not named above; from `update`, where the params are not given or their dtype has changed.

    Example:
        >>> params = jnp.ones(10_000, jnp.bfloat16)
        >>> for residual in (0, 16):
        ...     tx = in_float32(optax.sgd(1e-4), residual)
        ...     updates, state = tx.update(jnp.full(10_000, 10.0), tx.init(params), params)
        ...     moved = optax.apply_updates(params, updates)
        ...     print(moved.dtype, jnp.unique(moved), f"{master_params(state, moved).mean():.3f}")
        bfloat16 [0.996094 1] 0.999
        bfloat16 [1] 0.999
    """
    if checks.whole("residual", residual) not in (0, 8, 16):
        raise ValueError(f"residual must be 0, 8 or 16, the bits that are kept of each weight, got {residual!r}")
    checks.seed("seed", seed)
    checks.transformation("tx", tx)
    inside = optax.with_extra_args_support(tx)
    allowed = (jnp.bfloat16,) if residual else (jnp.bfloat16, jnp.float16)

    def init_fn(params: Any) -> InFloat32State:
        def empty(at: trees.At, leaf: Any) -> jax.Array:
            narrow = _is_narrow(at, leaf, allowed)
            return jnp.zeros_like(leaf, dtype=f"uint{residual}") if narrow and residual else jnp.asarray(trees.ABSENT)

        kept = trees.map_params(empty, params)
        inner_state = inside.init(jax.tree.map(_wide, params))
        return InFloat32State(inner_state, jnp.zeros([], jnp.int32), kept if residual else None)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("rounding weights needs the params: call update(gradients, state, params)")

        def step(at: trees.At, u: ArrayLike, master: jax.Array, *low: jax.Array) -> tuple[Any, ...]:
            if not _is_narrow(at, at.param, allowed):
                return u, master, *low
            bits = None
            if residual < 16:
                trees.check_whole(at, jnp.asarray(u))
                bits = rounding.draws(at.param.shape, rounding.stream(seed, at.path), turn)
            u, low = _rounded(jnp.asarray(u).astype(jnp.float32), at.param, master, low, bits)
            return u, master, *low

        masters, turn = _joined(state, params), rounding.turn(state.count)
        updates, inner_state = inside.update(jax.tree.map(_wide, updates), state.inner_state, masters, **extra_args)
        columns = [trees.map_params(lambda _, leaf: leaf, masters), *([state.residual] if residual else [])]
        updates, (_, *kept) = trees.map_updates(step, updates, columns, params)
        count = state.count + jnp.ones_like(state.count)
        return updates, InFloat32State(inner_state, count, kept[0] if residual else None)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def master_params(state: Any, params: trees.Tree, *, where: str | None = None) -> trees.Tree:
    """The float32 weights that are being trained: the params, with what `in_float32` kept of them.

    Args:
        state: an `InFloat32State`, or any optimizer state with one inside. Of a `flax.nnx.Optimizer` it is
            `nnx.as_pure(optimizer.opt_state)`; then give `nnx.as_pure(params)`, too.
        params: the current params.
        where: where a state holds several: a part of the path of the one that is meant, as the error says them.

    Returns:
        A tree like `params`, float32 where these are bfloat16 or float16 and trained in float32; other leaves are the
        params' own.

    Raises:
        ValueError: if the state holds no `InFloat32State`, or several and `where` does not tell them apart.

    Example:
        >>> params = {"w": jnp.ones(1, jnp.bfloat16), "scale": jnp.ones(1)}
        >>> state = in_float32(optax.sgd(1e-4), 16).init(params)
        >>> jax.tree.map(lambda p: str(p.dtype), master_params(state, params))
        {'scale': 'float32', 'w': 'float32'}
    """
    return _joined(trees.only(state, InFloat32State, where, ADVICE), params)


def set_master_params(state: State, masters: trees.Tree, *, where: str | None = None) -> tuple[trees.Tree, State]:
    """Start from float32 weights, or go on from others: params and a state which together are those weights.

    Args:
        state: an `InFloat32State` with a residual, or any optimizer state with one inside, from `init` of the params.
        masters: a tree like the params, float32 where they are to be split; with 8 bits it is rounded to nearest.
        where: as in `master_params`.

    Returns:
        The params, bfloat16 where the state has a residual and as in `masters` elsewhere, and the state.

    Raises:
        ValueError: as `master_params`; if the state keeps no residual; if a leaf to be split is not float32 or has another
            shape.

    Example:
        >>> masters = {"w": jnp.array([3.14159265])}
        >>> tx = in_float32(optax.adam(1e-3), residual=16)
        >>> state = tx.init(optax.tree_utils.tree_cast(masters, jnp.bfloat16))
        >>> params, state = set_master_params(state, masters)
        >>> print(params["w"], master_params(state, params)["w"])
        [3.14062] [3.1415927]
    """
    own = trees.only(state, InFloat32State, where, ADVICE)
    if own.residual is None:
        raise ValueError("state must keep a residual, in_float32(tx, residual=8 or 16): without one, cast the masters")

    def split(path: Any, residual: Any, master: Any) -> tuple[Any, Any]:
        if trees.is_absent(residual):
            return master, residual
        if np.shape(master) != residual.shape or jnp.result_type(master) != jnp.float32:
            raise ValueError(
                f"masters must be float32 of shape {residual.shape} at {trees.At(path)}, got "
                f"{jnp.result_type(master)} of shape {np.shape(master)}"
            )
        bits, master = jnp.iinfo(residual.dtype).bits, jnp.asarray(master)
        half = jnp.full(master.shape, 2**31, jnp.uint32)
        return rounding.split(master if bits == 16 else rounding.stochastic(master, half, 8), bits)

    pairs = jax.tree_util.tree_map_with_path(split, own.residual, masters, is_leaf=trees.is_absent)
    params, residual = (
        jax.tree.map(lambda _, pair, i=i: pair[i], own.residual, pairs, is_leaf=trees.is_absent) for i in (0, 1)
    )
    fresh = own._replace(residual=residual)
    return params, jax.tree.map(lambda node: fresh if node is own else node, state, is_leaf=lambda node: node is own)


@jax.custom_jvp
def _rounded(u: jax.Array, p: jax.Array, master: jax.Array, low: tuple, bits: Any) -> tuple[jax.Array, tuple]:
    """The update that leads from p to the new weight, and its residual; -0, which changes nothing, where p is kept."""
    total, rest = rounding.two_sum(master, u)
    if not low:
        old, new = master, rounding.round_to(total, p.dtype, bits, rest)
    else:
        total = _once(total if bits is None else rounding.stochastic(total, bits, 8, rest))
        new, kept = rounding.split(total, jnp.iinfo(low[0].dtype).bits)
        low = (kept,)
        old, new = rounding.widen(p), rounding.widen(new)
    return jnp.where(rounding.pattern(old) == rounding.pattern(new), -0.0, new - old), low


def _once(x: jax.Array) -> jax.Array:
    """The same numbers; on CPU divided by one, since XLA there keeps quotients and would find sums again for each result.

    From one array the weight and its residual are each written in place.
    """

    def over_one(x: jax.Array) -> jax.Array:
        return x / jnp.where(jnp.isnan(x), 2.0, 1.0)

    return jax.lax.platform_dependent(x, cpu=over_one, default=lambda x: x)


@_rounded.defjvp
def _rounded_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    update, low = _rounded(*primals)
    return (update, low), (tangents[0], tuple(np.zeros(x.shape, jax.dtypes.float0) for x in low))


def _wide(x: Any) -> Any:
    """A bfloat16 or float16 leaf as float32, others as they are."""
    if getattr(x, "dtype", None) not in (jnp.bfloat16, jnp.float16):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return rounding.widen(jnp.asarray(x))


def _joined(state: InFloat32State, params: Any) -> Any:
    """The params as `tx` sees them."""
    if state.residual is None:
        return jax.tree.map(_wide, params)

    def join(keys: Any, low: Any, p: Any) -> Any:
        if isinstance(low, optax.MaskedNode):
            return p
        absent = trees.is_absent(low)
        if absent == (getattr(p, "dtype", None) == jnp.bfloat16):
            raise ValueError(
                f"the param at {trees.At(keys)} is {jnp.result_type(p)}, but was not at init: cast before init, and apply "
                "updates with optax.apply_updates"
            )
        return p if absent else rounding.join(jnp.asarray(p), low)

    return jax.tree_util.tree_map_with_path(join, state.residual, params, is_leaf=trees.is_absent)


def _is_narrow(at: trees.At, leaf: Any, allowed: tuple) -> bool:
    """Whether a weight is narrower than float32; an error if in a way that is not allowed."""
    dtype = jnp.result_type(leaf)
    if dtype in allowed:
        return True
    if jnp.finfo(dtype).bits < 32:
        names = " or ".join(np.dtype(d).name for d in allowed)
        with_or_without = "with a" if len(allowed) == 1 else "without"
        raise ValueError(
            f"in_float32 {with_or_without} residual needs weights of {names}, or float32 and wider, got {dtype} at {at}"
        )
    return False
