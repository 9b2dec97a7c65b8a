"""Where Optax's Adam goes wrong: `python -m adam_jax bench correctness`.

`optax` and `adam_jax` share their names, so a row is one function, run with each module.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax

__all__ = ["CORRECTNESS", "Row", "rows"]


class Row(NamedTuple):
    """One line of the table: what is tried, what is exactly right, and how it is measured for a module."""

    case: str
    exact: str
    measure: Callable[[Any], str]


def rows() -> Iterator[dict[str, str]]:
    """Each line of the table, as soon as it is measured.

    Yields:
        The case, what Optax gives, what this library gives, and what is exact.

    Example:
        >>> next(rows())["exact"]
        '0 ulp'
    """
    for row in CORRECTNESS:
        yield {"case": row.case, "optax": row.measure(optax), "adam_jax": row.measure(adam_jax), "exact": row.exact}


def _last(tx: optax.GradientTransformation, *runs: tuple[float, int], dtype: Any = jnp.float32, params: Any = None) -> Any:
    """The last update of one coordinate after runs of (gradient, steps), in one jitted scan."""
    gradients = jnp.concatenate([jnp.full((steps, 1), value, dtype) for value, steps in runs])
    params = jnp.ones(1, dtype) if params is None else params

    def step(state: Any, g: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(g, state, params)
        return state, updates

    return jax.jit(lambda: jax.lax.scan(step, tx.init(params), gradients)[1])()[-1, 0]


def _shrinking(module: Any, name: str = "scale_by_adam") -> str:
    return f"{_last(getattr(module, name)(), (1.0, 10_000), (0.01, 10_000), dtype=jnp.bfloat16):.3f}"


def _first_steps(module: Any, dtype: Any, gradients: list[float]) -> str:
    tx = module.scale_by_adam()
    g = jnp.array(gradients, dtype)
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    return ", ".join(f"{u:.3g}" for u in updates.astype(jnp.float32))


def _recovery(module: Any) -> str:
    return f"{_last(module.scale_by_adam(b2=0.99), (1e20, 1), (1.0, 20_000)):.3g}"


def _root_recovery(module: Any) -> str:
    tx = module.scale_by_adam(storage="root") if module is adam_jax else module.scale_by_adam()
    return f"{_last(tx, (1e20, 1), (1.0, 9)):.4g}"


def _first_step_errors(module: Any) -> str:
    firsts = [_last(module.scale_by_adam(b2=b2, eps=0.0), (1.0, 1)) for b2 in (0.999, 0.99999, 0.9999999)]
    errors = [abs(float(first) - 1) for first in firsts]
    return ", ".join(f"{error:.1e}" if error else "0" for error in errors)


def _scheduled(module: Any) -> str:
    tx = optax.inject_hyperparams(module.scale_by_adam)(
        b1=optax.linear_schedule(0.5, 0.95, 50), b2=optax.linear_schedule(0.9, 0.999, 50), eps=0.0
    )
    state, params, updates = tx.init(jnp.zeros(1)), jnp.zeros(1), []
    update = jax.jit(tx.update)
    for _ in range(200):
        u, state = update(jnp.ones(1), state, params)
        updates.append(float(u[0]))
    return f"{min(updates):.3f} … {max(updates):.3f}"


@functools.cache
def _decades() -> tuple[np.ndarray, np.ndarray]:
    """3000 gradients for each of 256 coordinates whose scales span six decades, and Algorithm 1's updates in longdouble."""
    rng = np.random.default_rng(7)
    gradients = (rng.normal(size=(3000, 256)) * 10.0 ** rng.uniform(-3, 3, (1, 256))).astype(np.float32)
    b1, b2, m, v, exact = np.longdouble(0.9), np.longdouble(0.999), 0.0, 0.0, []
    for t, g in enumerate(gradients.astype(np.longdouble), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        exact.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8))
    return gradients, np.array(exact)


def _ulps(module: Any) -> str:
    gradients, exact = _decades()
    tx = module.scale_by_adam()
    state = tx.init(jnp.asarray(gradients[0]))
    step = jax.jit(lambda g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, g)[1])
    error = np.abs(np.asarray(step(jnp.asarray(gradients))) - exact) / np.maximum(1, np.abs(exact))
    return f"{float(error.max()) * 2**24:.0f} ulp"


def _adamax_at_zero(module: Any) -> str:
    return f"{_last(module.scale_by_adamax(eps=0.0), (0.0, 1)):.3g}"


def _complex_state(module: Any) -> str:
    state = module.scale_by_adam().init(jnp.zeros(1024, jnp.complex64))
    return f"{(state.mu.nbytes + state.nu.nbytes) / 1024:.0f}"


def _gradient_at_zero(module: Any) -> str:
    def loss(g: jax.Array) -> jax.Array:
        tx = module.scale_by_adam()
        return tx.update(g, tx.init(g))[0].sum()

    return f"{jax.grad(loss)(jnp.zeros(1))[0]:.3g}"


def _traffic(module: Any) -> str:
    params = jnp.ones(1 << 20)
    tx = optax.chain(module.clip_by_global_norm(1.0), module.adam(1e-3))
    state = tx.init(params)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    analysis = compiled.cost_analysis() or {}
    return f"{analysis['bytes accessed'] / params.size:.0f} bytes"


def _exact_root_recovery() -> float:
    b1, b2 = 0.9, 0.999
    gradients = np.array([1e20] + [1.0] * 9, np.longdouble)
    m = v = np.longdouble(0)
    for g in gradients:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return float(m / (1 - b1**10) / (np.sqrt(v / (1 - b2**10)) + 1e-8))


def _exact_shrinking() -> float:
    b2 = np.longdouble(0.999)
    return float(0.01 / np.sqrt(0.01**2 + (1 - 0.01**2) * b2**10_000))


CORRECTNESS = [
    Row("float32, 3000 steps over six decades: worst error", "0 ulp", _ulps),
    Row("first step, b2 = .999, .99999, .9999999: error", "0, 0, 0", _first_step_errors),
    Row("b1 and b2 on a schedule, gradient always 1: updates", "1.000 … 1.000", _scheduled),
    Row("float32, one gradient of 1e20, then 1 for 20,000 steps, b2 = .99: update", "1", _recovery),
    Row("the same after 9 steps, default b2, storage='root': update", f"{_exact_root_recovery():.4g}", _root_recovery),
    Row(
        "bfloat16, g = 1 for 10,000 steps, then .01 for 10,000: update",
        f"{_exact_shrinking():.3f}",
        _shrinking,
    ),
    Row(
        "float16, first step, g = 0, 1e-6, 5e-3, 256",
        "0, 0.99, 1, 1",
        functools.partial(_first_steps, dtype=jnp.float16, gradients=[0.0, 1e-6, 5e-3, 256.0]),
    ),
    Row(
        "AdaMax in bfloat16, the same two runs of gradients: update",
        "1.000",
        functools.partial(_shrinking, name="scale_by_adamax"),
    ),
    Row("AdaMax with eps = 0, first step, g = 0: update", "0", _adamax_at_zero),
    Row("complex64 leaf: bytes of state a parameter", "12", _complex_state),
    Row("derivative of the update at g = 0", "1e+08", _gradient_at_zero),
    Row("clip_by_global_norm, then adam, CPU: traffic a parameter", "", _traffic),
]
