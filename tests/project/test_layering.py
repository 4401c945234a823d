"""Imports point one way: layer, fixed_point, loops, autograd, ops, evaluation."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fpi_cuda

PACKAGE = Path(fpi_cuda.__file__).parent
BANNED_NAMES = {"utils", "helpers", "misc"}

# From the top down; what shares a level may not import one another.
LEVELS = [
    {"layer"},
    {"explain", "fixed_point"},
    {"loops"},
    {"autograd", "cells", "linear_solvers"},
    {"coupling", "lowered", "ops", "unconverged"},
    {
        "_extension",
        "activations",
        "declined",
        "evaluation",
        "norms",
        "options",
        "partial",
        "solution",
    },
]
# Built on the public modules, and imported by nothing but the package itself.
OUTSIDE = {"diagnostics", "testing"}
RANK = {unit: rank for rank, level in enumerate(LEVELS) for unit in level}


def unit_of(module: str) -> str | None:
    """`loops` for fpi_cuda.loops.host, "" for fpi_cuda itself, None for another package."""
    parts = module.split(".")
    if parts[0] != "fpi_cuda":
        return None
    unit = parts[1] if len(parts) > 1 else ""
    return "_extension" if unit == "_C" else unit


def imports_of(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute module) of each import, wherever it stands in the source."""
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            if base == "fpi_cuda":  # from fpi_cuda import options
                # Its function fixed_point hides the module of that name.
                names = [alias.name for alias in node.names]
                found += [
                    (node.lineno, "fpi_cuda" if n == "fixed_point" else f"fpi_cuda.{n}")
                    for n in names
                ]
            else:
                found.append((node.lineno, base))
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the imports of one module break, one line each."""
    here = unit_of(module)
    if here == "":
        return []
    problems = []
    for line, imported in imports_of(source, module, is_package):
        there = unit_of(imported)
        if there is None or there == here:
            continue
        if there not in RANK and there not in OUTSIDE:
            problem = "imports the package from inside it"
        elif here in OUTSIDE:
            private = there.startswith("_")
            problem = "imports a private module" if private else None
        elif there in OUTSIDE:
            problem = "imports what is built on top of it"
        elif RANK[there] < RANK[here]:
            problem = "imports upward"
        elif RANK[there] == RANK[here]:
            problem = "imports sideways"
        else:
            problem = None
        if problem:
            problems.append(f"{module}:{line} {problem}: {imported}")
    return problems


MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) for path in MODULES])
def test_imports_point_downward(path: Path) -> None:
    assert not violations(path.read_text(), module_name(path), path.name == "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) for path in MODULES])
def test_every_module_has_a_place_and_a_name_that_says_something(path: Path) -> None:
    name = module_name(path)
    assert unit_of(name) in {"", *RANK, *OUTSIDE}, f"{name} has no place in LEVELS"
    assert not BANNED_NAMES & set(name.split("."))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fpi_cuda.fixed_point", "from fpi_cuda.layer import FPILayer"),
        ("fpi_cuda.options", "from . import fixed_point"),
        ("fpi_cuda.cells.mlp", "from ..loops import host"),
        ("fpi_cuda.ops.rules", "def f():\n    import fpi_cuda.loops.host"),
        ("fpi_cuda.solution", "from fpi_cuda.options import Anderson"),
        ("fpi_cuda.layer", "from fpi_cuda.testing import zoo"),
        ("fpi_cuda.layer", "import fpi_cuda"),
        ("fpi_cuda.layer", "from fpi_cuda import fixed_point"),
        ("fpi_cuda.testing.zoo", "from fpi_cuda import _extension"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fpi_cuda.layer", "from fpi_cuda.fixed_point import fixed_point\nimport torch.nn"),
        ("fpi_cuda.loops.host", "from fpi_cuda import options\nfrom . import plan"),
        ("fpi_cuda.cells.mlp", "from .dense import Dense\nfrom ..partial import partial"),
        ("fpi_cuda.ops.native", "from fpi_cuda import _extension"),
        ("fpi_cuda.testing.zoo", "from fpi_cuda.layer import FPILayer"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
