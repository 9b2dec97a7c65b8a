"""Drawing: panels like the paper's, one colour an optimizer, a band over the seeds."""

import io
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adam_jax.paper.results import Panel, Result

__all__ = ["draw", "save"]


def draw(result: Result) -> Figure:
    """A Matplotlib figure of all panels.

    Args:
        result: what to draw.

    Returns:
        The figure; it belongs to no window.

    Example:
        >>> draw(Result("t", [Panel("p", "x", "y", [])], [], [], {})).get_suptitle()
        't'
    """
    columns = min(result.columns, max(len(result.panels), 1))
    rows = -(-len(result.panels) // columns) or 1
    figure = Figure(figsize=(5.2 * columns + 0.4, 3.9 * rows + 0.9), layout="constrained")
    figure.suptitle(result.title)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis, panel in zip(axes, result.panels, strict=False):
        _panel(axis, panel)
    for axis in axes[len(result.panels) :]:
        axis.set_axis_off()
    if result.caption:
        figure.supxlabel(textwrap.fill(result.caption, 95 * columns), fontsize=7, color="0.35")
    return figure


def save(result: Result, file: io.BytesIO, dpi: int = 120) -> None:
    """Draw a result and write it as PNG.

    Args:
        result: what to draw.
        file: where to.
        dpi: dots an inch.

    Example:
        >>> file = io.BytesIO()
        >>> save(Result("t", [], [], [], {}), file)
        >>> file.getvalue()[1:4]
        b'PNG'
    """
    draw(result).savefig(file, format="png", dpi=dpi)


def _panel(axis: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        style = "--" if curve.dashed else "-"
        finite = np.where(np.isfinite(curve.y), curve.y, np.nan)
        marker = "o" if curve.x.size < 12 else None
        axis.plot(
            curve.x,
            finite.mean(0),
            style,
            color=curve.colour,
            label=curve.label,
            lw=1.4,
            marker=marker,
            ms=3,
            zorder=3 if curve.dashed else 2,
        )  # dashes over a line leave both to be seen
        if len(curve.y) > 1:
            axis.fill_between(curve.x, finite.min(0), finite.max(0), color=curve.colour, alpha=0.18, lw=0)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.logarithmic:
        axis.set_yscale("log")
    if panel.limits:
        low, high = panel.limits  # the paper's, with room for curves that fall below
        means = [np.where(np.isfinite(curve.y), curve.y, np.inf).mean(0).min(initial=np.inf) for curve in panel.curves]
        axis.set_ylim(min([low, *(0.9 * mean for mean in means)]), high)
    axis.grid(alpha=0.25)
    if panel.curves:
        axis.legend(fontsize=8, framealpha=0.9)
