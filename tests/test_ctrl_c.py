"""Ctrl-C while JAX is imported ends the command line in silence, and a program of the user's as Python does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def slow_jax(tmp_path):
    """An environment in which somebody presses Ctrl-C while JAX is being imported."""
    (tmp_path / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def _run(where: dict[str, str], cwd: Path, *arguments: str) -> tuple[int, str]:
    run = subprocess.run([sys.executable, *arguments], env=where, cwd=cwd, capture_output=True, text=True, timeout=60)
    return run.returncode, run.stderr


def test_the_command_line_stops_without_a_traceback(slow_jax, tmp_path):
    assert _run(slow_jax, tmp_path, "-m", "adam_jax", "paper", "list") == (-signal.SIGINT, "")


def test_in_a_program_it_is_a_keyboard_interrupt(slow_jax, tmp_path):
    code = "try:\n    import adam_jax\nexcept KeyboardInterrupt:\n    print('caught', file=__import__('sys').stderr)"
    assert _run(slow_jax, tmp_path, "-c", code) == (0, "caught\n")
    (tmp_path / "program.py").write_text(code)
    assert _run(slow_jax, tmp_path, "-m", "program", "adam_jax") == (0, "caught\n")
