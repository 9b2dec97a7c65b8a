"""Live PyTorch and Keras as oracles; each skips where it is not installed (`pip install adam_jax[peers]`)."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax

GRADIENTS = np.random.default_rng(0).normal(size=(60, 7)) * 10 ** np.random.default_rng(1).uniform(-3, 2, size=(1, 7))
START = np.random.default_rng(2).normal(size=7)


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def ours(tx: optax.GradientTransformation, gradients: np.ndarray = GRADIENTS, start: np.ndarray = START) -> np.ndarray:
    params = jnp.asarray(start)
    assert params.dtype in (jnp.float64, jnp.complex128)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def torchs(name: str, **settings: Any) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install adam_jax[peers]")
    param = torch.nn.Parameter(torch.tensor(START))
    optimizer = getattr(torch.optim, name)([param], **settings)
    for g in GRADIENTS:
        param.grad = torch.tensor(g)
        optimizer.step()
    return param.detach().numpy()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "AMSGrad"])
def test_pytorch_agrees_to_1e12_over_60_steps_of_float64(name: str, seed: int):
    rng = np.random.default_rng(seed)
    lr, b1, b2 = 10 ** rng.uniform(-4, -1), rng.uniform(0, 0.99), rng.uniform(0.5, 0.9999)
    eps, decay = 10 ** rng.uniform(-9, -3), 10 ** rng.uniform(-4, -1)
    theirs: dict[str, Any] = {"lr": lr, "betas": (b1, b2), "eps": eps}
    if name == "Adam":
        pair = adam_jax.adam(lr, b1, b2, eps), torchs("Adam", **theirs)
    elif name == "AdamW":
        pair = adam_jax.adamw(lr, b1, b2, eps, weight_decay=decay), torchs("AdamW", weight_decay=decay, **theirs)
    elif name == "Adamax":
        pair = adam_jax.adamax(lr, b1, b2, eps), torchs("Adamax", **theirs)
    else:
        pair = adam_jax.amsgrad(lr, b1, b2, eps), torchs("Adam", amsgrad=True, **theirs)
    np.testing.assert_allclose(ours(pair[0]), pair[1], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_pytorchs_nadam_agrees_where_its_momentum_is_constant():
    # PyTorch's schedule moves the look-ahead alone, its first moment keeps beta1; at a momentum_decay this large both do
    theirs = torchs("NAdam", lr=0.01, betas=(0.9, 0.99), eps=1e-6, momentum_decay=1e9)
    np.testing.assert_allclose(ours(adam_jax.nadam(0.01, 0.9, 0.99, 1e-6)), theirs, rtol=1e-6)  # its mu_product is float32


@pytest.mark.usefixtures("float64")
def test_pytorchs_defaults_are_adam_defaults_torch():
    np.testing.assert_allclose(ours(adam_jax.adam(**adam_jax.interop.adam_defaults("torch"))), torchs("Adam"), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_kerass_adam_is_adam_defaults_keras():
    pytest.importorskip("torch", reason="needs PyTorch as Keras' backend: pip install adam_jax[peers]")
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras", reason="needs Keras: pip install adam_jax[peers]")
    gradients = GRADIENTS * 1e-5  # so small that the place of epsilon matters
    variable = keras.Variable(START, dtype="float32")
    optimizer = keras.optimizers.Adam()
    optimizer.build([variable])
    for g in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(g.astype(np.float32))])
    theirs = variable.value.detach().numpy()
    settings = adam_jax.interop.adam_defaults("keras")
    distance = 60 * settings["learning_rate"]
    # Keras computes in float32: 1e-4 of the way gone, where the other place of epsilon is 3e-2 of it
    np.testing.assert_allclose(ours(adam_jax.adam(**settings), gradients), theirs, atol=1e-4 * distance + 3e-7)
    misplaced = ours(adam_jax.adam(**{**settings, "eps_hat": False}), gradients)
    assert np.max(np.abs(misplaced - theirs)) > 0.02 * distance
