"""The command line: `python -m adam_jax paper ...` and `python -m adam_jax bench ...`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {"paper": "adam_jax.paper.command", "bench": "adam_jax.bench.command"}
USAGE = """usage: python -m adam_jax paper FIGURE [options]   reproduce an experiment of the paper (FIGURE: list shows them)
       python -m adam_jax bench WHAT [options]     compare with other implementations on this machine"""


def main(argv: Sequence[str]) -> int:
    """Hand over to a subcommand, importing only that one."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        got = f"got {argv[0]!r}" if argv else "got none"
        print(f"adam_jax: the command must be one of {', '.join(COMMANDS)}, {got}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(COMMANDS[argv[0]])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("adam_jax"):
            raise
        print(f'adam_jax {argv[0]}: {error.name} is not installed: pip install "adam_jax[paper]"', file=sys.stderr)
        return 2
    return command.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
