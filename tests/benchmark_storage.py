"""Narrow moments beside published 8-bit Adams, live: `pip install ".[storage-peers]"`, `python tests/benchmark_storage.py`.

All optimizers get the same gradients, normal noise, in leaves of 4096. At some step the noise of a leaf, or of every second
coordinate of it, becomes 100 times smaller or larger; other leaves stay as they are. Every update is compared with that of
float32 moments. The peers run on CPU: torchao's compiled by PyTorch, flashoptim-jax's with `fused=False` (its kernels are
for GPUs; the authors call the two functionally identical), bitsandbytes' with its own kernels.

It prints two tables and is no test: `--at 1000 --steps 6000` sets the step of the change and the number of steps, some three
minutes.
"""

import argparse
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import adam_jax

SIZE = 4096
SECOND = np.arange(SIZE) % 2 == 0
CHANGES = {  # leaf: (factor, which coordinates change)
    "half ÷100": (0.01, SECOND),
    "half ×100": (100.0, SECOND),
    "all ÷100": (0.01, np.ones(SIZE, bool)),
    "all ×100": (100.0, np.ones(SIZE, bool)),
}
SPREADS = {"even": 0.0, "varying": 2.0}  # leaf: magnitudes are e^(spread N(0, 1)) inside it
GROUPS = [  # columns: leaf, the coordinates looked at
    *((f"{leaf}: {name}", leaf, where) for leaf in ("half ÷100", "half ×100")
      for name, where in (("they", SECOND), ("the rest", ~SECOND))),
    *((leaf, leaf, np.ones(SIZE, bool)) for leaf in ("all ÷100", "all ×100")),
]  # fmt: skip
Leaves = dict[str, np.ndarray]


class InJax:
    """An optimizer of JAX: `update` takes gradients and a state, gives what is subtracted from the params and a state."""

    def __init__(self, init: Callable[[Any], Any], update: Callable[[Any, Any], tuple[Any, Any]], like: Leaves) -> None:
        self.state = init({name: jnp.zeros(leaf.shape) for name, leaf in like.items()})
        self.update = jax.jit(update)

    def step(self, gradients: Leaves) -> Leaves:
        """What one step subtracts at a learning rate of 1."""
        updates, self.state = self.update(gradients, self.state)
        return {name: np.asarray(update) for name, update in updates.items()}

    def bytes(self) -> int:
        """Size of the state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))


class InTorch:
    """An optimizer of PyTorch, built from a list of parameters."""

    def __init__(self, build: Callable[[Any], Any], like: Leaves) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(1)  # leaves are small
        self.params = {name: self.torch.nn.Parameter(self.torch.zeros(leaf.size)) for name, leaf in like.items()}
        self.optimizer = build(list(self.params.values()))

    def step(self, gradients: Leaves) -> Leaves:
        """What one step subtracts from parameters of zero at a learning rate of 1."""
        for name, param in self.params.items():
            param.data.zero_()
            param.grad = self.torch.from_numpy(gradients[name])
        self.optimizer.step()
        return {name: -param.detach().numpy() for name, param in self.params.items()}

    def bytes(self) -> int:
        """Size of the state, the parts of quantised tensors included."""
        tensors = [x for state in self.optimizer.state.values() for x in state.values() if self.torch.is_tensor(x)]
        parts = [getattr(x, name) for x in tensors for name in getattr(x, "tensor_attrs", ())]
        plain = [x for x in tensors if not hasattr(x, "tensor_attrs")]
        return sum(x.numel() * x.element_size() for x in parts + plain)


def ours(storage: Any) -> Callable[[Leaves], InJax]:
    """`scale_by_adam` with its moments kept so."""
    tx = adam_jax.scale_by_adam(storage=storage)
    return lambda like: InJax(tx.init, tx.update, like)


def torchao(name: str) -> Callable[[Leaves], InTorch]:
    """One of torchao's optimizers."""
    build = getattr(importlib.import_module("torchao.optim"), name)
    return lambda like: InTorch(lambda params: build(params, lr=1.0), like)


def bitsandbytes() -> Callable[[Leaves], InTorch]:
    """Adam8bit of bitsandbytes."""
    build = importlib.import_module("bitsandbytes").optim.Adam8bit
    return lambda like: InTorch(lambda params: build(params, lr=1.0), like)


def flashoptim() -> Callable[[Leaves], InJax]:
    """Flash Adam with float32 weights, outside of its GPU kernel."""
    tx = importlib.import_module("flashoptim_jax").flash_adam(1.0, fused=False, master_weight_bits=None)

    def update(gradients: Any, state: Any) -> tuple[Any, Any]:
        params, state = tx.step(jax.tree.map(jnp.zeros_like, gradients), state, gradients)
        return jax.tree.map(jnp.negative, params), state

    return lambda like: InJax(tx.init, update, like)


OPTIMIZERS: dict[str, Callable[[], Callable[[Leaves], InJax | InTorch]]] = {
    "adam_jax float32": lambda: ours(None),
    "adam_jax bfloat16": lambda: ours("bfloat16"),
    "adam_jax int8": lambda: ours("int8"),
    "torchao Adam8bit": lambda: torchao("Adam8bit"),
    "torchao AdamFp8": lambda: torchao("AdamFp8"),
    "torchao Adam4bit": lambda: torchao("Adam4bit"),
    "bitsandbytes Adam8bit": bitsandbytes,
    "flashoptim-jax flash_adam": flashoptim,
}


def gradients(at: int, steps: int) -> Iterator[Leaves]:
    """The noise of every step, the same each time it is asked for."""
    scales = {name: np.exp(spread * np.random.default_rng(9).normal(size=SIZE)) for name, spread in SPREADS.items()}
    for t in range(steps):
        noise = np.random.default_rng([0, t]).normal(size=SIZE)
        leaves = {name: noise * np.where(which & (t >= at), factor, 1.0) for name, (factor, which) in CHANGES.items()}
        leaves |= {name: noise * scale for name, scale in scales.items()}
        yield {name: leaf.astype(np.float32) for name, leaf in leaves.items()}


def measure(optimizer: Any, reference: Any, at: int, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ratios of rms updates to float32's at every step from the change on, and NMSE of unchanged leaves at every step."""
    ratios, errors = ({name: [] for name, *_ in GROUPS}, {name: [] for name in SPREADS})
    for t, leaves in enumerate(gradients(at, steps)):
        mine, exact = optimizer.step(leaves), reference.step(leaves)
        if t >= at:
            for name, leaf, which in GROUPS:
                ratios[name].append(_rms(mine[leaf][which]) / _rms(exact[leaf][which]))
        for name in SPREADS:
            errors[name].append((_rms(mine[name] - exact[name]) / _rms(exact[name])) ** 2)
    return (*({name: np.array(values) for name, values in found.items()} for found in (ratios, errors)),)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))


def bytes_a_parameter(make: Callable[[Leaves], Any], size: int = 1 << 20) -> float:
    """Bytes of state for a leaf of a million parameters, after a step."""
    optimizer = make({"w": np.zeros(size)})
    optimizer.step({"w": np.ones(size, np.float32)})
    return optimizer.bytes() / size


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, default=1000, help="the step of the change")
    parser.add_argument("--steps", type=int, default=6000)
    plan = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # PyTorch's, of its compiler's cache
    follow = Table(title=f"rms update beside float32's, at the worst of {plan.steps - plan.at} later steps → the last 100")
    safe = Table(title="NMSE of the update against float32's: mean of the last 500 steps, worst of all")
    errors = [f"{name}{at}" for name in SPREADS for at in ("", ", worst")]
    for table, columns in ((follow, [name for name, *_ in GROUPS]), (safe, [*errors, "bytes a parameter"])):
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
    for name, build in OPTIMIZERS.items():
        try:
            make = build()
        except ModuleNotFoundError as error:
            for table in (follow, safe):
                table.add_row(name, f"not installed: {error.name}")
            continue
        leaves = next(gradients(0, 1))
        ratios, errors = measure(make(leaves), ours(None)(leaves), plan.at, plan.steps)
        worst = {name: values[np.abs(np.log(values)).argmax()] for name, values in ratios.items()}
        follow.add_row(name, *(f"{worst[name]:.3g} → {values[-100:].mean():.3g}" for name, values in ratios.items()))
        found = [f"{error:.1e}" for values in errors.values() for error in (values[-500:].mean(), values.max())]
        safe.add_row(name, *found, f"{bytes_a_parameter(make):.3f}")
    for table in (follow, safe):
        Console(width=125).print(table)


if __name__ == "__main__":
    main()
