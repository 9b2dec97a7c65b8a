"""The optional packages that draw and write, imported when they are first needed."""

import importlib
from typing import Any


def imported(name: str) -> Any:
    """A module of the extra "watch"; `ImportError` says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f'{package} is needed here: pip install "adam_jax[watch]"', name=package) from error
