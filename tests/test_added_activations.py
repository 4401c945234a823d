"""README's activation of a user's own: by the host loop, compiled into the fused one, and wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import cells

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(HEADER,) = re.findall(r"```cpp\n(.*?)```", README, re.DOTALL)
(EXAMPLE,) = re.findall(r"```python\n(def softsign_derivative.*?)```", README, re.DOTALL)
# A fresh interpreter draws from a random seed; conftest's does not reach it.
IMPORTS = "import torch, fpi_cuda as fpi\nfrom fpi_cuda import cells\ntorch.manual_seed(0)\n"


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTS + code],
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with README's header compiled in, and a second function that is wrong."""
    if shutil.which(os.environ.get("CXX", "c++")) is None or not (ROOT / "csrc").is_dir():
        pytest.skip("no C++ compiler, or no sources")
    folder = tmp_path_factory.mktemp("built")
    for name in ("csrc", "fpi_cuda"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    wrong = "template <class T>\nFPI_HD T wrong(T u) { return u; }\n"
    blind = "template <class T>\nFPI_HD T blind(T u) { return u > T(0) ? u : T(0); }\n"
    header = HEADER.replace("add(softsign) ", "add(wrong) add(blind) add(softsign) ")
    (folder / "activations.h").write_text(wrong + blind + header)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        env={
            **os.environ,
            "FPI_ACTIVATIONS": "activations.h", "FPI_CUDA": "0", "CXXFLAGS": "-O0",
        },
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder


COMPARED = """
for dtype in (torch.float32, torch.float64):
    z = torch.randn(9, 5, dtype=dtype)
    for cell in (
        cells.Dense(5, 7, "softsign"),
        cells.MLP(5, 7, 11, "softsign", "softsign"),
        cells.GradientDescent(cells.MLPEnergy(5, 7, 11, "softsign"), 0.3),
    ):
        cell.to(dtype)
        results = []
        for route in ("host", "fused"):
            given = z.clone().requires_grad_()
            value = fpi.FPILayer(cell, route=route, rtol=1e-6)(given)
            results.append((value, *torch.autograd.grad(value.square().sum(), [given, cell.A.weight]
                if hasattr(cell, "A") else [given])))
        for host, fused in zip(*results):
            torch.testing.assert_close(fused, host, rtol=1e-4, atol=1e-4)
print("same")
"""


def test_it_runs_fused_where_it_is_compiled_in(built: Path) -> None:
    done = run(built, EXAMPLE + COMPARED)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


def test_a_compiled_function_that_is_another_one_is_refused(built: Path) -> None:
    for name, function in (("wrong", "torch.tanh"), ("blind", "torch.relu")):
        code = f"cells.add_activation('{name}', cells.Activation({function}, torch.relu, 1.0))"
        done = run(built, code)
        problem = "the function given in torch" if name == "wrong" else "NaN at NaN"
        assert f"the compiled {name} must be {problem}" in done.stderr


def test_without_code_for_it_the_host_takes_it(tmp_path: Path) -> None:
    code = """
layer = fpi.FPILayer(fpi.cells.Dense(64, 128, activation="softsign"))
assert "no kernel computes the activation 'softsign'" in layer.explain(), layer.explain()
assert bool(layer.solve(torch.randn(3, 64)).converged.all())
"""
    done = run(ROOT, EXAMPLE + code)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_taken_is_refused() -> None:
    def same(u: Tensor) -> Tensor:
        return u

    for name in ("tanh", "sigmoid_derivative"):
        with pytest.raises(ValueError, match=f"name must be a new one, got '{name}'"):
            cells.add_activation(name, cells.Activation(same, torch.ones_like, 1.0))
    if fpi.native_available():
        with pytest.raises(RuntimeError, match="activation1 must be from 0 to"):
            torch.ops.fpi_cuda.cell_loop_(
                torch.zeros(1, 1), None, torch.ones(1, 1), *[None] * 7,
                torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int8),
                torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.float64),
                activation1=11, activation2=0, carry=0.0, depth=0, rtol=0.0, max_steps=1,
                beta=1.0, ridge=0.0, precision=0,
            )  # fmt: skip


def cosine(u: Tensor) -> Tensor:
    return torch.cos(u)


def cosine_without_tails(u: Tensor) -> Tensor:
    return torch.cos(u).masked_fill(u.abs() > 50, torch.nan)


def by_numpy(u: Tensor) -> Tensor:
    return torch.from_numpy(u.detach().numpy() ** 2)


@pytest.mark.parametrize(
    ("name", "activation", "error", "message"),
    [
        (3, cells.Activation(torch.sin, cosine, 1.0), TypeError, "name must be a string, got int"),
        ("my sin", cells.Activation(torch.sin, cosine, 1.0), ValueError, "must be an identifier"),
        ("sine", torch.sin, TypeError, r"must be an Activation\(value, derivative, lipschitz\)"),
        ("sine", cells.Activation(torch.sin, cosine, 0), ValueError, r"lipschitz must be in \(0"),
        ("sine", cells.Activation(torch.sin, cosine, float("inf")), ValueError, "lipschitz"),
        ("sine", cells.Activation(torch.sin, cosine, "1"), TypeError, "lipschitz must be a number"),
        (
            "sine",
            cells.Activation(torch.sin, torch.sin, 1.0),
            ValueError,
            "the derivative of sine must be that of its value, but at .* autograd finds",
        ),
        (
            "sine",
            cells.Activation(torch.sin, cosine_without_tails, 1.0),
            ValueError,
            "the derivative of sine must be that of its value",
        ),
        ("sine", cells.Activation(by_numpy, cosine, 1.0), ValueError, "that autograd can"),
        ("sine", cells.Activation(torch.sum, cosine, 1.0), ValueError, "elementwise"),
        ("sine", cells.Activation(torch.sin, torch.sum, 1.0), ValueError, "must be elementwise"),
        ("sine", cells.Activation(3, cosine, 1.0), TypeError, "value must be a function"),
        ("sine", cells.Activation(torch.sin, None, 1.0), TypeError, "derivative must be a"),
        ("sine", cells.Activation(torch.sin, cosine, 0.5), ValueError, "which is 1 somewhere"),
        ("sine", cells.Activation(torch.sin_, torch.sin, 1.0), ValueError, "must be that of its"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False])
def test_what_cannot_be_an_activation_is_refused(
    name: Any, activation: Any, error: type[Exception], message: str, grad: bool
) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(error, match="add_activation: .*" + message):
        cells.add_activation(name, activation)
    assert name not in cells.ACTIVATIONS


def test_a_derivative_with_kinks_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.added, "ACTIVATIONS", dict(cells.ACTIVATIONS))
    relu6 = cells.Activation(
        torch.nn.functional.relu6, lambda u: ((u > 0) & (u < 6)).to(u.dtype), 1.0
    )
    with torch.no_grad():
        cells.add_activation("relu6", relu6)
