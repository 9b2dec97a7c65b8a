"""The online game, its regret, Theorem 4.1's bound, and the stream on which Adam fails."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.online import (
    Ball,
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


def test_losses_that_are_not_convex_are_refused():
    stream = jnp.linspace(0.0, 1.0, 20)
    with pytest.raises(ValueError, match=r"losses must be convex: loss \d+ at theta_\d+ is .* below its tangent"):
        play(lambda x, c: jnp.cos(3 * x + c), stream, jnp.float32(0.0), optax.sgd(0.3), INTERVAL)
    play(lambda x, c: jnp.cos(3 * x + c), stream, jnp.float32(0.0), optax.sgd(0.3), INTERVAL, convexity_pairs=0)


def test_domains_streams_and_settings_that_cannot_be_are_refused():
    stream = jnp.ones(3)
    for domain, bounds, message in (
        (Box, (1.0, -1.0), r"lower must be <= upper, or the box is empty, got 1\.0 and -1\.0"),
        (Box, (jnp.nan, 1.0), "lower must be a finite number, got nan"),
        (Box, (0.0, jnp.inf), "upper must be a finite number, got inf"),
        (Ball, (-1.0,), r"radius must be a finite number >= 0, got -1\.0"),
        (Ball, (1.0, jnp.nan), "center must be a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            domain(*bounds)
    with pytest.raises(TypeError, match="domain must be a Box or a Ball, got 5"):
        play(linear_losses, stream, jnp.float32(0.0), optax.sgd(0.1), 5)
    with pytest.raises(TypeError, match=r"tx must be an Optax transformation, with init and update, got 0\.1"):
        play(linear_losses, stream, jnp.float32(0.0), 0.1)
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
    with pytest.raises(ValueError, match=r"c must be a finite number > 2, got 1\.5"):
        reddi_losses(10, 1.5)
