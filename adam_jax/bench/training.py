"""Real training in float32 against the same run in float64: the largest relative error of the loss.

Data, their order, the first parameters and the network's arithmetic are the same; only the optimizer differs. The run in
float64 is Optax's Adam, and so is what it is compared with: Optax's in float32, and this library's.
"""

import functools
import itertools
import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from optax import contrib
from sklearn.datasets import load_digits

import adam_jax

__all__ = ["PROBLEMS", "Problem", "figure", "summary", "trained"]

CONTEXT, WIDTH, HEADS, LAYERS = 32, 32, 4, 2


class Problem(NamedTuple):
    """What is trained.

    Attributes:
        name: for the table.
        optimizer: from the module, `optax` or `adam_jax`, to the transformation.
        init: from a NumPy generator to float64 parameters.
        batches: from a NumPy generator and a number of steps to arrays whose first axis is the step.
        loss: of parameters and one batch.
        steps: how many.
    """

    name: str
    optimizer: Callable[[Any], Any]
    init: Callable[[np.random.Generator], Any]
    batches: Callable[[np.random.Generator, int], Any]
    loss: Callable[[Any, Any], jax.Array]
    steps: int


def trained(problem: Problem, seed: int, steps: int) -> dict[str, np.ndarray]:
    """The relative errors of the loss at each step.

    Args:
        problem: one of `PROBLEMS`.
        seed: of parameters and data.
        steps: how many.

    Returns:
        For "optax" and "adam_jax", float64 [steps].

    Example:
        >>> sorted(trained(PROBLEMS[0], seed=0, steps=2))
        ['adam_jax', 'optax']
    """
    rng = np.random.default_rng(seed)
    params, batches = problem.init(rng), problem.batches(rng, steps)
    exact = _losses(problem, optax, np.float64, params, batches)
    runs = {name: _losses(problem, module, np.float32, params, batches) for name, module in MODULES.items()}
    return {name: np.abs(losses - exact) / np.abs(exact) for name, losses in runs.items()}


def summary(found: dict[str, list[dict[str, np.ndarray]]]) -> list[dict[str, Any]]:
    """The largest error of each run, the median and the range over the seeds.

    Args:
        found: for each problem's name, what `trained` gave for each seed.

    Returns:
        For each problem: its name, and for each library "median", "least" and "most".

    Example:
        >>> rows = summary({"p": [{"optax": np.array([0.1, 0.3]), "adam_jax": np.array([0.0, 0.0])}]})
        >>> print(rows[0]["optax"]["most"])
        0.3
    """
    rows = []
    for name, runs in found.items():
        largest = {library: np.array([run[library].max() for run in runs]) for library in MODULES}
        spread = {
            library: {"median": float(np.median(x)), "least": float(x.min()), "most": float(x.max())}
            for library, x in largest.items()
        }
        rows.append({"problem": name, "seeds": len(runs), "steps": len(next(iter(runs[0].values()))), **spread})
    return rows


def figure(found: dict[str, list[dict[str, np.ndarray]]]) -> Figure:
    """The relative error so far, step by step: a line a seed.

    Args:
        found: as for `summary`.

    Returns:
        A Matplotlib figure that belongs to no window.

    Example:
        >>> len(figure({"p": [{"optax": np.array([0.1, 0.3]), "adam_jax": np.array([0.0, 1e-7])}]}).axes)
        1
    """
    drawn = Figure(figsize=(3.4 * len(found), 3.4), layout="constrained")
    axes = drawn.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (name, runs) in zip(axes, found.items(), strict=True):
        for library, style in (("optax", {"color": "tab:red", "linestyle": "--"}), ("adam_jax", {"color": "tab:blue"})):
            for i, run in enumerate(runs):
                error = np.maximum.accumulate(run[library])
                axis.plot(np.arange(1, len(error) + 1), np.maximum(error, 1e-9), label=library if i == 0 else None, **style)
        axis.set_title(name, fontsize=10)
        axis.set_yscale("log")
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss: largest relative error so far,\nfloat32 against float64")
    axes[0].legend()
    return drawn


MODULES = {"optax": optax, "adam_jax": adam_jax}


def _losses(problem: Problem, module: Any, dtype: Any, params: Any, batches: Any) -> np.ndarray:
    """Losses [steps] of a run in that dtype; JAX knows 64 bits only while one of float64 runs."""
    with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("highest"):
        tx = optax.with_extra_args_support(problem.optimizer(module))

        def cast(x: Any) -> Any:
            x = np.asarray(x)
            return jnp.asarray(x.astype(dtype) if x.dtype.kind == "f" else x.astype(np.int32))

        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            value, gradient = jax.value_and_grad(problem.loss)(params, batch)
            updates, state = tx.update(gradient, state, params, grad_fn=lambda p, _: jax.grad(problem.loss)(p, batch))
            return (optax.apply_updates(params, updates), state), value

        start = jax.tree.map(cast, params)
        run = jax.jit(lambda params, batches: jax.lax.scan(step, (params, tx.init(params)), batches)[1])
        return np.asarray(run(start, jax.tree.map(cast, batches)), np.float64)


def _digits(rng: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    data: Any = load_digits()
    rows = rng.integers(len(data.target), size=(steps, 64))
    return data.data[rows] / 16, data.target[rows]


def _net(rng: np.random.Generator) -> Any:
    sizes = (64, 128, 64, 10)
    return [(rng.normal(size=(m, n)) * (2 / m) ** 0.5, np.zeros(n)) for m, n in itertools.pairwise(sizes)]


def _net_loss(params: Any, batch: Any, bend: Callable[[jax.Array], jax.Array] = jax.nn.relu) -> jax.Array:
    x, labels = batch
    for i, (weight, bias) in enumerate(params):
        x = x @ weight + bias
        x = bend(x) if i < len(params) - 1 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def _text() -> tuple[np.ndarray, int]:
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(text))
    return np.searchsorted(alphabet, list(text)).astype(np.int32), len(alphabet)


def _windows(rng: np.random.Generator, steps: int) -> np.ndarray:
    characters, _ = _text()
    starts = rng.integers(len(characters) - CONTEXT, size=(steps, 8, 1))
    return characters[starts + np.arange(CONTEXT + 1)]


def _transformer(rng: np.random.Generator) -> Any:
    def dense(m: int, n: int) -> np.ndarray:
        return rng.normal(size=(m, n)) * m**-0.5

    _, letters = _text()
    layers = [
        {
            "attend": dense(WIDTH, 3 * WIDTH),
            "project": dense(WIDTH, WIDTH),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH),
            "scales": np.ones((2, WIDTH)),
        }
        for _ in range(LAYERS)
    ]
    ends = {"embed": dense(letters, WIDTH), "place": dense(CONTEXT, WIDTH), "out": dense(WIDTH, letters)}
    return {**ends, "layers": layers, "scale": np.ones(WIDTH)}


def _transformer_loss(p: Any, tokens: jax.Array) -> jax.Array:
    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    x = p["embed"][tokens[:, :-1]] + p["place"]
    for layer in p["layers"]:
        parts = norm(x, layer["scales"][0]) @ layer["attend"]
        q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(parts, 3, -1))
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ layer["project"]
        x = x + jax.nn.gelu(norm(x, layer["scales"][1]) @ layer["up"]) @ layer["down"]
    logits = norm(x, p["scale"]) @ p["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _masked_adamw(module: Any) -> Any:
    return module.adamw(1e-3, weight_decay=1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))


def _sam(module: Any) -> Any:
    ascent = optax.chain(contrib.normalize(), optax.sgd(0.05))
    return contrib.sam(module.adam(1e-3), ascent, sync_period=2, opaque_mode=True)


def _adam(module: Any) -> Any:
    return module.adam(1e-3)


def _problems() -> Iterator[Problem]:
    """ReLU has kinks, at which runs part that differ in a last bit; tanh has none."""
    smooth = functools.partial(_net_loss, bend=jnp.tanh)
    yield Problem("ReLU net on digits, Adam", _adam, _net, _digits, _net_loss, 300)
    yield Problem("ReLU net on digits, masked AdamW", _masked_adamw, _net, _digits, _net_loss, 300)
    yield Problem("ReLU net on digits, SAM", _sam, _net, _digits, _net_loss, 300)
    yield Problem("tanh net on digits, Adam", _adam, _net, _digits, smooth, 300)
    yield Problem("tanh net on digits, Adam, longer", _adam, _net, _digits, smooth, 2000)
    yield Problem("transformer on text, Adam", _adam, _transformer, _windows, _transformer_loss, 300)


PROBLEMS = list(_problems())
