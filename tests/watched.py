"""A cell that looks around itself in every evaluation, and all that a solve might change."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils import _python_dispatch

import fpi_cuda as fpi

F64 = torch.float64
B, D = 4, 5
TIGHT: dict[str, Any] = {"rtol": 1e-9, "max_steps": 300}


def in_thread(function: Callable[[], Any]) -> Any:
    """function(), on another thread, while this one waits."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Cell(nn.Module):
    """tanh(A x + B z), with dropout if asked, and a look at what goes on around it."""

    def __init__(self, dropout: float = 0.0, look: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(D, D, dtype=F64)
        self.b = nn.Linear(D, D, dtype=F64)
        nn.init.orthogonal_(self.a.weight, 0.5)
        self.dropout = dropout
        self.look = look

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = torch.tanh(F.dropout(self.a(x), self.dropout) + self.b(z))
        if self.look is not None:
            self.look()
        return y


def derivatives(x: Tensor, wanted: list[Tensor], order: int) -> list[Tensor]:
    """Of the sum of squares, and of the sum of squares of those."""
    first = list(torch.autograd.grad(x.square().sum(), wanted, create_graph=order == 2))
    if order == 1:
        return first
    return first + list(torch.autograd.grad(sum(t.square().sum() for t in first), wanted))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "module": Cell,
    "dense": lambda: fpi.cells.Dense(D, D).double(),
    "energy": lambda: fpi.cells.GradientDescent(fpi.cells.MLPEnergy(D, D, 7).double(), 0.1),
    "contract": lambda: contracted(Cell()),
}


def contracted(cell: Cell) -> Cell:
    fpi.contract_(cell.a, 0.5)
    return cell


def surroundings() -> dict[str, Any]:
    """All that a solve might change for a while."""
    return {
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "forward level": forward_ad._current_level,
        "levels": len(_functorch.get_interpreter_stack() or ()),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "a mode somewhere": _python_dispatch.is_in_torch_dispatch_mode(),
        "hooks on saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "threads": torch.get_num_threads(),
        "dtype": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "warnings": list(warnings.filters),
        "weight cache": (parametrize._cache_enabled, dict(parametrize._cache)),
    }
