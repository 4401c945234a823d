"""What the full forms would cost: measured on tiny ones."""
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

for name in ("matplotlib", "numpy", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

import torch
from PIL import Image

from bench.paper import cost, denoise, flow
from bench.paper.retell import retell


def test_hours_follow_from_the_measured_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "denoise" / "train400"
    folder.mkdir(parents=True)
    for k in range(5):
        pixels = torch.randint(256, (96, 96), generator=torch.Generator().manual_seed(k))
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{k}.png")
    denoising = dataclasses.replace(denoise.SIZES["smoke"], sigmas=(15, 25), epochs=3)
    monkeypatch.setitem(denoise.SIZES, "full", denoising)
    monkeypatch.setitem(flow.SIZES, "full", dataclasses.replace(flow.SIZES["smoke"], seeds=4))
    result = cost.main(["--data", str(tmp_path), "--out", str(tmp_path)])
    rows = result["rows"]
    assert [row["trainings"] for row in rows] == [2, 2, 2, 4, 4]
    assert [row["steps"] for row in rows] == [30, 30, 30, 8, 8]
    for row in rows:
        assert row["seconds_per_step"] > 0
        hours = row["seconds_per_step"] * row["steps"] * row["trainings"] / 3600
        assert row["hours"] == pytest.approx(hours)
        assert f"| {row['network']} |" in result["readme"]
    assert json.loads((tmp_path / "paper-cost.json").read_text()) == result


def test_its_words_can_be_told_anew(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "bench" / "results" / "paper-cost.json"
    copy = tmp_path / path.name
    copy.write_text(json.dumps(json.loads(path.read_text()) | {"readme": "old"}))
    retell(copy)
    assert json.loads(copy.read_text()) == json.loads(path.read_text())
