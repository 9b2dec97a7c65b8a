"""Reading the files in which the data sets come: IDX, CIFAR-10's pickles, reviews as text. What is damaged is said so."""

import collections
import csv
import gzip
import io
import itertools
import math
import pickle
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DataError", "as_idx", "bag_of_words", "read_cifar", "read_idx", "read_review_archive", "read_review_table"]

DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, pickle.UnpicklingError, ValueError, KeyError, TypeError)


class DataError(Exception):
    """Data that is absent, damaged or not what it is called; the message is one line that says what to do."""


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
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again") from None
    if raw[:3] != b"\x00\x00\x08" or len(raw) < 4:
        raise DataError(f"{path} is not an IDX file of bytes: it must begin with 00 00 08, got {raw[:3].hex(' ')!r}")
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4))
    if len(raw) != header + math.prod(shape):
        raise DataError(
            f"{path} must hold {header + math.prod(shape)} bytes for shape {shape}, got {len(raw)}: "
            "it is truncated or damaged, fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def as_idx(array: np.ndarray) -> bytes:
    """What an IDX file of that array holds, not compressed.

    Args:
        array: uint8.

    Returns:
        The file's bytes.

    Example:
        >>> as_idx(np.array([7, 9], np.uint8)).hex(" ")
        '00 00 08 01 00 00 00 02 07 09'
    """
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


class _Bytes:
    """What a pickled numpy array becomes here: a shape and its bytes, nothing executed."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", b"u1") or fortran or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("only C-ordered arrays of uint8 are expected")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        del state


class _ArraysOnly(pickle.Unpickler):
    """An unpickler to which a uint8 array is the only object there is beyond lists, dicts, text and numbers."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        known = {"_reconstruct": lambda *_: _Bytes(), "ndarray": _Bytes, "dtype": _Dtype}
        if module_name in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and global_name in known:
            return known[global_name]
        if (module_name, global_name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is refused")


def read_cifar(path: Path, half: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from cifar-10-python.tar.gz; its pickles are read without running anything that they ask for.

    Args:
        path: the archive.
        half: "train", the five batches, or "test".

    Returns:
        uint8 images [n, 32, 32, 3] and int32 labels [n].

    Raises:
        DataError: for an archive that cannot be read, lacks a batch, or pickles anything but uint8 arrays.

    Example:
        >>> read_cifar(Path("absent.tar.gz"), "train")
        Traceback (most recent call last):
        adam_jax.paper.formats.DataError: absent.tar.gz cannot be read (...): fetch it again
    """
    names = [f"data_batch_{k}" for k in range(1, 6)] if half == "train" else ["test_batch"]
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            for name in names:
                member = archive.extractfile(f"cifar-10-batches-py/{name}")
                if member is None:
                    raise KeyError(f"{name} is no file")
                batch = _ArraysOnly(io.BytesIO(member.read()), encoding="bytes").load()
                images.append(batch[b"data"].array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels.append(np.asarray(batch[b"labels"], np.int32))
                if len(images[-1]) != len(labels[-1]):
                    raise ValueError(f"{name} has {len(images[-1])} images and {len(labels[-1])} labels")
    except (*DAMAGED, AttributeError, IndexError, ImportError) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again") from None
    return np.concatenate(images), np.concatenate(labels)


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
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                if row["source"] == "imdb":
                    texts.append(row["text"])
                    labels.append({"0": 0, "1": 1}[row["label"]])
    except (*DAMAGED, csv.Error) as error:
        raise DataError(f"{path} is no table of text, label 0 or 1 and source ({type(error).__name__}: {error})") from None
    if not texts:
        raise DataError(f"{path} holds no reviews from imdb")
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

    Example:
        >>> read_review_archive(Path("absent.tar.gz"), "train")
        Traceback (most recent call last):
        adam_jax.paper.formats.DataError: absent.tar.gz cannot be read (...): fetch it again
    """
    texts, labels = [], []
    pattern = re.compile(rf"(\./)?aclImdb/{half}/(pos|neg)/[^/]+\.txt")
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                match = pattern.fullmatch(member.name)
                file = archive.extractfile(member) if match else None
                if match and file:
                    texts.append(file.read().decode("utf-8"))
                    labels.append(int(match[2] == "pos"))
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again") from None
    if not texts:
        raise DataError(f"{path} holds no reviews under aclImdb/{half}")
    return texts, np.asarray(labels, np.int32)


def bag_of_words(texts: Iterable[str], words: int) -> tuple[np.ndarray, list[str]]:
    """Which of the most frequent words each text holds (Section 6.1 takes 10,000).

    Args:
        texts: any texts; a word is a run of letters and apostrophes, in lower case.
        words: how many of the most frequent words to keep; ties go to the word seen first.

    Returns:
        A uint8 array [texts, words] of zeros and ones, and the words, most frequent first.

    Example:
        >>> bag_of_words(["Good, good film", "bad film"], 2)
        (array([[1, 1],
               [0, 1]], dtype=uint8), ['good', 'film'])
    """
    word = re.compile(r"[a-z']+")
    tokens = [word.findall(text.lower().replace("<br />", " ")) for text in texts]
    counts = collections.Counter(itertools.chain.from_iterable(tokens))
    vocabulary = [name for name, _ in counts.most_common(words)]
    column = {name: at for at, name in enumerate(vocabulary)}
    features = np.zeros((len(tokens), words), np.uint8)
    for row, present in enumerate(tokens):
        features[row, [column[name] for name in set(present) if name in column]] = 1
    return features, vocabulary
