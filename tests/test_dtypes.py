"""Every mix of dtypes, the whole range of each, and complex numbers."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import CASES, OPTIMIZERS

import adam_jax
import adam_jax.storage

NARROW = (jnp.bfloat16, jnp.float16, jnp.float32)


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def _play(tx, gradients, params=None):
    """Updates of one jitted scan, and the last state."""
    params = jnp.zeros_like(gradients[0]) if params is None else params
    return jax.jit(lambda: jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], tx.init(params), gradients))()[::-1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dtypes_are_fixed_at_init_for_every_mix(name: str):
    tx = CASES[name].make()
    for params, gradients in itertools.product(NARROW, NARROW):
        p, g = jnp.ones(3, params), jnp.ones((2, 3), gradients)
        updates, state = _play(tx, g, p)  # a scan refuses a state whose types change
        assert updates.dtype == gradients
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float64_arrays_of_numpy_are_taken_as_float32(name: str):
    tx = CASES[name].make()
    state = tx.init({"w": np.ones(2)})  # with a warning, that would be an error here
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    tx.update({"w": np.ones(2)}, state, {"w": np.ones(2)})


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float64_stays_float64(name: str):
    tx = CASES[name].make()
    mixed = {"wide": jnp.ones(3), "narrow": jnp.ones(3, jnp.float32)}
    state = tx.init(mixed)
    updates, new_state = jax.jit(tx.update)(mixed, state, mixed)
    assert updates["wide"].dtype == jnp.float64
    assert updates["narrow"].dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, new_state) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert optax.tree_utils.tree_get(state, "mu")["wide"].dtype == jnp.float64


@pytest.mark.usefixtures("float64")
def test_a_state_keeps_its_dtypes_whatever_those_of_gradients_are():
    for tx, params, gradients in (
        (adam_jax.scale_by_adam(), jnp.ones(3, jnp.float32), jnp.ones((2, 3), jnp.float64)),
        (adam_jax.scale_by_adam(mu_dtype=jnp.float32), jnp.ones(3, jnp.float64), jnp.ones((2, 3), jnp.float64)),
    ):
        _, state = _play(tx, gradients, params)  # a scan refuses a state whose types change
        assert state.mu.dtype == jnp.float32


@pytest.mark.parametrize("dtype", NARROW[:2])
def test_the_first_step_of_narrow_gradients_is_right(dtype):
    g = jnp.array([0.0, *np.geomspace(1e-6, 6e4, 50)]).astype(dtype)
    updates, _ = _play(adam_jax.scale_by_adam(), g[None])
    exact = reference.adam(np.asarray(g.astype(jnp.float32))[None])
    assert np.max(np.abs(np.asarray(updates.astype(jnp.float32)) - exact)) <= (2e-3 if dtype == jnp.float16 else 4e-3)


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_that_shrink_100_times_are_followed(dtype):
    gradients = jnp.repeat(jnp.array([1.0, 0.01], dtype), 10_000)[:, None]
    adam, _ = _play(adam_jax.scale_by_adam(), gradients)
    late = float(gradients[-1, 0])
    exact = late / math.sqrt(late**2 + (1 - late**2) * 0.999**10_000)
    np.testing.assert_allclose(float(adam[-1, 0]), exact, rtol=0.03)
    adamax, _ = _play(adam_jax.scale_by_adamax(), gradients)
    np.testing.assert_allclose(float(adamax[-1, 0]), 1.0, rtol=0.03)  # .999^10000 is less than .01


def test_one_huge_gradient_does_no_lasting_harm():
    gradients = np.ones((3000, 1), np.float32)
    gradients[10] = 1e20
    for root in (False, True):
        updates, state = _play(adam_jax.scale_by_adam(storage="root" if root else None), jnp.asarray(gradients))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        if root:
            exact = reference.adam(gradients)
            np.testing.assert_allclose(np.asarray(updates)[:, 0], exact[:, 0], rtol=1e-3, atol=1e-37)


def test_the_largest_numbers_of_either_sign_leave_every_state_finite():
    largest = np.finfo(np.float32).max
    gradients = np.array([largest, -largest, -largest, largest, 0.0, 1.0], np.float32)[:, None]
    for name in OPTIMIZERS:
        updates, state = _play(CASES[name].make(), jnp.asarray(gradients))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state))), name


def test_constant_gradients_of_any_size_give_unit_steps_in_the_root_form():
    g = np.geomspace(1e-36, 1e37, 200).astype(np.float32)
    updates, _ = _play(adam_jax.scale_by_adam(eps=0.0, storage="root"), jnp.asarray(np.tile(g, (50, 1))))
    np.testing.assert_allclose(updates, 1.0, atol=8 * 2**-24)


FAMILY = {
    "adam": adam_jax.scale_by_adam,
    "nadam": functools.partial(adam_jax.scale_by_adam, nesterov=True),
    "amsgrad": adam_jax.scale_by_amsgrad,
    "adamax": adam_jax.scale_by_adamax,
    "lp": functools.partial(adam_jax.scale_by_lp, 3.0),
}


@pytest.mark.parametrize("how", [None, "root", "bfloat16", adam_jax.storage.int8(smallest=0)], ids=str)
@pytest.mark.parametrize("factory", FAMILY.values(), ids=FAMILY)
def test_a_nan_or_an_infinity_shows_in_its_element_and_in_no_other(factory, how):
    wrong = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, -1.0])
    updates, _ = _play(factory(storage=how), jnp.stack([jnp.ones(5), wrong, jnp.ones(5)]))
    assert jnp.isnan(updates[1:, 1:4]).all()
    assert jnp.isfinite(updates[:, ::4]).all()


def test_complex_leaves_have_real_second_moments_of_the_absolute_value():
    rng = np.random.default_rng(0)
    g = (rng.normal(size=(100, 5)) + 1j * rng.normal(size=(100, 5))).astype(np.complex64)
    for root in (False, True):
        updates, state = _play(adam_jax.scale_by_adam(storage="root" if root else None), jnp.asarray(g))
        np.testing.assert_allclose(updates, reference.adam(g).astype(complex), atol=2e-6)
        assert state.mu.dtype == jnp.complex64
        assert state.nu.dtype == jnp.float32
        assert (state.mu.nbytes + state.nu.nbytes) / state.mu.size == 12


def test_complex_moments_take_the_dtype_of_their_parts():
    tx = adam_jax.scale_by_adam(mu_dtype=jnp.float32)
    g = jnp.array([3.0 + 4.0j, 0.0])
    updates, state = tx.update(g, tx.init(g))
    assert state.mu.dtype == jnp.complex64
    np.testing.assert_allclose(updates, [0.6 + 0.8j, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="mu_dtype"):
        adam_jax.scale_by_adam(mu_dtype=jnp.float16).init({"z": jnp.zeros(2, jnp.complex64)})


@pytest.mark.usefixtures("float64")
def test_parts_of_complex_numbers_may_be_treated_apart_as_pytorch_does():
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install adam_jax[peers]")
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(60, 4)) + 1j * rng.normal(size=(60, 4))
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.complex128))
    optimizer = torch.optim.Adam([param], lr=0.1)
    tx = optax.contrib.split_real_and_imaginary(adam_jax.adam(0.1))
    params = jnp.ones(4, jnp.complex128)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        param.grad = torch.tensor(g)
        optimizer.step()
        updates, state = update(jnp.asarray(g), state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, param.detach().numpy(), rtol=1e-12)
