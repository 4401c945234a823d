"""A stand-in for CUDA graphs on the CPU: a tape of ops on fixed memory.

As a graph does, it keeps the addresses, shapes and Python numbers of what was captured, and a
replay calls nothing of g. Unlike a graph it holds on to the tensors it read, so that what reads
freed memory there reads old numbers here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fpi_cuda.loops.device.cuda_graphs import Refused


class Tape(TorchDispatchMode):
    """Records ops and undoes what they did to tensors that were there before."""

    def __init__(self, graphs: TapeGraphs) -> None:
        super().__init__()
        self._graphs = graphs
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._save(argument, value)
        out = func(*args, **kwargs)
        self._ops.append((func, args, kwargs, out))
        self._made.update(storages(out) - storages((args, kwargs)))
        self._graphs.captured += 1
        return out

    def _save(self, argument: Any, value: Any) -> None:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor) and not storages(value) & self._made:
            self._saved.append((value, value.clone()))

    def undo(self) -> None:
        for t, before in reversed(self._saved):
            with torch.no_grad():
                t.copy_(before)
        self._saved.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self._ops:
                fresh = storages(out) - storages((args, kwargs))
                if not fresh and not func._schema.is_mutable:
                    continue
                again = func(*args, **kwargs)
                for new, old in zip(tensors(again), tensors(out), strict=True):
                    if storages(old) & fresh:
                        old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def storages(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors(tree)}


class Once:
    """A tape that runs once per replay."""

    def __init__(self, tape: Tape, log: list[str]) -> None:
        self.memory = 0
        self._tape: Tape | None = tape
        self._log = log

    def replay(self) -> None:
        assert self._tape is not None, "replayed after close"
        self._log.append("replay")
        self._tape.replay()

    def close(self) -> None:
        assert self._tape is not None, "closed twice"
        self._log.append("close")
        self._tape = None


class Loop(Once):
    """A tape that runs while any status is 0."""

    def __init__(
        self, tape: Tape, log: list[str], status: Tensor, rounds: Tensor, max_steps: int
    ) -> None:
        super().__init__(tape, log)
        self._status = status
        self._rounds = rounds
        self._max_steps = max_steps

    def replay(self) -> None:
        assert self._tape is not None, "replayed after close"
        self._log.append("loop")
        self._rounds.zero_()
        while bool((self._status == 0).any()) and int(self._rounds) < self._max_steps:
            self._tape.replay()
            self._rounds.add_(1)


class TapeSession:
    def __init__(self, graphs: TapeGraphs) -> None:
        self._graphs = graphs

    def capture(self, body: Callable[[], None]) -> Once:
        return Once(self._captured(body), self._graphs.log)

    def capture_loop(
        self, body: Callable[[], None], status: Tensor, rounds: Tensor, max_steps: int
    ) -> Loop:
        return Loop(self._captured(body), self._graphs.log, status, rounds, max_steps)

    def _captured(self, body: Callable[[], None]) -> Tape:
        self._graphs.log.append("capture")
        tape = Tape(self._graphs)
        self._graphs.open += 1
        try:
            with tape:
                body()
        except Refused:
            raise
        except RuntimeError as error:
            raise Refused(f"g cannot be captured: {error}".split("\n", 1)[0]) from error
        finally:
            self._graphs.open -= 1
            tape.undo()
        return tape


class TapeFence:
    def __init__(self, graphs: TapeGraphs) -> None:
        self._graphs = graphs

    def wait(self) -> None:
        self._graphs.log.append("wait")

    def mark(self) -> None:
        self._graphs.log.append("mark")

    def retire(self, tensors: Iterable[Tensor]) -> None:
        self._graphs.log.append("retire")
        self._graphs.retired += len(list(tensors))


class TapeGraphs:
    """Attributes: log of what was asked for; open captures; captured ops; launches hidden from
    torch, to be counted up by a g that plays a raw kernel; refusal to give."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.open = 0
        self.captured = 0
        self.hidden = 0
        self.retired = 0
        self.refusal: str | None = None
        self._lock = threading.Lock()

    def why_not(self) -> str | None:
        return self.refusal

    @contextlib.contextmanager
    def session(self, device: torch.device) -> Iterator[TapeSession]:
        with self._lock:
            yield TapeSession(self)

    def launches(self) -> int:
        return self.captured + self.hidden

    def fence(self, device: torch.device) -> TapeFence:
        return TapeFence(self)
