"""Captured solves on a CUDA device: the graphs themselves, which no stand-in can vouch for."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gpu.device_solves import BATCH, MAPS, assert_close, input_of, made, run
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import _C
from fpi_cuda.loops.device import PlanCache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_plans")]


SYNCHRONIZING = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
)


def sine_kernel() -> Callable[[Tensor, Tensor, int], None]:
    """launch(x, out, n): out = sin(x), by Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, n, block: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(out + at, tl.sin(tl.load(x + at, mask=at < n)), mask=at < n)

    def launch(x: Tensor, out: Tensor, n: int) -> None:
        kernel[(triton.cdiv(n, 256),)](x, out, n, block=256)

    return launch


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


@contextlib.contextmanager
def sine_op() -> Iterator[Callable[[Tensor], Tensor]]:
    """A Triton kernel as an op that torch sees, with its derivative."""
    launch = sine_kernel()
    with torch.library._scoped_library("fpi_cuda_gpu_test", "FRAGMENT"):

        @torch.library.custom_op("fpi_cuda_gpu_test::sine", mutates_args=())
        def sine(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = torch.empty_like(x)
            launch(x, out, x.numel())
            return out

        sine.register_autograd(
            lambda ctx, v: v * torch.cos(ctx.saved_tensors[0]),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
        )
        yield sine


class TritonCell(nn.Module):
    """x -> sin(A x + z), by a Triton op."""

    def __init__(self, sine: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.sine = sine
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.sine(self.linear(x) + z)


# The loop itself.


def captured(body: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        body()
    return graph


def looped(graph: torch.cuda.CUDAGraph, status: Tensor, rounds: Tensor, most: int) -> Any:
    return _C.DeviceLoop(
        graph.raw_cuda_graph(), status.data_ptr(), status.numel(), rounds.data_ptr(), most
    )


@pytest.mark.parametrize(("most", "expected"), [(100, 7), (3, 3)])
@pytest.mark.parametrize("batch", [1, 255, 1000])
def test_the_loop_counts_its_rounds(most: int, expected: int, batch: int) -> None:
    counter = torch.zeros(batch, dtype=torch.int32, device="cuda")
    status = torch.zeros(batch, dtype=torch.int8, device="cuda")
    rounds = torch.zeros(1, dtype=torch.int32, device="cuda")

    def body() -> None:
        counter.add_(1)
        status.copy_(counter >= 7)

    graph = captured(body)
    loop = looped(graph, status, rounds, most)
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(3):
        counter.zero_()
        status.zero_()
        loop.launch(stream)
        assert rounds.item() == expected
        assert counter.tolist() == [expected] * batch
    status.fill_(1)
    loop.launch(stream)
    assert rounds.item() == 0
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.launch(stream)


def test_the_loop_refuses_what_needs_the_host() -> None:
    x = torch.zeros(4, device="cuda")
    pinned = torch.ones(4).pin_memory()
    graph = captured(lambda: x.copy_(pinned, non_blocking=True))
    status = torch.zeros(4, dtype=torch.int8, device="cuda")
    rounds = torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="copies from or to host memory"):
        looped(graph, status, rounds, 3)


def test_a_loop_that_is_closed_at_work_ends_as_it_should() -> None:
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    status = torch.zeros(1, dtype=torch.int8, device="cuda")
    rounds = torch.zeros(1, dtype=torch.int32, device="cuda")
    loop = looped(captured(lambda: counter.add_(1)), status, rounds, 5000)
    loop.launch(torch.cuda.current_stream().cuda_stream)
    loop.close()
    assert counter.item() == 5000


# The matrix of maps.


@pytest.mark.parametrize("solver", [fpi.Anderson(), fpi.Picard(), fpi.Broyden()], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_solve_and_adjoint_are_those_of_the_host_loop(
    name: str, solver: Any, own_plans: PlanCache
) -> None:
    g, x0 = made(name)
    for seed in range(3):
        z = input_of(name, seed)
        found = run(g, x0, z, "device", solver=solver)
        assert_close(found, run(g, x0, z, "host", solver=solver))
    assert len(own_plans) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, own_plans: PlanCache) -> None:
    g, x0 = made("dense", dtype)
    rtol = max(1e-8, 8 * torch.finfo(dtype).eps)
    for seed in range(2):
        z = input_of("dense", seed, dtype)
        found = run(g, x0, z, "device", rtol=rtol)
        assert_close(found, run(g, x0, z, "host", rtol=rtol))
    assert len(own_plans) == 2


def test_autocast(own_plans: PlanCache) -> None:
    g, x0 = made("conv")
    for seed in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            found = run(g, x0, input_of("conv", seed), "device", rtol=1e-2)
            expected = run(g, x0, input_of("conv", seed), "host", rtol=1e-2)
        assert_close(found, expected, 2e-2)
    assert len(own_plans) == 2


@needs_triton
def test_a_triton_op_inside_g(own_plans: PlanCache) -> None:
    with sine_op() as sine:
        g = TritonCell(sine).to("cuda")
        x0 = torch.zeros(BATCH, 64, device="cuda")
        for _ in range(3):
            z = torch.randn(BATCH, 64, device="cuda")
            assert_close(run(g, x0, z, "device"), run(g, x0, z, "host"))
        assert len(own_plans) == 2


@needs_triton
def test_a_bare_triton_kernel_is_refused() -> None:
    launch = sine_kernel()

    def g(x: Tensor, z: Tensor) -> Tensor:
        inner = (0.5 * x + z).contiguous()
        out = torch.empty_like(inner)
        launch(inner, out, inner.numel())
        return out

    x0 = torch.zeros(BATCH, 64, device="cuda")
    with torch.no_grad(), pytest.raises(RuntimeError, match="kernels that torch does not see"):
        fpi.fixed_point(g, x0, torch.ones_like(x0), route="device")
    with torch.no_grad():
        assert bool(fpi.fixed_point(g, x0, torch.ones_like(x0)).converged.all())


def test_gradients_of_every_order() -> None:
    torch.manual_seed(0)
    g = fpi.cells.Dense(2, 3).to("cuda", torch.float64)
    x0 = torch.zeros(2, 3, device="cuda", dtype=torch.float64)
    z = torch.randn(2, 2, device="cuda", dtype=torch.float64, requires_grad=True)

    def value(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, rtol=1e-12, route="device").value

    assert torch.autograd.gradcheck(value, (z,))
    assert torch.autograd.gradgradcheck(value, (z,))


def test_autograds_ops_are_part_of_the_trace(own_plans: PlanCache) -> None:
    """Autograd's thread must see the recorder, or the adjoint's plan would prove nothing."""
    g, x0 = made("mlp")
    run(g, x0, input_of("mlp", 0), "device")
    plans = [plan for plan in own_plans._idle.values() if plan.key[0] == "adjoint"]
    assert len(plans) == 1
    names = [str(call[0]) for call in plans[0].calls[len(plans[0].calls_at_x) :]]
    assert any("mm" in name for name in names), names


# No host in the loop.


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_later_forward_pass_does_not_synchronize(grad: bool) -> None:
    g, x0 = made("dense")
    z = input_of("dense", 0).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            fpi.fixed_point(g, x0, z, route="device")
        torch.cuda.set_sync_debug_mode("error")
        try:
            fpi.fixed_point(g, x0, z, route="device")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_profiler_sees_no_synchronization_and_no_copy_to_the_host() -> None:
    g, x0 = made("dense")
    z = input_of("dense", 0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad():
        for _ in range(3):
            solution = fpi.fixed_point(g, x0, z, rtol=1e-6, route="device")
        torch.cuda.synchronize()
        with (
            torch.profiler.profile(activities=activities) as profile,
            torch.profiler.record_function("the solve"),
        ):
            fpi.fixed_point(g, x0, z, rtol=1e-6, route="device")
        torch.cuda.synchronize()
    assert int(solution.num_steps.max()) > 5
    (whole,) = [event for event in profile.events() if event.name == "the solve"][:1]
    inside = [
        event.name
        for event in profile.events()
        if whole.time_range.start <= event.time_range.start <= whole.time_range.end
    ]
    assert "cudaGraphLaunch" in inside
    assert not [name for name in inside if name in SYNCHRONIZING or "DtoH" in name]


def test_a_solve_inside_the_callers_capture_takes_masked_steps() -> None:
    g, x0 = made("dense")
    z = input_of("dense", 0)
    options = {"rtol": 1e-5, "max_steps": 40, "rowwise": False}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        fpi.fixed_point(g, x0, z, **options, route="host")
        with torch.cuda.graph(graph):
            found = fpi.fixed_point(g, x0, z, **options)
        for seed in (1, 2):
            z.copy_(input_of("dense", seed))
            graph.replay()
            expected = fpi.fixed_point(g, x0, z, **options, route="host")
            assert torch.equal(found.num_steps, expected.num_steps)
            assert torch.allclose(found.value, expected.value, rtol=1e-5, atol=1e-6)
    other = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="under grad mode a solve cannot be captured"),
        torch.cuda.graph(other),
    ):
        fpi.fixed_point(g, x0, z, **options)


# Failures and memory.


def test_a_capture_that_fails_leaves_nothing_open(own_plans: PlanCache) -> None:
    def g(x: Tensor, z: Tensor) -> Tensor:
        torch.cuda.synchronize()  # torch's dispatcher does not see it, a capture forbids it
        return torch.tanh(0.5 * x + z)

    x0 = torch.zeros(BATCH, 64, device="cuda")
    z = torch.ones_like(x0)
    before = torch.cuda.current_stream()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cannot run there: g cannot be captured"):
            fpi.fixed_point(g, x0, z, route="device")
        assert torch.cuda.current_stream() == before
        assert not torch.cuda.is_current_stream_capturing()
        assert len(own_plans) == 0
        expected = fpi.fixed_point(g, x0, z, route="host").value
        assert torch.equal(fpi.fixed_point(g, x0, z).value, expected)
        # The next capture is none the worse for it.
        assert torch.allclose(
            fpi.fixed_point(lambda x, z: torch.tanh(0.5 * x + z), x0, z, route="device").value,
            expected,
        )
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2.0] * 3


def test_work_left_on_another_stream_is_refused() -> None:
    side = torch.cuda.Stream()

    def g(x: Tensor, z: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.abs()  # nobody waits for it: the capture cannot end
        return torch.tanh(0.5 * x + z)

    x0 = torch.zeros(BATCH, 64, device="cuda")
    z = torch.ones_like(x0)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cannot run there: g cannot be captured"):
            fpi.fixed_point(g, x0, z, route="device")
        torch.randn(3, device="cuda")  # a generator still in a capture would refuse
        found = fpi.fixed_point(lambda x, z: torch.tanh(0.5 * x + z), x0, z, route="device")
        assert torch.equal(found.value, fpi.fixed_point(g, x0, z, route="host").value)


@pytest.mark.parametrize(
    ("g", "reason"),
    [
        (lambda x, z: x * 0.5 + z if float(x.sum()) < 1e9 else x, "reads numbers on the host"),
        (lambda x, z: nn.functional.dropout(x, 0.5) * 0.5 + z, "draws random numbers"),
        (lambda x, z: 0.5 * x + z * torch.tensor(0.5, device="cuda"), "make it once"),
    ],
    ids=["host read", "random numbers", "host numbers"],
)
def test_refusals(g: Callable[..., Tensor], reason: str) -> None:
    x0 = torch.zeros(BATCH, 8, device="cuda")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=reason):
            fpi.fixed_point(g, x0, torch.ones_like(x0), route="device")
        fpi.fixed_point(g, x0, torch.ones_like(x0))
