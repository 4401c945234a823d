"""The plain torch loop under torch.compile: blocks of steps fused, one stop test per block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bench.peers.base import Entry, Peer
from bench.problems import Problem

Block = Callable[..., tuple[Tensor, Tensor]]

# One block is compiled anew for every problem and batch size, on purpose: torch's limit of 8 would
# leave most of them out.
torch._dynamo.config.recompile_limit = 256
torch._dynamo.config.accumulated_recompile_limit = 1024


class CompiledLoop(Peer):
    """Picard in compiled blocks of `steps_per_test` steps; the stop test stays outside."""

    library = "torch.compile"
    compiles = True

    def __init__(self, name: str, steps_per_test: int) -> None:
        super().__init__(name, steps_per_test=steps_per_test)
        self._blocks: WeakKeyDictionary[Any, tuple[Block, Block]] = WeakKeyDictionary()

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def _blocks_of(self, problem: Problem) -> tuple[Block, Block]:
        if problem.cell not in self._blocks:
            self._blocks[problem.cell] = _compile_blocks(
                problem.cell.step, self.settings["steps_per_test"]
            )
        return self._blocks[problem.cell]

    def _iterate(self, block: Block, x: Tensor, *args: Any, max_steps: int, tol: float) -> Tensor:
        limit = torch.tensor(tol)
        for _ in range(-(-max_steps // self.settings["steps_per_test"])):
            x, done = block(x, *args, limit)
            if bool(done):
                break
        return x

    def solve(self, problem: Problem, tol: float) -> Tensor:
        block, _ = self._blocks_of(problem)
        with torch.no_grad():
            prepared = problem.cell.prepare(problem.z)
            return self._iterate(block, problem.x0, prepared, max_steps=problem.max_steps, tol=tol)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        block, adjoint_block = self._blocks_of(problem)
        z = problem.z.detach().requires_grad_()
        prepared = problem.cell.prepare(z)
        with torch.no_grad():
            held = _detach(prepared)
            cap = problem.max_steps
            x = self._iterate(block, problem.x0, held, max_steps=cap, tol=tol)
            c = self._iterate(adjoint_block, v, x, held, v, max_steps=cap, tol=adjoint_tol)
        image = problem.cell.step(x, prepared)
        return x, list(torch.autograd.grad(image, [z, *problem.parameters], c))

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        block, _ = self._blocks_of(problem)
        blocks = 0

        def counted(*args: Any) -> tuple[Tensor, Tensor]:
            nonlocal blocks
            blocks += 1
            return block(*args)

        with torch.no_grad():
            prepared = problem.cell.prepare(problem.z)
            self._iterate(counted, problem.x0, prepared, max_steps=problem.max_steps, tol=tol)
        steps = blocks * int(self.settings["steps_per_test"])
        return torch.full((problem.batch,), steps, dtype=torch.int32)


def _detach(prepared: Any) -> Any:
    if isinstance(prepared, Tensor):
        return prepared.detach()
    return tuple(part.detach() for part in prepared)


def _compile_blocks(step: Callable[..., Tensor], steps_per_test: int) -> tuple[Block, Block]:
    def met(image: Tensor, x: Tensor, tol: Tensor) -> Tensor:
        return ((image - x).norm(dim=1) <= tol * image.norm(dim=1)).all()

    def block(x: Tensor, prepared: Any, tol: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(steps_per_test - 1):
            x = step(x, prepared)
        image = step(x, prepared)
        return image, met(image, x, tol)

    def adjoint_block(
        c: Tensor, x: Tensor, prepared: Any, v: Tensor, tol: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, pull = torch.func.vjp(lambda state: step(state, prepared), x)
        for _ in range(steps_per_test - 1):
            c = pull(c)[0] + v
        image = pull(c)[0] + v
        return image, met(image, c, tol)

    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    return torch.compile(block, **options), torch.compile(adjoint_block, **options)


def entries() -> list[Entry]:
    return [
        Entry(
            "torch.compile'd loop (best)",
            (CompiledLoop("test every 4", 4), CompiledLoop("test every 8", 8)),
        )
    ]
