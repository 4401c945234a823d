"""Captured solves on a CUDA device: no stale memory, streams and threads, nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from gpu.device_solves import assert_close, input_of, made, run
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.loops import device as device_loop
from fpi_cuda.loops.device import PlanCache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_plans")]


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
