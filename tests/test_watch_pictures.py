"""The figure draws what was measured."""

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.watch import plot_history, watch_adam

TX = adam_jax.adam(1e-2)
WATCH = watch_adam(1e-2)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12), "b": jnp.zeros(3)}


@jax.jit
def _scan(params):
    def step(carry, seed):
        params, state = carry
        g = jax.tree.map(lambda p: 2 * p + jax.random.normal(jax.random.key(seed), p.shape), params)
        updates, state = TX.update(g, state, params)
        return (optax.apply_updates(params, updates), state), WATCH(state, g, params, updates)

    return jax.lax.scan(step, (params, TX.init(params)), jnp.arange(6))[1]


@pytest.fixture(scope="module")
def history():
    return jax.device_get(_scan(PARAMS))


@pytest.fixture(scope="module")
def steps(history):
    return [jax.tree.map(lambda x, i=i: x[i], history) for i in range(6)]


def test_the_figure_draws_the_history(history, steps):
    for figure in (plot_history(history), plot_history(steps), plot_history(history, leaf="['w']", title="w")):
        assert len(figure.axes) == 7  # six panels and a colour bar
    mean = next(line for line in plot_history(steps).axes[0].lines if line.get_label() == "mean")
    np.testing.assert_array_equal(mean.get_ydata(), history.overall.snr_mean)


def test_no_legend_lies_on_a_curve(history):
    figure = plot_history(history)
    figure.savefig(io.BytesIO(), format="png")  # places everything
    for axis in figure.axes[:6]:
        assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1
        assert axis.title.get_window_extent().y0 >= axis.get_legend().get_window_extent().y1 - 2


def test_the_colours_are_not_those_of_the_first_step(steps):
    first = steps[0].overall.snr_histogram
    assert first.max() / first.sum() >= 0.8  # every ratio is one then
    (mesh,) = plot_history([steps[0], *steps[4:]]).axes[0].collections
    assert mesh.get_clim()[1] < 0.7


def test_a_history_without_gradients_says_what_to_give():
    seen = WATCH(TX.init(PARAMS))
    texts = [[text.get_text() for text in axis.texts] for axis in plot_history([seen]).axes[3:5]]
    assert texts == [["give gradients to watch"], ["give params to watch"]]


def test_what_cannot_be_drawn_is_refused(steps, monkeypatch):
    with pytest.raises(ValueError, match="at least one Diagnostics"):
        plot_history([])
    with pytest.raises(ValueError, match="stacked along one axis"):
        plot_history(steps[0])
    with pytest.raises(ValueError, match=r"leaf must be the path of a leaf, one of \[.*\], got \"\['x'\]\""):
        plot_history(steps, leaf="['x']")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib is needed here: pip install "adam_jax\[watch\]"'):
        plot_history(steps)
