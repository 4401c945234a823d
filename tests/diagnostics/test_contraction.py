"""Spectral radius, Jacobian penalty and norm bounds, against dense Jacobians and operators."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from fpi_cuda.diagnostics import contract_, operator_norm_bound
from fpi_cuda.diagnostics.contraction import SpectralBound


def linear(matrix: Tensor) -> Callable[..., Tensor]:
    """x -> A x, with A (D, D) or one for each sample (B, D, D)."""
    return lambda x: (matrix @ x[..., None])[..., 0]


def operator(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of x -> layer(x) - bias on samples of `shape`."""
    size = math.prod(shape)
    with torch.no_grad():
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        columns = layer(basis) - layer(torch.zeros_like(basis[:1]))
    return columns.flatten(1).T


def original_of(layer: nn.Module) -> Tensor:
    """The parameter behind a parametrized weight."""
    return layer.get_parameter("parametrizations.weight.original")


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (31, 33), (129, 5)])
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_bound_of_a_matrix(size: tuple[int, int], factor: float) -> None:
    weight = factor * torch.randn(size)
    bound = operator_norm_bound(weight)
    assert bound.dtype == torch.float64
    assert norm(weight) * (1 - 1e-14) <= float(bound) <= 1.005 * norm(weight)


def test_bound_of_degenerate_matrices() -> None:
    basis, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    assert 1 <= float(operator_norm_bound(basis)) <= 1.005
    assert float(operator_norm_bound(torch.zeros(3, 4))) == 0
    assert float(operator_norm_bound(1e300 * torch.ones(2, 2, dtype=torch.float64))) > 2e300 * 0.999
    assert math.isnan(float(operator_norm_bound(torch.full((2, 2), float("nan")))))


# Kernel, options, image: odd and even kernels, every option alone and together.
CONVOLUTIONS: dict[str, tuple[type[nn.Module], Any, dict[str, Any], tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d, 3, {"padding": "same"}, (24,)),
    "conv1d_even": (nn.Conv1d, 4, {"padding": 2}, (24,)),
    "conv1d_stride": (nn.Conv1d, 5, {"padding": 2, "stride": 2}, (25,)),
    "conv2d": (nn.Conv2d, 3, {"padding": 1}, (9, 8)),
    "conv2d_pointwise": (nn.Conv2d, 1, {}, (4, 4)),
    "conv2d_pointwise_stride": (nn.Conv2d, 1, {"stride": 2}, (5, 4)),
    "conv2d_valid": (nn.Conv2d, 3, {}, (9, 8)),
    "conv2d_overpadded": (nn.Conv2d, 2, {"padding": 3}, (5, 5)),
    "conv2d_small_image": (nn.Conv2d, 5, {"padding": 2}, (2, 3)),
    "conv2d_oblong": (nn.Conv2d, (1, 5), {"padding": (0, 2)}, (4, 12)),
    "conv2d_stride": (nn.Conv2d, 3, {"padding": 1, "stride": 2}, (9, 10)),
    "conv2d_dilation": (nn.Conv2d, 3, {"padding": 2, "dilation": 2}, (9, 10)),
    "conv2d_groups": (nn.Conv2d, 3, {"padding": 1, "groups": 2}, (8, 8)),
    "conv2d_depthwise": (nn.Conv2d, 3, {"padding": 1, "groups": 4}, (8, 8)),
    "conv2d_all": (
        nn.Conv2d,
        (3, 2),
        {"padding": (2, 1), "stride": (2, 3), "dilation": (3, 2), "groups": 2},
        (11, 12),
    ),
    "conv2d_circular": (
        nn.Conv2d,
        3,
        {"padding": 1, "padding_mode": "circular"},
        (7, 8),
    ),
    "conv3d": (nn.Conv3d, 2, {"padding": 1}, (4, 4, 4)),
}


def convolution(name: str, out_channels: int = 6) -> tuple[nn.Module, tuple[int, ...]]:
    kind, kernel, options, image = CONVOLUTIONS[name]
    layer: Any = kind
    channels = 4
    out_channels = 8 if options.get("groups") == 4 else out_channels
    return layer(channels, out_channels, kernel, **options).double(), (channels, *image)


@pytest.mark.parametrize("out_channels", [2, 6])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolution_norm_is_within_the_bound(name: str, out_channels: int) -> None:
    layer, shape = convolution(name, out_channels)
    free = norm(operator(layer, shape))
    bound = 0.5 * free
    assert contract_(layer, bound) is layer
    assert norm(operator(layer, shape)) <= bound


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("conv1d", (80,)),
        ("conv1d_even", (80,)),
        ("conv1d_stride", (80,)),
        ("conv2d", (14, 14)),
        ("conv2d_stride", (20, 20)),
        ("conv2d_pointwise_stride", (4, 4)),
        ("conv2d_circular", (16, 16)),
        ("conv2d_groups", (14, 14)),
    ],
)
def test_convolution_bound_is_tight_on_large_images(name: str, image: tuple[int, ...]) -> None:
    layer, shape = convolution(name)
    contract_(layer, 0.1)
    # 2% a dimension for the grid, the rest because the image ends.
    assert norm(operator(layer, (shape[0], *image))) > 0.9 * 0.1


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
def test_the_bound_holds_between_the_points_of_the_grid(taps: int) -> None:
    position = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    layer = nn.Conv1d(1, 1, taps, padding=taps, bias=False).double()
    for frequency in torch.linspace(0, math.pi, 23, dtype=torch.float64):
        weight = torch.cos(frequency * position).reshape(1, 1, taps)
        with torch.no_grad():
            layer.weight.copy_(weight)
        bound = float(operator_norm_bound(weight, 1, (1,), (1,)))
        # 200 pixels resolve the peak of the symbol to better than 0.1%.
        assert norm(operator(layer, (1, 200))) <= bound <= 1.021 * norm(operator(layer, (1, 200)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (33, 129), (129, 31)])
def test_linear_norm_is_within_the_bound(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = nn.Linear(*shape).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(10 / norm(layer.weight))
    contract_(layer, 0.9)
    slack = 0.12 if dtype == torch.bfloat16 else 0.006
    assert 0.9 * (1 - slack) <= norm(layer.weight) <= 0.9


def test_orthogonal_weights_are_bounded_too() -> None:
    layer = nn.Linear(64, 64)
    nn.init.orthogonal_(layer.weight, 3.0)
    contract_(layer, 0.9)
    assert 0.9 * 0.994 <= norm(layer.weight) <= 0.9


@pytest.mark.parametrize("name", ["linear", "conv2d_groups"])
def test_a_weight_within_the_bound_is_untouched(name: str) -> None:
    layer: Any = nn.Linear(5, 4) if name == "linear" else convolution(name)[0]
    before = layer.weight.detach().clone()
    contract_(layer, 2 * float(operator_norm_bound(before)) + 10)
    assert torch.equal(layer.weight, before)
    (gradient,) = torch.autograd.grad(layer.weight.sum(), layer.parametrizations.weight.original)
    assert torch.equal(gradient, torch.ones_like(before))


def test_the_direction_of_a_large_weight_is_kept() -> None:
    layer = nn.Linear(5, 4)
    before = layer.weight.detach().clone()
    contract_(layer, 1e-2)
    ratio = layer.weight.detach() / before
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 4), {}), ((4, 2, 3), {"groups": 2, "stride": (1,), "dilation": (1,)})],
    ids=["linear", "conv1d"],
)
def test_parametrization_gradients(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    constraint = SpectralBound(0.5, **options)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert float(operator_norm_bound(weight.detach(), **options)) > 0.5
    assert gradcheck(constraint, (weight,))
    assert gradgradcheck(constraint, (weight,))


def test_the_bound_holds_through_training() -> None:
    layer = contract_(nn.Linear(12, 12, bias=False), 0.7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(20, 12)
    for _ in range(20):
        optimizer.zero_grad()
        # Wants a weight of norm 3.
        ((layer(x) - 3 * x) ** 2).mean().backward()
        optimizer.step()
        assert norm(layer.weight) <= 0.7
        with torch.no_grad():
            assert norm(layer.weight) <= 0.7
    assert norm(layer.weight) > 0.69


def test_what_is_kept_follows_the_weight() -> None:
    layer = contract_(nn.Linear(6, 6), 0.5)
    original = original_of(layer)
    with torch.no_grad():
        first = layer.weight.clone()
        # Past the version counter, as some code writes weights.
        original.data.copy_(torch.randn(6, 6) * 5)
        second = layer.weight.clone()
        original.data[0, 0] += 30
        third = layer.weight.clone()
    for weight in (first, second, third):
        assert norm(weight) <= 0.5
    assert not torch.equal(first, second)
    torch.testing.assert_close(layer.weight.detach(), third)
    layer.double()
    with torch.no_grad():
        torch.testing.assert_close(layer.weight.float(), third)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(2, 3, 3)])
def test_a_bound_that_is_changed_rules_at_once(
    make: Callable[[], nn.Module], mode: Callable[[], Any]
) -> None:
    layer = contract_(make(), 0.1)
    for bound in (0.1, 0.05, 0.1):
        layer.parametrizations.weight[0].bound = bound
        fresh = contract_(make(), bound)
        fresh.parametrizations.weight.original.data = layer.parametrizations.weight.original.data
        with mode():
            for _ in range(2):
                torch.testing.assert_close(layer.weight, fresh.weight)


def test_grad_after_inference_mode() -> None:
    layer = contract_(nn.Conv1d(3, 3, 3, padding=1), 0.1)
    with torch.inference_mode():
        kept = layer.weight.clone()
    torch.testing.assert_close(layer.weight, kept)
    (gradient,) = torch.autograd.grad(layer(torch.ones(2, 3, 5)).sum(), original_of(layer))
    assert bool(torch.isfinite(gradient).all())


def test_copies_and_checkpoints() -> None:
    layer = contract_(nn.Linear(6, 6), 0.5)
    x = torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    fresh = contract_(nn.Linear(6, 6), 0.5)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh(x), layer(x), rtol=0, atol=0)
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}
    expected = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, expected)


def test_assignment_and_a_second_bound() -> None:
    layer = contract_(nn.Linear(6, 6), 0.5)
    layer.weight = 0.01 * torch.eye(6)
    assert torch.equal(layer.weight, 0.01 * torch.eye(6))
    layer.weight = torch.eye(6)
    contract_(layer, 0.3)
    assert norm(layer.weight) <= 0.3
    contract_(layer, 0.9)
    assert 0.29 <= norm(layer.weight) <= 0.3


def test_an_ensemble_by_vmap() -> None:
    layer = contract_(nn.Linear(4, 4), 0.5)
    originals = 5 * torch.randn(3, 4, 4)
    name = "parametrizations.weight.original"

    def call(original: Tensor, x: Tensor) -> Any:
        return torch.func.functional_call(layer, {name: original}, (x,))

    x = torch.randn(2, 4)
    together = torch.func.vmap(call, in_dims=(0, None))(originals, x)
    for i in range(3):
        torch.testing.assert_close(together[i], call(originals[i], x))


@pytest.mark.parametrize(
    ("make", "bound", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), 1.0, TypeError, "got Sequential; call it on each"),
        (lambda: nn.ConvTranspose2d(2, 2, 3), 1.0, TypeError, "Linear, Conv1d, Conv2d or Conv3d"),
        (lambda: torch.eye(3), 1.0, TypeError, "got Tensor"),
        (lambda: nn.Linear(2, 2), 0.0, ValueError, r"bound must be in \(0.0, inf\), got 0.0"),
        (lambda: nn.Linear(2, 2), "1", TypeError, "bound must be a number, got '1'"),
        (
            lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            1.0,
            ValueError,
            "padding_mode='reflect'",
        ),
        (
            lambda: nn.Conv2d(2, 2, 3, padding=2, padding_mode="circular"),
            1.0,
            ValueError,
            "repeated pixels raise the norm",
        ),
        (
            lambda: nn.Conv2d(2, 2, 3, padding=1, stride=2, padding_mode="circular"),
            1.0,
            ValueError,
            "circular with stride 1",
        ),
        (lambda: nn.LazyLinear(3), 0.5, ValueError, "LazyLinear has no weight yet; call it once"),
    ],
)
def test_contract_names_bad_input(
    make: Callable[[], Any], bound: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="contract_: .*" + message):
        contract_(make(), bound)


@pytest.mark.parametrize(
    ("mode", "padding", "image"), [("replicate", 1, 3), ("reflect", 2, 3), ("circular", 2, 3)]
)
def test_the_paddings_refused_do_raise_the_norm(mode: Any, padding: int, image: int) -> None:
    layer = nn.Conv1d(1, 1, 3, padding=padding, padding_mode=mode, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0.0, 0.0]]]))
        assert float(operator_norm_bound(layer.weight, 1, (1,), (1,))) == pytest.approx(1, rel=0.03)
    # A shift, which keeps every norm, but that some pixels are there twice.
    assert norm(operator(layer, (1, image))) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("bound", [-1.0, 0.0, float("nan"), "x"])
def test_a_bound_that_is_assigned_is_checked(bound: Any) -> None:
    layer: Any = contract_(nn.Linear(3, 3), 0.5)
    with pytest.raises((TypeError, ValueError), match="contract_: bound must be"):
        layer.parametrizations.weight[0].bound = bound
    assert torch.linalg.matrix_norm(layer.weight, 2) <= 0.5
