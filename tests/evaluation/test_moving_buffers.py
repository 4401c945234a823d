"""Clause 7: statistics that a module keeps count one call for each solve."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coupled_maps import F64, Map, orthogonal, true_residual
from torch import Tensor, nn

import fpi_cuda as fpi

NORM = nn.BatchNorm1d(5, dtype=F64)


def by_name(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * torch.tanh(NORM(x)) + z


class Holder:
    def __init__(self, norm: nn.Module) -> None:
        self.norms = [norm]

    def step(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.norms[0](x)) + z


class HeldInATuple(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = (norm,)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.norms[0](x)) + z


def one_call_away(x: Tensor, z: Tensor) -> Tensor:
    return by_name(x, z)


class Holding(nn.Module):
    """Keeps its norm where torch does not look for modules."""

    def __init__(self, held: object, find: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.held, self.find = held, find

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.find(self.held)(x)) + z


HOLDERS: dict[str, Callable[[nn.Module], Map]] = {
    "closure": lambda norm: lambda x, z: 0.5 * torch.tanh(norm(x)) + z,
    "list": lambda norm: (lambda held: lambda x, z: 0.5 * torch.tanh(held[0](x)) + z)([norm]),
    "default": lambda norm: lambda x, z, norm=norm: 0.5 * torch.tanh(norm(x)) + z,
    "global": lambda _: by_name,
    "method": lambda norm: Holder(norm).step,
    "tuple of a module": HeldInATuple,
    "global, one call away": lambda _: one_call_away,
    "dict of a module": lambda norm: Holding({"a": norm}, lambda held: held["a"]),
    "lists of a module": lambda norm: Holding([[norm]], lambda held: held[0][0]),
    "object of a module": lambda norm: Holding(Holder(norm), lambda held: held.norms[0]),
    "partial of a module": lambda norm: Holding(
        functools.partial(lambda norm: norm, norm), lambda held: held()
    ),
    "module of a module": lambda norm: Holding(
        nn.Sequential(Holding({"a": norm}, lambda held: held["a"])), lambda held: held[0].held["a"]
    ),
}


@pytest.mark.parametrize("held", HOLDERS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_batch_norm_counts_once_wherever_g_holds_it(held: str, grad: bool) -> None:
    """From x0 = 0 the first evaluation leaves the running mean where it was."""
    NORM.reset_running_stats()
    norm = NORM if "global" in held else nn.BatchNorm1d(5, dtype=F64)
    z = torch.randn(16, 5, dtype=F64)
    for call in (1, 2):
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        with torch.set_grad_enabled(grad):
            sol = fpi.fixed_point(
                HOLDERS[held](norm), torch.zeros_like(z), z, rtol=1e-10, max_steps=200
            )
        assert norm.num_batches_tracked == call
        want = 0.9 * before + 0.1 * sol.value.detach().mean(0)
        assert (norm.running_mean - want).abs().max() < 1e-8  # type: ignore[operator]


def test_statistics_of_a_modules_own_count_once() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(5, dtype=F64))
            self.register_buffer("replaced", torch.zeros((), dtype=F64))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.replaced = self.replaced + 1
            return 0.5 * torch.tanh(x - self.mean) + z

    g, z = Centred(), torch.randn(16, 5, dtype=F64)
    sol = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-10, max_steps=300)
    assert sol.converged.all()
    assert g.replaced == 1
    assert (g.mean - 0.1 * sol.value.detach().mean(0)).abs().max() < 1e-8
    assert true_residual(lambda x: 0.5 * torch.tanh(x - g.mean) + z, sol.value).max() < 1e-8


def test_spectral_norm_is_one_map_in_training_mode() -> None:
    """Its power iteration goes on with every evaluation, and moves the weight."""
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5, dtype=F64))
    z = torch.randn(4, 5, dtype=F64)
    sol = fpi.fixed_point(
        lambda x, z: 0.7 * torch.tanh(linear(x)) + z, torch.zeros_like(z), z, rtol=1e-10
    )
    assert sol.converged.all()
    assert int(sol.num_steps.max()) < 60
    sol.value.sum().backward()


def test_a_large_buffer_moves_once_too() -> None:
    """A solve that leaves it alone spares the next one the copy; one that does not, does not."""

    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2048, 1024))
            self.register_buffer("table", torch.ones(2048, 1024))
            self.moves = True

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            if self.moves:
                self.mean.mul_(0.9).add_(0.1)
            return 0.5 * torch.tanh(x) + z + 0 * self.mean[0, :3] * self.table[0, :3]

    g, z = Averaging(), torch.randn(4, 3)
    for count in (1, 2, 3):
        fpi.fixed_point(g, torch.zeros_like(z), z)
        assert abs(float(g.mean[0, 0]) - (1 - 0.9**count)) < 1e-6
    assert (g.table == 1).all()


class Encoded(nn.Module):
    """A model whose cell does not use the norm of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.a = nn.Linear(5, 5)
        self.mix = orthogonal(5, 0.5)

    def cell(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix + z) + 0 * self.a.bias


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.JacobianFree(), fpi.Unroll()], ids=str)
def test_a_norm_that_g_does_not_call_is_no_matter_in_transforms(adjoint: fpi.Unroll) -> None:
    model, z = Encoded().double().train(), torch.randn(4, 5, dtype=F64)

    def call(z: Tensor) -> Tensor:
        sol = fpi.fixed_point(
            model.cell, torch.zeros_like(z), z, adjoint=adjoint, rtol=1e-10, max_steps=200
        )
        return sol.value.sum()

    given = z.clone().requires_grad_()
    (want,) = torch.autograd.grad(call(given), given)
    torch.testing.assert_close(torch.func.grad(call)(z), want)
    torch.testing.assert_close(torch.func.jvp(call, (z,), (z,))[1], (want * z).sum())
    assert model.encoder[1].num_batches_tracked == 0


def test_what_g_names_and_holds_is_asked_nothing() -> None:
    """Proxies and slots of a user's own may raise where they are touched."""

    class Late:
        __slots__ = ("empty", "norm")

        def __getattr__(self, name: str) -> None:
            raise KeyError(name)

        def step(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * torch.tanh(self.norm(x)) + z

    late = Late()
    late.norm = nn.BatchNorm1d(5, dtype=F64)
    z = torch.randn(8, 5, dtype=F64)
    fpi.fixed_point(late.step, torch.zeros_like(z), z)
    assert late.norm.num_batches_tracked == 1


def test_a_norm_behind_many_objects_counts_once() -> None:
    class Config:
        def __init__(self) -> None:
            self.size = 3

    class Model:
        def __init__(self) -> None:
            self.lists = [[Config() for _ in range(64)] for _ in range(4)]
            self.blocks = [Holder(nn.BatchNorm1d(5, dtype=F64))]

        def step(self, x: Tensor, z: Tensor) -> Tensor:
            return self.blocks[0].step(x, z)

    model, z = Model(), torch.randn(8, 5, dtype=F64)
    fpi.fixed_point(model.step, torch.zeros_like(z), z)
    assert model.blocks[0].norms[0].num_batches_tracked == 1
