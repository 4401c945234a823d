"""The step benchmark: what it times is the step that it says, and its figures add up."""
# ruff: noqa: E402

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

for name in ("matplotlib", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

from bench import machine, step
from bench.measure import cpu_clock, cuda_clock
from bench.record import Record
from bench.step_rows import Case, Ours, hand_written_step, right, snapshot
from fpi_cuda import ops
from fpi_cuda.ops import reference
from fpi_cuda.ops.solver_state import column
from fpi_cuda.solution import Status

CPU = torch.device("cpu")
CASE = Case(3, 40, 2, torch.float32)


@pytest.mark.parametrize("dtype", step.DTYPES, ids=str)
def test_every_timed_step_is_the_same_accelerated_step(dtype: torch.dtype) -> None:
    case = Case(3, 40, 4, dtype)
    start = snapshot(case, CPU, reference)
    row = Ours(ops.resolve(None, CPU, dtype), case, start)
    ends = []
    for _ in range(2):
        row.reset()
        row.run()
        ends.append(row.x.clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], start.gx), "a Picard step reads no history"
    columns = column(row.work.control, "columns")
    assert columns.tolist() == [4.0] * 3


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    start = snapshot(CASE, CPU, reference)

    def wrong_step(*args: torch.Tensor, **options: float) -> None:
        reference.anderson_step_(*args, **options)  # type: ignore[arg-type]
        args[0].add_(1.0)

    wrong = SimpleNamespace(name="wrong", anderson_step_=wrong_step, scratch=reference.scratch)
    with pytest.raises(RuntimeError, match="fpi_cuda wrong is off the reference by"):
        right(Ours(wrong, CASE, start))  # type: ignore[arg-type]
    monkeypatch.setattr(step, "available", lambda device, dtype: [wrong, reference])
    record = Record()
    step.run(record, [CASE], CPU, rounds=1, num_compiled=0, peers=("hand",))
    (case,) = record.results["cases"]
    assert "off the reference" in record.skipped[f"{CASE.title}: fpi_cuda wrong"]
    rows = {row["name"]: row["ratio"]["median"] for row in case["rows"]}
    assert set(rows) == {"torch, by hand", "fpi_cuda reference"}
    assert rows["fpi_cuda reference"] == 1.0


def test_a_step_of_samples_that_have_stopped_is_not_timed() -> None:
    start = snapshot(CASE, CPU, reference)
    start.work.status[1] = Status.STALLED
    with pytest.raises(RuntimeError, match=r"66\.67% active before a timed step"):
        Ours(reference, CASE, start).timing(cpu_clock)


def test_a_step_that_does_nothing_is_not_timed() -> None:
    start = snapshot(CASE, CPU, reference)
    idle = SimpleNamespace(
        name="idle", anderson_step_=lambda *_, **__: None, scratch=lambda x: None
    )
    with pytest.raises(RuntimeError, match="left samples where they were"):
        Ours(idle, CASE, start).timing(cpu_clock)  # type: ignore[arg-type]


class Card:
    """A device with a clock of its own, in milliseconds."""

    def __init__(self, nap: float) -> None:
        self.nap, self.naps, self.now = nap, 0, 0.0

    def sleep(self, cycles: int) -> None:
        self.naps += 1
        self.now += self.nap

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0, elapsed_time=lambda end: end.at - event.at)
        event.record = lambda: setattr(event, "at", self.now)
        return event


@pytest.mark.parametrize(("nap", "tries", "waits"), [(1e6, 1, False), (0.0, 3, True)])
def test_a_step_is_issued_while_the_device_sleeps(
    monkeypatch: pytest.MonkeyPatch, nap: float, tries: int, waits: bool
) -> None:
    card = Card(nap)
    monkeypatch.setattr("torch.cuda.Event", card.event)
    monkeypatch.setattr("torch.cuda._sleep", card.sleep)
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    calls: list[str] = []

    def call() -> None:
        calls.append("step")
        card.now += 1.0

    timing = cuda_clock(call, lambda: calls.append("reset"))
    assert card.naps == tries
    assert timing.waits == waits
    assert calls == ["reset", "step"] * (tries + waits)
    if not waits:
        assert timing.device == pytest.approx(1e-3)


def test_the_step_by_hand_converges() -> None:
    """Where Picard takes 150 steps."""
    slopes, b = torch.linspace(-0.5, 0.9, 8), torch.ones(1, 8)
    x = torch.zeros(1, 8)
    X, G = torch.zeros(1, 5, 8), torch.zeros(1, 5, 8)
    for k in range(40):
        x, residual = hand_written_step(X, G, x, slopes * x + b, k % 5, 1e-6)
    assert residual < 1e-3
    torch.testing.assert_close(x, b / (1 - slopes), rtol=1e-2, atol=0)


def test_figures_add_up() -> None:
    record = Record()
    step.run(record, [CASE], CPU, rounds=3, num_compiled=0)
    results = record.finish()
    (case,) = results["cases"]
    assert case["bytes"] == 3 * 40 * (2 * 2 + 4) * 4
    assert case["rows"][0]["is_ours"]
    assert case["rows"][0]["active_before"] == case["rows"][0]["active_after"] == 1.0
    assert case["rows"][0]["ratio"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    for row in case["rows"]:
        rate = case["bytes"] / row["seconds"]["median"]
        assert row["bytes_per_second"] == pytest.approx(rate)
        assert row["share_of_copy"] == pytest.approx(rate / results["copy_bytes_per_second"])
    names = [row["name"] for row in case["rows"]]
    assert {"fpi_cuda reference", "torch, by hand"} <= set(names)
    assert "triton" not in " ".join(names), "an interpreted kernel has no speed"
    table = step.text(results)
    assert all(name in table for name in names)
    assert max(map(len, table.splitlines())) <= 100
    results["machine"] = machine.describe(CPU, 1, ["python", "-m", "bench.step"])
    assert all(name in step.markdown(results) for name in names)


@pytest.mark.gpu
def test_on_a_device() -> None:
    record = Record()
    step.run(record, [CASE], torch.device("cuda"), rounds=3, num_compiled=0)
    results = record.finish()
    (case,) = results["cases"]
    assert {row["name"] for row in case["rows"]} >= {"fpi_cuda triton", "fpi_cuda reference"}
    assert all(row["seconds"]["median"] > 0 for row in case["rows"] if row["name"] != "torchdeq")
