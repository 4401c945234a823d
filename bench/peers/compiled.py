"""The hand loop with g compiled: blocks of steps and their stop test, by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bench.peers.base import Entry, Peer
from bench.problems import Problem, norms

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
                problem.written[1], self.settings["steps_per_test"]
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
        return self._forward(problem, tol, self._blocks_of(problem)[0])

    def _forward(self, problem: Problem, tol: float, block: Block) -> Tensor:
        with torch.no_grad():
            held = problem.written[0](problem.z)
            return self._iterate(block, problem.x0, *held, max_steps=problem.max_steps, tol=tol)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        block, adjoint_block = self._blocks_of(problem)
        prepare, step = problem.written
        z = problem.z.detach().requires_grad_()
        prepared = prepare(z)
        with torch.no_grad():
            held = tuple(part.detach() for part in prepared)
            cap = problem.max_steps
            x = self._iterate(block, problem.x0, *held, max_steps=cap, tol=tol)
            c = self._iterate(adjoint_block, v, x, v, *held, max_steps=cap, tol=adjoint_tol)
        return x, list(torch.autograd.grad(step(x, *prepared), [z, *problem.parameters], c))

    def way(self, problem: Problem, tol: float) -> str:
        return f"compiled: {super().way(problem, tol)}"

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        block, _ = self._blocks_of(problem)
        blocks = 0

        def counted(*args: Any) -> tuple[Tensor, Tensor]:
            nonlocal blocks
            blocks += 1
            return block(*args)

        self._forward(problem, tol, counted)
        steps = blocks * int(self.settings["steps_per_test"])
        return torch.full((problem.batch,), steps, dtype=torch.int32)


def _compile_blocks(step: Callable[..., Tensor], steps_per_test: int) -> tuple[Block, Block]:
    def met(image: Tensor, x: Tensor, tol: Tensor) -> Tensor:
        return (norms(image - x) <= tol * norms(image)).all()

    def block(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *prepared, tol = rest
        for _ in range(steps_per_test - 1):
            x = step(x, *prepared)
        image = step(x, *prepared)
        return image, met(image, x, tol)

    def adjoint_block(c: Tensor, x: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *prepared, tol = rest
        _, pull = torch.func.vjp(lambda state: step(state, *prepared), x)
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
            tuple(
                CompiledLoop(f"test every {n}" if n > 1 else "test every step", n)
                for n in (4, 8, 1)
            ),
        )
    ]
