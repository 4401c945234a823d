"""Keep a linear layer's norm below a bound while it trains, so that g stays a contraction."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fpi_cuda.diagnostics.operator_norm import largest_symbol, operator_norm_bound
from fpi_cuda.options import require_real

Module = TypeVar("Module", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def contract_(module: Module, bound: float) -> Module:
    """Parametrize module.weight, in place, so that the layer's operator norm is at most `bound`.

    A weight within the bound is left as it is, a larger one is scaled down; nothing is ever
    scaled up. The norm is that of the map x -> module(x) - bias between 2-norms, for a
    convolution on images of any size. It is bounded from above, never estimated (see
    operator_norm_bound), with a margin for the rounding of the scaled weight: the promise holds,
    at the price of shrinking a little too much (0.5% at most for Linear, about 4% for a Conv2d).

    torch.nn.utils.parametrize.remove_parametrizations(module, "weight") takes it off again and
    leaves the scaled weight. A second call adds a second bound; the smaller one rules. The bound
    of a call can be changed: module.parametrizations.weight[0].bound = 0.5.

    The norm is bounded anew wherever module.weight is read; on the CPU what can be kept is, for
    as long as the entries of the weight are the same.

    Args:
        module: Linear, Conv1d, Conv2d or Conv3d. Padding must be with zeros, or circular with
            stride 1 and no more of it than keeps the size of the image.
        bound: above 0.
    Returns:
        module.
    Raises:
        TypeError: another module, naming the supported ones.
        ValueError: bound is not positive and finite; a padding that can raise the norm; a lazy
            module that has no weight yet.
    """
    require_real("contract_", "bound", bound, 0.0, open_below=True)
    if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
        raise ValueError(
            f"contract_: {type(module).__name__} has no weight yet; call it once before, so that "
            "it gets its shape"
        )
    if isinstance(module, nn.Linear):
        constraint = SpectralBound(bound)
    elif isinstance(module, CONVOLUTIONS):
        require_norm_keeping_padding(module)
        constraint = SpectralBound(bound, module.groups, module.stride, module.dilation)
    else:
        raise TypeError(
            "contract_: module must be Linear, Conv1d, Conv2d or Conv3d, "
            f"got {type(module).__name__}; call it on each such layer inside"
        )
    parametrize.register_parametrization(module, "weight", constraint)
    return module


class Kept(NamedTuple):
    """What is known of a weight.

    Attributes:
        weight: a copy of it.
        setting: the bound, and what else the numbers below depend on; it may be assigned.
        largest: the largest_symbol of it.
        scale: what to multiply it by; None while only derivatives were asked for.
    """

    weight: Tensor
    setting: tuple[object, ...]
    largest: Tensor
    scale: Tensor | None


class SpectralBound(nn.Module):
    """weight -> weight * min(1, bound / norm): the parametrization that contract_ registers.

    Args:
        bound: largest operator norm allowed.
        groups, stride, dilation: of the convolution; empty for Linear.
    """

    def __init__(
        self,
        bound: float,
        groups: int = 1,
        stride: tuple[int, ...] = (),
        dilation: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.bound = bound
        self.groups = groups
        self.stride = stride
        self.dilation = dilation
        self._kept: Kept | None = None

    @property
    def bound(self) -> float:
        """Largest operator norm allowed; it may be assigned."""
        return self._bound

    @bound.setter
    def bound(self, bound: float) -> None:
        require_real("contract_", "bound", bound, 0.0, open_below=True)
        self._bound = float(bound)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, scaled down where its norm may exceed the bound."""
        return weight * self._scale(weight).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Lets module.weight be assigned; what is read back may be smaller."""
        return weight

    def _scale(self, weight: Tensor) -> Tensor:
        if not can_be_kept(weight):
            return self._compute_scale(weight, None)
        kept = self._kept
        setting = (self.bound, self.groups, self.stride, self.dilation)
        if kept is None or kept.setting != setting or not same(kept.weight, weight):
            # What inference mode makes, autograd could not use later.
            with torch.inference_mode(False):
                largest = largest_symbol(weight, self.groups, self.stride, self.dilation)
                kept = Kept(weight.detach().clone(), setting, largest, None)
        if torch.is_grad_enabled():
            self._kept = kept
            return self._compute_scale(weight, kept.largest)
        scale = kept.scale
        if scale is None:
            scale = self._compute_scale(weight, kept.largest)
            kept = kept._replace(scale=scale)
        self._kept = kept
        return scale

    def _compute_scale(self, weight: Tensor, largest: Tensor | None) -> Tensor:
        norm = operator_norm_bound(weight, self.groups, self.stride, self.dilation, largest)
        # Rounding the product moves each entry by half an eps, and so the operator by at most
        # eps / 2 times its Frobenius norm times the root of the number of taps.
        taps = math.prod(weight.shape[2:])
        rank = min(weight.shape[0] // self.groups, weight.shape[1] * math.prod(self.stride))
        margin = 1 + torch.finfo(weight.dtype).eps * (1 + math.sqrt(taps * rank))
        fits = norm <= self.bound
        return torch.where(fits, 1.0, self.bound / (margin * torch.where(fits, 1.0, norm)))

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"bound={self.bound}"


def can_be_kept(weight: Tensor) -> bool:
    """True where comparing the weight with an earlier one costs little and breaks nothing.

    On a device the comparison would wait for it; a graph or a transform needs the computation.
    """
    return (
        weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def same(kept: Tensor, weight: Tensor) -> bool:
    """True if both have the same entries in the same dtype."""
    return kept.dtype == weight.dtype and kept.device == weight.device and torch.equal(kept, weight)


def require_norm_keeping_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Raise where padding repeats pixels: the norm then exceeds that of the kernel."""
    if module.padding_mode == "zeros":
        return
    if module.padding_mode == "circular":
        within = isinstance(module.padding, str) or all(
            2 * pad <= spread * (taps - 1)
            for pad, spread, taps in zip(
                module.padding, module.dilation, module.kernel_size, strict=True
            )
        )
        if within and all(step == 1 for step in module.stride):
            return
    raise ValueError(
        "contract_: padding must be zeros, or circular with stride 1 that keeps the size of the "
        f"image, got padding_mode={module.padding_mode!r}, padding={module.padding}, "
        f"stride={module.stride}: repeated pixels raise the norm. Use padding_mode='zeros'"
    )
