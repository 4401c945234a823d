"""The CUDA loop of lowered cells on a device: what emulation cannot show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowered_maps import MAPS, adjoint, on_device, one_layer, permuted, two_layers
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fpi_cuda as fpi
from fpi_cuda import _extension, ops
from fpi_cuda.activations import FUNCTIONS
from fpi_cuda.loops.fused import cell_loop as fused
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.ops import reference_loop
from fpi_cuda.options import PRECISIONS, Anderson, Picard
from fpi_cuda.solution import SolveResult, Status

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float64)
RTOL = {torch.float32: 1e-4, torch.float64: 1e-7}
# Two roundings of one solve may part by a step, and then by what a step moves near the tolerance.
VALUES = {torch.float32: 1e-3, torch.float64: 1e-6}
STEPS = 2


@pytest.fixture
def cuda() -> Any:
    """The backend, built and fit for this device."""
    device = torch.device("cuda")
    reason = ops.why_not("cuda", device, torch.float32)
    assert reason is None, f"{reason}; built as {_extension.build_info()}"
    return ops.resolve("cuda", device, torch.float32)


def run(backend: Any, lowered: Lowered, x0: Tensor, solver: Any, **given: Any) -> SolveResult:
    """What the loop itself says, without a second opinion on rounded products."""
    options: dict[str, Any] = {"rtol": RTOL[x0.dtype], "atol": 0.0, "max_steps": 200}
    options |= {"precision": "ieee"} | given
    return fused.run(lowered, x0, solver, backend=backend, **options)


def assert_agreement(one: SolveResult, other: SolveResult) -> None:
    values = VALUES[one.x.dtype]
    assert torch.equal(one.status, other.status)
    assert int((one.num_steps - other.num_steps).abs().max()) <= STEPS
    torch.testing.assert_close(one.x, other.x, rtol=values, atol=values)


def assert_same_bits(one: SolveResult, other: SolveResult) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", [Picard(0.9), Anderson(m=5), Anderson(m=16)], ids=str)
@pytest.mark.parametrize("name", list(MAPS))
@pytest.mark.parametrize(("batch", "dim"), [(1, 1), (29, 33), (3000, 64), (2515, 159), (70, 700)])
def test_agrees_with_its_twin(
    cuda: Any, batch: int, dim: int, name: str, solver: Any, dtype: torch.dtype
) -> None:
    lowered = on_device(MAPS[name](batch, dim, dtype), "cuda")
    x0 = torch.randn(batch, dim, dtype=dtype, device="cuda")
    assert_agreement(run(cuda, lowered, x0, solver), run(reference_loop, lowered, x0, solver))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 70, 600, 5000])
@pytest.mark.parametrize("dim", [1, 3, 159, 2048, 9000])
def test_any_size(cuda: Any, dim: int, hidden: int, dtype: torch.dtype) -> None:
    lowered = on_device(adjoint(5, dim, dtype, hidden), "cuda")
    x0 = torch.randn(5, dim, dtype=dtype, device="cuda")
    assert_agreement(run(cuda, lowered, x0, Picard()), run(reference_loop, lowered, x0, Picard()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_activation_is_accurate(cuda: Any, name: str, dtype: torch.dtype) -> None:
    grid = torch.cat([torch.linspace(-30, 30, 401), torch.logspace(-6, 0, 50), torch.zeros(1)])
    u = torch.cat([grid, -grid]).to(dtype).cuda()[:, None]
    lowered = Lowered((Layer(torch.ones(1, 1, dtype=dtype, device="cuda"), name, shift=u),))
    # At x = 0 the residual is |act(u)|.
    result = run(cuda, lowered, torch.zeros_like(u), Picard(), max_steps=1)
    expected = FUNCTIONS[name](u.double()).abs().squeeze(1)
    eps = torch.finfo(dtype).eps
    # 1 + erf(u) and 1 - tanh(u)^2 cancel, in torch too.
    atol = 30 * eps if "gelu" in name else 4 * eps if name == "tanh_derivative" else 1e-37
    torch.testing.assert_close(result.residual, expected, rtol=8 * eps, atol=atol)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [5, 300, 20_000])
def test_products_are_rounded_as_asked(cuda: Any, precision: str, batch: int) -> None:
    """On tensor cores as in the twin, whatever the size of the tile: here are their fragments."""
    for dim in (37, 512):
        weight = torch.randn(dim, dim, device="cuda")
        x0 = torch.randn(batch, dim, device="cuda")
        lowered = Lowered((Layer(weight, bias=torch.randn(dim, device="cuda")),))
        one = run(cuda, lowered, x0, Picard(), max_steps=1, precision=precision)
        other = run(reference_loop, lowered, x0, Picard(), max_steps=1, precision=precision)
        # Tensor cores cut sums off where the twin rounds them.
        torch.testing.assert_close(one.residual, other.residual, rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(MAPS))
def test_rounded_solves_agree_with_the_twin(cuda: Any, name: str, precision: str) -> None:
    lowered = on_device(MAPS[name](500, 159, torch.float32), "cuda")
    x0 = torch.randn(500, 159, device="cuda")
    given: dict[str, Any] = {"precision": precision, "rtol": 3e-2 if precision == "bf16" else 3e-3}
    one = run(cuda, lowered, x0, Anderson(m=5), **given)
    other = run(reference_loop, lowered, x0, Anderson(m=5), **given)
    assert torch.equal(one.status, other.status)
    assert int((one.num_steps - other.num_steps).abs().max()) <= STEPS
    error = (one.x - other.x).norm(dim=1) / other.x.norm(dim=1)
    assert float(error.max()) < 3 * given["rtol"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_gets_the_same_bits_in_any_batch(cuda: Any, precision: str) -> None:
    """Batches of these sizes take tiles of different sizes, and weights in different places."""
    batch, dim = 20_000, 96
    lowered = on_device(two_layers(batch, dim, torch.float32, 160), "cuda")
    scale = torch.logspace(-3, 3, batch, device="cuda")[torch.randperm(batch), None]
    x0 = scale * torch.randn(batch, dim, device="cuda")
    given: dict[str, Any] = {"precision": precision, "max_steps": 30}
    whole = run(cuda, lowered, x0, Anderson(m=5), **given)
    for count in (1, 13, 900, 2515, 7000):
        order = torch.randperm(batch, device="cuda")[:count]
        part = run(cuda, permuted(lowered, order), x0[order], Anderson(m=5), **given)
        assert_same_bits(part, SolveResult(*(t[order] for t in whole)))


def test_a_solve_is_repeated_bit_for_bit(cuda: Any) -> None:
    lowered = on_device(MAPS["descent"](5000, 159, torch.float32), "cuda")
    x0 = torch.randn(5000, 159, device="cuda")
    first = run(cuda, lowered, x0, Anderson())
    for _ in range(5):
        assert_same_bits(run(cuda, lowered, x0, Anderson()), first)


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_bad_samples_hurt_nobody(cuda: Any, solver: Any) -> None:
    batch, dim = 3000, 40
    good = on_device(two_layers(batch, dim, torch.float32), "cuda")
    x0 = torch.randn(batch, dim, device="cuda")
    expected = run(cuda, good, x0, solver)
    shift = good.layers[0].shift
    assert shift is not None
    shift = shift.clone()
    shift[7] = torch.nan
    shift[11, 3] = torch.inf
    x0[20, 0] = torch.nan
    bad = Lowered((replace(good.layers[0], shift=shift), good.layers[1]))
    result = run(cuda, bad, x0, solver)
    assert result.status[7] == result.status[20] == Status.NONFINITE
    kept = torch.ones(batch, dtype=torch.bool, device="cuda")
    kept[[7, 11, 20]] = False
    for part, full in zip(result, expected, strict=True):
        assert torch.equal(part[kept], full[kept])


def test_slow_samples_go_on_while_others_take_turns(cuda: Any) -> None:
    batch, dim = 100_000, 64
    lowered = on_device(one_layer(batch, dim, torch.float32), "cuda")
    factor = torch.full((batch, dim), 0.2, device="cuda")
    factor[::10] = 1.9
    lowered = replace(lowered, x_factor=factor)
    x0 = torch.zeros(batch, dim, device="cuda")
    result = run(cuda, lowered, x0, Picard())
    assert_agreement(result, run(reference_loop, lowered, x0, Picard()))
    steps = result.num_steps.double()
    assert float(steps[::10].mean()) > 2 * float(steps[1::10].mean())


def test_two_streams_at_once(cuda: Any) -> None:
    lowered = on_device(two_layers(2000, 159, torch.float32, 600), "cuda")
    x0 = torch.randn(2000, 159, device="cuda")
    expected = run(cuda, lowered, x0, Anderson())
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(cuda, lowered, x0, Anderson()))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, expected)


Z, X, HIDDEN, BATCH = 5, 7, 11, 20
CELLS: dict[str, Callable[[], Any]] = {
    "dense": lambda: fpi.cells.Dense(Z, X),
    "mlp": lambda: fpi.cells.MLP(Z, X, HIDDEN, "softplus"),
    "descent": lambda: fpi.cells.GradientDescent(fpi.cells.MLPEnergy(Z, X, HIDDEN), 0.5),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(CELLS))
def test_layers_take_it_and_their_gradients_are_those_of_float64(
    cuda: Any, name: str, precision: str
) -> None:
    cell = CELLS[name]()
    z, v = torch.randn(BATCH, Z), torch.randn(BATCH, X)
    rtol = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3, "bf16": 1e-2}[precision]

    def gradients(cell: Any, z: Tensor, v: Tensor, **given: Any) -> tuple[list[Tensor], Any]:
        z = z.clone().requires_grad_()
        layer = fpi.FPILayer(cell, max_steps=500, **given)
        value = layer(z)
        inputs = [z, *cell.parameters()]
        return list(torch.autograd.grad((value * v).sum(), inputs)), layer

    exact, _ = gradients(cell.double(), z.double(), v.double(), rtol=1e-11, route="host")
    given, layer = gradients(cell.float().cuda(), z.cuda(), v.cuda(), rtol=rtol,
                             precision=precision)  # fmt: skip
    assert "one kernel evaluates g and steps" in layer.explain()
    assert "the adjoint likewise" in layer.explain()
    assert bool(layer.last_solution.converged.all())
    for one, other in zip(given, exact, strict=True):
        error = (one.double().cpu() - other).norm() / other.norm().clamp_min(1e-30)
        assert float(error) < 100 * rtol


@pytest.mark.parametrize("name", list(CELLS))
def test_derivatives_of_every_order(cuda: Any, name: str) -> None:
    cell = CELLS[name]().double().cuda()
    z = torch.randn(2, Z, dtype=torch.float64, device="cuda", requires_grad=True)
    layer = fpi.FPILayer(cell, rtol=1e-12, max_steps=500)
    assert gradcheck(layer, (z,), atol=1e-6)
    assert gradgradcheck(layer, (z,), atol=1e-5)


def test_few_samples_of_a_large_weight_go_another_way(cuda: Any) -> None:
    cell = fpi.cells.Dense(8, 2048).cuda()
    z = torch.randn(64, 8, device="cuda")
    layer = fpi.FPILayer(cell)
    value = layer(z)
    assert "too few samples for so large a weight" in layer.explain() or (
        "device loop" in layer.explain()
    )
    asked = fpi.FPILayer(cell, route="fused")
    torch.testing.assert_close(asked(z), value, rtol=1e-3, atol=1e-3)
    assert "one kernel evaluates g and steps" in asked.explain()


def test_nothing_is_kept(cuda: Any) -> None:
    lowered = on_device(two_layers(500, 33, torch.float32), "cuda")
    x0 = torch.randn(500, 33, device="cuda")
    run(cuda, lowered, x0, Anderson())
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        run(cuda, lowered, x0, Anderson())
    assert torch.cuda.memory_allocated() == before
