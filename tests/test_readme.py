"""The README holds: its Python runs as it stands, its names exist, and it stays short."""

import re
from pathlib import Path

import jax

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_its_python_runs_in_order_as_it_stands():
    assert len(BLOCKS) >= 2
    scope: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), scope)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(scope["state"]))


def test_the_second_block_of_commands_runs_the_tests():
    commands = re.findall(r"^```sh\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)
    assert "-m adam_jax paper" in commands[0]
    assert "-m pytest" in commands[1]  # .ci/run runs it as it stands
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for command in commands)


def test_it_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 120
