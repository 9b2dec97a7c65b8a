"""One pass over the state, where it is: nothing is copied, gathered or written that is of its size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_jax
from adam_jax.watch import watch_adam

RATE = 1e-3


def test_leaves_of_any_shape_are_counted_once():
    shapes = [(), (0,), (1,), (3, 5), (3, 3, 64, 32), (40_000,), (300, 7, 31), (17_389,), (17_389, 2)]
    params = [jnp.ones(shape) for shape in shapes]
    tx = adam_jax.scale_by_adam()
    seen = jax.jit(lambda g: watch_adam()(tx.update(g, tx.init(g))[1]))(params)
    for shape, leaf in zip(shapes, seen.leaves.values(), strict=True):
        assert leaf.size == leaf.snr_histogram.sum() == np.prod(shape)
        if 0 not in shape:
            assert float(leaf.snr_mean) == pytest.approx(1.0, abs=2e-6)  # the first step: |mhat| = sqrt(vhat)


@pytest.mark.parametrize("shape", [(1 << 18,), (1000, 300)])
def test_the_step_reads_the_state_once_more_and_writes_nothing_of_its_size(shape):
    tx, watch = adam_jax.adam(RATE), watch_adam(RATE)
    p = jnp.ones(shape)

    def bare(g, state, p):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    def watched(g, state, p):
        p, state = bare(g, state, p)
        return p, state, watch(state)

    def bytes_of(step):
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(p, tx.init(p), p).compile()
        return compiled.cost_analysis()["bytes accessed"] / p.size

    before, after = bytes_of(bare), bytes_of(watched)
    # 8 bytes are the two moments, the rest the partial sums of blocks and the scalars
    assert 8.0 <= after - before < 8.0 + 60_000 / p.size


@pytest.mark.parametrize("keep", [{}, {"storage": "int8"}], ids=["float32", "int8"])
def test_a_sharded_state_is_read_where_it_is(keep):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    tx, watch = adam_jax.scale_by_adam(**keep), jax.jit(watch_adam())
    shapes = [((64, 8192), ("x", "y")), ((1 << 17,), (("x", "y"),)), ((512, 512), ("x", "y")), ((512, 512), (None, "y"))]
    for shape, spec in shapes:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        p = jax.device_put(jax.random.normal(jax.random.key(0), shape), sharding)
        _, state = jax.jit(tx.update)(p, tx.init(p))
        assert state.mu.sharding.is_equivalent_to(sharding, p.ndim)
        text = watch.lower(state, p).compile().as_text()
        moved = [line for line in text.splitlines() if re.search(r"= .*\b(all-|collective-|reduce-scatter)\w*\(", line)]
        largest = max(int(np.prod([int(n) for n in dims.split(",") if n])) for line in moved
                      for dims in re.findall(r"[fsu]\d+\[([\d,]*)\]", line.split("metadata")[0]))  # fmt: skip
        assert moved
        assert largest <= max(48, 12 * p.size // 4096), f"{shape} {spec}: partial sums of blocks, 6 each, and no more"
        here = watch(jax.tree.map(np.asarray, state), np.asarray(p))
        # blocks of float32 numbers are added in another order, and numbers that are all alike are rounded alike
        np.testing.assert_allclose(watch(state, p).overall.snr_mean, here.overall.snr_mean, rtol=3e-5)


@pytest.mark.parametrize("keep", [{}, {"storage": "int8"}], ids=["float32", "int8"])
@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x")])
def test_a_state_on_an_explicit_mesh_is_read(keep, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    tx = adam_jax.adam(**keep)
    p = jax.random.normal(jax.random.key(0), (64, 128))
    _, state = tx.update(p, tx.init(p))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(p, NamedSharding(mesh, spec))
        _, over = jax.jit(tx.update)(sharded, tx.init(sharded))
        seen = watch_adam()(over, sharded)
    here = watch_adam()(state, p)
    np.testing.assert_allclose(seen.overall.snr_mean, here.overall.snr_mean, rtol=2e-4)


def test_an_int8_state_is_read_at_two_bytes_a_parameter():
    tx = adam_jax.scale_by_adam(storage="int8")
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((1 << 20,), jnp.float32))
    watch = jax.jit(watch_adam())
    compiled = watch.lower(state).compile()
    assert 2.0 <= compiled.cost_analysis()["bytes accessed"] / (1 << 20) < 2.2  # the rest: the blocks' partial sums
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * (1 << 20)
