"""Image denoising: FPI_NN against a feedforward network of g's structure.

    python -m bench.paper.denoise --data DIR --device cuda      # full size
    python -m bench.paper.denoise --data DIR --size medium      # a CPU core for about an hour
    python -m bench.paper.denoise --data DIR --size small       # a CPU, one noise level
    python -m bench.paper.denoise --data DIR --smoke

Two feedforward networks are trained: for as many steps as FPI_NN, and for as much time.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.paper import denoise_report
from bench.paper.account import Account, last_solution
from bench.paper.checkpoints import Unfinished
from bench.paper.denoise_models import (
    FeedforwardDenoiser,
    FixedPointDenoiser,
    PersistentPenalty,
)
from bench.paper.experiment import Run, main
from bench.paper.fit import clock, fit, once
from bench.paper.images import noisy, psnr, random_crops, read_folder
from bench.paper.statistics import difference, interval

FPI, STEPS, TIME = "FPI_NN", "feedforward, equal steps", "feedforward, equal time"
TEST_SETS = ("set12", "bsd68")
MOST_EPOCHS = 50
"""The equal-time network gets at most this many times FPI_NN's epochs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Attributes:
        sigmas: noise levels, in gray values of 255.
        batches: steps per epoch.
        norm: bound on the norm of each convolution that x goes through.
        target: of the Jacobian penalty.
        test_images: of each test set; None takes all.
        test_crop: size of the middle crop that is tested; None takes whole images.
    """

    sigmas: tuple[int, ...] = (15, 20, 25)
    seeds: int = 1
    channels: int = 64
    depth: int = 2
    patch: int = 48
    batch: int = 64
    batches: int = 200
    epochs: int = 30
    learning_rate: float = 1e-3
    norm: float = 1.1
    target: float = 0.8
    penalty_weight: float = 0.1
    rtol: float = 1e-3
    max_steps: int = 40
    test_images: int | None = None
    test_crop: int | None = None


SIZES = {
    "full": Config(),
    # Rate and norm: the best of four pairs for FPI_NN after 600 steps at sigma 25, on 20 images
    # of train400 that those trainings did not see. The rate was the best of three for the
    # feedforward network, too.
    "medium": Config(
        sigmas=(25, 15, 20), channels=16, depth=1, patch=32, batch=16, batches=100, epochs=12,
        learning_rate=5e-3, norm=2.0,
    ),
    "small": Config(
        sigmas=(25,), channels=16, depth=1, patch=32, batch=16, batches=60, epochs=8,
        learning_rate=2e-3,
    ),
    "smoke": Config(
        sigmas=(25,), channels=8, depth=1, patch=24, batch=8, batches=10, epochs=2,
        learning_rate=5e-3, test_images=2, test_crop=96,
    ),
}  # fmt: skip


def train(
    name: str, model: nn.Module, config: Config, run: Run, images: list[Tensor], sigma: int,
    *, epochs: int, seed: int,
) -> list[dict[str, float]]:  # fmt: skip
    """Train in place on noisy crops; the history counts solves, and seconds of every epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    penalty: PersistentPenalty | None = getattr(model, "penalty", None)

    def epoch(k: int) -> dict[str, float]:
        began = clock(run.device)
        optimizer.param_groups[0]["lr"] = cosine(config.learning_rate, k / epochs)
        account, total, penalties = Account(), 0.0, 0.0
        for _ in range(config.batches):
            clean = random_crops(images, config.batch, config.patch).to(run.device)
            z = clean + sigma / 255 * torch.randn_like(clean)
            error = (model(z) - clean).square().mean()
            solution = last_solution(model)
            loss = error * 1e3
            if penalty is not None and solution is not None:
                excess = penalty(model.layer.g, solution.value, z)
                loss = loss + config.penalty_weight * excess
                penalties += float(excess.detach())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            account.add(solution)
            total += float(error.detach())
        entry = {"psnr": -10 * math.log10(total / config.batches), **account.summary()}
        if penalty is not None:
            entry["penalty"] = penalties / config.batches
        return entry | {"seconds": clock(run.device) - began}

    history, _ = fit(
        name, model, optimizer, epoch, epochs=epochs, seed=seed, checkpoints=run.checkpoints
    )
    return history


def cosine(peak: float, progress: float) -> float:
    """From `peak` at progress 0 to 1% of it at 1."""
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def test(name: str, model: nn.Module, run: Run, config: Config, sigma: int) -> dict[str, Any]:
    """PSNR of every test image before and after, and the account of the solves."""
    sets: dict[str, Any] = {}
    for folder in TEST_SETS:
        account = Account()
        rows = []
        images = test_images(run, config, folder)
        for index, clean in enumerate(tqdm(images, desc=f"{name}: {folder}", unit="image")):
            z = noisy(clean, sigma, index)
            restored = model(z[None, None].to(run.device))[0, 0].cpu()
            account.add(last_solution(model))
            rows.append((psnr(z, clean), psnr(restored, clean)))
        before, after = zip(*rows, strict=True)
        sets[folder] = {"before": before, "after": after, "solves": account.summary()}
    return sets


def test_images(run: Run, config: Config, folder: str) -> list[Tensor]:
    """The images of a test set, cropped to the middle where the config says so."""
    images = read_folder(run.data / "denoise" / folder, config.test_images)
    return [
        image if config.test_crop is None else middle(image, config.test_crop) for image in images
    ]


def middle(image: Tensor, size: int) -> Tensor:
    """(size, size) from the middle."""
    top, left = ((n - size) // 2 for n in image.shape)
    return image[top : top + size, left : left + size]


def compare(run: Run, config: Config, images: list[Tensor], sigma: int, seed: int) -> Any:
    """Train and test the three networks at one noise level.

    Returns:
        By network: history, sets, parameters, and the state for pictures.
    """
    results: dict[str, Any] = {}
    epochs = config.epochs
    for method in (FPI, STEPS, TIME):
        name = f"{method}, sigma {sigma}, seed {seed}"
        if method == TIME:
            spent = {key: seconds(results[key]["history"]) for key in (FPI, STEPS)}
            ratio = spent[FPI] / spent[STEPS]
            epochs = max(1, round(config.epochs * min(ratio, MOST_EPOCHS)))

        def compute(method: str = method, name: str = name, epochs: int = epochs) -> dict[str, Any]:
            model = make(method, config, seed).to(run.device)
            history = train(name, model, config, run, images, sigma, epochs=epochs, seed=seed)
            return {
                "history": history,
                "sets": test(name, model, run, config, sigma),
                "parameters": sum(p.numel() for p in model.parameters()),
                "model": model.state_dict(),
            }

        results[method] = once(run.checkpoints, name, compute)
    return results


def make(method: str, config: Config, seed: int) -> nn.Module:
    """A fresh network; FPI_NN carries its penalty's vectors along."""
    torch.manual_seed(seed)
    if method != FPI:
        return FeedforwardDenoiser(config.channels, config.depth)
    model = FixedPointDenoiser(
        config.channels, config.depth, config.norm, config.rtol, config.max_steps
    )
    shape = (config.batch, config.channels, config.patch, config.patch)
    model.penalty = PersistentPenalty(shape, config.target)
    return model


def seconds(history: list[dict[str, float]]) -> float:
    """Spent in all epochs."""
    return sum(entry["seconds"] for entry in history)


def summarize(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over seeds and images, and the paired gaps of FPI_NN."""
    after = {
        folder: {
            method: torch.tensor([result[method]["sets"][folder]["after"] for result in by_seed])
            for method in by_seed[0]
        }
        for folder in TEST_SETS
    }
    return {
        "psnr": {
            folder: {method: interval(values) for method, values in methods.items()}
            for folder, methods in after.items()
        },
        "gaps": {
            folder: {method: difference(methods[FPI], methods[method]) for method in (STEPS, TIME)}
            for folder, methods in after.items()
        },
        "before": {
            folder: float(torch.tensor(by_seed[0][FPI]["sets"][folder]["before"]).mean())
            for folder in TEST_SETS
        },
        "trainings": [
            {
                method: {key: value for key, value in result.items() if key != "model"}
                for method, result in results.items()
            }
            for results in by_seed
        ],
    }


@torch.no_grad()
def restored(run: Run, config: Config, results: dict[str, Any], sigma: int) -> dict[str, Tensor]:
    """One test image: clean, noisy, and by each network."""
    clean = test_images(run, config, TEST_SETS[0])[-1]
    z = noisy(clean, sigma, 0)
    pictures = {"clean": clean, "noisy": z}
    for method, result in results.items():
        model = make(method, config, 0).to(run.device).eval()
        model.load_state_dict(result["model"])
        pictures[method] = model(z[None, None].to(run.device))[0, 0].cpu()
    return pictures


def experiment(run: Run, config: Config) -> dict[str, Any]:
    """All of it."""
    images = read_folder(run.data / "denoise" / "train400")
    levels: dict[str, Any] = {}
    unfinished: list[int] = []
    for sigma in config.sigmas:
        try:
            by_seed = [compare(run, config, images, sigma, seed) for seed in range(config.seeds)]
        except Unfinished:
            unfinished.append(sigma)
            continue
        levels[str(sigma)] = summarize(by_seed)
        denoise_report.show(restored(run, config, by_seed[0], sigma), run.picture(f"-sigma{sigma}"))
    if not levels:
        raise Unfinished("denoise: no noise level is finished")
    levels = {sigma: levels[sigma] for sigma in sorted(levels, key=int)}
    result = {"levels": levels, "unfinished": unfinished}
    denoise_report.plot(result, run.picture())
    return result


if __name__ == "__main__":
    main("denoise", experiment, denoise_report.tell, SIZES)
