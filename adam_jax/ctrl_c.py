"""Ctrl-C while `python -m adam_jax` still imports JAX: the process ends, without a traceback from the midst of it.

Imported before everything else, and never from a program of the user's; `__main__` puts Python's handler back.
"""

import signal
import sys

_command_line = sys.argv[:1] == ["-m"] and ("-m", "adam_jax") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
if _command_line and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
