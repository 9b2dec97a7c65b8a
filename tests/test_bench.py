"""What `python -m adam_jax bench` compares comes out right, and says in one line what is wrong with its arguments."""

import functools
import importlib.util
import io
import json
import mmap
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import rich.console

from adam_jax.bench import command, compiled, peers, steps, storage, training


def test_float32_training_stays_nearer_to_float64_than_optaxs():
    problem = next(problem for problem in training.PROBLEMS if problem.name == "transformer on text, Adam")
    found = training.trained(problem, seed=0, steps=40)
    assert found["adam_jax"].max() < 1e-6  # 2.9e-7 is common; the network itself is computed in float32
    assert found["optax"].max() > 2 * found["adam_jax"].max()


def test_every_problem_learns_and_is_the_same_run_in_both_libraries():
    for problem in training.PROBLEMS:
        found = training.trained(problem, seed=1, steps=5)
        assert all(np.all(errors < 1e-3) for errors in found.values()), problem.name


def test_steps_are_compared_with_optax_and_with_the_copy_of_the_same_run():
    rows = {row["form"]: row for row in steps.measured("one", "clip, adam", rounds=2, scale=64)}
    assert list(rows) == ["copy", "optax adam", "optax clip, adam", "clip, adam"]
    assert rows["optax adam"]["ratio"] == 1.0
    assert rows["copy"]["share"] == pytest.approx(1.0)
    assert rows["clip, adam"]["state"] == pytest.approx(8, abs=0.01)
    assert rows["clip, adam"]["peak"] == pytest.approx(16, abs=0.1)
    assert rows["optax clip, adam"]["peak"] == pytest.approx(20, abs=0.1)  # and the clipped gradients


@pytest.mark.parametrize("shape", steps.SHAPES)
def test_every_shape_is_stepped_through_and_drawn(shape, tmp_path, capsys):
    drawn = tmp_path / "steps.png"
    wanted = ["steps", "--shapes", shape, "--scale", "500", "--rounds", "1", "--json", "--plot", str(drawn)]
    name = "row_adam, 4096 rows" if shape == "table" else "adam root"
    assert command.main([*wanted, "--only", name]) == 0
    *always, ours = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in always] == ["copy", "optax adam"]
    assert ours["form"] == name
    assert ours["ms"] > 0
    assert ours["state"] == pytest.approx(8, abs=0.1)
    assert matplotlib.image.imread(drawn).std() > 0.05


def test_compile_times_are_not_those_of_reading_a_cache(tmp_path):
    code = "from adam_jax.bench import compiled, steps; list(compiled.compile_times('cpu', 'optax adam', 3))"
    code += "; list(steps.measured('one', 'optax adam', rounds=1, scale=64))"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | cache, check=True, capture_output=True)
    kept = [path.name for path in tmp_path.glob("jit_step-*-cache")]
    assert len(kept) == 1, kept  # the small program that goes before, not the two that are timed


def test_what_is_missing_is_named_with_what_to_install():
    console = rich.console.Console(width=115, record=True, file=io.StringIO())
    console.print(command._table("title", {"form": "form"}, [{"form": "flash", "missing": 'pip install "a[b]"'}]))
    assert 'flash: pip install "a[b]"' in " ".join(console.export_text().split())


def _installed(row, module):
    """The row, which says what to install where its optimizer is not."""
    if importlib.util.find_spec(module) is None:
        assert row["missing"] == 'not installed: pip install "adam_jax[storage-peers]"'
        pytest.skip(row["missing"])
    assert "missing" not in row, row["missing"]
    return row


@pytest.mark.parametrize(
    ("name", "module", "state", "moved"),
    [
        ("PyTorch fused", "torch", 8, 28),
        ("bitsandbytes Adam8bit", "bitsandbytes", 2.1, 16),
        ("flashoptim-jax", "flashoptim_jax", 2.1, 16),
        ("flashoptim-jax, 24-bit weights", "flashoptim_jax", 3.1, 12),
        ("torchao Adam8bit", "torchao", 2.1, 16),
    ],
)
def test_peers_are_stepped_where_they_are_installed_and_say_what_to_install_where_not(name, module, state, moved):
    (row,) = (row for row in steps.measured("one", name, rounds=1, scale=64) if row["form"] == name)
    row = _installed(row, module)
    assert row["ratio"] > 0
    assert row["limit"] == moved
    assert row["state"] == pytest.approx(state, abs=0.1)
    if sys.platform == "linux":
        assert row["peak"] >= row["state"] + (4 if "24-bit" in name else 8)  # weights and gradients


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much a process has held")
def test_the_memory_that_a_step_takes_is_what_linux_sees_of_it():
    assert steps._rise(lambda: None) == pytest.approx(0, abs=1 << 18)
    # of the system itself: malloc may have memory at hand that the process holds already
    taken = steps._rise(lambda: np.frombuffer(mmap.mmap(-1, 1 << 24), np.uint8).fill(1))
    assert taken == pytest.approx(1 << 24, rel=0.05)

    def in_pieces():  # of malloc's, that it keeps when they are free
        assert len([np.ones(1000) for _ in range(4000)]) == 4000

    in_pieces()
    assert steps._rise(in_pieces) == pytest.approx(4000 * 8000, rel=0.05)


def test_a_peer_that_fails_is_named_below_the_table(monkeypatch, capsys):
    def fails(rate, bits):
        raise RuntimeError(f"no kernel for {rate}, {bits}\nand more")

    monkeypatch.setattr(peers, "flash_adam", fails)
    assert command.main(["steps", "--only", "flashoptim", "--rounds", "1", "--scale", "500"]) == 0
    assert "flashoptim-jax: RuntimeError: no kernel for 0.001, None" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured_before(monkeypatch, capsys):
    def measured(*_, rows=("adam", "adam int8")):
        yield from ({"form": form, "ms": 1.0, "ratio": 1.25} for form in rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "measured", measured)
    assert command.main(["steps"]) == 130
    assert "adam int8" in capsys.readouterr().out
    assert command.main(["steps", "--json"]) == 130
    assert [row["form"] for row in json.loads(capsys.readouterr().out)] == ["adam", "adam int8"]
    monkeypatch.setattr(steps, "measured", functools.partial(measured, rows=()))
    assert command.main(["steps"]) == 130
    assert not capsys.readouterr().out


def test_narrow_moments_follow_when_the_gradients_scale_changes(capsys):
    assert command.main(["storage", "--at", "3", "--steps", "9", "--only", "int8", "--json"]) == 0
    (int8,) = json.loads(capsys.readouterr().out)
    assert all(0.9 < int8[group]["worst"] < 1.1 for group in storage.GROUPS)
    assert 0 < int8["even"]["mean"] < int8["even"]["worst"] < 0.1
    assert int8["state"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(("name", "module"), [("bitsandbytes", "bitsandbytes"), ("flashoptim-jax", "flashoptim_jax")])
def test_peers_are_given_the_same_gradients_where_they_are_installed(name, module):
    (row,) = storage.rows(name, at=3, steps=9)
    row = _installed(row, module)
    assert 0.5 < row["all ÷100"]["last"] < 2
    assert row["state"] == pytest.approx(2.1, abs=0.1)


def test_gpt2_has_124_million_parameters():
    assert sum(int(np.prod(shape)) for shape in steps.SHAPES["gpt2"](1)) == 124_439_808


def test_tables_are_printed_and_drawn_and_come_as_json(tmp_path, capsys):
    drawn = tmp_path / "training.png"
    wanted = ["training", "--only", "masked", "--seeds", "1", "--steps", "3"]
    assert command.main([*wanted, "--json", "--plot", str(drawn)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["problem"] == "ReLU net on digits, masked AdamW"
    assert 0 < row["optax"]["median"] < 1e-3
    assert matplotlib.image.imread(drawn).std() > 0.05
    assert command.main(wanted) == 0
    assert "masked AdamW" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "WHAT"),
        (["nothing"], "nothing"),
        (["steps", "--rounds", "0"], "at least 1"),
        (["training", "--only", "nothing like it"], "transformer on text"),
        (["compiled", "--on", "abacus"], "abacus"),
        (["storage", "--at", "9", "--steps", "9"], "before the last"),
        (["training", "--only", "masked", "--seeds", "1", "--steps", "1", "--plot", "/nowhere/x.png"], "/nowhere"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(argv, said, capsys):
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.strip().splitlines()[-1].startswith("adam_jax bench: ")


def test_help_says_what_there_is(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("correctness", "training", "steps", "storage", "compiled"))


def test_kernels_count_what_they_read_as_often_as_they_read_it():
    text = """
ENTRY main {
 %a = f32[1000]{0} parameter(0)
 %s = f32[] parameter(1)
 %b = (bf16[1000]{0}, f32[]) fusion(%a, %a, %s), kind=kLoop
 %c = bf16[1000]{0} get-tuple-element(%b), index=0
 ROOT %d = f32[1000]{0} fusion(%c, %s), kind=kLoop
}"""
    assert compiled.kernels(text, 1000) == [("%b", 8.0, 2.0), ("%d", 2.0, 4.0)]


def test_unrepeated_leaves_have_shapes_of_their_own():
    repeated, own = (compiled.transformer_shapes(64, repeated=r) for r in (True, False))
    assert len(set(repeated)) == 7
    assert len(set(own)) > 40
