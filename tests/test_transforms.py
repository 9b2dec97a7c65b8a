"""Adam, AdaMax, L^p and AMSGrad against the paper in longdouble."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adam_jax
from adam_jax import norms
from adam_jax.storage import int8

ULP = 2.0**-24  # of a step's scale, which is one: the spacing of float32 just below it


def run(tx: optax.GradientTransformation, gradients: np.ndarray, dtype=jnp.float32) -> np.ndarray:
    """The updates for gradients of shape (steps, ...), in one jitted scan."""
    stack = jnp.asarray(gradients, dtype)

    @jax.jit
    def play(stack: jax.Array) -> jax.Array:
        def step(state, g):
            updates, state = tx.update(g, state)
            return state, updates

        return jax.lax.scan(step, tx.init(stack[0]), stack)[1]

    return np.asarray(play(stack)).astype(np.longdouble)


def error(tx: optax.GradientTransformation, gradients: np.ndarray, exact: np.ndarray) -> float:
    """The worst error in ulp of the step's scale: of one, or of the step where it is larger."""
    return float(np.max(np.abs(run(tx, gradients) - exact) / np.maximum(np.abs(exact), 1)) / ULP)


@functools.cache
def six_decades(per: str) -> np.ndarray:
    """Gradients over six decades: for each coordinate its own scale, or a scale that falls or rises with time."""
    rng = np.random.default_rng(7)
    steps, size = 3000, 512
    scale = {"coordinate": rng.uniform(-3, 3, (1, size)), "falling": np.linspace(3, -3, steps)[:, None]}
    scale["rising"] = -scale["falling"]
    return (rng.normal(size=(steps, size)) * 10.0 ** scale[per]).astype(np.float32)


@pytest.mark.parametrize("root", [False, True], ids=["square", "root"])
@pytest.mark.parametrize("per", ["coordinate", "falling", "rising"])
def test_3000_float32_steps_stay_within_24_ulp_of_the_paper(per: str, root: bool):
    gradients = six_decades(per)
    exact = reference.adam(gradients)
    # the root form rounds three more times a step: measured 28 where the square form has 16
    assert error(adam_jax.scale_by_adam(storage="root" if root else None), gradients, exact) <= (36 if root else 24)


@pytest.mark.parametrize("b2", [0.99, 0.999, 0.9999, 0.99999])
def test_weights_arrive_at_one_as_they_should(b2: float):
    tx, steps = adam_jax.scale_by_bias_correction(0.0, b2), 60_000
    factors = run(tx, np.ones((steps, 1)))[:, 0]
    exact = np.sqrt(-np.expm1(np.arange(1, steps + 1) * np.log1p(-np.longdouble(1 - b2))))
    assert np.max(np.abs(factors / exact - 1)) <= 32 * ULP  # measured 3 to 28; rounded to nearest it would be 250 to 25,000


def test_20000_steps_are_as_good_as_3000():
    gradients = np.random.default_rng(0).normal(size=(20_000, 32)).astype(np.float32)
    assert error(adam_jax.scale_by_adam(), gradients, reference.adam(gradients)) <= 24


@pytest.mark.parametrize("root", [False, True], ids=["square", "root"])
@pytest.mark.parametrize("b2", [0.999, 1 - 1e-5, 1 - 1e-7])
def test_a_constant_gradient_gives_its_sign_from_the_first_step_at_any_decay(b2: float, root: bool):
    gradients = np.tile(np.float32([1.0, -0.37, 1e-3, 12345.678]), (3000, 1))
    updates = run(adam_jax.scale_by_adam(b2=b2, eps=0.0, storage="root" if root else None), gradients)
    assert np.max(np.abs(updates - np.sign(gradients))) <= 8 * ULP


def _decays():
    yield "schedule", adam_jax.scale_by_adam(b1=lambda t: 0.9 * 0.99**t, b2=lambda t: 0.9 + 0.0999 * t / (t + 10.0), eps=0.0)
    yield "falling", adam_jax.scale_by_adam(b2=lambda t: 0.9999 - 0.4 * t / (t + 10.0), eps=0.0)
    inject = optax.inject_hyperparams(adam_jax.scale_by_adam)
    yield "injected", inject(b1=optax.linear_schedule(0.5, 0.99, 50), b2=optax.linear_schedule(0.999, 0.9, 50), eps=0.0)


@pytest.mark.parametrize("tx", [tx for _, tx in _decays()], ids=[name for name, _ in _decays()])
def test_a_constant_gradient_gives_unit_steps_under_any_schedule_of_decays(tx):
    params = jnp.zeros(1)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(100):
        updates, state = update(jnp.ones(1), state, params)
        assert abs(float(updates[0]) - 1) <= 2e-6


def test_decays_may_be_vmapped():
    decays = jnp.array([0.9, 0.999, 0.9999999])

    def play(b2: jax.Array) -> jax.Array:
        tx = adam_jax.scale_by_adam(b2=b2, eps=0.0)
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(())), jnp.ones(500))[1]

    np.testing.assert_allclose(jax.jit(jax.vmap(play))(decays), 1.0, atol=2e-6)


@pytest.mark.parametrize("k", [-110, -37, 1, 64, 110])
def test_scaling_gradients_by_a_power_of_two_changes_no_bit_in_the_root_form(k: int):
    # of order 1e4: an average that cancels to 1e-8 of its gradients must still be a normal number at 2^-110
    gradients = np.float32(1e4 * np.random.default_rng(0).normal(size=(50, 1000)))
    tx = adam_jax.scale_by_adam(eps=0.0, storage="root")
    np.testing.assert_array_equal(run(tx, gradients), run(tx, np.ldexp(gradients, k)))


def test_a_maximum_of_moments_that_weigh_nothing_divides_nothing_by_zero():
    """A schedule of float32 numbers can say 1, which is refused of a number."""
    tx = adam_jax.scale_by_amsgrad(b2=lambda count: jnp.where(jnp.asarray(count) > 0, 0.9, 1.0))
    state = tx.init(jnp.zeros(1))
    for _ in range(2):
        updates, state = tx.update(jnp.ones(1), state)
        assert jnp.isfinite(updates).all()


def test_a_gradient_too_large_to_be_squared_counts_as_the_largest_that_is_not():
    _, state = adam_jax.scale_by_adam().update(jnp.array([1e30]), adam_jax.scale_by_adam().init(jnp.zeros(1)))
    np.testing.assert_allclose(state.nu, jnp.finfo(jnp.float32).max / 2, rtol=1e-6)


def test_a_float32_state_is_two_arrays_a_leaf_and_three_scalars():
    state = adam_jax.scale_by_adam().init({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)})
    assert [x.size for x in jax.tree.leaves(state)] == [1, 2, 6, 2, 6, 1, 1]
    assert jax.tree.structure((state.codes, state.form)) == jax.tree.structure(((), norms.Squares()))


@pytest.mark.parametrize("how", [None, "root", "bfloat16", int8(smallest=0)], ids=["float32", "root", "bfloat16", "int8"])
def test_all_numbers_of_a_new_state_are_zero(how):
    for leaf in jax.tree.leaves(adam_jax.scale_by_adam(storage=how).init({"w": jnp.ones((3, 2))})):
        assert not np.any(leaf)


@pytest.mark.parametrize("how", [{}, {"storage": int8(smallest=0)}], ids=["float32", "int8"])
def test_a_restart_also_empties_leaves_that_have_no_gradient_at_first(how):
    tx = adam_jax.scale_by_adam(**how)
    params = {"a": jnp.ones(8), "b": jnp.ones(8)}
    _, old = tx.update(params, tx.init(params))
    states = [old._replace(count=jnp.int32(0)), tx.init(params)]
    for gradients in ({"a": jnp.ones(8), "b": None}, {"a": jnp.ones(8), "b": -3 * jnp.ones(8)}):
        (u, states[0]), (v, states[1]) = (tx.update(gradients, state) for state in states)
        jax.tree.map(np.testing.assert_array_equal, u, v)


def test_a_leaf_without_a_gradient_keeps_its_moments():
    tx, g = adam_jax.scale_by_adam(), {"a": jnp.ones(2), "b": 3 * jnp.ones(2)}
    _, state = tx.update(g, tx.init(g))
    _, after = tx.update({"a": jnp.ones(2), "b": None}, state)
    for new, old in ((after.mu, state.mu), (after.nu, state.nu)):
        np.testing.assert_array_equal(new["b"], old["b"])


def test_raw_moments_then_bias_correction_is_the_efficient_order():
    gradients = six_decades("coordinate")[:300] * 1e-6  # so small that the place of eps matters
    chain = optax.chain(
        adam_jax.scale_by_adam(bias_correction=False, eps_hat=True), adam_jax.scale_by_bias_correction(0.9, 0.999)
    )
    exact = reference.adam(gradients, eps_hat=True)
    assert error(adam_jax.scale_by_adam(eps_hat=True), gradients, exact) <= 24
    assert error(chain, gradients, exact) <= 48  # the raw moments' own rounding comes on top
    assert np.max(np.abs(exact - reference.adam(gradients))) > 0.1


def test_the_first_uncorrected_step_is_as_section_3_says():
    updates = run(adam_jax.scale_by_adam(bias_correction=False, eps=0.0), np.ones((1, 1)))
    np.testing.assert_allclose(updates, 0.1 / math.sqrt(0.001), rtol=1e-6)


def test_a_single_nonzero_gradient_reaches_the_papers_bound():
    gradients = np.zeros((20_000, 1))
    gradients[-1] = 3.0
    updates = run(adam_jax.scale_by_adam(eps=0.0), gradients)
    np.testing.assert_allclose(updates[-1], 0.1 / math.sqrt(0.001), rtol=1e-6)  # 1 - b2^20000 is 1 - 2e-9


def test_a_gradient_of_constant_sign_and_scale_steps_by_one():
    rng = np.random.default_rng(0)
    updates = run(adam_jax.scale_by_adam(), np.abs(rng.normal(1, 0.01, size=(2000, 100))))
    assert np.max(np.abs(updates)) <= 1.02  # the coefficient of variation of the gradients, twice


def test_growing_gradients_exceed_the_papers_bound_and_reach_cauchy_schwarz():
    b1, b2 = 0.9, 0.999
    supremum = (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))
    assert 7.26 < supremum < 7.28
    growing = (b2 / b1) ** np.arange(400)[:, None]
    updates = run(adam_jax.scale_by_adam(eps=0.0, storage="root", bias_correction=False), growing)
    np.testing.assert_allclose(updates[-1], supremum, rtol=1e-4)  # (b1^2/b2)^400 is 0


@pytest.mark.parametrize("root", [False, True], ids=["square", "root"])
def test_no_history_exceeds_cauchy_schwarz(root: bool):
    supremum = 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999))
    rng = np.random.default_rng(1)
    histories = [np.cumprod(rng.uniform(0.5, ratio, size=(300, 64)), axis=0) for ratio in (1.1, 1.5, 1.72, 2.0)]
    histories.append(rng.normal(size=(300, 64)) * 10 ** rng.uniform(-15, 15, size=(300, 64)))
    for gradients in histories:
        assert np.max(
            np.abs(run(adam_jax.scale_by_adam(eps=0.0, storage="root" if root else None), gradients))
        ) <= supremum * (1 + 1e-5)


@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("settings", [(0.9, 0.999, 1e-8, 0.0), (0.0, 0.9, 1e-3, 1e-4), (0.99, 0.5, 0.0, 1e-2)])
def test_adam_is_algorithm_1(settings, nesterov: bool):
    gradients = six_decades("coordinate")[:200]
    for root in (False, True):
        tx = adam_jax.scale_by_adam(*settings, storage="root" if root else None, nesterov=nesterov)
        assert error(tx, gradients, reference.adam(gradients, *settings, nesterov=nesterov)) <= 24


def test_uncorrected_adam_is_the_raw_moments():
    gradients = six_decades("coordinate")[:200]
    for nesterov in (False, True):
        exact = reference.adam(gradients, bias_correction=False, nesterov=nesterov)
        assert error(adam_jax.scale_by_adam(bias_correction=False, nesterov=nesterov), gradients, exact) <= 24


def test_nadam_with_momentum_on_a_schedule_is_dozats_algorithm_2():
    """Written out from Dozat (2016), with mu_t the momentum of step t: his products, no weights, no recursions."""
    gradients, nu, eps = six_decades("coordinate")[:12, :64].astype(np.longdouble), np.longdouble(0.999), 1e-8
    mu = [np.longdouble(np.float32(0.5 + 0.49 * t / 12)) for t in range(14)]  # mu[0] is that of the first step
    m = n = np.zeros(64, np.longdouble)
    expected = []
    for t, g in enumerate(gradients):
        m, n = mu[t] * m + (1 - mu[t]) * g, nu * n + (1 - nu) * g**2
        g_hat, m_hat = g / (1 - np.prod(mu[: t + 1])), m / (1 - np.prod(mu[: t + 2]))
        m_bar = (1 - mu[t]) * g_hat + mu[t + 1] * m_hat
        expected.append(m_bar / (np.sqrt(n / (1 - nu ** (t + 1))) + eps))

    def schedule(count):
        return jnp.asarray(mu[:13], jnp.float32)[count]

    assert error(adam_jax.scale_by_adam(schedule, nesterov=True), gradients, np.array(expected)) <= 24
    by_oracle = reference.adam(gradients, lambda t: float(mu[t]), nesterov=True)
    np.testing.assert_allclose(by_oracle.astype(float), np.array(expected).astype(float), rtol=1e-12)


@pytest.mark.parametrize("make", ["scale_by_norm", "scale_by_adam", "scale_by_lp", "scale_by_amsgrad", "scale_by_adamax"])
def test_defaults_are_the_papers(make: str):
    defaults = inspect.signature(getattr(adam_jax, make)).parameters
    assert (defaults["b1"].default, defaults["b2"].default) == (0.9, 0.999)
    assert defaults["eps"].default == (0.0 if make == "scale_by_adamax" else 1e-8)  # Algorithm 2 has none
    assert inspect.signature(adam_jax.average_params).parameters["decay"].default == 0.999  # b2, as in Section 7.2


def test_with_its_defaults_the_step_by_the_norm_of_squares_is_adam():
    gradients = six_decades("coordinate")[:20, :64]
    by_norm = run(adam_jax.scale_by_norm(norms.Square()), gradients)
    np.testing.assert_array_equal(by_norm, run(adam_jax.scale_by_adam(), gradients))


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_adamax_is_algorithm_2(eps: float):
    gradients = six_decades("coordinate")[:1000]
    assert error(adam_jax.scale_by_adamax(eps=eps), gradients, reference.adamax(gradients, eps=eps)) <= 24


def test_adamax_of_nothing_is_nothing():
    assert (run(adam_jax.scale_by_adamax(), np.zeros((3, 2))) == 0).all()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, 10.0])
def test_lp_is_equations_6_and_7(p: float):
    gradients = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    assert error(adam_jax.scale_by_lp(p), gradients, reference.lp(gradients, p)) <= 36  # exp and log round at each step


def test_lp_at_two_is_adam_with_the_squared_decay():
    gradients = six_decades("rising")[:500]
    assert error(adam_jax.scale_by_lp(2.0, b2=math.sqrt(0.999)), gradients, reference.adam(gradients)) <= 48


def test_adamax_is_the_limit_of_large_p():
    gradients = six_decades("coordinate")[:300]
    exact = reference.adamax(gradients)
    distance = [error(adam_jax.scale_by_lp(p, eps=0.0), gradients, exact) * ULP for p in (1e2, 1e4, 1e6, 1e8)]
    # (1 - b2^p)^(1/p) and the p-norm of two equal entries are 1 + O(log 2 / p)
    assert all(d <= 3 / p + 5e-6 for d, p in zip(distance, (1e2, 1e4, 1e6, 1e8), strict=True))


@pytest.mark.parametrize("root", [False, True], ids=["square", "root"])
@pytest.mark.parametrize("max_of", ["raw", "corrected"])
def test_amsgrad_takes_the_maximum_of_what_it_says(max_of, root: bool):
    gradients = six_decades("rising")[::-10].copy()  # falls fast, so that the maxima hold
    exact = reference.adam(gradients, b2=0.9, maximum=max_of)
    assert error(adam_jax.scale_by_amsgrad(b2=0.9, max_of=max_of, storage="root" if root else None), gradients, exact) <= 36
    assert np.max(np.abs(exact - reference.adam(gradients, b2=0.9))) > 0.1
    assert (
        np.max(np.abs(exact - reference.adam(gradients, b2=0.9, maximum="corrected" if max_of == "raw" else "raw"))) > 1e-3
    )


BAD = [
    (lambda: adam_jax.scale_by_adam(eps=-1e-8), r"eps must be a finite number >= 0, got -1e-08"),
    (lambda: adam_jax.scale_by_adam(eps_root=float("nan")), r"eps_root must be a finite number >= 0, got nan"),
    (lambda: adam_jax.scale_by_adam(b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
    (lambda: adam_jax.scale_by_adamax(b2=-0.1), r"b2 must be in \[0, 1\), got -0.1"),
    (lambda: adam_jax.scale_by_adamax(eps=-1.0), r"eps must be a finite number >= 0, got -1.0"),
    (lambda: adam_jax.scale_by_lp(0.5), r"p must be a finite number >= 1, got 0.5"),
    (
        lambda: adam_jax.scale_by_adam(mu_dtype=jnp.int32),
        r"mu_dtype must be float32, float64, bfloat16 or float16, got .*int32.*: storage= has int8 moments",
    ),
    (
        lambda: adam_jax.scale_by_adam(storage="fast"),
        r"storage must be one of 'float32', 'root', 'bfloat16', 'int8', a Storage, .* got 'fast'",
    ),
    (
        lambda: adam_jax.adamw(1e-3, mu_dtype=jnp.bfloat16, storage="int8"),
        r"mu_dtype is for the first moment alone and must be None with storage, got",
    ),
    (lambda: adam_jax.scale_by_amsgrad(max_of="both"), r"max_of must be one of 'raw', 'corrected', got 'both'"),
    (lambda: adam_jax.clip_by_global_norm(-1.0), r"max_norm must be a finite number >= 0, got -1.0"),
    (lambda: adam_jax.average_params(1.5), r"decay must be in \[0, 1\), got 1.5"),
    (lambda: adam_jax.scale_by_bias_correction(0.9, 1.0), r"b2 must be in \[0, 1\), got 1.0"),
    (lambda: adam_jax.inverse_sqrt_decay(-1.0), r"alpha must be a finite number >= 0, got -1.0"),
    (lambda: adam_jax.interop.adam_defaults("jax"), r"framework must be one of 'tensorflow', .*, got 'jax'"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message.split(" must")[0] for _, message in BAD])
def test_a_bad_setting_names_the_argument_the_constraint_and_the_value(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_setting_that_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match="eps must be a number or an array, not a schedule, got"):
        adam_jax.scale_by_adam(eps=optax.constant_schedule(1e-8))
    with pytest.raises(TypeError, match="b1 must be a number, an array or a schedule, got 'fast'"):
        adam_jax.scale_by_adam(b1="fast")
