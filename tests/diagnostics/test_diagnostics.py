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

from fpi_cuda.diagnostics import (
    contract_,
    jacobian_penalty,
    operator_norm_bound,
    spectral_radius,
)
from fpi_cuda.diagnostics.contraction import SpectralBound


def linear(matrix: Tensor) -> Callable[..., Tensor]:
    """x -> A x, with A (D, D) or one for each sample (B, D, D)."""
    return lambda x: (matrix @ x[..., None])[..., 0]


def with_eigenvalues(values: list[complex], dim: int) -> Tensor:
    """A non-normal real (dim, dim) matrix with these eigenvalues, their conjugates, and zeros."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    at = 0
    for value in values:
        if value.imag:
            block = [[value.real, -value.imag], [value.imag, value.real]]
            matrix[at : at + 2, at : at + 2] = torch.tensor(block)
            at += 2
        else:
            matrix[at, at] = value.real
            at += 1
    mixing = torch.eye(dim, dtype=torch.float64) + 0.3 * torch.randn(dim, dim) / math.sqrt(dim)
    return mixing @ matrix @ torch.linalg.inv(mixing)


SPECTRA: dict[str, list[complex]] = {
    "real": [0.9, 0.5, -0.3],
    "negative": [-1.2, 0.5],
    "opposite": [0.8, -0.8, 0.1],
    "complex": [0.3 + 0.9j, 0.5, -0.2 + 0.1j],
    "rotation": [0.95j],
    "repeated": [0.7, 0.7, 0.7],
}


@pytest.mark.parametrize("num_steps", [6, 40], ids=["arnoldi", "dense"])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_spectral_radius_of_known_spectra(name: str, num_steps: int) -> None:
    matrix = with_eigenvalues(SPECTRA[name], 33)
    x = torch.randn(4, 33, dtype=torch.float64)
    expected = max(abs(value) for value in SPECTRA[name])
    radius = spectral_radius(linear(matrix), x, num_steps=num_steps)
    assert radius.shape == (4,)
    assert not radius.requires_grad
    # Six eigenvalues at most are not zero, so six Arnoldi steps find them all.
    torch.testing.assert_close(radius, torch.full_like(radius, expected), rtol=1e-6, atol=0)


def bidiagonal(dim: int, diagonal: float, above: float) -> Tensor:
    shift = torch.diag(torch.ones(dim - 1, dtype=torch.float64), 1)
    return diagonal * torch.eye(dim, dtype=torch.float64) + above * shift


@pytest.mark.parametrize(("dim", "num_steps"), [(100, 64), (200, 64), (40, 20), (65, 64)])
@pytest.mark.parametrize(("diagonal", "above"), [(0.5, 0.4), (0.5, 1.0), (0.0, 0.9)])
def test_spectral_radius_of_matrices_far_from_normal(
    dim: int, num_steps: int, diagonal: float, above: float
) -> None:
    """Arnoldi alone says 0.9 where 0.5 or 0 is true."""
    step = linear(bidiagonal(dim, diagonal, above))
    x = torch.randn(3, dim, dtype=torch.float64)
    radius, error = spectral_radius(step, x, num_steps=num_steps, with_error=True)
    torch.testing.assert_close(radius, torch.full_like(radius, diagonal))
    assert (error == 0).all()
    for _ in range(20 if dim == 65 else 2):  # other starting vectors
        assert torch.equal(spectral_radius(step, x, num_steps=num_steps), radius)


@pytest.mark.parametrize(
    "matrix",
    [
        bidiagonal(300, 0.5, 0.4),
        bidiagonal(300, 0.0, 0.9),
        bidiagonal(300, 0.9, 0.05),
        torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))[0] * 0.9,
        with_eigenvalues([0.9, 0.5, -0.3], 300),
        torch.randn(300, 300, dtype=torch.float64).triu(),
    ],
    ids=[
        "bidiagonal",
        "nilpotent",
        "nearly diagonal",
        "orthogonal",
        "a few eigenvalues",
        "triangular",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_estimate_of_the_spectral_radius_knows_its_error(
    matrix: Tensor, dtype: torch.dtype
) -> None:
    true = torch.linalg.eigvals(matrix).abs().max()
    x = torch.randn(8, 300, dtype=dtype)
    radius, error = spectral_radius(linear(matrix.to(dtype)), x, with_error=True)
    assert radius.dtype == error.dtype == dtype
    assert ((radius - true).abs() <= error).all()


def test_certain_samples_keep_their_estimate_beside_uncertain_ones() -> None:
    matrices = torch.stack([with_eigenvalues([0.9, 0.5], 100), bidiagonal(100, 0.0, 0.9)])
    x = torch.randn(2, 100, dtype=torch.float64)
    radius, error = spectral_radius(linear(matrices), x, with_error=True)
    torch.testing.assert_close(radius, torch.tensor([0.9, 0.0], dtype=torch.float64))
    assert 0 < error[0] < 1e-6
    assert error[1] == 0


@pytest.mark.parametrize(("size", "entry"), [(256, 0.25), (256, 0.3), (100, 0.25)])
def test_eigenvalues_that_rounding_moves_have_an_error(size: int, entry: float) -> None:
    """Grcar's matrix. Scaled by powers of 0.6 it has the same eigenvalues, and is well behaved."""

    def grcar(ratio: float) -> Tensor:
        places = torch.arange(size)
        above = (places - places[:, None]).clamp(-2, 4).double()
        matrix = torch.where((above >= 0) & (above <= 3), entry, 0.0).double()
        return (matrix - torch.where(above == -1, entry, 0.0)) * ratio**above

    true = torch.linalg.eigvals(grcar(0.6)).abs().max()
    for matrix in (grcar(1.0), grcar(1.0).mT):
        radius, error = spectral_radius(
            lambda x, matrix=matrix: x @ matrix, torch.zeros(1, size).double(), with_error=True
        )
        assert (radius - true).abs() <= error + 0.02 * true
        assert error > 1e-3 * true


def test_spectral_radius_is_not_the_norm() -> None:
    matrix = torch.tensor([[0.0, 4.0], [0.25, 0.0]], dtype=torch.float64)
    nilpotent = torch.tensor([[0.0, 9.0], [0.0, 0.0]], dtype=torch.float64)
    x = torch.randn(2, 2, dtype=torch.float64)
    radius = spectral_radius(linear(torch.stack([matrix, nilpotent])), x)
    torch.testing.assert_close(radius, torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectral_radius_per_sample_of_a_network(dtype: torch.dtype) -> None:
    dim = 100
    weight = (torch.randn(dim, dim) / math.sqrt(dim)).to(dtype)
    x, z = torch.randn(5, dim).to(dtype), (3 * torch.rand(5, 1)).to(dtype)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight.T + z)

    jacobian = torch.func.vmap(torch.func.jacrev(g))(x, z)
    expected = torch.linalg.eigvals(jacobian).abs().amax(1)
    torch.testing.assert_close(spectral_radius(g, x, z, num_steps=dim), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(spectral_radius(g, x, z, num_steps=60), expected, rtol=2e-2, atol=0)


def test_spectral_radius_of_one_bad_sample() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1, 2] = float("nan")
    for num_steps in (2, 4):
        radius = spectral_radius(lambda x: torch.sin(0.5 * x), x, num_steps=num_steps)
        assert torch.isnan(radius).tolist() == [False, True, False]


def test_spectral_radius_of_other_states() -> None:
    def swap(state: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        u, v = state
        return scale * v.flatten(1), scale * u.reshape(v.shape)

    pair = torch.randn(2, 6), torch.randn(2, 3, 2)
    torch.testing.assert_close(spectral_radius(swap, pair, 0.7), torch.full((2,), 0.7))
    image = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(spectral_radius(lambda x: x.mT / 2, image), torch.full((2,), 0.5))
    half = spectral_radius(lambda x: -0.5 * x, torch.randn(2, 70).bfloat16(), num_steps=5)
    # Products are rounded to the 8 bits of bfloat16.
    torch.testing.assert_close(half, torch.full((2,), 0.5), rtol=1e-2, atol=0)
    assert spectral_radius(lambda x: x, torch.zeros(0, 3)).shape == (0,)
    assert spectral_radius(lambda x: x * 1, torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_spectral_radius_without_grad(mode: Callable[[], Any]) -> None:
    layer = nn.Linear(3, 3, bias=False)
    with mode():
        radius = spectral_radius(layer, torch.randn(2, 3))
    expected = torch.linalg.eigvals(layer.weight.detach()).abs().max()
    torch.testing.assert_close(radius, expected.expand(2))


@pytest.mark.parametrize(
    ("g", "x", "num_steps", "message"),
    [
        (lambda x: x.detach() * 2, torch.ones(2, 3), 9, "g does not depend on x"),
        (lambda x: torch.ones(2, 3, requires_grad=True) * 2, torch.ones(2, 3), 9, "not depend"),
        (lambda x: x[:, :2], torch.ones(2, 3), 9, "g must return the shape of x"),
        (lambda x: x, torch.ones(2, 3), 0, "num_steps must be at least 1, got 0"),
    ],
)
def test_spectral_radius_names_bad_input(
    g: Callable[..., Any], x: Tensor, num_steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_radius(g, x, num_steps=num_steps)


def test_penalty_is_exact_where_j_jt_is_diagonal() -> None:
    basis, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    penalty = jacobian_penalty(linear(0.6 * basis), torch.randn(5, 7, dtype=torch.float64))
    torch.testing.assert_close(penalty, torch.tensor(0.36, dtype=torch.float64))


def test_penalty_is_unbiased() -> None:
    matrix = torch.randn(4, 9, 9, dtype=torch.float64)
    x = torch.randn(4, 9, dtype=torch.float64)
    penalty = jacobian_penalty(linear(matrix), x, num_probes=1000)
    # 4,000 draws whose deviation is about a third of their mean: 10 standard errors.
    torch.testing.assert_close(penalty, (matrix**2).sum() / 36, rtol=5e-2, atol=0)


def test_penalty_repeats_with_its_generator() -> None:
    x = torch.randn(4, 9)
    g = linear(torch.randn(9, 9))
    first, second, third = (
        jacobian_penalty(g, x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != third


def test_penalty_gradients() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight: Tensor, x: Tensor, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return jacobian_penalty(
            lambda x, z: torch.tanh(x @ weight + z), x, z, num_probes=2, generator=generator
        )

    assert gradcheck(penalty, (weight, x, z))
    assert gradgradcheck(penalty, (weight, x, z))
    assert penalty(weight, x, z).dim() == 0
    (expected,) = torch.autograd.grad(penalty(weight, x, z), weight)
    torch.testing.assert_close(torch.func.grad(penalty)(weight, x, z), expected)
    with torch.no_grad():
        assert not penalty(weight, x, z).requires_grad


def test_penalty_of_a_tuple_state() -> None:
    state = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5)
    penalty = jacobian_penalty(lambda s, c: (c * s[0], 2 * s[1]), state, 3.0)
    torch.testing.assert_close(penalty, torch.tensor((3 * 9 + 5 * 4) / 8.0))


def test_penalty_names_bad_input() -> None:
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        jacobian_penalty(lambda x: x, torch.ones(2, 3), num_probes=0)
    with pytest.raises(ValueError, match=r"jacobian_penalty: x is empty, got \(0, 3\)"):
        jacobian_penalty(lambda x: x, torch.ones(0, 3))
    with pytest.raises(ValueError, match="does not depend"):
        jacobian_penalty(lambda x: x.detach(), torch.ones(2, 3))


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
