"""The denoising experiment: images, networks, penalty, and its smoke form on made-up images."""
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

for name in ("matplotlib", "numpy", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

from PIL import Image

from bench.paper import denoise, denoise_report
from bench.paper.checkpoints import Unfinished
from bench.paper.denoise_models import (
    ConvolutionalMap,
    FeedforwardDenoiser,
    FixedPointDenoiser,
    PersistentPenalty,
)
from bench.paper.experiment import main
from bench.paper.images import noisy, psnr, random_crops, read_folder


def write_images(folder: Path, count: int, size: int) -> None:
    """Smooth random images, as PNG."""
    folder.mkdir(parents=True)
    for k in range(count):
        coarse = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(k))
        fine = nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0, 0]
        Image.fromarray((255 * fine).byte().numpy()).save(folder / f"{k:03}.png")


def test_smoke_form_runs_on_made_up_images(tmp_path: Path) -> None:
    for folder, count in (("train400", 4), *((name, 3) for name in denoise.TEST_SETS)):
        write_images(tmp_path / "denoise" / folder, count, 64)
    config = dataclasses.replace(denoise.SIZES["smoke"], test_crop=40, batches=12)
    arguments = ["--data", str(tmp_path), "--smoke", "--out", str(tmp_path / "out")]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    result = main(
        "denoise",
        denoise.experiment,
        denoise_report.tell,
        {"full": config, "smoke": config},
        arguments,
    )
    written = tmp_path / "out" / "paper-denoise-smoke.json"
    assert result == json.loads(written.read_text())
    for picture in ("paper-denoise-smoke.png", "paper-denoise-smoke-sigma25.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
    level = result["levels"]["25"]
    trained = level["trainings"][0]
    steps, equal_time = (trained[method]["history"] for method in (denoise.STEPS, denoise.TIME))
    assert len(steps) == config.epochs < len(equal_time)
    assert level["psnr"]["set12"][denoise.TIME]["mean"] > level["before"]["set12"] + 1
    for folder in denoise.TEST_SETS:
        ours = level["psnr"][folder][denoise.FPI]["mean"]
        theirs = level["psnr"][folder][denoise.STEPS]["mean"]
        assert level["gaps"][folder][denoise.STEPS]["mean"] == pytest.approx(
            ours - theirs, abs=1e-5
        )  # written with 7 digits
        # sigma = 25 is 20.17 dB, give or take the few pixels; clipping takes some noise away.
        assert 19.5 < level["before"][folder] < 22
        assert trained[denoise.FPI]["sets"][folder]["solves"]["solved"] == 1
        assert f"| 25 | {folder} | {denoise.FPI} |" in result["readme"]


def test_a_run_that_was_cut_off_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("train400", *denoise.TEST_SETS):
        write_images(tmp_path / "denoise" / folder, 2, 48)
    config = dataclasses.replace(
        denoise.SIZES["smoke"], sigmas=(25, 15, 20), epochs=1, batches=1, test_images=1
    )
    given = ["--data", str(tmp_path), "--out", str(tmp_path)]
    given += ["--checkpoints", str(tmp_path / "checkpoints")]

    def run(*more: str) -> dict:
        sizes = {"full": config, "smoke": config}
        return main("denoise", denoise.experiment, denoise_report.tell, sizes, [*given, *more])

    with pytest.raises(Unfinished, match="no noise level is finished"):
        run("--finished")
    train = denoise.train

    def cut_off(name: str, *args: object, **options: object) -> object:
        if "sigma 20" in name:
            raise KeyboardInterrupt
        return train(name, *args, **options)

    monkeypatch.setattr(denoise, "train", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    result = run("--finished")
    assert list(result["levels"]) == ["15", "25"]
    assert result["unfinished"] == [20]
    assert "**Not run to its end**, for want of time: sigma 20." in result["readme"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_psnr_of_a_known_error() -> None:
    reference = torch.full((8, 8), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20, abs=1e-4)
    assert psnr(reference + 7.0, reference) == pytest.approx(20 * 0.30103, abs=1e-3)


def test_noise_is_that_of_its_seed() -> None:
    image = torch.zeros(200, 200)
    z = noisy(image, 25, seed=3)
    assert torch.equal(z, noisy(image, 25, seed=3))
    assert not torch.equal(z, noisy(image, 25, seed=4))
    assert float(z.std()) == pytest.approx(25 / 255, rel=0.02)


def test_crops_are_parts_of_the_images() -> None:
    image = torch.arange(100.0).reshape(10, 10)
    crops = random_crops([image], 20, 4)
    assert crops.shape == (20, 1, 4, 4)
    for crop in crops[:, 0]:
        inside = crop.sort(1).values.flatten().sort().values
        top = int(inside[0])
        expected = image.flatten()[top:].new_tensor(
            [top + 10 * row + column for row in range(4) for column in range(4)]
        )
        assert torch.equal(inside, expected)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 10


def test_small_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need 11 pixels, got \(10, 10\)"):
        random_crops([torch.zeros(10, 10)], 1, 11)


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.png in"):
        read_folder(tmp_path)


def shaken(module: nn.Module) -> nn.Module:
    """With parameters far from where they started."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def test_bounded_map_keeps_its_lipschitz_constant() -> None:
    cell = shaken(ConvolutionalMap(4, 2, norm=0.9))
    z = torch.randn(8, 1, 9, 9)
    x, y = torch.randn(2, 8, 4, 9, 9)
    with torch.no_grad():
        growth = (cell(x, z) - cell(y, z)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert 0 < float(growth.max()) <= 0.9**3


def test_denoiser_is_at_the_fixed_point_of_g() -> None:
    model = FixedPointDenoiser(4, 1, norm=0.9, rtol=1e-4, max_steps=100)
    z = torch.rand(3, 1, 12, 10)
    with torch.no_grad():
        x = model.layer(z)
        gx = model.layer.g(x, z)
        residual = (gx - x).flatten(1).norm(dim=1) / gx.flatten(1).norm(dim=1)
        torch.testing.assert_close(model(z), z + model.D(x))
    assert x.shape == (3, 4, 12, 10)
    assert float(residual.max()) < 2e-4


def test_feedforward_is_g_without_the_state() -> None:
    fixed = FixedPointDenoiser(4, 2, norm=None, rtol=1e-4, max_steps=100)
    plain = FeedforwardDenoiser(4, 2)
    assert not hasattr(plain.cell, "A")
    plain.cell.load_state_dict(fixed.layer.g.state_dict(), strict=False)
    plain.D.load_state_dict(fixed.D.state_dict())
    z = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = z + fixed.D(fixed.layer.g(torch.zeros(2, 4, 8, 8), z))
        torch.testing.assert_close(plain(z), expected)


class Scaling(nn.Module):
    """g(x, z) = s x + z, elementwise."""

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(s)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.s * x + z


def test_penalty_follows_the_strongest_direction() -> None:
    cell = Scaling(torch.tensor([0.3, 1.5, -0.4]))
    penalty = PersistentPenalty((2, 3), target=0.8)
    x, z = torch.randn(2, 2, 3)
    for _ in range(30):
        value = penalty(cell, x, z)
    assert float(value.detach()) == pytest.approx((1.5 - 0.8) ** 2, rel=1e-4)
    (gradient,) = torch.autograd.grad(value, cell.s)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.4, 0.0]), atol=1e-4, rtol=1e-4)
    assert float(PersistentPenalty((2, 3), target=1.6)(cell, x, z).detach()) == 0
