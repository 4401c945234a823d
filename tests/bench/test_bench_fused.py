"""bench.fused measures what it says, at a tiny size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fpi_cuda as fpi
from bench import fused, fused_rows, machine
from bench.fused_report import FAMILIES, readme
from bench.json_files import finite
from bench.peers import graphed, load_entries, loop
from bench.record import Record


def test_the_benchmark_of_the_fused_loop() -> None:
    record = Record()
    fused.run(record, fused_rows.TINY, torch.device("cpu"), modules=("loop",))
    results = record.finish()
    assert results["skipped"] == {}
    assert [table["name"].split()[0] for table in results["problems"]] == [
        "FPI_NN",
        "dense",
        "FPI_GD",
    ]
    first = results["problems"][0]
    labels = {f"fpi_cuda {s}, {r}" for s in ("Anderson", "Picard") for r in ("fused", "host")}
    assert labels <= set(first["rows"])
    assert "torch loop, per-sample stop" in first["rows"]
    for table in results["problems"]:
        for row in table["rows"].values():
            assert row["gradient_error"] < 1e-2
            assert row["forward"]["median"] > 0
    results["machine"] = machine.describe(torch.device("cpu"), 1, ["python"])
    section = readme(finite(results))
    for table in results["problems"]:
        lines = [line for line in section.splitlines() if line.startswith(f"| {table['name']} |")]
        forward, both = (line.strip("| ").split(" | ") for line in lines)
        assert len(both) == 1 + len(FAMILIES)
        assert len(forward) == 3 + len(FAMILIES)
        known = both[1:4] if table is first else both[1:3]
        assert all(float(cell) > 0 for cell in known)
        assert both[-1] == "-"
    assert set(results["two_threads"]) == {"Picard", "Anderson"}
    exits = results["early_exit"]["Picard"]
    assert exits["mean_steps"]["easy"] < exits["mean_steps"]["mixed"] < exits["mean_steps"]["hard"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_are_those_of_peers() -> None:
    entries, skipped = load_entries(fused.PEERS)
    graphed = set() if torch.cuda.is_available() else {"torch loop in a CUDA graph"}
    if not skipped:
        assert set(fused.ROWS) - graphed <= {entry.label for entry in entries}


def test_what_the_graph_holds_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed.GraphedLoop, "_replayed", lambda self, body, *key: body())
    peer, plain = graphed.GraphedLoop("eager"), loop.TorchLoop("plain", stop="every_sample")
    for task in fused_rows.problems(fused_rows.TINY, torch.device("cpu")):
        v = torch.randn(task.x0.shape)
        torch.testing.assert_close(peer.solve(task, 1e-5), plain.solve(task, 1e-5))
        assert int(peer.num_steps(task, 1e-5)[0]) == int(plain.num_steps(task, 1e-5)[0])
        x, grads = peer.solve_and_grad(task, 1e-5, 1e-6, v)
        expected, exact = plain.solve_and_grad(task, 1e-5, 1e-6, v)
        for one, other in zip([x, *grads], [expected, *exact], strict=True):
            torch.testing.assert_close(one, other)


def test_a_round_is_timed_while_all_samples_take_it() -> None:
    size = dataclasses.replace(fused_rows.TINY, dense=((256, 64),))
    task = fused_rows.problems(size, torch.device("cpu"))[1]
    for solver in (fpi.Picard(), fpi.Anderson(m=5)):
        peer = fused_rows.Routed(solver, "fused")
        found = fused_rows.per_round(task, peer, 3, (10, 400))
        assert found["going"] == 1.0
        assert found["median"] > 0


def test_a_round_that_samples_leave_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rows, "RESTLESS", 0.1)
    task = fused_rows.problems(fused_rows.TINY, torch.device("cpu"))[1]
    with pytest.raises(RuntimeError, match=r"100\.0% of the samples stop before round 400"):
        fused_rows.per_round(task, fused_rows.Routed(fpi.Picard(), "fused"), 3, (10, 400))


def test_products_are_counted() -> None:
    assert fused_rows.flops_per_step(fpi.cells.Dense(3, 5)) == 50
    assert fused_rows.flops_per_step(fpi.cells.MLP(3, 5, 7)) == 140
    energy = fpi.cells.MLPEnergy(3, 5, 7)
    assert fused_rows.flops_per_step(fpi.cells.GradientDescent(energy, 0.1)) == 140
