"""Plans are found again only where they fit, shared by nobody, and give their memory back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops.device.captured import (
    FEATURES,
    TIGHT,
    Cell,
    assert_gradients_like_host,
    assert_like_host,
    assert_same,
    gradients,
    inputs,
    solve,
)
from tape import TapeGraphs
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import ops
from fpi_cuda.loops import device as device_loop
from fpi_cuda.loops.device.cache import PlanCache
from fpi_cuda.loops.device.cuda_graphs import Refused
from fpi_cuda.loops.device.plan import numeric_flags


def test_later_solves_capture_nothing(tape: TapeGraphs) -> None:
    g = Cell()
    solve(g, *inputs())
    tape.log.clear()
    for seed in range(3):
        with torch.no_grad():
            assert_like_host(g, *inputs(seed=seed))
    assert tape.log == ["wait", "loop", "mark"] * 3
    assert len(device_loop.plans) == 2  # solve and adjoint


def strided(z: Tensor) -> Tensor:
    return z.t().contiguous().t()


@pytest.mark.parametrize(
    "change",
    [
        lambda g, x0, z: (solve, (g, x0[:3], z[:3]), {}),
        lambda g, x0, z: (solve, (g, x0, strided(z)), {}),
        lambda g, x0, z: (solve, (g, x0, z), {"rtol": 1e-9}),
        lambda g, x0, z: (solve, (g, x0, z), {"max_steps": 150}),
        lambda g, x0, z: (solve, (g, x0, z), {"solver": fpi.Anderson(m=4)}),
        lambda g, x0, z: (solve, (g, x0, z), {"backend": "reference"}),
        lambda g, x0, z: (solve, (Cell(), x0, z), {}),
    ],
    ids=["batch", "strides", "rtol", "max_steps", "solver", "backend", "module"],
)
def test_another_solve_gets_another_plan(
    tape: TapeGraphs, change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = Cell()
    x0, z = inputs()
    with torch.no_grad():
        solve(g, x0, z)
        run, arguments, options = change(g, x0, z)
        if options.get("backend") == "reference":
            monkeypatch.setattr(ops.reference, "anderson_step_", ops.native.anderson_step_)
        run(*arguments, **options)
        assert tape.log.count("capture") == 2
        solve(g, x0, z)
    assert tape.log.count("capture") == 2


def test_atol_is_no_part_of_a_plan(tape: TapeGraphs) -> None:
    g, (x0, z) = Cell(), inputs()
    with torch.no_grad():
        loose = assert_like_host(g, x0, z, atol=0.1)
        tight = assert_like_host(g, x0, z, atol=0.0)
    assert bool((loose.num_steps < tight.num_steps).all())
    assert tape.log.count("capture") == 1


def test_autocast_and_global_switches_get_their_own_plans(tape: TapeGraphs) -> None:
    cell = fpi.cells.Dense(3, FEATURES)
    x0, z = (t.float() for t in inputs())
    options = {"rtol": 1e-3, "rowwise": False}
    with torch.no_grad():
        plain = assert_like_host(cell, x0, z, **options)
        with torch.autocast("cpu", torch.bfloat16):
            low = assert_like_host(cell, x0, z, **options)
            assert_like_host(cell, x0, z, **options)
        assert not torch.equal(plain.value, low.value)
        assert tape.log.count("capture") == 2
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            assert_like_host(cell, x0, z, **options)
        finally:
            torch.set_float32_matmul_precision(before)
        assert tape.log.count("capture") == 3


def test_gradients_under_autocast_come_from_the_device_again(tape: TapeGraphs) -> None:
    cell = fpi.cells.Dense(3, FEATURES)
    x0, z = (t.float() for t in inputs())
    options = {"rtol": 1e-2, "rowwise": False}
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            # A weight that torch has cast already must not be what the graph reads.
            cell(x0, z)
            assert_gradients_like_host(cell, x0, z, **options)
    assert tape.log.count("capture") == 3


def test_the_oldest_plan_makes_room(tape: TapeGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = PlanCache(most_plans=2)
    monkeypatch.setattr(device_loop, "plans", plans)
    g = Cell()
    with torch.no_grad():
        for batch in (2, 3, 4):
            solve(g, *inputs(batch))
        assert len(plans) == 2
        assert tape.log.count("close") == 1
        assert tape.retired > 0
        solve(g, *inputs(4))
        solve(g, *inputs(3))
        assert tape.log.count("capture") == 3
        solve(g, *inputs(2))
    assert tape.log.count("capture") == 4


def test_memory_is_reported_and_given_back(tape: TapeGraphs) -> None:
    plans = device_loop.plans
    g = Cell()
    assert plans.memory() == 0
    with torch.no_grad():
        solve(g, *inputs())
    small = plans.memory()
    assert small >= 5 * FEATURES * 8 * (2 * 5 + 3)
    with torch.no_grad():
        solve(g, *inputs(50))
    assert plans.memory() > 8 * small
    plans.clear()
    assert plans.memory() == len(plans) == 0


def test_plans_go_with_their_module(tape: TapeGraphs) -> None:
    g = Cell()
    solve(g, *inputs())
    assert len(device_loop.plans) == 2
    del g
    gc.collect()
    assert len(device_loop.plans) == 0
    assert tape.log.count("close") == 3


class OnePlan:
    """A plan that counts how often it was closed."""

    def __init__(self, key: tuple[Any, ...], memory: int = 7) -> None:
        self.key = key
        self.memory = memory
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_lent_plan_is_nobody_elses() -> None:
    plans = PlanCache()
    plan = OnePlan(("a",))
    with plans.made(plan):
        assert plans.take(("a",)) is None
        assert plans.has(("a",))
    assert plans.take(("b",)) is None
    assert plans.take(("a",)) is plan
    assert plans.take(("a",)) is None
    assert plans.memory() == 7


def test_a_plan_at_work_is_closed_when_it_is_done() -> None:
    plans = PlanCache()
    plan = OnePlan(("a",))
    with plans.made(plan):
        plans.clear()
        assert plan.closed == 0
    assert plan.closed == 1
    assert plans.take(("a",)) is None


def test_large_plans_make_room_for_each_other() -> None:
    plans = PlanCache(most_bytes=100)
    made = [OnePlan((name,), 60) for name in "abc"]
    for plan in made:
        with plans.made(plan):
            pass
    assert [plan.closed for plan in made] == [1, 0, 0]
    assert plans.memory() == 120


def test_switches_that_torch_will_not_sum_up() -> None:
    """torch.get_float32_matmul_precision() raises once a single one was set."""
    matmul = torch.backends.cuda.matmul
    flags, before = numeric_flags(), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert numeric_flags() != flags
    finally:
        matmul.fp32_precision = before
    assert numeric_flags() == flags


def test_a_refusal_is_tried_again_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpi_cuda.loops.device.cache.RETRY_AFTER", 3)
    plans = PlanCache()
    plans.refuse(("a",), Refused("no"))
    assert [plans.refusal(("a",)) for _ in range(4)] == ["no", "no", "no", None]


def test_threads_share_no_memory(tape: TapeGraphs) -> None:
    g = Cell()
    expected = [gradients(g, *inputs(seed=seed), route="host") for seed in range(4)]
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        for _ in range(5):
            found = gradients(g, *inputs(seed=seed))
            if not all(map(torch.equal, found, expected[seed])):
                failures.append(f"seed {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_solve_inside_g_does_not_share_its_plan(tape: TapeGraphs) -> None:
    g = Cell()
    x0, z = inputs()

    def outer(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * fpi.fixed_point(g, x, z, **TIGHT).value

    with torch.no_grad():
        solve(g, x0, z)
        expected = solve(outer, x0, z, route="host")
        assert_same(solve(outer, x0, z, route=None), expected)
        assert_same(solve(outer, x0, z, route=None), expected)
