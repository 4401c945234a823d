"""The evaluation that a fused solve is differentiated through: layer by layer, by kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda.activations import CODES, DERIVATIVES
from fpi_cuda.loops.fused.cell_layer import CellLayer
from fpi_cuda.ops import native, reference_loop

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

DTYPES = [torch.float32, torch.float64]
CELLS = {
    "dense": lambda: fpi.cells.Dense(3, 7, "tanh"),
    "mlp": lambda: fpi.cells.MLP(3, 7, 9, "relu", "sigmoid"),
    "descent": lambda: fpi.cells.GradientDescent(fpi.cells.MLPEnergy(3, 7, 9), 0.2),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of the two ops, by name."""
    calls: list[str] = []
    for name in ("cell_layer_", "weight_gradient_"):
        op = getattr(native, name)

        def run(*args: Any, op: Any = op, name: str = name, **kwargs: Any) -> None:
            calls.append(name)
            op(*args, **kwargs)

        monkeypatch.setattr(native, name, run)
    return calls


def layer_arguments(batch: int, inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(batch, inputs, dtype=dtype),
        torch.randn(inputs, outputs, dtype=dtype).mT / inputs**0.5,
        torch.randn(outputs, dtype=dtype),
        torch.randn(batch, outputs, dtype=dtype),
        torch.randn(batch, outputs, dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 31, 33), (13, 257, 65), (129, 64, 300)], ids=str)
def test_a_layer_equals_its_twin(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, inputs, outputs = size
    given = layer_arguments(batch, inputs, outputs, dtype)
    tolerance = 32 * torch.finfo(dtype).eps
    for name, derivative in DERIVATIVES.items():
        numbers = {
            "activation": CODES[name],
            "derivative": CODES[derivative],
        }
        found = [torch.full((batch, outputs), torch.nan, dtype=dtype) for _ in range(4)]
        native.cell_layer_(*found[:2], *given, **numbers)
        reference_loop.cell_layer_(*found[2:], *given, **numbers)
        for mine, twin in zip(found[:2], found[2:], strict=True):
            torch.testing.assert_close(mine, twin, rtol=tolerance, atol=tolerance)
        bare = [torch.empty_like(found[0]) for _ in range(2)]
        for engine, out in zip((native, reference_loop), bare, strict=True):
            engine.cell_layer_(out, None, *given[:2], None, None, None, **numbers)
        torch.testing.assert_close(*bare, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 33, 256, 2500])
def test_a_weight_gradient_equals_its_twin(batch: int, dtype: torch.dtype) -> None:
    for outputs, inputs in ((1, 1), (33, 7), (130, 65)):
        delta = torch.randn(batch, outputs, dtype=dtype)
        h = torch.randn(batch, inputs, dtype=dtype)
        found = torch.full((outputs, inputs), torch.nan, dtype=dtype)
        exact = torch.full((outputs, inputs), torch.nan, dtype=torch.float64)
        native.weight_gradient_(found, delta, h)
        reference_loop.weight_gradient_(exact, delta.double(), h.double())
        # Sums of 256 terms of size one, each partial sum rounded.
        tolerance = 64 * torch.finfo(dtype).eps * batch**0.5
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


def test_results_do_not_depend_on_the_threads() -> None:
    h, weight, bias, shift, factor = layer_arguments(700, 40, 90, torch.float32)
    given = (h, weight, bias, shift, factor)
    kept = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, slope = torch.empty(700, 90), torch.empty(700, 90)
            native.cell_layer_(out, slope, *given, activation=1, derivative=6)
            gradient = torch.empty(90, 40)
            native.weight_gradient_(gradient, out, h)
            found.append((out, slope, gradient))
    finally:
        torch.set_num_threads(kept)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("h", lambda t: t[:, :2].contiguous(), "weight must be \\(outputs, 2\\)"),
        ("bias", lambda t: t[:-1], "bias must be \\(4\\), got \\(3\\)"),
        ("shift", lambda t: t.mT.contiguous().mT, "shift must be contiguous"),
        ("out", lambda t: t.double(), "out must have dtype Float, got Double"),
        ("slope", lambda t: t[:1], "slope must be \\(5, 4\\)"),
        ("activation", lambda n: 99, "activation must be from 0 to"),
        ("derivative", lambda n: -1, "derivative must be from 0 to"),
    ],
)
def test_a_layer_says_what_it_cannot_take(name: str, change: Any, message: str) -> None:
    h, weight, bias, shift, factor = layer_arguments(5, 3, 4, torch.float32)
    given: dict[str, Any] = {
        "out": torch.empty(5, 4),
        "slope": torch.empty(5, 4),
        **{"h": h.contiguous(), "weight": weight, "bias": bias, "shift": shift, "factor": factor},
        **{"activation": 1, "derivative": 6},
    }
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match="cell_layer_: " + message):
        torch.ops.fpi_cuda.cell_layer_(**given)


def test_a_weight_gradient_says_what_it_cannot_take() -> None:
    with pytest.raises(RuntimeError, match="weight_gradient_: out must be \\(4, 3\\)"):
        native.weight_gradient_(torch.empty(3, 4), torch.ones(5, 4), torch.ones(5, 3))
    with pytest.raises(RuntimeError, match="weight_gradient_: h must have at least one sample"):
        native.weight_gradient_(torch.empty(4, 3), torch.ones(0, 4), torch.ones(0, 3))


def test_the_ops_pass_opcheck() -> None:
    h, weight, bias, shift, factor = layer_arguments(5, 3, 4, torch.float32)
    given = (torch.empty(5, 4), torch.empty(5, 4), h, weight, bias, shift, factor)
    numbers = {"activation": 1, "derivative": 6}
    torch.library.opcheck(torch.ops.fpi_cuda.cell_layer_.default, given, numbers)
    given = (torch.empty(4, 3), torch.ones(5, 4), h)
    torch.library.opcheck(torch.ops.fpi_cuda.weight_gradient_.default, given)


@pytest.mark.parametrize("activation", DERIVATIVES)
def test_a_layer_has_first_and_second_derivatives(activation: str) -> None:
    torch.manual_seed(1)
    h, weight, bias, shift, _ = (
        t.requires_grad_() for t in layer_arguments(4, 3, 5, torch.float64)
    )

    def layer(*inputs: Tensor) -> Tensor:
        out: Tensor = CellLayer.apply(native, activation, DERIVATIVES[activation], *inputs)[0]
        return out

    torch.autograd.gradcheck(layer, (h, weight, bias, shift))
    torch.autograd.gradgradcheck(layer, (h, weight, bias, shift))


@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_those_of_the_host_loop(name: str, counted: list[str]) -> None:
    cell = CELLS[name]().double()
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 7, dtype=torch.float64)

    def gradients(route: str) -> list[Tensor]:
        x0 = torch.zeros(6, 7, dtype=torch.float64)
        x = fpi.fixed_point(cell, x0, z, rtol=1e-11, route=route).value
        return list(torch.autograd.grad((v * x).sum(), [z, *cell.parameters()]))

    fused = gradients("fused")
    layers = 1 if name == "dense" else 2
    assert counted.count("weight_gradient_") == layers
    # Forward, and back to h.
    assert counted.count("cell_layer_") == 2 * layers
    counted.clear()
    for mine, expected in zip(fused, gradients("host"), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-9)
    assert not counted


def test_a_linear_solver_of_the_host_multiplies_with_the_same_jacobian() -> None:
    cell = CELLS["mlp"]().double()
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(6, 7, dtype=torch.float64)
    found = []
    for solver in (None, fpi.GMRES(), fpi.ConjugateGradient()):
        adjoint = fpi.Implicit(solver=solver) if solver else fpi.Implicit()
        x = fpi.fixed_point(cell, x0, z, rtol=1e-11, adjoint=adjoint).value
        found.append(torch.autograd.grad(x.sin().sum(), [z, *cell.parameters()]))
    for other in found[1:]:
        for mine, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-9)


def test_many_cotangents_at_once() -> None:
    cell = CELLS["mlp"]().double()
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(4, 7, dtype=torch.float64)
    x = fpi.fixed_point(cell, x0, z, rtol=1e-11).value
    v = torch.randn(3, 4, 7, dtype=torch.float64)
    inputs = [z, *cell.parameters()]
    at_once = torch.autograd.grad(x, inputs, v, is_grads_batched=True, retain_graph=True)
    by_vmap = torch.func.vmap(lambda w: torch.autograd.grad(x, inputs, w, retain_graph=True))(v)
    for i in range(3):
        for batched, mapped, alone in zip(
            at_once, by_vmap, torch.autograd.grad(x, inputs, v[i], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(batched[i], alone, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(mapped[i], alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", CELLS)
def test_no_samples_have_no_gradient(name: str) -> None:
    cell = CELLS[name]()
    z = torch.empty(0, 3, requires_grad=True)
    x = fpi.fixed_point(cell, torch.empty(0, 7), z, route="fused").value
    assert x.shape == (0, 7)
    for gradient in torch.autograd.grad(x.sum(), [z, *cell.parameters()]):
        assert not bool(gradient.any())
