"""Drawing: panels like the paper's, one colour an optimizer, a band over the seeds."""

import io
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adam_jax.paper.results import Panel, Result

__all__ = ["draw", "save"]


def draw(result: Result) -> Figure:
    """A Matplotlib figure of all panels; it belongs to no window.

    Example:
        >>> draw(Result("t", [Panel("p", "x", "y", [])], [], [], {})).get_suptitle()
        't'
    """
    columns = min(result.columns, max(len(result.panels), 1))
    rows = -(-len(result.panels) // columns) or 1
    width, height = (3.4, 2.3) if result.shared else (5.2, 3.9)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.9), layout="constrained")
    figure.suptitle(f"\n{result.title}" if result.shared else result.title)  # a line for the legend
    axes = np.atleast_1d(figure.subplots(rows, columns, sharex=result.shared, sharey=result.shared)).ravel()
    for axis, panel in zip(axes, result.panels, strict=False):
        _panel(axis, panel)
        if result.shared:
            axis.label_outer()
        elif panel.curves:
            axis.legend(fontsize=8, framealpha=0.9)
    for axis in axes[len(result.panels) :]:
        axis.set_axis_off()
    if result.shared and result.panels:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9, frameon=False, borderpad=0
        )
    if result.caption:
        figure.supxlabel(textwrap.fill(result.caption, round(18 * width * columns)), fontsize=7, color="0.35")
    return figure


def save(result: Result, file: io.BytesIO, dpi: int = 120) -> None:
    """Draw a result and write it as PNG with that many dots an inch.

    Example:
        >>> file = io.BytesIO()
        >>> save(Result("t", [], [], [], {}), file)
        >>> file.getvalue()[1:4]
        b'PNG'
    """
    draw(result).savefig(file, format="png", dpi=dpi)


def _panel(axis: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        finite = np.where(np.isfinite(curve.y), curve.y, np.nan)
        style: dict[str, Any] = {"color": curve.colour, "label": curve.label, "lw": 1.4}
        if curve.x.size < 12:  # few points: rings over dots, so that curves that lie on one another are both seen
            style |= {"marker": "o", "ms": 6 if curve.dashed else 3, "mfc": "none" if curve.dashed else curve.colour}
        axis.plot(curve.x, finite.mean(0), "--" if curve.dashed else "-", zorder=3 if curve.dashed else 2, **style)
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
