"""Damaged and crafted files, saved work and arguments: a right answer or one line, never a traceback or a wrong result.

A short run belongs to the suite; ADAM_JAX_FUZZ=N tries N inputs of each kind, from another seed for another N.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import tarfile
import tracemalloc
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax.__main__ import main
from adam_jax.paper import cifar, formats, results, saved
from adam_jax.paper.data import Dataset
from adam_jax.paper.formats import DataError

command = pytest.importorskip("adam_jax.paper.command", reason='pip install "adam_jax[paper]"')

INPUTS = int(os.environ.get("ADAM_JAX_FUZZ", "60"))
SIZES = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, cut out, doubled or replaced by a size at the edge of something."""
    raw = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1) if rng.random() < 0.6 else min(rng.randrange(64), len(raw))
        kind = rng.randrange(6)
        if kind == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del raw[at : at + rng.choice([1, 2, 8, 100, len(raw)])]
        elif kind == 2:
            raw[at:at] = raw[at : at + rng.choice([1, 4, 64])] * rng.choice([1, 2, 50])
        elif kind == 3:
            width = rng.choice([1, 2, 4, 8])
            raw[at : at + width] = (rng.choice(SIZES) % 256**width).to_bytes(width, rng.choice(["big", "little"]))
        elif kind == 4:
            raw[at:at] = rng.choice([b"\0", b"\xff", b'"', b",", b"\n", b"(", b"]", b"]" * 50, b"(" * 3000, b"\x85" * 3000])
        else:
            raw[at : at + 4] = bytes(rng.randrange(256) for _ in range(4))
    return bytes(raw)


def archive(files: dict[str, bytes], rng: random.Random | None = None) -> bytes:
    """A .tar.gz of those files; with `rng` its headers are damaged before it is packed."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(mutated(plain.getvalue(), rng) if rng else plain.getvalue(), 1)


IDX = bytes([0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(80))
TABLE = b'text,label,source\n"a good, good film",1,imdb\n"bad ""film""",0,imdb\nelse,3,yelp\n'
REVIEWS = {"aclImdb/train/pos/0_9.txt": b"A good film", "aclImdb/train/neg/0_2.txt": b"A bad film<br />"}
BATCH = pickle.dumps({b"data": np.arange(6144, dtype=np.uint8).reshape(2, 3072), b"labels": [1, 9]}, 2)
BATCHES = {"cifar-10-batches-py/test_batch": BATCH}


def _bag(path):
    texts, labels = formats.read_review_table(path)
    return formats.bag_of_words(texts, 50)[0], labels


READERS = {
    "idx": (formats.read_idx, lambda rng: mutated(IDX, rng)),
    "idx.gz": (formats.read_idx, lambda rng: gzip.compress(mutated(IDX, rng), 1)),
    "gz": (formats.read_idx, lambda rng: mutated(gzip.compress(IDX, 1), rng)),
    "csv": (_bag, lambda rng: mutated(TABLE, rng)),
    "reviews": (lambda path: formats.read_review_archive(path, "train"), lambda rng: archive(REVIEWS, rng)),
    "tar.gz": (lambda path: formats.read_review_archive(path, "train"), lambda rng: mutated(archive(REVIEWS), rng)),
    "pickle": (
        lambda path: cifar.read_cifar(path, "test"),
        lambda rng: archive({name: mutated(content, rng) for name, content in BATCHES.items()}),
    ),
    "cifar": (lambda path: cifar.read_cifar(path, "test"), lambda rng: archive(BATCHES, rng)),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_gives_data_or_one_line(tmp_path, kind):
    read, make = READERS[kind]
    rng, path, lines = random.Random(f"{kind}{INPUTS}"), tmp_path / "file", []
    for _ in range(INPUTS):
        path.write_bytes(make(rng))
        try:
            found = read(path)
        except DataError as error:
            lines += [str(error)]
            continue
        if kind in ("pickle", "cifar"):
            images, labels = found
            assert (images.dtype, images.shape[1:], len(images)) == (np.uint8, (32, 32, 3), len(labels))
            assert ((labels >= 0) & (labels <= 9)).all()
    assert lines
    assert not any("\n" in line or len(line) > 400 + len(str(path)) for line in lines)


def _pickled(labels: bytes) -> bytes:
    start = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, 2)[:-1]
    return start + b"C\x06labels" + labels + b"s."


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("idx", bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"x", "cannot hold the shape"),
        ("idx", bytes([0, 0, 8, 2]) + bytes(8), "cannot hold the shape"),
        ("idx", bytes([0, 0, 8, 255]) + bytes([0, 0, 0, 1]) * 255 + b"x", "1 to 8 dimensions, got 255"),
        ("idx", bytes([0, 0, 8, 0]) + b"x", "1 to 8 dimensions, got 0"),
        ("idx", gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(50_000_000)), "must hold 9 bytes"),
        ("idx", gzip.compress(bytes([0, 0, 8, 1, 63, 0, 0, 0]) + bytes(10)), "cannot hold the shape"),
        ("csv", b"text,label,source\nfine,1,imdb\nimdb\n", "more or fewer columns"),
        ("csv", b"text,label,source\nfine,1,imdb,more\n", "more or fewer columns"),
        ("csv", b"text,label,source\nfine,1.0,imdb\n", "KeyError"),
        ("csv", b"text,label,source\n" + b"x" * 200_000 + b",1,imdb\n", "field larger"),
        ("csv", b"text,label,source\n" + b"x,1,imdb\n" * 100_001, "more than 100,000 reviews"),
        ("pickle", _pickled(b"]K\x63a"), "labels 0 to 9, got one that is 99"),
        ("pickle", _pickled(b"]J\xff\xff\xff\xffa"), "labels 0 to 9, got one that is -1"),
        ("pickle", _pickled(b"]G\x3f\xfb\x33\x33\x33\x33\x33\x33a"), "BINFLOAT, which is refused"),
        ("pickle", _pickled(b"]\x88a"), "labels 0 to 9, got one that is True"),
        ("pickle", _pickled(b"]r\xff\xff\xff\x7fK\x01a"), "numbers more objects"),
        ("pickle", b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x00s.", "more containers"),
        ("pickle", b"\x80\x02B\xff\xff\xff\x7f.", "cannot be read"),
        ("pickle", b"cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "refused"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crafted_file_is_one_line_and_takes_no_memory(tmp_path, kind, content, said):
    path = tmp_path / "file"
    packed = archive({"cifar-10-batches-py/test_batch": content}) if kind == "pickle" else content
    path.write_bytes(packed)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=said):
            READERS[kind][0](path)
        assert tracemalloc.get_traced_memory()[1] < 60e6  # what 100,000 rows take as Python's texts and dicts
    finally:
        tracemalloc.stop()


def test_a_sparse_file_and_a_bomb_of_an_archive_take_no_memory(tmp_path):
    sparse, bomb = tmp_path / "sparse", tmp_path / "bomb"
    with sparse.open("wb") as file:
        file.write(bytes([0, 0, 8, 1, 255, 255, 255, 255]))
        file.truncate(2**32 + 7)
    info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    info.size = 2**33
    bomb.write_bytes(gzip.compress(info.tobuf() + bytes(50_000_000)))
    tracemalloc.start()
    try:
        for read in (formats.read_idx, lambda path: cifar.read_cifar(path, "test")):
            for path in (sparse, bomb):
                with pytest.raises(DataError):
                    read(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


LIKE = [jnp.arange(6.0).reshape(2, 3), jnp.ones(4, jnp.bfloat16), jnp.int32(7)]
COSTS, SECONDS = [np.full((2, 3), k, np.float32) for k in range(5)], [0.5, 0.25, 1.0, 2.0, 0.0]


def _store(folder, say, points=9):
    return saved.Store(folder / "job.work", {"alpha": 1}, LIKE, (2, 3), points, say)


def _is_what_was_saved(found) -> bool:
    costs, seconds, leaves = found
    same = (np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves, map(np.asarray, LIKE), strict=True))
    return np.array_equal(costs, COSTS) and seconds.tolist() == SECONDS and all(same)


def test_saved_work_is_what_was_saved_or_is_put_aside(tmp_path):
    lines = []
    store = _store(tmp_path, lines.append)
    assert store.load() is None
    store.save(COSTS, SECONDS, LIKE)
    assert _is_what_was_saved(store.load())
    content, rng = store.path.read_bytes(), random.Random(INPUTS)
    for _ in range(4 * INPUTS):
        store.path.write_bytes(mutated(content, rng))
        found = store.load()
        aside = list(tmp_path.glob("job-old*.work"))
        assert len(aside) == (found is None)
        for path in aside:
            path.unlink()
        assert found is None or _is_what_was_saved(found)
    assert lines


def _signed(store, points: int, content: bytes) -> bytes:
    """A crafted file: everything right that can be computed without the arrays."""
    header = f"adam_jax unfinished work {saved.FORMAT} {store.mark} {points} {saved.hashlib.sha256(content).hexdigest()}\n"
    return header.encode() + content


@pytest.mark.parametrize("points", [0, 1, 4, 6, 9, 10, 999_999_999])
def test_crafted_work_of_another_length_is_put_aside(tmp_path, points):
    lines = []
    store = _store(tmp_path, lines.append)
    store.save(COSTS, SECONDS, LIKE)
    store.path.write_bytes(_signed(store, points, store.path.read_bytes().partition(b"\n")[2]))
    assert store.load() is None
    assert "shorter or longer" in lines[0]


def test_crafted_times_are_put_aside(tmp_path):
    lines = []
    store = _store(tmp_path, lines.append)
    store.save(COSTS, [0.5, float("nan"), 1.0, 2.0, -1.0], LIKE)
    assert store.load() is None
    assert "times that cannot be" in lines[0]


def test_linked_work_is_refused(tmp_path):
    store = _store(tmp_path, print)
    store.save(COSTS, SECONDS, LIKE)
    store.path.rename(tmp_path / "planted.work")
    store.path.symlink_to("planted.work")
    with pytest.raises(DataError, match="is a link"):
        store.load()


def test_a_damaged_record_is_not_believed(tmp_path):
    identity = {"figure": "fig1a", "plan": {"epochs": 1}}
    result = results.Result("t", [], [], [results.Claim("water is wet", True, "100 %")], {})
    *contents, record = results.write(result, lambda file: file.write(b"png") and None, tmp_path / "fig1a", identity)
    assert results.finished(tmp_path / "fig1a", identity)
    right = json.loads(record.read_bytes())
    whole, rng = [path.read_bytes() for path in (*contents, record)], random.Random(INPUTS)
    for _ in range(INPUTS):
        record.write_bytes(mutated(whole[2], rng))
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            found = json.loads(record.read_bytes())
            agree = isinstance(found, dict) and all(found.get(key) == right[key] for key in ("identity", "files"))
            assert results.finished(tmp_path / "fig1a", identity) == agree
        results.finished(tmp_path / "fig1a", identity)
        record.write_bytes(whole[2])
        changed = rng.randrange(2)
        contents[changed].write_bytes(mutated(whole[changed], rng) + b"!")
        assert not results.finished(tmp_path / "fig1a", identity)
        contents[changed].write_bytes(whole[changed])


WORDS = [
    *["fig1a"] * 3,
    *(
        "all",
        "list",
        "--quick",
        "--fresh",
        "--epochs",
        "--seeds",
        "--seed",
        "--data",
        "--source",
        "--out",
        "package",
        "auto",
    ),
    *("1", "0", "-1", "2", "1e3", "nan", "99999999999", "9" * 5000, "", " ", "\0", "[bold]", "[/x]", "é", "\udcff", "--"),
    *("-q", "--help", "--epochs=3", "--seeds=", "a" * 300, "/dev/null", "/proc/self", ".", "x"),
]


def test_arguments_are_followed_or_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("adam_jax.paper.plots.save", lambda _result, file: file.write(b"png"))
    data = Dataset("d [x]", "s", np.zeros((1, 1), np.uint8), np.zeros(1, np.int32))

    def make(lab, plan, data):
        return results.Result(f"{data.name} {plan.epochs} {lab.seed}", [], [], [], {"plan": vars(plan)})

    for name, figure in command.FIGURES.items():
        monkeypatch.setitem(
            command.FIGURES, name, replace(figure, data=lambda where, _: (where.folders(), data)[1], make=make)
        )
    rng, statuses = random.Random(INPUTS), []
    for _ in range(2 * INPUTS):
        arguments = ["paper", *rng.choices(WORDS, k=rng.randint(0, 6))]
        statuses.append(main(arguments))
        printed = capsys.readouterr()
        assert statuses[-1] in (0, 2), arguments
        lines = printed.err.count("\n")
        assert lines == 0 if statuses[-1] == 0 else lines == 1 or "all" in arguments, (arguments, printed.err)
    assert {0, 2} <= set(statuses)
