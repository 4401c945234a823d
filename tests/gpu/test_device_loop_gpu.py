"""Captured solves on a CUDA device: the graphs themselves, which no stand-in can vouch for."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import device_loop
from fpi_cuda.device_loop import PlanCache, native

pytestmark = pytest.mark.gpu

BATCH = 6
SYNCHRONIZING = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
)


@pytest.fixture(autouse=True)
def own_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlanCache]:
    """Plans of this test alone, freed when it ends."""
    plans = PlanCache()
    monkeypatch.setattr(device_loop, "plans", plans)
    yield plans
    plans.clear()


class ConvCell(nn.Module):
    """x -> norm(relu(norm(conv(x)) + z)), a DEQ cell."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(3))
        with torch.no_grad():
            for conv in (self.first, self.second):
                conv.weight.mul_(0.3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        inner = self.norms[0](torch.relu(self.first(x)))
        return self.norms[2](torch.relu(x + self.norms[1](z + self.second(inner))))


class Attention(nn.Module):
    """x -> tanh(a attention(x) + z)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.project(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return torch.tanh(0.3 * self.out(mixed.transpose(1, 2).flatten(2)) + z)


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


MAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "dense": (lambda: fpi.cells.Dense(16, 256), (256,), (16,)),
    "mlp": (lambda: fpi.cells.MLP(16, 40, 64), (40,), (16,)),
    "conv": (ConvCell, (8, 12, 12), (8, 12, 12)),
    "attention": (Attention, (10, 32), (10, 32)),
    "large": (lambda: fpi.cells.Dense(16, 4096), (4096,), (16,)),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The map, and zeros of its state."""
    torch.manual_seed(0)
    make, state, _ = MAPS[name]
    return make().to("cuda", dtype), torch.zeros(BATCH, *state, device="cuda", dtype=dtype)


def input_of(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(BATCH, *MAPS[name][2], device="cuda", dtype=dtype, generator=generator)


def run(g: Any, x0: Tensor, z: Tensor, route: str | None, **options: Any) -> list[Tensor]:
    """Value, account, adjoint's account, gradients in z and the parameters."""
    z = z.clone().requires_grad_()
    solution = fpi.fixed_point(g, x0, z, **{"rtol": 1e-5, "rowwise": False, **options}, route=route)
    weights = torch.linspace(-1.0, 2.0, x0.numel(), device="cuda", dtype=x0.dtype)
    loss = (solution.value.flatten() * weights).sum()
    found = torch.autograd.grad(loss, [z, *g.parameters()])
    stats = solution.adjoint_stats
    assert stats is not None
    account = [solution.status, solution.num_steps, stats.status, stats.num_steps]
    return [*account, solution.value.detach(), *found]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> None:
    """Accounts equal; numbers up to what kernels with atomics may differ by after a solve."""
    for mine, other in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(found[4:], expected[4:], strict=True):
        assert torch.linalg.vector_norm(mine - other) <= tolerance * torch.linalg.vector_norm(other)


# The loop itself.


def captured(body: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        body()
    return graph


def looped(graph: torch.cuda.CUDAGraph, status: Tensor, rounds: Tensor, most: int) -> Any:
    return native.DeviceLoop(
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


# Stale memory.


def test_training_changes_weights_in_place(own_plans: PlanCache) -> None:
    g, x0 = made("dense")
    other, _ = made("dense")
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (g, other)]
    for seed in range(5):
        for module, optimizer, route in zip(
            (g, other), optimizers, ("device", "host"), strict=True
        ):
            optimizer.zero_grad()
            solution = fpi.fixed_point(
                module, x0, input_of("dense", seed), route=route, rowwise=False
            )
            solution.value.square().sum().backward()
            optimizer.step()
    for mine, theirs in zip(g.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    assert len(own_plans) == 2


def swap_parameters(g: nn.Module) -> None:
    for name, parameter in list(g.named_parameters()):
        owner = g.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(0.7 * parameter.detach()))


def swap_storage(g: nn.Module) -> None:
    for parameter in g.parameters():
        parameter.data = 0.7 * parameter.data


def move_away_and_back(g: nn.Module) -> None:
    g.cpu()
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.mul_(0.7)
    torch.cuda.empty_cache()
    g.cuda()


@pytest.mark.parametrize("change", [swap_parameters, swap_storage, move_away_and_back])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_weights_elsewhere_are_captured_anew(
    name: str, change: Callable[[nn.Module], None]
) -> None:
    g, x0 = made(name)
    z = input_of(name, 0)
    before = run(g, x0, z, "device")
    change(g)
    gc.collect()
    # What is freed is written over, so that a stale address could not go unnoticed.
    junk = [torch.full((2**18,), torch.nan, device="cuda") for _ in range(8)]
    del junk
    for _ in range(2):
        found = run(g, x0, z, "device")
        assert_close(found, run(g, x0, z, "host"))
    assert not torch.allclose(before[4], found[4])


# Streams and threads.


def test_two_streams_take_turns_on_one_plan() -> None:
    g, x0 = made("large")
    zs = [input_of("large", seed) for seed in range(6)]
    with torch.no_grad():
        expected = [fpi.fixed_point(g, x0, z, route="host", rowwise=False).value for z in zs]
        fpi.fixed_point(g, x0, zs[0], route="device")
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        for index, z in enumerate(zs):
            with torch.cuda.stream(streams[index % 2]):
                found.append(fpi.fixed_point(g, x0, z, route="device").value)
        torch.cuda.synchronize()
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)


# A plan keeps the parameters' gradient nodes alive, on the stream of the thread that made it.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_threads_with_streams_of_their_own(name: str) -> None:
    g, x0 = made(name)
    expected = [run(g, x0, input_of(name, seed), "host") for seed in range(4)]
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                barrier.wait()
                for _ in range(10):
                    assert_close(run(g, x0, input_of(name, seed), None), expected[seed])
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            failures.append(f"{seed}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


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


def test_failed_captures_do_not_eat_memory() -> None:
    def g(x: Tensor, z: Tensor) -> Tensor:
        y = torch.tanh(0.5 * x + z)
        torch.cuda.synchronize()
        return y

    x0 = torch.zeros(64, 2**16, device="cuda")  # 16 MiB
    z = torch.ones_like(x0)

    def fail() -> int:
        device_loop.plans.clear()
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            fpi.fixed_point(g, x0, z, route="device")
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = [fail() for _ in range(3)][-1]
    assert [fail() for _ in range(10)][-1] <= first


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


def test_ten_thousand_solves_hold_no_more_memory_than_ten() -> None:
    g, _ = made("dense")
    layer = fpi.FPILayer(g, rtol=1e-4, route="device")
    free = []
    for count in (20, 10_000):
        for index in range(count):
            z = input_of("dense", index % 7)
            if index % 10 == 0:
                layer(z.requires_grad_()).sum().backward()
            else:
                with torch.no_grad():
                    layer(z)
        layer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
    assert layer.explain().startswith("route    device loop")
    assert free[1][0] <= free[0][0]
    assert free[1][1] >= free[0][1] - 2**22


def test_plans_give_their_memory_back(own_plans: PlanCache) -> None:
    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB, of the check against the host loop
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    g, x0 = made("large")
    before = reserved()
    with torch.no_grad():
        fpi.fixed_point(g, x0, input_of("large", 0), route="device")
    assert own_plans.memory() > 10 * x0.numel() * 4
    own_plans.clear()
    assert reserved() <= before + 2**21
