"""What the instruments read is what the state holds, wherever it is found and however it is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.storage import Code, Storage
from adam_jax.watch import SNR_EDGES, SNR_LEVELS, watch_adam

RATE = 1e-3
PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6000).reshape(60, 100), "b": jnp.linspace(0.5, 1.5, 7)}


def _gradients(step: int, params=None):
    keys = jax.random.split(jax.random.key(step), 2)
    params = PARAMS if params is None else params
    g = {name: 1e-3 * jax.random.normal(key, params[name].shape) for name, key in zip(params, keys, strict=True)}
    return {**g, "a": g["a"].at[:6].set(0.0)}  # a tenth of the leaf is dead


def _train(tx, steps=4, params=None):
    params = PARAMS if params is None else params
    state, update = tx.init(params), jax.jit(tx.update)
    gradients, updates = None, None
    for step in range(steps):
        gradients = _gradients(step, params)
        updates, state = update(gradients, state, params)
    return state, gradients, updates


def _flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def test_every_measurement_is_the_obvious_one_in_float64():
    state, g, u = _train(adam_jax.adam(RATE))
    seen = jax.jit(watch_adam(RATE))(state, g, PARAMS, u)
    m, v, gg, p, uu = (_flat(tree) for tree in (state[0].mu, state[0].nu, g, PARAMS, u))
    live = v > 0
    snr = np.abs(m[live]) / np.sqrt(v[live])
    step = RATE * np.abs(m) / (np.sqrt(v) + 1e-8)
    norm = np.linalg.norm
    expected = {
        "size": m.size, "snr_mean": snr.mean(), "step_rms": np.sqrt((step**2).mean()), "step_max": step.max(),
        "at_alpha": (step >= 0.99 * RATE).mean(), "at_bound": (step >= 0.99 * RATE * 10**0.5).mean(),
        "eps_dominated": (np.sqrt(v) < 1e-8).mean(), "dead": (~live).mean(), "nonfinite": 0.0, "mu_norm": norm(m),
        "nu_norm": np.sqrt(v.sum()), "gradient_norm": norm(gg), "cosine": m @ gg / (norm(m) * norm(gg)),
        "param_norm": norm(p), "update_norm": norm(uu), "update_ratio": norm(uu) / norm(p),
    }  # fmt: skip
    got = {name: np.asarray(getattr(seen.overall, name)) for name in expected}
    for name, value in expected.items():
        # sums of 6007 float32 numbers in blocks of 6000: 1e-5; a share moves by 1/6007 if rounding moves a coordinate
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2 / m.size if "at_" in name else 0.0, err_msg=name)
    histogram = np.histogram(snr, np.concatenate([[0.0], SNR_EDGES, [np.inf]]))[0]
    assert np.abs(np.asarray(seen.overall.snr_histogram) - histogram).sum() <= 4  # a coordinate on an edge may move
    assert seen.overall.snr_histogram.sum() == live.sum()


def test_quantiles_are_within_the_stated_factor():
    state, *_ = _train(adam_jax.adam(RATE))
    seen = jax.jit(watch_adam())(state)
    m, v = _flat(state[0].mu), _flat(state[0].nu)
    true = np.quantile(np.abs(m[v > 0]) / np.sqrt(v[v > 0]), SNR_LEVELS)
    ratio = np.asarray(seen.overall.snr_quantiles) / true
    assert ratio.max() < 2**0.5
    assert ratio.min() > 2**-0.5


def test_leaves_add_up_to_the_whole():
    state, g, u = _train(adam_jax.adam(RATE))
    seen = jax.jit(watch_adam())(state, g, PARAMS, u)
    assert list(seen.leaves) == ["['a']", "['b']"]
    assert float(seen.leaves["['a']"].dead) == pytest.approx(0.1)
    assert float(seen.leaves["['b']"].dead) == 0.0
    total = sum(leaf.snr_histogram for leaf in seen.leaves.values())
    np.testing.assert_array_equal(total, seen.overall.snr_histogram)


SAME = {
    "root": (adam_jax.scale_by_adam(storage="root"), {}),
    "raw": (adam_jax.scale_by_adam(bias_correction=False), {"bias_correction": False}),
    "raw root": (adam_jax.scale_by_adam(bias_correction=False, storage="root"), {"bias_correction": False}),
    "optax": (optax.scale_by_adam(), {}),
    "lp": (adam_jax.scale_by_lp(2.0, b2=0.999**0.5), {"p": 2.0, "b2": 0.999**0.5}),
    "amsgrad": (adam_jax.scale_by_amsgrad(max_of="corrected"), {"max_of": "corrected"}),
    "amsgrad raw": (adam_jax.scale_by_amsgrad(storage="root"), {}),
}


@pytest.fixture(scope="module")
def plain():
    state, g, _ = _train(adam_jax.scale_by_adam())
    return jax.jit(watch_adam())(state, g).overall


@pytest.mark.parametrize("case", SAME)
def test_every_form_of_the_state_reads_alike(case, plain):
    tx, settings = SAME[case]
    state, g, u = _train(tx)
    seen = jax.jit(watch_adam(**settings))(state, g).overall
    for name in ("snr_mean", "mu_norm", "nu_norm", "cosine", "dead"):
        # Optax divides by 1 - b^t in float32, 7e-6 off at the first steps
        np.testing.assert_allclose(getattr(seen, name), getattr(plain, name), rtol=3e-5, err_msg=name)
    step = np.abs(_flat(u))  # whatever the form, the effective step is the update
    np.testing.assert_allclose(seen.step_max, step.max(), rtol=1e-5)
    np.testing.assert_allclose(seen.step_rms, np.sqrt((step**2).mean()), rtol=1e-5)


def test_eps_hat_and_eps_root_are_those_of_the_transform():
    for settings in ({"eps": 1e-4, "eps_hat": True}, {"eps_root": 1e-8}, {"eps_root": 1e-8, "storage": "root"}):
        state, _, u = _train(adam_jax.scale_by_adam(**settings))
        settings.pop("storage", None)
        seen = jax.jit(watch_adam(**settings))(state).overall
        np.testing.assert_allclose(seen.step_max, np.abs(_flat(u)).max(), rtol=1e-5)


def test_adamax_stays_below_its_bound_of_one_hundredth_more_than_alpha():
    """Section 7.1 bounds AdaMax's step by alpha; growing gradients reach (1 - b1) / (1 - b1 / b2) = 1.0101 alpha."""
    tx = adam_jax.scale_by_adamax()
    state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
    for step in range(300):
        _, state = update(jnp.array([0.999 ** (300 - step)]), state)  # u never decays below the newest gradient
    for step in range(60):
        _, state = update(jnp.array([0.999**step]), state)  # |g| = u at every step
    seen = jax.jit(watch_adam())(state)
    assert float(seen.bound) == 1.0
    assert float(seen.supremum) == pytest.approx(0.1 / (1 - 0.9 / 0.999), rel=1e-4)
    assert 1.0 < float(seen.overall.step_max) <= float(seen.supremum)


def test_both_bounds_of_section_2_1_are_reached_and_not_passed():
    tx, watch = adam_jax.scale_by_adam(eps=0.0, storage="root"), jax.jit(watch_adam(eps=0.0))
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for _ in range(20_000 // 20):
        _, state = update(jnp.array([0.0, 1e-30]), state)
    for step in range(300):  # spike in the first coordinate at the end; growth by b2 / b1 in the second
        _, state = update(jnp.array([float(step == 299), 1e-30 * (0.999 / 0.9) ** step]), state)
    seen = watch(state)
    assert float(seen.bound) == pytest.approx(0.1 / 0.001**0.5, rel=1e-4)
    assert float(seen.supremum) == pytest.approx(7.27, rel=1e-3)
    assert 0.8 < float(seen.overall.step_max / seen.supremum) <= 1.0
    assert float(seen.overall.at_bound) == 0.5
    assert float(jax.jit(watch_adam(b1=0.9, b2=0.99))(state).bound) == pytest.approx(1.0, rel=1e-4)
    assert jax.jit(watch_adam(b1=0.99, b2=0.9))(state).supremum == jnp.inf


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e20, 1e36])
def test_any_scale_of_gradients_reads_alike_in_the_root_form(scale):
    tx = adam_jax.scale_by_adam(eps=0.0, storage="root")
    _, state = jax.jit(tx.update)(jnp.array([scale, -scale]), tx.init(jnp.zeros(2)))
    seen = jax.jit(watch_adam(eps=0.0))(state).overall
    assert float(seen.snr_mean) == pytest.approx(1.0, abs=1e-6)
    assert float(seen.step_max) == pytest.approx(1.0, abs=1e-6)


def test_nonfinite_coordinates_are_counted_and_left_out():
    tx = adam_jax.scale_by_adam()
    g = jnp.array([1.0, jnp.nan, jnp.inf, -1.0])
    _, state = jax.jit(tx.update)(g, tx.init(g))
    seen = jax.jit(watch_adam())(state).overall
    assert seen.nonfinite == 2
    assert float(seen.snr_mean) == pytest.approx(1.0, abs=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen))


@pytest.mark.parametrize("skip", [lambda tx: optax.apply_if_finite(tx, 5), adam_jax.skip_nonfinite])
def test_skipped_steps_are_counted(skip):
    tx = skip(adam_jax.adam(RATE))
    state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
    for g in ([1.0, 1.0], [jnp.nan, 1.0], [1.0, 2.0]):
        _, state = update(jnp.array(g), state)
    assert jax.jit(watch_adam())(state).skipped == 1
    assert jax.eval_shape(watch_adam(), adam_jax.adam().init(jnp.ones(2))).skipped is None


def test_complex_and_low_precision_leaves_are_read():
    params = {"c": jnp.array([3 + 4j, 1j]), "h": jnp.ones(2, jnp.bfloat16), "n": None, "i": jnp.arange(3)}
    g = {**params, "i": np.zeros(3, jax.dtypes.float0)}
    tx = adam_jax.scale_by_adam(mu_dtype=None)
    _, state = tx.update(g, tx.init(params))
    seen = jax.jit(watch_adam())(state, {**g, "i": None}, params)
    assert list(seen.leaves) == ["['c']", "['h']"]
    assert float(seen.overall.snr_mean) == pytest.approx(1.0, abs=1e-5)
    assert float(seen.leaves["['c']"].cosine) == pytest.approx(1.0, abs=1e-5)
    assert float(seen.leaves["['c']"].mu_norm) == pytest.approx(26**0.5, rel=1e-5)


def test_a_scan_stacks_a_history():
    tx, watch = adam_jax.adam(RATE), watch_adam()

    def step(carry, seed):
        params, state = carry
        g = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(seed), p.shape), params)
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), watch(state, g, params, updates)

    _, history = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(5)))((PARAMS, tx.init(PARAMS)))
    np.testing.assert_array_equal(history.count, [1, 2, 3, 4, 5])
    assert history.overall.snr_histogram.shape == (5, 24)
    assert history.leaves["['b']"].cosine.shape == (5,)


def test_schedules_are_evaluated_at_the_last_step():
    tx = adam_jax.scale_by_adam()
    state, *_ = _train(tx, steps=3)
    seen = jax.jit(watch_adam(b1=lambda t: 0.9 * 0.5**t, learning_rate=lambda t: 10.0 - t))(state)
    assert float(seen.learning_rate) == 8.0
    assert float(seen.bound) == pytest.approx(8.0 * (1 - 0.225) / 0.001**0.5, rel=1e-4)


def test_a_state_without_adam_or_with_two_is_refused():
    watch = watch_adam()
    with pytest.raises(ValueError, match=r"state must hold a ScaleByAdamState or .*, got none"):
        watch(optax.sgd(0.1).init(PARAMS))
    tx = optax.multi_transform({"x": adam_jax.adam(), "y": adam_jax.adamw()}, {"a": "x", "b": "y"})
    state, *_ = _train(tx)
    with pytest.raises(ValueError, match=r"holds 2 ScaleByAdamStates: choose one with where=.*'x'.*'y'"):
        watch(state)
    assert list(watch_adam(where="'y'")(state, _gradients(0)).leaves) == ["['b']"]
    with pytest.raises(ValueError, match="where must be part of the path"):
        watch_adam(where="'z'")(state)


def test_settings_and_trees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="b1 must be in"):
        watch_adam(b1=1.0)
    with pytest.raises(ValueError, match=r"learning_rate must be a finite number >= 0, got -0\.001"):
        watch_adam(-1e-3)
    with pytest.raises(ValueError, match=r"p must be a finite number >= 1, got 0\.5"):
        watch_adam(p=0.5)
    state, *_ = _train(adam_jax.adam())
    with pytest.raises(ValueError, match=r"p must be None for a state that holds no L\^p norms, got 3\.0"):
        watch_adam(p=3.0)(state)
    with pytest.raises(ValueError, match=r"p must be given, as to scale_by_lp, for a state that holds L\^p norms, got None"):
        watch_adam()(adam_jax.scale_by_lp(3.0).init(PARAMS))
    with pytest.raises(ValueError, match=r"leaf at \['b'\] that a tree given"):
        watch_adam()(state, {"a": PARAMS["a"]})
    with pytest.raises(ValueError, match=r"leaf at \['b'\] must be inexact of shape \(7,\)"):
        watch_adam()(state, {**PARAMS, "b": jnp.ones(3)})


HALF = Code(jnp.dtype(jnp.float16), lambda x, _: x.astype(jnp.float16), lambda x: x.astype(jnp.float32))
OWN = {"storage": Storage(HALF, HALF, smallest=100)}
KEPT = {
    "float32": {},
    "root": {"storage": "root"},
    "bfloat16": {"storage": "bfloat16"},
    "int8": {"storage": "int8"},
    "by path": {"storage": lambda path: "int8" if "a" in path else "bfloat16"},
    "float16 first": {"mu_dtype": jnp.float16},
    "own": OWN,
}
MEMBERS = {
    "adam": (adam_jax.scale_by_adam, {}),
    "eps_root": (adam_jax.scale_by_adam, {"eps_root": 1e-7}),
    "raw": (adam_jax.scale_by_adam, {"bias_correction": False, "eps": 1e-5, "eps_hat": True}),
    "adamw": (functools.partial(adam_jax.adamw, weight_decay=0.0), {"learning_rate": RATE}),
    "adamax": (adam_jax.scale_by_adamax, {}),
    "lp": (adam_jax.scale_by_lp, {"p": 3.0}),
    "amsgrad": (adam_jax.scale_by_amsgrad, {}),
    "amsgrad corrected": (adam_jax.scale_by_amsgrad, {"max_of": "corrected", "eps": 1e-4}),
}
CASES = [(member, keep) for member in ("adam", "adamw", "adamax", "lp", "amsgrad") for keep in KEPT]
CASES += [(member, keep) for member in ("eps_root", "raw", "amsgrad corrected") for keep in ("root", "int8")]


@pytest.mark.parametrize(("member", "keep"), CASES)
def test_the_step_read_is_the_step_taken_however_moments_are_kept(member, keep):
    make, settings = MEMBERS[member]
    state, g, updates = _train(make(**settings, **KEPT[keep]))
    seen = jax.jit(watch_adam(**settings, **(OWN if keep == "own" else {})))(state)  # all else the state says
    for name, leaf in {"": seen.overall, **seen.leaves}.items():
        step, gradient = (_flat(tree if not name else tree[name[2:-2]]) for tree in (updates, g))
        step = np.abs(step)
        # reading inverts by Newton's method, to a few parts in 1e7; 6000 float32 numbers are added one after the other
        np.testing.assert_allclose(leaf.step_max, step.max(), rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(leaf.step_rms, np.sqrt((step**2).mean()), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(leaf.dead, (gradient == 0).mean(), atol=1e-6, err_msg=name)


def test_ratios_that_rounding_took_past_the_bound_are_read_as_the_step_used_them():
    settings, n = {"b2": 0.99, "eps": 0.0}, 4096
    tx = adam_jax.scale_by_adam(**settings, storage="int8")
    growing = 1e-25 * (0.99 / 0.9) ** jnp.arange(600.0)  # by b2 / b1 each step: these approach the bound
    advance = jax.jit(lambda state: jax.lax.scan(lambda s, g: tx.update(jnp.full(n, g), s)[::-1], state, growing))
    state, updates = advance(tx.init(jnp.zeros(n)))
    seen = jax.jit(watch_adam(**settings))(state)
    assert float(updates[-1].max()) == pytest.approx(float(seen.supremum), rel=1e-6)
    assert float(seen.overall.step_max) == pytest.approx(float(seen.supremum), rel=1e-6)


@pytest.mark.parametrize("how", [OWN["storage"], lambda _: OWN["storage"]], ids=["all", "by path"])
@pytest.mark.parametrize("given", [None, "int8"])
def test_codes_of_ones_own_are_not_read_without_saying_how_they_are_kept(how, given):
    state, *_ = _train(adam_jax.scale_by_adam(storage=how))
    with pytest.raises(
        ValueError, match=rf"storage must be given, .* codes of your own, OwnCodes, at \['a'\], got {given!r}"
    ):
        watch_adam(storage=given)(state)


def test_a_restarted_state_is_read_as_one_of_nothing():
    state, *_ = _train(adam_jax.scale_by_adam(storage="int8"))
    seen = jax.jit(watch_adam())(optax.tree_utils.tree_set(state, count=0))
    assert (float(seen.overall.dead), float(seen.overall.step_max), float(seen.mu_weight)) == (1.0, 0.0, 0.0)


def test_optax_keeps_the_numbers_themselves_in_any_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state, *_ = _train(optax.scale_by_adam(mu_dtype=jnp.float16), params=params)
    seen = jax.jit(watch_adam())(state)
    assert (state.mu["a"].dtype, state.nu["a"].dtype) == (jnp.float16, jnp.bfloat16)
    assert float(seen.overall.mu_norm) == pytest.approx(np.linalg.norm(_flat(state.mu)) / (1 - 0.9**4), rel=1e-5)
    assert float(seen.overall.nu_norm) == pytest.approx((_flat(state.nu).sum() / (1 - 0.999**4)) ** 0.5, rel=2e-5)


def test_rows_are_read_like_dense_adam_after_a_flush():
    """What the docstring of `watch_adam` says about `row_adam`."""
    rows, dense, table = adam_jax.tables.row_adam(RATE), adam_jax.adam(RATE), jnp.ones((50, 4))
    row_state, state = rows.init(table), dense.init(table)
    update, dense_update = (
        jax.jit(lambda t, s, ids, g: rows.update(*rows.gather(t, s, ids)[1:], ids, g)),
        jax.jit(dense.update),
    )
    for step in range(5):
        ids = jax.random.randint(jax.random.key(step), (6,), 0, 50)
        g = jax.random.normal(jax.random.key(step), (6, 4))
        table, row_state = update(table, row_state, ids, g)
        _, state = dense_update(jnp.zeros((50, 4)).at[ids].add(g), state)
    _, row_state = jax.jit(rows.flush)(table, row_state)
    read = adam_jax.ScaleByAdamState(row_state.count, row_state.mu, row_state.nu, jnp.ones([]), jnp.ones([]))
    watch = jax.jit(watch_adam(RATE))
    seen = watch(read).overall
    for name, value in watch(state).overall._asdict().items():
        if value is not None and name != "snr_histogram":  # a coordinate may cross an edge
            np.testing.assert_allclose(getattr(seen, name), value, rtol=2e-5, err_msg=name)
