"""The training loop of the three experiments, seeded per epoch: resumed runs are the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench.paper.checkpoints import Checkpoints, Unfinished

Entry = dict[str, float]


def fit(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: Callable[[int], Entry],
    *,
    epochs: int,
    seed: int,
    checkpoints: Checkpoints,
    evaluate: Callable[[int], Any] | None = None,
) -> tuple[list[Entry], list[Any]]:
    """Train for `epochs`, or for what is left of them since the last checkpoint.

    Args:
        name: of this training, unlike any other of the experiment.
        model: trained in place; left in eval mode.
        epoch: k -> the history entry of epoch k, which it has trained. Random numbers from
            torch's default generators depend on the seed and k alone.
        evaluate: k -> tensors and numbers to keep, after epoch k, in eval mode without grad.
    Returns:
        The history, and what `evaluate` returned.
    """
    saved = checkpoints.load(name) or {"history": [], "kept": []}
    history: list[Entry] = saved["history"]
    kept: list[Any] = saved["kept"]
    if history:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    with tqdm(total=epochs, initial=len(history), desc=name, unit="epoch") as bar:
        for k in range(len(history), epochs):
            torch.manual_seed(1_000_003 * seed + k)
            model.train()
            history.append(epoch(k))
            model.eval()
            if evaluate is not None:
                with torch.no_grad():
                    kept.append(evaluate(k))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(name, state | {"history": history, "kept": kept})
            bar.set_postfix({key: f"{value:.4g}" for key, value in history[-1].items()})
            bar.update()
    model.eval()
    return history, kept


def clock(device: torch.device) -> float:
    """Seconds: of the processor on a CPU, where other programs may run, else of the wall."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def once(checkpoints: Checkpoints, name: str, compute: Callable[[], dict[str, Any]]) -> Any:
    """compute(), or what it returned before the run was broken off.

    Its own checkpoint, under the same name, is then of no more use and deleted.

    Raises:
        Unfinished: there is no such result, and the checkpoints are `finished_only`.
    """
    finished = f"{name}, finished"
    result = checkpoints.load(finished)
    if result is None:
        if checkpoints.finished_only:
            raise Unfinished(f"{name} is not finished: run without --finished to train it")
        result = compute()
        checkpoints.save(finished, result)
        checkpoints.delete(name)
    return result
