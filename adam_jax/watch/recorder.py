"""Diagnostics on a screen and in files: what a person sees of `watch_adam` during training.

The packages that draw and write are optional, `pip install "adam_jax[watch]"`, and imported when they are first needed.
"""

import contextlib
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self, SupportsFloat

import jax

from adam_jax import checks
from adam_jax.watch.diagnostics import Diagnostics, Measurements
from adam_jax.watch.files import CsvFile, Events, ParquetFile, Record, Row, Sink, Table

_SCALARS = ("count", "mu_weight", "nu_weight", "learning_rate", "bound", "supremum", "skipped")
_LEVELS = ("05", "25", "50", "75", "95")


def record(diagnostics: Diagnostics, *, leaves: bool = False) -> dict[str, float]:
    """Diagnostics as named numbers, in the order of their fields; copies them to the host.

    Args:
        diagnostics: of one step, not a history.
        leaves: also those of each leaf, named "path/measurement".

    Returns:
        Python floats by name, quantiles as `snr_q05` to `snr_q95`, histograms left out.

    Raises:
        ValueError: for a history.

    Example:
        >>> import adam_jax
        >>> from adam_jax.watch import watch_adam
        >>> state = adam_jax.adam().init(jnp.ones(3))
        >>> record(watch_adam()(state))["dead"]
        1.0
    """
    host = jax.device_get(diagnostics)
    if jax.numpy.ndim(host.count):
        raise ValueError(f"diagnostics must be those of one step, got a history of {len(host.count)}: record one at a time")
    row = {name: float(value) for name in _SCALARS if (value := getattr(host, name)) is not None}
    row |= _numbers(host.overall)
    if leaves:
        row |= {f"{path}/{name}": x for path, leaf in host.leaves.items() for name, x in _numbers(leaf).items()}
    return row


def _numbers(measured: Measurements) -> Row:
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
    `due(step)` first. Close it, or use it in a `with`: Parquet is written then; CSV is complete after every record.

    A run that is resumed goes on in its files: rows before its first step stay, those from there on are recorded anew. A run
    that begins where another began is refused.

    Args:
        every: record at step 0 and every so many steps.
        table: a Rich table of the last five records, on the terminal; elsewhere, once at the end.
        csv: a file to write, one that is not there or that a recorder wrote.
        parquet: a file to write when closed, likewise.
        tensorboard: a folder for event files; SNR histograms too.
        leaves: also record each leaf.

    Attributes:
        rows: what was recorded, as a list of dictionaries.

    Raises:
        ValueError: for `every` below 1.
        FileExistsError: for a file that no recorder wrote, or that another one is writing.
        OSError: for a file or folder that cannot be written.
        ImportError: where a package is missing, naming what to install.

    Example:
        >>> import adam_jax
        >>> from adam_jax.watch import watch_adam
        >>> tx, watch = adam_jax.adam(), watch_adam()
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
        self.every = checks.whole("every", every, 1)
        self.leaves = checks.flag("leaves", leaves)
        self.rows: list[Row] = []
        self._sinks: list[Sink] = []
        is_shown = checks.flag("table", table)
        with contextlib.ExitStack() as opened:
            for kind, path in ((CsvFile, csv), (ParquetFile, parquet), (Events, tensorboard)):
                if path is not None:
                    self._sinks.append(opened.enter_context(contextlib.closing(kind(Path(path)))))
            if is_shown:
                self._sinks.append(opened.enter_context(contextlib.closing(Table())))
            self._opened: contextlib.ExitStack | None = opened.pop_all()

    def due(self, step: int) -> bool:
        """Whether a call at this step would record."""
        return checks.whole("step", step, 0, 2**63 - 1) % self.every == 0

    def __call__(self, step: int, diagnostics: Diagnostics, **scalars: SupportsFloat) -> None:
        """Record, if it is due.

        Args:
            step: the number of the step, larger at each record.
            diagnostics: what `watch_adam` returned.
            scalars: more numbers to write beside them, such as the loss; the same at every step.

        Raises:
            ValueError: for a step that is not larger than the last one recorded, for other scalars than at the first step
                or scalars named as the diagnostics are, and after `close`.
            TypeError: for a step that is no integer, or a scalar that is no number: neither may be traced.
        """
        if self._opened is None:
            raise ValueError("this Recorder was closed and records no more: make another, which goes on in its files")
        if not self.due(step):
            return
        step = int(step)
        more = {name: _number(name, value) for name, value in scalars.items()}
        measured = {"step": step, **record(diagnostics, leaves=self.leaves)}
        if taken := more.keys() & measured.keys():
            raise ValueError(f"scalars must have names that the diagnostics do not have, got {sorted(taken)}")
        row = {"step": step, **more, **measured}
        if self.rows and row.keys() != self.rows[0].keys():
            changed = sorted(row.keys() ^ self.rows[0].keys())
            raise ValueError(f"scalars must be the same at every step, got {changed} at some only")
        if self.rows and step <= self.rows[-1]["step"]:
            raise ValueError(f"step must be larger than the last one recorded, {self.rows[-1]['step']}, got {step}")
        for sink in self._sinks:
            sink.write(Record(row, list(more), diagnostics))
        self.rows.append(row)

    def close(self) -> None:
        """Complete and close the files, and leave the table as it is; once more does nothing."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _number(name: str, value: SupportsFloat) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number, known when it is recorded, got {value!r}")
