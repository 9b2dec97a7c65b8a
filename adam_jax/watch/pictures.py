"""Pictures of what Adam did: a history of `Diagnostics` as one figure."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adam_jax.watch.extras import imported
from adam_jax.watch.sums import SNR_EDGES

__all__ = ["plot_history"]


def plot_history(history: Any, *, leaf: str | None = None, title: str | None = None) -> Any:
    """Draw what Adam did: signal-to-noise, effective step and its bounds, norms, directions, dead shares, the histogram.

    Args:
        history: `Diagnostics` stacked by `lax.scan`, or a sequence of them.
        leaf: the path of one leaf; default all together.
        title: of the figure.

    Returns:
        A Matplotlib figure that belongs to no window: save it with `savefig`.

    Raises:
        ValueError: for a history of nothing, or a single `Diagnostics`.
        ImportError: where Matplotlib is missing.

    Example:
        >>> import adam_jax
        >>> seen = adam_jax.watch_adam("square")(adam_jax.adam().init(jnp.ones(3)))
        >>> [axis.get_title() for axis in plot_history([seen, seen]).axes][:2]
        ['signal-to-noise ratio', 'effective step']
    """
    figure_module = imported("matplotlib.figure")
    if isinstance(history, Sequence) and not hasattr(history, "_fields"):
        if not history:
            raise ValueError("history must hold at least one Diagnostics, got none")
        history = jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *history)
    history = jax.tree.map(np.asarray, history)
    if history.count.ndim != 1:
        raise ValueError(f"history must be stacked along one axis, got count of shape {history.count.shape}")
    seen = history.overall if leaf is None else history.leaves[leaf]
    figure = figure_module.Figure(figsize=(12, 6.6), layout="constrained")
    figure.suptitle(title or f"Adam, {leaf or 'all leaves'}")
    axes = figure.subplots(2, 3).ravel()
    panels = (_snr_panel, _step_panel, _norm_panel, _direction_panel, _share_panel, _histogram_panel)
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, history, seen)
        axis.set_xlabel("step")
    return figure


def _snr_panel(axis: Any, history: Any, seen: Any) -> None:
    low, first, median, third, high = seen.snr_quantiles.T
    axis.fill_between(history.count, low, high, color="C0", alpha=0.15, lw=0, label="5 to 95 %")
    axis.fill_between(history.count, first, third, color="C0", alpha=0.3, lw=0, label="25 to 75 %")
    axis.plot(history.count, median, color="C0", label="median")
    axis.plot(history.count, seen.snr_mean, color="C3", label="mean")
    axis.set(title="signal-to-noise ratio", ylabel="|m̂| / √v̂")
    _log_scale(axis)
    _legend(axis)


def _step_panel(axis: Any, history: Any, seen: Any) -> None:
    _lines(axis, history, {"rms": seen.step_rms, "largest": seen.step_max})
    for name, value, style in (("α", history.learning_rate, ":"), ("Section 2.1", history.bound, "--"),
                               ("Cauchy-Schwarz", history.supremum, "-.")):  # fmt: skip
        if np.isfinite(value).all():
            axis.plot(history.count, value, style, color="0.4", lw=1, label=name)
    axis.set(title="effective step", ylabel="|Δ|")
    _log_scale(axis)
    _legend(axis)


def _norm_panel(axis: Any, history: Any, seen: Any) -> None:
    names = {"m̂": "mu_norm", "√v̂": "nu_norm", "gradient": "gradient_norm", "params": "param_norm", "update": "update_norm"}
    _lines(axis, history, {label: getattr(seen, name) for label, name in names.items()})
    axis.set(title="norms")
    _log_scale(axis)
    _legend(axis)


def _direction_panel(axis: Any, history: Any, seen: Any) -> None:
    _lines(axis, history, {"cosine of m̂ and g": seen.cosine, "update / params": seen.update_ratio})
    axis.set(title="direction and relative step", yscale="symlog")
    axis.set_yscale("symlog", linthresh=1e-4)
    _legend(axis)


def _share_panel(axis: Any, history: Any, seen: Any) -> None:
    shares = {"v = 0": seen.dead, "√v̂ < ε": seen.eps_dominated, "|Δ| at α": seen.at_alpha, "|Δ| at the bound": seen.at_bound}
    _lines(axis, history, shares)
    axis.set(title="shares of coordinates", ylim=(-0.02, 1.02))
    _legend(axis)


def _histogram_panel(axis: Any, history: Any, seen: Any) -> None:
    counts = seen.snr_histogram / np.maximum(seen.snr_histogram.sum(-1, keepdims=True), 1)
    exponents = np.log2(SNR_EDGES)
    exponents = np.array([exponents[0] - 0.5, *exponents, exponents[-1] + 0.5])  # of the bins' edges
    edges = np.append(history.count, history.count[-1] + 1)
    mesh = axis.pcolormesh(edges, exponents, counts.T, cmap="Blues", rasterized=True)
    axis.set(title="signal-to-noise, share of live coordinates", ylabel="log₂ |m̂| / √v̂")
    axis.figure.colorbar(mesh, ax=axis)


def _lines(axis: Any, history: Any, lines: dict[str, Any]) -> None:
    for label, values in lines.items():
        if values is not None:
            axis.plot(history.count, values, label=label, lw=1.3)


def _log_scale(axis: Any) -> None:
    """A logarithmic scale, unless everything is zero: before the first step, or without a gradient."""
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axis.get_lines()):
        axis.set_yscale("log")


def _legend(axis: Any) -> None:
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
