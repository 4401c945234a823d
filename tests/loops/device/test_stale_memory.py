"""Nothing that a captured solve returns was read from stale memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loops.device.captured import (
    FEATURES,
    Cell,
    assert_like_host,
    assert_same,
    gradients,
    inputs,
    solve,
)
from tape import Tape, TapeGraphs
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.loops import device as device_loop
from fpi_cuda.loops.device.cache import MOST_REBUILDS


def test_weights_changed_in_place_are_seen(tape: TapeGraphs) -> None:
    g = Cell()
    optimizer = torch.optim.SGD(g.parameters(), lr=0.1)
    values = []
    for _ in range(4):
        x0, z = inputs()
        found = solve(g, x0, z)
        assert_same(found, solve(g, x0, z, route="host"))
        values.append(found.value.detach())
        optimizer.zero_grad()
        found.value.square().sum().backward()
        optimizer.step()
    assert not torch.equal(values[0], values[-1])
    assert tape.log.count("capture") == 3


CHANGES: dict[str, Callable[[Cell], None]] = {
    "data": lambda g: setattr(g.a.weight, "data", 0.5 * g.a.weight.data),
    "parameter": lambda g: setattr(g.a, "weight", nn.Parameter(0.5 * g.a.weight.detach())),
    "number": lambda g: setattr(g, "scale", 0.1),
    "buffer": lambda g: setattr(g, "shift", torch.ones(FEATURES, dtype=torch.float64)),
    "layer": lambda g: setattr(g, "norm", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_g_is_captured_anew(tape: TapeGraphs, change: Callable[[Cell], None]) -> None:
    g = Cell()
    x0, z = inputs()
    before = gradients(g, x0, z)
    change(g)
    for _ in range(2):
        found, expected = gradients(g, x0, z), gradients(g, x0, z, route="host")
        assert all(map(torch.equal, found, expected))
    assert not torch.equal(before[0], found[0])


def test_a_freed_weight_whose_memory_is_used_again(tape: TapeGraphs) -> None:
    x0, z = inputs()
    memory = torch.eye(FEATURES, dtype=torch.float64)
    weights = [0.3 * memory, 0.6 * memory]

    def layer(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, z: torch.cos(x @ weight + z.sum(1, keepdim=True))

    first = assert_like_host(layer(weights[0]), x0, z)
    # Another tensor at the very same address.
    weights[0].copy_(weights[1])
    alias = torch.as_strided(weights[0], (FEATURES, FEATURES), (FEATURES, 1))
    second = assert_like_host(layer(alias), x0, z)
    assert not torch.equal(first.value, second.value)
    third = assert_like_host(layer(weights[1]), x0, z)
    assert torch.equal(third.value, second.value)


def test_a_map_that_is_another_each_time_goes_back_to_the_host(tape: TapeGraphs) -> None:
    x0, z = inputs()
    kept = []

    def once(weight: Tensor) -> fpi.Solution:
        kept.append(weight)
        return solve(
            lambda x, z: torch.tanh(weight * x + z.sum(1, keepdim=True)), x0, z, route=None
        )

    for i in range(3 * MOST_REBUILDS):
        weight = torch.full((FEATURES,), 0.1 * i / MOST_REBUILDS, dtype=torch.float64)
        with torch.no_grad():
            found = once(weight)
        expected = solve(
            lambda x, z, w=weight: torch.tanh(w * x + z.sum(1, keepdim=True)), x0, z, route="host"
        )
        assert_same(found, expected)
    route = found.adjoint_record.route
    assert route is not None
    assert route.name == "host"
    assert "another computation than when it was captured: op 1" in route.reason
    assert tape.log.count("capture") <= MOST_REBUILDS + 1
    assert len(device_loop.plans) == 0


def test_results_are_no_part_of_a_plan(tape: TapeGraphs) -> None:
    g = Cell()
    with torch.no_grad():
        first = solve(g, *inputs(seed=0))
        copies = [t.clone() for t in (first.value, first.status, first.num_steps, first.residual)]
        second = solve(g, *inputs(seed=1))
    assert torch.equal(first.value, copies[0])
    assert torch.equal(first.num_steps, copies[2])
    assert torch.equal(first.residual, copies[3])
    assert first.value.data_ptr() != second.value.data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 1:4],
        lambda t: t[:, 2:5].t().contiguous().t(),
        lambda t: t[:1, :3].expand(5, 3),
        lambda t: t[:, ::2],
        lambda t: t.repeat_interleave(9, 1)[:, ::9][:, :3],
    ],
    ids=["slice", "transposed", "expanded", "strided", "far apart"],
)
def test_inputs_in_any_layout(tape: TapeGraphs, view: Callable[[Tensor], Tensor]) -> None:
    g = Cell()
    for seed in range(2):
        numbers = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
        found = []
        for route in (None, "host"):
            base = numbers.clone().requires_grad_()
            with torch.no_grad():
                solve(g, inputs()[0], view(base), route=None)
            solution = solve(g, inputs()[0], view(base), route=route)
            found.append(torch.autograd.grad(solution.value.square().sum(), base)[0])
        assert torch.equal(*found)
    assert tape.log.count("capture") >= 1


def test_the_start_is_not_changed(tape: TapeGraphs) -> None:
    x0, z = inputs()
    for _ in range(2):
        solve(Cell(), x0, z)
    assert torch.equal(x0, inputs()[0])
    assert torch.equal(z, inputs()[1])


def test_the_tape_itself_stands_for_a_graph() -> None:
    """It must be able to show what the tests above look for."""
    graphs = TapeGraphs()
    weight = torch.ones(2)
    out = torch.zeros(2)
    number = 2.0
    tape = Tape(graphs)
    with tape:
        out.copy_(weight * number)
    tape.undo()
    assert out.tolist() == [0.0, 0.0]
    weight.fill_(3.0)
    number = 5.0
    tape.replay()
    assert out.tolist() == [6.0, 6.0]
    weight = torch.full((2,), 7.0)
    tape.replay()
    assert out.tolist() == [6.0, 6.0]
