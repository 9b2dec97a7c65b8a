"""Low-precision weights that still learn: what goes last in a chain when the params are bfloat16 or float16.

A bfloat16 weight has 8 significant bits: adding an update below half its spacing, 1/512 of the weight, changes nothing, and
training stands still at the learning rates that Adam is used with. `stochastic_rounding` rounds the sum up or down at
random, without bias. `master_residual` keeps the low bits of a float32 weight next to the bfloat16 one.

Both return the float32 difference of the new weight and the old one, so that the stock `optax.apply_updates`, which computes
`(p + u).astype(p.dtype)`, lands on exactly the weight they chose. With p the old weight and q the new one, rounded from the
sum s = p + u, the number p + fl(q - p) rounds to q:

* |q| >= |p|: fl errs by 2^-23 |q| at most, and weights are 2^-11 |q| apart or more.
* |q| < |p|, with 2^e <= |p| < 2^(e+1): s is a multiple of 2^(e-24), whether u is small or cancels p, and so is q. The
  difference q - p is a multiple of 2^(e-23), or no larger than 2^e: it is exact.

(Below 3e-36, where the difference of two weights is subnormal, processors that flush such numbers leave the weight where it
was; above 1e38 the difference can overflow.)

Nothing may come between these transformations and `optax.apply_updates`: an update that is scaled, clipped or rounded after
them no longer leads to the weight they chose. Where it can be seen, in a state, that is an error (`master_params`,
`set_master_params`); from inside a chain that ends in, say, `optax.scale` after `stochastic_rounding` it cannot be.
`in_float32` leaves no room for it. `optax.apply_updates` is meant, not Equinox's function of that name, which adds without
casting and would turn the weights to float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adam_jax import rounding, trees

__all__ = [
    "MasterResidualState",
    "StochasticRoundingState",
    "in_float32",
    "master_params",
    "master_residual",
    "set_master_params",
    "stochastic_rounding",
]


class StochasticRoundingState(NamedTuple):
    """What the next rounding needs.

    Attributes:
        count: int32 scalar, the number of updates made.
    """

    count: ArrayLike


class MasterResidualState(NamedTuple):
    """What bfloat16 weights lack of the float32 weights that are being trained.

    Attributes:
        count: int32 scalar, the number of updates made.
        residual: a tree like the params, uint16 or uint8: the bits of the float32 pattern after the first 16. `None` for
            leaves that are not bfloat16.
    """

    count: ArrayLike
    residual: Any


def stochastic_rounding(seed: ArrayLike = 0) -> optax.GradientTransformationExtraArgs:
    """Round bfloat16 and float16 weights up or down at random, without bias; goes last in a chain.

    The new weight is one of the two neighbours of p + u on the grid of p's dtype, the upper one with a probability equal to
    the remainder, so that updates far below the spacing act as they should on average. The draws are a low-discrepancy
    sequence for each element (`adam_jax.rounding`), a function of the seed, the count, the leaf's path and the element's
    index: replicas and shardings agree (inside `shard_map`, the index is that in the shard). Weights have no extra state.

    Leaves of float32 and wider pass through as they are. A finite sum beyond the dtype's largest number stays at that;
    infinities and NaN pass through.

    Args:
        seed: integer, Python's or an array.

    Returns:
        A transformation with state `StochasticRoundingState`, whose updates are float32; `update` needs the params.

    Raises:
        ValueError: for a seed that is no integer; from `init` and `update`, for weights narrower than float32 that are
            neither bfloat16 nor float16; from `update`, where the params are not given.

    Example:
        >>> tx = optax.chain(optax.sgd(1e-4), stochastic_rounding())
        >>> params = jnp.ones(10_000, jnp.bfloat16)
        >>> updates, state = tx.update(jnp.full(10_000, 10.0), tx.init(params), params)
        >>> moved = optax.apply_updates(params, updates)
        >>> print(moved.dtype, jnp.unique(moved), f"{moved.astype(jnp.float32).mean():.3f}")
        bfloat16 [0.996094 1] 0.999
    """
    _check_seed(seed)

    def init_fn(params: Any) -> StochasticRoundingState:
        trees.map_params(lambda path, leaf: _is_narrow(path, leaf, "stochastic_rounding"), params)
        return StochasticRoundingState(jnp.zeros([], jnp.int32))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args

        def step(u: ArrayLike, p: Any, path: str) -> tuple[Any, Any, str]:
            if not _is_narrow(path, p, "stochastic_rounding"):
                return u, p, path
            old = _wide(p)
            bits = rounding.draws(p.shape, rounding.stream(seed, path), state.count)
            return _landing(old, rounding.round_to(old + jnp.asarray(u, jnp.float32), p.dtype, bits)), p, path

        updates, _ = trees.map_updates(step, updates, [_given(params), _paths(params)], params)
        return updates, StochasticRoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def master_residual(bits: int = 16, *, seed: ArrayLike = 0) -> optax.GradientTransformationExtraArgs:
    """Train float32 weights of which the params are the bfloat16 roundings; goes last in a chain.

    With 16 bits of residual the float32 weight is whole: given the same float32 updates, weight and residual are the run
    with float32 params, bit for bit, in 4 bytes (for weights from 3e-36 to 1e38). With 8 bits the weight has 24, in
    3 bytes, and is rounded to them without bias. The bfloat16 weights are the roundings to nearest;
    ties go away from zero (`adam_jax.rounding.split` says why they must).

    `optax.chain(tx, master_residual())` gives tx what it always gets: gradients of the params' dtype, bfloat16 unless they
    are cast, which makes updates bfloat16 too, and the bfloat16 params, of which a weight decay is then taken.
    `in_float32(tx, master_residual())` gives it float32 gradients and weights.

    Leaves of float32 and wider pass through as they are.

    Args:
        bits: 16 or 8.
        seed: integer, Python's or an array; of use with 8 bits only.

    Returns:
        A transformation with state `MasterResidualState`, whose updates are float32; `update` needs the params. A new state
        means float32 weights equal to the params; `set_master_params` starts from others.

    Raises:
        ValueError: for other `bits`, or a seed that is no integer; from `init` and `update`, for weights narrower than
            float32 that are not bfloat16; from `update`, where the params are not given or their dtype has changed.

    Example:
        >>> tx = optax.chain(optax.sgd(1e-4), master_residual())
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> updates, state = tx.update(jnp.full(1, 10.0), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, master_params(state, params))
        [1] [0.999]
    """
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {bits!r}")
    _check_seed(seed)

    def init_fn(params: Any) -> MasterResidualState:
        def empty(path: str, leaf: Any) -> jax.Array | None:
            return jnp.zeros_like(leaf, dtype=f"uint{bits}") if _is_split(path, leaf) else None

        return MasterResidualState(jnp.zeros([], jnp.int32), trees.map_params(empty, params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args

        def step(u: ArrayLike, p: Any, residual: Any, path: str) -> tuple[Any, Any, Any, str]:
            _check_as_at_init(path, p, split=residual is not None)
            if residual is None:
                return u, p, None, path
            master = rounding.join(p, residual) + jnp.asarray(u, jnp.float32)
            if bits == 8:
                draws = rounding.draws(p.shape, rounding.stream(seed, path), state.count)
                master = rounding.stochastic(master, draws, 8)
            weight, residual = rounding.split(master, bits)
            return _landing(_wide(p), _wide(weight)), p, residual, path

        trio = [_given(params), state.residual, _paths(params)]
        updates, (_, residual, _) = trees.map_updates(step, updates, trio, params)
        return updates, MasterResidualState(optax.safe_increment(state.count), residual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_float32(
    tx: optax.GradientTransformation, rounding: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Run `tx` as if the params were float32, then round: gradients, weights and state are float32 inside.

    With `master_residual(16)` this is exactly the float32 run of `tx`, weight decay included, whatever the dtype of the
    gradients that come in. Everything that changes updates belongs into `tx`: schedules, clipping, decay, the learning rate;
    and so do Optax's `apply_if_finite` and `MultiSteps`, which need updates in the dtype of the gradients, and
    `inject_hyperparams`, which casts the learning rate to it.

    Args:
        tx: any Optax transformation, with the learning rate; what it gets are float32 gradients and weights.
        rounding: `stochastic_rounding(...)` or `master_residual(...)`.

    Returns:
        A transformation whose state is the pair of both states, as that of their chain.

    Raises:
        ValueError: from `init`, if `rounding` is neither of these, or `tx` rounds already; from `update`, where the params
            are not given.

    Example:
        >>> tx = in_float32(optax.adamw(1e-3, weight_decay=0.1), master_residual())
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> updates, state = tx.update(jnp.ones(1, jnp.bfloat16), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params, master_params(state, params))
        [1] [0.9989]
    """
    inside = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> tuple[Any, Any]:
        own = rounding.init(params)
        if not isinstance(own, StochasticRoundingState | MasterResidualState):
            raise ValueError(
                f"rounding must be stochastic_rounding or master_residual, got one with state {type(own).__name__}"
            )
        state = inside.init(jax.tree.map(_wide, params))
        if _found(state, StochasticRoundingState | MasterResidualState):
            raise ValueError("tx must not round: it has a stochastic_rounding or master_residual of its own; leave that out")
        return state, own

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        state, own = state
        masters = jax.tree.map(_wide, _given(params)) if isinstance(own, StochasticRoundingState) else _joined(own, params)
        updates, state = inside.update(jax.tree.map(_wide, updates), state, masters, **extra_args)
        updates, own = rounding.update(updates, own, params)
        return updates, (state, own)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def master_params(state: Any, params: Any) -> Any:
    """The float32 weights that are being trained: the params and what a `master_residual` kept of them.

    Args:
        state: a `MasterResidualState`, or any optimizer state with exactly one inside. Of a `flax.nnx.Optimizer` it is
            `nnx.as_pure(optimizer.opt_state)`; then give `nnx.as_pure(params)`, too.
        params: the current params.

    Returns:
        A tree like `params`, float32 where they are bfloat16; other leaves are the params' own.

    Raises:
        ValueError: if the state holds no `MasterResidualState`, or several, or if it shows that something comes after it in
            its chain.

    Example:
        >>> params = {"w": jnp.ones(1, jnp.bfloat16), "scale": jnp.ones(1)}
        >>> jax.tree.map(lambda p: str(p.dtype), master_params(master_residual().init(params), params))
        {'scale': 'float32', 'w': 'float32'}
    """
    return _joined(_only(state), params)


def set_master_params(state: Any, masters: Any) -> tuple[Any, Any]:
    """Start from float32 weights, or go on from others: params and a state which together are those weights.

    Args:
        state: a `MasterResidualState`, or any optimizer state with exactly one inside, from `init` of the bfloat16 params.
        masters: a tree like the params, float32 where they are to be split; with 8 bits it is rounded to nearest.

    Returns:
        The params, bfloat16 where the state has a residual and as in `masters` elsewhere, and the state.

    Raises:
        ValueError: as `master_params`, and if a leaf to be split is not float32 or has another shape.

    Example:
        >>> masters = {"w": jnp.array([3.14159265])}
        >>> tx = optax.chain(optax.adam(1e-3), master_residual())
        >>> state = tx.init(optax.tree_utils.tree_cast(masters, jnp.bfloat16))
        >>> params, state = set_master_params(state, masters)
        >>> print(params["w"], master_params(state, params)["w"])
        [3.14062] [3.1415927]
    """
    own = _only(state)

    def split(path: Any, residual: Any, master: Any) -> tuple[Any, Any]:
        if trees.is_absent(residual):
            return master, residual
        if np.shape(master) != residual.shape or jnp.result_type(master) != jnp.float32:
            raise ValueError(
                f"masters must be float32 of shape {residual.shape} at {trees.path_of(path) or 'the root'}, got "
                f"{jnp.result_type(master)} of shape {np.shape(master)}"
            )
        bits, master = jnp.iinfo(residual.dtype).bits, jnp.asarray(master)
        half = jnp.full(master.shape, 2**31, jnp.uint32)
        return rounding.split(master if bits == 16 else rounding.stochastic(master, half, 8), bits)

    pairs = jax.tree_util.tree_map_with_path(split, own.residual, masters, is_leaf=trees.is_absent)
    params, residual = (
        jax.tree.map(lambda _, pair, i=i: pair[i], own.residual, pairs, is_leaf=trees.is_absent) for i in (0, 1)
    )
    fresh = MasterResidualState(own.count, residual)
    return params, jax.tree.map(lambda node: fresh if _is_master(node) else node, state, is_leaf=_is_master)


def _landing(old: jax.Array, new: jax.Array) -> jax.Array:
    """The float32 update that leads from one weight to another; -0, which changes nothing, where they are the same."""
    same = jax.lax.bitcast_convert_type(old, jnp.uint32) == jax.lax.bitcast_convert_type(new, jnp.uint32)
    return jnp.where(same, -0.0, new - old)


def _wide(x: Any) -> Any:
    """A bfloat16 or float16 leaf as float32, others as they are; by bits: XLA may drop a rounding that is cast back."""
    dtype = getattr(x, "dtype", None)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else x.dtype)
    if dtype == jnp.bfloat16:
        return rounding.join(jnp.asarray(x), jnp.zeros(x.shape, jnp.uint8))
    return jnp.asarray(x, jnp.float32) if dtype == jnp.float16 else x


def _joined(state: MasterResidualState, params: Any) -> Any:
    def join(keys: Any, residual: Any, p: Any) -> Any:
        if trees.is_absent(residual):
            return p
        _check_as_at_init(trees.path_of(keys), p, split=True)
        return rounding.join(jnp.asarray(p), residual)

    return jax.tree_util.tree_map_with_path(join, state.residual, _given(params), is_leaf=trees.is_absent)


def _is_narrow(path: str, leaf: Any, name: str, allowed: tuple = (jnp.bfloat16, jnp.float16)) -> bool:
    """Whether a weight is narrower than float32; an error if it is narrower in a way that `name` cannot handle."""
    dtype = jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
    if dtype in allowed:
        return True
    if jnp.finfo(dtype).bits < 32:
        names = " or ".join(np.dtype(d).name for d in allowed)
        raise ValueError(f"{name} needs weights of {names}, or float32 and wider, got {dtype} at {path or 'the root'}")
    return False


def _is_split(path: str, leaf: Any) -> bool:
    return _is_narrow(path, leaf, "master_residual", (jnp.bfloat16,))


def _check_as_at_init(path: str, p: Any, *, split: bool) -> None:
    if _is_split(path, p) != split:
        raise ValueError(
            f"the param at {path or 'the root'} is {p.dtype}, but was not at init: cast before init, and apply updates with "
            "optax.apply_updates"
        )


def _paths(params: Any) -> Any:
    return trees.map_params(lambda path, _: path, params)


def _given(params: Any) -> Any:
    if params is None:
        raise ValueError("rounding weights needs the params: call update(gradients, state, params)")
    return params


def _check_seed(seed: ArrayLike) -> None:
    if isinstance(seed, bool) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise ValueError(f"seed must be an integer, got {seed!r}")


def _is_master(node: Any) -> bool:
    return isinstance(node, MasterResidualState)


def _found(state: Any, kind: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind)) if isinstance(node, kind)]


def _only(state: Any) -> MasterResidualState:
    found = _found(state, MasterResidualState)
    if len(found) != 1:
        raise ValueError(
            f"state must hold exactly one MasterResidualState, got {len(found)}: end the chain in master_residual"
        )
    _check_last(state)
    return found[0]


def _check_last(state: Any) -> None:
    """Raise if a chain's state, a plain tuple, has something after the residual that is known to change updates."""
    changing = optax.EmptyState | optax.ScaleByScheduleState  # every stateless transformation, and learning rates
    if type(state) is not tuple:
        return
    for i, part in enumerate(state):
        if _found(part, MasterResidualState):
            for later in state[i + 1 :]:
                if isinstance(later, changing):
                    raise ValueError("master_residual must come last in its chain: what follows it undoes its rounding")
            _check_last(part)
