"""What `python -m adam_jax bench` compares comes out right, and says in one line what is wrong with its arguments."""

import json

import matplotlib.image
import numpy as np
import pytest

from adam_jax.bench import command, compiled, steps, training


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
    assert list(rows)[:3] == ["copy", "optax adam", "optax clip, adam"]
    assert rows["optax adam"]["ratio"] == 1.0
    assert rows["copy"]["copy share"] == pytest.approx(1.0)
    assert rows["clip, adam"]["state"] == pytest.approx(8, abs=0.01)


def test_gpt2_has_124_million_parameters():
    assert sum(int(np.prod(shape)) for shape in steps.SHAPES["gpt2"]()) == 124_439_808


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
    assert all(word in text for word in ("correctness", "training", "steps", "compiled"))


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
