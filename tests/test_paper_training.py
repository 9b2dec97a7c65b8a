"""The engine of the experiments against plain loops, and unfinished work."""

import os
import signal
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.paper import problems, training
from adam_jax.paper.formats import DataError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (40, 6), dtype=np.uint8)
Y = RNG.integers(0, 3, 40).astype(np.int32)


def _job(**changes) -> training.Job:
    settings = {
        "name": "job",
        "method": "adam",
        "problem": problems.logistic(6, 3, noise=0.25),
        "x": X,
        "y": Y,
        "grid": {"alpha": np.array([0.01, 0.1])},
        "seeds": (3, 4),
        "epochs": 3,
        "batch": 8,
        "records": 2,
        "annealed": True,
    }
    return training.Job(**settings | changes)


def test_side_by_side_equals_one_after_another():
    """Grid and seeds under vmap against a Python loop of jitted steps, with Adam at alpha / sqrt(t)."""
    job = _job()
    curves = training.train(job)
    rows, keys = training._epoch(job, 0)
    for s, seed in enumerate(job.seeds):
        for g, alpha in enumerate(job.grid["alpha"]):
            tx = adam_jax.adam(adam_jax.inverse_sqrt_decay(float(alpha)))
            params = job.problem.init(jax.random.key(seed))
            state, costs = tx.init(params), []
            step = jax.jit(jax.value_and_grad(job.problem.cost))
            for row, key in zip(rows[s].reshape(-1, 8), keys[s].reshape(-1), strict=True):
                cost, gradient = step(params, X[row], Y[row], key)
                updates, state = tx.update(gradient, state, params)
                params = optax.apply_updates(params, updates)
                costs.append(cost)
            expected = np.mean(np.reshape(costs, (2, -1)), 1)
            np.testing.assert_allclose(curves.costs[s, g, :2], expected, rtol=2e-6)  # float32, four steps, other order


def test_a_problem_that_may_not_stand_in_a_loop_is_trained_the_same():
    job = _job()
    apart = training.train(replace(job, problem=replace(job.problem, loops=False)))
    np.testing.assert_allclose(apart.costs, training.train(job).costs, rtol=1e-5)


def test_an_epoch_visits_no_example_twice():
    rows, _ = training._epoch(_job(), 1)
    assert all(len(set(seed.ravel())) == seed.size for seed in rows)


def test_interrupted_work_goes_on_bit_for_bit(tmp_path):
    job = _job()
    straight = training.train(job)
    done = []

    def interrupt(steps: int) -> None:
        done.append(steps)
        if len(done) == 4:  # the first call tells of what was loaded
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(job, advance=interrupt, folder=tmp_path)
    assert len(done) == 4
    again = []
    resumed = training.train(job, advance=again.append, folder=tmp_path)
    assert again[0] == sum(done)
    np.testing.assert_array_equal(resumed.costs, straight.costs)
    assert sum(again) == job.work


def test_finished_work_is_not_done_again(tmp_path):
    first = training.train(_job(), folder=tmp_path)
    steps = []
    second = training.train(_job(), advance=steps.append, folder=tmp_path)
    assert len(steps) == 1
    np.testing.assert_array_equal(first.costs, second.costs)


def _one_example_changed() -> np.ndarray:
    x = X.copy()
    x[17, 3] ^= 1
    return x


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 4},
        {"x": 255 - X},
        {"x": _one_example_changed()},
        {"y": Y[::-1].copy()},
        {"problem": problems.logistic(6, 3, noise=0.5)},
        {"problem": problems.logistic(6, 3, noise=0.25, scale=1.0)},
    ],
    ids=["epochs", "all of x", "one of x", "y", "noise", "scale"],
)
def test_work_of_other_settings_or_data_is_kept_and_not_used(tmp_path, other):
    training.train(_job(epochs=1), folder=tmp_path)
    before, lines = (tmp_path / "job.work").read_bytes(), []
    found = training.train(_job(**{"epochs": 1} | other), folder=tmp_path, say=lines.append)
    np.testing.assert_array_equal(found.costs, training.train(_job(**{"epochs": 1} | other)).costs)
    assert (tmp_path / "job-old1.work").read_bytes() == before
    assert "other settings, data or versions" in lines[0]
    assert "job-old1.work" in lines[0]


def test_a_diverged_setting_counts_as_infinitely_costly():
    curves = training.train(_job(method="sgd", grid={"alpha": np.array([0.1, 1e38])}, annealed=False))
    assert np.isfinite(curves.last[:, 0]).all()
    assert np.isinf(curves.last[:, 1]).all()


def test_too_few_examples_for_a_minibatch_are_an_error():
    with pytest.raises(DataError, match="40 examples do not fill a minibatch of 64"):
        training.train(_job(batch=64))


def test_an_interrupt_after_the_last_point_is_not_lost():
    def work() -> None:
        with training._interruptible() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.wait(10)  # no one looks at it any more

    with pytest.raises(KeyboardInterrupt):
        work()
