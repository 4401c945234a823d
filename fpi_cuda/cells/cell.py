"""What a cell is: a map in two parts, of which the loop repeats only the second.

And what the cells of this package are made of: where x meets z, and activations by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpi_cuda.activations import ACTIVATIONS, FUNCTIONS, Activation
from fpi_cuda.options import require_count, require_real


class Cell(nn.Module):
    """A map g(x, *z) whose work on z alone is done once per solve.

    A subclass gives two methods, and `cell(x, *z)` is `cell.step(x, cell.prepare(*z))`:

    - `prepare(*z)` returns whatever of g does not depend on x, as a tensor or a tuple of
      tensors;
    - `step(x, prepared)` returns the next x, in the shape and dtype of x.

    A cell made of one or two weights can offer a third, and the whole solve is then one loop of
    native code:

    - `lower(prepared)` returns step() as a fpi_cuda.lowered.Lowered, or raises NotLowered with
      the reason why it cannot. The two are compared in every solve.

    Hooks, and a forward() that a subclass or the instance redefines, are not passed over: the
    cell is then called whole in every step.

    Attributes:
        rowwise: sample i of the result depends on sample i of x and z alone, and dim 0 of
            whatever `prepare` returns is the batch. Stopped samples can then be left out.
        x_features: size of the last dimension of x, or None where any will do.
    """

    rowwise: bool = True
    x_features: int | None = None
    prepare: Callable[..., Any]
    step: Callable[..., Tensor]

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        """g(x, *z), shaped like x."""
        return self.step(x, self.prepare(*z))


# Weights on x start orthogonal, at the gain that gives a fresh cell this Lipschitz constant: the
# fixed point then exists, is unique, and is found from any x0, before training has shaped g.
FRESH_LIPSCHITZ = 0.5


def orthogonal_(weight: Tensor, gain: float = 1.0) -> None:
    """Fill `weight` with a (semi) orthogonal matrix times gain, in half precision too.

    torch factorises matrices in float32 and float64 only.
    """
    wide = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    nn.init.orthogonal_(wide, gain)
    with torch.no_grad():
        weight.copy_(wide)


def require_features(owner: str, name: str, value: Tensor, features: int) -> None:
    """Raise unless the last dimension of `value` has `features` entries."""
    if value.dim() == 0 or value.shape[-1] != features:
        raise ValueError(
            f"{owner}: {name} must have {features} features in its last dimension, "
            f"got {name}={tuple(value.shape)}"
        )


class Injection(nn.Module):
    """A x + B z + b, in which x and z meet: Dense, MLP and MLPEnergy begin with it.

    Args:
        activation: of the sum.
        device, dtype: of the parameters.
        sizes: z_features and x_features, and hidden_features where the sum has not those of x.
    """

    _owner: ClassVar[str]
    """What errors call it."""
    z_features: int
    x_features: int

    def __init__(
        self,
        activation: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **sizes: int,
    ) -> None:
        super().__init__()
        for name, size in sizes.items():
            require_count(self._owner, name, size, 1)
            setattr(self, name, size)
        self.activation = require_activation(self._owner, "activation", activation)
        outputs = sizes.get("hidden_features", self.x_features)
        self.A = nn.Linear(self.x_features, outputs, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(self.z_features, outputs, device=device, dtype=dtype)

    def prepare(self, z: Tensor) -> Tensor:
        """B z + b: z (B, z_features) -> (B, features of the sum)."""
        require_features(self._owner, "z", z, self.z_features)
        weight = getattr(self.B, "weight", None)
        if isinstance(weight, Tensor) and z.dtype != weight.dtype:
            # Autocast leaves float64 as it is.
            cast = z.is_floating_point() and torch.float64 not in (z.dtype, weight.dtype)
            if not cast or not torch.is_autocast_enabled(z.device.type):
                raise TypeError(
                    f"{self._owner}: z must have the dtype of the weights, {weight.dtype}, "
                    f"got {z.dtype}. Use z.to({weight.dtype})"
                )
        return self.B(z)

    def _hidden_input(self, x: Tensor, prepared: Tensor) -> Tensor:
        owner = self._owner
        require_features(owner, "x", x, self.x_features)
        # Autocast may narrow what is prepared.
        if x.dtype != prepared.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{owner}: x must have the dtype of the weights and z, {prepared.dtype}, "
                f"got {x.dtype}. Use x0.to({prepared.dtype}), or .to({x.dtype}) on the cell and z"
            )
        if x.shape[:-1] != prepared.shape[:-1]:
            raise ValueError(
                f"{owner}: z must have the batch of x, got x={tuple(x.shape)}, "
                f"z=({', '.join(map(str, prepared.shape[:-1]))}, ...); use z.expand"
            )
        return self.A(x) + prepared


def require_activation(owner: str, option: str, name: object) -> str:
    """`name`, if it is one of ACTIVATIONS; else a ValueError that lists them."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{owner}: {option} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return name


def add_activation(name: str, activation: Activation) -> None:
    """Let cells be made with `name`. They take the host loop: no kernel has code for it.

    Args:
        name: an identifier.
        activation: elementwise; its derivative is compared with what autograd finds of its value.
    Raises:
        TypeError: name is no string, activation no Activation of functions.
        ValueError: the name is taken or no identifier, the derivative is that of another function,
            or lipschitz is not positive and finite or smaller than the derivative somewhere.
    """
    if not isinstance(name, str):
        raise TypeError(f"add_activation: name must be a string, got {type(name).__name__}")
    if not name.isidentifier():
        raise ValueError(f"add_activation: name must be an identifier, got {name!r}")
    if not isinstance(activation, Activation):
        raise TypeError(
            f"add_activation: activation must be an Activation(value, derivative, lipschitz), got "
            f"{type(activation).__name__}"
        )
    for part in ("value", "derivative"):
        if not callable(getattr(activation, part)):
            got = type(getattr(activation, part)).__name__
            raise TypeError(f"add_activation: {part} must be a function of a tensor, got {got}")
    require_real("add_activation", "lipschitz", activation.lipschitz, 0.0, open_below=True)
    if name in ACTIVATIONS or name in FUNCTIONS:
        raise ValueError(f"add_activation: name must be a new one, got {name!r}, which is taken")
    require_own_derivative(name, activation)
    ACTIVATIONS[name] = activation


def require_own_derivative(name: str, activation: Activation) -> None:
    """Raise unless activation.derivative is what autograd finds of activation.value.

    Energies take the one, layers the other.
    """
    small = torch.logspace(-8, 2, 300, dtype=torch.float64)
    u = torch.cat([torch.linspace(-8, 8, 300, dtype=torch.float64), small, -small])
    with torch.inference_mode(False), torch.enable_grad():
        leaf = u.clone().requires_grad_()
        value = activation.value(leaf.clone())  # a copy may be written to
        if not isinstance(value, Tensor) or value.shape != u.shape or not value.requires_grad:
            raise ValueError(
                f"add_activation: the value of {name} must be an elementwise function that "
                "autograd can differentiate. Use torch operations on the tensor it is given"
            )
        (expected,) = torch.autograd.grad(value.sum(), leaf)
    given = activation.derivative(u.clone())
    if not isinstance(given, Tensor) or given.shape != u.shape:
        raise ValueError(f"add_activation: the derivative of {name} must be elementwise")
    error = (given - expected).abs()
    off = (error > 1e-6 * (1 + expected.abs())) | ~given.isfinite()
    off &= expected.isfinite()
    if bool(off.any()):
        worst = int(torch.where(off, error.nan_to_num(torch.inf), 0.0).argmax())
        raise ValueError(
            f"add_activation: the derivative of {name} must be that of its value, but at "
            f"{float(u[worst]):g} it is {float(given[worst]):g}, and autograd finds "
            f"{float(expected[worst]):g}"
        )
    steepest = given.abs().nan_to_num(0.0, 0.0).max()
    if bool(steepest > activation.lipschitz * (1 + 1e-6)):
        raise ValueError(
            f"add_activation: lipschitz must bound the derivative of {name}, which is "
            f"{float(steepest):g} somewhere, got {activation.lipschitz}"
        )
