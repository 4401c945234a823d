"""Products with a Jacobian, and the check that both directions are those of one matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_layers import Detached
from torch import Tensor

from fpi_cuda.autograd.linearization import Linearization

Map = Callable[[Tensor], Tensor]


def inside(dtype: torch.dtype, g: Map) -> Map:
    """g in another dtype than its state's."""
    return lambda x: g(x.to(dtype)).to(x.dtype)


def linearized(g: Map, x: Tensor) -> Linearization:
    leaf = x.clone().requires_grad_()
    return Linearization(leaf, g(leaf))


def normalized(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[1:], eps=1e-3)


def alike(x: Tensor) -> Tensor:
    """Attention that is about the same from everywhere: a mean of all rows."""
    return torch.softmax(0.1 * (x @ x.T), -1) @ x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g", [normalized, alike], ids=["normalized", "alike"])
@pytest.mark.parametrize("shape", [(6, 1), (3, 2), (4, 8)], ids=str)
def test_rounding_inside_of_g_is_no_missing_derivative(
    g: Map, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """J^T w may be all rounding: the Jacobian of layer_norm over two numbers is about zero."""
    for seed in range(5):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert linearized(inside(dtype, g), x).product(x).isfinite().all()


def test_slopes_whose_squares_vanish_are_no_missing_derivative() -> None:
    x = torch.randn(3, 2)
    product = linearized(lambda x: 1e-30 * x, x).product(x)
    torch.testing.assert_close(product, 1e-30 * x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_a_missing_derivative_is_found_in_every_arithmetic(
    share: float, dtype: torch.dtype
) -> None:
    def g(x: Tensor) -> Tensor:
        return 0.6 * (share * Detached.apply(x) + (1 - share) * x.sin())

    for seed in range(10):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(RuntimeError, match="once_differentiable"):
            linearized(inside(dtype, g), x).product(x)
