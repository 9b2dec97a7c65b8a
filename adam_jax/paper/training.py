"""Training one optimizer at many settings and seeds: `vmap` over settings, `lax.scan` over seeds and minibatches.

All settings of one seed see the same minibatches and the same noise, so that curves differ by their settings alone. What
was done is written to a folder from time to time; a run that was interrupted goes on from there.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax.paper import methods
from adam_jax.paper.formats import DataError
from adam_jax.paper.problems import Problem
from adam_jax.paper.saved import Store, fingerprint

__all__ = ["Curves", "Job", "train"]

SAVE_EVERY = 30.0  # seconds between two writings of unfinished work


@dataclass(frozen=True)
class Job:
    """One optimizer to train."""

    name: str  # a file name for its unfinished work
    method: str  # a key of `methods.METHODS`
    problem: Problem  # what to minimise
    x: np.ndarray = field(repr=False)  # features [n, ...]
    y: np.ndarray = field(repr=False)  # labels [n]
    grid: Mapping[str, np.ndarray]  # arrays [g] of settings, "alpha" and others, trained side by side
    seeds: tuple[int, ...]  # each draws parameters, minibatches and noise
    epochs: int  # passes over the data
    batch: int = 128  # examples in a minibatch; what is left over at the end of a pass is left out
    # points of the curve in each epoch. Minibatches beyond a multiple of it are left out of that pass; which examples
    # are in them is drawn anew for each
    records: int = 10
    annealed: bool = False  # take alpha / sqrt(t)
    apart: bool = False  # train settings and seeds one after another, so that each one's time is its own

    @property
    def steps(self) -> tuple[int, int]:
        """Points of the curve in an epoch, and minibatches averaged for each."""
        batches = len(self.x) // self.batch
        if batches < 1:
            raise DataError(f"{len(self.x)} examples do not fill a minibatch of {self.batch}")
        records = min(self.records, batches)
        return records, batches // records

    @property
    def width(self) -> int:
        """How many parameter vectors are trained side by side."""
        return len(self.seeds) * len(next(iter(self.grid.values())))

    @property
    def work(self) -> int:
        """Steps of one parameter vector in the whole job."""
        records, length = self.steps
        return self.epochs * records * length * self.width

    def settings(self) -> dict[str, Any]:
        """What identifies the job, for the record and for going on with it."""
        grid = {name: [float(value) for value in values] for name, values in self.grid.items()}
        plain = {name: getattr(self, name) for name in ("method", "seeds", "epochs", "batch", "annealed", "records")}
        return plain | {"problem": self.problem.settings, "grid": grid, "data": fingerprint(self.x, self.y)}


@dataclass(frozen=True)
class Curves:
    """What was measured."""

    costs: np.ndarray  # mean training cost of the minibatches between two points, [seeds, settings, points]
    passes: np.ndarray  # passes over the data at each point, [points]
    seconds: np.ndarray  # time spent training one setting of one seed until each point, compilation left out, [points]

    @property
    def last(self) -> np.ndarray:
        """The cost over the last epoch, or over the last point where there are fewer, [seeds, settings]; inf if diverged."""
        cost = self.costs[..., self.passes > self.passes[-1] - 1 + 1e-9].mean(-1)
        return np.where(np.isfinite(cost), cost, np.inf)


def train(
    job: Job,
    *,
    advance: Callable[[int], None] = lambda _: None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Curves:
    """Train every setting and seed of a job.

    Args:
        job: what to train.
        advance: called with the number of steps done since it was last called.
        folder: where unfinished work is kept, and gone on with where it agrees; nowhere if None.
        say: called with a line about unfinished work that does not agree; it is put aside.

    Returns:
        The curves.

    Raises:
        DataError: where there are too few examples, or unfinished work is a link.
        KeyboardInterrupt: after Ctrl-C, with the work so far saved.

    Example:
        >>> import numpy as np
        >>> from adam_jax.paper import problems
        >>> x, y = np.eye(4, dtype=np.uint8) * 255, np.arange(4, dtype=np.int32)
        >>> job = Job("demo", "adam", problems.logistic(4, 4), x, y, {"alpha": np.array([0.1, 1.0])}, (0,), 3, batch=2)
        >>> train(job).costs.shape
        (1, 2, 6)
    """
    if job.width > 1 and (job.apart or not job.problem.loops):
        return _one_by_one(job, advance, folder, say)
    records, length = job.steps
    state, costs, seconds, store = _start(job), [], [], None
    if folder:
        leaves, structure = jax.tree.flatten(state)
        shape = (len(job.seeds), job.width // len(job.seeds))
        store = Store(folder / f"{job.name}.work", job.settings(), leaves, shape, job.epochs * records, say)
        if found := store.load():
            costs, seconds = list(found[0]), found[1].tolist()
            state = jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in found[2] or leaves])
    advance(len(costs) * length * job.width)
    if len(costs) < job.epochs * records:
        _go_on(job, state, costs, seconds, advance, store)
    passes = (np.arange(job.epochs * records) + 1) / records
    return Curves(np.stack(costs, -1), passes, np.cumsum(seconds) / job.width)


def _one_by_one(job: Job, advance: Callable[[int], None], folder: Path | None, say: Callable[[str], None]) -> Curves:
    """Every setting and seed as a job of its own; the seconds are the mean over them."""
    parts = []
    for seed in job.seeds:
        for g in range(job.width // len(job.seeds)):
            grid = {name: values[g : g + 1] for name, values in job.grid.items()}
            part = replace(job, name=f"{job.name}-{g}-{seed}", grid=grid, seeds=(seed,))
            parts.append(train(part, advance=advance, folder=folder, say=say))
    costs = np.stack([part.costs[0, 0] for part in parts]).reshape(len(job.seeds), -1, parts[0].costs.shape[-1])
    return Curves(costs, parts[0].passes, np.mean([part.seconds for part in parts], 0))


def _go_on(job: Job, state: Any, costs: list, seconds: list, advance: Callable[[int], None], store: Store | None) -> None:
    """Train from the point that the lists have reached to the end, adding to them."""
    records, length = job.steps
    x, y = jnp.asarray(job.x), jnp.asarray(job.y)
    rows, keys = _epoch(job, len(costs) // records)
    maker = _Maker(job.method, job.annealed)
    run = _compiled(job.problem, maker, (state, x, y), (rows[:, 0], keys[:, 0]))
    saved = time.monotonic()
    with _interruptible() as interrupted:
        for point in range(len(costs), job.epochs * records):
            if point % records == 0:
                rows, keys = _epoch(job, point // records)
            begin = time.perf_counter()
            state, cost = run(state, x, y, rows[:, point % records], keys[:, point % records])
            costs.append(np.asarray(cost, np.float32))
            seconds.append(time.perf_counter() - begin)
            advance(length * job.width)
            finished, stop = point + 1 == job.epochs * records, interrupted.is_set()
            if store and (finished or stop or time.monotonic() - saved > SAVE_EVERY):
                store.save(costs, seconds, jax.tree.leaves(state))
                saved = time.monotonic()
            if stop:  # what was saved is all there is
                break


@dataclass(frozen=True)
class _Maker:
    """Builds the optimizer from traced settings; equal makers share one compiled function."""

    method: str
    annealed: bool

    def __call__(self, hyper: Mapping[str, jax.Array]) -> optax.GradientTransformationExtraArgs:
        return methods.make(self.method, hyper, annealed=self.annealed)


def _start(job: Job) -> Any:
    """Settings [settings], then parameters and optimizer states [seeds, settings, ...]."""
    grid = {name: jnp.asarray(values, jnp.float32) for name, values in job.grid.items()}
    drawn = [_draw(job.problem.init, jax.random.key(seed)) for seed in job.seeds]
    return grid, _begin(_Maker(job.method, job.annealed), grid, jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn))


@partial(jax.jit, static_argnums=0)
def _draw(init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
    return init(key)  # on its own, because compiling it takes longer than the rest: once a problem


@partial(jax.jit, static_argnums=0)
def _begin(make: _Maker, grid: Any, params: Any) -> Any:
    def one(hyper: Any, params: Any) -> Any:
        return params, make(hyper).init(params)

    return jax.vmap(lambda params: jax.vmap(one, (0, None))(grid, params))(params)


def _epoch(job: Job, epoch: int) -> tuple[np.ndarray, jax.Array]:
    """Rows of the data [seeds, points, length, batch] and keys [seeds, points, length], fixed by seed and epoch."""
    records, length = job.steps
    rows = [
        np.random.default_rng([seed, epoch]).permutation(len(job.x))[: records * length * job.batch] for seed in job.seeds
    ]
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch + 1), records * length) for seed in job.seeds]
    shape = (len(job.seeds), records, length)
    return np.stack(rows).astype(np.int32).reshape(*shape, job.batch), jnp.stack(keys).reshape(shape)


_COMPILED: dict[Any, Callable[..., Any]] = {}


def _compiled(problem: Problem, make: _Maker, carried: Any, batches: Any) -> Callable[..., Any]:
    """The segment's executable, compiled once for each problem, optimizer and shapes, outside of what is timed."""
    leaves, structure = jax.tree.flatten((carried, batches))
    mark = (problem.cost, make, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if mark not in _COMPILED:
        if len(_COMPILED) >= 16:  # executables are large, and figures come one after another
            _COMPILED.pop(next(iter(_COMPILED)))
        _COMPILED[mark] = _segment_of(problem, make, carried, batches)
    return _COMPILED[mark]


def _segment_of(problem: Problem, make: _Maker, carried: Any, batches: Any) -> Callable[..., Any]:
    """Train on rows [seeds, length, batch] with keys [seeds, length]; returns the state and mean costs [seeds, settings]."""

    def step(grid: Any, x: Any, y: Any, trained: Any, batch: Any) -> Any:
        row, key = batch
        return jax.vmap(partial(_update, problem.cost, make, x[row], y[row], key))(grid, *trained)

    def scanned(state: Any, x: Any, y: Any, rows: Any, keys: Any) -> Any:
        grid, trained = state

        def seed(part: Any) -> Any:
            trained, batches = part
            return jax.lax.scan(partial(step, grid, x, y), trained, batches)

        trained, costs = jax.lax.map(seed, (trained, (rows, keys)))  # one seed at a time: what it trains stays in the cache
        return (grid, trained), costs.mean(1)

    if problem.loops:
        return jax.jit(scanned, donate_argnums=0).lower(*carried, *batches).compile()

    def once(state: Any, x: Any, y: Any, rows: Any, keys: Any) -> Any:
        grid, trained = state
        trained, cost = jax.vmap(partial(step, grid, x, y))(trained, (rows, keys))
        return (grid, trained), cost

    one = jax.jit(once, donate_argnums=0).lower(*carried, *(part[:, 0] for part in batches)).compile()

    def stepped(state: Any, x: Any, y: Any, rows: Any, keys: Any) -> Any:
        costs = []
        for k in range(rows.shape[1]):
            state, cost = one(state, x, y, rows[:, k], keys[:, k])
            costs.append(np.asarray(cost))
        return state, np.mean(costs, 0)

    return stepped


def _update(cost_of: Any, make: _Maker, x: Any, y: Any, key: Any, hyper: Any, params: Any, opt_state: Any) -> Any:
    """One step of one setting."""

    def cost(params: Any) -> jax.Array:
        return cost_of(params, x, y, key)

    value, gradient = jax.value_and_grad(cost)(params)
    updates, opt_state = make(hyper).update(gradient, opt_state, params, value=value, grad=gradient, value_fn=cost)
    return (optax.apply_updates(params, updates), opt_state), value


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of cutting a point in two, and is raised at the end; a second one is raised at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(signum: int, frame: Any) -> None:
        del signum, frame
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
    if event.is_set():  # also where it came after the last look at it
        raise KeyboardInterrupt
