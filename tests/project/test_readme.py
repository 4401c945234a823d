"""README's code runs, and its two programs agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_layer_equals_the_five_lines() -> None:
    layer, loop = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    names: dict[str, Any] = {}
    exec(layer, names)
    found = names["x"].detach()
    with torch.no_grad():
        exec(loop, names)
    error = (found - names["x"]).norm(dim=1) / names["x"].norm(dim=1)
    assert (error < 1e-3).all()
    assert names["sol"].converged.all()


def test_the_cell_of_the_readme_takes_the_fused_loop() -> None:
    first, cell = (
        re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[i] for i in (0, 2)
    )
    names: dict[str, Any] = {}
    exec(first.splitlines()[0], names)
    exec(cell, names)
    z = torch.randn(8, 16)
    found, expected = (
        names["fpi"].FPILayer(names["Gated"](16), route=route, rtol=1e-6)
        for route in ("fused", "host")
    )
    found.g.load_state_dict(expected.g.state_dict())
    torch.testing.assert_close(found(z), expected(z), rtol=1e-5, atol=1e-5)
