"""Pictures of what Adam did: a history of `Diagnostics` as one figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from adam_jax.watch.diagnostics import Diagnostics, Measurements
from adam_jax.watch.extras import imported
from adam_jax.watch.sums import SNR_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 400  # of the heat map at most
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def plot_history(
    history: Diagnostics | Sequence[Diagnostics], *, leaf: str | None = None, title: str | None = None
) -> "Figure":
    """Draw what Adam did: signal-to-noise, effective step and its bounds, norms, direction, relative step, dead shares.

    Args:
        history: `Diagnostics` stacked by `lax.scan`, or a sequence of them.
        leaf: the path of one leaf; default all together.
        title: of the figure.

    Returns:
        A Matplotlib figure that belongs to no window: save it with `savefig`.

    Raises:
        ValueError: for a history of nothing, a single `Diagnostics`, or a leaf that it does not have.
        ImportError: where Matplotlib is missing.

    Example:
        >>> import adam_jax
        >>> from adam_jax.watch import watch_adam
        >>> seen = watch_adam()(adam_jax.adam().init(jnp.ones(3)))
        >>> [axis.get_title() for axis in plot_history([seen, seen]).axes][:2]
        ['how steady gradients are: signal-to-noise |m̂| / √v̂', 'how far weights move: effective step |Δ|']
    """
    figure_module = imported("matplotlib.figure")
    stacked = _stacked(history)
    if leaf is not None and leaf not in stacked.leaves:
        raise ValueError(f"leaf must be the path of a leaf, one of {list(stacked.leaves)}, got {leaf!r}")
    seen = stacked.overall if leaf is None else stacked.leaves[leaf]
    figure = figure_module.Figure(figsize=(13, 7.2), layout="constrained")
    figure.suptitle(title or f"Adam, {'all leaves' if leaf is None else leaf}")
    axes = figure.subplots(2, 3, sharex=True)
    panels = {
        "how steady gradients are: signal-to-noise |m̂| / √v̂": _snr_panel,
        "how far weights move: effective step |Δ|": _step_panel,
        "norms": _norm_panel,
        "does m̂ point where the gradient does?": _cosine_panel,
        "step relative to the params": _ratio_panel,
        "coordinates out of the ordinary": _share_panel,
    }
    for axis, (name, panel) in zip(axes.ravel(), panels.items(), strict=True):
        axis.grid(alpha=0.25)
        panel(axis, stacked, seen)
        rows = _legend(axis)
        axis.set_title(name, fontsize=11, pad=6 + 13 * rows)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure


def _stacked(history: Diagnostics | Sequence[Diagnostics]) -> Diagnostics:
    if not isinstance(history, Diagnostics):
        if not history:
            raise ValueError("history must hold at least one Diagnostics, got none")
        history = jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *history)
    stacked = jax.tree.map(np.asarray, history)
    if np.ndim(stacked.count) != 1:
        raise ValueError(f"history must be stacked along one axis, got count of shape {np.shape(stacked.count)}")
    return stacked


def _snr_panel(axis: "Axes", history: Diagnostics, seen: Measurements) -> None:
    """A heat map whose colours are those of most of the run: at the first step all ratios are one."""
    steps = np.asarray(history.count)
    counts = np.asarray(seen.snr_histogram, np.float64)
    starts = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _COLUMNS)).astype(int))
    counts = np.add.reduceat(counts, starts)
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    edges = np.array([SNR_EDGES[0] / 2**0.5, *SNR_EDGES, SNR_EDGES[-1] * 2**0.5])
    times = np.append(steps[starts], steps[-1] + 1)
    usual = 1.25 * float(np.median(shares.max(-1))) or 1.0
    mesh = axis.pcolormesh(times, edges, shares.T, cmap="Blues", vmin=0.0, vmax=usual, rasterized=True)
    axis.figure.colorbar(mesh, ax=axis, extend="max", label="share of coordinates with v > 0")
    for level, label in ((0, "5 and 95 %"), (4, None)):
        axis.plot(steps, seen.snr_quantiles[:, level], ":", color="0.25", lw=1.2, label=label)
    _lines(axis, history, {"median": seen.snr_quantiles[:, 2], "mean": seen.snr_mean}, ("C3", "k"))
    axis.set(yscale="log", ylim=(edges[0], edges[-1]))


def _step_panel(axis: "Axes", history: Diagnostics, seen: Measurements) -> None:
    _lines(axis, history, {"largest": seen.step_max, "root mean square": seen.step_rms}, ("C3", "C0"))
    bounds = {
        "α": history.learning_rate,
        "the paper's bound, after zeros": history.bound,
        "most that any gradients give": history.supremum,
    }
    for (name, value), style in zip(bounds.items(), (":", "--", "-."), strict=True):
        if np.isfinite(value).all():
            axis.plot(history.count, value, linestyle=style, color="0.4", lw=1, label=name)
    _log_scale(axis)


def _norm_panel(axis: "Axes", history: Diagnostics, seen: Measurements) -> None:
    names = {"m̂": "mu_norm", "√v̂": "nu_norm", "gradient": "gradient_norm", "params": "param_norm", "update": "update_norm"}
    _lines(axis, history, {label: getattr(seen, name) for label, name in names.items()})
    _log_scale(axis)


def _cosine_panel(axis: "Axes", history: Diagnostics, seen: Measurements) -> None:
    axis.set(ylim=(-1.05, 1.05))
    axis.axhline(0.0, color="0.4", lw=0.8)
    _lines(axis, history, {"cosine of m̂ and the gradient": seen.cosine}, missing="gradients")


def _ratio_panel(axis: "Axes", history: Diagnostics, seen: Measurements) -> None:
    _lines(axis, history, {"‖Δ‖ / ‖θ‖": seen.update_ratio}, missing="params")
    _log_scale(axis)


def _share_panel(axis: "Axes", history: Diagnostics, seen: Measurements) -> None:
    """What coincides, as no gradient and a root below epsilon often do, is told apart by width and dashes."""
    axis.fill_between(history.count, 0.0, 100 * seen.dead, color="0.8", lw=0, label="v = 0: no gradient yet")
    shares = {"√v̂ < ε": seen.eps_dominated, "|Δ| ≥ .99 α": seen.at_alpha, "|Δ| ≥ .99 of the paper's bound": seen.at_bound}
    _lines(axis, history, {name: 100 * share for name, share in shares.items()})
    usual = 100 * max(float(np.quantile(share, 0.98)) for share in (seen.dead, *shares.values()))  # not the first steps
    axis.set(ylim=(0.0, max(1.0, 1.15 * usual)), ylabel="%")


def _lines(
    axis: "Axes",
    history: Diagnostics,
    lines: dict[str, jax.Array | None],
    colours: Sequence[str] = ("C0", "C1", "C2", "C3", "C4"),
    missing: str = "",
) -> None:
    for (label, values), colour, style in zip(lines.items(), colours, _STYLES, strict=False):
        if values is not None:
            axis.plot(history.count, values, color=colour, linestyle=style, label=label, lw=1.4)
        elif missing:
            axis.text(0.5, 0.5, f"give {missing} to watch", transform=axis.transAxes, ha="center", color="0.4")


def _log_scale(axis: "Axes") -> None:
    """A logarithmic scale, unless everything is zero: before the first step, or without a gradient."""
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axis.get_lines()):
        axis.set_yscale("log")


def _legend(axis: "Axes") -> int:
    """A legend above the panel, where it lies on no curve; how many rows it takes."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) > 14 else 5
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.2}
    axis.legend(handles, labels, ncols=columns, fontsize=8, frameon=False, columnspacing=1.2, handlelength=2.6, **place)
    return -(-len(labels) // columns)
