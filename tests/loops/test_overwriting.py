"""What a trace writes over is read by nobody after it, so that its numbers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fpi_cuda.loops import traced

W = 0.3 * torch.randn(4, 4)


def chain(x: Tensor, z: Tensor) -> Tensor:
    return torch.tanh(0.5 * F.relu(x @ W + z) - z).sigmoid() / 2


def residual(x: Tensor, z: Tensor) -> Tensor:
    h = torch.tanh(x @ W + z)
    return h + torch.relu(h @ W)


def twice(x: Tensor, z: Tensor) -> Tensor:
    h = x @ W
    return h * h + h.exp() - z


def squared(x: Tensor, z: Tensor) -> Tensor:
    h = x @ W
    return h * h


def turned(x: Tensor, z: Tensor) -> Tensor:
    h = (x.mT @ x) @ W
    return x @ (h + h.mT)


def view_read_later(x: Tensor, z: Tensor) -> Tensor:
    h = x @ W
    part = h[:, :2]
    return torch.relu(h) + part.sum(1, keepdim=True) + z


def view_read_before(x: Tensor, z: Tensor) -> Tensor:
    h = x @ W
    part = h[:, :2].sum(1, keepdim=True)
    return torch.relu(h) + part


def parts(x: Tensor, z: Tensor) -> Tensor:
    a, b = (x @ W).chunk(2, 1)
    return torch.cat((torch.tanh(a) * b, torch.relu(b) + a), 1) + z


def over_a_view(x: Tensor, z: Tensor) -> Tensor:
    h = (x @ W).view(-1, 2, 2)
    return torch.tanh(h).view(-1, 4) + z


def same_memory(x: Tensor, z: Tensor) -> Tensor:
    h = x @ W
    same = F.dropout(h, 0.5, training=False)
    return torch.exp(-(h.contiguous() ** 2)) + same + z


def broadcast(x: Tensor, z: Tensor) -> Tensor:
    row = x.mean(0, keepdim=True)
    return row.expand(3, 4) * 0.5 + z * torch.tanh(x[:, :1] * 0.1)


def of_numbers(x: Tensor, z: Tensor) -> Tensor:
    count = (x @ W > 0).sum(1, keepdim=True)
    return (count / 4) * 0.1 + (1 - torch.sigmoid(x)) + (2 / (x.abs() + 1))


def sorted_values(x: Tensor, z: Tensor) -> Tensor:
    values, places = (x @ W).sort(1)
    return torch.tanh(values) + values.gather(1, places) + z


def x_and_z(x: Tensor, z: Tensor) -> Tensor:
    return (x + z) * z - x


def kept_of_z(x: Tensor, z: Tensor) -> Tensor:
    return torch.tanh(z).mul(x) + torch.exp(z)


MAPS = [
    (chain, 5), (residual, 3), (twice, 3), (squared, 0), (turned, 0), (view_read_later, 2),
    (view_read_before, 2), (parts, 1), (over_a_view, 2), (same_memory, 3), (broadcast, 2),
    (of_numbers, 4), (sorted_values, 2), (x_and_z, 2), (kept_of_z, 1),
]  # fmt: skip


@pytest.mark.parametrize(("g", "least"), MAPS, ids=[g.__name__ for g, _ in MAPS])
def test_numbers_and_what_was_given_stay(
    g: Callable[..., Tensor], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced.steps.clear()
    x, z = torch.randn(3, 4), torch.randn(3, 4)
    before = x.clone(), z.clone(), W.clone()
    with torch.no_grad():
        capture = traced.steps.of(g, x, (z,))
        step = traced.bound(capture, capture.reads(g, x, (z,)))
        assert step is not None
        for _ in range(3):
            points = torch.randn(3, 4)
            again = points.clone()
            assert traced.same_bits(step(points), g(again, z))
            assert torch.equal(points, again)
    assert all(map(torch.equal, (x, z, W), before))
    names = [
        str(n.target) for n in capture.found.step.__self__.graph.nodes if n.op == "call_method"
    ]
    assert sum(name.endswith("_") for name in names) >= least
    assert least or not any(name.endswith("_") for name in names)
