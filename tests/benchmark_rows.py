"""Milliseconds a step for an embedding table: `python tests/benchmark_rows.py [rows]` (default 1,000,000, 64 wide).

Four optimizers take turns on the same ids, so that a busy machine slows all of them: `adam_jax.tables.row_adam` (gather and
update), `adam_jax.adam` on the dense gradient (its scatter included), and PyTorch's SparseAdam (its coalescing included).
It prints medians and their ratios, and is no test: figures depend on the machine.
"""

import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax

WIDTH, BATCH, ROUNDS = 64, 4096, 15
tx, dense = adam_jax.tables.row_adam(1e-3), adam_jax.adam(1e-3)


def step(table, state, ids, gradients):
    """One step of `row_adam`; a real one would find the gradients at the rows read."""
    rows, table, state = tx.gather(table, state, ids)
    return tx.update(table, state, ids, gradients + 0.0 * rows)


def dense_step(table, state, ids, gradients):
    """The same step with the gradient that JAX gives for a lookup: an array of the table's size."""
    updates, state = dense.update(jnp.zeros_like(table).at[ids].add(gradients), state)
    return optax.apply_updates(table, updates), state


def compiled(function, table, state, ids, gradients):
    """The step ahead of time, so that compilation is no part of a timing, writing over its arguments."""
    return jax.jit(function, donate_argnums=(0, 1)).lower(table, state, ids, gradients).compile()


def timed(function, *args):
    """Milliseconds, and what the function returned."""
    start = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return 1e3 * (time.perf_counter() - start), out


def sparse_times(height, batches, gradients):
    """`row_adam` in three situations: rows touched a step ago, 500 ago, and 500 since their first."""
    table = jnp.zeros((height, WIDTH))
    state = tx.init(table)
    run = compiled(step, table, state, batches[0], gradients)
    for ids in batches:
        table, state = run(table, state, ids, gradients)
    times = {"touched lately": [], "skipped 500": [], "skipped 500 after the first": []}
    now = state.count + 2000
    for ids in batches:
        for name, last in (("touched lately", now - 1), ("skipped 500", now - 500), ("skipped 500 after the first", None)):
            rows = jnp.full(height, 1 if last is None else last, jnp.int32)
            count = jnp.int32(501) if last is None else jnp.array(now)
            state = jax.block_until_ready(state._replace(count=count, row_count=rows))
            taken, (table, state) = timed(run, table, state, ids, gradients)
            times[name].append(taken)
    return times


def dense_times(height, batches, gradients):
    """Dense Adam."""
    table = jnp.zeros((height, WIDTH))
    state = dense.init(table)
    run = compiled(dense_step, table, state, batches[0], gradients)
    times = []
    for ids in batches[:6]:
        taken, (table, state) = timed(run, table, state, ids, gradients)
        times.append(taken)
    return {"dense": times[1:]}


def torch_times(height, batches, gradients):
    """PyTorch's SparseAdam, with as many threads as PyTorch takes."""
    import torch

    table = torch.nn.Parameter(torch.zeros(height, WIDTH))
    optimizer = torch.optim.SparseAdam([table], lr=1e-3)
    values, times = torch.tensor(np.array(gradients)), []
    for ids in batches:
        indices = torch.tensor(np.array(ids))[None].long()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = time.perf_counter()
            table.grad = torch.sparse_coo_tensor(indices, values, (height, WIDTH))
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - start))
    return {"PyTorch SparseAdam": times[1:]}


def main():
    """Print the table."""
    tallest = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)
    medians = {}
    for height in (tallest // 10, tallest):
        batches = [jnp.asarray(rng.integers(0, height, BATCH), jnp.int32) for _ in range(ROUNDS)]
        for measure in (dense_times, sparse_times, torch_times):
            for name, times in measure(height, batches, gradients).items():
                medians[height, name] = np.median(times)
    names = [name for height, name in medians if height == tallest]
    print(f"{'ms a step, ' + str(BATCH) + ' rows':32}{tallest // 10:>12,}{tallest:>12,}{'dense is':>12}{'taller is':>12}")
    for name in names:
        low, high = medians[tallest // 10, name], medians[tallest, name]
        print(f"{name:32}{low:12.2f}{high:12.2f}{medians[tallest, 'dense'] / high:11.1f}x{high / low:11.2f}x")


if __name__ == "__main__":
    main()
