"""The fused loop in Triton against its twin in plain torch: compiled on a GPU, else interpreted.

The interpreter takes some 0.3 s for a step of a tile: hence the small batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowered_maps import MAPS, on_device, permuted, two_layers, with_strides
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda.activations import FUNCTIONS
from fpi_cuda.loops.fused.cell_loop import run
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.ops import reference_loop
from fpi_cuda.ops import triton as engine
from fpi_cuda.ops.triton.shape import MAX_DEPTH, SLOTS, cell_shape, programs_for
from fpi_cuda.options import PRECISIONS, Anderson, Picard
from fpi_cuda.solution import SolveResult, Status

WHY_NOT = engine.why_not(torch.device("cpu"), torch.float32)
device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)

# Two roundings of one solve may part by a step, and then by what a step moves near the tolerance.
RTOL = {torch.float32: 1e-4, torch.float64: 1e-7}
VALUES = {torch.float32: 1e-3, torch.float64: 1e-6}
STEPS = 1
# Of one evaluation of the map, with sums of some hundred terms in another order.
ONE_EVALUATION = 2e-6


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def solved(lowered: Lowered, x0: Tensor, solver: Any, backend: Any = engine, **given: Any) -> Any:
    options = {"rtol": RTOL[x0.dtype], "atol": 0.0, "max_steps": 40, "precision": "ieee"} | given
    return run(lowered, x0, solver, backend=backend, **options)


def require_agreement(result: SolveResult, expected: SolveResult) -> None:
    """Status, steps, and values and residuals to what a step moves near the tolerance."""
    close = VALUES[result.x.dtype]
    assert result.status.tolist() == expected.status.tolist()
    assert int((result.num_steps - expected.num_steps).abs().max()) <= STEPS
    for ours, theirs in ((result.x, expected.x), (result.residual, expected.residual)):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close, equal_nan=True)


def troubled(lowered: Lowered, x0: Tensor) -> tuple[Lowered, Tensor]:
    """Sample 1 is lost from the start and 2 at its first evaluation, where there are so many."""
    if len(x0) < 3:
        return lowered, x0
    x0 = x0.clone()
    x0[1, 0] = torch.nan
    last = lowered.layers[-1]
    shift = torch.zeros_like(x0) if last.shift is None else last.shift.clone()
    shift[2, -1] = torch.inf
    layers = (*lowered.layers[:-1], replace(last, activation="identity", shift=shift))
    return replace(lowered, layers=layers), x0


# More samples than a tile has slots, fewer, one; sizes below, at and beyond those of a panel.
CASES = [
    ("one_layer", 19, 33, 0, Picard(0.9), torch.float32),
    ("one_layer", 1, 1, 0, Anderson(m=1), torch.float32),
    ("two_layers", 7, 3, 1, Anderson(m=8), torch.float32),
    ("two_layers", 21, 33, 40, Anderson(m=3), torch.float32),
    ("descent", 4, 33, 5, Anderson(m=5, beta=0.8), torch.float32),
    ("descent", 3, 65, 16, Picard(), torch.float64),
    ("adjoint", 5, 70, 64, Anderson(m=2), torch.float32),
    ("adjoint", 18, 19, 5, Anderson(m=4), torch.float64),
]


@device
@pytest.mark.parametrize(("name", "batch", "dim", "hidden", "solver", "dtype"), CASES, ids=str)
def test_agrees_with_its_twin(
    name: str, batch: int, dim: int, hidden: int, solver: Any, dtype: torch.dtype, device: str
) -> None:
    sizes = (batch, dim, dtype, *([hidden] if hidden else []))
    lowered, x0 = troubled(MAPS[name](*sizes), torch.randn(batch, dim, dtype=dtype))
    lowered, x0 = on_device(with_strides(lowered), device), x0.to(device)
    before = [t.clone() for t in (x0, *lowered.tensors())]
    result = solved(lowered, x0, solver)
    require_agreement(result, solved(lowered, x0, solver, reference_loop))
    if batch >= 3:
        assert result.status[1:3].tolist() == [Status.NONFINITE] * 2
    for now, then in zip((x0, *lowered.tensors()), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@device
@pytest.mark.parametrize("solver", [Picard(), Anderson(m=3)], ids=str)
def test_every_way_to_end(solver: Any, device: str) -> None:
    dim, dtype = 5, torch.float64
    # x -> factor x + shift, a factor per sample.
    factor = torch.tensor([0.5, 3.0, 0.5, 1.0, 0.999], dtype=dtype)[:, None].expand(5, dim)
    shift = torch.ones(5, dim, dtype=dtype)
    x0 = torch.zeros(5, dim, dtype=dtype, device=device)
    x0[2] = 2.0  # already there
    identity = Layer(torch.eye(dim, dtype=dtype), shift=shift)
    lowered = on_device(Lowered((identity,), x_factor=factor.contiguous()), device)
    result = solved(lowered, x0, solver, rtol=1e-8)
    require_agreement(result, solved(lowered, x0, solver, reference_loop, rtol=1e-8))
    assert result.status[[0, 2]].tolist() == [Status.CONVERGED] * 2
    assert result.num_steps[2] == 1
    assert result.status[3] != Status.CONVERGED
    if isinstance(solver, Picard):
        ends = [Status.DIVERGED, Status.CONVERGED, Status.MAX_STEPS, Status.MAX_STEPS]
        assert result.status.tolist()[1:] == ends
    true = (lowered(result.x) - result.x).norm(dim=1)
    torch.testing.assert_close(result.residual, true, rtol=1e-6, atol=1e-13)


@device
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_activation_is_accurate(name: str, dtype: torch.dtype, device: str) -> None:
    """With weights of 0 the second evaluation finds act(shift) to be the fixed point."""
    grid = torch.cat([torch.linspace(-25, 25, 75), torch.logspace(-6, 0, 20), torch.zeros(1)])
    u = torch.cat([grid, torch.tensor([1e30, -1e30])]).to(dtype)[None]
    weight = torch.zeros(u.shape[1], u.shape[1], dtype=dtype)
    lowered = on_device(Lowered((Layer(weight, name, shift=u),)), device)
    result = solved(lowered, torch.zeros_like(u).to(device), Picard(), rtol=0.0)
    expected = FUNCTIONS[name](u.double())
    assert result.status.tolist() == [Status.CONVERGED]
    eps = torch.finfo(dtype).eps
    # 1 + erf(u) cancels for negative u, in torch too; so does 1 - tanh(u)^2 for large ones.
    beside = {"gelu": 30, "gelu_derivative": 30, "tanh_derivative": 8}.get(name, 0) * eps
    torch.testing.assert_close(
        result.x.cpu().double(), expected, rtol=8 * eps, atol=max(beside, 1e-37)
    )


@device
@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid", "softplus", "gelu_derivative"])
def test_nan_stays_nan(name: str, device: str) -> None:
    u = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
    lowered = on_device(Lowered((Layer(torch.zeros(2, 2), name, shift=u),)), device)
    result = solved(lowered, torch.zeros_like(u).to(device), Picard())
    assert result.status.tolist() == [Status.CONVERGED, Status.NONFINITE]


def row_by_row(a: Any, b: Any, dtype: Any) -> Any:
    """NumPy's product; its own rounds a row by where it stands in the matrix, no device does."""
    import numpy

    return numpy.einsum("ik,kj->ij", a, b).astype(dtype)


@device
def test_a_sample_does_not_depend_on_the_others(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot, its tile, and what else they hold: permuted, alone, and after others."""
    if device == "cpu":
        monkeypatch.setattr("numpy.matmul", row_by_row)
    batch = SLOTS + 4
    for name, solver in (("two_layers", Anderson(m=3)), ("adjoint", Picard())):
        lowered = on_device(MAPS[name](batch, 33, torch.float32, 20), device)
        scale = torch.logspace(-3, 3, batch)[torch.randperm(batch), None]
        x0 = (scale * torch.randn(batch, 33)).to(device)
        whole = solved(lowered, x0, solver)
        assert len(set(whole.num_steps.tolist())) >= 2
        for order in (torch.randperm(batch), torch.tensor([batch - 1]), torch.arange(5, 12)):
            order = order.to(device)
            part = solved(permuted(lowered, order), x0[order], solver)
            for ours, full in zip(part, whole, strict=True):
                assert torch.equal(ours, full[order])


@device
def test_a_slow_sample_does_not_hold_its_tile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other slots go on to the rest of the batch: a tile is evaluated as often as the slow
    sample is."""
    batch, dim = 3 * SLOTS, 4
    factor = torch.full((batch, dim), 0.01)
    factor[3] = 0.6
    lowered = Lowered((Layer(torch.eye(dim), shift=torch.ones(batch, dim)),), x_factor=factor)
    evaluations = []
    if device == "cpu":
        from fpi_cuda.ops.triton import cell_tile

        apply_layer = cell_tile.apply_layer

        def counted(*args: Any, **kwargs: Any) -> None:
            evaluations.append(1)
            apply_layer(*args, **kwargs)

        monkeypatch.setattr(cell_tile, "apply_layer", counted)
    x0 = torch.zeros(batch, dim, device=device)
    result = solved(on_device(lowered, device), x0, Picard())
    assert result.status.tolist() == [Status.CONVERGED] * batch
    steps = result.num_steps.tolist()
    slow = steps.pop(3)
    assert slow > 5 * max(steps)
    if device == "cpu":
        assert len(evaluations) == slow


@device
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_rounded_as_asked(precision: str, device: str) -> None:
    """One evaluation of numbers that lose a 4096th in TF32 and in bfloat16."""
    dim, more = 130, 1 + 2.0**-12
    weight = (torch.randn(dim, dim) / dim**0.5).bfloat16().float() * more
    x0 = torch.randn(2, dim).bfloat16().float().to(device) * more
    lowered = on_device(Lowered((Layer(weight),)), device)
    given = {"max_steps": 1, "precision": precision}
    exact = solved(lowered, x0, Picard(), reference_loop, max_steps=1).residual
    asked = solved(lowered, x0, Picard(), reference_loop, **given).residual
    result = solved(lowered, x0, Picard(), **given).residual
    torch.testing.assert_close(result, asked, rtol=ONE_EVALUATION, atol=0)
    apart = ((result - exact) / exact).abs().min()
    assert (apart > 20 * ONE_EVALUATION) == (precision in ("tf32", "bf16"))


@device
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_whole_solves_with_rounded_products(precision: str, device: str) -> None:
    lowered = on_device(two_layers(5, 33, torch.float32, 20), device)
    x0 = torch.randn(5, 33, device=device)
    given = {"rtol": 1e-2, "precision": precision}
    result = solved(lowered, x0, Anderson(m=3), **given)
    require_agreement(result, solved(lowered, x0, Anderson(m=3), reference_loop, **given))


CELLS = {
    "dense": lambda: fpi.cells.Dense(3, 5),
    "mlp": lambda: fpi.cells.MLP(3, 5, 4, "softplus"),
    "descent": lambda: fpi.cells.GradientDescent(fpi.cells.MLPEnergy(3, 5, 4), 0.5),
}


@device
@pytest.mark.parametrize("name", CELLS)
def test_a_layer_and_its_gradients(name: str, device: str) -> None:
    """The adjoint takes the same kernel; what is differentiated twice, another route."""
    cell = CELLS[name]().double().to(device)
    z = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    inputs = [z, *cell.parameters()]
    results = []
    for backend in ("triton", "reference"):
        layer = fpi.FPILayer(cell, rtol=1e-10, backend=backend, solver=fpi.Anderson(m=4))
        value = layer(z)
        once = torch.autograd.grad(value.square().sum(), inputs)
        if backend == "triton":
            words = layer.explain()
            assert f"one Triton kernel evaluates g and steps, {SLOTS} samples at a time" in words
            assert "in IEEE float64" in words
            assert "the adjoint likewise" in words
            assert layer.last_solution.adjoint_stats.converged.all()
        results.append([value.detach(), *once])
    if name == "mlp":
        for results_of, backend in zip(results, ("triton", "reference"), strict=True):
            layer = fpi.FPILayer(cell, rtol=1e-10, backend=backend, solver=fpi.Anderson(m=4))
            (first,) = torch.autograd.grad(layer(z).square().sum(), z, create_graph=True)
            results_of += torch.autograd.grad(first.square().sum(), inputs)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@device
def test_what_it_cannot_serve_is_refused_with_the_reason(device: str) -> None:
    cell = fpi.cells.Dense(3, 4).to(device)
    z = torch.randn(1, 3, device=device)
    deep = fpi.FPILayer(cell, backend="triton", solver=fpi.Anderson(m=MAX_DEPTH + 1), route="fused")
    with pytest.raises(RuntimeError, match=f"goes to m={MAX_DEPTH}, the solver has m=9"):
        deep(z)


def arguments(lowered: Lowered, x: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """What a solve passes to the op."""
    caught: list[Any] = []

    class Catch:
        @staticmethod
        def cell_loop_(*args: Any, **kwargs: Any) -> None:
            caught.extend([list(args), kwargs])

    solved(lowered, x, Anderson(m=2), Catch)
    return caught[0], caught[1]


@device
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(3), r"x must be \(batch, dim >= 1\)"),
        (0, torch.zeros(3, 4, dtype=torch.float16), "x must be float32 or float64, got"),
        (2, torch.zeros(5, 3), r"weight1 must be \(outputs, 4\) torch.float32 on .*got \(5, 3\)"),
        (2, torch.zeros(5, 4).double(), "weight1 must be .*, got .* torch.float64"),
        (4, torch.zeros(3, 6), r"shift1 must be contiguous, \(3, 5\)"),
        (4, torch.zeros(5, 3).mT, "shift1 must be contiguous"),
        (6, None, "bias2, shift2 and factor2 belong to weight2"),
        (6, torch.zeros(3, 5), "the last weight must have the 4 outputs of x, got 3"),
        (10, torch.zeros(3), "atol must be contiguous, .* torch.float64"),
        (11, torch.zeros(3), "status must be contiguous, .* torch.int8"),
        ("depth", 9, "depth must be from 0 to 8, got 9"),
        ("max_steps", 0, "max_steps must be at least 1, got 0"),
        ("activation1", 11, "activation1 must be from 0 to 10, got 11"),
        ("activation2", -1, "activation2 must be from 0 to 10, got -1"),
        ("precision", 4, "precision must be from 0 to 3, got 4"),
    ],
)
def test_a_wrong_argument_is_refused(place: Any, wrong: Any, message: str, device: str) -> None:
    lowered = on_device(two_layers(3, 4, torch.float32, 5), device)
    args, kwargs = arguments(lowered, torch.randn(3, 4, device=device))
    if place == 6 and wrong is not None:
        args[7] = None
    if isinstance(place, int):
        args[place] = None if wrong is None else wrong.to(device)
    else:
        kwargs[place] = wrong
    with pytest.raises(RuntimeError, match=f"^cell_loop_: {message}"):
        engine.cell_loop_(*args, **kwargs)


@device
def test_an_empty_batch(device: str) -> None:
    args, kwargs = arguments(
        on_device(two_layers(3, 4, torch.float32, 5), device), torch.zeros(3, 4)
    )
    empty = [t[:0] if i in (0, 4, 10, 11, 12, 13) else t for i, t in enumerate(args)]
    engine.cell_loop_(*(t if t is None else t.to(device) for t in empty), **kwargs)


@pytest.mark.parametrize("depth", [0, 1, 5, MAX_DEPTH])
@pytest.mark.parametrize("compute_bytes", [4, 8])
def test_shapes(depth: int, compute_bytes: int) -> None:
    shape = cell_shape(depth, compute_bytes)
    assert max(depth, 1) <= shape.tile_rows <= 2 * max(depth, 1)
    for size in (shape.slots, shape.panel, shape.inner, shape.block):
        assert size & (size - 1) == 0
    assert shape.inner >= 16  # the least that tl.dot takes
    # Registers of a thread that hold the running sums by column, narrow or wide.
    running = 2 * shape.slots * shape.block * shape.tile_rows * compute_bytes / 4
    assert running <= 64 * 32 * shape.num_warps


def test_programs() -> None:
    assert programs_for(1, 16, 132) == 1
    assert programs_for(33, 16, 132) == 3
    assert programs_for(10**6, 16, 132) == 4 * 132
