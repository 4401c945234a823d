"""README's code runs, and its two programs agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"


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
