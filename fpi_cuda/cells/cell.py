"""What a cell is: a map in two parts, of which the loop repeats only the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fpi_cuda.cells.activation import require_activation
from fpi_cuda.options import require_count


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
