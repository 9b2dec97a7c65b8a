"""Where records go: CSV and Parquet files, with which a resumed run goes on, event files of TensorBoard, and a table.

A file is held by one recorder at a time. Steps grow within a file, so a run that is resumed at some step goes on behind the
rows before it; the rows from there on are recorded anew.
"""

import collections
import csv
import errno
import importlib
import io
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from adam_jax.watch.diagnostics import Diagnostics
from adam_jax.watch.extras import imported
from adam_jax.watch.sums import SNR_EDGES

_SHOWN = ("snr_mean", "step_rms", "step_max", "at_alpha", "eps_dominated", "dead", "nonfinite", "cosine", "update_ratio")

Row = dict[str, float]


class Record(NamedTuple):
    """What is recorded at one step."""

    row: Row  # of the same columns each time, the first one the step
    own: list[str]  # columns of the user's
    diagnostics: Diagnostics


class Sink(Protocol):
    """Takes one record after the other until it is closed."""

    def write(self, record: Record) -> None:
        """Take a record."""
        ...

    def close(self) -> None:
        """Complete what was written."""
        ...


class CsvFile:
    """A CSV file that is complete after every record; after a full disk, up to the record before."""

    def __init__(self, path: Path):
        self._path = path
        self._file = _claimed("csv", path)
        self._begun = False
        header = self._file.readline()
        if header and not header.startswith((b"step,", b"step\n", b"step\r")):
            self._file.close()
            raise _foreign("csv", path)

    def write(self, record: Record) -> None:
        """Write a row, or nothing and raise."""
        row = record.row
        lines = [] if self._begun or self._resumed(row) else [_line(list(row))]
        self._begun = True
        data = b"".join([*lines, _line(list(row.values()))])
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "csv could not be written", str(self._path))
        except OSError:
            self._file.truncate(end)
            self._begun = end > 0
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _resumed(self, row: Row) -> bool:
        """Whether rows of the same columns are there already, once those from this step on are cut off."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # half written
        if lines:
            columns, *rows = csv.reader(line.decode(errors="replace") for line in lines)
            numbers = [_step_of(old, columns, self._path, i + 2) for i, old in enumerate(rows)]
            kept = _kept("csv", self._path, columns, numbers, row)
            lines = lines[: 1 + kept]
        self._file.truncate(sum(map(len, lines)))
        return bool(lines)


class ParquetFile:
    """A Parquet file, written when it is closed, in one go."""

    def __init__(self, path: Path):
        self._path, self._rows = path, []
        self._parquet = imported("pyarrow.parquet")
        self._file = _claimed("parquet", path)
        self._old = []
        if os.fstat(self._file.fileno()).st_size:
            try:
                table = self._parquet.read_table(path)
            except (OSError, ValueError):
                table = None
            if table is None or table.column_names[:1] not in ([], ["step"]):
                self._file.close()
                raise _foreign("parquet", path)
            self._old = table.to_pylist()

    def write(self, record: Record) -> None:
        """Keep a row."""
        row = record.row
        if not self._rows and self._old:
            kept = _kept("parquet", self._path, list(self._old[0]), [old["step"] for old in self._old], row)
            self._old = self._old[:kept]
        self._rows.append(row)

    def close(self) -> None:
        """Write all rows."""
        part = self._path.with_name(f"{self._path.name}.part")
        try:
            if self._rows or not self._old:
                self._parquet.write_table(imported("pyarrow").Table.from_pylist(self._old + self._rows), part)
                part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)
            self._file.close()


class Events:
    """Event files for TensorBoard, which no longer shows what an earlier run wrote from the first step on."""

    def __init__(self, folder: Path):
        self._writer = None
        self._make = imported("tensorboardX").SummaryWriter
        self._folder = folder
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "tensorboard must be a folder", str(folder))

    def write(self, record: Record) -> None:
        """Add the numbers and the histogram."""
        step = record.row["step"]
        if self._writer is None:
            suffix = f".{time.time_ns()}"  # without it, a run begun in the same second would write over this one
            self._writer = self._make(str(self._folder), purge_step=step or None, filename_suffix=suffix)
        for name, value in record.row.items():
            if name != "step":
                self._writer.add_scalar(f"adam/{name}", value, step)
        counts = np.asarray(record.diagnostics.overall.snr_histogram, np.float64)
        edges = np.append(SNR_EDGES, SNR_EDGES[-1] * 2**0.5)  # the upper edge of each bin
        middle = edges / 2**0.25
        sums = {"num": float(counts.sum()), "sum": float(counts @ middle), "sum_squares": float(counts @ middle**2)}
        bins = {"bucket_limits": edges.tolist(), "bucket_counts": counts.tolist()}
        self._writer.add_histogram_raw("adam/snr", min=0.0, max=float(edges[-1]), **sums, **bins, global_step=step)

    def close(self) -> None:
        """Complete the event file."""
        if self._writer is not None:
            self._writer.close()


class Table:
    """The last five records on the terminal; where there is none, once at the end."""

    def __init__(self) -> None:
        self._records: collections.deque[Record] = collections.deque(maxlen=5)
        self._table = imported("rich.table").Table
        self._console = imported("rich").get_console()
        is_live = self._console.is_interactive or self._console.is_jupyter
        self._live = imported("rich.live").Live(console=self._console, auto_refresh=False) if is_live else None
        if self._live:
            self._live.start()

    def write(self, record: Record) -> None:
        """Show the record."""
        self._records.append(record)
        if self._live:
            self._live.update(self._drawn(), refresh=True)

    def close(self) -> None:
        """Leave the table as it is."""
        if self._live:
            self._live.stop()
        elif self._records:
            self._console.print(self._drawn())

    def _drawn(self) -> Any:
        rows = [record.row for record in self._records]
        table = self._table("step", *(str(row["step"]) for row in rows), title="Adam")
        for name in (*self._records[-1].own, *(name for name in _SHOWN if name in rows[-1])):
            table.add_row(name, *(f"{row[name]:.4g}" for row in rows))
        return table


def _claimed(name: str, path: Path) -> BinaryIO:
    """A file, made if need be, open to read and write, that no other recorder writes."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise type(error)(
            error.errno, f"{name} must name a file that can be written: {error.strerror}", str(path)
        ) from error
    if not _is_free(file):
        file.close()
        raise FileExistsError(errno.EEXIST, f"{name} must name a file that no other Recorder is writing", str(path))
    return file


def _is_free(file: BinaryIO) -> bool:
    """Whether a file can be held by this process until it is closed; yes where there are no locks."""
    try:
        locks = importlib.import_module("fcntl")
        locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _foreign(name: str, path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"{name} must name a file that a Recorder wrote, or none that is there", str(path))


def _kept(name: str, path: Path, columns: list[str], steps: list[int], row: Row) -> int:
    """How many of the rows that are there stay: those before the step of the first new row."""
    if columns != list(row):
        changed = sorted({*columns} ^ row.keys()) or "their order"
        raise ValueError(f"{name} must have the columns recorded now, but {path} differs in {changed}: name another file")
    kept = sum(step < row["step"] for step in steps)
    if steps and not kept:
        raise FileExistsError(errno.EEXIST, f"{name} must not hold another run, from step {steps[0]} on", str(path))
    return kept


def _step_of(row: list[str], columns: list[str], path: Path, number: int) -> int:
    if len(row) == len(columns) and row[0].isdecimal():
        return int(row[0])
    raise ValueError(f"csv must hold records only, but line {number} of {path} is none: name another file")


def _line(values: list[Any]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue().encode()
