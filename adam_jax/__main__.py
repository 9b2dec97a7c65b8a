"""The command line: `python -m adam_jax paper ...` and `python -m adam_jax bench ...`."""

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import adam_jax

COMMANDS = {"paper": "adam_jax.paper.command", "bench": "adam_jax.bench.command"}
USAGE = """usage: python -m adam_jax paper FIGURE [options]   reproduce an experiment of the paper (FIGURE: list shows them)
       python -m adam_jax bench WHAT [options]     compare with other implementations on this machine
       python -m adam_jax --version"""


def main(argv: Sequence[str]) -> int:
    """Hand over to a subcommand, importing only that one; what it cannot print is one line, and so is Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not Unicode shows escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _command(argv)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("adam_jax: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        return _no_output(error)


def _command(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help", "--version"):
        print(USAGE if argv[0] != "--version" else f"adam_jax {adam_jax.__version__}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        got = f"got {argv[0][:40]!r}" if argv else "got none"
        return _complain(f"the command must be one of {', '.join(COMMANDS)}, {got}; --help says what they do")
    try:
        with _killed_by_ctrl_c():
            command = importlib.import_module(COMMANDS[argv[0]])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("adam_jax"):
            raise
        return _complain(f'{argv[0]} needs {error.name}, which is not installed: pip install "adam_jax[paper]"')
    except (ImportError, ValueError) as error:  # Matplotlib and others refuse variables like MPLBACKEND when imported
        return _complain(f"{argv[0]} cannot start: {error}")
    return command.main(argv[1:])


@contextlib.contextmanager
def _killed_by_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with status 130 and no traceback from the midst of some package's import."""
    ours = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _complain(line: str) -> int:
    print("adam_jax:", " ".join(line.split()), file=sys.stderr)
    return 2


def _no_output(error: OSError) -> int:
    """Say that what was printed has nowhere to go; the rest of it goes nowhere, without another word."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError, ValueError, AttributeError):
        _complain(f"{error.filename or 'standard output'}: {error.strerror or error}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
