"""A g that misbehaves: refused by name, or served as if it did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from small_layers import Problem
from torch import Tensor, nn
from ways import BACKENDS, zeros
from ways import bent as g

import fpi_cuda as fpi

F64 = torch.float64
B, D = 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 300}


# --- a g that misbehaves ------------------------------------------------------------------------

BAD_VALUES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (lambda x: x[:, :2], r"must return the shape of x, got x=\(3, 4\), g\(x\)=\(3, 2\)"),
    "batch": (lambda x: x[:1], r"must return the shape of x, got x=\(3, 4\), g\(x\)=\(1, 4\)"),
    "more": (lambda x: x[:, None], r"got x=\(3, 4\), g\(x\)=\(3, 1, 4\)"),
    "wider": (lambda x: x.double(), "the dtype of x, got x=torch.float32, .*=torch.float64"),
    "integer": (lambda x: x.long(), r"the dtype of x, .*torch.int64. Cast in g"),
    "device": (lambda x: x.to("meta"), "must return on the device of x, got x on cpu, .* on meta"),
    "sparse": (lambda x: x.to_sparse(), r"must return dense tensors, .* Use \.to_dense\(\)"),
    "none": (lambda x: None, "must return a tensor like x, got NoneType"),
    "number": (lambda x: 0.0, "must return a tensor like x, got float"),
    "tuple": (lambda x: (x,), "must return a tensor like x, got tuple"),
}


@pytest.mark.parametrize("when", [0, 1, 2, 3])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_g_that_returns_something_else(name: str, when: int) -> None:
    change, message = BAD_VALUES[name]
    calls = [0]

    def wrong(x: Tensor, z: Tensor) -> Any:
        calls[0] += 1
        gx = g(x, z)
        return change(gx) if calls[0] > when else gx

    with pytest.raises((TypeError, ValueError), match="fixed_point: g .*" + message):
        fpi.fixed_point(wrong, zeros(), torch.randn(B, D))
    assert calls[0] == when + 1


def test_a_g_that_returns_something_else_in_backward(problem: Problem) -> None:
    z, a = problem
    backward = [False]

    def wrong(x: Tensor, z: Tensor) -> Tensor:
        gx = torch.tanh(x @ a.T + z)
        return gx[:, :2] if backward[0] else gx

    sol = fpi.fixed_point(wrong, torch.zeros_like(z), z, **TIGHT)
    backward[0] = True
    (first,) = torch.autograd.grad(sol.value.sum(), a, retain_graph=True)  # needs no evaluation
    assert torch.isfinite(first).all()
    with pytest.raises(ValueError, match="must return the shape of x"):
        torch.autograd.grad(sol.value.sum(), a, create_graph=True)


def test_a_tuple_state_needs_a_tuple_back() -> None:
    state = (zeros(), zeros(B, 2))
    for change, message in (
        (lambda x: x[0], "must return a tuple of 2 tensors like x, got Tensor"),
        (lambda x: x[:1], "must return a tuple of 2 tensors like x, got 1"),
        (lambda x: (x[1], x[0]), r"got x\[0\]=\(3, 4\), g\(x\)\[0\]=\(3, 2\)"),
        (lambda x: (x[0], x[1].double()), r"got x\[1\]=torch.float32, g\(x\)\[1\]=torch.float64"),
        (lambda x: (x[0], (x[1],)), "must return a tensor like x, got tuple"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fpi.fixed_point(change, state)
    assert isinstance(fpi.fixed_point(list, state).value, tuple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(), fpi.Broyden()], ids=str)
def test_a_g_that_works_in_place_on_x(solver: Any, backend: str) -> None:
    z = torch.randn(B, D, requires_grad=True)

    def in_place(x: Tensor, z: Tensor) -> Tensor:
        return x.sin_().mul_(0.6).add_(z)

    x0 = torch.randn(B, D)
    before = x0.clone()
    found = fpi.fixed_point(in_place, x0, z, solver=solver, backend=backend)
    expected = fpi.fixed_point(g, x0, z, solver=solver, backend=backend)
    assert torch.equal(x0, before)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.residual, expected.residual)
    (grad,) = torch.autograd.grad(found.value.sum(), z)
    (oracle,) = torch.autograd.grad(expected.value.sum(), z)
    assert torch.equal(grad, oracle)


class Greedy:
    """tanh(z - x / 2) with one part that writes over what it is given."""

    rowwise = True

    def __init__(self, part: str) -> None:
        self.part = part

    def prepare(self, z: Tensor) -> tuple[Tensor]:
        return (z.mul_(2) if self.part == "prepare" else 2 * z,)

    def step(self, x: Tensor, prepared: tuple[Tensor]) -> Tensor:
        (bias,) = prepared
        return torch.tanh(bias.sub_(0.5 * x) if self.part == "step" else bias - 0.5 * x)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(x, self.prepare(z))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("g", "message"),
    [
        (lambda x, z: torch.tanh(z.sub_(0.5 * x)), "must not change z in place"),
        (Greedy("prepare"), "must not change z in place"),
        (Greedy("step"), "must not change what prepare returned in place"),
    ],
    ids=["z", "prepare", "step"],
)
def test_a_g_that_writes_over_its_inputs(g: Any, message: str, mode: Any) -> None:
    with mode():
        z = torch.linspace(-2, 2, B)[:, None].repeat(1, D)
        with pytest.raises(ValueError, match=message):
            fpi.fixed_point(g, torch.zeros(B, D), z)
        z = torch.linspace(-2, 2, B)[:, None].repeat(1, D)
        sol = fpi.fixed_point(Greedy(""), torch.zeros(B, D), z, rtol=1e-6)
        torch.testing.assert_close(torch.tanh(2 * z - 0.5 * sol.value), sol.value)


def numpy_mask() -> Callable[[Tensor, Tensor], Tensor]:
    random = numpy.random.default_rng(0)
    return lambda x, z: 0.5 * x * torch.from_numpy(random.random(x.shape) > 0.5) + z


def centred() -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, z: 0.5 * (x - x.mean(0)) + z


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.JacobianFree(), fpi.Phantom(k=3, tau=0.5)])
@pytest.mark.parametrize(
    ("make", "rowwise"),
    [(numpy_mask, False), (centred, True)],
    ids=["numpy", "not row-wise"],
)
def test_a_g_that_is_another_function_when_evaluated_again(
    make: Any, rowwise: bool, adjoint: Any
) -> None:
    z = torch.randn(40, D) * torch.logspace(-3, 1, 40)[:, None]
    match = "has another value at the solution" + " for all rows together" * rowwise
    with pytest.raises(RuntimeError, match=match):
        fpi.fixed_point(
            make(), zeros(40, D), z.requires_grad_(), rowwise=rowwise, adjoint=adjoint, atol=1e-3
        )


def test_a_g_that_couples_samples_is_solved_where_nothing_else_is_claimed() -> None:
    z = torch.randn(40, D, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(centred(), torch.zeros(40, D, dtype=F64), z, **TIGHT)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, 2 * z - z.mean(0))


def test_a_g_whose_first_evaluation_hides_that_it_works_in_place() -> None:
    """x *= 0.5 changes nothing at x = 0."""
    z = torch.randn(B, D)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match="x in place in some evaluations only"):
            fpi.fixed_point(lambda x, z: x.mul_(0.5) + z if x.any() else z.clone(), zeros(), z)
        with mode():
            sol = fpi.fixed_point(lambda x, z: x.mul_(0.5) + z, zeros(), z, rtol=1e-6)
        torch.testing.assert_close(sol.value, 2 * z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "g",
    [fpi.cells.Dense(3, 4), lambda x, z: x + z, nn.Linear(4, 4)],
    ids=["cell", "function", "module"],
)
def test_a_wrong_number_of_inputs_is_named(g: Any) -> None:
    z = torch.zeros(5, 3)
    with pytest.raises(TypeError, match=r"g must take x and every z, but .* the 3 z given"):
        fpi.fixed_point(g, torch.zeros(5, 4), z, z, z)


def test_a_type_error_of_g_passes_through() -> None:
    def g(x: Tensor) -> Tensor:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        fpi.fixed_point(g, torch.zeros(5, 4))


def test_an_input_that_is_no_tensor_is_named() -> None:
    layer = fpi.FPILayer(fpi.cells.Dense(3, 4))
    with pytest.raises(TypeError, match=r"got z\[0\] = list. Convert it with torch.as_tensor"):
        layer([[1.0, 2.0, 3.0]])
