"""bench.fused measures what it says, at a tiny size."""

from __future__ import annotations

import pytest
import torch

import fpi_cuda as fpi
from bench import fused
from bench.peers import load_entries


def test_the_benchmark_of_the_fused_loop() -> None:
    results = fused.run(fused.TINY, torch.device("cpu"), modules=("loop",))
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
        assert not table["left_out"]
        for row in table["rows"].values():
            assert row["gradient_error"] < 1e-2
            assert row["forward"]["median"] > 0
    exits = results["early_exit"]["Picard"]
    assert exits["mean_steps"]["easy"] < exits["mean_steps"]["mixed"] < exits["mean_steps"]["hard"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_are_those_of_peers() -> None:
    entries, skipped = load_entries(fused.PEERS)
    if not skipped:
        assert set(fused.ROWS) <= {entry.label for entry in entries}


def test_products_are_counted() -> None:
    assert fused.flops_per_step(fpi.cells.Dense(3, 5)) == 50
    assert fused.flops_per_step(fpi.cells.MLP(3, 5, 7)) == 140
    energy = fpi.cells.MLPEnergy(3, 5, 7)
    assert fused.flops_per_step(fpi.cells.GradientDescent(energy, 0.1)) == 140
