"""Every public name says what it does, with an example that runs."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest

import adam_jax

MODULES = [
    importlib.import_module(m.name) for m in pkgutil.iter_modules(adam_jax.__path__, "adam_jax.") if m.name[9:] != "__main__"
]
PUBLIC = [getattr(module, name) for module in MODULES for name in getattr(module, "__all__", ())]
DOCUMENTED = [thing for thing in PUBLIC if callable(thing)]


def _examples(thing: object) -> list[doctest.DocTest]:
    # names in the scope of every example: jax, jnp, optax and what the module itself can see
    scope = {"jax": jax, "jnp": jnp, "optax": optax}
    finder = doctest.DocTestFinder(recurse=False)
    return [test for test in finder.find(thing, extraglobs=scope) if test.examples]


@pytest.mark.parametrize("thing", DOCUMENTED, ids=lambda thing: f"{thing.__module__}.{thing.__name__}")
def test_public_name_has_a_docstring_with_a_running_example(thing):
    assert inspect.getdoc(thing), f"{thing} has no docstring"
    examples = _examples(thing)
    if inspect.isclass(thing):
        return  # states are shown in the examples of the functions that make them
    assert examples, f"{thing} has no example"
    runner = doctest.DocTestRunner()
    for example in examples:
        assert runner.run(example).failed == 0


def test_top_level_names_are_all_documented():
    assert {id(getattr(adam_jax, name)) for name in adam_jax.__all__} <= {id(thing) for thing in DOCUMENTED}
