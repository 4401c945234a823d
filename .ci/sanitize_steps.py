"""A little of every kernel on a GPU, small enough for compute-sanitizer; see gpu_check.py."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fpi_cuda as fpi
from fpi_cuda import backends
from fpi_cuda.options import Anderson, Broyden, Picard
from fpi_cuda.precision import FLOORS
from fpi_cuda.solvers.loop import step
from fpi_cuda.solvers.workspace import allocate

DEVICE = torch.device("cuda")
STEPS = 12  # the first Picard phase takes 9
CASES = [
    (Picard(), torch.float64, 33),
    (Anderson(m=3), torch.float32, 33),
    (Anderson(m=3), torch.float32, 700),
    (Anderson(m=3), torch.float32, 20000),
    (Anderson(m=16), torch.bfloat16, 129),
    (Anderson(m=2, history_dtype=torch.bfloat16), torch.float32, 129),
    (Broyden(m=3), torch.float32, 33),
    (Broyden(m=3), torch.float32, 20000),
]


def steps(backend, solver, dtype, dim):
    """Solve three samples: one converges slowly, one is not finite once, one is solved."""
    x = torch.zeros(3, dim, dtype=dtype, device=DEVICE)
    z = torch.linspace(-1, 1, 3 * dim, device=DEVICE).reshape(3, dim).to(dtype)
    z[2] = 0
    work = allocate(x, solver, 0.0)
    for number in range(STEPS):
        gx = 0.9 * torch.tanh(x) + z
        if number == 5:
            gx[1, dim // 2] = float("nan")
        step(backend, solver, work, x, gx, None, 1e-9, 50)


def loops(backend):
    """Whole solves of cells and of their adjoints, by a backend that has a loop for them."""
    # A weight that stays in shared memory, and one that is streamed.
    cells = [
        fpi.cells.Dense(5, 33),
        fpi.cells.MLP(5, 159, 600),
        fpi.cells.GradientDescent(fpi.cells.MLPEnergy(5, 31, 70), 0.2),
    ]
    for cell in cells:
        for dtype in (torch.float32, torch.float64):
            cell = cell.to(DEVICE, dtype)
            z = torch.randn(40, 5, device=DEVICE, dtype=dtype)
            x0 = torch.zeros(40, cell.x_features, device=DEVICE, dtype=dtype)
            for precision, floor in FLOORS.items():
                if dtype == torch.float64 and precision != "ieee":
                    continue
                solution = fpi.fixed_point(
                    cell, x0, z, solver=Anderson(m=3), rtol=max(floor, 1e-4), max_steps=30,
                    backend=backend.name, route="fused", precision=precision,
                )  # fmt: skip
                solution.value.sum().backward()
    return f"{len(cells)} cells in {len(FLOORS)} precisions"


def main():
    for name in ("cuda", "triton"):
        try:
            backend = backends.resolve(name, DEVICE, torch.float32)
        except ValueError as error:
            print(f"{name}: not run, {error}")
            continue
        for solver, dtype, dim in CASES:
            steps(backend, solver, dtype, dim)
        cell = fpi.cells.Dense(5, 7).to(DEVICE)
        z, x0 = torch.randn(3, 5, device=DEVICE), torch.zeros(3, 7, device=DEVICE)
        fpi.fixed_point(cell, x0, z, backend=name).value.sum().backward()
        torch.cuda.synchronize()
        done = loops(backend) if hasattr(backend, "cell_loop_") else "no loop of cells"
        torch.cuda.synchronize()
        print(
            f"{name}: {len(CASES)} solves of {STEPS} steps, a fixed point and its gradient, {done}"
        )


if __name__ == "__main__":
    main()
