"""Bounds on the norm of a linear layer, and how to keep it below one so that g contracts.

The bounds hold, and can be differentiated.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fpi_cuda.options import require_real

Module = TypeVar("Module", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Points of the frequency grid per degree of the symbol, a trigonometric polynomial.
OVERSAMPLING = 16
# How far the bound may lie above the largest singular value on the grid.
TIGHTNESS = 5e-3
# Roundings in a Gram matrix and its powers, for every term of the sums in it.
ROUNDING = 16


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
        # On a device the comparison with an earlier weight would wait for it; a graph or a
        # transform needs the computation.
        if (
            weight.device.type != "cpu"
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
        ):
            return self._compute_scale(weight, None)
        kept = self._kept
        setting = (self.bound, self.groups, self.stride, self.dilation, weight.dtype)
        if kept is None or kept.setting != setting or not torch.equal(kept.weight, weight):
            # What inference mode makes, autograd could not use later.
            with torch.inference_mode(False):
                largest = largest_symbol(weight, self.groups, self.stride, self.dilation)
                kept = Kept(weight.detach().clone(), setting, largest, None)
        self._kept = kept
        if torch.is_grad_enabled():
            return self._compute_scale(weight, kept.largest)
        scale = kept.scale
        if scale is None:
            scale = self._compute_scale(weight, kept.largest)
            self._kept = kept._replace(scale=scale)
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


def require_norm_keeping_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Raise where padding repeats pixels: the norm then exceeds that of the kernel."""
    keeps = module.padding_mode == "zeros" or (
        module.padding_mode == "circular"
        and all(step == 1 for step in module.stride)
        and (
            isinstance(module.padding, str)
            or all(
                2 * pad <= spread * (taps - 1)
                for pad, spread, taps in zip(
                    module.padding, module.dilation, module.kernel_size, strict=True
                )
            )
        )
    )
    if not keeps:
        raise ValueError(
            "contract_: padding must be zeros, or circular with stride 1 that keeps the size of "
            f"the image, got padding_mode={module.padding_mode!r}, padding={module.padding}, "
            f"stride={module.stride}: repeated pixels raise the norm. Use padding_mode='zeros'"
        )


def operator_norm_bound(
    weight: Tensor,
    groups: int = 1,
    stride: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    largest: Tensor | None = None,
) -> Tensor:
    """An upper bound on the norm of x -> weight x, or of the convolution with `weight`.

    For a convolution it holds for images of every size with every zero padding: these only cut
    rows and columns out of the convolution on the whole lattice, whose norm is the supremum over
    frequencies of the norm of its symbol. The bound exceeds the supremum by at most 0.5% for a
    matrix (by nothing that counts where one singular value stands out) and by a further 2% for
    every dimension in which the kernel has more than one tap.

    Args:
        weight: (out, in), or (out, in / groups, *kernel).
        groups, stride, dilation: of the convolution; empty for a matrix.
        largest: what largest_symbol returns for this weight; None looks for it.
    Returns:
        Scalar, float64, differentiable in weight to any order.
    Source:
        Delattre, Barthelemy, Araujo, Allauzen, Efficient Bound of Lipschitz Constant for
        Convolutional Layers by Gram Iteration, ICML 2023. From grid to supremum: Hormander,
        Some inequalities for functions of exponential type, Math. Scand. 3, 1955, by which a
        function of degree n that reaches its maximum M at t is at least M cos(n s) at t + s.
    """
    if largest is None:
        largest = largest_symbol(weight, groups, stride, dilation)
    symbols, scale, excess = symbol_matrices(weight, groups, stride, dilation)
    # Only the largest is differentiated: the powers of all would not fit in memory.
    bound = schatten_bound(symbols.index_select(0, largest))
    return bound[0] * (scale * excess)


@torch.no_grad()
def largest_symbol(
    weight: Tensor, groups: int = 1, stride: tuple[int, ...] = (), dilation: tuple[int, ...] = ()
) -> Tensor:
    """(1,) int64: which symbol has the largest bound; the arguments of operator_norm_bound."""
    symbols, _, _ = symbol_matrices(weight, groups, stride, dilation)
    if symbols.shape[0] == 1:
        return torch.zeros(1, dtype=torch.int64, device=weight.device)
    return schatten_bound(symbols).argmax(0, keepdim=True)


def symbol_matrices(
    weight: Tensor, groups: int, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, Tensor, float]:
    """What the weight does at each frequency of the grid, and what the grid may miss.

    Returns:
        (count, out, in) float64 or complex128 symbols of the weight over `scale`; scale; and a
        factor by which the supremum over all frequencies may exceed the largest on the grid,
        rounding included.
    """
    exact = weight.double()
    peak = exact.detach().abs().amax()
    # Scaled, so that neither squares nor Gram matrices overflow.
    scale = torch.where((peak > 0) & torch.isfinite(peak), peak, 1.0)
    kernel = polyphase((exact / scale).unflatten(0, (groups, -1)), stride, dilation)
    taps = kernel.shape[3:]
    rounding = 1 + ROUNDING * max(kernel.shape[1:3]) * torch.finfo(torch.float64).eps
    if not taps:
        return kernel, scale, rounding
    # The degree is (n - 1) / 2: a shift of the kernel does not change the norm.
    degrees = [(n - 1) / 2 for n in taps]
    points = [max(1, round(OVERSAMPLING * degree)) for degree in degrees]
    # Half of the grid will do: the symbol of a real kernel at -f is the conjugate of that at f.
    symbols = torch.fft.rfftn(kernel, s=points, dim=list(range(3, kernel.dim())))
    symbols = symbols.movedim((1, 2), (-2, -1)).flatten(0, -3)
    missed = (math.cos(math.pi * n / count) for n, count in zip(degrees, points, strict=True))
    return symbols, scale, rounding / math.prod(missed)


def polyphase(kernel: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """The unstrided kernel on an image whose phases are channels, with the same norm.

    Args:
        kernel: (groups, out, in, *taps).
        stride, dilation: one for each dimension of taps.
    Returns:
        (groups, out, in * product of strides, *fewer taps). Where the stride is 1 the dilation
        is left out: it only stretches the frequency axis.
    """
    for dim, (step, spread) in enumerate(zip(stride, dilation, strict=True), start=3):
        if step == 1:
            continue
        taps = (kernel.shape[dim] - 1) * spread + 1
        shape = list(kernel.shape)
        shape[dim] = math.ceil(taps / step) * step
        where = torch.arange(0, taps, spread, device=kernel.device)
        spaced = kernel.new_zeros(shape).index_copy(dim, where, kernel)
        kernel = spaced.unflatten(dim, (-1, step)).movedim(dim + 1, 3).flatten(2, 3)
    return kernel


def schatten_bound(matrices: Tensor) -> Tensor:
    """(count,) upper bounds on the 2-norms of (count, rows, columns): Gram iteration.

    The bound is the Schatten norm of order 2^(k+1): every squaring of the Gram matrix halves its
    distance to the largest singular value.
    """
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mH if rows < columns else matrices.mH @ matrices
    size = min(rows, columns)
    squarings = max(0, math.ceil(math.log2(max(1.0, math.log(size) / TIGHTNESS))) - 2)
    log_bound = matrices.new_zeros(matrices.shape[0], dtype=torch.float64)
    for k in range(squarings + 1):
        square_sum = (gram * gram.conj()).real.sum((-2, -1))
        empty = square_sum == 0
        norm = torch.where(empty, 1.0, square_sum).sqrt()
        log_bound = log_bound + norm.log() * 0.5 ** (k + 1)
        if k == 0:
            zero = empty
        if k < squarings:
            gram = gram / norm[:, None, None]
            gram = gram @ gram
    return torch.where(zero, 0.0, log_bound.exp())
