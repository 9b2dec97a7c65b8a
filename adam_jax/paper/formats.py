"""Reading the files in which the data sets come: IDX, reviews as text, archives. What is damaged is said so.

No size in a file is believed before it is known that the file can hold it, and nothing is read that is larger than the data
sets are: memory is bounded by what a file may honestly ask for.
"""

import collections
import contextlib
import csv
import gzip
import itertools
import math
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

__all__ = ["DataError", "bag_of_words", "members", "read_idx", "read_review_archive", "read_review_table", "readable"]

LARGEST = 2**29  # bytes of a file, as it lies there; CIFAR-10's archive has 170 million
LARGEST_ARRAY = 2**30  # bytes of an array; IMDB's bags of words have 250 million
LARGEST_MEMBER = 2**26  # bytes of one file in an archive; a batch of CIFAR-10 has 31 million
MOST_REVIEWS, MOST_DIMENSIONS = 100_000, 8
DEFLATE = 1032  # gzip makes a file at most that many times smaller


class DataError(Exception):
    """Data that is absent, damaged or not what it is called; the message is one line that says what to do."""


@contextlib.contextmanager
def readable(path: Path, advice: str = "fetch it again") -> Iterator[None]:
    """Whatever goes wrong with a file inside is a DataError that names it: zip, tar, pickle and numpy raise their own."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path} cannot be read ({reason}): {advice}") from None


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes from an IDX file, the format of MNIST, raw or compressed with gzip.

    Args:
        path: the file; it is taken for gzip by its first bytes, not by its name.

    Returns:
        A uint8 array with the file's shape.

    Raises:
        DataError: for a file that cannot be read, is not IDX, or is shorter or longer than its header says.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "labels")
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        >>> read_idx(path)
        array([7, 9], dtype=uint8)
    """
    with readable(path), path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        start = file.read(4)
        if start[:3] != b"\x00\x00\x08" or len(start) < 4:
            raise DataError(f"{path} is not an IDX file of bytes: it must begin with 00 00 08, got {start[:3].hex(' ')!r}")
        if not 0 < start[3] <= MOST_DIMENSIONS:
            raise DataError(f"{path} must have 1 to {MOST_DIMENSIONS} dimensions, got {start[3]}: it is damaged")
        sizes = file.read(4 * start[3])
        shape = tuple(int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4))
        count, held = math.prod(shape), path.stat().st_size * (DEFLATE if packed else 1)
        if not 0 < count <= min(held, LARGEST_ARRAY):
            raise DataError(
                f"{path} cannot hold the shape {shape} that it claims: it is truncated or damaged, fetch it again"
            )
        content = file.read(count + 1)
        if len(content) != count or len(sizes) != 4 * start[3]:
            found = f"{len(content):,}" if len(content) <= count else "more"
            raise DataError(
                f"{path} must hold {count:,} bytes for shape {shape}, got {found}: "
                "it is truncated or damaged, fetch it again"
            )
        return np.frombuffer(content, np.uint8).reshape(shape)


def read_review_table(path: Path) -> tuple[list[str], np.ndarray]:
    r"""The IMDB reviews and their labels from a CSV with the columns `text`, `label` and `source`.

    Args:
        path: the file, UTF-8. Rows whose source is not "imdb" are left out; a label of 1 is a positive review.

    Returns:
        The texts, and int32 labels [n], 0 or 1.

    Raises:
        DataError: for a file that cannot be read, lacks a column or has another label.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "reviews.csv")
        >>> _ = path.write_text("text,label,source\ngood,1,imdb\nbad,0,imdb\n")
        >>> read_review_table(path)
        (['good', 'bad'], array([1, 0], dtype=int32))
    """
    texts, labels = [], []
    with readable(path, "it must be a table of text, label 0 or 1 and source"):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row or None in row.values():
                    raise ValueError(f"row {len(texts) + 1} has more or fewer columns than the first line")
                if row["source"] == "imdb":
                    texts.append(row["text"])
                    labels.append({"0": 0, "1": 1}[row["label"]])
                    _bounded(len(texts))
        if not texts:
            raise ValueError("it holds no reviews from imdb")
    return texts, np.asarray(labels, np.int32)


def read_review_archive(path: Path, half: str) -> tuple[list[str], np.ndarray]:
    """Reviews and labels from aclImdb_v1.tar.gz, read from the archive without unpacking it.

    Args:
        path: the archive.
        half: "train" or "test".

    Returns:
        The texts, and int32 labels [n], 0 or 1.

    Raises:
        DataError: for an archive that cannot be read or holds no reviews.
    """
    texts, labels = [], []
    pattern = re.compile(rf"(?:\./)?aclImdb/{half}/(pos|neg)/[^/]+\.txt")
    with readable(path):
        for match, content in members(path, pattern):
            texts.append(content.decode("utf-8"))
            labels.append(int(match[1] == "pos"))
            _bounded(len(texts))
        if not texts:
            raise ValueError(f"it holds no reviews under aclImdb/{half}")
    return texts, np.asarray(labels, np.int32)


class _Unpacked(gzip.GzipFile):
    """What is in a gzip file, of which `tarfile` may not ask more at a time than a member can be long."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_MEMBER:
            raise tarfile.ReadError(f"it has a part larger than {LARGEST_MEMBER:,} bytes")
        return super().read(size)


def members(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bytes]]:
    """The plain files in a .tar.gz whose whole name matches, in the archive's order; links are not followed."""
    with _Unpacked(path, "rb") as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as archive:
        for member in archive:
            match = pattern.fullmatch(member.name)
            if not (match and member.isreg()):
                continue
            file = None if member.issparse() else archive.extractfile(member)
            content = file.read() if file else b""
            if not file or len(content) != member.size:
                raise tarfile.ReadError(f"{member.name} is not whole")
            yield match, content


def _bounded(count: int) -> None:
    if count > MOST_REVIEWS:
        raise ValueError(f"it holds more than {MOST_REVIEWS:,} reviews")


def bag_of_words(texts: Iterable[str], words: int) -> tuple[np.ndarray, list[str]]:
    """Which of the most frequent words each text holds (Section 6.1 takes 10,000), and those words, most frequent first.

    A word is a run of letters and apostrophes, in lower case; ties go to the word seen first. A uint8 array [texts, words]
    of zeros and ones that would be larger than 1 GiB is a DataError.

    Example:
        >>> bag_of_words(["Good, good film", "bad film"], 2)
        (array([[1, 1],
               [0, 1]], dtype=uint8), ['good', 'film'])
    """
    word = re.compile(r"[a-z']+")
    tokens = [word.findall(text.lower().replace("<br />", " ")) for text in texts]
    if not 0 < len(tokens) * words <= LARGEST_ARRAY:
        raise DataError(f"texts times words must be from 1 to {LARGEST_ARRAY:,}, got {len(tokens):,} times {words:,}")
    counts = collections.Counter(itertools.chain.from_iterable(tokens))
    vocabulary = [name for name, _ in counts.most_common(words)]
    column = {name: at for at, name in enumerate(vocabulary)}
    features = np.zeros((len(tokens), words), np.uint8)
    for row, present in enumerate(tokens):
        features[row, [column[name] for name in set(present) if name in column]] = 1
    return features, vocabulary
