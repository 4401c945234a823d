"""Clause 10, the user's tensors: a solve and its derivatives change none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from choices import ADJOINTS, SOLVERS
from torch import Tensor

import fpi_cuda as fpi

F64 = torch.float64
B, D = 4, 5


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("is_pair", [False, True], ids=["tensor", "pair"])
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_the_tensors_given_are_left_alone(
    is_pair: bool, backend: str | None, solver: Any, adjoint: Any
) -> None:
    x0 = torch.randn(B, D, dtype=F64)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    weight = (0.1 * torch.randn(D, D, dtype=F64)).requires_grad_()
    given = [x0, z, weight]
    before = [t.detach().clone() for t in given]
    versions = [t._version for t in given]

    def g(x: Any, z: Tensor) -> Any:
        if is_pair:
            return torch.tanh(x[1] @ weight + z), x[0]
        x.mul_(0.9)  # its own copy
        return torch.tanh(x @ weight + z)

    start = (x0, x0) if is_pair else x0
    sol = fpi.fixed_point(g, start, z, solver=solver, adjoint=adjoint, backend=backend)
    value = sum(sol.value) if is_pair else sol.value
    torch.autograd.grad(value.square().sum(), [z, weight])
    assert [t._version for t in given] == versions
    assert all(map(torch.equal, given, before))
    assert all(t.grad is None for t in given)
    assert not x0.requires_grad
    value = fpi.fixed_point(g, start, z, adjoint=adjoint).value
    (value[0] if is_pair else value).sum().backward()
    assert x0.grad is None
    assert z.grad is not None
