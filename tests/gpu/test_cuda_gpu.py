"""The cuda backend on a device: what emulation cannot show."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from stepping import MAPS, advance, assert_same_step, begin, end_first_phase, g, pairs, short, slack
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import _extension, ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.ops import reference
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver, Picard
from fpi_cuda.solution import Status

pytestmark = pytest.mark.gpu

SPLIT = 16384 + 37  # more than one block holds
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOLVERS = [Picard(), Anderson(m=5), Anderson(m=16), Broyden(m=3)]


@pytest.fixture
def cuda() -> Any:
    """The backend, built and fit for this device."""
    device = torch.device("cuda")
    reason = ops.why_not("cuda", device, torch.float32)
    assert reason is None, f"{reason}; built as {_extension.build_info()}"
    return ops.resolve("cuda", device, torch.float32)


def on_device(b: Any, z: Tensor) -> tuple[Any, Tensor]:
    """The same batch under way, on the device."""
    b.x = b.x.cuda()
    for name, array in vars(b.work).items():
        if array is not None:
            setattr(b.work, name, array.cuda())
    return b, z.cuda()


def test_cuda_is_the_best_backend_for_a_device(cuda: Any) -> None:
    for dtype in DTYPES:
        assert ops.resolve(None, torch.device("cuda"), dtype) is cuda


@pytest.mark.parametrize(("solver", "dtype"), pairs(*DTYPES), ids=short)
@pytest.mark.parametrize("dim", [1, 31, 33, 129, 1024, 5000, SPLIT, 300_000])
def test_cuda_takes_the_steps_of_the_reference(
    cuda: Any, solver: FixedPointSolver, dtype: torch.dtype, dim: int
) -> None:
    torch.manual_seed(dim)
    one, z = on_device(*begin(solver, len(MAPS), dim, dtype))
    torch.manual_seed(dim)
    other, _ = on_device(*begin(solver, len(MAPS), dim, dtype))
    one.work.scratch = cuda.scratch(one.x)
    for number in range(6):
        advance(one, z, cuda)
        advance(other, z, reference)
        if number == 0:
            end_first_phase(one)
            end_first_phase(other)
        assert_same_step(one, other, slack(solver, dtype))


def account(backend: Any, solver: FixedPointSolver, x: Tensor, z: Tensor, samples: list[int],
            rowwise: bool = False) -> list[Tensor]:  # fmt: skip
    """The whole solve of some samples of one problem, in the order asked for."""
    chosen = torch.tensor(samples, device=x.device)
    return list(
        iterate(
            lambda x, rows: g(x, z, chosen if rows is None else chosen[rows]),
            x[chosen], solver, rtol=1e-4, atol=0.0, max_steps=60, backend=backend, rowwise=rowwise,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dim", [33, 777, SPLIT, 300_000])
@pytest.mark.parametrize("solver", SOLVERS, ids=short)
def test_a_sample_gets_the_same_bits_in_any_batch(
    cuda: Any, solver: FixedPointSolver, dim: int
) -> None:
    b, z = on_device(*begin(solver, len(MAPS), dim, torch.float32))
    every = list(range(len(MAPS)))
    whole = account(cuda, solver, b.x, z, every)
    for samples, rowwise in (
        (every, False),
        ([2], False),
        ([6, 5, 4, 3, 2, 1, 0], False),
        (every * 9, False),
        (every, True),
    ):
        part = account(cuda, solver, b.x, z, samples, rowwise)
        for one, other in zip(part, whole, strict=True):
            torch.testing.assert_close(one, other[samples], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", SOLVERS, ids=short)
def test_whole_solves_agree_with_the_cpu(cuda: Any, solver: FixedPointSolver) -> None:
    """In status, and in steps to two: rounding differs.

    The slope stays below 0.8: near 1 two roundings of an accelerated solve part by many steps,
    on the CPU between its own backends too.
    """
    scale = torch.linspace(-0.6, 0.7, 260)
    z = torch.randn(64, 260)

    def run(device: str) -> list[Tensor]:
        s, inputs = scale.to(device), z.to(device)
        sol = fpi.fixed_point(
            lambda x, z: s * x + torch.tanh(0.1 * x) + z, torch.zeros_like(inputs), inputs,
            solver=solver, rtol=1e-5, max_steps=200,
        )  # fmt: skip
        return [t.detach().cpu() for t in (sol.value, sol.status, sol.num_steps)]

    value, status, num_steps = run("cuda")
    expected = run("cpu")
    assert status.tolist() == expected[1].tolist()
    assert (num_steps - expected[2]).abs().max() <= 2
    torch.testing.assert_close(value, expected[0], rtol=1e-3, atol=1e-3)


def smooth(z: Tensor) -> Any:
    """A row-wise map that reads nothing from the device."""

    def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
        return 0.8 * torch.tanh(x) + (z if rows is None else z[rows])

    return evaluate


@pytest.mark.parametrize("rowwise", [False, True], ids=["whole", "compacted"])
@pytest.mark.parametrize("solver", SOLVERS, ids=short)
def test_a_solve_makes_no_blocking_call(cuda: Any, solver: FixedPointSolver, rowwise: bool) -> None:
    z = torch.randn(256, 128, device="cuda") * torch.logspace(-6, 0, 256, device="cuda")[:, None]
    options: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4, "max_steps": 200, "backend": cuda}
    iterate(smooth(z), torch.zeros_like(z), solver, rowwise=rowwise, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = iterate(smooth(z), torch.zeros_like(z), solver, rowwise=rowwise, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.status == Status.CONVERGED).all()


@pytest.mark.parametrize("dim", [129, SPLIT])
def test_steps_run_on_the_callers_stream(cuda: Any, dim: int) -> None:
    """Solves on two streams at once, each behind work that only its own stream waits for."""
    z = [torch.randn(8, dim, device="cuda") for _ in range(2)]
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 0.0, "max_steps": 100, "backend": cuda}
    expected = [iterate(smooth(t), torch.zeros_like(t), Anderson(m=3), **options) for t in z]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in z]
    results = []
    for stream, t in zip(streams, z, strict=True):
        with torch.cuda.stream(stream):
            late = torch.full_like(t, torch.nan)
            torch.cuda._sleep(20_000_000)
            late.copy_(t)
            results.append(iterate(smooth(late), torch.zeros_like(t), Anderson(m=3), **options))
    torch.cuda.synchronize()
    for one, other in zip(results, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_steps_run_on_the_device_of_the_state(cuda: Any) -> None:
    z = torch.randn(4, 65, device="cuda:1")
    with torch.cuda.device(0):
        result = iterate(smooth(z), torch.zeros_like(z), Anderson(m=3), rtol=1e-5, atol=0.0,
                       max_steps=100, backend=cuda)  # fmt: skip
    assert result.x.device == z.device
    assert (result.status == Status.CONVERGED).all()


@pytest.mark.parametrize("dim", [129, SPLIT])
@pytest.mark.parametrize("solver", [Anderson(m=3), Broyden(m=3)], ids=short)
def test_ten_thousand_steps_leak_nothing(cuda: Any, solver: FixedPointSolver, dim: int) -> None:
    b, z = on_device(*begin(solver, 2, dim, torch.float32))
    b.work.scratch = cuda.scratch(b.x)

    def steps(count: int) -> int:
        for _ in range(count):
            b.work.status.zero_()  # nobody rests
            advance(b, z, cuda, max_steps=10**6)
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated()

    before = steps(100)
    assert steps(10_000) == before


def test_ops_say_what_is_wrong(cuda: Any) -> None:
    b, z = on_device(*begin(Anderson(m=2), 2, SPLIT, torch.float32))
    with pytest.raises(RuntimeError, match="samples of 16421 elements need scratch"):
        advance(b, z, cuda)
    b.work.scratch = cuda.scratch(b.x)
    b.work.atol = b.work.atol.cpu()
    with pytest.raises(RuntimeError, match="every array must be on the device of x"):
        advance(b, z, cuda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_gradients_agree_with_the_cpu(cuda: Any, dtype: torch.dtype) -> None:
    weight = 0.5 * torch.randn(17, 17, dtype=dtype) / 17**0.5
    z = torch.randn(5, 17, dtype=dtype)

    def gradients(device: str) -> list[Tensor]:
        w = weight.to(device).requires_grad_()
        inputs = z.to(device).requires_grad_()
        sol = fpi.fixed_point(
            lambda x, z: torch.tanh(x @ w.T + z), torch.zeros_like(inputs), inputs, rtol=1e-6
        )
        sol.value.square().sum().backward()
        assert w.grad is not None
        assert inputs.grad is not None
        return [w.grad.cpu(), inputs.grad.cpu()]

    for one, other in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
