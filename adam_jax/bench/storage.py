"""Narrow moments when the gradients' scale changes, beside published 8-bit Adams.

All optimizers get the same gradients, normal noise, in leaves of 4096. At some step the noise of a leaf, or of every second
coordinate of it, becomes 100 times smaller or larger; other leaves stay as they are. Every update is compared with that of
float32 moments.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adam_jax
from adam_jax.bench import peers

__all__ = ["COLUMNS", "GROUPS", "NOTE", "SPREADS", "rows"]

SIZE = 4096
ALL = np.ones(SIZE, bool)
SECOND = np.arange(SIZE) % 2 == 0
CHANGES = {  # leaf: (factor, which coordinates change)
    "half ÷100": (0.01, SECOND),
    "half ×100": (100.0, SECOND),
    "all ÷100": (0.01, ALL),
    "all ×100": (100.0, ALL),
}
SPREADS = {"even": 0.0, "varying": 2.0}  # leaf: magnitudes are e^(spread N(0, 1)) inside it
GROUPS = {  # leaf and the coordinates looked at
    "half ÷100: they": ("half ÷100", SECOND),
    "half ÷100: the rest": ("half ÷100", ~SECOND),
    "half ×100: they": ("half ×100", SECOND),
    "half ×100: the rest": ("half ×100", ~SECOND),
    "all ÷100": ("all ÷100", ALL),
    "all ×100": ("all ×100", ALL),
}
NOTE = "even, varying: leaves whose gradients stay; mean squared error of the update over float32's mean square, and worst."
COLUMNS = ("form", *GROUPS, *SPREADS, "state")

Leaves = dict[str, np.ndarray]
Step = Callable[[Leaves], Leaves]  # from gradients to what is subtracted at a learning rate of 1


def rows(only: str = "", at: int = 1000, steps: int = 6000) -> Iterator[dict[str, Any]]:
    """One row an optimizer.

    Args:
        only: part of the names of the optimizers wanted.
        at: the step of the change.
        steps: how many.

    Yields:
        form (its name); for each of `GROUPS`, "worst" and "last": rms of the update over float32's, at the worst step since
        the change, and in the mean of the last 100; for each of `SPREADS`, the mean squared error of the
        update over float32's mean square, mean of the last 500 steps and worst; state, bytes a parameter. Or form and
        missing: why there is nothing.

    Example:
        >>> row = next(rows("int8", at=2, steps=4))
        >>> row["form"], round(row["state"], 1)
        ('adam_jax int8', 2.0)
    """
    for name, build in OPTIMIZERS.items():
        if only not in name:
            continue
        try:
            with peers.quietly():
                state = _state(build)
                step, _ = build(next(_gradients(0, 1)))
                ratios, errors = _measured(step, _ours(None, next(_gradients(0, 1)))[0], at, steps)
        except Exception as error:
            if name.startswith("adam_jax"):
                raise
            yield {"form": name, "missing": peers.why_missing(error)}  # what others' software may lack
            continue
        followed = {group: {"worst": _farthest(x), "last": float(x[-100:].mean())} for group, x in ratios.items()}
        safe = {leaf: {"mean": float(x[-500:].mean()), "worst": float(x.max())} for leaf, x in errors.items()}
        yield {"form": name, **followed, **safe, "state": state}


def _state(build: Callable[[Leaves], tuple[Step, Callable[[], int]]], size: int = 1 << 20) -> float:
    """Bytes of state a parameter of a leaf of a million."""
    step, state = build({"w": np.zeros(size, np.float32)})
    step({"w": np.ones(size, np.float32)})
    return state() / size


def _ours(storage: Any, like: Leaves) -> tuple[Step, Callable[[], int]]:
    tx = adam_jax.scale_by_adam(storage=storage)
    return _in_jax(tx.init, tx.update, like)


def _flash(like: Leaves) -> tuple[Step, Callable[[], int]]:
    tx = peers.flash_adam(1.0, None)

    def update(gradients: Any, state: Any) -> tuple[Any, Any]:
        params, state = tx.step(jax.tree.map(jnp.zeros_like, gradients), state, gradients)
        return jax.tree.map(jnp.negative, params), state

    return _in_jax(tx.init, update, like)


def _in_jax(init: Callable[..., Any], update: Callable[..., Any], like: Leaves) -> tuple[Step, Callable[[], int]]:
    """A function that takes a step, and one that counts the bytes of its state."""
    held, update = [init(jax.tree.map(jnp.zeros_like, like))], jax.jit(update)

    def step(gradients: Leaves) -> Leaves:
        updates, held[0] = update(gradients, held[0])
        return jax.tree.map(np.asarray, updates)

    return step, lambda: sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))


def _in_torch(peer: peers.Peer, like: Leaves) -> tuple[Step, Callable[[], int]]:
    torch, where = importlib.import_module("torch"), peers.torch_device()
    torch.set_num_threads(1)  # leaves are small
    params = {name: torch.nn.Parameter(torch.zeros(leaf.shape, device=where)) for name, leaf in like.items()}
    optimizer = peer([*params.values()], 1.0)

    def step(gradients: Leaves) -> Leaves:
        for name, param in params.items():
            param.data.zero_()
            param.grad = torch.tensor(gradients[name], device=where)
        optimizer.step()
        return {name: -param.detach().cpu().numpy() for name, param in params.items()}

    return step, lambda: peers.torch_state_bytes(optimizer)


OPTIMIZERS: dict[str, Callable[[Leaves], tuple[Step, Callable[[], int]]]] = {
    **{f"adam_jax {storage}": functools.partial(_ours, storage) for storage in ("float32", "bfloat16", "int8")},
    **{peer.name: functools.partial(_in_torch, peer) for peer in (*peers.TORCH, *peers.NARROWER)},
    "flashoptim-jax": _flash,
}


def _gradients(at: int, steps: int) -> Iterator[Leaves]:
    """The noise of every step, the same each time it is asked for."""
    scales = {name: np.exp(spread * np.random.default_rng(9).normal(size=SIZE)) for name, spread in SPREADS.items()}
    for t in range(steps):
        noise = np.random.default_rng([0, t]).normal(size=SIZE)
        leaves = {name: noise * np.where(which & (t >= at), factor, 1.0) for name, (factor, which) in CHANGES.items()}
        leaves |= {name: noise * scale for name, scale in scales.items()}
        yield {name: leaf.astype(np.float32) for name, leaf in leaves.items()}


def _measured(step: Step, exact: Step, at: int, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ratios of rms updates to float32's at every step from the change on, and NMSE of unchanged leaves at every step."""
    ratios, errors = {name: [] for name in GROUPS}, {name: [] for name in SPREADS}
    for t, leaves in enumerate(_gradients(at, steps)):
        mine, right = step(leaves), exact(leaves)
        if t >= at:
            for name, (leaf, which) in GROUPS.items():
                ratios[name].append(_rms(mine[leaf][which]) / _rms(right[leaf][which]))
        for name in SPREADS:
            errors[name].append((_rms(mine[name] - right[name]) / _rms(right[name])) ** 2)
    return {name: np.array(x) for name, x in ratios.items()}, {name: np.array(x) for name, x in errors.items()}


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))


def _farthest(ratios: np.ndarray) -> float:
    return float(ratios[np.abs(np.log(ratios)).argmax()])
