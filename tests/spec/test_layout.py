"""The order of the packages: imports point down, and kernels are named by backends alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "fdd_kernels"
# Lowest first; packages of one floor do not import one another.
FLOORS = [
    {"version", "_moved", "common", "lens"},
    {"_build", "data"},
    {"backends"},
    {"engine"},
    {"objectives"},
    {"hf", "memory", "testing"},
    {"teacher_cache", "evaluation"},
    {"integrations"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
KERNELS = ("fdd_kernels.backends.triton", "fdd_kernels.backends.cpu", "fdd_kernels._C")
MODULES = sorted(ROOT.rglob("*.py"))


def imported(module: Path) -> Iterator[str]:
    """List the modules of the package that a module imports, also inside of functions."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("fdd_kernels."))


def package_of(module: Path) -> str:
    parts = module.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else module.stem


def test_every_package_has_its_floor():
    assert {package_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_imports_point_down(module):
    own = package_of(module)
    for name in imported(module):
        other = name.split(".")[1]
        assert other == own or FLOOR[other] < FLOOR[own], f"{own} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_kernels_are_named_by_backends_alone(module):
    """`fdd-kernels doctor` reports on the C++ extension itself."""
    if package_of(module) != "backends" and module.name != "doctor.py":
        assert not [name for name in imported(module) if name.startswith(KERNELS)]


def test_the_engine_names_no_objective():
    """Not even in a message or a type."""
    for module in (ROOT / "engine").rglob("*.py"):
        assert "objectives" not in {name.split(".")[1] for name in imported(module)}
        assert "fdd_loss" not in module.read_text()


def test_reading_text_needs_no_terminal_library():
    """The teacher cache and every trainer import `data`; `rich` is for commands."""
    for module in (ROOT / "data").rglob("*.py"):
        assert "rich" not in module.read_text()
        assert not [name for name in imported(module) if name.startswith("fdd_kernels.common.prog")]


def test_files_fit_on_a_few_screens():
    long = {str(m.relative_to(ROOT)): len(m.read_text().splitlines()) for m in MODULES}
    assert {name: lines for name, lines in long.items() if lines > 350} == {}
