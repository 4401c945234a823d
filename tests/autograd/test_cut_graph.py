"""Clause 6: a g whose graph does not lead to x is told of; one without a slope is not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_state import ADJOINTS, F64, B, D, orthogonal, zeros
from torch import Tensor, nn

import fpi_cuda as fpi


def by_detach(x: Tensor) -> Tensor:
    return x.detach()


def by_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1.0


def by_data(x: Tensor) -> Tensor:
    return x.data


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() * 1.0)


def by_a_new_tensor(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist(), dtype=x.dtype)


CUTS = [by_detach, by_no_grad, by_data, by_numpy, by_a_new_tensor]


def cut_map(cut: Callable[[Tensor], Tensor], a: Tensor) -> Any:
    """A g that nobody has been warned of: it is told by its code."""
    namespace = {"torch": torch, "cut": cut, "a": a}
    return eval("lambda x, z: torch.tanh(cut(x) @ a + z)", namespace)


WARNING = "graph does not lead to x"
LOSING = [*ADJOINTS[:2], *ADJOINTS[3:], fpi.Unroll()]
"""The adjoints that differentiate g in x."""


@pytest.mark.parametrize("adjoint", LOSING, ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_graph_is_said_with_the_line(cut: Callable[[Tensor], Tensor], adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    g = cut_map(cut, orthogonal(0.5))
    first = cut.__code__.co_firstlineno
    line = rf"{re.escape(__file__)}:({first + 1}|{first + 2}):"
    with pytest.warns(fpi.FixedPointWarning, match=WARNING) as seen:
        fpi.fixed_point(g, zeros(), z, adjoint=adjoint, rtol=1e-8)
    assert len(seen) == 1
    assert re.search(line, str(seen[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fpi.fixed_point(g, zeros(), z, adjoint=adjoint, rtol=1e-8)  # once is enough


def run_transformed(way: str, call: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """A derivative of call(z) by one of the ways that are not plain backward."""
    grad = torch.func.grad(lambda z: call(z).sum())
    if way == "grad":
        grad(z)
    elif way == "grad of grad":
        torch.func.grad(lambda z: grad(z).square().sum())(z)
    elif way == "jvp":
        torch.func.jvp(call, (z,), (z,))
    elif way == "vmap":
        torch.func.vmap(grad)(torch.stack([z, 2 * z]))
    else:
        with torch.autograd.forward_ad.dual_level():
            call(torch.autograd.forward_ad.make_dual(z, z))


WAYS = [
    (way, adjoint)
    for way in ("grad", "grad of grad", "jvp", "vmap", "forward_ad")
    for adjoint in LOSING
    if way != "vmap" or not isinstance(adjoint, fpi.Unroll)  # refused
]


def parts(cut: int, a: Tensor) -> Any:
    """A g of two tensors, whose part `cut` is off the graph; -1: neither."""

    def g(s: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        s = tuple(t.detach() if i == cut else t for i, t in enumerate(s))  # type: ignore
        return torch.tanh(s[1] @ a + z), torch.tanh(0.5 * s[0] @ a + 0.1 * z)

    return eval_copy(g)


@pytest.mark.parametrize("state", ["tensor", "first part", "second part"])
@pytest.mark.parametrize(("way", "adjoint"), WAYS, ids=str)
def test_a_cut_graph_in_transforms(way: str, state: str, adjoint: Any) -> None:
    z, a = torch.randn(B, D, dtype=F64), orthogonal(0.5)
    g = cut_map(by_detach, a) if state == "tensor" else parts(state == "second part", a)
    x0: Any = zeros() if state == "tensor" else (zeros(), zeros())

    def call(z: Tensor) -> Tensor:
        value = fpi.fixed_point(g, x0, z, adjoint=adjoint, rtol=1e-8).value
        return value if state == "tensor" else value[0]

    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        run_transformed(way, call, z)


@pytest.mark.parametrize(("way", "adjoint"), WAYS, ids=str)
def test_a_whole_graph_in_transforms(way: str, adjoint: Any) -> None:
    z, g = torch.randn(B, D, dtype=F64), parts(-1, orthogonal(0.5))

    def call(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, (zeros(), zeros()), z, adjoint=adjoint, rtol=1e-8).value[0]

    run_transformed(way, call, z)


@pytest.mark.parametrize("adjoint", LOSING, ids=str)
@pytest.mark.parametrize("part", [0, 1])
def test_one_part_of_a_tuple_is_cut(part: int, adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    g = parts(part, orthogonal(0.5))
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        fpi.fixed_point(g, (zeros(), zeros()), z, adjoint=adjoint, rtol=1e-8)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_cut_beside_what_is_large(size: float, dtype: torch.dtype) -> None:
    """In another row, or in another part of the state."""
    a = orthogonal(0.5, dtype)
    z = torch.randn(B, D, dtype=dtype)
    z[0] *= size
    z.requires_grad_()
    x0 = torch.zeros_like(z)

    def rows(x: Tensor, z: Tensor) -> Tensor:
        return z + 0.9 * torch.tanh(x.detach() @ a)

    def second(s: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        first, cut = s
        return 0.3 * first + size * torch.tanh(z), torch.tanh(cut.detach() @ a + first / size)

    for g, start in ((rows, x0), (second, (x0, x0))):
        with pytest.warns(fpi.FixedPointWarning, match=WARNING):
            fpi.fixed_point(eval_copy(g), start, z, rtol=1e-5)


@pytest.mark.parametrize("slope", [0.1, 1e-3])
def test_a_cut_with_a_small_slope(slope: float) -> None:
    a, z = orthogonal(1.0), torch.randn(B, D, dtype=F64, requires_grad=True)
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        fpi.fixed_point(
            eval_copy(lambda x, z: z + slope * torch.tanh(x.detach() @ a)), zeros(), z, rtol=1e-8
        )


def eval_copy(g: Any) -> Any:
    """g with a code object of its own."""
    return type(g)(
        g.__code__.replace(co_name=g.__name__ + "_copy"),
        g.__globals__,
        None,
        g.__defaults__,
        g.__closure__,
    )


WITHOUT_SLOPE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda x, z: torch.tanh(z),
    "shape": lambda x, z: 0.1 * x.shape[0] * z,
    "sign": lambda x, z: 0.3 * torch.sign(x) + z,
    "round": lambda x, z: torch.round(0.3 * x) + z,
    "comparison": lambda x, z: 0.3 * (x > 0).to(x.dtype) + z,
    "argmax": lambda x, z: nn.functional.one_hot(x.argmax(1), D) + torch.tanh(z),
    "dead relu": lambda x, z: torch.relu(x - 100) + z,
    "clamped": lambda x, z: x.clamp(5, 6) + torch.tanh(z),
}


@pytest.mark.parametrize("adjoint", [*ADJOINTS, fpi.Unroll()], ids=str)
@pytest.mark.parametrize("name", WITHOUT_SLOPE)
def test_a_g_without_a_slope_is_not_warned_of(name: str, adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    for solver in (fpi.Picard(damping=0.5), fpi.Anderson()):
        fpi.fixed_point(WITHOUT_SLOPE[name], zeros(), z, solver=solver, adjoint=adjoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cut_or_not_in_other_arithmetic(dtype: torch.dtype) -> None:
    a = orthogonal(0.5, dtype)
    z = torch.randn(B, D).to(dtype).requires_grad_()
    x0 = torch.zeros(B, D, dtype=dtype)
    options: dict[str, Any] = {"rtol": 0.05}
    fpi.fixed_point(lambda x, z: torch.tanh(z), x0, z, **options)
    fpi.fixed_point(lambda x, z: 0.3 * (x > 0).to(x.dtype) + z, x0, z, **options)
    fpi.fixed_point(lambda x, z: 0.3 * x.detach().round() + z, x0, z, **options)
    table = torch.randn(9, D).to(dtype)
    fpi.fixed_point(lambda x, z: table[(3 * x[:, 0]).clamp(-4, 4).long()] + z, x0, z, **options)
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        fpi.fixed_point(cut_map(by_detach, a), x0, z, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_what_counts_over_many_numbers_has_no_slope(dtype: torch.dtype) -> None:
    z = torch.randn(32, 16).to(dtype).requires_grad_()
    options: dict[str, Any] = {"rtol": 0.05, "max_steps": 50}
    for g in (
        lambda x, z: z + 0.01 * (x > 0).sum(1, keepdim=True).to(x.dtype),
        lambda x, z: z * (1 + 0.1 * (x > 0).to(x.dtype).mean(1, keepdim=True)),
    ):
        fpi.fixed_point(eval_copy(g), torch.zeros_like(z), z, **options)


def test_who_cuts_on_purpose_does_not_pay_for_ever() -> None:
    """A part that g does not read is looked for a few times, and then no more."""
    z, calls = torch.randn(B, D, dtype=F64, requires_grad=True), []

    def g(s: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return torch.tanh(0.5 * s[0] + z), 2 * z

    spent = []
    for _ in range(6):
        calls.clear()
        sol = fpi.fixed_point(g, (zeros(), zeros()), z, rtol=1e-8, adjoint=fpi.Unroll())
        spent.append(len(calls) - int(sol.num_steps.max()))
    assert spent[0] > spent[-1] == spent[-2]
