"""Upper bounds on the norm of a matrix or a convolution that hold, and can be differentiated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Points of the frequency grid per degree of the symbol, a trigonometric polynomial.
OVERSAMPLING = 16
# How far the bound may lie above the largest singular value on the grid.
TIGHTNESS = 5e-3
# Roundings in a Gram matrix and its powers, for every term of the sums in it.
ROUNDING = 16


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
