"""Memory traffic and milliseconds of a step of Adam: `python tests/benchmark_steps.py [params]` (default 16,777,216).

The step is donated: update and `optax.apply_updates`. All optimizers take turns, so that a busy machine slows all of them;
compare their times with each other, in one run. It prints medians, and is no test: figures depend on the machine.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import adam_jax

ROUNDS = 25
OPTIMIZERS = {
    "Optax": optax.adam(1e-3),
    "float32": adam_jax.adam(1e-3),
    "float32, root": adam_jax.adam(1e-3, root=True),
    "bfloat16": adam_jax.adam(1e-3, mu_dtype=jnp.bfloat16, nu_dtype=jnp.bfloat16),
    "int8": adam_jax.adam(1e-3, mu_dtype=jnp.int8, nu_dtype=jnp.int8),
}


def compiled(tx, params, gradients):
    """The step ahead of time, and its first arguments."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile(), (jnp.copy(params), state)


def main(size):
    """Print the table."""
    params = jnp.zeros((size // 4096, 4096))
    gradients = jax.random.normal(jax.random.key(0), params.shape)
    steps = {name: compiled(tx, params, gradients) for name, tx in OPTIMIZERS.items()}
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, (step, carry) in steps.items():
            start = time.perf_counter()
            carry = jax.block_until_ready(step(*carry, gradients))
            times[name].append(1e3 * (time.perf_counter() - start))
            steps[name] = step, carry
    table = Table("moments", "state, bytes", "traffic, bytes", "temporaries, bytes", "ms a step", "of float32's")
    base = np.median(times["float32"])
    for name, (step, _) in steps.items():
        memory, median = step.memory_analysis().temp_size_in_bytes, np.median(times[name])
        state = adam_jax.state_bytes(OPTIMIZERS[name], params)
        figures = (state / size, step.cost_analysis()["bytes accessed"] / size, memory / size, median, median / base)
        table.add_row(name, *(f"{x:.{digits}f}" for x, digits in zip(figures, (2, 1, 1, 1, 2), strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2**24)
