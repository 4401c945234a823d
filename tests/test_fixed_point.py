"""fixed_point as a user meets it: options, states, closures, modes, and a g that misbehaves."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import pytest
import torch
from small_layers import Problem
from torch import Tensor
from ways import BACKENDS, zeros
from ways import bent as g

import fpi_cuda as fpi

F64 = torch.float64
B, D = 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 300}


def test_inputs_of_any_shape_and_dtype() -> None:
    labels, scale = torch.tensor([0, 2, 1]), torch.tensor(0.5, dtype=F64)
    table = torch.randn(3, D, dtype=F64, requires_grad=True)

    def look_up(x: Tensor, labels: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        return scale * x + table[labels]

    x0 = torch.zeros(B, D, dtype=F64)
    for rowwise in (False, True):
        # table and scale have no batch: what g reads cannot be compacted.
        sol = fpi.fixed_point(look_up, x0, labels, scale, table, rowwise=rowwise, **TIGHT)
        torch.testing.assert_close(sol.value, 2 * table[labels])
        (found,) = torch.autograd.grad(sol.value[0].sum(), table)
        torch.testing.assert_close(found[0], torch.full((D,), 2.0, dtype=F64))
        assert (found[1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    z = torch.randn(B, D, dtype=dtype, requires_grad=True)
    rtol = 4 * torch.finfo(dtype).eps
    sol = fpi.fixed_point(lambda x, z: 0.5 * x + z, torch.zeros_like(z), z, rtol=rtol)
    assert sol.value.dtype == dtype
    assert sol.residual.dtype == torch.promote_types(dtype, torch.float32)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, 2 * z, rtol=20 * rtol, atol=20 * rtol)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    torch.testing.assert_close(found, torch.full_like(z, 2.0), rtol=20 * rtol, atol=0)


def test_throw_names_the_samples_and_carries_the_solution() -> None:
    z = torch.randn(20, D)
    z[3] = torch.nan
    with pytest.raises(fpi.ConvergenceError) as raised:
        fpi.fixed_point(g, zeros(20, D), z, throw=True, max_steps=3, rtol=1e-6)
    message = str(raised.value)
    assert message.startswith("fixed_point: 20 of 20 samples did not converge: 0: MAX_STEPS")
    assert "3: NONFINITE" in message
    assert "and 12 more" in message
    assert "raise max_steps" in message
    assert "g returned NaN or Inf" in message
    solution = raised.value.solution
    assert solution.value.shape == (20, D)
    assert not solution.value.requires_grad
    assert solution.status[3] == fpi.Status.NONFINITE
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == message
    assert torch.equal(again.solution.status, solution.status)
    assert fpi.fixed_point(g, zeros(), z[4:7], throw=True).converged.all()


@pytest.mark.parametrize("x0_requires_grad", [False, True])
@pytest.mark.parametrize("z_requires_grad", [False, True])
def test_what_requires_grad(x0_requires_grad: bool, z_requires_grad: bool) -> None:
    x0 = zeros().requires_grad_(x0_requires_grad)
    z = torch.randn(B, D).requires_grad_(z_requires_grad)
    expected = fpi.fixed_point(g, x0.detach(), z.detach())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            sol = fpi.fixed_point(g, x0, z)
            recording = torch.is_grad_enabled()
        assert torch.equal(sol.value, expected.value)
        assert sol.value.requires_grad == (recording and z_requires_grad)
        for field in (sol.status, sol.num_steps, sol.residual):
            assert not field.requires_grad
        assert sol.adjoint_stats is None
    if z_requires_grad:
        fpi.fixed_point(g, x0, z).value.sum().backward()
        assert z.grad is not None
        assert x0.grad is None


def test_an_inference_tensor_from_an_earlier_solve_is_a_start() -> None:
    z = torch.randn(B, D, requires_grad=True)
    with torch.inference_mode():
        start = fpi.fixed_point(g, zeros(), z, rtol=1e-6).value
    sol = fpi.fixed_point(g, start, z, rtol=1e-5)
    assert (sol.num_steps == 1).all()
    sol.value.sum().backward()
    assert z.grad is not None


def test_a_warm_start_does_not_hold_the_graph_of_the_last_solve() -> None:
    z = torch.randn(B, D, requires_grad=True)
    cold = fpi.fixed_point(g, zeros(), z, rtol=1e-5)
    with torch.no_grad():
        moved = z + 1e-3
    warm = fpi.fixed_point(g, cold.value, moved.requires_grad_(), rtol=1e-5)
    assert (warm.num_steps < cold.num_steps).all()
    warm.value.sum().backward()
    assert z.grad is None
    expected = 1 / (1 - 0.6 * torch.cos(warm.value.detach()))
    torch.testing.assert_close(moved.grad, expected, rtol=1e-3, atol=1e-3)


def test_saved_tensor_hooks_around_a_solve(problem: Problem) -> None:
    z, a = problem
    with torch.autograd.graph.save_on_cpu():
        x = fpi.fixed_point(
            lambda x, z: torch.tanh(x @ a.T + z), torch.zeros_like(z), z, **TIGHT
        ).value
    found = torch.autograd.grad((x**2).sum(), (z, a))
    expected = torch.autograd.grad((problem.looped() ** 2).sum(), (z, a))
    torch.testing.assert_close(found, expected)


def test_anomaly_mode_and_deterministic_algorithms(problem: Problem) -> None:
    """The latter fills what is allocated and not written with NaN."""
    z, a = problem
    expected = torch.autograd.grad((problem.looped() ** 2).sum(), (z, a))
    torch.use_deterministic_algorithms(True)
    try:
        for backend in BACKENDS:
            for solver in (fpi.Picard(), fpi.Anderson(), fpi.Broyden()):
                for adjoint in (None, fpi.GMRES(), fpi.ConjugateGradient()):
                    x = fpi.fixed_point(
                        lambda x, z: torch.tanh(x @ a.T + z),
                        torch.zeros_like(z),
                        z,
                        solver=solver,
                        backend=backend,
                        adjoint=fpi.Implicit(solver=adjoint),
                        **TIGHT,
                    ).value
                    found = torch.autograd.grad((x**2).sum(), (z, a))
                    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autograd.set_detect_anomaly(True):
        x = fpi.fixed_point(
            lambda x, z: torch.tanh(x @ a.T + z), torch.zeros_like(z), z, **TIGHT
        ).value
        found = torch.autograd.grad((x**2).sum(), (z, a), create_graph=True)
        torch.autograd.grad(found[1].sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


class Prepared(NamedTuple):
    bias: Tensor
    scale: Tensor


@pytest.mark.parametrize("kind", [tuple, list, Prepared, dict])
def test_what_prepare_may_return(kind: Any) -> None:
    class Hoisting:
        rowwise = True

        def prepare(self, z: Tensor) -> Any:
            if kind is dict:
                return {"bias": 2 * z, "scale": z.sigmoid()}
            both = (2 * z, z.sigmoid())
            return Prepared(*both) if kind is Prepared else kind(both)

        def step(self, x: Tensor, prepared: Any) -> Tensor:
            bias, scale = prepared.values() if kind is dict else prepared
            return 0.9 * scale * torch.sin(x) + bias

        def __call__(self, x: Tensor, z: Tensor) -> Tensor:
            return self.step(x, self.prepare(z))

    z = torch.linspace(-4, 4, 8, dtype=F64)[:, None].repeat(1, D).requires_grad_()
    sol = fpi.fixed_point(Hoisting(), torch.zeros_like(z), z, **TIGHT)
    plain = fpi.fixed_point(lambda x, z: Hoisting()(x, z), torch.zeros_like(z), z, **TIGHT)
    torch.testing.assert_close(sol.value, plain.value)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    (expected,) = torch.autograd.grad(plain.value.sum(), z)
    torch.testing.assert_close(found, expected)
