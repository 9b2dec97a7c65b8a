"""Work that took time: whole or not there at all, known again by its settings and data, and never deleted unasked."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adam_jax.paper.formats import DataError

__all__ = ["Store", "aside", "clear", "digest", "fingerprint", "folder", "locked", "write"]

FORMAT = 2  # of unfinished work and of records; what another version wrote is other work
HEADER = re.compile(rb"adam_jax unfinished work (\d{1,6}) ([0-9a-f]{64}) (\d{1,9}) ([0-9a-f]{64})\n")
ASIDE = re.compile(r"-old\d+$")

if sys.platform == "win32":
    import msvcrt

    def _take(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digest(settings: Any) -> str:
    """What tells settings apart, of whatever JSON can hold."""
    return hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode()).hexdigest()


def fingerprint(x: np.ndarray, y: np.ndarray) -> str:
    """What tells data sets apart: every number of them."""
    found = hashlib.sha256(repr((x.shape, x.dtype, y.shape, y.dtype)).encode())
    for array in (x, y):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def write(path: Path, *parts: bytes) -> Path:
    """Write a file beside its place, then put it there: it appears whole or not at all, and no link is followed."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:
            file.writelines(parts)
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def aside(*paths: Path) -> list[Path]:
    """Give old work a name with the first free number and return the new names; what cannot be moved is an error."""
    for number in itertools.count(1):
        targets = [path.with_name(f"{path.stem}-old{number}{path.suffix}") for path in paths]
        if not any(map(os.path.lexists, targets)):
            for path, target in zip(paths, targets, strict=True):
                path.rename(target)
            return targets
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def locked(out: Path, name: str) -> Iterator[int]:
    """Keep other runs of that figure out of a folder; yields who owns files made there. The lock dies with the process."""
    path = out / f".{name}.lock"
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _take(file)
            if os.path.samestat(os.fstat(file), path.lstat()):  # another run has not unlinked it in between
                break
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise OSError(error.errno, error.strerror, str(path)) from None
            raise DataError(f"another run is making {name} in {out}: wait for it, or give another --out") from None
        os.close(file)
    try:
        yield os.fstat(file).st_uid
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)


def folder(path: Path, owner: int) -> Path:
    """That folder, made where it is absent; a link, or what belongs to someone else, is refused."""
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path} must be a folder of unfinished work and is a link or a file: move it away")
    if found.st_uid != owner:
        raise DataError(f"{path} belongs to another user, so its unfinished work is not used: give another --out")
    return path


def clear(path: Path) -> None:
    """Remove unfinished work that has become a figure; what was put aside stays."""
    for file in path.glob("*.work"):
        if not ASIDE.search(file.stem):
            file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


class Store:
    """Unfinished work of one job: a line that says what it is, then costs, seconds and leaves as they lie in memory.

    Settings and the leaves' shapes and dtypes give the file's length, so that nothing in it is believed about sizes.
    """

    def __init__(
        self, path: Path, settings: Any, like: Sequence[Any], shape: tuple[int, int], points: int, say: Callable[[str], None]
    ) -> None:
        self.path, self.shape, self.points, self.say = path, shape, points, say
        self.like = [(leaf.shape, np.dtype(leaf.dtype)) for leaf in like]
        self.mark = digest([settings, repr(self.like), shape, points])

    def load(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]] | None:
        """Costs [points, ...], seconds [points] and leaves (none of finished work), or None where nothing was done."""
        if self.path.is_symlink():
            raise DataError(f"{self.path} is a link, so its unfinished work is not used: move it away")
        if not self.path.exists():
            return None
        try:
            return self._read()
        except ValueError as error:
            moved = aside(self.path)[0]
            self.say(f"{self.path.name} {error}: that part is done again, and the file is kept as {moved}")
            return None

    def _read(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        found = self.path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > 1000 + self._length(self.points, True):
            raise ValueError("is not what was saved")
        raw = self.path.read_bytes()
        header = HEADER.match(raw)
        if not header or int(header[1]) != FORMAT:
            raise ValueError("is damaged or of another version")
        if header[2].decode() != self.mark:
            raise ValueError("belongs to other settings, data or versions")
        points, content = int(header[3]), memoryview(raw)[header.end() :]
        finished = points == self.points
        if not 0 < points <= self.points or len(content) != self._length(points, not finished):
            raise ValueError("is shorter or longer than it says")
        if hashlib.sha256(content).hexdigest() != header[4].decode():
            raise ValueError("is damaged")
        arrays, at = [], 0
        parts = [((points, *self.shape), np.dtype(np.float32)), ((points,), np.dtype(np.float64))]
        for shape, dtype in parts + ([] if finished else self.like):
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            arrays.append(np.frombuffer(content[at : at + size], dtype).reshape(shape))
            at += size
        costs, seconds, *leaves = arrays
        if not (np.isfinite(seconds) & (seconds >= 0)).all():
            raise ValueError("holds times that cannot be")
        return costs, seconds, leaves

    def _length(self, points: int, with_leaves: bool) -> int:
        leaves = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self.like)
        return points * (4 * self.shape[0] * self.shape[1] + 8) + with_leaves * leaves

    def save(self, costs: Sequence[np.ndarray], seconds: Sequence[float], leaves: Sequence[Any]) -> None:
        """Replace the file as a whole; finished work leaves its leaves out."""
        kept = [] if len(costs) == self.points else leaves
        arrays = [np.asarray(costs, np.float32), np.asarray(seconds, np.float64), *map(np.asarray, kept)]
        parts = [array.tobytes() for array in arrays]
        found = hashlib.sha256()
        for part in parts:
            found.update(part)
        header = f"adam_jax unfinished work {FORMAT} {self.mark} {len(costs)} {found.hexdigest()}\n"
        write(self.path, header.encode(), *parts)
