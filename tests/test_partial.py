"""P(s; r): closed forms, what is held fixed, higher orders, transforms, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


# A set of nodes.


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a**2 * b).sum(-1)


FORMS: list[tuple[str, Callable[[Tensor, Tensor], Any]]] = [
    ("tuple", lambda x, y: (x, y)),
    ("list", lambda x, y: [x, y]),
    ("named", Pair),
    ("dict", lambda x, y: {"a": x, "b": y}),
]


@pytest.mark.parametrize("make", [f for _, f in FORMS], ids=[name for name, _ in FORMS])
def test_a_set_of_nodes_each_independent_of_the_others(
    make: Callable[[Tensor, Tensor], Any],
) -> None:
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    y = 3 * x
    s = make(x, y)
    with pytest.raises(TypeError, match="r must be a function of a set of nodes, got a tensor"):
        partial(product(x, y), s)
    found = partial(product, s)
    assert type(found) is type(s)
    da, db = found.values() if isinstance(found, dict) else found
    assert (da.item(), db.item()) == (24.0, 4.0)
    # Through the graph where s resides: d(2 a b) = 2 b + 2 a dy/dx, d(a^2) = 2 a.
    assert torch.autograd.grad(da.sum(), x, retain_graph=True)[0].item() == 24.0
    assert torch.autograd.grad(db.sum(), x, retain_graph=True)[0].item() == 4.0
    # And nothing is left behind in that graph.
    assert torch.autograd.grad(product(x, y).sum(), x)[0].item() == 36.0


def test_the_order_of_a_set_does_not_matter_and_chains_are_cut() -> None:
    x = double(4, 3).requires_grad_()
    y = x.sin()
    z = y.exp() * x
    dz, dx, dy = partial(lambda z, x, y: (x * y * z).sum(-1), (z, x, y))
    torch.testing.assert_close([dz, dx, dy], [x * y, y * z, x * z])


def test_a_node_among_several_outputs_of_one_op() -> None:
    x = double(4, 6).requires_grad_()
    left, right = (2 * x).split(3, 1)
    found = partial(lambda a, b: (a * b).sum(-1), (left, right))
    torch.testing.assert_close(found, (right, left))


def test_what_is_not_in_the_set_is_left_out() -> None:
    asked: list[int] = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            asked.append(1)
            return g

    s, other = double(3).requires_grad_(), double(3).requires_grad_()
    held = Counted.apply(other)
    partial(lambda a, b: (a * b * held).sum(), (s, s.detach()))
    assert not asked
    assert other.grad is None


def test_a_set_may_nest_and_repeat() -> None:
    x, y = double(3), double(3)
    found = partial(lambda a, rest: (a * rest["b"] * rest["c"][0]).sum(), (x, {"b": y, "c": [x]}))
    torch.testing.assert_close(found, (y * x, {"b": x * x, "c": [x * y]}))


def test_gradcheck_of_a_set() -> None:
    def derived(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return partial(lambda a, b: torch.tanh(a * b.sum(-1, keepdim=True)).sum(-1), (a, b))

    a, b = double(2, 3).requires_grad_(), double(2, 3).requires_grad_()
    assert gradcheck(derived, (a, b), check_forward_ad=True)
    assert gradgradcheck(derived, (a, b))


def of_both(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return partial(product, (a, b))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_set_in_every_mode(mode: Callable[[], Any]) -> None:
    x = double(4, 3).requires_grad_()
    with mode():
        da, db = of_both(x, 3 * x)
    torch.testing.assert_close([da, db], [6 * x**2, x**2])
    assert da.requires_grad is db.requires_grad is (mode is torch.enable_grad)


def test_a_set_inside_of_transforms() -> None:
    x = double(4, 3)

    def first(x: Tensor) -> Tensor:
        return of_both(x, 3 * x)[0]  # 2 a b, with the value 6 x^2

    torch.testing.assert_close(torch.func.vmap(first)(x), 6 * x**2)
    torch.testing.assert_close(torch.func.grad(lambda x: first(x).sum())(x), 12 * x)
    torch.testing.assert_close(torch.func.jvp(first, (x,), (torch.ones_like(x),))[1], 12 * x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("what", ["one", "tuple", "dict", "layer"])
def test_compiled_into_one_graph(what: str, mode: Callable[[], Any], backend: str) -> None:
    x = double(4, 3).requires_grad_()
    weight = double(3).requires_grad_()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "one": lambda x: partial(lambda t: (weight * t**3).sum(-1), x),
        "tuple": lambda x: sum(partial(lambda a, b: (weight * a**2 * b).sum(-1), (x, 3 * x))),
        "dict": lambda x: partial(lambda a, b: (weight * a**2 * b).sum(-1), {"a": x, "b": x})["b"],
        "layer": lambda x: x - 0.1 * partial(lambda t: (weight * t**2).sum(-1), x),
    }
    f = functions[what]
    torch._dynamo.reset()
    with mode():
        found = torch.compile(f, fullgraph=True, backend=backend)(x)
        expected = f(x)
    torch.testing.assert_close(found, expected)
    assert found.requires_grad is (mode is torch.enable_grad)
    if found.requires_grad:
        got = torch.autograd.grad(found.sum(), (x, weight))
        torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), (x, weight)))


def test_independence_of_one_node_is_named() -> None:
    x, y = double(3).requires_grad_(), double(3).requires_grad_()
    with pytest.raises(ValueError, match=r"partial: r does not depend on s\[1\]\."):
        partial(lambda a, b: a.sum(), (x, y))
    with pytest.raises(ValueError, match=r"partial: r does not depend on s\['b'\]\."):
        partial(lambda a, b: a.sum(), {"a": x, "b": y})


@pytest.mark.parametrize(
    ("s", "error", "message"),
    [
        ({1: torch.ones(2)}, TypeError, r"the keys of s name arguments of r, got \[1\]"),
        ((), ValueError, "s must hold at least one tensor, got none"),
        ((torch.ones(2), 3.0), TypeError, r"s\[1\] must be a tensor, got float"),
        ({"a": torch.ones(2).int()}, TypeError, r"s\['a'\] must be floating, got torch.int32"),
        ((torch.ones(2), None), TypeError, r"s\[1\] must be a tensor, got NoneType"),
    ],
    ids=["keys", "empty", "number", "integers", "none"],
)
def test_a_bad_entry_is_named(s: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="partial: .*" + message):
        partial(lambda *a, **b: 1.0, s)


def test_a_node_that_is_no_part_of_a_graph_is_named() -> None:
    x = double(3).requires_grad_()
    with pytest.raises(ValueError, match=r"s\[1\] must require grad"):
        partial(x.sum(), (x, double(3)))
