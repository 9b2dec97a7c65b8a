"""Diagnostics on a screen, in files and in pictures: what a person sees of `watch_adam` during training and after.

The packages that draw and write are optional, `pip install "adam_jax[watch]"`, and imported when they are first needed.
"""

import csv
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from adam_jax.watch.extras import imported
from adam_jax.watch.sums import SNR_EDGES

__all__ = ["Recorder", "record"]

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
            imported("pyarrow.parquet")
            if Path(parquet).exists():
                raise FileExistsError(f"parquet must name a file that does not exist, got {parquet}")
        self._parquet = parquet
        self._events = None if tensorboard is None else imported("tensorboardX").SummaryWriter(str(tensorboard))
        self._csv = None if csv is None else Path(csv)
        if self._csv:
            self._csv.touch(exist_ok=False)
        self._live = imported("rich.live").Live(auto_refresh=False) if table else None
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
            table = imported("pyarrow").Table.from_pylist(self.rows)
            imported("pyarrow.parquet").write_table(table, self._parquet)
            self._parquet = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _table(self, more: list[str]) -> Any:
        shown = [name for name in (*more, *_SHOWN) if name in self.rows[-1]]
        rows = self.rows[-5:]
        table = imported("rich.table").Table("step", *(f"{row['step']:g}" for row in rows), title="Adam")
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
