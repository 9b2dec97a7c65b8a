"""What was measured arrives, unchanged, where people look: a table, CSV, Parquet, TensorBoard."""

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.watch import Recorder, record

TX = adam_jax.adam(1e-2)
WATCH = adam_jax.watch_adam("square", learning_rate=1e-2)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12), "b": jnp.zeros(3)}


@jax.jit
def _scan(params):
    def step(carry, seed):
        params, state = carry
        g = jax.tree.map(lambda p: 2 * p + jax.random.normal(jax.random.key(seed), p.shape), params)
        updates, state = TX.update(g, state, params)
        return (optax.apply_updates(params, updates), state), WATCH(state, g, params, updates)

    return jax.lax.scan(step, (params, TX.init(params)), jnp.arange(6))[1]


@pytest.fixture(scope="module")
def history():
    return jax.device_get(_scan(PARAMS))


@pytest.fixture(scope="module")
def steps(history):
    return [jax.tree.map(lambda x, i=i: x[i], history) for i in range(6)]


def test_csv_parquet_and_events_hold_the_numbers_recorded(tmp_path, steps):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pq = pytest.importorskip("pyarrow.parquet")
    settings = {"csv": tmp_path / "a.csv", "parquet": tmp_path / "a.parquet", "tensorboard": tmp_path / "events"}
    with Recorder(every=2, leaves=True, **settings) as recorder:
        for step, seen in enumerate(steps):
            recorder(step, seen, loss=step / 2)
    expected = [{"step": step, "loss": step / 2, **record(steps[step], leaves=True)} for step in (0, 2, 4)]
    assert recorder.rows == expected
    assert expected[1]["['b']/snr_q50"] == steps[2].leaves["['b']"].snr_quantiles[2]
    with (tmp_path / "a.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == expected
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    seen = events.Scalars("adam/snr_mean")
    assert [event.step for event in seen] == [0, 2, 4]
    np.testing.assert_allclose([event.value for event in seen], [row["snr_mean"] for row in expected], rtol=1e-6)
    assert sum(events.Histograms("adam/snr")[0].histogram_value.bucket) == 15


def test_the_table_shows_the_last_records(steps, monkeypatch):
    import rich

    console = rich.get_console()
    monkeypatch.setattr(console, "file", io.StringIO())
    monkeypatch.setattr(console, "_width", 80)
    with Recorder(every=1, table=True) as recorder:
        for step, seen in enumerate(steps):
            recorder(step, seen, loss=1e-5 * step)
    shown = console.file.getvalue()
    assert "…" not in shown  # nothing is cut off in a terminal of 80 columns
    assert "snr_mean" in shown
    assert f"{recorder.rows[-1]['snr_mean']:.4g}" in shown


def test_what_cannot_be_written_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Recorder(every=0)
    recorder = Recorder(every=1)
    recorder(0, steps[0])
    with pytest.raises(ValueError, match=r"scalars must be the same at every step, got \['loss'\] at some only"):
        recorder(1, steps[0], loss=1.0)
    (tmp_path / "there.csv").write_text("mine")
    for name in ("csv", "parquet"):
        with pytest.raises(FileExistsError, match=r"there\.csv"):
            Recorder(**{name: tmp_path / "there.csv"})
