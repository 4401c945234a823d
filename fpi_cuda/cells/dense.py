"""FPI_NN with one layer: act(A x + B z + b)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpi_cuda.activations import ACTIVATIONS
from fpi_cuda.cells.activation import require_activation, require_compiled
from fpi_cuda.cells.cell import (
    FRESH_LIPSCHITZ,
    Cell,
    orthogonal_,
    require_dtype,
    require_features,
    require_same_batch,
)
from fpi_cuda.cells.lowering import describes, without_bias
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.options import require_count


class Dense(Cell):
    """g(x, z) = act(A x + B z + b).

    Args:
        z_features: size of the last dimension of z.
        x_features: size of the last dimension of x.
        activation: tanh, relu, sigmoid, gelu, softplus or identity.
        device, dtype: of the parameters.
    Attributes:
        A: Linear without bias, weight (x_features, x_features).
        B: Linear with the bias b, weight (x_features, z_features).
    Raises:
        ValueError: unknown activation, or sizes below 1.
    """

    x_features: int

    def __init__(
        self,
        z_features: int,
        x_features: int,
        activation: str = "tanh",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_count("Dense", "z_features", z_features, 1)
        require_count("Dense", "x_features", x_features, 1)
        self.z_features = z_features
        self.x_features = x_features
        self.activation = require_activation("Dense", "activation", activation)
        self.A = nn.Linear(x_features, x_features, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(z_features, x_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, so that g contracts by one half."""
        gain = FRESH_LIPSCHITZ / ACTIVATIONS[self.activation].lipschitz
        orthogonal_(self.A.weight, gain)
        self.B.reset_parameters()

    def prepare(self, z: Tensor) -> Tensor:
        """B z + b: z (B, z_features) -> (B, x_features)."""
        require_features("Dense", "z", z, self.z_features)
        require_dtype("Dense", "z", z, self.B)
        return self.B(z)

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        """act(A x + prepared): x (B, x_features) -> (B, x_features)."""
        require_features("Dense", "x", x, self.x_features)
        require_same_batch("Dense", x, prepared)
        return ACTIVATIONS[self.activation].value(self.A(x) + prepared).to(x.dtype)

    def lower(self, prepared: Tensor) -> Lowered:
        """step() for the fused loop."""
        weight = without_bias("Dense", "A", self.A)
        activation = require_compiled(self.activation)
        return Lowered((Layer(weight, activation, shift=prepared),))

    def extra_repr(self) -> str:
        """What repr shows besides the submodules."""
        return f"activation={self.activation!r}"


describes(Dense.lower, Dense, "step")
