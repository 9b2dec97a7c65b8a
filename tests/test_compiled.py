"""What the compilers of CPU, GPU and TPU make of a step: bytes, kernels, temporaries, and how long they take.

Each target is asked once, in a process of its own, since a compiler for a described device is chosen before JAX starts.
"""

import functools
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.bench import forms

ACCELERATORS = ("h100", "b200", "tpu-v5e", "tpu-v6e")
SLACK = 0.1  # bytes a parameter, for scalars and for what a tiling leaves over
# form: bytes a parameter and kernels, at most, on GPU and on TPU; a float32 step reads p, m, v, g and writes p, m, v
LIMITS = {
    "adam": ((28, 1), (28, 1)),
    "adam root": ((28, 1), (28, 1)),
    "adam bfloat16": ((20, 1), (20, 1)),
    "adam int8": ((16, 1), (16, 1)),
    "clip, adam": ((32, 2), (32, 2)),
    "skip_nonfinite(adam)": ((32, 2), (32, 2)),
    "skip_nonfinite(clip, int8)": (
        (20, 2),
        (26, 4),
    ),  # reads the gradient twice; on TPU codes are written twice
    "bfloat16 weights, rounded, int8": ((10, 1), (10, 1)),
    "bfloat16 weights, rounded, bfloat16": ((14, 1), (14, 1)),
    "24-bit weights, int8": ((12, 1), (12, 1)),
    "32-bit weights, float32": ((26, 1), (26, 1)),
}
ON_V6E = {"24-bit weights, int8": (24, 3)}  # not at its limit: XLA writes the float32 weights and reads them again
TEMPORARIES = {  # bytes a parameter; none elsewhere
    ("skip_nonfinite(clip, int8)", "tpu-v5e"): 2,
    ("skip_nonfinite(clip, int8)", "tpu-v6e"): 2,
    ("24-bit weights, int8", "tpu-v6e"): 4,
}
# form: bytes and temporaries on CPU, where a kernel writes one array
CPU = {
    "adam": (40, 0),
    "adam root": (44, 0),
    "adam bfloat16": (28, 0),
    "adam int8": (20, 0),
    "clip, adam": (44, 0),
    "24-bit weights, int8": (30, 4),
    "32-bit weights, float32": (50, 4),
}
# form: processor time to lower and to compile 48 leaves of GPT-2's shapes, in Optax's
MANY = {
    "cpu": {"adam": (1.8, 1.8), "clip, adam": (2, 2.5), "adam bfloat16": (5.5, 5.5), "adam int8": (5, 7)},
    "h100": {
        "adam": (2, 2),
        "clip, adam": (2, 3),
        "skip_nonfinite(adam)": (3, 4),
        "adam bfloat16": (5.5, 5),
        "adam int8": (6, 9),
    },
}


@functools.cache
def asked(*arguments: str, every: bool = False, again: int = 0) -> Any:
    """The rows of `bench compiled`, by form, or every one; a skip that says what to install where there is no compiler."""
    del again  # an argument so that it is not remembered
    command = [sys.executable, "-m", "adam_jax", "bench", "compiled", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode == 2 and "no compiler for" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    return rows if every else {row["form"]: row for row in rows}


@pytest.mark.parametrize("form", LIMITS)
@pytest.mark.parametrize("target", ACCELERATORS)
def test_a_step_moves_no_more_than_it_must(target, form):
    row, limit = asked("--on", target)[form], LIMITS[form][target.startswith("tpu")]
    moved, kernels = ON_V6E[form] if target == "tpu-v6e" and form in ON_V6E else limit
    assert row["bytes"] <= moved + SLACK
    assert row["kernels"] <= kernels
    assert row["temporaries"] <= TEMPORARIES.get((form, target), 0) + SLACK


@pytest.mark.parametrize("target", ["h100", "tpu-v5e"])
def test_leaves_of_odd_shapes_move_a_tenth_more_at_most(target):
    for row in asked("--on", target, "--odd", "--only", "adam int8", every=True):
        assert row["bytes"] <= 1.1 * (17 if target.startswith("tpu") else 16) + SLACK, row["shape"]


@pytest.mark.parametrize("form", CPU)
def test_a_step_on_cpu_moves_no_more_than_before(form):
    row, (moved, temporaries) = asked("--on", "cpu")[form], CPU[form]
    assert row["bytes"] <= moved + SLACK
    assert row["temporaries"] <= temporaries + SLACK


@pytest.mark.parametrize("target", MANY)
def test_many_leaves_compile_in_a_time_like_optaxs(target):
    best, slow = dict.fromkeys(MANY[target], (np.inf, np.inf)), []
    for noisy in range(5):  # processor time of fractions of a second, and of a machine that may be busy: the best of each
        rows = asked("--on", target, "--leaves", "48", "--only", "adam", again=noisy)
        for form, found in best.items():
            best[form] = min(found[0], rows[form]["lower_ratio"]), min(found[1], rows[form]["compile_ratio"])
        if not (slow := [form for form in best if np.any(np.array(best[form]) > MANY[target][form])]):
            return
    pytest.fail(f"{slow}: {best}")


def test_compile_time_on_cpu_is_linear_in_the_number_of_leaves():
    few, many = (asked("--on", "cpu", "--leaves", n, "--only", "adam int8")["adam int8"] for n in ("24", "96"))
    assert many["compile"] < 8 * few["compile"]
    assert many["lower"] < 8 * few["lower"]


def test_skipping_steps_is_traced_as_fast_as_optaxs():
    params = [jax.ShapeDtypeStruct((2,), jnp.float32)] * 600

    def seconds(tx):
        state = jax.eval_shape(tx.init, params)
        jax.clear_caches()
        began = time.process_time()
        jax.jit(forms.step_of(tx)).trace(params, state, params)
        return time.process_time() - began

    ours = adam_jax.skip_nonfinite(adam_jax.adam(1e-3))
    optaxs = optax.with_extra_args_support(optax.apply_if_finite(optax.adam(1e-3), 5))
    ratios = [seconds(ours) / seconds(optaxs) for _ in range(3)]
    assert min(ratios) < 1.3, ratios
