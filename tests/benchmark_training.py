"""Training with moments in float32, bfloat16 and int8: `python tests/benchmark_training.py [--quick] [--data DIR]`.

Three problems: logistic regression on film reviews (the paper's Figure 1b), the net with dropout on handwritten digits
(Figure 2a), and a transformer on the characters of Python's own documentation. All moments of a seed start from the same
parameters and see the same minibatches and the same dropout, so their costs are compared seed by seed. The table has the
mean training cost of the last tenth of the steps, over the seeds, and the difference from float32's. It is no test: judge by
what it prints. The full length takes a quarter of an hour on two cores; `--quick` is too short to judge by.
"""

import argparse
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import adam_jax
from adam_jax.paper import data, problems

MOMENTS = ("float32", "bfloat16", "int8")
CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: for the table.
        init: from a key to parameters.
        cost: from parameters, the examples of a minibatch and a key to a scalar.
        examples: from the data and indices [batch] to a minibatch.
        data: arrays.
        size: how many examples there are to draw from.
        rate: the learning rate, or its schedule.
        steps: how many.
        batch: examples in a minibatch.
    """

    name: str
    init: Callable[[jax.Array], Any]
    cost: Callable[[Any, Any, jax.Array], jax.Array]
    examples: Callable[[Any, jax.Array], Any]
    data: Any
    size: int
    rate: Any
    steps: int
    batch: int

    def rows(self, seed: int) -> np.ndarray:
        """Minibatches [steps, batch]: passes over the data, each in an order of its own."""
        whole = self.size // self.batch
        passes = -(-self.steps // whole)
        orders = [np.random.default_rng([seed, e]).permutation(self.size)[: whole * self.batch] for e in range(passes)]
        return np.concatenate(orders).reshape(-1, self.batch)[: self.steps].astype(np.int32)


def figure(name: str, problem: problems.Problem, found: data.Dataset, rate: Any, steps: int) -> Task:
    """One of the paper's problems."""
    return Task(
        f"{name}: {found.name}", problem.init, lambda p, batch, key: problem.cost(p, *batch, key),
        lambda d, rows: (d[0][rows], d[1][rows]), (found.x, found.y), len(found.x), rate, steps, batch=128,
    )  # fmt: skip


def transformer(steps: int) -> Task:
    """Two layers, four heads, 64 wide, 64 characters of context; next-character prediction."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    alphabet = sorted(set(text))
    characters = np.searchsorted(alphabet, list(text)).astype(np.int32)

    def dense(key: jax.Array, m: int, n: int) -> jax.Array:
        return jax.random.normal(key, (m, n)) * m**-0.5

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
        layers = [
            {"attend": dense(next(keys), WIDTH, 3 * WIDTH), "project": dense(next(keys), WIDTH, WIDTH),
             "up": dense(next(keys), WIDTH, 4 * WIDTH), "down": dense(next(keys), 4 * WIDTH, WIDTH),
             "scales": jnp.ones((2, WIDTH))}
            for _ in range(LAYERS)
        ]  # fmt: skip
        embed, place = (0.1 * jax.random.normal(next(keys), (n, WIDTH)) for n in (len(alphabet), CONTEXT))
        out = dense(next(keys), WIDTH, len(alphabet))
        return {"embed": embed, "place": place, "layers": layers, "scale": jnp.ones(WIDTH), "out": out}

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def cost(p: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        del key
        x = p["embed"][tokens[:, :-1]] + p["place"]
        for layer in p["layers"]:
            parts = norm(x, layer["scales"][0]) @ layer["attend"]
            q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in jnp.split(parts, 3, -1))
            x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ layer["project"]
            x = x + jax.nn.gelu(norm(x, layer["scales"][1]) @ layer["up"]) @ layer["down"]
        logits = norm(x, p["scale"]) @ p["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def windows(d: jax.Array, starts: jax.Array) -> jax.Array:
        return d[starts[:, None] + jnp.arange(CONTEXT + 1)]

    name = f"transformer: {len(text):,} characters"
    return Task(name, init, cost, windows, characters, len(characters) - CONTEXT, 1e-3, steps, batch=16)


def tasks(where: data.Where, *, quick: bool) -> Iterator[Task]:
    """The three problems, made one at a time because their data are large."""
    reviews = data.imdb(where, reviews=2000 if quick else None)
    bag = problems.logistic(reviews.x.shape[1], 2, noise=0.5, scale=1.0)
    yield figure("fig1b", bag, reviews, adam_jax.inverse_sqrt_decay(0.03), 60 if quick else 1950)
    digits = data.mnist(where)
    yield figure("fig2a", problems.perceptron(784, 10), digits, 1e-3, 30 if quick else 936)
    yield transformer(60 if quick else 1200)


def trained(task: Task, moments: str, seeds: range) -> tuple[np.ndarray, str]:
    """Training costs [seeds, steps], and what the state is made of."""
    tx = adam_jax.adam(task.rate, storage=moments)
    params = jax.eval_shape(task.init, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    narrow = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params)[0].mu) if leaf.dtype == jnp.bfloat16)
    made_of = f"{adam_jax.state_bytes(tx, params) / size:.2f} bytes, {narrow / size:.1%} narrow"

    @jax.jit
    def run(key: jax.Array, rows: jax.Array, arrays: Any) -> jax.Array:
        def step(carry: Any, now: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            row, key = now
            value, gradient = jax.value_and_grad(task.cost)(params, task.examples(arrays, row), key)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        params = task.init(jax.random.fold_in(key, 0))
        keys = jax.random.split(jax.random.fold_in(key, 1), len(rows))
        return jax.lax.scan(step, (params, tx.init(params)), (rows, keys))[1]

    arrays = jax.tree.map(jnp.asarray, task.data)
    keys = [jax.random.key(seed, impl="unsafe_rbg") for seed in seeds]  # cheap dropout
    return np.stack([run(key, task.rows(seed), arrays) for key, seed in zip(keys, seeds, strict=True)]), made_of


def main() -> None:
    """Print the table, and write the curves where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute or two; too short to judge by")
    parser.add_argument("--data", type=Path, help="folder with MNIST's and IMDB's files; default: installed packages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="NAME", help="fig1b, fig2a or transformer")
    parser.add_argument("--out", type=Path, help="write all costs to this .npz file")
    plan = parser.parse_args()
    where = data.Where(plan.data) if plan.data else data.Where(source="package")
    table = Table(title="training cost of the last tenth of the steps, mean ± standard deviation over seeds")
    for column in ("problem", "moments", "state a parameter", "cost", "less float32's", "s"):
        table.add_column(column, justify="left" if column in ("problem", "moments") else "right")
    curves = {}
    for task in tasks(where, quick=plan.quick):
        if not task.name.startswith(plan.only):
            continue
        finals = {}
        for moments in MOMENTS:
            begin = time.perf_counter()
            costs, made_of = trained(task, moments, range(plan.seeds))
            curves[f"{task.name}, {moments}"] = costs
            final = finals[moments] = costs[:, -task.steps // 10 :].mean(1)
            apart = final - finals["float32"]
            title = f"{task.name}, {task.steps:,} steps" if moments == "float32" else ""
            spread = [values.std(ddof=1) if plan.seeds > 1 else np.nan for values in (final, apart)]
            table.add_row(
                title, moments, made_of, f"{final.mean():.4f} ± {spread[0]:.4f}",
                f"{apart.mean():+.5f} ± {spread[1]:.5f}", f"{time.perf_counter() - begin:.0f}",
            )  # fmt: skip
            if plan.out:
                np.savez(plan.out, **curves)
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
