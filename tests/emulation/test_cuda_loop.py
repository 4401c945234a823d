"""The CUDA loop of lowered cells without a GPU: emulated under ASan and UBSan, against its twin."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.emulated import compiled_once, started
from emulation.emulated_loop import H100_SHARED, EmulatedLoop, compile_loop
from lowered_maps import MAPS, adjoint, contraction, one_layer, permuted, two_layers, with_strides
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import ops
from fpi_cuda.activations import FUNCTIONS
from fpi_cuda.loops.fused import cell_loop as fused
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.ops import reference_loop
from fpi_cuda.options import PRECISIONS, Anderson, Picard
from fpi_cuda.solution import SolveResult, Status

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the emulation needs Linux and g++",
)

DTYPES = (torch.float32, torch.float64)
RTOL = {torch.float32: 1e-4, torch.float64: 1e-7}
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
SOLVERS = (Picard(0.9), Anderson(m=1), Anderson(m=8))
STREAMED = 24 * 1024  # bytes of shared memory that hold no weights
BARE = 16 * 1024  # and that hold no operands either
ROOMY = 80 * 1024  # that hold all of a tile but its weights


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled loop."""
    return compiled_once(tmp_path_factory, "emulated_loop", compile_loop)


Start = Callable[..., EmulatedLoop]


@pytest.fixture
def start(program: Path) -> Iterator[Start]:
    """Starts emulated backends, and sees that each ends well."""
    yield from started(lambda **options: EmulatedLoop(program, **options))


PICARD = Picard()


def run(
    backend: Any, lowered: Lowered, x0: Tensor, solver: Any = PICARD, **given: Any
) -> SolveResult:
    """What the loop itself says, without a second opinion on rounded products."""
    options: dict[str, Any] = {"rtol": RTOL[x0.dtype], "atol": 0.0, "max_steps": 60} | given
    return fused.run(lowered, x0, solver, backend=backend, **({"precision": "ieee"} | options))


def assert_agreement(one: SolveResult, other: SolveResult, slack: float = 1.0) -> None:
    close = slack * CLOSE[one.x.dtype]
    assert one.status.tolist() == other.status.tolist()
    assert one.num_steps.tolist() == other.num_steps.tolist()
    torch.testing.assert_close(one.x, other.x, rtol=close, atol=close, equal_nan=True)
    scale = 1e-2 if len(one.x) else 0.0  # a residual is the difference of what agrees to `close`
    torch.testing.assert_close(
        one.residual, other.residual, rtol=scale, atol=10 * close, equal_nan=True
    )


def assert_same_bits(one: SolveResult, other: SolveResult) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", list(MAPS))
def test_agrees_with_its_twin(start: Start, name: str, solver: Any, dtype: torch.dtype) -> None:
    lowered, x0 = MAPS[name](11, 33, dtype), torch.randn(11, 33, dtype=dtype)
    # One core: three samples wait until one of the first eight stops.
    result = run(start(cores=1, seed=1), lowered, x0, solver)
    assert_agreement(result, run(reference_loop, lowered, x0, solver))
    assert result.status.tolist() == [Status.CONVERGED] * 11


@pytest.mark.parametrize("dim", [1, 3, 33, 159])
@pytest.mark.parametrize("hidden", [1, 5, 70])
def test_any_size_wherever_its_arrays_lie(start: Start, dim: int, hidden: int) -> None:
    dtype = torch.float64 if dim == 33 else torch.float32
    x0 = torch.randn(3, dim, dtype=dtype)
    lowered = adjoint(3, dim, dtype, hidden)
    solver = Anderson(m=2)
    expected = run(reference_loop, lowered, x0, solver, max_steps=13)
    found = []
    for shared_bytes in (H100_SHARED, ROOMY, STREAMED, BARE):
        backend = start(shared_bytes=shared_bytes, seed=dim)
        assert_agreement(run(backend, lowered, x0, solver, max_steps=13), expected, 10)
        assert backend.laid is not None
        found.append((backend.laid.resident, backend.laid.operand_shared,
                      backend.laid.history_shared))  # fmt: skip
    assert found[0] == (True, True, True)
    if (dim, hidden) == (159, 70):
        yes, no = True, False
        assert found[1:] == [(no, yes, yes), (no, yes, no), (no, no, no)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_activation(start: Start, name: str, dtype: torch.dtype) -> None:
    grid = torch.cat([torch.linspace(-30, 30, 40), torch.tensor([0.0, 1e-6, 1e-3, 1e30])])
    u = torch.cat([grid, -grid]).to(dtype)[None]
    weight = torch.zeros(u.shape[1], u.shape[1], dtype=dtype)
    lowered = Lowered((Layer(weight, name, shift=u),))
    given: dict[str, Any] = {"max_steps": 2, "rtol": 1e-30}  # the second point is act(u)
    one = run(start(), lowered, torch.zeros_like(u), **given)
    other = run(reference_loop, lowered, torch.zeros_like(u), **given)
    assert bool((other.residual == 0).all())
    eps = torch.finfo(dtype).eps
    # 1 + erf(u) cancels for negative u, in torch too.
    atol = (60 if "gelu" in name else 4) * eps
    torch.testing.assert_close(one.x, other.x, rtol=8 * eps, atol=atol)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan_and_infinity_does_no_harm(start: Start, name: str) -> None:
    special = [torch.nan] if "gelu" in name else [torch.nan, torch.inf, -torch.inf]
    u = torch.tensor(special)[:, None]
    lowered = Lowered((Layer(torch.ones(1, 1), name, shift=u),))
    residual = run(start(), lowered, torch.zeros_like(u), max_steps=1).residual
    expected = FUNCTIONS[name](u).abs().squeeze(1).double()
    torch.testing.assert_close(residual, expected, equal_nan=True, rtol=1e-6, atol=1e-7)


def rounding(precision: str) -> float:
    return {"ieee": 1e-6, "tf32x3": 1e-6, "tf32": 2.0**-11, "bf16": 2.0**-8}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("slots", [8, 16, 64])
def test_products_are_rounded_as_asked(start: Start, precision: str, slots: int) -> None:
    """One product of the tile, element by element, in float32 sums."""
    batch, dim = slots + 3, 37
    weight = torch.randn(dim, dim)
    x0 = torch.randn(batch, dim)
    lowered = Lowered((Layer(weight, bias=torch.randn(dim)),))
    for shared_bytes in (H100_SHARED, STREAMED + 1024 * slots):
        backend = start(slots=slots, cores=1, shared_bytes=shared_bytes)
        # The step that is taken from x0 leaves g(x0) as the point; its residual tells of g there.
        one = run(backend, lowered, x0, max_steps=1, precision=precision)
        other = run(reference_loop, lowered, x0, max_steps=1, precision=precision)
        torch.testing.assert_close(one.residual, other.residual, rtol=1e-6, atol=0)
        exact = run(reference_loop, lowered, x0, max_steps=1)
        if precision in ("tf32", "bf16"):
            assert float(((other.residual - exact.residual) / exact.residual).abs().max()) > 1e-5


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("name", list(MAPS))
def test_rounded_solves_agree_with_the_twin(start: Start, name: str, precision: str) -> None:
    lowered, x0 = MAPS[name](9, 21, torch.float32), torch.randn(9, 21)
    given: dict[str, Any] = {"precision": precision, "rtol": 1e-3 if precision != "bf16" else 3e-2}
    one = run(start(cores=1), lowered, x0, Anderson(m=3), **given)
    other = run(reference_loop, lowered, x0, Anderson(m=3), **given)
    assert one.status.tolist() == other.status.tolist() == [Status.CONVERGED] * 9
    # A sum that differs in its last bit may be rounded the other way by the next product.
    assert int((one.num_steps - other.num_steps).abs().max()) <= 1
    close = 10 * max(given["rtol"], rounding(precision)) / 10
    torch.testing.assert_close(one.x, other.x, rtol=close, atol=close)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sample_gets_the_same_bits_in_any_tile(start: Start, precision: str) -> None:
    batch, dim = 19, 13
    lowered = two_layers(batch, dim, torch.float32, 21)
    # They leave their tiles at different times.
    scale = torch.logspace(-3, 3, batch)[torch.randperm(batch), None]
    x0 = scale * torch.randn(batch, dim)
    given: dict[str, Any] = {"precision": precision, "max_steps": 12}
    solver = Anderson(m=3)
    whole = run(start(cores=1), lowered, x0, solver, **given)
    assert len(set(whole.num_steps.tolist())) >= 2
    for backend in (
        start(cores=3, seed=2, warps=1),
        start(cores=1, slots=32, warps=3, seed=3),
        start(cores=1, slots=64, warps=2),
        start(cores=1, slots=16, shared_bytes=STREAMED),
    ):
        assert_same_bits(run(backend, lowered, x0, solver, **given), whole)
    for order in (torch.arange(batch).flip(0), torch.tensor([4])):
        part = run(start(cores=2), permuted(lowered, order), x0[order], solver, **given)
        assert_same_bits(part, SolveResult(*(t[order] for t in whole)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", [Picard(), Anderson(m=3)], ids=str)
def test_bad_samples_hurt_nobody(start: Start, solver: Any, dtype: torch.dtype) -> None:
    batch, dim = 11, 7
    good, x0 = two_layers(batch, dim, dtype, 9), torch.randn(batch, dim, dtype=dtype)
    expected = run(start(cores=1), good, x0, solver)
    shift = good.layers[0].shift
    assert shift is not None
    shift = shift.clone()
    shift[2] = torch.nan
    x0[5, 0] = torch.nan
    bad = Lowered((replace(good.layers[0], shift=shift), good.layers[1]))
    result = run(start(cores=1, seed=4), bad, x0, solver)
    assert result.status[2] == result.status[5] == Status.NONFINITE
    kept = [i for i in range(batch) if i not in (2, 5)]
    for part, full in zip(result, expected, strict=True):
        assert torch.equal(part[kept], full[kept])


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_nan_with_low_bits_alone_stays_one(start: Start, precision: str) -> None:
    """Cut to fewer bits it would be an infinity, of which relu makes 0."""
    lowered = Lowered((Layer(-torch.eye(3), "relu"), Layer(torch.eye(3))))
    bits = torch.tensor([[0x7F800001, 0, 0], [0, 0, 0]], dtype=torch.int32)
    result = run(start(), lowered, bits.view(torch.float32), precision=precision)
    assert result.status.tolist() == [Status.NONFINITE, Status.CONVERGED]


@pytest.mark.parametrize("solver", [Picard(), Anderson(m=2)], ids=str)
def test_every_way_to_end(start: Start, solver: Any) -> None:
    dim, dtype = 5, torch.float64
    # x -> factor x + 1, a factor per sample.
    factor = torch.tensor([0.5, 3.0, 0.5, 1.0, 0.999], dtype=dtype)[:, None].expand(5, dim)
    x0 = torch.zeros(5, dim, dtype=dtype)
    x0[2] = 2.0  # already there
    identity = Layer(torch.eye(dim, dtype=dtype), shift=torch.ones(5, dim, dtype=dtype))
    lowered = Lowered((identity,), x_factor=factor.contiguous())
    given = {"rtol": 1e-8, "max_steps": 40}
    result = run(start(), lowered, x0, solver, **given)
    assert_agreement(result, run(reference_loop, lowered, x0, solver, **given))
    assert result.status[2] == Status.CONVERGED
    assert result.num_steps[2] == 1
    assert len(set(result.status.tolist())) >= 2


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 40])
def test_any_batch_goes_through_the_tile(start: Start, batch: int) -> None:
    lowered = one_layer(batch, 4, torch.float32)
    # Slow and fast ones take turns, so that slots are filled again out of step.
    factor = torch.full((batch, 4), 0.1)
    factor[::5] = 0.9
    lowered = replace(lowered, x_factor=factor)
    x0 = torch.randn(batch, 4)
    backend = start(cores=1, warps=3, seed=batch)
    assert_agreement(run(backend, lowered, x0), run(reference_loop, lowered, x0))


def test_weights_of_any_strides(start: Start) -> None:
    for make in (two_layers, adjoint):
        lowered, x0 = make(4, 12, torch.float32, 18), torch.randn(4, 12)
        one = run(start(), with_strides(lowered), x0, max_steps=5)
        assert_same_bits(one, run(start(), lowered, x0, max_steps=5))


def test_the_map_is_left_alone(start: Start) -> None:
    lowered, x0 = adjoint(5, 6, torch.float32, 7), torch.randn(5, 6)
    before = [t.clone() for t in (x0, *lowered.tensors())]
    run(start(), lowered, x0, Anderson(m=2))
    assert all(map(torch.equal, before, (x0, *lowered.tensors())))


def test_steps_out_of_float32_range_are_taken_in_double(start: Start) -> None:
    lowered = Lowered((Layer(contraction(9, 9, torch.float32, 0.8)),))
    for scale in (1e-20, 1e20):
        x0 = scale * torch.randn(3, 9)
        one = run(start(), lowered, x0, Anderson(m=2), max_steps=6)
        other = run(reference_loop, lowered, x0, Anderson(m=2), max_steps=6)
        torch.testing.assert_close(one.x / scale, other.x / scale, rtol=1e-4, atol=1e-4)
        assert one.num_steps.tolist() == other.num_steps.tolist()


Z, X, HIDDEN = 5, 7, 11
CELLS: dict[str, Callable[[], Any]] = {
    "dense": lambda: fpi.cells.Dense(Z, X),
    "mlp": lambda: fpi.cells.MLP(Z, X, HIDDEN, "softplus"),
    "descent": lambda: fpi.cells.GradientDescent(fpi.cells.MLPEnergy(Z, X, HIDDEN), 0.5),
}


@pytest.mark.skipif(not fpi.native_available(), reason="no native library")
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("name", list(CELLS))
def test_cells_and_their_adjoints_go_through_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    """A layer's value and gradients, with the loop of a device as the backend."""
    cell, z, v = CELLS[name](), torch.randn(9, Z), torch.randn(9, X)
    exact = gradients(cell.double(), z.double(), v.double(), rtol=1e-10, route="host")
    engine = start(cores=1)
    calls: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(PRECISIONS[kwargs["precision"]])
        EmulatedLoop.cell_loop_(engine, *args, **kwargs)

    monkeypatch.setattr(engine, "cell_loop_", counted)
    monkeypatch.setattr(ops, "resolve", lambda *_: engine)
    found = gradients(cell.float(), z, v, rtol=1e-5, route="fused", precision=precision)
    # Forward and adjoint, and what judges rounded ones.
    assert calls == (
        ["ieee"] * 2 if precision == "ieee" else ["tf32x3", "ieee", "ieee", "tf32x3", "ieee"]
    )
    for one, other in zip(found, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3


def gradients(cell: Any, z: Tensor, v: Tensor, **given: Any) -> list[Tensor]:
    """The fixed point, and the gradients of sum(v x) in z and in the parameters."""
    z = z.clone().requires_grad_()
    value = fpi.FPILayer(cell, max_steps=300, **given)(z)
    return [value.detach(), *torch.autograd.grad((value * v).sum(), [z, *cell.parameters()])]
