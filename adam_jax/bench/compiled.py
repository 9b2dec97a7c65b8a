"""What the compilers of CPU, GPU and TPU make of a step, on a machine that need have none of the devices.

`libtpu` and the CUDA plugin of JAX compile ahead of time for a device that is only described. A row of the first table is
the step of one large leaf: bytes a parameter read and written by kernels of the leaf's size (an array that several kernels
read counts each time), how many such kernels there are, temporaries. The second compares the time to trace and to compile
many leaves, in one process.
"""

import contextlib
import io
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from adam_jax.bench import forms

__all__ = ["TARGETS", "NotInstalledError", "compile_times", "described", "kernels", "step_rows"]

SHAPE = (16384, 16384)
ODD_SHAPES = ((2**26,), (2**24, 3), (2**14, 4097), (16, 8, 32, 128, 512))
WIDTH = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "copy-start", "copy-done")
# what XLA needs to know of a GPU: the sizes that NVIDIA publishes
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": GPU.format(
        cores=132, clock=1.98, bandwidth=3352320000000, l2=52428800, memory=84978434048, major=9, name="H100"
    ),
    "b200": GPU.format(
        cores=148, clock=1.965, bandwidth=7672000000000, l2=132644864, memory=190000000000, major=10, name="B200"
    ),
}
TPUS = {"tpu-v5e": "v5e:2x2", "tpu-v6e": "v6e:2x2"}
TARGETS = ("cpu", *GPUS, *TPUS)


class NotInstalledError(Exception):
    """The compiler of a target is not installed."""


def described(target: str) -> Any:
    """A device to compile for, from its description.

    Args:
        target: one of `TARGETS`.

    Returns:
        A device; but for "cpu", nothing can run on it.

    Raises:
        NotInstalledError: saying what to install.

    Example:
        >>> described("cpu").platform
        'cpu'
    """
    jax.config.update("jax_platforms", "cpu")  # before anything asks for a device: no accelerator is looked for
    if target == "cpu":
        return jax.devices("cpu")[0]
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TF_CPP_MIN_LOG_LEVEL="3")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    try:
        if target in TPUS:
            return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices[0]
        with contextlib.redirect_stderr(io.StringIO()):
            jax.devices()  # registers the plugins
        of_gpu = {"target_config": GPUS[target], "topology": "1x1x1"}
        return topologies.get_topology_desc(platform="cuda", topology_name="", **of_gpu).devices[0]
    except Exception as error:  # each plugin has its own kinds
        reason = (str(error).splitlines() or [""])[0][:80]
        needed = f'no compiler for {target}: pip install "adam_jax[compilers]" on Python 3.12 or newer ({reason})'
        raise NotInstalledError(needed) from error


def kernels(text: str, size: int) -> list[tuple[str, float, float]]:
    r"""The operations of a compiled program's entry that touch arrays as large as the leaf.

    Args:
        text: of `compiled.as_text()`.
        size: elements of the leaf.

    Returns:
        For each operation its name and the bytes it reads and writes, a parameter.

    Example:
        >>> kernels("\nENTRY main {\n %a = f32[9] parameter(0)\n %b = f32[9] negate(%a)\n}", 9)
        [('%b', 4.0, 4.0)]
    """

    def width(shape: str) -> float:
        arrays = re.findall(r"\b(f32|s32|u32|bf16|f16|s16|u16|s8|u8|pred)\[([\d,]+)\]", shape)
        counts = [(WIDTH[dtype], math.prod(map(int, dims.split(",")))) for dtype, dims in arrays]
        return sum(bytes_ * count for bytes_, count in counts if count >= size // 64) / size

    shapes, found = {}, []
    for line in text[text.index("\nENTRY") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line)
        if not match:
            continue
        name, shape, operation, rest = match.groups()
        shapes[name] = shape
        if operation not in FREE:
            read = sum(width(shapes.get(a, "")) for a in re.findall(r"%[\w.\-]+", rest.split("), ")[0]))
            if read + width(shape) > 0.01:
                found.append((name, read, width(shape)))
    return found


def step_rows(target: str, only: str = "", shapes: Sequence[tuple[int, ...]] = (SHAPE,)) -> Iterator[dict[str, Any]]:
    """One row a form and shape: the compiled step of one large leaf.

    Args:
        target: one of `TARGETS`.
        only: part of the names of the forms wanted.
        shapes: of the leaf.

    Yields:
        target, form, shape, limit, bytes, kernels, temporaries (bytes a parameter) and seconds.

    Raises:
        NotInstalledError: where the target's compiler is not.

    Example:
        >>> row = next(step_rows("cpu", "optax adam"))
        >>> row["bytes"] >= row["limit"]
        True
    """
    device = described(target)
    for form in forms.FORMS:
        for shape in shapes if only in form.name else ():
            leaf, began, size = jax.ShapeDtypeStruct(shape, form.dtype), time.perf_counter(), math.prod(shape)
            with forms.uncached():
                program = _lowered(form.tx, device, leaf).compile()
            large = kernels(program.as_text(), size)
            moved = sum(read + written for _, read, written in large)
            if target == "cpu":  # copies in its text are of scalars or elided: XLA's own count is right
                moved = program.cost_analysis()["bytes accessed"] / size
            temporary = program.memory_analysis().temp_size_in_bytes / size
            yield {
                "target": target,
                "form": form.name,
                "shape": list(shape),
                "limit": form.limit,
                "bytes": round(moved, 3),
                "kernels": len(large),
                "temporaries": round(temporary, 3),
                "seconds": time.perf_counter() - began,
            }


def transformer_shapes(leaves: int, *, repeated: bool) -> list[tuple[int, ...]]:
    """The shapes of that many of GPT-2's leaves; not repeated, each a little larger than any before."""
    layer = [(768,), (768, 768), (768,), (768, 2304), (2304,), (768, 3072), (3072,), (3072, 768)]
    return [tuple(d + (0 if repeated else i // 8) for d in layer[i % 8]) for i in range(leaves)]


def compile_times(target: str, only: str, leaves: int, *, repeated: bool = True) -> Iterator[dict[str, Any]]:
    """One row a form: processor seconds to trace and lower, and to compile, a step of many leaves, and how often Optax's.

    Args:
        target: one of `TARGETS`.
        only: part of the names of the forms wanted.
        leaves: how many.
        repeated: of eight shapes, or each of its own.

    Yields:
        target, form, leaves, repeated, lower, compile (seconds), lower_ratio and compile_ratio.

    Raises:
        NotInstalledError: where the target's compiler is not.

    Example:
        >>> next(compile_times("cpu", "optax adam", 2))["compile_ratio"]
        1.0
    """
    device, base = described(target), None
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in transformer_shapes(leaves, repeated=repeated)]
    warm = [jax.ShapeDtypeStruct((8 + i,), jnp.float32) for i in range(2)]
    for form in forms.FORMS:
        if form.name != "optax adam" and (only not in form.name or form.dtype != jnp.float32):
            continue
        _lowered(form.tx, device, warm).compile()  # what Python imports and JAX traces once
        began = _busy()
        lowered = _lowered(form.tx, device, params)
        lower = _busy() - began
        with forms.uncached():
            lowered.compile()
        took = _busy() - began - lower
        base = base or (lower, took)
        yield {
            "target": target,
            "form": form.name,
            "leaves": leaves,
            "repeated": repeated,
            "lower": lower,
            "compile": took,
            "lower_ratio": lower / base[0],
            "compile_ratio": took / base[1],
        }


def _busy() -> float:
    """Seconds of processor time, of threads and finished children too: other programs on the machine do not count."""
    return time.process_time() + sum(os.times()[2:4])


def _lowered(tx: Any, device: Any, params: Any) -> Any:
    def there(tree: Any) -> Any:
        where = SingleDeviceSharding(device)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

    state = jax.eval_shape(tx.init, params)
    return jax.jit(forms.step_of(tx), donate_argnums=(0, 1)).lower(there(params), there(state), there(params))
