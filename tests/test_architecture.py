"""The layers of the package: imports point down, never sideways, and nothing optional is needed to import it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adam_jax

PACKAGE = Path(adam_jax.__file__).parent
FLOORS = (
    {"ctrl_c", "moments", "rounding", "straight_through", "checks", "trees"},
    {"clock", "codes"},
    {"norms", "storage"},
    {"choices", "scaling", "averaging", "faults", "low_precision"},
    {"transforms"},
    {"family", "surgery", "tables"},
    {"optimizers", "online"},
    {"watch", "interop", "shardings", "checkpoints"},
    {"paper", "bench"},
    {"__main__"},
)
LAYER = {name: floor for floor, names in enumerate(FLOORS) for name in names}
LAZY = ("checkpoints", "interop", "online", "shardings", "surgery", "tables", "watch")
ARITHMETIC = {"moments", "rounding", "codes"}  # these import jax and numpy and one another, and nothing else


def _imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "adam_jax" else {str(node.module)}
            )
    return found


def _modules() -> dict[str, Path]:
    return {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent != PACKAGE
    }


def test_every_module_has_a_floor_and_every_floor_its_modules():
    assert {name.split(".")[0] for name in _modules()} == set(LAYER)


def test_imports_point_down_and_never_sideways():
    wrong = []
    for name, path in _modules().items():
        top = name.split(".")[0]
        for imported in _imports(path):
            parts = imported.split(".")
            if parts[0] == "adam_jax" and len(parts) > 1 and parts[1] != top and LAYER.get(parts[1], 99) >= LAYER[top]:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_the_arithmetic_imports_jax_only():
    own = {f"adam_jax.{name}" for name in ARITHMETIC}
    for name in ARITHMETIC:
        others = {imported.split(".")[0] for imported in _imports(PACKAGE / f"{name}.py") - own}
        assert others <= {"jax", "numpy", "collections", "functools", "typing", "zlib"}, name


def test_nothing_imports_the_paper():
    for name, path in _modules().items():
        if name.split(".")[0] not in ("paper", "__main__"):
            assert not any(imported.startswith("adam_jax.paper") for imported in _imports(path)), name


def test_importing_the_package_imports_no_optional_one():
    optional = "matplotlib rich pooch torch keras flax equinox orbax mlxtend sklearn pyarrow tensorboardX"
    code = f"import sys, adam_jax; assert not set('{optional}'.split()) & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_the_package_costs_optax_and_its_own_modules():
    # counted, not timed: installed, 8 to 11 ms of processor time after Optax's 400; from a folder without bytecode, as under
    # PYTHONDONTWRITEBYTECODE, 20 ms of compiling come on top, at every import
    code = "import sys, optax; before = set(sys.modules); import adam_jax; print(*sorted(set(sys.modules) - before))"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {name.split(".")[0] for name in imported} == {"adam_jax"}
    assert len(imported) <= 20
    assert not {f"adam_jax.{name}" for name in ("paper", "bench", *LAZY)} & set(imported)


@pytest.mark.parametrize("name", LAZY)
def test_a_folder_is_imported_when_it_is_first_asked_for(name):
    code = f"import adam_jax, sys; assert 'adam_jax.{name}' not in sys.modules; assert adam_jax.{name}.__all__"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert name in dir(adam_jax)


def test_the_readme_map_matches_the_tree():
    readme = (PACKAGE.parent / "README.md").read_text()
    block = readme.split("## The map")[1].split("```")[1]
    # a line is names, two spaces or more, what they are
    listed = {name.rstrip("/") for line in re.findall(r"^  (.*?)  ", block, re.MULTILINE) for name in line.split()}
    there = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert listed == there
