"""Settings checked when a transformation is built: each error names the argument, the constraint and the value.

Only Python and NumPy numbers are checked. Traced values have no value to look at and reading a device array would make
the host wait for it, so of those only the dtype is checked.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["at_least", "decay", "one_of", "scalar", "transformation", "whole"]


def at_least(name: str, value: Any, lowest: float) -> None:
    """Raise unless a number is finite and at least `lowest`.

    Args:
        name: the argument's name, for the message.
        value: a number, array or tracer; only numbers are compared.
        lowest: the smallest value allowed.

    Raises:
        ValueError: if the number is too small, infinite or NaN.
        TypeError: if it is no number or array.

    Example:
        >>> at_least("eps", -1e-8, 0.0)
        Traceback (most recent call last):
        ...
        ValueError: eps must be a finite number >= 0, got -1e-08
    """
    if callable(value):
        raise TypeError(f"{name} must be a number or an array, not a schedule, got {value!r}")
    if _is_concrete(name, value) and not np.all((value >= lowest) & np.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= {lowest:g}, got {value}")


def decay(name: str, value: Any) -> None:
    """Raise unless a decay lies in [0, 1).

    Args:
        name: the argument's name, for the message.
        value: a number, array, tracer or schedule; only numbers are compared.

    Raises:
        ValueError: if the number is outside [0, 1) or NaN, or an array is too narrow to tell .999 from 1.
        TypeError: if it is no number, array or schedule at all.

    Example:
        >>> decay("b2", 1.0)
        Traceback (most recent call last):
        ...
        ValueError: b2 must be in [0, 1), got 1.0
    """
    if _is_concrete(name, value) and not np.all((value >= 0) & (value < 1)):
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def scalar(name: str, value: Any) -> None:
    """Raise unless a value is a number, a schedule, or an array of float32 or wider.

    Args:
        name: the argument's name, for the message.
        value: anything.

    Raises:
        ValueError: for an array too narrow for a hyper-parameter.
        TypeError: if it is no number, array or schedule at all.

    Example:
        >>> scalar("learning_rate", jnp.bfloat16(1e-3))
        Traceback (most recent call last):
        ...
        ValueError: learning_rate must be float32 or wider, got bfloat16: pass a Python number or a float32 array
    """
    _is_concrete(name, value)


def whole(name: str, value: Any, lowest: int) -> None:
    """Raise ValueError unless a value is a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
        raise ValueError(f"{name} must be a whole number >= {lowest}, got {value!r}")


def transformation(name: str, value: Any) -> None:
    """Raise TypeError unless a value is an Optax transformation."""
    if not callable(getattr(value, "init", None)) or not callable(getattr(value, "update", None)):
        raise TypeError(f"{name} must be an Optax transformation, with init and update, got {value!r}")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise unless a value is one of those allowed.

    Args:
        name: the argument's name, for the message.
        value: anything.
        allowed: the values allowed.

    Raises:
        ValueError: if it is not.

    Example:
        >>> one_of("max_of", "max", ("raw", "corrected"))
        Traceback (most recent call last):
        ...
        ValueError: max_of must be one of 'raw', 'corrected', got 'max'
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _is_concrete(name: str, value: Any) -> bool:
    """Whether a value can be compared now, once it is known to be of a kind that can be used at all."""
    if isinstance(value, (int, float, np.number, np.ndarray)) and not isinstance(value, bool):
        value = np.asarray(value)
        if value.dtype.kind in "iuf":
            return True
    elif isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
            raise ValueError(f"{name} must be float32 or wider, got {value.dtype}: pass a Python number or a float32 array")
        return False
    elif callable(value):
        return False
    raise TypeError(f"{name} must be a number, an array or a schedule, got {value!r}")
