"""FPI_NN with one layer: act(A x + B z + b)."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.activations import ACTIVATIONS
from fpi_cuda.cells.cell import FRESH_LIPSCHITZ, Cell, Injection, orthogonal_
from fpi_cuda.cells.lowering import describes, linear_terms, require_compiled
from fpi_cuda.lowered import Layer, Lowered


class Dense(Injection, Cell):
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

    _owner = "Dense"
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
        super().__init__(activation, device, dtype, z_features=z_features, x_features=x_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, so that g contracts by one half."""
        gain = FRESH_LIPSCHITZ / ACTIVATIONS[self.activation].lipschitz
        orthogonal_(self.A.weight, gain)
        self.B.reset_parameters()

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        """act(A x + prepared): x (B, x_features) -> (B, x_features)."""
        u = self._hidden_input(x, prepared)
        return ACTIVATIONS[self.activation].value(u).to(x.dtype)

    def lower(self, prepared: Tensor) -> Lowered:
        """step() for the fused loop."""
        weight, _ = linear_terms("Dense", "A", self.A, bias=False)
        activation = require_compiled(self.activation)
        return Lowered((Layer(weight, activation, shift=prepared),))

    def extra_repr(self) -> str:
        """What repr shows besides the submodules."""
        return f"activation={self.activation!r}"


describes(Dense.lower, Dense, "step", "_hidden_input")
