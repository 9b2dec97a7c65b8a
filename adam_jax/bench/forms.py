"""The forms of Adam that are compared, each with the fewest bytes that its step could move; and how they are compiled."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache

import adam_jax

__all__ = ["FORMS", "Form", "step_of", "uncached"]


class Form(NamedTuple):
    """One way to take a step.

    Attributes:
        name: for tables.
        tx: an Optax transformation.
        dtype: of params and gradients.
        limit: bytes a parameter that a step reads and writes at least.
    """

    name: str
    tx: optax.GradientTransformationExtraArgs
    dtype: Any
    limit: int


def step_of(tx: Any) -> Any:
    """A step: params, state and gradients to params and state."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Inside, programs are compiled also where JAX's persistent cache has them; else their time is that of reading files.

    Example:
        >>> with uncached():
        ...     print(jax.jit(jnp.sin).lower(0.0).compile()(0.0))
        0.0
    """
    used = jax.config.values["jax_enable_compilation_cache"]
    try:
        _use_cache(False)
        yield
    finally:
        _use_cache(used)


def _use_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()  # JAX looks at the switch only once


def _forms() -> list[Form]:
    ours, low = adam_jax.adam, adam_jax.in_float32
    clip, clip_optax = adam_jax.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    int8, bfloat16 = ours(1e-3, storage="int8"), ours(1e-3, storage="bfloat16")
    f32, b16 = jnp.float32, jnp.bfloat16
    rows = (
        ("optax adam", optax.adam(1e-3), f32, 28),
        ("adam", ours(1e-3), f32, 28),
        ("adam root", ours(1e-3, storage="root"), f32, 28),
        ("adam bfloat16", bfloat16, f32, 20),
        ("adam int8", int8, f32, 16),
        ("optax clip, adam", optax.chain(clip_optax, optax.adam(1e-3)), f32, 32),
        ("clip, adam", optax.chain(clip, ours(1e-3)), f32, 32),
        ("optax apply_if_finite(adam)", optax.apply_if_finite(optax.adam(1e-3), 5), f32, 32),
        ("skip_nonfinite(adam)", adam_jax.skip_nonfinite(ours(1e-3)), f32, 32),
        ("skip_nonfinite(clip, int8)", adam_jax.skip_nonfinite(optax.chain(clip, int8)), f32, 20),
        ("bfloat16 weights, rounded, int8", low(int8), b16, 10),
        ("bfloat16 weights, rounded, bfloat16", low(bfloat16), b16, 14),
        ("24-bit weights, int8", low(int8, residual=8), b16, 12),
        ("32-bit weights, float32", low(ours(1e-3), residual=16), b16, 26),
    )
    return [Form(name, optax.with_extra_args_support(tx), dtype, limit) for name, tx, dtype, limit in rows]


FORMS = _forms()
