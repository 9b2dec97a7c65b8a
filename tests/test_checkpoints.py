"""The lines around Orbax of `adam_jax.checkpoints`: saved on some devices, restored on others; the wrong is not read."""

import functools
import inspect
import io
import json
import multiprocessing
import pickle
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax import checkpoints, storage
from adam_jax.checkpoints import check_state, describe_state
from adam_jax.shardings import state_shardings

KEPT = {"float32": {}, "int8": {"storage": "int8"}}


def save(manager: ocp.CheckpointManager, step: int, tx: Any, params: Any, state: Any) -> None:
    meaning = ocp.args.JsonSave(describe_state(tx, params))
    manager.save(step, args=ocp.args.Composite(meaning=meaning, run=ocp.args.StandardSave((params, state))))


def restore(manager: ocp.CheckpointManager, step: int, tx: Any, params: Any) -> Any:
    check_state(manager.restore(step, args=ocp.args.Composite(meaning=ocp.args.JsonRestore()))["meaning"], tx, params)
    like = jax.tree.map(_struct, jax.eval_shape(tx.init, params), state_shardings(tx, params))
    return manager.restore(step, args=ocp.args.Composite(run=ocp.args.StandardRestore((params, like))))["run"]


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def test_the_lines_tested_here_are_those_that_users_read():
    read = {line.strip() for line in str(checkpoints.__doc__).splitlines()}
    for function in (save, restore, _struct):
        _, *body = inspect.getsource(function).splitlines()
        assert {line.strip() for line in body if line} <= read


def _params(devices: int) -> dict[str, jax.Array]:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x") if devices > 1 else PartitionSpec()
    return {"w": jax.device_put(jnp.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128), NamedSharding(mesh, spec))}


def _tx(kept: str) -> Any:
    return optax.chain(adam_jax.clip_by_global_norm(1e3), adam_jax.adamw(0.01, **KEPT[kept]))


@functools.cache
def _step(kept: str) -> Any:
    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradients = jax.tree.map(lambda p: jnp.sin(3.0 * p), params)
        updates, state = _tx(kept).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _run(kept: str, devices: int = 8) -> Any:
    params = _params(devices)
    tx = _tx(kept)
    return _step(kept)(params, jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params))


def _assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Orbax's own
@pytest.mark.parametrize("kept", KEPT)
def test_a_run_saved_on_8_devices_goes_on_in_the_same_bits_on_8_and_2_and_1(kept, tmp_path):
    run = _run(kept)
    with ocp.CheckpointManager(tmp_path) as manager:  # asynchronous: training goes on while files are written
        save(manager, 1, _tx(kept), *run)
        after = _step(kept)(*run)
        manager.wait_until_finished()
        for devices in (8, 2, 1):
            restored = restore(manager, 1, _tx(kept), _params(devices))
            assert len(restored[1][1][0].mu["w"].sharding.device_set) == devices
            _assert_same_bits(restored, run)
            _assert_same_bits(_step(kept)(*restored), after)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_state_kept_otherwise_is_refused_before_it_is_read(tmp_path):
    run = _run("float32")
    with ocp.CheckpointManager(tmp_path) as manager:
        save(manager, 1, _tx("float32"), *run)
        manager.wait_until_finished()
        with pytest.raises(
            ValueError, match=r"the state at \[1\]\[0\].mu\['w'\] was saved as float32\[64, 128\], but tx keeps "
        ):
            restore(manager, 1, _tx("int8"), _params(2))


def test_another_dtype_shape_chain_form_and_format_are_named():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    saved = json.loads(json.dumps(describe_state(adam_jax.adam(), params)))
    check_state(saved, adam_jax.adam(0.5), params)
    for tx, others, message in (
        (
            adam_jax.adam(mu_dtype=jnp.bfloat16),
            params,
            r"\[0\].mu\['b'\] was saved as float32\[4\], but tx keeps bfloat16\[4\]",
        ),
        (
            adam_jax.adam(),
            {**params, "b": jnp.ones(5)},
            r"\[0\].mu\['b'\] was saved as float32\[4\], but tx keeps float32\[5\]",
        ),
        (adam_jax.adam(), {"w": params["w"]}, r"\[0\].mu\['b'\] was saved as float32\[4\], but tx keeps nothing"),
        (adam_jax.amsgrad(), params, r"\[0\].nu_max\['b'\] was saved as nothing, but tx keeps float32\[4\]"),
        (optax.chain(optax.clip(1.0), adam_jax.adam()), params, r"\[1\]\[0\].count was saved as nothing"),
    ):
        with pytest.raises(ValueError, match=f"the state at {message}"):
            check_state(saved, tx, others)
    with pytest.raises(ValueError, match="description must have format 1, which this version reads, got 0"):
        check_state({**saved, "format": 0}, adam_jax.adam(), params)


class Squares(NamedTuple):
    """Marks a state that keeps v, without arrays, as this library's states have it."""


class Roots(NamedTuple):
    """Marks one that keeps its root."""


class Marked(NamedTuple):
    """A state that says how it is kept."""

    nu: Any
    form: Any


def _marked(form: Any) -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda params: Marked(params, form), optax.identity().update)


def test_squares_are_not_read_as_roots():
    saved = describe_state(optax.chain(_marked(Squares())), jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"the state at \[0\] was saved as Marked, Squares\(\), but tx keeps Marked, Roots\(\)"
    ):
        check_state(saved, optax.chain(_marked(Roots())), jnp.ones(3))


# what is killed while it saves


def _by_equinox(state: Any, like: Any) -> Any:
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


@pytest.mark.parametrize(
    "saved",
    {
        "pickle": lambda state, _: pickle.loads(pickle.dumps(state)),
        "msgpack": lambda state, like: serialization.from_bytes(like, serialization.to_bytes(state)),
        "equinox": _by_equinox,
        "host": lambda state, _: jax.device_get(state),
    }.values(),
    ids=["pickle", "msgpack", "equinox", "host"],
)
def test_states_go_through_any_serializer_and_on_in_the_same_bits(saved: Any):
    params = {"w": jnp.ones((8, 8)), "n": jnp.arange(3), "none": None, "half": jnp.ones(5, jnp.bfloat16)}
    gradients = {**params, "n": jnp.zeros(3, jnp.int32)}
    eight = {"storage": storage.int8(smallest=0)}
    for tx in (
        adam_jax.skip_nonfinite(optax.chain(adam_jax.amsgrad(1e-2, **eight), adam_jax.average_params())),
        adam_jax.in_float32(adam_jax.adam(storage=lambda path: "bfloat16" if "w" in path else None), 8),
        optax.partition({"a": adam_jax.adamax(), "b": adam_jax.nadam()}, adam_jax.label_by_path({"w": "a"}, "b")),
    ):
        update = jax.jit(tx.update)
        _, state = update(gradients, tx.init(params), params)
        _assert_same_bits(*(update(gradients, s, params) for s in (saved(state, tx.init(params)), state)))


def _save_for_ever(folder: Path, said: Connection) -> None:
    params = {"w": jnp.arange(2.0**20).reshape(8, -1)}
    tx = adam_jax.adam()
    _, state = tx.update(params, tx.init(params), params)
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        first = (manager.latest_step() or 0) + 1
        for step in range(first, first + 10_000):
            save(manager, step, tx, {"w": jnp.full_like(params["w"], step)}, state)
            if step == first:
                manager.wait_until_finished()
            said.send(step)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_killed_while_it_saves_leaves_the_last_complete_step_whole(tmp_path):
    folder, unfinished = tmp_path / "run", 0
    tx, params = adam_jax.adam(), {"w": jnp.arange(2.0**20).reshape(8, -1)}
    _, expected = tx.update(params, tx.init(params), params)
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["adam_jax", "orbax.checkpoint"])  # which takes longer than all else
    for kills in range(20):
        hears, says = fork.Pipe(duplex=False)
        worker = fork.Process(target=_save_for_ever, args=(folder, says))
        worker.start()
        try:
            for _ in range(2 + kills % 3):
                assert hears.poll(60)
                hears.recv()
            time.sleep(0.003 * (kills % 5))
        finally:
            worker.kill()
            worker.join()
        unfinished += any(".orbax-checkpoint-tmp" in path.name for path in folder.iterdir())
        with ocp.CheckpointManager(folder) as manager:
            last = manager.latest_step()
            restored, state = restore(manager, last, tx, jax.device_put(params, jax.tree.leaves(_params(1))[0].sharding))
        assert np.all(np.asarray(restored["w"]) == last)
        _assert_same_bits(state, expected)
    assert unfinished >= 5
