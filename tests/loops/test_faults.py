"""Awkward input and faults of g: a status for the sample, or the right result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways import F64, bent, bent_loop, each_backend, every_way, halved

import fpi_cuda as fpi
from fpi_cuda import Status

# --- sizes and memory formats ---------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 4), (1, 1), (5, 1), (3, 2), (2, 0), (0, 0), (3,), (0,), (2, 3, 1, 2)]
)
def test_small_and_empty_states(shape: tuple[int, ...], way: Any) -> None:
    z = torch.randn(shape, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(bent, torch.zeros(shape, dtype=F64), z, rtol=1e-10, max_steps=300, **way)
    expected = bent_loop(z)
    assert sol.value.shape == shape
    assert sol.status.shape == sol.num_steps.shape == sol.residual.shape == shape[:1]
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, expected, rtol=1e-8, atol=1e-9)
    weight = torch.randn(shape, dtype=F64)
    (found,) = torch.autograd.grad(sol.value, z, weight)
    (oracle,) = torch.autograd.grad(expected, z, weight)
    torch.testing.assert_close(found, oracle, rtol=1e-8, atol=1e-9)


def formats(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x (4, 3, 5, 2), all rows the same, in other places of memory."""
    scattered = torch.full((4, 6, 5, 2), torch.nan, dtype=x.dtype)[:, ::2]
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "every other": scattered.copy_(x),
        "expanded": x[:1].expand(4, 3, 5, 2),
        "offset": torch.cat([x[:1], x])[1:],
        "negative view": torch._neg_view(-x),
        "parameter": nn.Parameter(x.clone()),
    }


@every_way
def test_any_memory_format_gives_the_same_numbers(way: Any) -> None:
    start = torch.randn(1, 3, 5, 2).repeat(4, 1, 1, 1)
    offset = torch.randn(1, 3, 5, 2).repeat(4, 1, 1, 1)
    plain = fpi.fixed_point(bent, start, offset, rtol=1e-5, **way)
    for (name, x0), z in zip(formats(start).items(), formats(offset).values(), strict=True):
        before = x0.detach().clone()
        sol = fpi.fixed_point(bent, x0, z, rtol=1e-5, **way)
        assert torch.equal(sol.value, plain.value), name
        assert torch.equal(sol.num_steps, plain.num_steps), name
        assert torch.equal(x0, before), name


# One of the formats is a parameter, which has no graph.
@pytest.mark.filterwarnings("ignore:.*graph does not lead to x:fpi_cuda.FixedPointWarning")
@each_backend
def test_what_g_returns_may_lie_anywhere(backend: str) -> None:
    z = torch.randn(4, 3, 5, 2)
    plain = fpi.fixed_point(bent, torch.zeros_like(z), z, rtol=1e-5, backend=backend)
    for name in formats(z):

        def g(x: Tensor, z: Tensor, name: str = name) -> Tensor:
            gx = bent(x, z)
            return gx if name == "expanded" else formats(gx)[name]

        sol = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-5, backend=backend)
        assert torch.equal(sol.value, plain.value), name


@each_backend
def test_a_g_that_returns_x_or_a_view_of_it(backend: str) -> None:
    x0 = torch.randn(3, 4)
    sol = fpi.fixed_point(lambda x: x, x0, backend=backend)
    assert torch.equal(sol.value, x0)
    assert (sol.num_steps == 1).all()
    swapped = fpi.fixed_point(lambda x: x.flip(1).flip(1)[:, :], x0, backend=backend)
    assert torch.equal(swapped.value, x0)
    constant = torch.randn(4)
    sol = fpi.fixed_point(lambda x: constant.expand(3, 4), x0, backend=backend)
    assert torch.equal(sol.value, constant.expand(3, 4))
    assert (sol.num_steps == 2).all()


def test_a_state_of_a_million_elements() -> None:
    z = torch.randn(1, 10**6, requires_grad=True)
    sol = fpi.fixed_point(bent, torch.zeros(1, 10**6), z, rtol=1e-5)
    assert sol.converged.all()
    sol.value.sum().backward()
    expected = 1 / (1 - 0.6 * torch.cos(sol.value.detach()))
    torch.testing.assert_close(z.grad, expected, rtol=1e-3, atol=1e-3)


@every_way
def test_a_tuple_of_different_trailing_shapes(way: Any) -> None:
    z = torch.randn(3, 4, dtype=F64, requires_grad=True)
    x0 = (
        torch.zeros(3, dtype=F64),
        torch.zeros(3, 2, 2, dtype=F64),
        torch.zeros(3, 0, dtype=F64),
    )

    def g(state: tuple[Tensor, ...], z: Tensor) -> tuple[Tensor, ...]:
        a, b, c = state
        return 0.3 * torch.sin(b).sum((1, 2)), 0.2 * a[:, None, None] + z.view(3, 2, 2), c

    sol = fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=300, **way)
    a, b, c = sol.value
    assert (a.shape, b.shape, c.shape) == ((3,), (3, 2, 2), (3, 0))
    assert sol.converged.all()
    torch.testing.assert_close(a, 0.3 * torch.sin(b).sum((1, 2)))
    change = [new - old for new, old in zip(g(sol.value, z), sol.value, strict=True)]
    joint = torch.linalg.vector_norm(
        torch.cat([t.reshape(3, t.numel() // 3) for t in change], 1), dim=1
    )
    torch.testing.assert_close(sol.residual, joint, rtol=1e-3, atol=1e-15)
    found = torch.autograd.grad(a.sum(), z)[0]

    state: tuple[Tensor, ...] = x0
    for _ in range(100):
        state = g(state, z)
    torch.testing.assert_close(found, torch.autograd.grad(state[0].sum(), z)[0])


# --- tolerances and caps ----------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_tolerance_below_the_floor_of_the_dtype(dtype: torch.dtype, way: Any) -> None:
    z = torch.randn(4, 6, dtype=dtype)
    x0 = torch.zeros_like(z)
    sol = fpi.fixed_point(bent, x0, z, rtol=0.0, max_steps=2000, **way)
    assert ((sol.status == Status.STALLED) | (sol.residual == 0)).all()
    floor = 64 * torch.finfo(dtype).eps * torch.linalg.vector_norm(sol.value, dim=1)
    assert (sol.residual <= floor).all()
    torch.testing.assert_close(sol.value, bent_loop(z.double()).to(dtype))


@every_way
def test_an_x0_that_solves_already(way: Any) -> None:
    z = torch.randn(4, 6, dtype=F64, requires_grad=True)
    x0 = 2 * z.detach()
    sol = fpi.fixed_point(halved, x0, z, **way)
    assert (sol.status == Status.CONVERGED).all()
    assert (sol.num_steps == 1).all()
    assert (sol.residual == 0).all()
    assert torch.equal(sol.value, x0)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    torch.testing.assert_close(found, torch.full_like(z, 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@each_backend
def test_states_whose_squares_leave_float32(scale: float, backend: str) -> None:
    z = scale * torch.randn(3, 4)
    sol = fpi.fixed_point(halved, torch.zeros(3, 4), z, rtol=1e-6, backend=backend)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value / scale, 2 * z / scale, rtol=1e-4, atol=1e-4)
