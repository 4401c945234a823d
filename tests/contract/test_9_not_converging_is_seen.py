"""Contract, 9: not converging is said once, by the layer or the line, and never floods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow_maps import DIM, Heard, Module, fast, slow, texts, z_of
from tape import TapeGraphs

import fpi_cuda as fpi
from fpi_cuda import unconverged
from fpi_cuda.solution import AsyncNumber

SOLVERS = [fpi.Picard(), fpi.Anderson(), fpi.Broyden()]
BACKENDS = ["reference", "native"] if fpi.native_available() else ["reference"]


# Once.


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_layer_says_it_once(solver: Any, backend: str, grad: bool, heard: Heard) -> None:
    layer = fpi.FPILayer(slow(), solver=solver, backend=backend, max_steps=2)
    with torch.set_grad_enabled(grad):
        for _ in range(20):
            layer(z_of())
    (text,) = texts(heard)
    assert text.startswith("FPILayer(<lambda>): 8 of 8 samples did not converge (8 MAX_STEPS), ")
    assert "worst relative residual" in text
    assert "rtol=0.0001" in text
    assert fpi.Status.MAX_STEPS.remedy in text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_line_says_it_once(solver: Any, backend: str, heard: Heard) -> None:
    g, options = slow(), {"solver": solver, "backend": backend, "max_steps": 2}
    for _ in range(20):
        fpi.fixed_point(g, torch.zeros(8, DIM), z_of(), **options)
    assert len(texts(heard)) == 1
    fpi.fixed_point(g, torch.zeros(8, DIM), z_of(), **options)
    fpi.fixed_point(g, torch.zeros(8, DIM), z_of(), **options)
    assert [w.lineno - heard[0].lineno for w in heard] == [0, 2, 3]


def test_each_layer_says_it(heard: Heard) -> None:
    layers = [fpi.FPILayer(slow(), max_steps=2) for _ in range(3)]
    for _ in range(3):
        for layer in layers:
            layer(z_of())
    assert len(texts(heard)) == 3


# What is said, and what is not.


def test_a_solve_that_converges_says_nothing(heard: Heard) -> None:
    z = z_of(grad=True)
    fpi.FPILayer(fast)(z).sum().backward()
    fpi.fixed_point(fast, torch.zeros(8, DIM), z).value.sum().backward()
    fpi.fixed_point(fast, torch.zeros(0, DIM), z_of(0)).value.sum()
    assert texts(heard) == []


def test_throw_raises_and_does_not_warn(heard: Heard) -> None:
    with pytest.raises(fpi.ConvergenceError, match="8 of 8"):
        fpi.FPILayer(slow(), max_steps=2, throw=True)(z_of())
    assert texts(heard) == []


@pytest.mark.parametrize(
    ("g", "options", "status"),
    [
        (lambda x: 3 * x + 1, {"max_steps": 300, "solver": fpi.Picard()}, "DIVERGED"),
        (lambda x: x * torch.nan, {}, "NONFINITE"),
        (lambda x: torch.cos(x) + 1e3, {"rtol": 0.0, "max_steps": 300}, "STALLED"),
    ],
    ids=["diverged", "nonfinite", "stalled"],
)
def test_each_failure_is_named_with_its_own_remedy(
    g: Any, options: dict[str, Any], status: str, heard: Heard
) -> None:
    solution = fpi.fixed_point(g, torch.ones(5, 3), **options)
    assert bool((solution.status == fpi.Status[status]).any())
    (text,) = texts(heard)
    assert f"{int((~solution.converged).sum())} of 5 samples did not converge" in text
    assert status in text
    assert fpi.Status[status].remedy in text


def test_the_worst_residual_is_that_of_the_value(heard: Heard) -> None:
    g, z = slow(), z_of()
    x = fpi.fixed_point(g, torch.zeros(8, DIM), z, max_steps=2).value
    relative = (g(x, z) - x).norm(dim=1) / x.norm(dim=1)
    (text,) = texts(heard)
    assert f"worst relative residual {float(relative.max()):.2g}," in text


# The adjoint.


@pytest.mark.parametrize(
    "solver", [None, fpi.Picard(), fpi.Broyden(), fpi.GMRES(), fpi.ConjugateGradient()], ids=str
)
def test_an_adjoint_that_does_not_converge_is_said_once(solver: Any, heard: Heard) -> None:
    layer = fpi.FPILayer(
        slow(), max_steps=500, rtol=1e-3, adjoint=fpi.Implicit(solver=solver, max_steps=3)
    )
    for _ in range(5):
        layer(z_of(grad=True)).sum().backward()
    (text,) = texts(heard)
    assert "8 of 8 samples have an adjoint solve that did not converge (8 MAX_STEPS)" in text
    assert "worst relative residual" in text
    assert "GMRES" in text


@pytest.mark.parametrize("adjoint", [fpi.JacobianFree(), fpi.Neumann(k=2), fpi.Phantom(k=2)])
def test_an_adjoint_cut_by_choice_is_no_failure(adjoint: Any, heard: Heard) -> None:
    layer = fpi.FPILayer(slow(), max_steps=500, rtol=1e-3, adjoint=adjoint)
    layer(z_of(grad=True)).sum().backward()
    assert texts(heard) == []


def test_unroll_says_that_the_forward_solve_has_not_converged(heard: Heard) -> None:
    layer = fpi.FPILayer(slow(), max_steps=2, adjoint=fpi.Unroll())
    for _ in range(3):
        layer(z_of(grad=True)).sum().backward()
    assert len(texts(heard)) == 1


def test_samples_without_a_gradient_are_said_once_per_layer(heard: Heard) -> None:
    layer = fpi.FPILayer(fast)
    for _ in range(5):
        z = z_of()
        z[3] = torch.nan
        layer(z.requires_grad_())[:3].sum().backward()
    first, second = texts(heard)
    assert "(1 NONFINITE)" in first
    assert "1 of 8 samples contribute no gradient" in second


@pytest.mark.parametrize("grad", [False, True])
def test_the_device_route_says_it_later(
    tape: TapeGraphs, grad: bool, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fpi.FPILayer(Module().double(), max_steps=2, route="device")
    z = z_of().double()
    arrived: list[bool] = []
    peek = AsyncNumber.peek
    monkeypatch.setattr(AsyncNumber, "peek", lambda self: peek(self) if arrived else None)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            layer(z)
        assert texts(heard) == []
        arrived.append(True)
        for _ in range(3):
            layer(z)
    (text,) = texts(heard)
    assert "8 of 8 samples did not converge (8 MAX_STEPS), worst relative residual" in text
    assert not unconverged.waiting
