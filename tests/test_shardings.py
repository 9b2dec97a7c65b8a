"""Where each array of a state lives, on eight devices: bytes, bits, what is sent, and what is compiled."""

import importlib.util
import re
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_jax
from adam_jax.bench import compiled
from adam_jax.bench.forms import step_of, uncached
from adam_jax.shardings import gradient_shardings, state_shardings, unsplit_leaves

P = PartitionSpec
KEPT = {  # how moments are kept
    "float32": {},
    "bfloat16": {"storage": "bfloat16"},
    "int8": {"storage": "int8"},
}
SLOW_AND_FAST = {"slow": adam_jax.adam(1e-4), "fast": adam_jax.amsgrad(1e-3)}
TRANSFORMATIONS = {  # and the bytes of state for each float32 parameter
    "adam": (adam_jax.adam(), 8),
    "optax": (optax.adam(1e-3), 8),
    "bfloat16": (adam_jax.adam(**KEPT["bfloat16"]), 4),
    "int8": (adam_jax.adam(**KEPT["int8"]), 2),
    "amsgrad, int8": (adam_jax.amsgrad(**KEPT["int8"]), 3),
    "clip, adamw, average": (
        optax.chain(adam_jax.clip_by_global_norm(1.0), adam_jax.adamw(), adam_jax.average_params()),
        12,
    ),
    "skip": (adam_jax.skip_nonfinite(adam_jax.adam()), 8),
    "masked": (optax.masked(adam_jax.adam(), {"in": True, "out": [True]}), 8),
    "partition": (optax.partition(SLOW_AND_FAST, {"in": "slow", "out": ["fast"]}), 10),
    "inject": (optax.inject_hyperparams(adam_jax.adam)(1e-3), 8),
    "MultiSteps": (optax.MultiSteps(adam_jax.adam(), 4), 12),
    "named_chain": (optax.named_chain(("clip", optax.clip(1.0)), ("adam", adam_jax.adam())), 8),
    "lookahead": (optax.chain(optax.trace(0.9), optax.scale_by_adam()), 12),
}


def _mesh(*sizes: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=(kind,) * len(sizes))


def _net(mesh: jax.sharding.Mesh, dtype: Any = jnp.float32, specs: tuple = (P(), P())) -> dict[str, Any]:
    """Weights of a net 64-128-64, two leaves of 8192 numbers."""
    first, second = jax.random.split(jax.random.key(0))
    one = jax.device_put((jax.random.normal(first, (64, 128)) / 8).astype(dtype), NamedSharding(mesh, specs[0]))
    two = jax.device_put((jax.random.normal(second, (128, 64)) / 11).astype(dtype), NamedSharding(mesh, specs[1]))
    return {"in": one, "out": [two]}


def _loss(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x.astype(params["in"].dtype) @ params["in"])
    return jnp.mean((hidden @ params["out"][0] - x).astype(jnp.float32) ** 2)


def _step(tx: Any, params: Any, zero1: Any) -> Any:
    """Data-parallel, as the README has it; the same program where nothing is split."""
    of_state, split = state_shardings(tx, params, zero1=zero1), gradient_shardings(params, zero1=zero1)
    whole = jax.tree.map(lambda p: p.sharding, params)
    explicit = AxisType.Explicit in params["in"].sharding.mesh.axis_types
    place: Any = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        gradients, mine = place((jax.grad(_loss)(params, x), params), (split, split))
        updates, state = tx.update(gradients, state, mine)
        return place(place(optax.apply_updates(mine, updates), split), whole), state

    return jax.jit(step, out_shardings=(whole, of_state))


def _batches(mesh: jax.sharding.Mesh, steps: int = 5) -> list[jax.Array]:
    rows = NamedSharding(mesh, P("data"))
    return [jax.device_put(x, rows) for x in jax.random.normal(jax.random.key(5), (steps, 32, 64))]


def _trained(tx: Any, params: Any, batches: list[jax.Array], zero1: Any = None) -> tuple[Any, Any]:
    step = _step(tx, params, zero1)
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, zero1=zero1))(params)
    for x in batches:
        params, state = step(params, state, x)
    assert step._cache_size() == 1  # a step after a sharded init compiles once
    return params, state


def _assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def _bytes_on_first_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


# bytes


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_an_eighth_of_the_state_lives_on_each_device(name):
    tx, size = TRANSFORMATIONS[name]
    params = _net(_mesh(8))
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, zero1="data"))(params)
    whole = size * 2 * 8192
    assert whole <= sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 1.01 * whole
    assert _bytes_on_first_device(state) <= 1.03 / 8 * whole
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    assert state_shardings(tx, abstract, zero1="data") == state_shardings(tx, params, zero1="data")


@pytest.mark.parametrize("bits", [8, 16])
def test_residuals_of_16_bit_weights_are_split_with_the_moments(bits):
    tx, params = adam_jax.in_float32(adam_jax.adam(), residual=bits), _net(_mesh(8), jnp.bfloat16)
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, zero1="data"))(params)
    assert _bytes_on_first_device(state) <= 1.03 * 2 * 1024 * (8 + bits // 8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_follows_params_that_are_split_already(kind):
    params = _net(_mesh(4, 2, kind=kind), specs=(P("data", "model"), P("model")))
    tx = adam_jax.adamw(**KEPT["int8"])
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)
    for moment, param in zip(jax.tree.leaves(state[0].mu), jax.tree.leaves(params), strict=True):
        assert moment.sharding.is_equivalent_to(param.sharding, 2)
    assert state[0].count.sharding.is_fully_replicated
    split = jax.jit(tx.init, out_shardings=state_shardings(tx, params, zero1="data"))(params)
    assert [m.sharding.spec for m in jax.tree.leaves(split[0].mu)] == [P("data", "model"), P(("model", "data"))]


def test_each_axis_goes_where_it_divides_and_what_stays_whole_is_listed():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"both": (8, 3), "one each": (4, 6), "data": (12, 3), "model": (3, 6), "none": (7, 5), "empty": (0, 8)}
    place = NamedSharding(mesh, P())
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for name, shape in shapes.items()}
    specs = {name: s.spec for name, s in gradient_shardings(params, zero1=("data", "model")).items()}
    assert specs.pop("both") in (P(("data", "model")), P(("model", "data")))
    assert specs == {
        "one each": P("data", "model"), "data": P("data"), "model": P(None, "model"), "none": P(), "empty": P(),
    }  # fmt: skip
    whole = unsplit_leaves(optax.adam(1e-3), params, zero1=("data", "model"))
    assert whole == {f"0/{moment}/{name}": size for moment in ("mu", "nu") for name, size in (("none", 140), ("empty", 0))}


def test_models_of_equinox_with_their_functions_and_of_flax_have_shardings():
    mesh = _mesh(8)
    model = eqx.nn.MLP(64, 64, 128, 2, key=jax.random.key(0))
    model = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())) if eqx.is_array(x) else x, model)
    shardings = state_shardings(adam_jax.adam(), model, zero1="data")
    assert shardings[0].mu.layers[1].weight.spec == P("data")

    net = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    variables = jax.device_put(nnx.state(net, nnx.Param), NamedSharding(mesh, P()))
    nnx.update(net, variables)
    optimizer = nnx.Optimizer(net, adam_jax.adam(), wrt=nnx.Param)
    placed = jax.tree.map(
        jax.device_put,
        nnx.as_pure(optimizer.opt_state),
        nnx.as_pure(state_shardings(adam_jax.adam(), variables, zero1="data")),
    )
    assert placed[0].nu["kernel"].sharding.spec == P(None, "data")


# bits


@pytest.mark.parametrize("name", [*KEPT, "residual 16", "residual 8, int8"])
def test_five_steps_with_zero_1_are_those_of_the_replicated_run_in_every_bit(name):
    tx, dtype = _kept(name)
    mesh = _mesh(8)
    params, batches = _net(mesh, dtype), _batches(mesh)
    replicated, split = _trained(tx, params, batches), _trained(tx, params, batches, "data")
    _assert_same_bits(replicated, split)
    assert _bytes_on_first_device(split[1]) < _bytes_on_first_device(replicated[1]) / 7


@pytest.mark.parametrize("name", ["float32", "residual 8, int8", "MultiSteps"])
def test_so_are_they_on_explicit_meshes_and_with_an_axis_of_one_device(name):
    tx, dtype = (optax.MultiSteps(adam_jax.adam(1e-2), 2), jnp.float32) if name == "MultiSteps" else _kept(name)
    mesh = _mesh(8, 1, kind=AxisType.Explicit)
    params, batches = _net(mesh, dtype), _batches(mesh)
    replicated, split = _trained(tx, params, batches), _trained(tx, params, batches, ("data", "model"))
    _assert_same_bits(replicated, split)
    assert _bytes_on_first_device(split[1]) < _bytes_on_first_device(replicated[1]) / 7


def _kept(name: str) -> tuple[Any, Any]:
    if name in KEPT:
        return adam_jax.adamw(1e-2, **KEPT[name]), jnp.float32
    bits, inside = (8, KEPT["int8"]) if "int8" in name else (16, {})
    return adam_jax.in_float32(adam_jax.adamw(1e-2, **inside), residual=bits), jnp.bfloat16


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("where", ["fsdp", "2x4, zero1 over data", "stacked stages"])
def test_given_the_same_gradients_every_sharding_has_the_bits_of_one_device(where, kind, kept):
    sizes, spec, zero1 = {
        "fsdp": ((8,), P("data"), None),
        "2x4, zero1 over data": ((2, 4), P(None, None, "model"), "data"),
        "stacked stages": ((4, 2), P("data", "model"), None),
    }[where]
    mesh, tx = _mesh(*sizes, kind=kind), adam_jax.adamw(1e-2, **KEPT[kept])
    stages = jax.random.normal(jax.random.key(1), (8, 32, 64))
    gradients = jax.random.normal(jax.random.key(2), (4, *stages.shape))

    def train(params: Any, gradients: list[jax.Array], out: Any) -> Any:
        def step(params: Any, state: Any, g: jax.Array) -> tuple[Any, Any]:
            updates, state = tx.update({"w": g}, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init, out_shardings=out)(params)
        step = jax.jit(step, out_shardings=out if out is None else (gradient_shardings(params, zero1=zero1), out))
        for g in gradients:
            params, state = step(params, state, g)
        return params, state

    one = train({"w": stages}, list(gradients), None)
    params = {"w": jax.device_put(stages, NamedSharding(mesh, spec))}
    out, place = state_shardings(tx, params, zero1=zero1), gradient_shardings(params, zero1=zero1)
    many = train(jax.device_put(params, place), [jax.device_put(g, place["w"]) for g in gradients], out)
    assert len(many[1][0].mu["w"].sharding.device_set) == 8
    assert many[1][0].mu["w"].addressable_shards[0].data.size == stages.size // 8
    _assert_same_bits(one, many)


@pytest.mark.parametrize("kept", ["float32", "int8"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_table_of_rows_has_the_bits_of_one_device_on_any_mesh(kind, kept):
    spec = P("data", "model")
    tx = pytest.importorskip("adam_jax.tables").row_adam(0.1, weight_decay=0.01, **KEPT[kept])
    ids, gradients = jnp.array([[1, 5], [5, -1]]), jnp.ones((2, 2, 128))

    def train(table: jax.Array, state: Any) -> Any:
        gather, update = jax.jit(tx.gather), jax.jit(tx.update)
        for _ in range(2):
            rows, table, state = gather(table, state, ids)
            table, state = update(table, state, ids, gradients * rows)
        return gather(table, state, ids)[1:]

    here = jnp.linspace(0.5, 2.0, 64 * 128).reshape(64, 128)
    there = jax.device_put(here, NamedSharding(_mesh(4, 2, kind=kind), spec))
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, there))(there)
    assert state.mu.sharding.is_equivalent_to(there.sharding, 2)
    by_row = [array for array in (state.row_count, state.row_log_keep, state.row_window) if array is not None]
    assert [P(*array.sharding.spec[:1]) for array in by_row] == [P("data")] * len(by_row)
    _assert_same_bits(train(here, tx.init(here)), train(there, state))


# what is sent


def _partitioned(step: Any, arguments: tuple, folder: Path) -> str:
    """The program after SPMD partitioning: later, XLA on CPU widens what is sent in bfloat16."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd"}
    with uncached():  # what comes from the cache (conftest.py) was not compiled, and leaves no file
        step.lower(*arguments).compile(compiler_options=options)
    (file,) = folder.glob("*after_spmd-partitioning*")
    return file.read_text()


def _sent(program: str) -> list[tuple[str, str, int, set[str]]]:
    """Of each collective above 64 bytes: its kind, dtype, number of elements, and the operations that read it."""
    found = []
    line = re.compile(
        r"^ *(?:ROOT )?%(\S+) = (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(",
        re.M,
    )
    for name, dtype, shape, kind in line.findall(program):
        size = int(np.prod([int(n) for n in shape.split(",") if n]))
        if size * int(re.sub(r"\D", "", dtype)) > 64 * 8:
            readers = re.findall(rf"= \S+ ([\w-]+)\([^)]*%{re.escape(name)}[,)]", program)
            found.append((kind, dtype, size, set(readers)))
    return found


@pytest.mark.parametrize("name", [*KEPT, "residual 16", "residual 8, int8"])
def test_a_zero_1_step_sends_gradients_once_and_params_once_and_no_moment(name, tmp_path):
    tx, dtype = _kept(name)
    mesh = _mesh(8)
    params = _net(mesh, dtype)
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, zero1="data"))(params)
    program = _partitioned(_step(tx, params, "data"), (params, state, _batches(mesh)[0]), tmp_path)
    sent, short = _sent(program), {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    gradients = [readers for kind, dtype, size, readers in sent if (kind, dtype, size) == ("all-reduce", short, 8192)]
    assert [kind for kind, *_ in sent if kind != "all-reduce"] == ["all-gather"] * 2
    assert all((dtype, size) == (short, 8192) for _, dtype, size, _ in sent)
    assert gradients == [{"dynamic-slice"}] * 2  # which is a reduce-scatter, on a backend that has one


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPU's compiler: pip install libtpu")
def test_tpus_compiler_scatters_the_gradients(monkeypatch):
    """On a TPU v5e 2x4, which need not be there."""
    from jax.experimental import topologies

    for name, value in {"SKIP_MDS_QUERY": "1", "WORKER_HOSTNAMES": "localhost", "ACCELERATOR_TYPE": "v5litepod-8"}.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    on = NamedSharding(mesh, P())
    params = {"in": jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=on)}
    params["out"] = [params["in"]]
    tx = adam_jax.adamw(1e-2)
    of_state = state_shardings(tx, params, zero1="data")
    state = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), jax.eval_shape(tx.init, params), of_state
    )
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    program = _step(tx, params, "data").lower(params, state, x).compile().as_text()
    assert "reduce-scatter" in program
    assert len(re.findall(r" all-gather(?:-start)?\(", program)) <= 2


def test_the_compiler_of_an_h100_steps_codes_where_they_lie():
    """On four of them, which need not be there: what is sent are the extremes of each one's codes."""
    from jax.experimental import topologies

    try:
        compiled.described("h100")
    except compiled.NotInstalledError as error:
        pytest.skip(str(error))
    four: Any = {"target_config": compiled.GPUS["h100"], "topology": "1x4x1"}
    devices = topologies.get_topology_desc(platform="cuda", topology_name="", **four).devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    tx = adam_jax.adam(storage="int8")
    for spec in (P("data"), P(None, "data")):
        leaf = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=NamedSharding(mesh, spec))
        state = jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at),
            jax.eval_shape(tx.init, leaf),
            state_shardings(tx, leaf),
        )
        program = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(leaf, state, leaf).compile().as_text()
        sent = re.findall(r"= (.*) (?:all-|reduce-sc|collective-)[\w-]+\(", program)
        assert sent
        assert re.findall(r"\[([\d,]{2,})\]", " ".join(sent)) == []  # no more than nine of anything


# what is refused


def test_axes_and_meshes_are_checked():
    params, tx, wrong = _net(_mesh(8)), adam_jax.adam(), cast("Any", 3)
    with pytest.raises(ValueError, match=r"zero1 must be .*data.*, got '?batch"):
        state_shardings(tx, params, zero1="batch")
    with pytest.raises(ValueError, match=r"zero1 must name each mesh axis once, got \('data', 'data'\)"):
        state_shardings(tx, params, zero1=("data", "data"))
    with pytest.raises(TypeError, match="zero1 must be a mesh axis, or several, got 3"):
        gradient_shardings(params, zero1=wrong)
    with pytest.raises(ValueError, match="params must have NamedShardings on one mesh, got 0 meshes"):
        gradient_shardings({"w": jnp.ones(8)})
    with pytest.raises(ValueError, match="got 2 meshes"):
        state_shardings(tx, {"a": params, "b": _net(_mesh(4, 2))})
