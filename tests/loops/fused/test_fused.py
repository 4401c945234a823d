"""The fused route: taken where it is safe, refused with a reason, and the same to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

import fpi_cuda as fpi
from fpi_cuda import activations, cells

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

Z, X, HIDDEN, BATCH = 5, 7, 11, 20
CELLS: dict[str, Callable[[], cells.Cell]] = {
    "dense": lambda: cells.Dense(Z, X),
    "mlp": lambda: cells.MLP(Z, X, HIDDEN, "softplus"),
    "descent": lambda: cells.GradientDescent(cells.MLPEnergy(Z, X, HIDDEN), 0.5),
}
NAMES = [n for n in activations.ACTIVATIONS if n != "identity"]


@pytest.fixture(params=list(CELLS))
def cell(request: pytest.FixtureRequest) -> cells.Cell:
    return CELLS[request.param]().double()


def inputs(batch: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, X, dtype=dtype), torch.randn(batch, Z, dtype=dtype)


def solve(cell: Any, x0: Tensor, z: Tensor, route: str | None, **options: Any) -> fpi.Solution:
    return fpi.fixed_point(cell, x0, z, route=route, **{"rtol": 1e-10, **options})


@pytest.mark.parametrize(
    "solver", [fpi.Anderson(), fpi.Anderson(m=16), fpi.Picard(), fpi.Picard(0.7)], ids=str
)
def test_the_routes_agree(cell: cells.Cell, solver: Any, loops: list[int]) -> None:
    x0, z = inputs()
    v = torch.randn_like(x0)
    results = []
    for route in ("host", "fused"):
        given = z.clone().requires_grad_()
        solution = solve(cell, x0, given, route, solver=solver)
        grads = torch.autograd.grad((solution.value * v).sum(), [given, *cell.parameters()])
        results.append((solution, grads))
    (host, host_grads), (fused, fused_grads) = results
    assert len(loops) == 2  # forward and adjoint, of the second
    assert bool(fused.converged.all())
    assert bool(host.converged.all())
    for one, other in ((host, fused), (host.adjoint_stats, fused.adjoint_stats)):
        assert one is not None
        assert other is not None
        assert int((one.num_steps - other.num_steps).abs().max()) <= 2
        assert torch.equal(one.status, other.status)
    torch.testing.assert_close(fused.value, host.value, rtol=1e-8, atol=1e-8)
    for one, other in zip(host_grads, fused_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_has_its_adjoint(name: str) -> None:
    x0, z = inputs()
    energy = cells.MLPEnergy(Z, X, HIDDEN, name, quadratic=2.0)
    for cell in (
        cells.Dense(Z, X, name),
        cells.MLP(Z, X, HIDDEN, name, name),
        cells.GradientDescent(energy, 0.2),
    ):
        cell.double()
        v = torch.randn_like(x0)
        host, fused = (
            torch.autograd.grad(
                (solve(cell, x0, z, route, rtol=1e-11).value * v).sum(),
                list(cell.parameters()),
                materialize_grads=True,
            )
            for route in ("host", "fused")
        )
        for one, other in zip(host, fused, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


TINY: dict[str, Callable[[], cells.Cell]] = {
    "dense": lambda: cells.Dense(1, 2),
    "mlp": lambda: cells.MLP(1, 2, 2, "softplus"),
    "descent": lambda: cells.GradientDescent(cells.MLPEnergy(1, 2, 2), 0.5),
}


@pytest.mark.parametrize("name", list(TINY))
def test_derivatives_of_two_orders_and_forward_mode(name: str) -> None:
    cell = TINY[name]().double()
    layer = fpi.FPILayer(cell, route="fused", rtol=1e-13, atol=1e-13)
    names = [name for name, _ in layer.named_parameters()]

    def run(z: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (z,))

    given = (torch.randn(2, 1).double().requires_grad_(), *layer.parameters())
    assert gradcheck(run, given, check_forward_ad=True, atol=1e-5)
    assert gradgradcheck(run, given, atol=1e-4)


def test_it_is_the_default_where_it_can_be(cell: cells.Cell, loops: list[int]) -> None:
    x0, z = inputs()
    assert torch.equal(solve(cell, x0, z, None).value, solve(cell, x0, z, "fused").value)
    assert len(loops) == 2
    solve(cell, x0, z, "host")
    assert len(loops) == 2


class Overridden(cells.Dense):
    """Another map, with the weights of Dense."""

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return 0.5 * super().step(x, prepared)


class Prepared(cells.Dense):
    def prepare(self, z: Tensor) -> Tensor:
        return super().prepare(z) + 1


class Energy(cells.MLPEnergy):
    def gradient(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().gradient(x, prepared) + 1

    def value(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().value(x, prepared) + x.sum(-1)


def with_instance_step() -> cells.Cell:
    cell = cells.Dense(Z, X)
    step = cell.step
    cell.step = lambda x, prepared: 0.5 * step(x, prepared)  # type: ignore[method-assign]
    return cell


def with_hook(kind: str) -> cells.Cell:
    cell = cells.MLP(Z, X, HIDDEN)
    if kind == "forward":
        cell.W.register_forward_hook(lambda module, args, out: 0.5 * out)
    elif kind == "pre":
        cell.A.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    else:
        cell.A.register_full_backward_hook(lambda module, grads, outs: None)
    return cell


def with_other_linear() -> cells.Cell:
    class Halved(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 0.5 * super().forward(input)

    cell = cells.Dense(Z, X)
    cell.A = Halved(X, X, bias=False)
    return cell


def with_bias() -> cells.Cell:
    cell = cells.Dense(Z, X)
    cell.A = nn.Linear(X, X)
    with torch.no_grad():
        cell.A.weight.mul_(0.3)
    return cell


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "function": (lambda: lambda x, z: 0.5 * x, {}, r"function has no lower\(prepared\)"),
    "subclass": (lambda: Overridden(Z, X), {}, r"Overridden redefines step\(\) and inherits"),
    "prepare": (lambda: Prepared(Z, X), {}, r"Prepared redefines prepare\(\)"),
    "instance": (with_instance_step, {}, r"Dense redefines step\(\)"),
    "energy": (
        lambda: cells.GradientDescent(Energy(Z, X, HIDDEN), 0.5),
        {},
        r"Energy redefines (value|gradient)\(\) and inherits lower_descent\(\)",
    ),
    "energy_function": (
        lambda: cells.GradientDescent(lambda x, z: (x * x).sum(-1), 0.1),
        {"rowwise": True},
        "",
    ),
    "forward_hook": (lambda: with_hook("forward"), {}, "Linear has hooks"),
    "pre_hook": (lambda: with_hook("pre"), {}, "Linear has hooks"),
    "backward_hook": (lambda: with_hook("backward"), {}, "Linear has hooks"),
    "other_linear": (with_other_linear, {}, "Dense.A is a Halved, not nn.Linear"),
    "bias": (with_bias, {}, "Dense.A has a bias"),
    "broyden": (lambda: cells.Dense(Z, X), {"solver": fpi.Broyden()}, "not Broyden"),
    "history": (
        lambda: cells.Dense(Z, X).float(),
        {"solver": fpi.Anderson(history_dtype=torch.bfloat16)},
        "stores the history as the state",
    ),
    "bfloat16": (lambda: cells.Dense(Z, X).bfloat16(), {}, "the state is torch.bfloat16"),
    "rowwise": (lambda: cells.Dense(Z, X), {"rowwise": False}, "rowwise is not True"),
    "reference": (lambda: cells.Dense(Z, X), {"backend": "reference"}, "the reference backend"),
    "unroll": (lambda: cells.Dense(Z, X), {"adjoint": fpi.Unroll()}, "Unroll"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_it_cannot_run_goes_to_the_host(name: str, loops: list[int]) -> None:
    make, options, reason = REFUSED[name]
    cell = make()
    if isinstance(cell, nn.Module) and name not in ("history", "bfloat16"):
        cell.double()
    dtype = next(iter(cell.parameters())).dtype if list(parameters_of(cell)) else torch.float64
    x0, z = inputs(dtype=dtype)
    options = {"rtol": 1e-2 if name == "bfloat16" else 1e-6} | options
    with pytest.raises(RuntimeError, match='route="fused" was asked for, .*: .*' + reason):
        solve(cell, x0, z, "fused", **options)
    expected = solve(cell, x0, z, "host", **options)
    result = solve(cell, x0, z, None, **options)
    assert torch.equal(result.value, expected.value)
    assert not loops


def parameters_of(g: Any) -> list[nn.Parameter]:
    return list(g.parameters()) if isinstance(g, nn.Module) else []


def test_a_state_of_another_shape_goes_to_the_host(cell: cells.Cell, loops: list[int]) -> None:
    x0, z = torch.zeros(3, 4, X).double(), torch.randn(3, 4, Z).double()
    with pytest.raises(RuntimeError, match=r"the state is not one tensor \(B, features\)"):
        solve(cell, x0, z, "fused")
    result = solve(cell, x0, z, None)
    assert not loops
    for i in range(4):
        alone = solve(cell, x0[:, i], z[:, i].contiguous(), "fused").value
        torch.testing.assert_close(result.value[:, i], alone, rtol=1e-7, atol=1e-8)


def test_autocast_goes_to_the_host(loops: list[int]) -> None:
    cell = cells.Dense(Z, X)
    x0, z = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="autocast is on"):
            solve(cell, x0, z, "fused", rtol=1e-2)
        solve(cell, x0, z, None, rtol=1e-2)
    assert not loops


def test_transforms_go_to_the_host(cell: cells.Cell, loops: list[int]) -> None:
    x0, z = inputs()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda z: solve(cell, x0, z, "fused").value)(z.expand(2, BATCH, Z))
    assert not loops
    result = torch.func.vmap(lambda z: solve(cell, x0, z, None).value)(z.expand(2, BATCH, Z))
    torch.testing.assert_close(result[1], solve(cell, x0, z, "fused").value, rtol=1e-8, atol=1e-8)


def test_mixed_dtypes_go_to_the_host(loops: list[int]) -> None:
    cell = cells.Dense(Z, X).double()
    x0 = torch.zeros(3, X)
    with pytest.raises(RuntimeError):
        solve(cell, x0, torch.randn(3, Z).double(), "fused", rtol=1e-4)
    assert not loops


def test_an_activation_of_the_user_goes_to_the_host(
    monkeypatch: pytest.MonkeyPatch, loops: list[int]
) -> None:
    half = activations.Activation(lambda u: torch.tanh(u) / 2, lambda u: u, 0.5)
    monkeypatch.setitem(activations.ACTIVATIONS, "tanh", half)
    x0, z = inputs()
    cell = cells.Dense(Z, X).double()
    with pytest.raises(RuntimeError, match="no kernel computes the activation 'tanh'"):
        solve(cell, x0, z, "fused")
    assert float(solve(cell, x0, z, None).value.detach().abs().max()) <= 0.5
    assert not loops


def test_parametrized_weights_are_taken_as_computed(loops: list[int]) -> None:
    cell = cells.Dense(Z, X).double()
    with torch.no_grad():
        cell.A.weight.mul_(5)
    fpi.contract_(cell.A, 0.6)
    x0, z = inputs()
    host, fused = solve(cell, x0, z, "host"), solve(cell, x0, z, "fused")
    torch.testing.assert_close(fused.value, host.value, rtol=1e-8, atol=1e-8)
    v = torch.randn_like(x0)
    grads = [
        torch.autograd.grad((s.value * v).sum(), list(cell.parameters())) for s in (host, fused)
    ]
    assert len(loops) == 2
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-7)


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.01 * torch.randn_like(weight)


def test_random_weights_go_to_the_host(loops: list[int]) -> None:
    cell = cells.Dense(Z, X).double()
    parametrize.register_parametrization(cell.A, "weight", Noise())
    x0, z = inputs()
    with pytest.raises(RuntimeError, match="drawn at random"):
        solve(cell, x0, z, "fused")
    assert bool(solve(cell, x0, z, None).converged.all())
    assert not loops


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_declined_keeps_one_dropout_mask(grad: bool) -> None:
    cell = cells.Dense(Z, X).double()
    cell.A = nn.Sequential(cell.A, nn.Dropout(0.5))
    x0, z = inputs()
    results = []
    for route in ("host", None):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            solution = solve(cell, x0, z, route)
        assert bool(solution.converged.all())
        results.append((solution.value.detach(), torch.get_rng_state()))
    (host, state), (default, after) = results
    assert torch.equal(host, default)
    assert torch.equal(state, after)


def test_a_weight_written_to_before_backward_is_noticed(cell: cells.Cell) -> None:
    x0, z = inputs()
    value = solve(cell, x0, z, "fused").value
    with torch.no_grad():
        next(cell.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_failed_samples_have_no_gradient_and_harm_none(cell: cells.Cell, loops: list[int]) -> None:
    x0, z = inputs()
    bad = z.clone()
    bad[3] = float("nan")
    kept = torch.arange(BATCH) != 3
    v = torch.randn_like(x0)

    def grads(z: Tensor, weight: Tensor, rows: Tensor) -> list[Tensor]:
        z = z.clone().requires_grad_()
        value = solve(cell, x0[rows], z, "fused").value
        return list(torch.autograd.grad((value * weight).sum(), [z, *cell.parameters()]))

    with pytest.warns(fpi.FixedPointWarning):
        with_bad = grads(bad, v, torch.arange(BATCH))
    without = grads(z[kept], v[kept], torch.nonzero(kept).flatten())
    assert len(loops) == 4
    assert not bool(with_bad[0][3].any())
    torch.testing.assert_close(with_bad[0][kept], without[0], rtol=1e-9, atol=1e-9)
    for one, other in zip(with_bad[1:], without[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_loss_scale_changes_no_digit(cell: cells.Cell) -> None:
    x0, z = inputs()
    value = solve(cell, x0, z, "fused", rtol=1e-4).value
    v = torch.randn_like(x0)
    whole = torch.autograd.grad((value * v).sum(), list(cell.parameters()), retain_graph=True)
    for scale in (2.0**-20, 2.0**16):
        scaled = torch.autograd.grad(
            (value * v).sum() * scale, list(cell.parameters()), retain_graph=True
        )
        for one, other in zip(whole, scaled, strict=True):
            assert torch.equal(one * scale, other)


def test_a_layer_says_which_way_it_goes() -> None:
    layer = fpi.FPILayer(cells.MLP(Z, X, HIDDEN))
    assert "route    fused loop" in layer.explain()
    assert "samples at a time per thread, in IEEE float32" in layer.explain()
    host = fpi.FPILayer(cells.MLP(Z, X, HIDDEN), route="host")
    assert "host loop" in host.explain()
    assert 'route="host" asks for it' in host.explain()
    hooked = fpi.FPILayer(with_hook("forward"))
    assert "host loop" in hooked.explain()
    assert "Linear has hooks" in hooked.explain()
    demanding = fpi.FPILayer(with_hook("forward"), route="fused")
    assert (
        'none: route="fused" asks for the fused loop, but Linear has hooks' in demanding.explain()
    )
    with pytest.raises(RuntimeError, match="cannot run there: Linear has hooks"):
        demanding(torch.randn(2, Z))
    assert "route='fused'" in repr(demanding)


def with_noise() -> cells.Cell:
    cell = cells.Dense(Z, X)
    parametrize.register_parametrization(cell.A, "weight", Noise())
    return cell


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_bias, "Dense.A has a bias"),
        (with_noise, "its weights are drawn at random"),
        (
            lambda: cells.GradientDescent(lambda x, z: (x * x).sum(-1), 0.1),
            "function has no lower_descent()",
        ),
    ],
    ids=["bias", "noise", "energy"],
)
def test_a_layer_says_what_will_be_declined(make: Callable[[], cells.Cell], reason: str) -> None:
    cell = make()
    layer = fpi.FPILayer(cell, rowwise=True)
    state = torch.get_rng_state()
    before = layer.explain().splitlines()[0]
    assert before.startswith("route    host loop")
    assert "not fused: " + reason in before
    assert torch.equal(torch.get_rng_state(), state)
    layer(torch.randn(2, Z))
    assert "fused loop" not in layer.explain().splitlines()[0]


@pytest.mark.parametrize("route", ["cuda", "", 1])
def test_an_unknown_route_is_named(route: Any) -> None:
    message = "unknown route .* Valid: None, 'host', 'device', 'fused'"
    with pytest.raises(ValueError, match="FPILayer: " + message):
        fpi.FPILayer(cells.Dense(Z, X), route=route)
    with pytest.raises(ValueError, match="fixed_point: " + message):
        fpi.fixed_point(cells.Dense(Z, X), torch.zeros(1, X), torch.zeros(1, Z), route=route)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(cell: cells.Cell, mode: Callable[[], Any], loops: list[int]) -> None:
    x0, z = inputs()
    expected = solve(cell, x0, z, "host").value.detach()
    with mode():
        value = solve(cell, x0, z, "fused").value
    assert not value.requires_grad
    assert len(loops) == 1
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)
