"""Captured solves: the same answers as the host loop, and the same derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops.device.captured import (
    FEATURES,
    Cell,
    assert_gradients_like_host,
    assert_like_host,
    assert_same,
    gradients,
    inputs,
    solve,
)
from tape import TapeGraphs
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda.loops import device as device_loop
from fpi_cuda.solution import AsyncNumber


@pytest.mark.parametrize(
    "solver", [fpi.Picard(), fpi.Anderson(m=3), fpi.Broyden()], ids=lambda s: type(s).__name__
)
def test_a_captured_solve_is_the_host_loop(tape: TapeGraphs, solver: Any) -> None:
    g = Cell()
    for seed in range(3):
        x0, z = inputs(seed=seed)
        assert_gradients_like_host(g, x0, z, solver=solver)
    assert tape.log.count("capture") == 3  # the solve, the point of the adjoint, its products


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cells_with_hoisting(tape: TapeGraphs, batch: int, dtype: torch.dtype) -> None:
    cell = fpi.cells.Dense(3, FEATURES).to(dtype)
    for seed in range(2):
        x0, z = (t.to(dtype) for t in inputs(batch, seed))
        rtol = 10 * torch.finfo(dtype).eps
        assert_gradients_like_host(cell, x0, z, rtol=rtol, rowwise=False)
    assert tape.log.count("capture") == 3


def test_a_tuple_state_and_a_warm_start(tape: TapeGraphs) -> None:
    def g(x: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(0.5 * x[1] + z.sum(1, keepdim=True)), torch.sin(0.5 * x[0])

    x0, z = inputs()
    start = (x0[:, :4], x0[:, 4:8].clone())
    for _ in range(2):
        found = solve(g, start, z)
        expected = solve(g, start, z, route="host")
        for part, other in zip(found.value, expected.value, strict=True):
            assert torch.equal(part, other)
        start = found.value
    assert found.num_steps.tolist() == [1] * 5
    assert tape.log.count("capture") == 1


def test_failed_samples_end_as_on_the_host(tape: TapeGraphs) -> None:
    cell = fpi.cells.Dense(3, FEATURES, activation="relu").double()
    x0, z = inputs(6)
    z[1] = torch.nan
    z[4] = torch.inf
    found = assert_like_host(cell, x0, z, rowwise=False, max_steps=25)
    assert fpi.Status.NONFINITE in found.status
    for _ in range(2):
        with pytest.warns(fpi.FixedPointWarning) as heard:
            assert_gradients_like_host(cell, x0, z, rowwise=False, max_steps=25)
        assert len(heard) == 2  # of either loop


def test_a_cap_below_convergence_is_kept(tape: TapeGraphs) -> None:
    x0, z = inputs()
    for max_steps in (1, 2, 7):
        found = assert_like_host(Cell(), x0, z, max_steps=max_steps, rtol=1e-14)
        assert found.num_steps.tolist() == [max_steps] * 5


def test_the_adjoint_is_planned_in_the_forward_pass(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs()
    solution = solve(g, x0, z.requires_grad_())
    captures = tape.log.count("capture")
    solution.value.sum().backward()
    assert captures == tape.log.count("capture") == 3
    assert tape.log[-3:] == ["replay", "loop", "mark"]


def test_several_forwards_before_a_backward(tape: TapeGraphs) -> None:
    g = Cell()
    found = []
    for route in ("device", "host"):
        zs = [inputs(seed=seed)[1].requires_grad_() for seed in range(3)]
        total = sum(solve(g, inputs()[0], z, route=route).value.square().sum() for z in zs)
        found.append(torch.autograd.grad(total, [*zs, *g.parameters()]))
    assert all(map(torch.equal, *found))


def test_a_graph_that_is_kept(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs()
    solution = solve(g, x0, z.requires_grad_())
    loss = solution.value.square().sum()
    first = torch.autograd.grad(loss, [z, *g.parameters()], retain_graph=True)
    again = torch.autograd.grad(loss, [z, *g.parameters()])
    assert all(map(torch.equal, first, again))


def test_gradients_of_every_order(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs(1)
    weights = (g.norm.weight, g.b.bias)

    def value(z: Tensor, *_: Tensor) -> Tensor:
        return solve(g, x0, z, rtol=1e-12).value

    arguments = (z.requires_grad_(), *weights)
    assert torch.autograd.gradcheck(value, arguments)
    assert torch.autograd.gradgradcheck(value, arguments)
    assert tape.log.count("capture") == 3


def test_a_weight_changed_before_backward_is_not_read_by_the_plan(tape: TapeGraphs) -> None:
    """The bias is no part of what autograd saved, so nothing else would notice."""
    found = []
    for route in ("device", "device", "host"):
        torch.manual_seed(1)
        g = Cell()
        x0, z = inputs()
        solution = solve(g, x0, z.requires_grad_(), route=route)
        with torch.no_grad():
            g.b.bias.add_(1.0)
        found.append(torch.autograd.grad(solution.value.sum(), z))
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[1][0], found[2][0])


def test_an_input_changed_before_backward_is_not_read_by_the_plan(tape: TapeGraphs) -> None:
    found = []
    shift = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    for route in ("device", "host"):
        torch.manual_seed(1)
        g = Cell()
        x0, z = inputs()

        def shifted(x: Tensor, z: Tensor, g: Cell = g) -> Tensor:
            return g(x + shift, z.detach().abs())

        solution = solve(shifted, x0, z, route=route)
        z.mul_(3.0)
        found.append(torch.autograd.grad(solution.value.sum(), shift))
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(
    "adjoint", [fpi.JacobianFree(), fpi.Phantom(k=2), fpi.Neumann(k=3)], ids=str
)
def test_other_adjoints_need_no_plan(tape: TapeGraphs, adjoint: Any) -> None:
    g, (x0, z) = Cell(), inputs()
    for _ in range(2):
        assert_gradients_like_host(g, x0, z, adjoint=adjoint)
    assert tape.log.count("capture") == 1


@pytest.mark.parametrize("solver", [fpi.GMRES(), fpi.ConjugateGradient()], ids=str)
def test_a_linear_solver_of_the_adjoint_stays_on_the_host(tape: TapeGraphs, solver: Any) -> None:
    g, (x0, z) = Cell(), inputs()
    adjoint = fpi.Implicit(solver=solver)
    with pytest.raises(RuntimeError, match=r"the adjoint cannot run there: .* runs on the host"):
        gradients(g, x0, z, adjoint=adjoint)
    found = gradients(g, x0, z, adjoint=adjoint, route=None)
    assert all(map(torch.equal, found, gradients(g, x0, z, adjoint=adjoint, route="host")))
    layer = fpi.FPILayer(g, state_shape=FEATURES, adjoint=adjoint)
    layer(z.requires_grad_())
    layer(z)
    assert "the adjoint by the host loop" in layer.explain()


def test_solves_without_gradients(tape: TapeGraphs) -> None:
    g, (x0, z) = Cell(), inputs()
    expected = solve(g, x0, z, route="host")
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(solve(g, x0, z), expected)
    assert tape.log.count("capture") == 2


def test_the_forward_pass_does_not_look_at_its_result(
    tape: TapeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the host would have to wait for the solve."""
    looks: list[str] = []
    value = AsyncNumber.value
    monkeypatch.setattr(AsyncNumber, "value", lambda self: looks.append(place) or value(self))
    g, (x0, z) = Cell(), inputs()
    place = "building"
    solve(g, x0, z.requires_grad_())
    place = "forward"
    solution = solve(g, x0, z)
    assert "forward" not in looks
    place = "backward"
    solution.value.sum().backward()
    assert "backward" in looks


@pytest.mark.parametrize("everything", [False, True], ids=["one sample", "all samples"])
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_samples_found_failed_in_backward_only(tape: TapeGraphs, everything: bool) -> None:
    """Their derivative is NaN, and must not reach the weights of the others."""

    def with_captured(shift: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, z: torch.tanh(0.5 * x + shift) * z.sum(1, keepdim=True)

    x0, z = inputs()
    z[slice(None) if everything else 2] = torch.nan
    for captured in (False, True):
        found = []
        for route in ("device", "device", "host"):
            shift = torch.full((FEATURES,), 0.1, dtype=torch.float64, requires_grad=True)
            inner = shift.exp() if captured else shift
            device_loop.plans.clear()  # g reads another tensor each time
            value = solve(with_captured(inner), x0, z, route=route, rowwise=False).value
            found.append(torch.autograd.grad(value[[0, 1, 3]].sum(), shift)[0])
        assert bool(torch.isfinite(found[2]).all())
        assert torch.allclose(found[0], found[2], rtol=1e-12, atol=0.0)
        assert torch.allclose(found[1], found[2], rtol=1e-12, atol=0.0)
