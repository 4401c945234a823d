"""Rounded products: what may be asked for, and that g itself judges what they reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import cells
from fpi_cuda.loops.fused.cell_loop import solve_fused, verify_rounded
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.ops import native, reference_loop
from fpi_cuda.ops.rounding import round_bf16, round_tf32, tf32_parts
from fpi_cuda.options import FLOORS, PRECISIONS
from fpi_cuda.solution import SolveResult, Status

ROUNDED = [name for name in PRECISIONS if name != "ieee"]
needs_native = pytest.mark.skipif(not fpi.native_available(), reason="no native library")


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32)


def test_tf32_keeps_ten_bits_and_rounds_to_the_nearest() -> None:
    t = torch.cat([torch.randn(1000) * torch.logspace(-30, 30, 1000), torch.zeros(1)])
    rounded = round_tf32(t)
    assert not bool((bits(rounded) & 0x1FFF).any())
    assert bool(((rounded - t).abs() <= 2.0**-11 * t.abs()).all())
    tie = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11])
    assert round_tf32(tie).tolist() == [1 + 2.0**-10, -1 - 2.0**-10]
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    assert torch.equal(bits(round_tf32(special)), bits(special))
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert bool(round_tf32(nans).isnan().all())


def test_two_parts_hold_twenty_two_bits() -> None:
    t = torch.randn(1000)
    high, low = tf32_parts(t)
    assert bool(((high.double() + low - t).abs() <= 2.0**-22 * t.abs()).all())


@needs_native
@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_kernels_round_as_torch_does(name: str) -> None:
    # One product each, and so one number of g to compare: u = round(w) round(x).
    x = torch.cat([torch.randn(500), torch.tensor([1 + 2.0**-11, 1 + 2.0**-8, 3.0e38, -1.5e-30])])
    x = x[:, None]
    weight = torch.full((1, 1), 1.2345678)
    lowered = Lowered((Layer(weight),))
    rounds = round_tf32 if name == "tf32" else round_bf16
    x_before = x.clone()
    for engine in (native, reference_loop):
        status = torch.zeros(len(x), dtype=torch.int8)
        steps = torch.zeros(len(x), dtype=torch.int32)
        residual = torch.zeros(len(x), dtype=torch.float64)
        engine.cell_loop_(
            x.clone(), None, *lowered.layers[0].tensors(), None, None, None, None,
            torch.zeros(len(x), dtype=torch.float64), status, steps, residual,
            activation1=0, activation2=0, carry=0.0, depth=0, rtol=0.0, max_steps=1, beta=1.0,
            ridge=0.0, precision=PRECISIONS.index(name),
        )  # fmt: skip
        expected = (rounds(weight) * rounds(x_before) - x_before).abs().double().squeeze(1)
        torch.testing.assert_close(residual, expected, rtol=1e-6, atol=0.0)


CELLS = {
    "dense": lambda: cells.Dense(9, 33),
    "mlp": lambda: cells.MLP(9, 33, 40, "softplus"),
    "descent": lambda: cells.GradientDescent(cells.MLPEnergy(9, 33, 40), 0.5),
}


@needs_native
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson()], ids=str)
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
def test_the_tolerance_is_met_by_g_itself(make: Any, name: str, solver: Any) -> None:
    cell, z = make(), torch.randn(50, 9)
    rtol = FLOORS[name]
    layer = fpi.FPILayer(cell, precision=name, rtol=rtol, solver=solver, route="fused")
    solution = layer.solve(z)
    assert bool(solution.converged.all())
    value = solution.value.detach()
    gx = cell.double()(value.double(), z.double()).detach()
    true = (gx - value).norm(dim=1)
    assert bool((true <= 1.01 * rtol * gx.norm(dim=1)).all())
    if name == "tf32x3":
        return  # whose residual is of the size of float32's own rounding
    torch.testing.assert_close(solution.residual.double(), true, rtol=1e-2, atol=0.0)


@needs_native
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
def test_gradients_are_as_good_as_the_tolerance(make: Any, name: str) -> None:
    cell, z, v = make(), torch.randn(50, 9), torch.randn(50, 33)

    def gradient(**options: Any) -> list[Tensor]:
        given = z.clone().requires_grad_()
        layer = fpi.FPILayer(cell, **options)
        solution = layer.solve(given)
        (solution.value * v).sum().backward()
        stats = solution.adjoint_stats
        assert stats is not None
        assert bool(stats.converged.all())
        assert given.grad is not None
        return [given.grad, *(p.grad for p in cell.parameters() if p.grad is not None)]

    exact = gradient(rtol=1e-6, route="host")
    cell.zero_grad()
    rounded = gradient(rtol=FLOORS[name], precision=name, route="fused")
    for one, other in zip(exact, rounded, strict=True):
        # Both solves, each amplified by (I - J)^-1, which is below 3 in these cells.
        assert float((one - other).norm() / one.norm()) <= 5 * max(FLOORS[name], 1e-5)


@needs_native
def test_a_fixed_point_of_rounding_alone_is_none() -> None:
    # x + 1 has no fixed point, but bf16 rounds 257 + 1 to 257.
    lowered = Lowered((Layer(torch.eye(1), shift=torch.ones(4, 1)),))
    x0 = torch.tensor([[257.0], [1.0], [0.0], [2.0]])
    for solver in (fpi.Picard(), fpi.Anderson()):
        result = solve_fused(
            lowered, x0, solver, rtol=1e-3, atol=0.0, max_steps=400, backend=native,
            precision="bf16",
        )  # fmt: skip
        assert Status.CONVERGED not in result.status.tolist()
        torch.testing.assert_close(result.residual, torch.ones(4).double())


@needs_native
def test_what_rounding_keeps_from_the_tolerance_is_stalled() -> None:
    # Products that cancel: rounding moves g by much more than its own size.
    weight = torch.tensor([[300.0, -300.0], [300.0, -300.0]]) * 1.001
    lowered = Lowered((Layer(weight, shift=torch.tensor([[1.0, 1.01]])),))
    options: dict[str, Any] = {"rtol": 0.0, "atol": 1e-2, "max_steps": 100, "backend": native}
    x0 = torch.tensor([[1.0, 1.01]])
    exact = solve_fused(lowered, x0, fpi.Anderson(), **options)
    assert exact.status.tolist() == [Status.CONVERGED]
    rounded = solve_fused(lowered, x0, fpi.Anderson(), precision="bf16", **options)
    assert rounded.status.tolist() in ([Status.STALLED], [Status.MAX_STEPS])
    value = lowered(rounded.x)
    expected = (value - rounded.x).norm(dim=1).double()
    torch.testing.assert_close(rounded.residual, expected, rtol=1e-4, atol=0.0)


@needs_native
def test_a_point_at_which_g_overflows_has_not_converged() -> None:
    lowered = Lowered((Layer(torch.full((1, 1), 3e38)),))
    found = SolveResult(
        torch.full((1, 1), 2.0),
        torch.full((1,), Status.CONVERGED, dtype=torch.int8),
        torch.ones(1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.float64),
    )
    x0 = torch.full((1, 1), 10.0)
    result = verify_rounded(lowered, x0, found, rtol=1e-2, atol=0.0, backend=native)
    assert result.status.tolist() == [Status.STALLED]
    assert not bool(result.residual.isfinite().any())


def test_a_tolerance_below_the_floor_is_refused() -> None:
    cell = cells.Dense(3, 4)
    for name in ROUNDED:
        rtol = FLOORS[name] / 2
        with pytest.raises(ValueError, match=f'precision="{name}" reaches tolerances of .* and'):
            fpi.FPILayer(cell, precision=name, rtol=rtol)
        with pytest.raises(ValueError, match="rtol of Implicit"):
            fpi.FPILayer(cell, precision=name, rtol=FLOORS[name], adjoint=fpi.Implicit(rtol=rtol))
        fpi.FPILayer(cell, precision=name, rtol=FLOORS[name])
        fpi.FPILayer(cell, precision=name, rtol=rtol, atol=1e-3)
    with pytest.raises(ValueError, match='use precision="tf32x3"'):
        fpi.FPILayer(cell, precision="bf16", rtol=1e-4)
    for wrong in ("half", None, 3):
        with pytest.raises(ValueError, match="must be one of 'ieee', 'tf32x3', 'tf32', 'bf16'"):
            fpi.fixed_point(cell, torch.zeros(2, 4), torch.zeros(2, 3), precision=wrong)  # type: ignore[arg-type]


@needs_native
def test_steps_that_judge_are_counted_and_capped() -> None:
    cell, z = cells.Dense(9, 33), torch.randn(6, 9)
    for max_steps in range(1, 8):
        layer = fpi.FPILayer(cell, precision="bf16", rtol=1e-2, max_steps=max_steps)
        assert int(layer.solve(z).num_steps.max()) <= max_steps


def test_other_routes_and_dtypes_are_exact() -> None:
    cell, z = cells.Dense(9, 33), torch.randn(6, 9)
    options: dict[str, Any] = {"precision": "bf16", "rtol": 1e-2}
    plain = fpi.FPILayer(cell, rtol=1e-2, route="host")(z)
    layer = fpi.FPILayer(cell, route="host", **options)
    assert torch.equal(layer(z), plain)
    assert '"bf16" is for the fused loop' in layer.explain()
    wide = cells.Dense(9, 33).double()
    layer = fpi.FPILayer(wide, **options)
    assert torch.equal(layer(z.double()), fpi.FPILayer(wide, rtol=1e-2)(z.double()))
    if fpi.native_available():
        assert "is for float32" in layer.explain()
        rounded = fpi.FPILayer(cell, **options)
        assert "products in bf16" in rounded.explain()
        assert "precision='bf16'" in repr(rounded)


@needs_native
def test_second_derivatives_take_the_exact_way() -> None:
    cell = cells.Dense(3, 4).float()
    z = torch.randn(5, 3, requires_grad=True)

    def norm_of_gradient(**options: Any) -> Tensor:
        layer = fpi.FPILayer(cell, **options)
        (grad,) = torch.autograd.grad(layer(z).square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        return second

    exact = norm_of_gradient(rtol=1e-6)
    rounded = norm_of_gradient(rtol=1e-3, precision="tf32")
    assert float((exact - rounded).norm() / exact.norm()) < 1e-2


def test_the_names_are_in_the_order_of_the_kernels() -> None:
    assert PRECISIONS == ("ieee", "tf32x3", "tf32", "bf16")
