"""Every transformation keeps every promise: cases x promises."""

import inspect
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, OPTIMIZERS, Case
from flax import nnx
from jax import export

from adam_jax import trees

STRICT = jax.config.read("jax_numpy_dtype_promotion") == "strict"
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_optimizer = pytest.mark.parametrize("case", [CASES[name] for name in OPTIMIZERS], ids=OPTIMIZERS)


def _tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "deep": [jnp.asarray(rng.normal(size=2), jnp.bfloat16), jnp.float32(rng.normal())],
        "nothing": None,
        "empty": jnp.zeros((0, 5)),
    }


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def _run(tx: optax.GradientTransformationExtraArgs, steps: int = 4) -> tuple[Any, Any]:
    params, update = _tree(), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(steps):
        updates, state = update(_tree(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@every_case
def test_updates_have_the_gradients_structure_shapes_and_dtypes(case: Case):
    params, gradients = _tree(), _tree(1)
    tx = case.make()
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)


@every_case
def test_jit_changes_nothing_but_rounding(case: Case):
    params, gradients = _tree(), _tree(1)
    tx = case.make()
    eager, _ = tx.update(gradients, tx.init(params), params)
    jitted, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    # one rounding of the narrowest dtype, bfloat16
    chex.assert_trees_all_close(*(jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (eager, jitted)), rtol=2**-8)


@every_case
def test_a_second_step_does_not_retrace(case: Case):
    params, gradients = _tree(), _tree(1)
    tx = case.make()
    traces = []

    @jax.jit
    def update(*arguments: Any) -> Any:
        traces.append(1)
        return tx.update(*arguments)

    _, state = update(gradients, tx.init(params), params)
    update(_tree(2), state, params)
    assert len(traces) == 1


@every_case
def test_state_types_never_change(case: Case):
    params = _tree()
    tx = case.make()
    state = tx.init(params)
    for seed in (1, 2):
        _, new_state = jax.jit(tx.update)(_tree(seed), state, params)
        assert _types(new_state) == _types(state)
        state = new_state


@every_case
def test_a_scan_over_steps_is_the_loop_bit_for_bit(case: Case):
    params = _tree()
    tx = case.make()
    gradients = [_tree(seed) for seed in (1, 2, 3)]

    def step(state: Any, g: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state, params)
        return state, updates

    loop_state, update = tx.init(params), jax.jit(step)
    loop = []
    for g in gradients:
        loop_state, updates = update(loop_state, g)
        loop.append(updates)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    scan_state, scanned = jax.jit(lambda: jax.lax.scan(step, tx.init(params), stack))()
    last = jax.tree.map(lambda leaf: leaf[-1], scanned)
    # the loop body is compiled twice, and XLA may contract a product and a sum differently: 2 ulp
    chex.assert_trees_all_close((scan_state, last), (loop_state, loop[-1]), rtol=3e-7, atol=1e-7)


@every_case
def test_vmap_over_runs_is_a_loop_over_runs(case: Case):
    tx = case.make()
    params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    gradients = -params[::-1]
    states = jax.vmap(tx.init)(params)
    updates, states = jax.jit(jax.vmap(tx.update))(gradients, states, params)
    for run in range(3):
        alone, state = jax.jit(tx.update)(gradients[run], tx.init(params[run]), params[run])
        chex.assert_trees_all_close(updates[run], alone, rtol=1e-6)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, run=run: leaf[run], states), state, rtol=1e-6)


@every_case
def test_init_takes_shapes_in_place_of_arrays(case: Case):
    params = _tree()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tx = case.make()
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), tx.init(params))


@every_case
def test_extra_arguments_pass_by(case: Case):
    params = _tree()
    tx = optax.with_extra_args_support(case.make())
    plain, _ = tx.update(_tree(1), tx.init(params), params)
    extra, _ = tx.update(_tree(1), tx.init(params), params, value=1.0, grad=None)
    chex.assert_trees_all_equal(plain, extra)


@every_case
def test_it_composes_with_chain_masked_and_partition(case: Case):
    mask = {"w": True, "deep": [False, True], "nothing": None, "empty": True}
    labels = {"w": "here", "deep": ["there", "here"], "nothing": None, "empty": "here"}
    for tx in (
        optax.chain(optax.clip(1.0), case.make()),
        optax.masked(case.make(), mask),
        optax.partition({"here": case.make(), "there": optax.sgd(1.0)}, labels),
    ):
        params, _ = _run(optax.with_extra_args_support(tx))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@every_case
@pytest.mark.skipif(STRICT, reason="optax.MultiSteps divides by an integer, whatever stands inside")
def test_it_composes_with_multisteps(case: Case):
    params, _ = _run(optax.MultiSteps(case.make(), 2).gradient_transformation())
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@every_case
def test_injected_numbers_give_what_constants_give(case: Case):
    injected = optax.inject_hyperparams(case.factory, hyperparam_dtype=jnp.float32)(**case.numbers, **case.choices)
    constant, _ = _run(case.make())
    traced, state = _run(injected)
    # decays that arrive as float32 differ from Python's by half an ulp; bfloat16 leaves may round the other way
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (constant, traced)), rtol=1e-2, atol=1e-5
    )
    assert set(state.hyperparams) >= set(case.numbers)


@every_case
def test_optax_finds_and_maps_the_arrays_in_a_state(case: Case):
    params = _tree()
    tx = case.make()
    state = tx.init(params)

    def belongs(leaf: Any, param: Any) -> bool:  # an int8 leaf has both moments in `mu`
        return leaf.shape == param.shape or trees.is_absent(leaf)

    mapped = optax.tree_utils.tree_map_params(tx, belongs, state, params)
    chex.assert_trees_all_equal_structs(mapped, state)
    # what is not a leaf's moment, a count, a weight or a window of codes, stays an array
    assert all(leaf is True or leaf.shape == () or leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(mapped))
    if "mu_dtype" in inspect.signature(case.factory).parameters:
        chex.assert_trees_all_equal_shapes(optax.tree_utils.tree_get(state, "mu"), params)


@every_case
def test_an_empty_tree_is_no_trouble(case: Case):
    tx = case.make()
    for empty in ({}, None):
        updates, _ = jax.jit(tx.update)(empty, tx.init(empty), empty)
        assert updates == empty


@every_case
def test_it_lowers_for_cpu_cuda_and_tpu(case: Case):
    params = _tree()
    tx = case.make()
    state = tx.init(params)
    leaves, treedef = jax.tree.flatten((params, state, params))

    def step(*leaves: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(tx.update(*jax.tree.unflatten(treedef, leaves)))

    exported = export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*leaves)
    assert exported.platforms == ("cpu", "cuda", "tpu")


@every_optimizer
def test_an_equinox_model_trains(case: Case):
    tx = case.make(learning_rate=0.05)
    model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0), dtype=jnp.float32)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = _problem()

    def loss(model: eqx.nn.MLP) -> jax.Array:
        return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)

    @eqx.filter_jit
    def step(model: eqx.nn.MLP, state: Any) -> tuple[eqx.nn.MLP, Any]:
        gradients = eqx.filter_grad(loss)(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    before = loss(model)
    for _ in range(30):
        model, state = step(model, state)
    assert loss(model) < 0.5 * before


@every_optimizer
def test_a_flax_model_trains(case: Case):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.make(learning_rate=0.05), wrt=nnx.Param)
    x, y = _problem()

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x)[:, 0] - y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def _problem() -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)), jnp.float32)
    return x, x @ jnp.array([1.5, -2.0], jnp.float32)
