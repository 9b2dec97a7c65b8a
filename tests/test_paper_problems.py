"""The models and the claims: costs against their definitions, verdicts against curves made to hold or to fail."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax.paper
from adam_jax.paper import figure1, figure2, figure3, figure4, plots, problems
from adam_jax.paper.contest import Comparison
from adam_jax.paper.results import Curve, Panel, Result, Table
from adam_jax.paper.training import Curves

KEY = jax.random.key(0)
X = np.random.default_rng(0).integers(0, 256, (6, 12), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2], np.int32)
MODULES = [m.name for m in pkgutil.iter_modules(adam_jax.paper.__path__, "adam_jax.paper.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    for package in ("matplotlib", "mlxtend", "rich", "skimage", "sklearn"):
        pytest.importorskip(package, reason='pip install "adam_jax[paper]"')
    scope = {"jax": jax, "jnp": jnp, "optax": optax}
    results = doctest.testmod(importlib.import_module(name), extraglobs=scope, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_logistic_cost_is_the_negative_log_likelihood_and_the_penalty():
    problem = problems.logistic(12, 3, l2=0.5)
    params = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), problem.init(KEY))
    logits = X / 255 @ np.float64(params["w"]) + np.float64(params["b"])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(6), Y].mean() + 0.25 * np.sum(np.float64(params["w"]) ** 2)
    np.testing.assert_allclose(jax.jit(problem.cost)(params, X, Y, KEY), expected, rtol=1e-6)  # float32


def test_shared_panels_have_one_scale_and_one_legend():
    curves = [
        [Curve("a", np.arange(3), np.full((2, 3), height), "r"), Curve("b", np.arange(3), np.ones((1, 3)), "k", dashed=True)]
        for height in (1.0, 500.0)
    ]
    panels = [Panel(f"panel {k}", "x", "y", lines) for k, lines in enumerate(curves)]
    figure = plots.draw(Result("t", panels, [], [], {}, shared=True))
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    assert [len(figure.legends), *(axis.get_legend() for axis in figure.axes)] == [1, None, None]
    below, above = figure.axes[0].lines  # on one another, and both to be seen: dashes and rings over a line and dots
    assert above.get_zorder() > below.get_zorder()
    assert above.get_markersize() > below.get_markersize()
    assert above.get_markerfacecolor() == "none"


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_dropout_keeps_the_mean_and_drops_the_share(noise):
    dropped = np.asarray(jax.jit(lambda: problems._dropped(KEY, noise, jnp.ones((400, 1001))))())
    assert abs(dropped.mean() - 1) < 0.005  # five standard deviations are .004 at noise .5
    assert abs((dropped == 0).mean() - noise) < 0.003 + 1 / 512  # a probability is rounded to a 256th
    assert len(np.unique(dropped)) == 2


def test_without_noise_the_net_does_not_use_its_key():
    problem = problems.perceptron(12, 3, hidden=8, noise=0.0, input_noise=0.0)
    params, cost = problem.init(KEY), jax.jit(problem.cost)
    assert cost(params, X, Y, KEY) == cost(params, X, Y, jax.random.key(1))


def test_autoencoder_cost_is_the_lower_bound():
    """Against the bound written out with log-densities of the same sample."""
    problem = problems.autoencoder(12, hidden=5, latent=3)
    params = problem.init(KEY)
    x = X / 255
    h = jax.nn.softplus(x @ params["encode"][0] + params["encode"][1])
    mean, log_variance = np.split(np.asarray(h @ params["moments"][0] + params["moments"][1], np.float64), 2, axis=1)
    z = mean + np.exp(log_variance / 2) * np.asarray(jax.random.normal(KEY, (6, 3)))
    logits = jax.nn.softplus(z @ params["decode"][0] + params["decode"][1]) @ params["pixels"][0] + params["pixels"][1]
    p = 1 / (1 + np.exp(-np.float64(logits)))
    likelihood = (x * np.log(p) + (1 - x) * np.log1p(-p)).sum(1)
    variance = np.exp(log_variance)
    divergence = 0.5 * (variance + mean**2 - 1 - log_variance).sum(1)
    np.testing.assert_allclose(
        jax.jit(problem.cost)(params, X, Y, KEY), (divergence - likelihood).mean(), rtol=1e-5
    )  # float32 and its softplus


def test_max_pooling_is_that_of_reduce_window_with_its_derivative():
    h = jax.random.permutation(KEY, 2.0 * jnp.arange(2 * 8 * 6 * 3)).reshape(2, 8, 6, 3) - 99.0  # no ties

    def expected(h):
        return jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    given = jax.random.normal(KEY, (2, 4, 3, 3))
    for ours, theirs in zip(jax.vjp(problems._pooled, h), jax.vjp(expected, h), strict=True):
        if callable(ours):
            ours, theirs = ours(given)[0], theirs(given)[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_convolutional_net_sees_shapes_of_the_paper():
    params = jax.eval_shape(problems.convolutional(32, 10).init, KEY)
    assert [w.shape for w, _ in params["filters"]] == [(5, 5, 3, 64), (5, 5, 64, 64), (5, 5, 64, 128)]
    assert [w.shape for w, _ in params["dense"]] == [(128 * 4 * 4, 1000), (1000, 10)]


@pytest.mark.parametrize("images", [12, 20])
def test_whitening_is_the_inverse_root_of_the_covariance_whichever_side_is_shorter(images):
    x = np.random.default_rng(1).integers(0, 256, (images, 4, 4, 1), dtype=np.uint8)
    flat = x.reshape(images, -1) - x.reshape(images, -1).mean(0)
    flat /= flat.std()
    variances, directions = np.linalg.eigh(flat.T @ flat / (images - 1) + 0.1 * np.eye(16))
    expected = flat @ (directions / np.sqrt(variances)) @ directions.T
    np.testing.assert_allclose(figure3.whitened(x).reshape(images, -1), expected, atol=1e-4)  # float32 eigenvectors


def _comparison(**costs: float) -> Comparison:
    points = np.linspace(0.5, 2, 4)
    curves = {
        name: Curves(np.full((2, 1, 4), cost), points, points * (10 if name == "lbfgs" else 1))
        for name, cost in costs.items()
    }
    return Comparison(curves, {}, {}, Table("", [], []))


def test_verdicts_follow_the_curves():
    ahead = {"adam": 1.0, "sgd": 1.02, "adagrad": 1.2, "adagrad_constant": 1.2, "rmsprop": 1.3, "lbfgs": 1.5}
    first = ahead | {"sgd": 1.25, "adagrad_constant": 1.04}  # on sparse features, and in the first epoch
    behind = {"adam": 1.2, "sgd": 1.0, "adagrad": 1.1, "adagrad_constant": 1.1, "rmsprop": 0.9, "lbfgs": 1.1}
    diverged = behind | {"adam": float("nan"), "adagrad": float("nan"), "adagrad_constant": float("inf")}
    judges = [
        (ahead, lambda found: figure1._as_fast_as(found, "sgd", "")),
        (ahead, lambda found: figure1._ahead_of_adagrad(found, "adagrad")),
        *((ahead, lambda found, k=k: figure2._against_quasi_newton(found)[k]) for k in range(2)),
        *((costs, lambda found, k=k: figure3._claims(found, "")[k]) for k, costs in enumerate((first, ahead))),
        *((first, lambda found, k=k: figure1._sparse(found, "")[k]) for k in range(5)),
    ]
    for costs, judge in judges:
        assert judge(_comparison(**costs)).held
        assert not judge(_comparison(**behind)).held
        assert not judge(_comparison(**diverged)).held
        assert not judge(_comparison(**dict.fromkeys(ahead, float("nan")))).held


def test_a_rival_that_diverged_is_behind():
    costs = {
        "adam": 1.0,
        "sgd": 1.0,
        "adagrad": float("nan"),
        "adagrad_constant": 1.0,
        "rmsprop": 1.0,
        "lbfgs": float("nan"),
    }
    assert figure1._ahead_of_adagrad(_comparison(**costs), "adagrad").held
    assert all(claim.held for claim in figure2._against_quasi_newton(_comparison(**costs))[:2])
    assert figure3._claims(_comparison(**costs), "")[1].held


@pytest.mark.parametrize(("times", "held"), [(1.1, False), (7.0, True), (40.0, False)])
def test_five_to_ten_times_slower_is_neither_less_nor_more(times, held):
    points = np.linspace(0.5, 2, 4)
    curves = {
        "adam": Curves(np.ones((2, 1, 4)), points, points),
        "lbfgs": Curves(np.ones((2, 1, 4)), points, points * times),
    }
    assert figure2._against_quasi_newton(Comparison(curves, {}, {}, Table("", [], [])))[2].held is held


@pytest.mark.parametrize(("uncorrected", "held"), [(lambda b2: 100 + 10 * (b2 == 0.9999), True), (lambda _: 100.0, False)])
def test_bias_correction_verdict_follows_the_losses(uncorrected, held):
    def curves(loss: float) -> Curves:
        return Curves(np.full((2, 3, 1), loss), np.ones(1), np.ones(1))

    found = {("adam", b1, b2): curves(100.0) for b1 in figure4.B1 for b2 in figure4.B2}
    found |= {("adam_uncorrected", b1, b2): curves(uncorrected(b2)) for b1 in figure4.B1 for b2 in figure4.B2}
    assert figure4._unstable(found, np.array([False, True, True]), 1).held is held
    assert figure4._no_worse(found, 1).held
