"""Narrow moments are the same bits on two processes as on one, on eight devices in all."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_jax

DTYPES = ("bfloat16", "int8")
SHAPE, STEPS = (64, 128), 6


def _trained(dtype: str) -> list[np.ndarray]:
    """Params and state after some steps on a mesh of all devices of all processes, gathered on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    tx = adam_jax.adam(0.1, mu_dtype=dtype, nu_dtype=dtype)

    def train() -> Any:
        def step(carry: Any, g: jax.Array) -> tuple[Any, None]:
            updates, state = tx.update(jax.lax.with_sharding_constraint(g, rows), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        params = jax.lax.with_sharding_constraint(jnp.ones(SHAPE), rows)
        gradients = jax.random.normal(jax.random.key(3), (STEPS, *SHAPE))
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]

    leaves = jax.tree.leaves(jax.jit(train, out_shardings=whole)())
    return [np.asarray(leaf.addressable_data(0)) for leaf in leaves]


def _work(rank: int, address: str, file: str) -> None:
    """What one of the two processes does."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    np.savez(
        file, **{f"{d}{i}": leaf.view(np.uint8) for d in DTYPES for i, leaf in enumerate(map(np.atleast_1d, _trained(d)))}
    )


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What each of the two processes found: dictionaries of bytes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(adam_jax.__file__).parents[1]),
    }  # fmt: skip
    files = [str(tmp_path_factory.mktemp("found") / f"{rank}.npz") for rank in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), address, file], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank, file in enumerate(files)
    ]  # fmt: skip
    try:
        for worker in workers:
            said, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, said
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [dict(np.load(file)) for file in files]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_processes_find_the_bits_of_one(dtype, of_two_processes):
    alone = _trained(dtype)  # eight devices in this process
    assert dtype in {str(leaf.dtype) for leaf in alone}
    for found in of_two_processes:
        for i, leaf in enumerate(map(np.atleast_1d, alone)):
            np.testing.assert_array_equal(found[f"{dtype}{i}"], leaf.view(np.uint8))


if __name__ == "__main__":
    _work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
