"""Clause 2: batch_dims=0 makes the whole state one sample."""

from __future__ import annotations

import pytest
import torch
from coupled_maps import F64, graph
from torch import Tensor

import fpi_cuda as fpi


def test_one_sample_of_any_shapes() -> None:
    def g(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = state
        return (
            0.5 * torch.cos(b.sum() / 6),
            0.3 * torch.sin(c) * b.new_ones(2, 1) + 0.1 * a,
            0.2 * b.sum(0),
        )

    start = (torch.zeros((), dtype=F64), torch.zeros(2, 3, dtype=F64), torch.zeros(3, dtype=F64))
    sol = fpi.fixed_point(g, start, batch_dims=0, rtol=1e-12)
    assert sol.converged
    assert [t.shape for t in sol.value] == [t.shape for t in start]
    for now, then in zip(g(sol.value), sol.value, strict=True):
        assert (now - then).abs().max() < 1e-10


def test_one_sample_inside_of_vmap() -> None:
    g, x0 = graph(6, 2)
    zs = 0.1 * torch.randn(3, *x0.shape, dtype=F64)

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, batch_dims=0, rtol=1e-11, max_steps=500).value

    apart = torch.stack([solve(z) for z in zs])
    assert (torch.func.vmap(solve)(zs) - apart).abs().max() < 1e-9
    jacobian = torch.func.vmap(torch.func.jacrev(solve))(zs)
    want = torch.stack([torch.autograd.functional.jacobian(solve, z) for z in zs])
    assert (jacobian - want).abs().max() < 1e-8


def test_a_layer_of_one_sample() -> None:
    g, x0 = graph()
    layer = fpi.FPILayer(g, batch_dims=0, rtol=1e-8, max_steps=300, state_shape=tuple(x0.shape))
    z = 0.1 * torch.randn_like(x0)
    assert layer.solve(z).converged
    assert "batch_dims=0" in repr(layer)
    with pytest.raises(fpi.ConvergenceError, match="1 of 1 samples"):
        fpi.FPILayer(g, batch_dims=0, max_steps=2, throw=True)(z)


def test_one_sample_has_no_independent_rows() -> None:
    with pytest.raises(ValueError, match="batch_dims=0 makes the whole state one sample"):
        fpi.fixed_point(torch.cos, torch.zeros(3), batch_dims=0, rowwise=True)
