"""States of Optax, PyTorch and Keras, gone on with here and there; the last two skip where they are not installed."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_jax
from adam_jax import checkpoints, interop, surgery

STEPS = 20  # there, and as many here
RNG = np.random.default_rng(0)
START = {"w": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)}
SCALE = 10 ** RNG.uniform(-3, 2, size=4)
GRADIENTS = [{"w": RNG.normal(size=(3, 4)) * SCALE, "b": RNG.normal(size=4) * SCALE} for _ in range(2 * STEPS)]
ORDER = {"w": 1, "b": 0}
B1, B2, EPS, LR, DECAY = 0.8, 0.99, 1e-6, 2.0**-5, 2.0**-3  # Keras computes 1 - LR * DECAY in float32
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch: pip install adam_jax[peers]")


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _ours(tx: Any, params: Any, state: Any, gradients: list[Any], dtype: str) -> tuple[Any, Any]:
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(_cast(g, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _assert_close(params: Any, other: Any, dtype: str) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]), params, other)


# Optax


def _falling(adam: Any) -> Any:
    return lambda lr, *rest: adam(optax.exponential_decay(lr, 10, 0.5), *rest)


OPTAX = {
    "adam": ((B1, B2, EPS), adam_jax.adam, optax.adam),
    "adamw": ((B1, B2, EPS), adam_jax.adamw, optax.adamw),
    "nadam": ((B1, B2, EPS), adam_jax.nadam, optax.nadam),
    "adam on a schedule": ((B1, B2, EPS), _falling(adam_jax.adam), _falling(optax.adam)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_20_steps_of_optax_and_20_here_are_40_of_optax_and_the_other_way_round(name, dtype):
    settings, ours, theirs = OPTAX[name]
    here, there, params = ours(LR, *settings), theirs(LR, *settings), _cast(START, dtype)
    middle, state = _ours(there, params, there.init(params), GRADIENTS[:STEPS], dtype)
    end, _ = _ours(there, middle, state, GRADIENTS[STEPS:], dtype)
    moved = interop.from_optax(state, here, middle, B1, B2)
    _assert_close(_ours(here, middle, moved, GRADIENTS[STEPS:], dtype)[0], end, dtype)

    middle, state = _ours(here, params, here.init(params), GRADIENTS[:STEPS], dtype)
    back = interop.to_optax(state, there, middle)
    _assert_close(_ours(there, middle, back, GRADIENTS[STEPS:], dtype)[0], end, dtype)


def test_a_state_of_no_steps_is_a_fresh_one():
    params, tx = _cast(START, "float32"), adam_jax.adamw(LR)
    fresh = interop.from_optax(optax.adamw(LR).init(params), tx, params)
    updates, _ = tx.update(params, fresh, params)
    jax.tree.map(np.testing.assert_array_equal, updates, tx.update(params, tx.init(params), params)[0])


@pytest.mark.parametrize(("kept", "tolerance"), [("root", 1e-6), ("bfloat16", 2.0**-7), ("int8", 0.1)])
def test_moments_go_into_every_storage_and_back(kept, tolerance):
    params = jax.random.normal(jax.random.key(0), (64, 128))
    there, here = optax.adam(LR), adam_jax.adam(LR, storage=kept)
    state = there.init(params)
    for _ in range(3):
        _, state = there.update(params, state, params)
    back = interop.to_optax(interop.from_optax(state, here, params), there, params)
    np.testing.assert_allclose(jnp.sqrt(back[0].nu), jnp.sqrt(state[0].nu), rtol=tolerance)
    np.testing.assert_allclose(back[0].mu, state[0].mu, rtol=2 * tolerance)
    assert back[0].count == 3


def test_adamax_of_optax_goes_on_as_adamax():
    params, there, here = _cast(START, "float32"), optax.adamax(LR, eps=EPS), adam_jax.adamax(LR, eps=EPS)
    middle, state = _ours(there, params, there.init(params), GRADIENTS[:STEPS], "float32")
    moved = interop.from_optax(state, here, middle)
    end = _ours(there, middle, state, GRADIENTS[STEPS:], "float32")[0]
    _assert_close(_ours(here, middle, moved, GRADIENTS[STEPS:], "float32")[0], end, "float32")


def test_moments_find_the_leaves_that_a_mask_leaves():
    mask, params = {"w": True, "b": False}, _cast(START, "float32")
    here, there = (optax.masked(module.scale_by_adam(), mask) for module in (adam_jax, optax))
    _, state = there.update(params, there.init(params))
    moved = interop.from_optax(state, here, params)
    np.testing.assert_allclose(moved.inner_state.mu["w"], params["w"], rtol=1e-6)
    assert isinstance(moved.inner_state.mu["b"], optax.MaskedNode)


@pytest.mark.parametrize("kept", [None, "int8"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_state_moved_beside_params_on_many_devices_steps_there(kind, kept):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = {"w": jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, PartitionSpec("data")))}
    there = optax.adam(optax.exponential_decay(LR, 10, 0.5))
    here = adam_jax.adam(optax.exponential_decay(LR, 10, 0.5), storage=kept)
    _, state = jax.jit(there.update)(params, there.init(params), params)
    moved = interop.from_optax(state, here, params)
    updates, moved = jax.jit(here.update)(params, moved, params)
    assert moved[0].mu["w"].sharding.is_equivalent_to(params["w"].sharding, 2)
    back, _ = jax.jit(there.update)(params, interop.to_optax(moved, there, params), params)
    for found in (updates, back):
        np.testing.assert_allclose(found["w"], -LR, rtol=0.2)  # int8 rounds
    surgery.read_moments(interop.from_optax(state, here, params))


@pytest.mark.parametrize("kept", [None, "root"])
def test_amsgrad_of_optax_is_that_of_the_corrected_moments_both_ways(kept, dtype):
    here = adam_jax.amsgrad(LR, B1, B2, EPS, max_of="corrected", storage=kept)
    there = optax.amsgrad(LR, B1, B2, EPS)
    params = _cast(START, dtype)
    middle, state = _ours(there, params, there.init(params), GRADIENTS[:STEPS], dtype)
    end, _ = _ours(there, middle, state, GRADIENTS[STEPS:], dtype)
    moved = interop.from_optax(state, here, middle, B1, B2)
    _assert_close(_ours(here, middle, moved, GRADIENTS[STEPS:], dtype)[0], end, dtype)
    back = interop.to_optax(moved, there, middle)
    _assert_close(_ours(there, middle, back, GRADIENTS[STEPS:], dtype)[0], end, dtype)


def test_one_adam_of_several_is_chosen_by_its_path_and_the_others_start_anew():
    def two(module: Any) -> Any:
        both = {name: module.adam(optax.exponential_decay(LR, 10, 0.5), b1) for name, b1 in (("slow", B1), ("fast", 0.5))}
        return optax.MultiSteps(optax.partition(both, {"w": "slow", "b": "fast"}), 1)

    here, there, params = two(adam_jax), two(optax), _cast(START, "float32")
    middle, state = _ours(there, params, there.init(params), GRADIENTS[:STEPS], "float32")
    with pytest.raises(ValueError, match=r"state holds 2 ScaleByAdamStates: choose one with where=.*'fast'"):
        interop.from_optax(state, here, middle)
    of_one = interop.from_optax(optax.adam(LR).init(middle), here, middle, where="'slow'")  # the path is of the other side
    assert int(surgery.read_moments(of_one, where="'slow'").count) == 0
    for move in (
        lambda: interop.from_optax(optax.adam(LR).init(middle), adam_jax.adam(LR), middle, where="'slw'"),
        lambda: interop.to_optax(adam_jax.adam(LR).init(middle), optax.adam(LR), middle, where="'slw'"),
        lambda: interop.from_torch(_state_dict(), adam_jax.adam(LR), START, order={"w": 0, "b": 1}, where="'slw'"),
    ):
        with pytest.raises(ValueError, match=r"where must be part of the path of .*, got \"'slw'\""):
            move()
    slow, fast = (
        interop.from_optax(state, here, middle, b1, where=f"'{name}'") for name, b1 in (("slow", B1), ("fast", 0.5))
    )
    assert [int(surgery.read_moments(slow, where=f"'{name}'").count) for name in ("slow", "fast")] == [STEPS, 0]
    assert slow.gradient_step == STEPS
    moved = surgery.write_moments(slow, surgery.read_moments(fast, where="'fast'"), where="'fast'")
    end = _ours(there, middle, state, GRADIENTS[STEPS:], "float32")[0]
    _assert_close(_ours(here, middle, moved, GRADIENTS[STEPS:], "float32")[0], end, "float32")

    back = interop.to_optax(moved, there, middle, where="'slow'").inner_opt_state.inner_states
    wanted = state.inner_opt_state.inner_states
    for name, steps in (("slow", STEPS), ("fast", 0)):
        ((adam, schedule),) = (back[name].inner_state,)
        assert (adam.count, schedule.count) == (steps, STEPS)
    np.testing.assert_allclose(back["slow"].inner_state[0].mu["w"], wanted["slow"].inner_state[0].mu["w"], rtol=1e-6)


# PyTorch


def _l2(lr: float, b1: float, b2: float, eps: float) -> Any:
    return optax.chain(adam_jax.add_decayed_weights(DECAY), adam_jax.adam(lr, b1, b2, eps))


TORCH = {  # the class there and what is added to lr, betas and eps; the chain here
    "Adam": ("Adam", {}, adam_jax.adam),
    "AdamW": ("AdamW", {"weight_decay": DECAY}, lambda *settings: adam_jax.adamw(*settings, weight_decay=DECAY)),
    "Adam with L2 decay": ("Adam", {"weight_decay": DECAY}, _l2),
    "AMSGrad": ("Adam", {"amsgrad": True}, adam_jax.amsgrad),
    "Adamax": ("Adamax", {}, adam_jax.adamax),
}


def _turn(path: str, array: np.ndarray) -> np.ndarray:
    return array.T if path == "w" else array


def _optimizer(torch: Any, name: str, params: Any, dtype: str) -> tuple[Any, list[Any]]:
    cls, settings, _ = TORCH[name]
    flat = [torch.nn.Parameter(torch.tensor(np.array(x), dtype=getattr(torch, dtype))) for x in (params["b"], params["w"].T)]
    return getattr(torch.optim, cls)(flat, lr=LR, betas=(B1, B2), eps=EPS, **settings), flat


def _theirs(torch: Any, optimizer: Any, flat: list[Any], gradients: list[Any]) -> dict[str, np.ndarray]:
    for g in gradients:
        for p, x in zip(flat, (g["b"], g["w"].T), strict=True):
            p.grad = torch.tensor(x, dtype=p.dtype)
        optimizer.step()
    return {"w": flat[1].detach().numpy().T.copy(), "b": flat[0].detach().numpy().copy()}


@pytest.mark.parametrize("name", TORCH)
def test_20_steps_of_pytorch_and_20_here_are_40_of_pytorch(name, dtype, torch):
    optimizer, flat = _optimizer(torch, name, START, dtype)
    middle = _cast(_theirs(torch, optimizer, flat, GRADIENTS[:STEPS]), dtype)
    tx = TORCH[name][2](LR, B1, B2, EPS)
    state = interop.from_torch(optimizer.state_dict(), tx, middle, order=ORDER, transform=_turn)
    end = _theirs(torch, optimizer, flat, GRADIENTS[STEPS:])
    _assert_close(_ours(tx, middle, state, GRADIENTS[STEPS:], dtype)[0], end, dtype)


@pytest.mark.parametrize("name", TORCH)
def test_20_steps_here_and_20_of_pytorch_are_40_of_pytorch(name, dtype, torch):
    end = _theirs(torch, *_optimizer(torch, name, START, dtype), GRADIENTS)
    tx, params = TORCH[name][2](LR, B1, B2, EPS), _cast(START, dtype)
    middle, state = _ours(tx, params, tx.init(params), GRADIENTS[:STEPS], dtype)
    optimizer, flat = _optimizer(torch, name, middle, dtype)
    moved = interop.to_torch(state, optimizer.state_dict(), middle, order=ORDER, transform=_turn)
    optimizer.load_state_dict({**moved, "state": jax.tree.map(torch.tensor, moved["state"])})
    _assert_close(_theirs(torch, optimizer, flat, GRADIENTS[STEPS:]), end, dtype)


def _state_dict(**settings: Any) -> dict[str, Any]:
    """Of two params after one step, as PyTorch gives it."""
    moments = {"step": np.float32(1), "exp_avg": np.zeros(2), "exp_avg_sq": np.zeros(2)}
    group = {"params": [0, 1], "betas": (0.9, 0.999), "weight_decay": 0.0, "amsgrad": False, **settings}
    return {"state": {0: dict(moments), 1: dict(moments)}, "param_groups": [group]}


def test_what_has_no_counterpart_is_refused_by_name():
    tx, params, order = adam_jax.adam(), {"x": jnp.zeros(2), "y": jnp.zeros(2)}, {"x": 0, "y": 1}

    def convert(state_dict: dict[str, Any], tx: Any = tx, **rest: Any) -> Any:
        return interop.from_torch(state_dict, tx, params, order=order, **rest)

    with pytest.raises(ValueError, match="NAdam: its momentum follows another schedule"):
        convert(_state_dict(momentum_decay=4e-3))
    later = _state_dict()
    later["state"][1]["step"] = np.float32(3)
    with pytest.raises(ValueError, match="same step counts, got 1 at x and 3 at y"):
        convert(later)
    del later["state"][1]
    with pytest.raises(ValueError, match="same step counts, got 1 at x and 0 at y"):
        convert(later)
    with pytest.raises(ValueError, match="both or neither must be AMSGrad"):
        convert(_state_dict(), adam_jax.amsgrad())
    with pytest.raises(ValueError, match="order must be a tree like the params"):
        interop.from_torch(_state_dict(), tx, params, order=[0, 1])
    with pytest.raises(ValueError, match=r"with state and param_groups, got a dict of \['weight'\]"):
        convert({"weight": np.zeros(2)})  # a module's
    with pytest.raises(ValueError, match=r"b1 must be .*got nan"):
        interop.from_optax(optax.adam(1e-3).init(params), tx, params, b1=float("nan"))
    groups = _state_dict()
    groups["param_groups"] = [{**groups["param_groups"][0], "params": [i], "betas": (0.9, 0.5 + i / 4)} for i in range(2)]
    with pytest.raises(ValueError, match=r"same decays, got \(0.9, 0.5\) at x and \(0.9, 0.75\) at y"):
        convert(groups)
    with pytest.raises(ValueError, match=r"mu must have the state's shape \(3,\) at \['y'\], got \(2,\)"):
        interop.from_torch(_state_dict(), tx, {**params, "y": jnp.zeros(3)}, order=order)
    with pytest.raises(
        ValueError, match=r"state must hold a ScaleByAdamState or ScaleByAmsgradState, got none: it must be of optax"
    ):
        interop.from_optax(optax.sgd(0.1).init(params), tx, params)
    with pytest.raises(ValueError, match=r"state holds 2 ScaleByAdamStates: choose one with where="):
        interop.to_optax((tx.init(params), tx.init(params)), optax.adam(0.1), params)


@pytest.mark.parametrize("order", [{"x": 0, "y": 1}, {"x": 1, "y": 0}])
def test_what_the_adam_does_not_train_need_not_agree(order):
    params, state_dict = {"x": jnp.zeros(2), "y": jnp.zeros(2)}, _state_dict()
    state_dict["param_groups"] = [
        {**state_dict["param_groups"][0], "params": [i], "betas": (0.9, 0.5 + i / 4)} for i in range(2)
    ]
    state_dict["state"][0] = {"step": np.float32(3), "exp_avg": np.ones(2), "exp_avg_sq": np.full(2, 0.875)}
    name = next(name for name, position in order.items() if position == 0)
    tx = optax.masked(adam_jax.scale_by_adam(), {other: other == name for other in order})
    moved = interop.from_torch(state_dict, tx, params, order=order)
    assert moved.inner_state.count == 3
    np.testing.assert_allclose(moved.inner_state.nu[name], 1.0, rtol=1e-6)  # 1 - 0.5^3
    two = optax.partition({"x": adam_jax.adam(), "y": adam_jax.adam()}, {"x": "x", "y": "y"})
    chosen = interop.from_torch(state_dict, two, params, order=order, where=f"'{name}'")
    jax.tree.map(np.testing.assert_array_equal, surgery.read_moments(chosen, where=f"'{name}'").nu[name], jnp.ones(2))
    back = interop.to_torch(moved, state_dict, params, order=order)["state"]
    assert back[1] is state_dict["state"][1]
    assert set(back[0]) == {"step", "exp_avg", "exp_avg_sq"}
    np.testing.assert_allclose(back[0]["exp_avg_sq"], 0.875, rtol=1e-6)


def test_a_maximum_of_corrected_moments_is_refused_where_pytorch_and_keras_have_raw_ones():
    tx, params, order = adam_jax.amsgrad(max_of="corrected"), {"x": jnp.zeros(2), "y": jnp.zeros(2)}, {"x": 0, "y": 1}
    there = _state_dict(amsgrad=True)
    for moments in there["state"].values():
        moments["max_exp_avg_sq"] = np.zeros(2)
    message = "max_of must be 'raw', as the others' AMSGrad has it, got 'corrected'"
    with pytest.raises(ValueError, match=message):
        interop.from_torch(there, tx, params, order=order)
    with pytest.raises(ValueError, match=message):
        interop.to_torch(tx.init(params), there, params, order=order)
    with pytest.raises(ValueError, match="max_of must be 'corrected'"):
        interop.from_optax(optax.amsgrad(LR).init(params), adam_jax.amsgrad(), params)
    with pytest.raises(ValueError, match="max_of must be as it was at init: the state keeps Squares"):
        tx.update(params, adam_jax.amsgrad().init(params))
    with pytest.raises(ValueError, match=r"AmsgradState, Squares.* but tx keeps ScaleByAmsgradState, CorrectedSquares"):
        checkpoints.check_state(checkpoints.describe_state(adam_jax.amsgrad(), params), tx, params)


def test_sparse_adam_is_accepted_only_knowingly(torch):
    param = torch.nn.Parameter(torch.zeros(2))
    sparse = torch.optim.SparseAdam([param])
    param.grad = torch.tensor([1.0, 0.0]).to_sparse()
    sparse.step()
    tx, params = adam_jax.scale_by_adam(), jnp.zeros(2)
    with pytest.raises(ValueError, match="SparseAdam: it corrects all rows by the number of all steps"):
        interop.from_torch(sparse.state_dict(), tx, params, order=0)
    moved = interop.from_torch(sparse.state_dict(), tx, params, order=0, global_step=True)
    np.testing.assert_allclose(moved.mu, [1.0, 0.0], rtol=1e-6)


def test_nadam_of_pytorch_is_refused(torch):
    optimizer = torch.optim.NAdam([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="NAdam"):
        interop.from_torch(optimizer.state_dict(), adam_jax.nadam(), jnp.zeros(2), order=0)


# Keras


@pytest.fixture
def keras():
    pytest.importorskip("torch", reason="needs PyTorch as Keras' backend: pip install adam_jax[peers]")
    os.environ["KERAS_BACKEND"] = "torch"
    return pytest.importorskip("keras", reason="needs Keras: pip install adam_jax[peers]")


KERAS = {"Adam": (adam_jax.adam, {}), "AdamW": (adam_jax.adamw, {"weight_decay": DECAY}), "AMSGrad": (adam_jax.amsgrad, {})}


@pytest.mark.parametrize("name", KERAS)
def test_20_steps_of_keras_and_20_here_are_40_of_keras(name, dtype, keras):
    make, settings = KERAS[name]
    there = {"amsgrad": True} if name == "AMSGrad" else settings
    optimizer = getattr(keras.optimizers, "AdamW" if name == "AdamW" else "Adam")(
        learning_rate=LR, beta_1=B1, beta_2=B2, epsilon=EPS, **there
    )
    variables = [keras.Variable(START[key], dtype=dtype) for key in ("b", "w")]
    optimizer.build(variables)

    def train(gradients: list[Any]) -> Any:
        for g in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(g[key].astype(dtype)) for key in ("b", "w")])
        return {key: v.value.detach().numpy().copy() for key, v in zip(("b", "w"), variables, strict=True)}

    middle = _cast(train(GRADIENTS[:STEPS]), dtype)
    tx = make(LR, B1, B2, EPS, eps_hat=True, **settings)
    state = interop.from_keras(optimizer, tx, middle, order=ORDER)
    _assert_close(_ours(tx, middle, state, GRADIENTS[STEPS:], dtype)[0], train(GRADIENTS[STEPS:]), dtype)


@pytest.mark.parametrize("name", ["Nadam", "Adamax"])  # another momentum; eps outside the maximum
def test_what_keras_does_otherwise_is_refused(name, keras):
    with pytest.raises(ValueError, match=f"optimizer must be Keras' Adam or AdamW, got {name}"):
        interop.from_keras(getattr(keras.optimizers, name)(), adam_jax.adam(), jnp.zeros(2), order=0)
