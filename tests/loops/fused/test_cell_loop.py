"""The cell loop op against its twin in torch: tiles, queue, early exit, status, independence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from lowered_maps import MAPS, adjoint, permuted, two_layers, with_strides
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda.activations import FUNCTIONS
from fpi_cuda.loops.fused import cell_loop as fused
from fpi_cuda.loops.fused.cell_loop import solve_fused
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.ops import native, reference_loop
from fpi_cuda.options import FLOORS, Anderson, Picard
from fpi_cuda.solution import SolveResult, Status

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

SOLVERS = [Picard(0.9), Anderson(m=1), Anderson(m=5), Anderson(m=16)]
DTYPES = [torch.float32, torch.float64]
# Two roundings of one solve may part by a step, and then by what a step moves near the tolerance.
RTOL = {torch.float32: 1e-4, torch.float64: 1e-7}
VALUES = {torch.float32: 1e-3, torch.float64: 1e-6}
STEPS = 2


def run(lowered: Lowered, x0: Tensor, solver: Any, engine: Any = native, **given: Any) -> Any:
    options: dict[str, Any] = {"rtol": RTOL[x0.dtype], "atol": 0.0, "max_steps": 200} | given
    return solve_fused(lowered, x0, solver, backend=engine, **options)


def require_agreement(result: SolveResult, expected: SolveResult) -> None:
    dtype = result.x.dtype
    assert torch.equal(result.status, expected.status)
    assert int((result.num_steps - expected.num_steps).abs().max()) <= STEPS
    torch.testing.assert_close(result.x, expected.x, rtol=VALUES[dtype], atol=VALUES[dtype])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", list(MAPS))
def test_agrees_with_its_twin(name: str, solver: Any, dtype: torch.dtype) -> None:
    lowered = MAPS[name](29, 33, dtype)
    x0 = torch.randn(29, 33, dtype=dtype)
    require_agreement(run(lowered, x0, solver), run(lowered, x0, solver, reference_loop))


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
@pytest.mark.parametrize("solver", [Picard(0.9), Anderson(m=5)], ids=str)
@pytest.mark.parametrize("name", list(MAPS))
def test_rounded_products_agree_with_their_twin(name: str, solver: Any, precision: str) -> None:
    lowered = MAPS[name](29, 33, torch.float32)
    x0 = torch.randn(29, 33)
    given: dict[str, Any] = {"precision": precision, "rtol": 1.5 * FLOORS[precision]}
    ours, twin = (run(lowered, x0, solver, e, **given) for e in (native, reference_loop))
    assert torch.equal(ours.status, twin.status)
    assert bool((ours.status == Status.CONVERGED).all())
    assert int((ours.num_steps - twin.num_steps).abs().max()) <= STEPS
    exact = run(lowered, x0, solver, rtol=1e-6)
    scale = exact.x.norm(dim=1)
    for result in (ours, twin):
        assert float(((result.x - exact.x).norm(dim=1) / scale).max()) <= 10 * FLOORS[precision]
    # The rounded map at one and the same point, but for the order of its sums.
    one_step = dict(given, max_steps=1, rtol=0.0)
    ours, twin = (
        op_result(lowered, exact.x, e, **one_step).double() for e in (native, reference_loop)
    )
    apart = float((ours - twin).abs().max() / scale.min())
    assert apart <= {"tf32x3": 2e-6, "tf32": 1e-5, "bf16": 1e-4}[precision]
    plain = op_result(lowered, exact.x, native, **dict(one_step, precision="ieee")).double()
    moved = float((ours - plain).abs().max() / scale.min())
    assert moved <= FLOORS[precision]
    if precision != "tf32x3":  # which has nothing to round here
        assert moved > 1e-2 * FLOORS[precision]


def op_result(lowered: Lowered, x0: Tensor, engine: Any, **options: Any) -> Tensor:
    """Residuals of the rounded map at x0."""
    return fused.run(lowered, x0, Picard(), atol=0.0, backend=engine, **options).residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 255, 256, 300])
@pytest.mark.parametrize("dim", [1, 31, 257, 520])
def test_any_size(dim: int, hidden: int, dtype: torch.dtype) -> None:
    for make in (two_layers, adjoint):
        lowered = make(5, dim, dtype, hidden)
        x0 = torch.randn(5, dim, dtype=dtype)
        solver = Picard()
        require_agreement(run(lowered, x0, solver), run(lowered, x0, solver, reference_loop))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_activation_is_accurate(name: str, dtype: torch.dtype) -> None:
    grid = torch.cat([torch.linspace(-30, 30, 401), torch.logspace(-6, 0, 50), torch.zeros(1)])
    u = torch.cat([grid, -grid]).to(dtype)[:, None]
    lowered = Lowered((Layer(torch.ones(1, 1, dtype=dtype), name, shift=u),))
    # At x = 0 the residual is |act(u)|.
    result = run(lowered, torch.zeros_like(u), Picard(), max_steps=1)
    expected = FUNCTIONS[name](u.double()).abs().squeeze(1)
    eps = torch.finfo(dtype).eps
    if "gelu" in name:
        # Torch's own cancel for negative u.
        phi, moment = normal(u.squeeze(1))
        expected = u.double().squeeze(1) * phi if name == "gelu" else phi + moment
        size = expected.abs() if name == "gelu" else phi + moment.abs()
        error = (result.residual - expected.abs()).abs() - 1e-37  # below which all is zero
        assert float((error / size).max()) <= 3 * eps
    elif name == "tanh_derivative":
        torch.testing.assert_close(result.residual, expected, rtol=0, atol=4 * eps)
    else:
        torch.testing.assert_close(result.residual, expected, rtol=4 * eps, atol=1e-37)


def normal(u: Tensor) -> tuple[Tensor, Tensor]:
    """Phi(u) and u phi(u) for the standard normal, rounded from 40 digits to float64."""
    with mpmath.workdps(40):
        points = [mpmath.mpf(value) for value in u.tolist()]
        phi = [float(mpmath.ncdf(point)) for point in points]
        moment = [float(point * mpmath.npdf(point)) for point in points]
    return torch.tensor(phi, dtype=torch.float64), torch.tensor(moment, dtype=torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan_and_infinity_does_no_harm(name: str) -> None:
    u = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e38, -1e38])[:, None]
    lowered = Lowered((Layer(torch.ones(1, 1), name, shift=u),))
    residual = run(lowered, torch.zeros_like(u), Picard(), max_steps=1).residual
    expected = FUNCTIONS[name](u).abs().squeeze(1).double()
    if "gelu" in name:
        # Inf * 0 there, as Inf or NaN: no solve survives either.
        finite = ~u.squeeze(1).isinf()
        residual, expected = residual[finite], expected[finite]
    torch.testing.assert_close(residual, expected, equal_nan=True, rtol=1e-6, atol=1e-7)
    if name == "gelu":
        assert residual[[2, 4]].tolist() == [0.0, 0.0]  # of huge negative numbers


def test_a_sample_does_not_depend_on_the_others(threads: int) -> None:
    batch = 150
    for dtype in DTYPES:
        for make in MAPS.values():
            lowered = make(batch, 33, dtype)
            # Samples leave their tiles at very different times.
            scale = torch.logspace(-3, 3, batch, dtype=dtype)[torch.randperm(batch), None]
            x0 = scale * torch.randn(batch, 33, dtype=dtype)
            whole = run(lowered, x0, Anderson(m=4))
            assert len(set(whole.num_steps.tolist())) >= 3
            for count in (1, 2, 13, 101):
                few = run(lowered.rows(count), x0[:count], Anderson(m=4))
                for part, full in zip(few, whole, strict=True):
                    assert torch.equal(part, full[:count])
            order = torch.randperm(batch)
            shuffled = run(permuted(lowered, order), x0[order], Anderson(m=4))
            for part, full in zip(shuffled, whole, strict=True):
                assert torch.equal(part, full[order])
            rounded = {"precision": "bf16", "rtol": 1e-2}
            whole = run(lowered, x0, Anderson(m=4), **rounded)
            few = run(lowered.rows(13), x0[:13], Anderson(m=4), **rounded)
            for part, full in zip(few, whole, strict=True):
                assert torch.equal(part, full[:13])


def test_threads_change_no_bit() -> None:
    lowered, x0 = two_layers(400, 65, torch.float32), torch.randn(400, 65)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(lowered, x0, Anderson()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_samples_hurt_nobody(dtype: torch.dtype, solver: Any) -> None:
    batch, dim = 40, 19
    good = two_layers(batch, dim, dtype)
    x0 = torch.randn(batch, dim, dtype=dtype)
    expected = run(good, x0, solver)
    shift = good.layers[0].shift
    assert shift is not None
    shift = shift.clone()
    shift[7] = float("nan")
    shift[11, 3] = float("inf")
    x0[20, 0] = float("nan")
    bad = Lowered((replace(good.layers[0], shift=shift), good.layers[1]))
    result = run(bad, x0, solver)
    assert result.status[7] == Status.NONFINITE
    assert result.status[20] == Status.NONFINITE
    kept = torch.ones(batch, dtype=torch.bool)
    kept[[7, 11, 20]] = False
    for part, full in zip(result, expected, strict=True):
        assert torch.equal(part[kept], full[kept])


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
def test_every_way_to_end(solver: Any) -> None:
    dim, dtype = 5, torch.float64
    # x -> factor x + shift, a factor per sample.
    factor = torch.tensor([0.5, 3.0, 0.5, 1.0, 0.999], dtype=dtype)[:, None].expand(5, dim)
    shift = torch.ones(5, dim, dtype=dtype)
    x0 = torch.zeros(5, dim, dtype=dtype)
    x0[2] = 2.0  # already there
    identity = Layer(torch.eye(dim, dtype=dtype), shift=shift)
    lowered = Lowered((identity,), x_factor=factor.contiguous())
    result = run(lowered, x0, solver, rtol=1e-8, max_steps=60)
    expected = run(lowered, x0, solver, reference_loop, rtol=1e-8, max_steps=60)
    assert torch.equal(result.status, expected.status)
    assert torch.equal(result.num_steps, expected.num_steps)
    torch.testing.assert_close(result.x, expected.x)
    assert result.status[0] == result.status[2] == Status.CONVERGED
    assert result.num_steps[2] == 1
    assert result.status[3] != Status.CONVERGED
    if isinstance(solver, Picard):
        assert result.status.tolist()[1:] == [
            Status.DIVERGED,
            Status.CONVERGED,
            Status.MAX_STEPS,
            Status.MAX_STEPS,
        ]
        assert result.num_steps[3] == 60


@pytest.mark.parametrize("name", list(MAPS))
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=str)
@pytest.mark.parametrize("max_steps", [1, 4, 100])
def test_the_residual_is_that_of_the_point_returned(name: str, solver: Any, max_steps: int) -> None:
    lowered = MAPS[name](64, 40, torch.float64)
    result = run(lowered, torch.randn(64, 40, dtype=torch.float64), solver, max_steps=max_steps)
    true = (lowered(result.x) - result.x).norm(dim=1)
    torch.testing.assert_close(result.residual, true, rtol=1e-6, atol=1e-13)


def test_x0_and_the_map_are_left_alone() -> None:
    lowered, x0 = adjoint(9, 12, torch.float32), torch.randn(9, 12)
    before = [t.clone() for t in (x0, *lowered.tensors())]
    run(lowered, x0, Anderson())
    assert all(map(torch.equal, before, (x0, *lowered.tensors())))


def test_weights_of_any_strides() -> None:
    lowered, x0 = two_layers(9, 12, torch.float32), torch.randn(9, 12)
    expected = run(lowered, x0, Anderson())
    for part, full in zip(run(with_strides(lowered), x0, Anderson()), expected, strict=True):
        assert torch.equal(part, full)


def arguments(lowered: Lowered, x: Tensor, **given: Any) -> tuple[list[Any], dict[str, Any]]:
    """What solve_fused passes to the op."""
    caught: list[Any] = []

    class Catch:
        @staticmethod
        def cell_loop_(*args: Any, **kwargs: Any) -> None:
            caught.extend([list(args), kwargs])

    run(lowered, x, Anderson(m=2), Catch, **given)
    return caught[0], caught[1]


@pytest.mark.parametrize("name", list(MAPS))
def test_opcheck(name: str) -> None:
    args, kwargs = arguments(MAPS[name](3, 4, torch.float64), torch.randn(3, 4).double())
    torch.library.opcheck(torch.ops.fpi_cuda.cell_loop_.default, tuple(args), kwargs)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(3), r"x must be \(batch, dim\)"),
        (0, torch.zeros(3, 4, dtype=torch.float16), "x must be float32 or float64, got Half"),
        (2, torch.zeros(5, 3), r"weight1 must be \(outputs, 4\), got \(5, 3\)"),
        (2, torch.zeros(5, 4).double(), "weight1 must have dtype Float, got Double"),
        (4, torch.zeros(3, 6), r"shift1 must be \(3, 5\), got \(3, 6\)"),
        (4, torch.zeros(5, 3).mT, "shift1 must be contiguous"),
        (6, None, "bias2, shift2 and factor2 belong to weight2"),
        (7, torch.zeros(5), r"bias2 must be \(4\), got \(5\)"),
        (10, torch.zeros(3), "atol must have dtype Double, got Float"),
        (11, torch.zeros(3), "status must have dtype Char, got Float"),
        ("depth", 17, "depth must be from 0 to 16, got 17"),
        ("max_steps", 0, "max_steps must be at least 1, got 0"),
        ("activation1", 11, "activation1 must be from 0 to 10, got 11"),
        ("activation2", -1, "activation2 must be from 0 to 10, got -1"),
    ],
)
def test_the_op_refuses(place: Any, wrong: Any, message: str) -> None:
    args, kwargs = arguments(two_layers(3, 4, torch.float32, 5), torch.randn(3, 4))
    if isinstance(place, int):
        args[place] = wrong
    else:
        kwargs[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fpi_cuda.cell_loop_(*args, **kwargs)


def test_the_tile_fits_the_batch_and_the_threads() -> None:
    tile = torch.ops.fpi_cuda.cell_loop_tile
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert tile(0, 159, 600, 5, False) == 0
        assert tile(1, 159, 600, 5, False) == 1
        assert tile(7, 159, 600, 5, False) == 4
        most = tile(100000, 159, 600, 5, False)
        assert 4 <= most <= 1000
        assert tile(100000, 4096, 0, 16, True) <= most
    finally:
        torch.set_num_threads(before)
