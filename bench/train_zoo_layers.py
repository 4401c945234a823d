"""Train the layers of the zoo on Bibtex: FPI_NN, bounded and free, and FPI_GD, twice.

    python -m bench.train_zoo_layers --data DIR

Writes the weights, rounded to float16, and the hoisted inputs of eight test rows per layer: all
that a problem of the zoo needs, and nothing of the data set. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from bench.data import BIBTEX_FEATURES, BIBTEX_LABELS, load_bibtex
from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.stepping import Evaluate
from fpi_cuda.options import Anderson, Picard
from fpi_cuda.solution import SolveResult, Status
from fpi_cuda.testing import NUM_SAMPLES
from fpi_cuda.testing.networks import WEIGHTS, fpi_gd, fpi_nn

HIDDEN = 192
ENERGY_HIDDEN = 128
DECAY = 0.1
BATCH = 128
VALIDATION_ROWS = 480
LEARNING_RATE = 3e-3
THRESHOLDS = torch.linspace(0.05, 0.6, 23).tolist()


class Perceptron(nn.Module):
    """FPI_NN. With a bound, A is kept so small that ||V|| ||A|| / 4 <= bound."""

    function = staticmethod(fpi_nn)

    def __init__(self, bound: float | None) -> None:
        super().__init__()
        self.bound = bound
        self.B = nn.Linear(BIBTEX_FEATURES, HIDDEN)
        self.A = nn.Linear(BIBTEX_LABELS, HIDDEN, bias=False)
        self.V = nn.Linear(HIDDEN, BIBTEX_LABELS)
        nn.init.constant_(self.V.bias, -3.0)

    def inject(self, z: Tensor) -> tuple[Tensor, ...]:
        """What the loop needs of z."""
        return (self.B(z),)

    def weights(self) -> dict[str, Tensor]:
        """What else `function` needs."""
        return {"A": self.A.weight, "V": self.V.weight, "c": self.V.bias}

    def logits(self, x: Tensor) -> Tensor:
        """Scores of a fixed point."""
        return torch.logit(x, eps=1e-6)

    @torch.no_grad()
    def restrain(self) -> None:
        """Enforce the bound."""
        if self.bound is not None:
            norms = [torch.linalg.matrix_norm(W.weight, 2) for W in (self.A, self.V)]
            self.A.weight.mul_((4 * self.bound / (norms[0] * norms[1])).clamp(max=1))


class Energy(nn.Module):
    """FPI_GD with a local term from a feature network and a global one of softplus units.

    `signs` are the first values of w, over and over; all positive makes the energy convex.
    """

    function = staticmethod(fpi_gd)

    def __init__(self, signs: tuple[float, ...]) -> None:
        super().__init__()
        self.B = nn.Linear(BIBTEX_FEATURES, HIDDEN)
        self.U = nn.Linear(HIDDEN, ENERGY_HIDDEN)
        self.local = nn.Linear(HIDDEN, BIBTEX_LABELS)
        self.A = nn.Linear(BIBTEX_LABELS, ENERGY_HIDDEN, bias=False)
        self.w = nn.Parameter(torch.tensor(signs).repeat(ENERGY_HIDDEN // len(signs)))
        nn.init.normal_(self.A.weight, 0, 2 * BIBTEX_LABELS**-0.5)
        with torch.no_grad():
            # Units start unsaturated at the logits of rare labels, where the curvature is.
            self.U.bias.copy_(4 * self.A.weight.sum(1))
            self.local.bias.fill_(-4 * DECAY).add_(0.5 * self.w @ self.A.weight)

    def inject(self, z: Tensor) -> tuple[Tensor, ...]:
        """What the loop needs of z."""
        features = torch.relu(self.B(z))
        return self.U(features), self.local(features)

    def weights(self) -> dict[str, Tensor]:
        """What else `function` needs; the step size is 1 over a bound of the curvature."""
        with torch.no_grad():
            norm = torch.linalg.matrix_norm(self.A.weight, 2)
            step_size = 1 / (DECAY + norm**2 * self.w.abs().amax() / 4)
        decay = torch.tensor(DECAY)
        return {"A": self.A.weight, "w": self.w, "decay": decay, "step_size": step_size}

    def logits(self, x: Tensor) -> Tensor:
        """Scores of a fixed point."""
        return x

    def restrain(self) -> None:
        """The energy is free."""


Layer = Perceptron | Energy


def flat_solve(
    evaluate: Evaluate, x0: Tensor, solver: Anderson | Picard, rtol: float, max_steps: int = 300
) -> SolveResult:
    """The library's loop with the best backend."""
    backend = ops.resolve(None, x0.device, x0.dtype)
    return iterate(evaluate, x0, solver, rtol=rtol, atol=0.0, max_steps=max_steps, backend=backend)


def fixed_points(layer: Layer, z: Tensor, rtol: float) -> Tensor:
    """(B, labels) x of g(x, z) = x from zero, without a gradient."""
    with torch.no_grad():
        injection, weights = layer.inject(z), layer.weights()
        x0 = torch.zeros(z.shape[0], BIBTEX_LABELS)
        return flat_solve(
            lambda x, rows: layer.function(x, *injection, **weights), x0, Anderson(m=10), rtol
        ).x


def train_on(layer: Layer, optimizer: torch.optim.Optimizer, z: Tensor, y: Tensor) -> None:
    """One step down the cross-entropy of the fixed points, by the implicit gradient."""
    x = fixed_points(layer, z, 1e-3).requires_grad_()
    gx = layer.function(x, *layer.inject(z), **layer.weights())
    loss = functional.binary_cross_entropy_with_logits(layer.logits(gx), y, reduction="sum")
    (v,) = torch.autograd.grad(loss / y.shape[0], gx, retain_graph=True)

    def transposed(c: Tensor, rows: Tensor | None) -> Tensor:
        with torch.enable_grad():
            return v + torch.autograd.grad(gx, x, c, retain_graph=True)[0]

    adjoint = flat_solve(transposed, torch.zeros_like(v), Anderson(m=10, ridge=0.0), 1e-2)
    solved = (adjoint.status == Status.CONVERGED)[:, None]
    optimizer.zero_grad()
    gx.backward(torch.where(solved, adjoint.x, 0.0))
    nn.utils.clip_grad_norm_(layer.parameters(), 5.0)
    optimizer.step()
    layer.restrain()


def f1(predicted: Tensor, y: Tensor) -> float:
    """F1 per row, averaged."""
    both = (predicted * y).sum(1)
    return float((2 * both / (predicted.sum(1) + y.sum(1)).clamp_min(1)).mean())


def train(layer: Layer, z: Tensor, y: Tensor, epochs: int) -> tuple[Layer, float]:
    """Train in place; return the layer of the best epoch and its threshold on a held-out part."""
    order = torch.randperm(z.shape[0])
    held_out, rest = order[:VALIDATION_ROWS], order[VALIDATION_ROWS:]
    optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
    best, best_layer, best_threshold = -1.0, layer, 0.5
    for _ in tqdm(range(epochs), unit="epoch"):
        for rows in rest[torch.randperm(rest.numel())].split(BATCH):
            train_on(layer, optimizer, functional.dropout(z[rows], 0.5), y[rows])
        p = layer.logits(fixed_points(layer, z[held_out], 1e-4)).sigmoid()
        score, threshold = max((f1((p > t).float(), y[held_out]), t) for t in THRESHOLDS)
        if score > best:
            best, best_layer, best_threshold = score, copy.deepcopy(layer), threshold
    return best_layer, best_threshold


def rounded(layer: Layer) -> Layer:
    """A copy with the parameters rounded to float16."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.half().float())
    return layer


@torch.no_grad()
def arrays(name: str, layer: Layer, z: Tensor) -> dict[str, np.ndarray]:
    """The layer's weights, and the injections of rows from Picard's easiest to its hardest."""
    injection, weights = layer.inject(z), layer.weights()
    x0 = torch.zeros(z.shape[0], BIBTEX_LABELS)
    steps = flat_solve(
        lambda x, rows: layer.function(x, *injection, **weights), x0, Picard(), 1e-5, 5000
    ).num_steps
    quantiles = torch.linspace(0, z.shape[0] - 1, NUM_SAMPLES).round().long()
    chosen = steps.argsort(stable=True)[quantiles]
    stored = weights | {f"z{k}": part[chosen] for k, part in enumerate(injection)}
    return {f"{name}.{key}": value.half().numpy() for key, value in stored.items()}


def normalized(z: Tensor) -> Tensor:
    """Rows of length 3: documents differ in their number of words."""
    return 3 * z / z.norm(dim=1, keepdim=True).clamp_min(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the layers of the zoo on Bibtex.")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds bibtex/")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_bibtex(chosen.data)
    z, z_test = normalized(data.x_train), normalized(data.x_test)
    plan: list[tuple[str, Layer, int]] = [
        ("perceptron", Perceptron(bound=0.95), 12),
        ("perceptron_free", Perceptron(bound=None), 14),
        ("energy", Energy((1.0, -0.5)), 12),
        ("energy_convex", Energy((1.0,)), 9),
    ]
    stored: dict[str, np.ndarray] = {}
    for name, layer, epochs in plan:
        best, threshold = train(layer, z, data.y_train, epochs)
        best = rounded(best)
        p = best.logits(fixed_points(best, z_test, 1e-4)).sigmoid()
        print(f"{name}: F1 on the test rows {f1((p > threshold).float(), data.y_test):.3f}")
        stored |= arrays(name, best, z_test[:512])
    np.savez_compressed(chosen.out, **stored)
    print(f"{chosen.out}: {chosen.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
