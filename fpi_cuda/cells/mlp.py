"""FPI_NN with two layers: the map of the paper's multi-label experiment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpi_cuda.activations import ACTIVATIONS
from fpi_cuda.cells.cell import (
    FRESH_LIPSCHITZ,
    Cell,
    Injection,
    orthogonal_,
    require_activation,
)
from fpi_cuda.cells.lowering import describes, linear_terms, require_compiled
from fpi_cuda.lowered import Layer, Lowered


class MLP(Injection, Cell):
    """g(x, z) = out_act(W act(A x + B z + b) + c).

    Args:
        z_features: size of the last dimension of z.
        x_features: size of the last dimension of x.
        hidden_features: size of the hidden layer.
        activation, out_activation: tanh, relu, sigmoid, gelu, softplus or identity.
        device, dtype: of the parameters.
    Attributes:
        A: Linear without bias, weight (hidden_features, x_features).
        B: Linear with the bias b, weight (hidden_features, z_features).
        W: Linear with the bias c, weight (x_features, hidden_features).
    Raises:
        ValueError: unknown activation, or sizes below 1.
    Source:
        Jeon, Lee, Choi, IEEE Access 2021, the FPI_NN layer.
    """

    _owner = "MLP"
    x_features: int

    def __init__(
        self,
        z_features: int,
        x_features: int,
        hidden_features: int,
        activation: str = "relu",
        out_activation: str = "sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            activation,
            device,
            dtype,
            z_features=z_features,
            x_features=x_features,
            hidden_features=hidden_features,
        )
        self.out_activation = require_activation("MLP", "out_activation", out_activation)
        self.W = nn.Linear(hidden_features, x_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, so that g contracts by one half."""
        lipschitz = (
            ACTIVATIONS[self.activation].lipschitz * ACTIVATIONS[self.out_activation].lipschitz
        )
        gain = (FRESH_LIPSCHITZ / lipschitz) ** 0.5
        self.B.reset_parameters()
        self.W.reset_parameters()
        orthogonal_(self.A.weight, gain)
        orthogonal_(self.W.weight, gain)

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        """out_act(W act(A x + prepared) + c): x (B, x_features) -> (B, x_features)."""
        hidden = ACTIVATIONS[self.activation].value(self._hidden_input(x, prepared))
        return ACTIVATIONS[self.out_activation].value(self.W(hidden)).to(x.dtype)

    def lower(self, prepared: Tensor) -> Lowered:
        """step() for the fused loop."""
        first, _ = linear_terms("MLP", "A", self.A, bias=False)
        second, bias = linear_terms("MLP", "W", self.W, bias=True)
        activation = require_compiled(self.activation)
        out_activation = require_compiled(self.out_activation)
        return Lowered(
            (
                Layer(first, activation, shift=prepared),
                Layer(second, out_activation, bias=bias),
            )
        )

    def extra_repr(self) -> str:
        """What repr shows besides the submodules."""
        return f"activation={self.activation!r}, out_activation={self.out_activation!r}"


describes(MLP.lower, MLP, "step", "_hidden_input")
