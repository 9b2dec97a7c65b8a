"""What is written for one kind of device alone computes what the others compute: each form is run here, on CPU."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax import codes, low_precision, scaling, transforms


@pytest.fixture(params=["cpu", "tpu", "gpu"])
def platform(request, monkeypatch) -> str:
    """All code is that of one platform, where it has a form of its own."""

    def chosen(*args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
        return forms.get(request.param, default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    return request.param


@pytest.mark.usefixtures("platform")
def test_extremes_are_those_of_positive_roots():
    root, m = jnp.array([[0, 7, 200, 3, 250, 90]]), jnp.array([[1.0, -1.0, 1.0, 1.0, jnp.nan, 1.0]])
    scale, half = codes.scale(jnp.array([127, 3])), jnp.full(root.shape, 2**31, jnp.uint32)
    s = codes.decode_root(root, scale)
    for ratio in (0.0, 7.0):
        packed = codes.write(ratio * m * s, s, (half, half), scale, codes.ratios(7.27))
        turn = jnp.uint32(7)
        (found, some), same = codes.extremes([packed, packed[:, [3, 4, 1]]], turn)
        assert (found, some, same) == ((200, 3), (7, 3), turn)  # neither zero nor NaN
        for nothing in (packed[:, [0, 0]], packed[:, [0, 4]], packed[:, [4, 4]], packed[:, :0]):  # two: XLA drops one
            assert codes.extremes([nothing], turn) == ([(0, 255)], turn)
    assert codes.extremes([codes.pack(root)], turn)[0] == [(250, 3)]  # of codes alone


@pytest.mark.usefixtures("platform")
def test_what_only_guides_a_compiler_changes_no_number():
    x = jnp.array([1.0, -0.0, 0.0, 3e38, -1e-30, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(low_precision._once(x).view(jnp.uint32), x.view(jnp.uint32))
    streams, scales = np.array([5, 9], np.uint32), jnp.arange(8, dtype=jnp.int32).reshape(2, 1, 4)
    for count in (0, 7):
        for given in ([streams, scales], [streams]):
            found = transforms._as_data(given, jnp.int32(count))
            chex.assert_trees_all_equal(found, [tuple(x[i] for x in given) for i in range(2)])
    assert float(scaling._sum([jnp.float32(x) for x in (1.0, 2.0, 4.5)])) == 7.5
    assert scaling._sum([]) == 0


@pytest.mark.usefixtures("platform")
def test_a_step_that_is_not_finite_is_skipped_and_others_are_taken():
    tx, alone = adam_jax.skip_nonfinite(adam_jax.scale_by_adam()), adam_jax.scale_by_adam()
    state, inner = tx.init(jnp.zeros(2)), alone.init(jnp.zeros(2))
    for g in ([3.0, -0.5], [jnp.nan, 1.0], [1.0, 2.0]):
        updates, after = tx.update(jnp.array(g), state)
        if np.isnan(g[0]):
            np.testing.assert_array_equal(updates, 0.0)
            jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
        else:
            expected, inner = alone.update(jnp.array(g), inner)
            np.testing.assert_array_equal(updates, expected)
        state = after
    assert int(optax.tree_utils.tree_get(state, "count")) == 2
