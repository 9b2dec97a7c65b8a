"""No setting passes silently: what a public constructor does not refuse, naming the argument, it can work with."""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax import checks, norms
from adam_jax.online import Box, play

NUMBERS = [
    "1e-3",
    "",
    b"1",
    float("nan"),
    float("inf"),
    -float("inf"),
    -0.0,
    -1.0,
    1e39,
    1j,
    np.complex64(1j),
    jnp.complex64(1j),
    True,
    np.True_,
    [],
    [0.5],
    (0.9, 0.99),
    {},
    2**31,
    2**63,
    10**400,
    10**6000,
    np.float16(0.5),
    jnp.bfloat16(0.5),
    np.float32(0.5),
    np.float64(0.5),
    np.longdouble(0.5),
    np.int64(1),
    np.uint64(2**63),
    np.float32("nan"),
    np.array(0.5),
    np.array(1),
    np.array("x"),
    np.array(np.inf),
    np.array([0.5, 0.5]),
    jnp.array([0.5, 0.5]),
    jnp.array(True),
    Decimal("0.5"),
    Fraction(1, 2),
    float,
    int,
    np.float32,
    object(),
    jax.random.key(0),
    8.0,
    1.5,
]
FLAGS = ["False", "True", "", 0, 1, None, 1.0, float("nan"), [], np.array(True), jnp.array(True), bool, object()]
STREAM = jnp.array([1.0, -1.0, 0.5])


def _line(x, c):
    return c * x


GAME = play(_line, STREAM, jnp.float32(0.0), optax.sgd(0.5), Box(-1.0, 1.0))
REQUIRED = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "p": 3.0,
    "norm": norms.Square(),
    "max_norm": 1.0,
    "alpha": 0.1,
    "lam": 0.5,
    "lower": -1.0,
    "upper": 1.0,
    "radius": 1.0,
    "steps": 4,
    "tx": adam_jax.adam(),
    "loss": _line,
    "stream": STREAM,
    "start": jnp.float32(0.0),
    "domain": Box(-1.0, 1.0),
    "game": GAME,
    "diagnostics": None,
    "history": None,
    "dtype": jnp.dtype(jnp.float32),
    "encode": jnp.add,
    "decode": jnp.abs,
}
# of what was measured or trained: they build nothing
READERS = {"plot_history", "record", "grow", "drop", "from_optax", "from_torch"}


def _public() -> dict[str, Callable]:
    """Every public function and class, those of the folders too, but not the command line's."""
    folders = [m.name for m in pkgutil.iter_modules(adam_jax.__path__, "adam_jax.") if m.ispkg]
    homes = [
        adam_jax,
        *(importlib.import_module(name) for name in folders if name not in ("adam_jax.paper", "adam_jax.bench")),
    ]
    things = {name: getattr(home, name) for home in homes for name in home.__all__}
    return {name: thing for name, thing in things.items() if callable(thing) and not _is_state(thing)}


def _is_state(thing: Callable) -> bool:
    return isinstance(thing, type) and issubclass(thing, tuple)


def _kinds(hint: object) -> set[object]:
    """The types that a hint allows."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(hint)))
    return {hint}


def _arguments(thing: Callable, kind: str) -> list[str]:
    own = thing.__init__ if isinstance(thing, type) else thing
    hints = typing.get_type_hints(own, localns={"ArrayTree": object})  # which Optax's types name themselves by
    found = []
    for name in inspect.signature(thing).parameters:
        allowed = _kinds(hints.get(name))
        is_flag = allowed <= {bool, type(None)} and bool in allowed
        if (kind == "flags" and is_flag) or (kind == "numbers" and not is_flag and allowed & {int, float}):
            found.append(name)
    return found


WALKED = {
    (name, kind): thing
    for name, thing in _public().items()
    if name not in READERS
    for kind in ("numbers", "flags")
    if _arguments(thing, kind)
}


def _required(thing: Callable) -> dict[str, object]:
    parameters = inspect.signature(thing).parameters.values()
    return {
        p.name: REQUIRED[p.name]
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def _used(made: object, argument: str, value: object) -> object:
    """What one use of a thing gives: an update, a reading, a value of a schedule, or the numbers in it."""
    params = {"w": jnp.array([1.0, -2.0])}
    if hasattr(made, "gather"):
        table, ids = jnp.ones((3, 2)), jnp.array([1])

        def step(table, state):
            return made.update(*made.gather(table, state, ids)[1:], ids, jnp.ones((1, 2)))[0]

        run = jax.jit(step) if type(value) is float else lambda *given: jax.eval_shape(step, *given)  # compiling takes long
        return run(table, made.init(table))
    if hasattr(made, "init"):
        return made.update(params, made.init(params), params)[0]
    if isinstance(made, adam_jax.watch.Recorder):
        made(0, adam_jax.watch.watch_adam()(adam_jax.adam().init(params)))
        return made.rows[0]["step"]
    if callable(made):
        try:
            return made(0)
        except ValueError:  # no schedule: a reader of states
            tx = adam_jax.scale_by_lp(3.0) if argument == "p" else adam_jax.scale_by_adam()
            return made(tx.update(params, tx.init(params))[1]).overall
    parts = jax.tree.leaves(vars(made) if hasattr(made, "__dict__") else made)
    return [part(0) if isinstance(made, dict) else part for part in parts]


def _insane(made: object, argument: str, value: object) -> str:
    """What is wrong with a thing when it is used, if anything."""
    try:
        used = _used(made, argument, value)
        numbers = [
            np.asarray(x) for x in jax.tree.leaves(used) if isinstance(x, (int, float, np.ndarray, np.generic, jax.Array))
        ]
        return "" if all(np.isfinite(x).all() for x in numbers if x.dtype.kind in "biuf") else f"gives {used}"
    except Exception as error:
        return f"fails: {error!r:.100}"


@pytest.mark.parametrize(("name", "kind"), WALKED, ids=["-".join(key) for key in WALKED])
def test_what_is_not_refused_by_name_can_be_worked_with(name, kind):
    thing, wrong = WALKED[name, kind], []
    for argument in _arguments(thing, kind):
        for value in NUMBERS if kind == "numbers" else FLAGS:
            try:
                made = thing(**{**_required(thing), argument: value})
            except (TypeError, ValueError) as error:
                if argument not in str(error):
                    wrong.append(f"{argument}={checks._shown(value)} is refused without its name: {error}")
            else:
                if kind == "flags":
                    wrong.append(f"{argument}={value!r} counts as a flag")
                elif why := _insane(made, argument, value):
                    wrong.append(f"{argument}={checks._shown(value)} is accepted, and then {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "name", [n for n, thing in _public().items() if "weight_decay" in inspect.signature(thing).parameters]
)
def test_weights_do_not_grow_by_decay(name):
    with pytest.raises(ValueError, match=r"weight_decay must be a finite number >= 0, got -0\.1"):
        _public()[name](weight_decay=-0.1)


def test_arrays_tracers_and_schedules_pass():
    @jax.jit
    def build(rate, decay):
        checks.scalar("learning_rate", rate, 0.0)
        checks.decay("b1", decay)
        checks.at_least("eps", rate, 0.0)
        return rate

    build(1e-3, 0.9)
    jax.vmap(build)(jnp.array([1e-3, 1e-2]), jnp.array([0.9, 0.99]))
    for check in (checks.scalar, checks.decay):
        check("x", optax.constant_schedule(0.1))
        check("x", jnp.float32(0.1))
        check("x", np.float64(0.1))
        check("x", 0)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (checks.scalar, float, "x must be a number, an array or a schedule, got <class 'float'>"),
        (
            checks.scalar,
            jnp.bfloat16(1.0),
            "x must be float32 or wider, got bfloat16: pass a Python number or a float32 array",
        ),
        (checks.scalar, jnp.ones(2), r"x must be one number, got an array of shape \(2,\)"),
        (checks.scalar, 10**400, "x must be an integer below 2.31 or a float, got an integer of 1329 bits"),
        (checks.decay, 1.0, r"x must be in \[0, 1\), got 1.0"),
        (checks.whole, 8.0, "x must be a whole number, got 8.0: pass 8"),
        (checks.whole, 2**31, "x must be a whole number <= 2147483647, got 2147483648"),
        (checks.seed, jnp.ones(()), r"x must be a whole number, got float32\[\]"),
        (checks.flag, "False", "x must be True or False, got 'False'"),
        (checks.function, int, "x must be a function, got <class 'int'>"),
        (checks.transformation, 1e-3, r"x must be an Optax transformation, with init and update, got 0.001"),
        (checks.number, jnp.sqrt, "x must be a number or an array, not a schedule"),
    ],
)
def test_a_message_says_what_is_wanted_and_what_came(check, value, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        check("x", value)


def test_an_unknown_argument_is_answered_with_the_one_meant():
    @checks.did_you_mean
    def recipe(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
        return learning_rate, b1, b2, eps, weight_decay

    assert recipe(1.0, b2=0.5) == (1.0, 0.9, 0.5, 1e-8, 0.0)
    assert next(iter(inspect.signature(recipe).parameters)) == "learning_rate"
    meant = {"lr": "learning_rate", "betas": "b1 and b2", "epsilon": "eps", "beta_1": "b1", "weigth_decay": "weight_decay"}
    for name, answer in meant.items():
        with pytest.raises(TypeError, match=rf"recipe\(\) has no argument '{name}': did you mean {answer}\?"):
            recipe(1.0, **{name: 0.1})
    with pytest.raises(TypeError, match="'nu_dtype': its arguments are learning_rate, b1"):
        recipe(1.0, nu_dtype=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adam_jax.scale_by_adam(epsilon=1e-8), r"scale_by_adam\(\) has no argument 'epsilon': did you mean eps\?"),
        (lambda: adam_jax.scale_by_adamax(betas=(0.9, 0.99)), r"has no argument 'betas': did you mean b1 and b2\?"),
        (lambda: adam_jax.adamw(lr=1e-3), r"adamw\(\) has no argument 'lr': did you mean learning_rate\?"),
        (lambda: adam_jax.adamw(1e-3, wd=0.1), r"has no argument 'wd': did you mean weight_decay\?"),
        (lambda: adam_jax.adam(weight_decay=0.1), r"has no argument 'weight_decay': .* as adamw\(\)"),
        (lambda: adam_jax.nadam(wd=0.1), r"has no argument 'wd': .* as adamw\(\)"),
        (lambda: adam_jax.adam(amsgrad=True), r"has no argument 'amsgrad': .* amsgrad\(\)"),
        (lambda: adam_jax.adam(state_dtype="int8"), r"has no argument 'state_dtype': did you mean storage\?"),
        (lambda: adam_jax.in_float32(1e-3), "tx must be an Optax transformation, with init and update, got 0.001$"),
        (lambda: adam_jax.skip_nonfinite(adam_jax.adam), "tx must be an Optax transformation, .*: call it$"),
        (lambda: adam_jax.adam().update(jnp.ones(1), optax.adam(0.1).init(jnp.ones(1))), "got Optax's ScaleByAdamState: "),
        (
            lambda: optax.inject_hyperparams(adam_jax.adam)(1e-3).init(jnp.ones(2, jnp.bfloat16)),
            "got bfloat16: pass a Python number or a float32 array, and to optax.inject_hyperparams hyperparam_dtype",
        ),
    ],
)
def test_the_one_who_reads_an_error_learns_what_to_do(call: Callable[[], object], message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
