"""Milliseconds of a step on this machine, all optimizers taking turns, beside the copy bandwidth measured in the same run.

A busy machine slows all of them alike: compare figures of one run with each other. Optax's float32 Adam is one.
"""

import importlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import adam_jax
from adam_jax.bench import forms

__all__ = ["SHAPES", "figure", "measured"]


def _gpt2() -> list[tuple[int, ...]]:
    layer = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "one": lambda: [(4096, 4096)],
    "gpt2": _gpt2,
    "many": lambda: [(2000,)] * 2000,
    "table": lambda: [(1_000_000, 64)],
}


class Turn(NamedTuple):
    """One optimizer that takes turns.

    Attributes:
        name: for the table.
        run: takes a step and waits for it.
        figures: what is known of it beside its time.
    """

    name: str
    run: Callable[[], None]
    figures: dict[str, float]


def measured(shape: str, only: str = "", rounds: int = 25, scale: int = 1) -> list[dict[str, Any]]:
    """Medians of interleaved steps.

    Args:
        shape: one of `SHAPES`.
        only: part of the names of the forms wanted; Optax's adam and the copy are always there.
        rounds: how many steps each takes.
        scale: divides the first dimension of each leaf, to try it out.

    Returns:
        For each form: name, ms, its ratio to Optax's, the share of the copy bandwidth, bytes a parameter moved (by the
        compiler's count), kept as state and temporary, and seconds to trace and compile.

    Example:
        >>> [row["form"] for row in measured("one", "optax adam", rounds=2, scale=256)]
        ['copy', 'optax adam']
    """
    leaves = [(max(1, d[0] // scale), *d[1:]) for d in SHAPES[shape]()]
    size = sum(math.prod(leaf) for leaf in leaves)
    wanted = [form for form in forms.FORMS if form.name == "optax adam" or only in form.name]
    turns = [_copy(size), *(_jax(form, leaves, size) for form in wanted)]
    turns += [turn for peer in (_torch, _torchao, _flashoptim) if only == "" for turn in peer(leaves, size)]
    times: dict[str, list[float]] = {turn.name: [] for turn in turns}
    for turn in turns * (rounds + 1):  # the first round warms up
        began = time.perf_counter()
        turn.run()
        times[turn.name].append(1e3 * (time.perf_counter() - began))
    medians = {name: float(np.median(taken[1:])) for name, taken in times.items()}
    copy_rate, rows = 8 / medians["copy"], []
    for turn in turns:
        figures, ms = turn.figures, medians[turn.name]
        share = figures["moved"] / ms / copy_rate if "moved" in figures else None
        rows.append({"form": turn.name, "ms": ms, "ratio": ms / medians["optax adam"], "copy share": share, **figures})
    return rows


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Bars of the ratios to Optax's step.

    Args:
        rows: from `measured`.

    Returns:
        A Matplotlib figure that belongs to no window.

    Example:
        >>> len(figure([{"form": "adam", "ratio": 1.0}]).axes)
        1
    """
    drawn = Figure(figsize=(7, 0.6 + 0.32 * len(rows)), layout="constrained")
    axis = drawn.subplots()
    bars = axis.barh([row["form"] for row in rows], [row["ratio"] for row in rows], color="tab:blue")
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("time of a step, Optax's float32 Adam = 1")
    return drawn


def _copy(size: int) -> Turn:
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jax.block_until_ready(add(jnp.zeros(size)))]

    def run() -> None:
        held[0] = jax.block_until_ready(add(held[0]))

    return Turn("copy", run, {"moved": 8.0})


def _jax(form: forms.Form, leaves: list[tuple[int, ...]], size: int) -> Turn:
    params = [jnp.zeros(leaf, form.dtype) for leaf in leaves]
    gradients = [jax.random.normal(jax.random.key(i), leaf, form.dtype) for i, leaf in enumerate(leaves)]
    state = jax.jit(form.tx.init)(params)
    began = time.perf_counter()
    step: Any = jax.jit(forms.step_of(form.tx), donate_argnums=(0, 1)).lower(params, state, gradients).compile()
    took, memory, held = time.perf_counter() - began, step.memory_analysis(), [params, state]

    def run() -> None:
        held[:] = jax.block_until_ready(step(*held, gradients))

    moved = step.cost_analysis()["bytes accessed"] / size
    state_bytes = adam_jax.state_bytes(form.tx, params) / size
    figures = {"moved": moved, "state": state_bytes, "temporary": memory.temp_size_in_bytes / size, "compile": took}
    return Turn(form.name, run, figures)


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _in_torch(name: str, build: Callable[[Any], Any], leaves: list[tuple[int, ...]]) -> Turn:
    torch = importlib.import_module("torch")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    params = [torch.nn.Parameter(torch.zeros(leaf, device=where)) for leaf in leaves]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = build(params)

    def run() -> None:
        optimizer.step()
        if where == "cuda":
            torch.cuda.synchronize()

    return Turn(name, run, {})


def _torch(leaves: list[tuple[int, ...]], size: int) -> list[Turn]:
    del size
    torch = _installed("torch")
    return [_in_torch("PyTorch fused", lambda p: torch.optim.Adam(p, fused=True), leaves)] if torch else []


def _torchao(leaves: list[tuple[int, ...]], size: int) -> list[Turn]:
    del size
    torchao = _installed("torchao.optim")
    return [_in_torch("torchao Adam8bit", lambda p: torchao.Adam8bit(p), leaves)] if torchao else []


def _flashoptim(leaves: list[tuple[int, ...]], size: int) -> list[Turn]:
    flashoptim = _installed("flashoptim_jax")
    if not flashoptim:
        return []
    tx = flashoptim.flash_adam(1e-3, fused=jax.default_backend() == "gpu", master_weight_bits=None)
    params = [jnp.zeros(leaf) for leaf in leaves]
    gradients = [jax.random.normal(jax.random.key(i), leaf) for i, leaf in enumerate(leaves)]
    step, held = jax.jit(tx.step, donate_argnums=(0, 1)), [params, tx.init(params)]
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(held[1])) / size

    def run() -> None:
        held[:] = jax.block_until_ready(step(*held, gradients))

    return [Turn("flashoptim-jax", run, {"state": kept})]
