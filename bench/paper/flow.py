"""Optical flow: FlowNetS with and without a small fixed-point layer at its end.

    python -m bench.paper.flow --data DIR --device cuda      # full size
    python -m bench.paper.flow --data DIR --size small       # a CPU, a narrow network
    python -m bench.paper.flow --data DIR --smoke

Pairs are generated over denoise/train400, or read from flow/FlyingChairs_release/data where the
real data set is there. The example pairs in flow/chairs_examples are tested on either way.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.paper import flow_report
from bench.paper.account import Account, last_solution
from bench.paper.experiment import Run, main
from bench.paper.fit import clock, fit, once
from bench.paper.flow_files import Pair, find_pairs, read_pair
from bench.paper.flow_models import (
    MULTIPLE,
    FlowNetS,
    FlowNetSFPI,
    endpoint_errors,
    full_size,
    loss_of,
)
from bench.paper.flow_pairs import make_pairs
from bench.paper.images import read_folder
from bench.paper.statistics import difference, interval

PLAIN, WITH_FPI = "FlowNetS", "FlowNetS + FPI"
CHAIRS = Path("flow", "FlyingChairs_release", "data")
EXAMPLES = Path("flow", "chairs_examples")
TEST_SEED = 12345
EVERY = 36
"""One pair of this many of Flying Chairs is for the test."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the experiment.

    Attributes:
        widths: shares of FlowNetS's channels; each is an experiment of its own.
        size: of the training pairs, in pixels.
        batches: steps per epoch.
        test_pairs: generated ones, or of Flying Chairs.
        channels, norm: of the fixed-point layer.
    """

    widths: tuple[float, ...] = (1.0, 0.125)
    seeds: int = 3
    size: int = 256
    batch: int = 8
    batches: int = 500
    epochs: int = 40
    test_pairs: int = 256
    learning_rate: float = 1e-4
    channels: int = 32
    norm: float = 0.95


SIZES = {
    "full": Config(),
    "small": Config(
        widths=(0.125,), size=64, batches=40, epochs=8, test_pairs=64, learning_rate=1e-3,
        channels=16,
    ),
    "smoke": Config(
        widths=(0.125,), size=64, batch=4, batches=4, epochs=2, test_pairs=8, learning_rate=1e-3,
        channels=8,
    ),
}  # fmt: skip


class Source:
    """Where pairs come from: the generator, or Flying Chairs.

    Attributes:
        test: the pairs to test on, fixed.
        name: "generated" or "Flying Chairs".
    """

    def __init__(self, run: Run, config: Config) -> None:
        self.config = config
        self.device = run.device
        self.files = find_pairs(run.data / CHAIRS) if (run.data / CHAIRS).is_dir() else []
        if self.files:
            self.name = "Flying Chairs"
            held_out = self.files[::EVERY][: config.test_pairs]
            self.files = [files for k, files in enumerate(self.files) if k % EVERY]
            self.test = stack([middle(read_pair(files), config.size) for files in held_out])
        else:
            self.name = "generated"
            pictures = torch.stack(read_folder(run.data / "denoise" / "train400"))
            # The test pairs show images that training never does.
            self.images = pictures[: len(pictures) * 4 // 5].to(run.device)
            self.test = make_pairs(
                pictures[len(pictures) * 4 // 5 :],
                config.test_pairs,
                config.size,
                generator=torch.Generator().manual_seed(TEST_SEED),
            )

    def batch(self) -> Pair:
        """Training pairs, by torch's default generator."""
        count, size = self.config.batch, self.config.size
        if not self.files:
            return make_pairs(self.images, count, size)
        chosen = torch.randint(len(self.files), (count,)).tolist()
        pairs = stack([random_crop(read_pair(self.files[k]), size) for k in chosen])
        return Pair(*(part.to(self.device) for part in pairs))


def stack(pairs: list[Pair]) -> Pair:
    """Pairs of one size as a batch."""
    return Pair(*(torch.stack(parts) for parts in zip(*pairs, strict=True)))


def cut(pair: Pair, top: int, left: int, height: int, width: int) -> Pair:
    """A part of both images; the flow is that of its pixels."""
    return Pair(*(part[..., top : top + height, left : left + width] for part in pair))


def middle(pair: Pair, size: int | None = None) -> Pair:
    """size x size from the middle; None: as much as FlowNetS can take."""
    full = pair.first.shape[-2:]
    height, width = (n // MULTIPLE * MULTIPLE if size is None else size for n in full)
    return cut(pair, (full[0] - height) // 2, (full[1] - width) // 2, height, width)


def random_crop(pair: Pair, size: int) -> Pair:
    """size x size from anywhere, by torch's default generator."""
    top, left = (int(torch.randint(n - size + 1, ())) for n in pair.first.shape[-2:])
    return cut(pair, top, left, size, size)


def make(method: str, width: float, config: Config, seed: int) -> nn.Module:
    """A fresh network; both methods start from the same FlowNetS."""
    torch.manual_seed(seed)
    if method == PLAIN:
        return FlowNetS(width)
    model = FlowNetSFPI(width, config.channels, config.norm)
    torch.manual_seed(seed)
    model.base.load_state_dict(FlowNetS(width).state_dict())
    return model


@torch.no_grad()
def errors(model: nn.Module, pairs: Pair, batch: int, account: Account) -> Tensor:
    """(pairs,) endpoint errors in pixels; the solves are counted."""
    device = next(model.parameters()).device
    found = []
    for part in zip(*(tensor.split(batch) for tensor in pairs), strict=True):
        first, second, truth = (tensor.to(device) for tensor in part)
        flow = full_size(model(first, second)[-1], truth.shape[2:])
        account.add(last_solution(model))
        found.append(endpoint_errors(flow, truth).cpu())
    return torch.cat(found)


def train(
    name: str, method: str, width: float, config: Config, run: Run, source: Source, seed: int
) -> dict[str, Any]:
    """Train a network, test it after every epoch.

    Returns:
        history; the endpoint errors of the last epoch, by pair; its state for pictures.
    """
    model = make(method, width, config, seed).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    examples = [middle(read_pair(files)) for files in find_pairs(run.data / EXAMPLES)]

    def epoch(k: int) -> dict[str, float]:
        began = clock(run.device)
        # Halved thrice over the second half, as FlowNet was trained.
        halvings = max(0, int(8 * k / config.epochs) - 3) if config.epochs > 4 else 0
        optimizer.param_groups[0]["lr"] = config.learning_rate * 0.5 ** min(3, halvings)
        account, total = Account(), 0.0
        for _ in range(config.batches):
            first, second, truth = source.batch()
            loss = loss_of(model(first, second), truth)
            solution = last_solution(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            account.add(solution)
            total += float(loss.detach())
        spent = clock(run.device) - began
        return {"loss": total / config.batches, **account.summary(), "seconds": spent}

    def evaluate(k: int) -> dict[str, Any]:
        account = Account()
        result: dict[str, Any] = {"test": errors(model, source.test, config.batch, account)}
        if examples:
            result["examples"] = errors(model, stack(examples), 1, account)
        return result | {"solves": account.summary()}

    history, kept = fit(
        name, model, optimizer, epoch,
        epochs=config.epochs, seed=seed, checkpoints=run.checkpoints, evaluate=evaluate,
    )  # fmt: skip
    for entry, tested in zip(history, kept, strict=True):
        entry["test_aepe"] = float(tested["test"].mean())
        if examples:
            entry["examples_aepe"] = float(tested["examples"].mean())
    return {"history": history, "last": kept[-1], "model": model.state_dict()}


def compare(width: float, run: Run, config: Config, source: Source) -> dict[str, Any]:
    """Both networks at one width, once per seed, with pictures of the first seed's."""
    trained: dict[str, list[dict[str, Any]]] = {}
    for method in (PLAIN, WITH_FPI):
        trained[method] = []
        for seed in range(config.seeds):
            name = f"{method}, width {width:g}, seed {seed}"

            def compute(method: str = method, seed: int = seed, name: str = name) -> Any:
                return train(name, method, width, config, run, source, seed)

            trained[method].append(once(run.checkpoints, name, compute))
    flow_report.show(flows(trained, width, run, config, source), run.picture(f"-width{width:g}"))
    sets = [key for key in ("test", "examples") if key in trained[PLAIN][0]["last"]]
    by_pair = {
        key: {
            method: torch.stack([result["last"][key] for result in results])
            for method, results in trained.items()
        }
        for key in sets
    }
    return {
        "aepe": {
            key: {method: interval(values) for method, values in methods.items()}
            for key, methods in by_pair.items()
        },
        "fpi_minus_plain": {
            key: difference(methods[WITH_FPI], methods[PLAIN]) for key, methods in by_pair.items()
        },
        "no_motion": {
            "test": float(endpoint_errors(0 * source.test.flow, source.test.flow).mean())
        },
        "parameters": {
            method: sum(p.numel() for p in make(method, width, config, 0).parameters())
            for method in trained
        },
        "trainings": {
            method: [
                {"history": result["history"], "solves": result["last"]["solves"]}
                for result in results
            ]
            for method, results in trained.items()
        },
    }


@torch.no_grad()
def flows(
    trained: dict[str, list[dict[str, Any]]], width: float, run: Run, config: Config,
    source: Source,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Two test pairs and one example: the first image, the true flow and each network's."""
    shown = [Pair(*(part[k] for part in source.test)) for k in range(2)]
    files = find_pairs(run.data / EXAMPLES)[:1]
    shown += [middle(read_pair(item)) for item in files]
    models = {}
    for method, results in trained.items():
        models[method] = make(method, width, config, 0).to(run.device).eval()
        models[method].load_state_dict(results[0]["model"])
    rows = []
    for pair in shown:
        row = {"first image": pair.first, "second image": pair.second, "true flow": pair.flow}
        for method, model in models.items():
            first, second = (image[None].to(run.device) for image in (pair.first, pair.second))
            row[method] = full_size(model(first, second)[-1], pair.flow.shape[1:])[0].cpu()
        rows.append(row)
    return rows


def experiment(run: Run, config: Config) -> dict[str, Any]:
    """All of it."""
    source = Source(run, config)
    result = {
        "pairs": source.name,
        "widths": {str(width): compare(width, run, config, source) for width in config.widths},
    }
    flow_report.plot(result, run.picture())
    return result


if __name__ == "__main__":
    main("flow", experiment, flow_report.tell, SIZES)
