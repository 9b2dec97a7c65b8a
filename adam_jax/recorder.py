"""Diagnostics on a screen, in files and in pictures: what a person sees of `watch_adam` during training and after.

The packages that draw and write are optional, `pip install "adam_jax[watch]"`, and imported when they are first needed.
"""

import csv
import importlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from adam_jax.leafsums import SNR_EDGES

__all__ = ["Recorder", "plot_history", "record"]

_SHOWN = ("snr_mean", "step_rms", "step_max", "at_alpha", "eps_dominated", "dead", "nonfinite", "cosine", "update_ratio")
_LEVELS = ("05", "25", "50", "75", "95")


def record(diagnostics: Any, *, leaves: bool = False) -> dict[str, float]:
    """Diagnostics as named numbers, in the order of their fields; copies them to the host.

    Args:
        diagnostics: one `Diagnostics`, not a history.
        leaves: also those of each leaf, named "path/measurement".

    Returns:
        Python floats by name, quantiles as `snr_q05` to `snr_q95`, histograms left out.

    Example:
        >>> import adam_jax
        >>> state = adam_jax.adam().init(jnp.ones(3))
        >>> record(adam_jax.watch_adam("square")(state))["dead"]
        1.0
    """
    host = jax.device_get(diagnostics)
    scalars = ("count", "mu_weight", "nu_weight", "learning_rate", "bound", "supremum", "skipped")
    row = {name: float(value) for name in scalars if (value := getattr(host, name)) is not None}
    row |= _numbers(host.overall)
    if leaves:
        row |= {f"{path}/{name}": x for path, leaf in host.leaves.items() for name, x in _numbers(leaf).items()}
    return row


def _numbers(measured: Any) -> dict[str, float]:
    found = {}
    for name, value in measured._asdict().items():
        if name == "snr_quantiles":
            found |= {f"snr_q{level}": float(x) for level, x in zip(_LEVELS, value, strict=True)}
        elif value is not None and name != "snr_histogram":
            found[name] = float(value)
    return found


class Recorder:
    """Write diagnostics every so many steps: to a live table, CSV, Parquet, TensorBoard, or none of them.

    Call it at every step; between records it does nothing and does not wait for the device. To save the measuring too, ask
    `due(step)` first. Close it, or use it in a `with`, so that files are complete; CSV is complete after every record.

    Args:
        every: record at step 0 and every so many steps.
        table: a Rich table of the last five records, on the terminal.
        csv: a file to write, which must not exist.
        parquet: a file to write when closed, which must not exist.
        tensorboard: a folder for event files; SNR histograms too.
        leaves: also record each leaf.

    Raises:
        ValueError: for `every` below 1.
        FileExistsError: for a file that is there.
        ImportError: where a package is missing, naming what to install.

    Example:
        >>> import adam_jax
        >>> tx, watch = adam_jax.adam(), adam_jax.watch_adam("square")
        >>> state = tx.init(jnp.ones(3))
        >>> with Recorder(every=10) as recorder:
        ...     for step in range(30):
        ...         if recorder.due(step):
        ...             recorder(step, watch(state), loss=0.5)
        >>> [row["step"] for row in recorder.rows]
        [0, 10, 20]
    """

    def __init__(
        self,
        every: int = 100,
        *,
        table: bool = False,
        csv: str | PathLike[str] | None = None,
        parquet: str | PathLike[str] | None = None,
        tensorboard: str | PathLike[str] | None = None,
        leaves: bool = False,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self.leaves = leaves
        self.rows: list[dict[str, float]] = []
        if parquet is not None:
            _import("pyarrow.parquet")
            if Path(parquet).exists():
                raise FileExistsError(f"parquet must name a file that does not exist, got {parquet}")
        self._parquet = parquet
        self._events = None if tensorboard is None else _import("tensorboardX").SummaryWriter(str(tensorboard))
        self._csv = None if csv is None else Path(csv)
        if self._csv:
            self._csv.touch(exist_ok=False)
        self._live = _import("rich.live").Live(auto_refresh=False) if table else None
        if self._live:
            self._live.start()

    def due(self, step: int) -> bool:
        """Whether a call at this step would record."""
        return step % self.every == 0

    def __call__(self, step: int, diagnostics: Any, **scalars: Any) -> None:
        """Record, if it is due.

        Args:
            step: the number of the step.
            diagnostics: what `watch_adam` returned.
            scalars: more numbers to write beside them, such as the loss; the same at every step.

        Raises:
            ValueError: for other scalars than at the first step.
        """
        if not self.due(step):
            return
        more = {name: float(value) for name, value in scalars.items()}
        row = {"step": step, **more, **record(diagnostics, leaves=self.leaves)}
        if self.rows and row.keys() != self.rows[0].keys():
            changed = sorted(row.keys() ^ self.rows[0].keys())
            raise ValueError(f"scalars must be the same at every step, got {changed} at some only")
        self.rows.append(row)
        if self._csv:
            with self._csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                if len(self.rows) == 1:
                    writer.writeheader()
                writer.writerow(row)
        if self._events:
            _write_events(self._events, step, row, diagnostics)
        if self._live:
            self._live.update(self._table(list(more)), refresh=True)

    def close(self) -> None:
        """Complete and close the files, and leave the table as it is."""
        if self._live:
            self._live.stop()
        if self._events:
            self._events.close()
        if self._parquet is not None:
            table = _import("pyarrow").Table.from_pylist(self.rows)
            _import("pyarrow.parquet").write_table(table, self._parquet)
            self._parquet = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _table(self, more: list[str]) -> Any:
        shown = [name for name in (*more, *_SHOWN) if name in self.rows[-1]]
        rows = self.rows[-5:]
        table = _import("rich.table").Table("step", *(f"{row['step']:g}" for row in rows), title="Adam")
        for name in shown:
            table.add_row(name, *(f"{row[name]:.4g}" for row in rows))
        return table


def _write_events(events: Any, step: int, row: dict[str, float], diagnostics: Any) -> None:
    for name, value in row.items():
        if name != "step":
            events.add_scalar(f"adam/{name}", value, step)
    counts = np.asarray(diagnostics.overall.snr_histogram, np.float64)
    edges = np.append(SNR_EDGES, SNR_EDGES[-1] * 2**0.5)  # the upper edge of each bin
    middle = edges / 2**0.25
    events.add_histogram_raw(
        "adam/snr", min=0.0, max=float(edges[-1]), num=float(counts.sum()), sum=float(counts @ middle),
        sum_squares=float(counts @ middle**2), bucket_limits=edges.tolist(), bucket_counts=counts.tolist(),
        global_step=step,
    )  # fmt: skip


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
    figure_module = _import("matplotlib.figure")
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


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f'{package} is needed here: pip install "adam_jax[watch]"', name=package) from error
