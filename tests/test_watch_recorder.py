"""What was measured arrives, unchanged, where people look: a table, CSV, Parquet, TensorBoard; and nothing of it is lost."""

import contextlib
import csv
import io
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.watch import Recorder, record, watch_adam

pq = pytest.importorskip("pyarrow.parquet")

TX = adam_jax.adam(1e-2)
WATCH = watch_adam(1e-2)
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
def steps():
    history = jax.device_get(_scan(PARAMS))
    return [jax.tree.map(lambda x, i=i: x[i], history) for i in range(6)]


def _read(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _files(folder):
    return {"csv": folder / "a.csv", "parquet": folder / "a.parquet"}


def _run(steps, first, last, **settings):
    with Recorder(every=1, **settings) as recorder:
        for step in range(first, last):
            recorder(step, steps[step], loss=step / 2)
    return recorder.rows


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_csv_parquet_and_events_hold_the_numbers_recorded(tmp_path, steps):
    with Recorder(every=2, leaves=True, **_files(tmp_path), tensorboard=tmp_path / "events") as recorder:
        for step, seen in enumerate(steps):
            recorder(step, seen, loss=step / 2)
    expected = [{"step": step, "loss": step / 2, **record(steps[step], leaves=True)} for step in (0, 2, 4)]
    assert recorder.rows == expected
    assert expected[1]["['b']/snr_q50"] == steps[2].leaves["['b']"].snr_quantiles[2]
    assert _read(tmp_path / "a.csv") == expected
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected
    seen = _events(tmp_path / "events").Scalars("adam/snr_mean")
    assert [event.step for event in seen] == [0, 2, 4]
    np.testing.assert_allclose([event.value for event in seen], [row["snr_mean"] for row in expected], rtol=1e-6)
    assert sum(_events(tmp_path / "events").Histograms("adam/snr")[0].histogram_value.bucket) == 15


def test_a_resumed_run_goes_on_in_its_files(tmp_path, steps):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    rows = _run(steps, 0, 6, **_files(whole), tensorboard=whole / "events")
    _run(steps, 0, 5, **_files(parts), tensorboard=parts / "events")
    _run(steps, 3, 6, **_files(parts), tensorboard=parts / "events")  # from a checkpoint: steps 3 and 4 once more
    assert (parts / "a.csv").read_bytes() == (whole / "a.csv").read_bytes()
    assert pq.read_table(parts / "a.parquet").to_pylist() == pq.read_table(whole / "a.parquet").to_pylist() == rows
    seen = [[(e.step, e.value) for e in _events(folder / "events").Scalars("adam/loss")] for folder in (whole, parts)]
    assert seen[0] == seen[1]


def test_a_run_killed_while_it_writes_is_resumed_behind_its_last_whole_record(tmp_path, steps):
    _run(steps, 0, 4, csv=tmp_path / "a.csv")
    whole = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "a.csv").write_bytes(whole[:-30])
    _run(steps, 3, 4, csv=tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == whole


def test_another_run_is_not_written_over(tmp_path, steps):
    _run(steps, 0, 3, **_files(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, path in _files(tmp_path).items():
        with pytest.raises(FileExistsError, match=f"{name} must not hold another run, from step 0 on"):
            _run(steps, 0, 3, **{name: path})
        with (
            Recorder(every=1, **{name: path}) as recorder,
            pytest.raises(ValueError, match=rf"{name} must have the columns recorded now, .* differs in \['loss'\]"),
        ):
            recorder(4, steps[4])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_recorders_do_not_write_one_file(tmp_path, steps):
    for name, path in _files(tmp_path).items():
        with Recorder(every=1, **{name: path}) as recorder:
            with pytest.raises(FileExistsError, match=f"{name} must name a file that no other Recorder is writing"):
                Recorder(**{name: path})
            recorder(0, steps[0])
    assert len(_read(tmp_path / "a.csv")) == pq.read_table(tmp_path / "a.parquet").num_rows == 1


def test_after_a_full_disk_the_csv_holds_whole_records_only(tmp_path, steps):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Recorder(every=1, csv=tmp_path / "a.csv") as recorder:
        for step, is_full in enumerate((True, False, True, False)):  # neither the header nor the second row finds room
            room = (tmp_path / "a.csv").stat().st_size + 10
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]) if is_full else limits)
                with pytest.raises(OSError, match="could not be written") if is_full else contextlib.nullcontext():
                    recorder(step, steps[step], loss=0.0)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _read(tmp_path / "a.csv") == recorder.rows
    assert [row["step"] for row in recorder.rows] == [1, 3]


def test_nothing_is_recorded_or_lost_after_the_end(tmp_path, steps):
    recorder = Recorder(every=1, **_files(tmp_path))
    recorder(0, steps[0])
    recorder.close()
    recorder.close()
    with pytest.raises(ValueError, match="this Recorder was closed and records no more: make another"):
        recorder(1, steps[1])
    assert len(_read(tmp_path / "a.csv")) == pq.read_table(tmp_path / "a.parquet").num_rows == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_shows_the_last_records(steps, monkeypatch, is_terminal):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=80, force_terminal=is_terminal, _environ={"TERM": "xterm"})
    monkeypatch.setattr("rich._console", console)
    with Recorder(every=1, table=True) as recorder:
        for step, seen in enumerate(steps):
            recorder(step, seen, loss=1e-5 * step)
    shown = console.file.getvalue()
    assert "…" not in shown  # nothing is cut off in a terminal of 80 columns
    assert f"{recorder.rows[-1]['snr_mean']:.4g}" in shown
    assert shown.count("snr_mean") == (6 + 1 if is_terminal else 1)  # outside a terminal, once
    assert shown.endswith("\n") or is_terminal


def test_what_cannot_be_recorded_is_refused(steps):
    recorder = Recorder(every=2)
    recorder(0, steps[0])
    recorder(jnp.int32(2), steps[0])
    assert type(recorder.rows[-1]["step"]) is int
    for scalars, message in (
        ({"loss": 1.0}, r"scalars must be the same at every step, got \['loss'\] at some only"),
        ({"count": 1.0, "learning_rate": 1.0}, r"names that the diagnostics do not have, got \['count', 'learning_rate'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            recorder(4, steps[0], **scalars)
    for loss in ("0.1", None, 1j, np.ones(2)):
        with pytest.raises(TypeError, match="loss must be a number, known when it is recorded, got"):
            recorder(4, steps[0], loss=loss)
    with pytest.raises(ValueError, match="step must be larger than the last one recorded, 2, got 2"):
        recorder(2, steps[0])
    with pytest.raises(TypeError, match=r"step must be a whole number, got 4\.0: pass 4"):
        recorder(4.0, steps[0])
    with pytest.raises(TypeError, match=r"step must be a whole number, got .*Trace"):
        jax.jit(recorder.due)(4)
    with pytest.raises(ValueError, match="diagnostics must be those of one step, got a history of 2"):
        recorder(4, jax.tree.map(lambda *x: np.stack(x), *steps[:2]))


def test_files_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("csv", "parquet"):
        with pytest.raises(FileExistsError, match=f"{name} must name a file that a Recorder wrote, or none that is there"):
            Recorder(**{name: tmp_path / "mine"})
        with pytest.raises(FileNotFoundError, match=f"{name} must name a file that can be written: No such file"):
            Recorder(**{name: tmp_path / "missing" / "a"})
        with pytest.raises(IsADirectoryError, match=f"{name} must name a file that can be written"):
            Recorder(**{name: tmp_path})
    with pytest.raises(NotADirectoryError, match="tensorboard must be a folder"):
        Recorder(tensorboard=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"
