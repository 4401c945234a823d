"""The way from a layer to the op stays short, and the script that counts it right."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from bench import spine
from fpi_cuda import native_available

needs_native = pytest.mark.skipif(not native_available(), reason="no compiled library")

MOST_CHANGES = {"host": 45, "fused": 60}
"""Of file, in the forward pass of a layer's second call."""
MOST_FRAMES = {"host": 6, "fused": 7}
"""Of fpi_cuda, from layer(z) to the op that solves."""
MOST_PRIVATE = 8
"""Uses of names private to torch, in the derivative code."""


@needs_native
@pytest.mark.parametrize("route", ["host", "fused"])
def test_the_way_to_the_op_is_short(route: str) -> None:
    row = spine.way(route)["forward"].row()
    assert 0 < row["changes"] <= MOST_CHANGES[route]
    assert 0 < row["frames"] <= MOST_FRAMES[route]


@needs_native
def test_what_was_counted_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spine.main(["--out", str(tmp_path)])
    kept = json.loads((tmp_path / "spine.json").read_text())
    assert kept["complete"]
    assert kept["host"]["forward"]["changes"] > 0
    assert kept["derivative_code"]["statements"] > kept["derivative_code"]["docstrings"] > 0
    assert "statements" in capsys.readouterr().out


def test_few_names_private_to_torch_stand_between_g_and_its_gradient() -> None:
    assert sum(spine.code_of(spine.DERIVATIVE_CODE).private.values()) <= MOST_PRIVATE


def test_calls_and_changes_of_file_are_counted() -> None:
    trace = spine.Trace([("a", "f"), ("a", "g"), ("b", "h"), ("a", "f")], {"cell_loop_": 3})
    assert trace.row() == {"calls": 4, "functions": 3, "files": 2, "changes": 2, "frames": 3}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._C._functorch.f(t)", ["torch._C._functorch.f"]),
        ("from torch._C import _functorch as w\nw.f(w.g)", ["torch._C._functorch.f",
                                                            "torch._C._functorch.g"]),
        ("from torch._subclasses import FakeTensor\nisinstance(t, FakeTensor)",
         ["torch._subclasses.FakeTensor"]),
        ("t.grad_fn._saved_start", ["._saved_start"]),
        ("attrgetter('_version')", ["._version"]),
        ("from torch.nn.utils import parametrize as p\np._cache = p.cached",
         ["torch.nn.utils.parametrize._cache"]),
        ("self._whatever(other._mend)", []),
        ("pair._replace(x=1).__dict__", []),
    ],
)  # fmt: skip
def test_private_names_of_torch_are_found(source: str, names: list[str]) -> None:
    assert sorted(spine.private_names(ast.parse(source))) == sorted(names)
