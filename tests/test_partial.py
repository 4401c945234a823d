"""P(s; r): closed forms, what is held fixed, higher orders, transforms, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fpi_cuda.partial import partial


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cubic(s: Tensor) -> Tensor:
    return (s**3).sum(-1)


@pytest.mark.parametrize("form", ["tensor", "function"])
@pytest.mark.parametrize(
    "reduce",
    [lambda r: r.sum(), lambda r: r.sum(-1), lambda r: r.sum(-1, keepdim=True), lambda r: r],
    ids=["scalar", "per_sample", "column", "elementwise"],
)
def test_cubic(reduce: Callable[[Tensor], Tensor], form: str) -> None:
    s = double(4, 3).requires_grad_()
    gradient = partial(reduce(s**3), s) if form == "tensor" else partial(lambda t: reduce(t**3), s)
    torch.testing.assert_close(gradient, 3 * s**2)
    again = partial(gradient, s)
    torch.testing.assert_close(again, 6 * s)
    torch.testing.assert_close(partial(again, s), torch.full_like(s, 6.0))


def test_only_the_path_through_s() -> None:
    u = double(5).requires_grad_()
    s = u.sin()
    r = (s * u).sum()
    torch.testing.assert_close(partial(r, s), u)


def test_a_function_holds_what_it_closes_over_fixed() -> None:
    s = double(5).requires_grad_()
    z = s**2
    strict = partial(lambda t: t * z, s)
    torch.testing.assert_close(strict, s**2)
    # Differentiated again, z counts: the partial is s^2, whose derivative is 2 s.
    torch.testing.assert_close(partial(strict, s), 2 * s)
    torch.testing.assert_close(partial(s * z, s), 3 * s**2)


def test_differentiable_in_parameters() -> None:
    weight = double(3).requires_grad_()
    s = double(4, 3)
    partial(lambda t: (weight * t**2).sum(-1), s).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * s.sum(0))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_under_no_grad_no_graph_is_left(requires_grad: bool) -> None:
    weight = double(3).requires_grad_()
    s = double(4, 3).requires_grad_(requires_grad)
    with torch.no_grad():
        gradient = partial(lambda t: (weight * t**2).sum(-1), s)
        assert not torch.is_grad_enabled()
    assert not gradient.requires_grad
    assert s.requires_grad is requires_grad
    torch.testing.assert_close(gradient, 2 * weight.detach() * s.detach())


def test_the_graph_of_a_tensor_survives() -> None:
    s = double(3).requires_grad_()
    r = (s**3).sum()
    with torch.no_grad():
        gradient = partial(r, s)
    assert not gradient.requires_grad
    r.backward()
    torch.testing.assert_close(s.grad, gradient)


def test_gradcheck() -> None:
    def derived(s: Tensor, w: Tensor) -> Tensor:
        return partial(lambda t: torch.tanh(t @ w).sum(-1), s)

    s, w = double(3, 4).requires_grad_(), double(4, 2).requires_grad_()
    assert gradcheck(derived, (s, w), check_forward_ad=True)
    assert gradgradcheck(derived, (s, w))


def test_transforms() -> None:
    s = double(4, 3)

    def derived(t: Tensor) -> Tensor:
        return partial(cubic, t)

    torch.testing.assert_close(torch.func.vmap(derived)(s), 3 * s**2)
    tangent = torch.func.jvp(derived, (s,), (torch.ones_like(s),))[1]
    torch.testing.assert_close(tangent, 6 * s)
    hessian = torch.func.vmap(torch.func.jacfwd(torch.func.jacrev(cubic)))(s)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(derived))(s), hessian)
    summed = torch.func.grad(lambda t: derived(t).sum())(s)
    torch.testing.assert_close(summed, 6 * s)


def test_inference_mode() -> None:
    weight = double(3).requires_grad_()
    outside = double(4, 3)
    with torch.inference_mode():
        inside = double(4, 3)
        for s in (outside, inside):
            gradient = partial(lambda t: (inside * weight * t**2).sum(-1), s)
            assert not gradient.requires_grad
            torch.testing.assert_close(gradient, 2 * inside * weight * s)


def test_saved_tensor_hooks() -> None:
    s = double(4, 3).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        gradient = partial(cubic, s)
    gradient.sum().backward()
    torch.testing.assert_close(s.grad, 6 * s.detach())


def constant(s: Tensor) -> Tensor:
    return torch.ones(3, requires_grad=True) * 2


def cut(s: Tensor) -> Tensor:
    return s.detach() ** 2


@pytest.mark.parametrize("r", [constant, cut, torch.no_grad()(cubic)], ids=["other", "cut", "off"])
def test_independence_is_an_error(r: Callable[[Tensor], Tensor]) -> None:
    s = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on s"):
        partial(r, s)
    with pytest.raises(ValueError, match="does not depend on s"):
        partial(r(s), s)


@pytest.mark.parametrize(
    ("r", "s", "error", "message"),
    [
        (torch.ones(2), torch.ones(2), ValueError, "s must require grad"),
        (torch.ones(2), 3.0, TypeError, "s must be a tensor, got float"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), TypeError, "floating, got torch.int64"),
        (3.0, torch.ones(2), TypeError, "r must be a tensor or a function of s, got float"),
        (lambda s: 3.0, torch.ones(2), TypeError, r"r\(s\) must be a tensor, got float"),
        (lambda s: s > 0, torch.ones(2), TypeError, r"r\(s\) must be floating, got torch.bool"),
        (
            torch.ones(2, dtype=torch.int64),
            torch.ones(2, requires_grad=True),
            TypeError,
            "r must be floating, got torch.int64",
        ),
    ],
    ids=["no_grad", "s_float", "s_integer", "r_float", "r_returns_float", "r_bool", "r_integer"],
)
def test_bad_input_is_named(r: object, s: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="partial: .*" + message):
        partial(r, s)  # type: ignore[arg-type]
