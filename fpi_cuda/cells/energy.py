"""A learnable energy f(x, z) whose minimiser is the output of an FPI_GD layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpi_cuda.activations import ACTIVATIONS, DERIVATIVES
from fpi_cuda.cells.cell import Injection, orthogonal_
from fpi_cuda.cells.lowering import describes, linear_terms, require_compiled
from fpi_cuda.evaluation.shortcuts import is_plain_linear
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.options import require_real
from fpi_cuda.partial import partial


class MLPEnergy(Injection):
    """f(x, z) = w . act(A x + B z + b) + quadratic / 2 ||x||^2, one value per sample.

    With quadratic > 0 the energy grows in every direction, for no activation grows faster than
    linearly: a minimiser exists. While w >= 0 and the activation is convex (softplus) it is
    strongly convex, so there is one minimiser and a small enough gradient step contracts. With
    quadratic = 0 the energy may have no minimum, and gradient descent drifts off. The gradient of
    relu jumps, so that gradient descent need not settle.

    Args:
        z_features: size of the last dimension of z.
        x_features: size of the last dimension of x.
        hidden_features: size of the hidden layer.
        activation: tanh, relu, sigmoid, gelu, softplus or identity.
        quadratic: weight of the quadratic term, at least 0.
        device, dtype: of the parameters.
    Attributes:
        A: Linear without bias, weight (hidden_features, x_features).
        B: Linear with the bias b, weight (hidden_features, z_features).
        w: (hidden_features,).
    Raises:
        ValueError: unknown activation, sizes below 1, quadratic below 0 or not finite.
    Source:
        Jeon, Lee, Choi, IEEE Access 2021, the FPI_GD layer.
    """

    _owner = "MLPEnergy"
    rowwise = True

    def __init__(
        self,
        z_features: int,
        x_features: int,
        hidden_features: int,
        activation: str = "softplus",
        quadratic: float = 1.0,
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
        require_real("MLPEnergy", "quadratic", quadratic, 0.0)
        self.quadratic = float(quadratic)
        self.w = nn.Parameter(torch.empty(hidden_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew: ||A|| = 1 and 0 <= w <= quadratic (1 if that is 0).

        A smooth activation has |act''| < 0.8, so the Hessian of a fresh energy lies between 0.2
        and 1.8 times `quadratic`: steps up to 1 / quadratic contract.
        """
        orthogonal_(self.A.weight)
        self.B.reset_parameters()
        nn.init.uniform_(self.w, 0.0, self.quadratic or 1.0)

    def value(self, x: Tensor, prepared: Tensor) -> Tensor:
        """f: x (B, x_features) -> (B,)."""
        hidden = ACTIVATIONS[self.activation].value(self._hidden_input(x, prepared))
        return hidden @ self.w + 0.5 * self.quadratic * (x * x).sum(-1)

    def gradient(self, x: Tensor, prepared: Tensor) -> Tensor:
        """The derivative of f in x: x (B, x_features) -> (B, x_features).

        In closed form, unless something hangs on A that its weight does not say.
        """
        if not is_plain_linear(self.A):
            return partial(lambda at: self.value(at, prepared), x)
        slope = ACTIVATIONS[self.activation].derivative(self._hidden_input(x, prepared))
        return (slope * self.w) @ self.A.weight + self.quadratic * x

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """f(x, z): x (B, x_features), z (B, z_features) -> (B,)."""
        return self.value(x, self.prepare(z))

    def lower_descent(self, prepared: Tensor, step_size: float) -> Lowered:
        """x - step_size * gradient(x, prepared) for the fused loop."""
        weight, _ = linear_terms("MLPEnergy", "A", self.A, bias=False)
        derivative = DERIVATIVES[require_compiled(self.activation)]
        down = (weight * self.w[:, None]).mT * -step_size
        return Lowered(
            (Layer(weight, derivative, shift=prepared), Layer(down)),
            carry=1.0 - step_size * self.quadratic,
        )

    def extra_repr(self) -> str:
        """What repr shows besides the submodules."""
        return f"activation={self.activation!r}, quadratic={self.quadratic}"


METHODS = ("prepare", "value", "gradient", "forward", "_hidden_input")
describes(MLPEnergy.lower_descent, MLPEnergy, *METHODS)
