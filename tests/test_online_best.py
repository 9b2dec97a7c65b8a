"""The best fixed point is certified."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax.online import (
    Ball,
    Box,
    best_fixed_point,
)

INTERVAL = Box(-1.0, 1.0)


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


def test_a_mean_loss_that_is_not_convex_has_no_certified_best_point():
    with pytest.raises(ValueError, match=r"losses must be convex: the mean loss is .* below its tangent at the start"):
        best_fixed_point(lambda x, c: -((x - c) ** 2), jnp.arange(4.0), jnp.float32(0.3), INTERVAL)
