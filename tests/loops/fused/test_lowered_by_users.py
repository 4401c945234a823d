"""A lower() that a user wrote: compared with step() in every solve, and refused where need be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import cells
from fpi_cuda.lowered import Layer, Lowered, NotLowered

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

D, B = 7, 20
DIFFER = r"{}\.lower\(\) must describe the map of step\(\), but they differ by .* in samples \["


class Truthful(cells.Cell):
    """size * tanh(M x / size + p), with a size for all numbers of the state."""

    def __init__(self, size: float = 1.0, activation: str = "tanh") -> None:
        super().__init__()
        self.x_features = D
        self.size = size
        self.activation = activation
        self.M = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.M.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        act = cells.ACTIVATIONS[self.activation].value
        return self.size * act(self.M(x) / self.size + prepared)

    def layer(self, prepared: Tensor, **changes: Any) -> Layer:
        parts = {
            "weight": self.M.weight / self.size,
            "activation": self.activation,
            "shift": prepared,
            "factor": torch.full_like(prepared, self.size),
        }
        return Layer(**{**parts, **changes})

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((self.layer(prepared),))


class Larger(Truthful):
    """Three times too large."""

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((self.layer(prepared, factor=torch.full_like(prepared, 3 * self.size)),))


class LastRows(Truthful):
    """Wrong in the last sample alone."""

    def lower(self, prepared: Tensor) -> Lowered:
        factor = torch.full_like(prepared, self.size)
        factor[-1] *= 1.001
        return Lowered((self.layer(prepared, factor=factor),))


class Misnamed(Truthful):
    """Names another activation than it steps with."""

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((self.layer(prepared, activation="relu"),))


class WithNaN(Truthful):
    def lower(self, prepared: Tensor) -> Lowered:
        weight = self.M.weight.detach().clone() / self.size
        weight[2, 3] = torch.nan
        return Lowered((self.layer(prepared, weight=weight),))


class Infinite(Truthful):
    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((self.layer(prepared, shift=prepared + torch.inf),))


class Borrowed(cells.Dense):
    """lower() of another map than its own."""

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return 0.5 * super().step(x, prepared)

    lower = cells.Dense.lower


class BorrowedByAStranger(cells.Cell):
    x_features = D
    activation = "tanh"

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.A.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.A(x) + prepared)

    lower = cells.Dense.lower


class Energy(cells.MLPEnergy):
    """lower_descent() of another energy than its own."""

    def value(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().value(x, prepared) + 0.1 * x.sum(-1)

    def gradient(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().gradient(x, prepared) + 0.1

    lower_descent = cells.MLPEnergy.lower_descent


def with_instance_lower() -> cells.Cell:
    cell = cells.Dense(D, D)
    cell.lower = lambda prepared: Lowered((Layer(0.9 * cell.A.weight, "tanh", shift=prepared),))
    return cell


WRONG: dict[str, Callable[[], cells.Cell]] = {
    "larger": Larger,
    "larger_tiny": lambda: Larger(1e-5),
    "larger_tinier": lambda: Larger(1e-30),
    "larger_huge": lambda: Larger(1e12),
    "last_rows": LastRows,
    "misnamed": Misnamed,
    "nan": WithNaN,
    "infinite": Infinite,
    "borrowed": lambda: Borrowed(D, D),
    "stranger": BorrowedByAStranger,
    "energy": lambda: cells.GradientDescent(Energy(D, D, 9), 0.3),
    "instance": with_instance_lower,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("route", [None, "fused"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_another_map_is_found_out(
    name: str, grad: bool, route: str | None, dtype: torch.dtype
) -> None:
    cell = WRONG[name]().to(dtype)
    z = torch.randn(B, D, dtype=dtype)
    message = DIFFER.format(type(cell).__name__)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        fpi.fixed_point(cell, torch.zeros_like(z), z, route=route)


def test_it_is_found_out_in_a_later_solve_too() -> None:
    class Late(Truthful):
        late = False

        def lower(self, prepared: Tensor) -> Lowered:
            factor = torch.full_like(prepared, 1.01 if self.late else 1.0)
            return Lowered((self.layer(prepared, factor=factor),))

    cell, z = Late(), torch.randn(B, D)
    layer = fpi.FPILayer(cell, route="fused")
    layer(z)
    cell.late = True
    with pytest.raises(ValueError, match=DIFFER.format("Late")):
        layer(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e12], ids=str)
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson()], ids=["picard", "anderson"])
def test_the_same_map_is_not(size: float, activation: str, solver: Any, dtype: torch.dtype) -> None:
    cell = Truthful(size, activation).to(dtype)
    z = torch.randn(B, D, dtype=dtype, requires_grad=True)
    found = []
    for route in ("fused", "host"):
        value = fpi.fixed_point(
            cell, torch.zeros(B, D, dtype=dtype), z, route=route, rtol=1e-5, solver=solver
        ).value
        found.append((value / size, torch.autograd.grad((value / size).sum(), z)[0]))
    for fused, host in zip(*found, strict=True):
        torch.testing.assert_close(fused, host, rtol=1e-3, atol=1e-4)


class Gated(cells.Cell):
    """sigmoid(z) * tanh(M x + z): a gate per feature and sample."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.x_features = features
        self.M = nn.Linear(features, features, bias=False)
        nn.init.orthogonal_(self.M.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.sigmoid(prepared) * torch.tanh(self.M(x) + prepared)

    def lower(self, prepared: Tensor) -> Lowered:
        gate = torch.sigmoid(prepared)
        return Lowered((Layer(self.M.weight, "tanh", shift=prepared, factor=gate),))


def test_a_gate_per_sample_is_fused_too(loops: list[int]) -> None:
    cell, z = Gated(D).double(), torch.randn(B, D).double()
    x0, v = torch.zeros_like(z), torch.randn_like(z)
    grads = []
    for route in ("host", "fused"):
        given = z.clone().requires_grad_()
        value = fpi.fixed_point(cell, x0, given, route=route, rtol=1e-10).value
        grads.append(torch.autograd.grad((value * v).sum(), [given, cell.M.weight]))
    assert len(loops) == 2
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-8)


class Undecided(Truthful):
    def lower(self, prepared: Tensor) -> Lowered:
        raise NotLowered("it is Tuesday")


def test_a_cell_may_decline(loops: list[int]) -> None:
    z = torch.randn(B, D)
    x0 = torch.zeros_like(z)
    with pytest.raises(RuntimeError, match="cannot run there: it is Tuesday"):
        fpi.fixed_point(Undecided(), x0, z, route="fused", rtol=1e-4)
    assert bool(fpi.fixed_point(Undecided(), x0, z, rtol=1e-4).converged.all())
    assert not loops


def test_failed_samples_are_no_difference() -> None:
    cell, z = Truthful().double(), torch.randn(B, D, dtype=torch.float64)
    z[3] = torch.nan
    with torch.no_grad():
        sol = fpi.fixed_point(cell, torch.zeros_like(z), z, route="fused")
    assert sol.status[3] == fpi.Status.NONFINITE
    assert int(sol.converged.sum()) == B - 1


class Deep(cells.Cell):
    """Three layers, or none, told truthfully."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.x_features = D
        self.layers = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(count))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, 0.8)

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) + prepared)
        return x

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered(tuple(Layer(m.weight, "tanh", shift=prepared) for m in self.layers))


@pytest.mark.parametrize("count", [0, 3, 4])
def test_more_layers_than_kernels_run_go_to_the_host(count: int) -> None:
    cell, z = Deep(count).double(), torch.randn(B, D, dtype=torch.float64)
    sol = fpi.fixed_point(cell, torch.zeros_like(z), z, rtol=1e-10)
    assert (cell(sol.value, z) - sol.value).norm() <= 1e-8
    with pytest.raises(RuntimeError, match=f"it has {count} layers, and the kernels run one or"):
        fpi.fixed_point(cell, torch.zeros_like(z), z, rtol=1e-10, route="fused")


class Scaled(Truthful):
    """tanh(M (s x) + p), with s in x_factor."""

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().step(x * torch.sigmoid(prepared), prepared)

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((self.layer(prepared),), x_factor=torch.sigmoid(prepared))


class SteppedThrough(Truthful):
    """Its step has a derivative of the user's own."""

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        out = super().step(x, prepared)
        return 0.5 * out + 0.5 * out.detach()

    lower = Truthful.lower


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Scaled, "a map with an x_factor"), (SteppedThrough, "step\\(\\) has another derivative")],
    ids=["x_factor", "derivative"],
)
def test_what_the_fused_adjoint_cannot_do_the_host_does(
    make: type[Truthful], reason: str, loops: list[int]
) -> None:
    cell = make().double()
    z = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(B, D, dtype=torch.float64)
    found = []
    for route in (None, "host"):
        value = fpi.fixed_point(cell, x0, z, rtol=1e-11, route=route).value
        (first,) = torch.autograd.grad(value.square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z)
        found.append((value, first, second))
    assert len(loops) == 1
    for default, host in zip(*found, strict=True):
        torch.testing.assert_close(default, host, rtol=1e-7, atol=1e-8)
    with pytest.raises(RuntimeError, match=f"the adjoint cannot run there: .*{reason}"):
        fpi.fixed_point(cell, x0, z, rtol=1e-11, route="fused")
    with torch.no_grad():
        assert fpi.fixed_point(cell, x0, z, rtol=1e-11, route="fused").converged.all()


class Dropping(Truthful):
    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return nn.functional.dropout(super().step(x, prepared), 0.5, self.training)

    lower = Truthful.lower


def test_a_step_that_draws_goes_to_the_host() -> None:
    cell, z = Dropping().double(), torch.randn(B, D, dtype=torch.float64)
    with torch.no_grad():
        sol = fpi.fixed_point(cell, torch.zeros_like(z), z, rtol=1e-8)
        assert sol.converged.all()
        assert bool((sol.value == 0).any())
        with pytest.raises(RuntimeError, match=r"step\(\) draws random numbers"):
            fpi.fixed_point(cell, torch.zeros_like(z), z, rtol=1e-8, route="fused")
        cell.eval()
        assert fpi.fixed_point(cell, torch.zeros_like(z), z, route="fused").converged.all()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda layer: None, "layers are one or two Layer, got NoneType"),
        (lambda layer: layer, "got Layer"),
        (lambda layer: Lowered(layer), "layers are a tuple, got Layer"),
        (lambda layer: Lowered((layer.weight,)), "layers are Layer, got Parameter"),
        (lambda layer: Lowered((Layer(3.0),)), "weights are tensors, got float"),
        (lambda layer: Lowered((Layer(layer.weight, torch.tanh),)), "activations are names"),
        (lambda layer: Lowered((Layer(layer.weight, bias=1.0),)), "bias, shift and factor"),
        (lambda layer: Lowered((layer,), x_factor=2.0), "x_factor is a tensor or None, got float"),
        (lambda layer: Lowered((layer,), carry=torch.ones(())), "carry is a number, got Tensor"),
    ],
)
def test_what_is_no_lowered_map_is_named(returned: Any, message: str) -> None:
    class Mistaken(Truthful):
        def lower(self, prepared: Tensor) -> Lowered:
            return returned(self.layer(prepared, weight=self.M.weight))

    z = torch.randn(B, D)
    with pytest.raises(TypeError, match=r"Mistaken\.lower\(\) must return .*" + message):
        fpi.fixed_point(Mistaken(), torch.zeros_like(z), z)


@pytest.mark.parametrize("name", ["dense", "mlp", "descent"])
def test_the_cells_of_the_package_are_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell: Any = {
        "dense": lambda: cells.Dense(D, D),
        "mlp": lambda: cells.MLP(D, D, 9),
        "descent": lambda: cells.GradientDescent(cells.MLPEnergy(D, D, 9), 0.3),
    }[name]()
    steps: list[int] = []
    kind, step = type(cell), type(cell).step

    def counted(self: Any, x: Tensor, prepared: Tensor) -> Tensor:
        steps.append(1)
        return step(self, x, prepared)

    z = torch.randn(B, D)
    sub = type(kind.__name__, (kind,), {})
    cell.__class__ = sub
    with torch.no_grad():
        assert fpi.fixed_point(cell, torch.zeros_like(z), z, route="fused").converged.all()
    monkeypatch.setattr(kind, "step", counted)
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}\.step\(\) was replaced"):
        fpi.fixed_point(cell, torch.zeros_like(z), z, route="fused")
    assert fpi.fixed_point(cell, torch.zeros_like(z), z).converged.all()
    assert steps


class ForgetsToClamp(Truthful):
    """Where its layer saturates, rounding of huge sums could hide that."""

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(self.M(x) + prepared.clamp(-1, 1))


class Cancelling(Truthful):
    """True, in terms that cancel."""

    def lower(self, prepared: Tensor) -> Lowered:
        bias = torch.full((D,), -1000.0)
        return Lowered((self.layer(prepared, factor=None, shift=prepared + 1000, bias=bias),))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e6, 1e9])
def test_what_step_does_not_confirm_is_solved_by_step(size: float, grad: bool) -> None:
    g, z = ForgetsToClamp(), torch.randn(B, D)
    layer = fpi.FPILayer(g, rtol=1e-4)
    with torch.set_grad_enabled(grad):
        for inputs in (0.1 * z, size * z):
            sol = None
            with contextlib.suppress(ValueError):  # of a lower() that is found out
                sol = layer.solve(inputs)
            if sol is None:
                continue
            gx = g.step(sol.value, inputs)
            residual = (gx - sol.value).norm(dim=1)
            assert (residual <= 1.01e-4 * gx.norm(dim=1))[sol.converged].all()
            assert (sol.residual - residual).abs().max() <= 1e-5 * gx.norm(dim=1).max()


def test_the_residual_is_that_of_step() -> None:
    g, z = Cancelling(), torch.randn(B, D)
    with torch.no_grad():
        sol = fpi.FPILayer(g, rtol=1e-6).solve(z)
        residual = (g.step(sol.value, z) - sol.value).norm(dim=1)
    assert (sol.residual - residual).abs().max() <= 1e-6
    assert (residual <= 1.1e-6 * sol.value.norm(dim=1))[sol.converged].all()
