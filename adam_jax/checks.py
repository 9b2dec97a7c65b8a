"""Settings, checked where they come in: one function for each kind; errors name the argument, the constraint and the value.

Python and NumPy numbers are looked at. Tracers have no value, and reading a device array would make the host wait for it, so
of those only dtype and shape are checked, and of a schedule nothing. Every function takes the argument's name first.
"""

import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")

_INJECTED = "pass a Python number or a float32 array, and to optax.inject_hyperparams hyperparam_dtype=jnp.float32"
_LARGEST = float(np.finfo(np.float32).max)
_MEANT = {  # as other libraries and earlier versions call them
    "lr": "learning_rate",
    "alpha": "learning_rate",
    "betas": "b1 and b2",
    "beta1": "b1",
    "beta2": "b2",
    "beta_1": "b1",
    "beta_2": "b2",
    "epsilon": "eps",
    "wd": "weight_decay",
    "dtype": "storage",
    "state_dtype": "storage",
    "nu_dtype": "storage",
    "root": "storage",
}
_ELSEWHERE = {  # what other libraries have as a flag
    "amsgrad": "that is a recipe of its own, amsgrad()",
    "weight_decay": "decoupled decay is in the recipes that end in w, as adamw(); in chains, add_decayed_weights()",
}


def number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    known: bool = False,
) -> None:
    """A finite real number, no schedule; `known` also refuses device arrays and tracers."""
    if callable(value) and not isinstance(value, type):
        raise TypeError(f"{name} must be a number or an array, not a schedule, got {_shown(value)}")
    found = _value(name, value, "a number" if known else "a number or an array")
    if found is None:
        if known:
            raise TypeError(f"{name} must be a Python or NumPy number, got {_shown(value)}: pass float({name})")
        return
    bounds = [(at_least, ">=", operator.ge), (above, ">", operator.gt), (below, "<", operator.lt)]
    bounds = [(bound, sign, holds) for bound, sign, holds in bounds if bound is not None]
    if not (abs(found) <= _LARGEST and all(holds(found, bound) for bound, _, holds in bounds)):
        wanted = " and ".join(f"{sign} {bound:g}" for bound, sign, _ in bounds)
        raise ValueError(f"{name} must be a finite number{' ' if wanted else ''}{wanted}, got {_shown(value)}")


def at_least(name: str, value: Any, lowest: float) -> None:
    """A finite number of at least `lowest`, no schedule."""
    number(name, value, at_least=lowest)


def decay(name: str, value: Any) -> None:
    """A number in [0, 1), or a schedule."""
    found = _value(name, value)
    if found is not None and not 0 <= found < 1:
        raise ValueError(f"{name} must be in [0, 1), got {_shown(value)}")


def scalar(name: str, value: Any, lowest: float | None = None) -> None:
    """A finite number, of any sign unless `lowest` says which, or a schedule."""
    if _value(name, value) is not None:
        number(name, value, at_least=lowest)


def whole(name: str, value: Any, lowest: int | None = None, highest: int = 2**31 - 1) -> int:
    """A whole number in a range, as a Python one."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        hint = f": pass {value:.0f}" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{name} must be a whole number, got {_shown(value)}{hint}")
    if lowest is not None and found < lowest:
        raise ValueError(f"{name} must be a whole number >= {lowest}, got {_shown(found)}")
    if found > highest:
        raise ValueError(f"{name} must be a whole number <= {highest}, got {_shown(found)}")
    return found


def seed(name: str, value: Any) -> None:
    """A whole number from 0, or an integer array or tracer."""
    if not isinstance(value, jax.Array):
        whole(name, value, 0)
    elif not jnp.issubdtype(value.dtype, jnp.integer) or value.shape:
        raise TypeError(f"{name} must be a whole number, got {value.dtype}{list(value.shape)}")


def flag(name: str, value: Any) -> bool:
    """True or False; what only counts as one of them, such as "False", is refused."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return bool(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """One of some strings."""
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {_shown(value)}")


def function(name: str, value: Any) -> None:
    """Something to call, but no type."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} must be a function, got {_shown(value)}")


def transformation(name: str, value: Any) -> None:
    """An Optax transformation."""
    if isinstance(value, type) or not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        hint = ": call it" if callable(value) else ""
        raise TypeError(f"{name} must be an Optax transformation, with init and update, got {_shown(value)}{hint}")


def did_you_mean(wrapped: Callable[P, T]) -> Callable[P, T]:
    """A function that answers an unknown argument with the one that was meant: `lr` with `learning_rate`."""
    known = list(inspect.signature(wrapped).parameters)

    @functools.wraps(wrapped)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                meant = _MEANT.get(name, next(iter(difflib.get_close_matches(name, known, 1)), None))
                known_ones = meant is not None and all(part in known for part in meant.split(" and "))
                others = _ELSEWHERE.get(meant or name, f"its arguments are {', '.join(known)}")
                hint = f"did you mean {meant}?" if known_ones else others
                raise TypeError(f"{wrapped.__name__}() has no argument {name!r}: {hint}")
        return wrapped(*args, **kwargs)

    return call


def _value(name: str, value: Any, wanted: str = "a number, an array or a schedule") -> float | None:
    """A number's value, or None where there is none to look at: device arrays, tracers, schedules."""
    if isinstance(value, type) or not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
        if callable(value) and not isinstance(value, type):
            return None
        raise TypeError(f"{name} must be {wanted}, got {_shown(value)}")
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {wanted}, got {value}")
    if isinstance(value, (np.number, np.ndarray, jax.Array)):
        dtype, shape = value.dtype, np.shape(value)
        real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        if not real or dtype == np.longdouble != np.float64:
            raise TypeError(f"{name} must be {wanted} of a real dtype that JAX has, got {dtype}: {_INJECTED}")
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(f"{name} must be float32 or wider, got {dtype}: {_INJECTED}")
        if shape:
            raise ValueError(
                f"{name} must be one number, got an array of shape {shape}: optax.partition gives leaves their own"
            )
        if isinstance(value, jax.Array):
            return None
        value = value.item()
    if isinstance(value, int) and abs(value) >= 2**31:  # where JAX has 32 bits
        raise ValueError(f"{name} must be an integer below 2^31 or a float, got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
