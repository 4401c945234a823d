"""How the host loop learns who is active: at once on the CPU, some steps late on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fpi_cuda.loops import host
from fpi_cuda.loops.host import CountAtOnce, CountLater, active_count
from fpi_cuda.ops import reference
from fpi_cuda.options import Anderson
from fpi_cuda.solution import SolveResult, Status


class Queue:
    """A device that is `behind` events behind the host, unless the host waits for it."""

    def __init__(self, behind: int) -> None:
        self.behind = behind
        self.recorded = 0
        self.passed = 0
        self.waits = 0

    def record(self) -> Mark:
        self.recorded += 1
        self.passed = max(self.passed, self.recorded - self.behind)
        return Mark(self, self.recorded)


class Mark:
    def __init__(self, queue: Queue, number: int) -> None:
        self.queue = queue
        self.number = number

    def query(self) -> bool:
        return self.number <= self.queue.passed

    def synchronize(self) -> None:
        if not self.query():
            self.queue.waits += 1
            self.queue.passed = self.number


def status_with(active: int, total: int) -> Tensor:
    status = torch.full((total,), int(Status.CONVERGED), dtype=torch.int8)
    status[:active] = Status.ACTIVE
    return status


def test_the_cpu_counts_at_once() -> None:
    count = active_count(torch.device("cpu"))
    assert isinstance(count, CountAtOnce)
    assert [count.after_step(status_with(n, 5)) for n in (5, 2, 0)] == [5, 2, 0]


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_a_device_that_keeps_up_is_never_waited_for(behind: int) -> None:
    queue = Queue(behind)
    count = CountLater(queue.record, pinned=False)
    active = [9, 7, 7, 4, 1, 0, 0, 0]
    seen = [count.after_step(status_with(n, 9)) for n in active]
    assert queue.waits == 0
    assert seen == [None] * behind + active[: len(active) - behind]


def test_the_host_is_never_more_than_the_lag_ahead() -> None:
    queue = Queue(behind=100)
    count = CountLater(queue.record, pinned=False)
    active = [9, 8, 7, 6, 5, 4, 3, 2]
    seen = [count.after_step(status_with(n, 9)) for n in active]
    lag = CountLater.LAG
    assert seen == [None] * lag + active[:-lag]
    # Behind the event that is waited for, the device still has a step to go on with.
    assert queue.recorded - queue.passed == lag


def test_counts_of_a_batch_that_has_shrunk_are_told_apart() -> None:
    queue = Queue(behind=1)
    count = CountLater(queue.record, pinned=False)
    seen = [
        count.after_step(status_with(n, total)) for n, total in ((8, 9), (3, 9), (2, 3), (0, 3))
    ]
    assert seen == [None, 8, 3, 2]


def counting(z: Tensor, calls: list[int]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Samples that need more and more steps, and the rows of every evaluation."""
    slope = torch.linspace(0.05, 0.9, len(z), dtype=z.dtype)[:, None]

    def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
        calls.append(len(x))
        part = slice(None) if rows is None else rows
        return slope[part] * torch.tanh(x) + z[part]

    return evaluate


@pytest.mark.parametrize("rowwise", [False, True], ids=["whole", "compacted"])
@pytest.mark.parametrize("behind", [0, 1, 2, 100])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 100])
def test_late_counts_change_no_result(
    monkeypatch: pytest.MonkeyPatch, rowwise: bool, behind: int, max_steps: int
) -> None:
    z = torch.randn(12, 6, dtype=torch.float64)

    def run(count: Any) -> tuple[SolveResult, list[int]]:
        calls: list[int] = []
        monkeypatch.setattr(host, "active_count", lambda device: count)
        result = host.iterate(
            counting(z, calls), 0 * z, Anderson(m=3), rtol=1e-8, atol=0.0, max_steps=max_steps,
            backend=reference, rowwise=rowwise,
        )  # fmt: skip
        return result, calls

    at_once, few = run(CountAtOnce())
    late, more = run(CountLater(Queue(behind).record, pinned=False))
    for one, other in zip(late, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(few) == int(at_once.num_steps.max())
    assert len(few) <= len(more) <= min(len(few) + CountLater.LAG, max_steps)
    if rowwise and max_steps == 100:
        assert few[-1] < 12
        assert more[-1] < 12


def test_rows_that_stay_keep_their_order() -> None:
    status = torch.tensor([1, 0, 3, 0, 0, 2], dtype=torch.int8)
    assert host.active_first(status).tolist() == [1, 3, 4, 0, 2, 5]
