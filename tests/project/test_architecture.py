"""ARCHITECTURE.md against the code: names exist, all modules are in it, the spine is what runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import fpi_cuda
from fpi_cuda import native_available

PACKAGE = Path(fpi_cuda.__file__).parent
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))))
PATHS = [q for q in QUOTED if "/" in q or re.search(r"\.(py|pyi|md|h|cpp|cu)$", q)]
NAMES = [q for q in QUOTED if re.fullmatch(r"\w+(\.\w+)+", q) and q not in PATHS]
SPINES = BLOCKS[:2]


def steps_of(spine: str) -> list[tuple[str, str]]:
    """(file, function) in the order in which a drawing of the spine has them."""
    steps = []
    for line in spine.splitlines():
        file, functions = re.split(r"\s{2,}", line)[:2]
        steps += [(file, function) for function in functions.split(" -> ")]
    return steps


def is_there(name: str) -> bool:
    """Whether fpi_cuda has this module, or something of this name in one."""
    parts = [*name.removeprefix("fpi_cuda.").split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["fpi_cuda", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_something_is_quoted() -> None:
    assert len(PATHS) > 50
    assert len(NAMES) > 8


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    there = (PACKAGE / path).exists() or (ROOT / path).exists()
    assert there, f"ARCHITECTURE.md names {path}: mend the page, or put the file back"


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    assert is_there(name), f"ARCHITECTURE.md names {name}, which is no more: mend the page"


def test_a_name_that_is_not_there_is_found_out() -> None:
    assert not is_there("loops.no_such_function")
    assert not is_there("no_such_module.choose")


def test_every_module_at_the_top_is_in_it() -> None:
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    said = set(re.findall(r"[\w/]+\.py|\w+/", PAGE))
    missing = (modules | folders) - said
    assert not missing, f"ARCHITECTURE.md does not say what {missing} are for"


@pytest.mark.skipif(not native_available(), reason="no compiled library")
@pytest.mark.parametrize(("direction", "which"), [("forward", 0), ("backward", 1)])
def test_the_spine_is_what_runs(direction: str, which: int) -> None:
    """The drawn calls come in this order, among others."""
    pytest.importorskip("tqdm", reason="the bench extra is not installed")
    from bench import spine

    calls = iter(spine.way("host")[direction].calls)
    for step in steps_of(SPINES[which]):
        assert step in calls, f"{step} does not come, or not in this place"
