"""Programs as users of Optax write them, with only the import changed, beside Optax or a float64 run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)
Y = jnp.tanh(X @ jnp.array([1.0, -2.0, 0.5])) + 0.1
PARAMS = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.zeros(())}
STEPS = 24


def _loss(params: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(X @ params["w"] + params["b"]) - Y) ** 2)


def _trained(tx: Any, params: Any = PARAMS, loss: Callable[[Any], jax.Array] = _loss, steps: int = STEPS) -> tuple[Any, Any]:
    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        gradients = jax.grad(loss)(getattr(params, "fast", params))
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0])(params)


def _close(ours: Any, theirs: Any, atol: float = 2e-5) -> None:
    """As near as float32 leaves two ways to add up the same steps of 1e-2."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), ours, theirs)


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "warm-up and cosine": lambda m: m.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, STEPS), weight_decay=0.1),
    "gradient accumulation": lambda m: optax.MultiSteps(m.adamw(1e-2), 4).gradient_transformation(),
    "injected": lambda m: optax.inject_hyperparams(m.adamw)(optax.linear_schedule(1e-2, 0.0, STEPS), b1=0.8),
    "groups": lambda m: optax.multi_transform(
        {"w": m.adam(optax.linear_schedule(1e-2, 0.0, STEPS)), "b": m.nadam(1e-3)}, adam_jax.label_by_path({"b$": "b"}, "w")
    ),
    "frozen": lambda m: optax.partition(
        {"train": m.adamw(1e-2), "freeze": optax.set_to_zero()}, adam_jax.label_by_path({"^b$": "train"}, "freeze")
    ),
    "sharpness-aware": lambda m: optax.contrib.sam(
        m.adam(1e-2), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), sync_period=2
    ),
    "schedule-free": lambda m: optax.contrib.schedule_free(m.adam(1e-2, b1=0.0), 1e-2),
    "accumulation of what is injected": lambda m: optax.MultiSteps(
        optax.inject_hyperparams(m.adamw)(1e-2, weight_decay=0.1), lambda step: jnp.where(jnp.asarray(step) < 3, 1, 3)
    ).gradient_transformation(),
    "selective": lambda m: optax.transforms.selective_transform(m.adam(1e-2), freeze_mask={"w": False, "b": True}),
    "mechanize": lambda m: optax.contrib.mechanize(m.adam(1e-2)),
    "trust ratio": lambda m: optax.chain(m.scale_by_adam(eps=1e-6), optax.scale_by_trust_ratio(), optax.scale(-1e-2)),
    "every third step": lambda m: optax.conditionally_transform(m.adam(1e-2), lambda step: jnp.asarray(step) % 3 == 0),
    "server": lambda m: m.adam(1e-2, b2=0.99, eps=1e-3),
    "GAN": lambda m: m.adam(1e-2, b1=0.0, b2=0.9),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_with_only_the_import_changed_trains_the_same_weights(name: str):
    ours, theirs = (_trained(PROGRAMS[name](module))[0] for module in (adam_jax, optax))
    _close(ours, theirs)


def test_lookahead_keeps_slow_weights_as_with_optax():
    start = optax.LookaheadParams.init_synced(PARAMS)
    ours, theirs = (_trained(optax.lookahead(m.adam(1e-2), 5, 0.5), start)[0].slow for m in (adam_jax, optax))
    _close(ours, theirs)


def test_clients_of_federated_averaging_may_average_their_states():
    def client(tx: Any, params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        g = jax.grad(lambda p: jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) - y) ** 2))(params)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for module in (adam_jax, optax):
        tx, params = module.adam(1e-2), PARAMS
        each = jax.jit(jax.vmap(lambda p, s, x, y, tx=tx: client(tx, p, s, x, y), in_axes=(None, None, 0, 0)))
        state = tx.init(params)
        for _ in range(6):
            both = each(params, state, X.reshape(4, 8, 3), Y.reshape(4, 8))
            params, state = jax.tree.map(lambda leaf: leaf.mean(0, dtype=jnp.float32).astype(leaf.dtype), both)
        found.append(params)
    # each average is of corrected moments, Optax's of raw ones: with equal counts the same
    _close(*found)


def test_the_average_of_the_params_is_the_debiased_one_of_a_diffusion_model():
    params, state = _trained(optax.chain(adam_jax.adamw(1e-2), adam_jax.average_params(0.9)))
    tx, ema = optax.adamw(1e-2), optax.ema(0.9)
    p, s, e, averaged = PARAMS, tx.init(PARAMS), ema.init(PARAMS), PARAMS
    for _ in range(STEPS):
        updates, s = tx.update(jax.grad(_loss)(p), s, p)
        p = optax.apply_updates(p, updates)
        averaged, e = ema.update(p, e)
    _close(adam_jax.averaged_params(state, params), averaged)


@pytest.mark.parametrize("storage", [None, "root"])
def test_a_meta_gradient_through_adam_is_that_of_finite_differences_in_float64(storage: Any):
    with jax.enable_x64(True):
        start = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)

        def outer(rate: jax.Array) -> jax.Array:
            return _loss(_trained(adam_jax.adam(rate, storage=storage), start, steps=4)[0])

        found = jax.grad(outer)(jnp.float64(1e-2))
        exact = (outer(jnp.float64(1e-2 + 1e-6)) - outer(jnp.float64(1e-2 - 1e-6))) / 2e-6
        np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_an_expert_that_was_dead_wakes_as_with_optax():
    def loss(state: Any) -> jax.Array:
        alive = jnp.where(state["t"] > 40, 1.0, jnp.array([1.0, 1.0, 0.0]))
        return jnp.sum(alive[:, None] * (state["experts"] - jnp.arange(4.0)) ** 2) - state["t"]

    params = {"experts": jnp.ones((3, 4)), "t": jnp.zeros(())}
    groups = adam_jax.label_by_path({"^t$": "clock"}, "experts")
    ours, theirs = (
        _trained(optax.partition({"clock": optax.sgd(1.0), "experts": m.adam(1e-2)}, groups), params, loss, 60)[0]
        for m in (adam_jax, optax)
    )
    assert (ours["experts"][2] != 1.0).sum() == 3
    _close(ours, theirs)


def test_steps_lost_to_infinities_are_those_that_apply_if_finite_loses():
    def loss(params: Any) -> jax.Array:
        return _loss(params) / jnp.where(jnp.floor(params["t"]) % 5 == 3, 0.0, 1.0) - params["t"]

    params = {**PARAMS, "t": jnp.zeros(())}
    groups = adam_jax.label_by_path({"^t$": "clock"}, "adam")
    ours, theirs = (
        _trained(optax.partition({"clock": optax.sgd(1.0), "adam": tx}, groups), params, loss)
        for tx in (adam_jax.skip_nonfinite(adam_jax.adam(1e-2)), optax.apply_if_finite(optax.adam(1e-2), 99))
    )
    assert optax.tree_utils.tree_get(ours[1], "total") == 5
    _close(ours[0], theirs[0])


def test_a_population_with_its_own_rates_and_decays_goes_on_from_its_best():
    def evolved(module: Any) -> Any:
        def member(rate: jax.Array, b2: jax.Array, params: Any) -> Any:
            return _trained(module.adam(rate, b2=b2), params)

        def go_on(b2: jax.Array, params: Any, state: Any) -> Any:  # with its own decay: Optax's correction is of that alone
            updates, _ = module.adam(1e-2, b2=b2).update(jax.grad(_loss)(params), state, params)
            return optax.apply_updates(params, updates)

        starts = jax.tree.map(lambda x: x + jnp.arange(3.0).reshape(3, *[1] * x.ndim) / 10, PARAMS)
        decays = jnp.array([0.9, 0.99, 0.999])
        both = jax.vmap(member)(jnp.array([1e-3, 1e-2, 1e-1]), decays, starts)
        best = jnp.argsort(jax.vmap(_loss)(both[0]))[jnp.array([0, 0, 1])]
        return jax.vmap(go_on)(*jax.tree.map(lambda x: x[best], (decays, *both)))

    _close(evolved(adam_jax), evolved(optax))


def test_a_meta_gradient_through_recomputed_steps_is_nearer_to_float64_than_with_optax():
    def outer(rate: Any, module: Any, params: Any) -> jax.Array:
        tx = module.adam(rate)

        @jax.checkpoint
        def step(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(_loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return _loss(jax.lax.scan(step, (params, tx.init(params)), length=6)[0][0])

    ours, theirs = (jax.grad(outer)(1e-2, module, PARAMS) for module in (adam_jax, optax))
    with jax.enable_x64(True):
        exact = jax.grad(outer)(1e-2, optax, jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS))
    assert abs(float(ours) - float(exact)) <= min(2e-6 * abs(float(exact)), abs(float(theirs) - float(exact)))
