"""Milliseconds of a step on this machine, beside Optax's and the copy bandwidth measured in the same rounds.

Each optimizer takes turns with Optax's float32 Adam and a copy, so that a busy machine slows all of them alike, and only
these three are in memory together.
"""

import ctypes
import functools
import gc
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import adam_jax
from adam_jax.bench import forms, peers

__all__ = ["NOTE", "SHAPES", "figure", "measured"]

ROWS = 4096  # of a table, that a step touches
NOTE = (
    "least: what a step must move; of copy rate: had it moved no more. moved: by the compiler's count, which knows no "
    "caches. peak: parameters, gradients, state and temporaries; of JAX's by the compiler, of PyTorch's by its allocator "
    "(GPU) or by Linux. compile: trace and compile; of PyTorch's the first step. On a CPU with AVX-512, "
    "XLA_FLAGS=--xla_cpu_prefer_vector_width=512 halves the instructions that narrow forms wait for."
)


def _gpt2(scale: int) -> list[tuple[int, ...]]:
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
    return [(max(1, d // scale), *rest) for d, *rest in [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]]


SHAPES: dict[str, Callable[[int], list[tuple[int, ...]]]] = {  # from a divisor of the size, to try it
    "one": lambda scale: [(4096 // scale, 4096)],
    "gpt2": _gpt2,
    "many": lambda scale: [(2000,)] * (2000 // scale),
    "table": lambda scale: [(1_000_000 // scale, 64)],
}


class Turn(NamedTuple):
    """One optimizer that takes turns.

    Attributes:
        name: for the table.
        limit: bytes a parameter that a step reads and writes at least, where it touches all.
        build: to a function that takes a step and waits for it, and what is known of it beside its time.
    """

    name: str
    limit: float | None
    build: Callable[[], tuple[Callable[[], None], dict[str, float]]]


def measured(shape: str, only: str = "", rounds: int = 25, seconds: float = 10, scale: int = 1) -> Iterator[dict[str, Any]]:
    """Medians of interleaved steps.

    Args:
        shape: one of `SHAPES`.
        only: part of the names of the optimizers wanted; the copy and Optax's adam are always there.
        rounds: how many steps each takes, at most.
        seconds: after which an optimizer stops taking turns, once it has taken three.
        scale: divides the size, to try it out.

    Yields:
        For each optimizer: form (its name), ms, ratio (to Optax's adam in the same rounds), share (of the copy bandwidth,
        had it moved no more than it must), limit and moved (bytes a parameter that it must move, and that its compiler
        counts), state and peak (bytes a parameter kept, and in use during a step, parameters and gradients included) and
        compile (seconds to trace and compile; of PyTorch's, of the first step). Or form and missing: why there is nothing.

    Example:
        >>> [row["form"] for row in measured("one", "optax adam", rounds=2, scale=256)]
        ['copy', 'optax adam']
    """
    leaves = SHAPES[shape](scale)
    size = sum(math.prod(leaf) for leaf in leaves)

    @functools.cache
    def gradients(dtype: Any) -> list[jax.Array]:
        return [jax.random.normal(jax.random.key(i), leaf, dtype) for i, leaf in enumerate(leaves)]

    optax_form, *ours = (Turn(form.name, form.limit, functools.partial(_form, form, gradients)) for form in forms.FORMS)
    theirs = [Turn(peer.name, peer.limit, functools.partial(_in_torch, peer, leaves)) for peer in peers.TORCH]
    theirs += [
        Turn("flashoptim-jax", 16, functools.partial(_flash, None, gradients)),
        Turn("flashoptim-jax, 24-bit weights", 12, functools.partial(_flash, 24, gradients)),
    ]
    if shape == "table":
        ours.append(Turn(f"row_adam, {ROWS} rows", None, functools.partial(_rows, leaves[0])))
        theirs.append(Turn(f"PyTorch SparseAdam, {ROWS} rows", None, functools.partial(_torch_rows, leaves[0])))
    (copy, _), (optax_adam, figures) = _copy(size), optax_form.build()
    copy_ms, ms = _medians([copy, optax_adam], rounds, seconds)
    yield _row("copy", 8, [copy_ms, copy_ms, ms], {})
    yield _row(optax_form.name, optax_form.limit, [ms, copy_ms, ms], figures)
    for turn in (turn for turn in (*ours, *theirs) if only in turn.name):
        try:
            with peers.quietly():
                run, figures = turn.build()
        except Exception as error:
            if turn in ours:
                raise
            yield {"form": turn.name, "missing": peers.why_missing(error)}  # what others' software may lack
            continue
        copy_ms, optax_ms, ms = _medians([copy, optax_adam, run], rounds, seconds)
        del run
        gc.collect()  # what it held may hold itself
        yield _row(turn.name, turn.limit, [ms, copy_ms, optax_ms], figures)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Bars of the ratios to Optax's step, and of the memory.

    Args:
        rows: from `measured`.

    Returns:
        A Matplotlib figure that belongs to no window.

    Example:
        >>> len(figure([{"form": "adam", "ratio": 1.0, "peak": 16.0}]).axes)
        2
    """
    shown = [row for row in rows if "ratio" in row]
    drawn = Figure(figsize=(9, 1 + 0.3 * len(shown)), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for axis, name, label in (
        (axes[0], "ratio", "time of a step, Optax's float32 Adam = 1"),
        (axes[1], "peak", "bytes a parameter in use during a step"),
    ):
        bars = axis.barh([row["form"] for row in shown], [row.get(name, math.nan) for row in shown], color="tab:blue")
        axis.bar_label(bars, [f"{row[name]:.2f}" if name in row else "" for row in shown], padding=3)
        axis.margins(x=0.25, y=0.01)
        axis.set_xlabel(label)
    axes[0].axvline(1.0, color="black", linewidth=0.8, zorder=0)
    axes[0].set_xscale("log")
    axes[0].invert_yaxis()
    return drawn


def _row(name: str, limit: float | None, times: Sequence[float], figures: dict[str, float]) -> dict[str, Any]:
    ms, copy_ms, optax_ms = times
    least = {} if limit is None else {"share": limit / 8 * copy_ms / ms, "limit": limit}
    return {"form": name, "ms": ms, "ratio": ms / optax_ms, **least, **figures}


def _medians(runs: Sequence[Callable[[], None]], rounds: int, seconds: float) -> list[float]:
    """Milliseconds, of rounds in which each runs once; a first round warms up."""
    times: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(times) <= rounds and (len(times) <= 3 or time.perf_counter() < until):
        times.append([])
        for run in runs:
            began = time.perf_counter()
            run()
            times[-1].append(1e3 * (time.perf_counter() - began))
    return [float(ms) for ms in np.median(times[1:], axis=0)]


def _copy(size: int) -> tuple[Callable[[], None], dict[str, float]]:
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jax.block_until_ready(add(jnp.zeros(size)))]

    def run() -> None:
        held[0] = jax.block_until_ready(add(held[0]))

    return run, {}


def _in_jax(step: Any, params: Any, state: Any, *batch: Any) -> tuple[Callable[[], None], dict[str, float]]:
    """A step from params, state and a batch to params and state, which it writes over."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    began = time.perf_counter()
    with forms.uncached():
        compiled: Any = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *batch).compile()
    took, memory, held = time.perf_counter() - began, compiled.memory_analysis(), [params, state]
    peak = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    )

    def run() -> None:
        held[:] = jax.block_until_ready(compiled(*held, *batch))

    return run, {
        "moved": compiled.cost_analysis()["bytes accessed"] / size,
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / size,
        "peak": peak / size,
        "compile": took,
    }


def _form(form: forms.Form, gradients: Any) -> tuple[Callable[[], None], dict[str, float]]:
    params = jax.tree.map(jnp.zeros_like, gradients(form.dtype))
    return _in_jax(forms.step_of(form.tx), params, jax.jit(form.tx.init)(params), gradients(form.dtype))


def _flash(bits: int | None, gradients: Any) -> tuple[Callable[[], None], dict[str, float]]:
    tx, dtype = peers.flash_adam(1e-3, bits), jnp.bfloat16 if bits else jnp.float32
    params = jax.tree.map(jnp.zeros_like, gradients(dtype))
    return _in_jax(tx.step, params, tx.init(params), gradients(dtype))


def _some_rows(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, shape[0], (ROWS,), np.int32), rng.normal(size=(ROWS, shape[1])).astype(np.float32)


def _rows(shape: tuple[int, ...]) -> tuple[Callable[[], None], dict[str, float]]:
    """A step of other rows each time, which all wait for 500 skipped steps: what costs most."""
    tx = adam_jax.tables.row_adam(1e-3)

    def step(table: Any, state: Any, ids: Any, gradients: Any) -> Any:
        ids = (ids + ROWS * state.count) % shape[0]
        rows, table, state = tx.gather(table, state, ids)
        return tx.update(table, state, ids, gradients + 0.0 * rows)

    table = jnp.zeros(shape)
    state = tx.init(table)._replace(count=jnp.int32(501), row_count=jnp.ones(shape[0], jnp.int32))
    run, figures = _in_jax(step, table, state, *map(jnp.asarray, _some_rows(shape)))
    del figures["moved"]  # the compiler counts the whole table
    return run, figures


def _in_torch(peer: peers.Peer, leaves: list[tuple[int, ...]]) -> tuple[Callable[[], None], dict[str, float]]:
    torch, where = importlib.import_module("torch"), peers.torch_device()
    params = [torch.nn.Parameter(torch.zeros(leaf, device=where)) for leaf in leaves]
    for param in params:
        param.grad = torch.randn_like(param)
    return _stepping(peer(params, 1e-3), params)


def _torch_rows(shape: tuple[int, ...]) -> tuple[Callable[[], None], dict[str, float]]:
    """PyTorch's step for a table, the coalescing of its gradient included."""
    torch, where = importlib.import_module("torch"), peers.torch_device()
    table = torch.nn.Parameter(torch.zeros(shape, device=where))
    ids, gradients = (torch.tensor(x, device=where) for x in _some_rows(shape))

    def give() -> None:
        table.grad = torch.sparse_coo_tensor(ids[None].long(), gradients, shape)

    return _stepping(torch.optim.SparseAdam([table], lr=1e-3), [table], give)


def _stepping(
    optimizer: Any, params: list[Any], give: Callable[[], None] = lambda: None
) -> tuple[Callable[[], None], dict[str, float]]:
    """Steps of PyTorch's; the first makes the state, and compiles where something does."""
    torch, on_gpu, size = importlib.import_module("torch"), params[0].is_cuda, sum(param.numel() for param in params)

    def run() -> None:
        give()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    began = time.perf_counter()
    run()
    took, state = time.perf_counter() - began, peers.torch_state_bytes(optimizer)
    figures = {"state": state / size, "compile": took}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        run()
        return run, {**figures, "peak": torch.cuda.max_memory_allocated() / size}
    held = state + sum(x.nbytes for param in params for x in (param, param.grad) if not x.is_sparse)
    rise = _rise(run)
    return run, figures if rise is None else {**figures, "peak": (held + rise) / size}


def _rise(run: Callable[[], None]) -> int | None:
    """Bytes by which this process grows during a run and may shrink again, where Linux says."""
    if sys.platform != "linux":
        return None
    # glibc's malloc gives back what it has at hand, or a run that takes that would not be seen to
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident_peak()
        run()
        return _resident_peak() - before
    except OSError:
        return None


def _resident_peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
