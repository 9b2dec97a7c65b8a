"""Reading CIFAR-10's archive of pickles without running anything that they ask for."""

import collections
import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from adam_jax.paper.formats import members, readable

__all__ = ["read_cifar"]

# What a batch may be made of. Containers nest only as often as there are opcodes for them, and 1000 are far more than the
# dozen in a batch: deeper ones overflow C's stack when they are hashed or compared.
FEW = re.compile(r"(EMPTY_)?(LIST|DICT|TUPLE[123]?)|GLOBAL|STACK_GLOBAL|REDUCE|BUILD|NEWOBJ|PROTO|FRAME|STOP")
MANY = re.compile(
    r"(SHORT_)?BIN(STRING|BYTES|UNICODE)8?|(LONG_)?BIN(GET|PUT)|MEMOIZE|BININT[12]?|LONG1|INT|NONE|NEWTRUE|NEWFALSE|MARK|"
    r"APPENDS?|SETITEMS?|SHORT_BINBYTES|SHORT_BINUNICODE|BINUNICODE8"
)
MOST_CONTAINERS, MOST_OBJECTS = 1000, 1_000_000


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
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is refused")


def read_cifar(path: Path, half: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from cifar-10-python.tar.gz; its pickles are read without running anything that they ask for.

    Args:
        path: the archive.
        half: "train", the five batches, or "test".

    Returns:
        uint8 images [n, 32, 32, 3] and int32 labels [n], 0 to 9.

    Raises:
        DataError: for an archive that cannot be read, lacks a batch, or pickles anything but uint8 arrays.

    Example:
        >>> read_cifar(Path("absent.tar.gz"), "train")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adam_jax.paper.formats.DataError: absent.tar.gz cannot be read (...): fetch it again
    """
    names = [f"data_batch_{k}" for k in range(1, 6)] if half == "train" else ["test_batch"]
    pattern = re.compile(rf"cifar-10-batches-py/({'|'.join(names)})")
    with readable(path):
        batches = {match[1]: _batch(match[1], content) for match, content in members(path, pattern)}
        if len(batches) != len(names):
            raise ValueError(f"it lacks {', '.join(name for name in names if name not in batches)}")
        images, labels = zip(*(batches[name] for name in names), strict=True)
        return np.concatenate(images), np.concatenate(labels)


def _batch(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    _check(content)
    batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    images = batch[b"data"].array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = batch[b"labels"]
    if type(labels) is not list or len(images) != len(labels):
        raise ValueError(f"{name} has {len(images)} images and {len(labels)} labels")
    if wrong := [label for label in labels if type(label) is not int or not 0 <= label <= 9]:
        raise ValueError(f"{name} must have labels 0 to 9, got one that is {str(wrong[0])[:40]}")
    return images, np.asarray(labels, np.int32)


def _check(content: bytes) -> None:
    """Look at a pickle's opcodes before it is loaded: known ones only, few containers, and no memo larger than its use."""
    counts: collections.Counter[str] = collections.Counter()
    for opcode, argument, _ in pickletools.genops(content):
        counts[opcode.name] += 1
        if not FEW.fullmatch(opcode.name) and not MANY.fullmatch(opcode.name):
            raise pickle.UnpicklingError(f"it uses {opcode.name}, which is refused")
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > MOST_OBJECTS:
            raise pickle.UnpicklingError("it numbers more objects than it can hold")
    if sum(count for name, count in counts.items() if FEW.fullmatch(name)) > MOST_CONTAINERS:
        raise pickle.UnpicklingError("it holds more containers than a batch has")
