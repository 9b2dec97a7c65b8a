"""Every public name says what it does, with an example that runs; every recipe says all of its arguments, in one wording."""

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from types import FunctionType

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import OPTIMIZERS

import adam_jax

NAMES = ("checkpoints", "interop", "norms", "online", "shardings", "storage", "surgery", "tables", "watch")
MODULES = [adam_jax, *(importlib.import_module(f"adam_jax.{name}") for name in NAMES)]
# of norms and storage, what the step reads; the rest is for users
INTERNAL = {"Choice", "Codes", "CorrectedRoots", "CorrectedSquares", "Int8", "Kept", "Limits", "Maxima", "Moving"}
INTERNAL |= {"Powers", "Roots", "Squares", "first_codes"}
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in sorted({*module.__all__} - INTERNAL)
    if isinstance(getattr(module, name), (type, FunctionType))
}
MENTIONED = "".join(test.docstring or "" for thing in PUBLIC.values() for test in doctest.DocTestFinder().find(thing))


def _internal_modules() -> list[str]:
    found = pkgutil.walk_packages(adam_jax.__path__, "adam_jax.")
    return sorted(m.name for m in found if not m.name.endswith("__main__"))


def _run(thing: object) -> int:
    """How many examples a thing has, after running them; names in their scope: jax, jnp, optax and what its module sees."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    found = [test for test in finder.find(thing, extraglobs={"jax": jax, "jnp": jnp, "optax": optax}) if test.examples]
    for test in found:
        assert runner.run(test).failed == 0, test.name
    return len(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring_with_a_running_example(name):
    thing = PUBLIC[name]
    assert inspect.getdoc(thing), "no docstring"
    # a class may instead be shown by the functions that make it
    assert _run(thing) or (isinstance(thing, type) and re.search(rf"\b{thing.__name__}\b", MENTIONED)), "no example"


@pytest.mark.parametrize("name", _internal_modules())
def test_examples_of_internals_run(name):
    module = importlib.import_module(name)
    shown = {id(thing) for thing in PUBLIC.values()}
    for thing in vars(module).values():
        if isinstance(thing, (type, FunctionType)) and thing.__module__ == name and id(thing) not in shown:
            _run(thing)


def test_every_transformation_and_state_is_public_at_the_top():
    assert {thing.__module__ for thing in PUBLIC.values()} <= set(_internal_modules())
    for module in ("optimizers", "family", "transforms", "scaling", "averaging", "faults", "low_precision"):
        home = importlib.import_module(f"adam_jax.{module}")
        theirs = {name for name in home.__all__ if isinstance(getattr(home, name), (type, FunctionType))}
        assert theirs <= set(adam_jax.__all__), module


def _arguments(name: str) -> dict[str, str]:
    """What a recipe's docstring says of each argument."""
    section = re.search(r"^Args:\n(.*?)\n\n", inspect.getdoc(getattr(adam_jax, name)) or "", re.DOTALL | re.MULTILINE)
    assert section, f"{name} has no Args"
    entries = re.split(r"\n(?=\w+: )", textwrap.dedent(section[1]))
    return {entry.split(": ", 1)[0]: " ".join(entry.split(": ", 1)[1].split()) for entry in entries}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recipe_says_all_of_its_arguments_in_their_order(name):
    assert list(_arguments(name)) == list(inspect.signature(getattr(adam_jax, name)).parameters)


def test_arguments_that_recipes_share_are_said_in_the_same_words():
    own = {("adamax", "b2"), ("adamax", "eps"), ("adamax", "storage"), ("amsgrad", "storage")}  # these mean something else
    said: dict[str, set[str]] = {}
    for name in OPTIMIZERS:
        for argument, words in _arguments(name).items():
            if (name.removesuffix("w"), argument) not in own:
                said.setdefault(argument, set()).add(words)
    assert {argument: words for argument, words in said.items() if len(words) > 1} == {}
    assert _arguments("adamaxw").items() >= {(k, v) for k, v in _arguments("adamax").items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recipe_has_a_signature_that_can_be_read(name):
    signature = str(inspect.signature(getattr(adam_jax, name)))
    assert len(signature) < 450


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if isinstance(thing, FunctionType)])
def test_a_signature_names_its_types(name):
    assert "ForwardRef" not in str(inspect.signature(PUBLIC[name]))
    assert "Union[" not in str(inspect.signature(PUBLIC[name]))


def test_every_public_module_has_a_page_of_the_reference():
    pages = Path(adam_jax.__file__).parents[1] / ".ci" / "api" / "pages"
    written = "".join(page.read_text() for page in pages.glob("*.md"))
    assert set(re.findall(r"^::: (\S+)$", written, re.MULTILINE)) == {module.__name__ for module in MODULES}
