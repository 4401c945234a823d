"""A solve that the caller captures into a graph of their own: a fixed number of masked steps."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.evaluation import context
from fpi_cuda.evaluation.context import being_captured
from fpi_cuda.evaluation.stream_capture import NoRandomNumbers
from fpi_cuda.loops import host
from fpi_cuda.loops.host import CountAtOnce, CountNever


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library believe that the current stream is being captured."""
    for module in (context, import_module("fpi_cuda.fixed_point")):
        monkeypatch.setattr(module, "being_captured", lambda device: True)
    monkeypatch.setattr(host, "active_count", lambda device: CountNever())


class Counted:
    def __init__(self) -> None:
        self.evaluations = 0

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        return torch.tanh(0.5 * x + z)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("rowwise", [False, True])
def test_steps_after_the_last_sample_has_stopped_change_nothing(rowwise: bool) -> None:
    z = torch.randn(6, 5, dtype=torch.float64)
    x0 = torch.zeros_like(z)
    counted = Counted()
    with torch.no_grad():
        found = fpi.fixed_point(counted, x0, z, rtol=1e-8, max_steps=60, rowwise=rowwise)
    # Nobody can look whether the rows were independent: one evaluation more tells the residuals.
    assert counted.evaluations == (60 if rowwise else 61)
    assert int(found.num_steps.max()) < 30
    with pytest.MonkeyPatch.context() as undone, torch.no_grad():
        undone.setattr(host, "active_count", lambda device: CountAtOnce())
        expected = fpi.fixed_point(Counted(), x0, z, rtol=1e-8, max_steps=60)
    for name in ("value", "status", "num_steps", "residual"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.usefixtures("capturing")
def test_grad_mode_is_refused() -> None:
    z = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"under grad mode a solve cannot be captured"):
        fpi.fixed_point(Counted(), torch.zeros(2, 3), z)


@pytest.mark.usefixtures("capturing")
def test_random_numbers_are_refused() -> None:
    dropout = nn.Dropout(0.5)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"g draws random numbers \(aten::"):
        fpi.fixed_point(lambda x, z: dropout(0.5 * x + z), torch.zeros(2, 3), torch.ones(2, 3))


def test_an_attention_without_dropout_draws_none() -> None:
    q = torch.randn(1, 2, 4, 8)
    attention = nn.functional.scaled_dot_product_attention
    with NoRandomNumbers():
        assert attention(q, q, q).shape == q.shape
        with pytest.raises(RuntimeError, match="draws random numbers"):
            attention(q, q, q, dropout_p=0.5)


def test_nothing_is_captured_on_the_cpu() -> None:
    assert not being_captured(torch.device("cpu"))
