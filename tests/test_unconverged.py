"""Where and how not converging is said: listeners, threads, copies, lines, transforms, devices."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from slow_maps import DIM, Heard, Module, matrix, slow, texts, z_of
from tape import TapeGraphs
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import unconverged


def test_a_new_listener_of_a_line_hears_it_and_a_filter_in_between_is_none() -> None:
    counts = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                fpi.fixed_point(slow(), torch.zeros(8, DIM), z_of(), max_steps=2)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
            counts.append(len(seen))
    assert counts == [1, 1]


def test_nobody_heard_what_was_ignored() -> None:
    layer = fpi.FPILayer(slow(), max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fpi.FixedPointWarning)
        layer(z_of())
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            layer(z_of())
        assert len(seen) == expected


def test_threads_that_share_a_layer_say_it_once(heard: Heard) -> None:
    layer = fpi.FPILayer(slow(), max_steps=2)
    threads = [threading.Thread(target=layer, args=(z_of(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts(heard)) == 1


def test_a_copy_is_another_layer(heard: Heard) -> None:
    layer = fpi.FPILayer(Module(), max_steps=2)
    layer(z_of())
    layer.double().float().train()
    layer(z_of())
    assert len(heard) == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(z_of())
        other(z_of())
    assert len(texts(heard)) == 3


def test_the_lines_that_are_remembered_are_bounded() -> None:
    source = "import fpi_cuda, torch\n" + "\n" * 9 + "fpi_cuda.fixed_point(g, torch.zeros(1, 1))"
    for shift in range(unconverged.MOST_SITES + 3):
        code = compile(source, f"made up {shift}", "exec")
        exec(code, {"g": torch.cos, "__name__": "made_up"})
    assert unconverged.notice_of.cache_info().currsize == unconverged.MOST_SITES


def test_a_tuple_state_is_one_vector(heard: Heard) -> None:
    a = matrix()
    zero = torch.zeros(8, DIM)
    fpi.fixed_point(lambda s: (torch.tanh(s[1] @ a) + 1, s[0] * 0.99), (zero, zero), max_steps=2)
    assert "8 of 8 samples" in texts(heard)[0]


def test_forward_and_adjoint_are_two_things(heard: Heard) -> None:
    for _ in range(5):
        x = fpi.fixed_point(slow(), torch.zeros(8, DIM), z_of(grad=True), max_steps=2).value
        x.sum().backward()
    first, second = texts(heard)
    assert "samples did not converge" in first
    assert "adjoint solve that did not converge" in second


def test_one_backward_says_one_thing(heard: Heard) -> None:
    """Samples left out and samples left unsolved stand in one warning."""
    layer = fpi.FPILayer(slow(), max_steps=300, adjoint=fpi.Implicit(max_steps=2))
    z = z_of()
    z[3] = torch.nan
    x = layer(z.requires_grad_())
    assert len(heard) == 1
    x.sum().backward()
    assert len(texts(heard)) == 2
    assert "1 of 8 samples contribute no gradient" in texts(heard)[1]
    assert "7 of 8 samples have an adjoint solve that did not converge" in texts(heard)[1]


# Where.


def line_of(function: Any, words: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if words in line)


def test_it_points_at_the_line_of_the_caller(heard: Heard) -> None:
    def calls_a_layer_in_a_network() -> Tensor:
        return torch.nn.Sequential(fpi.FPILayer(Module(), max_steps=2))(z_of())  # here

    value = calls_a_layer_in_a_network()
    assert heard[0].filename == __file__
    assert heard[0].lineno == line_of(calls_a_layer_in_a_network, "# here")

    def goes_back() -> None:
        value.sum().backward()  # here

    goes_back()
    assert heard[1].filename == __file__
    assert heard[1].lineno == line_of(goes_back, "# here")


def test_as_an_error_it_is_raised_by_every_call_and_leaves_nothing_behind() -> None:
    layer = fpi.FPILayer(slow(), max_steps=2)
    z = z_of(grad=True)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", fpi.FixedPointWarning)
            with pytest.raises(fpi.FixedPointWarning, match="8 of 8"):
                layer(z)
            with pytest.raises(fpi.FixedPointWarning, match="8 of 8"):
                fpi.fixed_point(slow(), torch.zeros(8, DIM), z, max_steps=2)
            assert torch.is_grad_enabled()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        x = layer(z)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", fpi.FixedPointWarning)
        with pytest.raises(fpi.FixedPointWarning, match="adjoint"):
            x.sum().backward(retain_graph=True)
        assert z.grad is None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        x.sum().backward()
    assert len(seen) == 1
    assert z.grad is not None


def test_it_can_be_filtered_by_category() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=fpi.FixedPointWarning)
        fpi.FPILayer(slow(), max_steps=2)(z_of(grad=True)).sum().backward()
    assert not seen


# Inside of transforms and modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode: Any, heard: Heard) -> None:
    layer = fpi.FPILayer(slow(), max_steps=2)
    with mode():
        for _ in range(3):
            layer(z_of())
    assert len(texts(heard)) == 1


def test_transforms(heard: Heard) -> None:
    def layer() -> fpi.FPILayer:
        return fpi.FPILayer(slow(), max_steps=2)

    many, z = torch.randn(3, 8, DIM), z_of()
    torch.func.vmap(layer())(many)
    assert "24 of 24 samples did not converge" in texts(heard)[-1]
    a = layer()
    torch.func.grad(lambda z: a(z).sum())(z)
    assert len(texts(heard)) == 3
    assert "adjoint" in texts(heard)[-1]
    torch.func.jvp(layer(), (z,), (z,))
    assert len(texts(heard)) == 5
    unrolled = fpi.FPILayer(slow(), max_steps=2, adjoint=fpi.Unroll())
    torch.func.grad(lambda z: unrolled(z).sum())(z)
    assert "8 of 8 samples did not converge" in texts(heard)[-1]
    assert len(texts(heard)) == 6
    b = layer()
    torch.func.vmap(torch.func.grad(lambda z: b(z).sum()))(many)
    assert "24 of 24 samples" in texts(heard)[-1]
    assert "24 of 24 samples" in texts(heard)[-2]


def test_compiled(heard: Heard) -> None:
    layer = fpi.FPILayer(Module(), max_steps=2)
    compiled = torch.compile(layer, backend="eager")
    for _ in range(3):
        compiled(z_of())
    assert len(texts(heard)) == 1


def test_a_single_solve_on_the_device_is_told_of_by_the_next_one(
    tape: TapeGraphs, heard: Heard
) -> None:
    with torch.no_grad():
        layer = fpi.FPILayer(Module(), max_steps=2, route="device")
        layer(z_of())
        assert texts(heard) == []
        fpi.FPILayer(Module(), max_steps=400, rtol=1e-2, route="device")(z_of())
    (text,) = texts(heard)
    assert "8 of 8 samples did not converge (8 MAX_STEPS), worst residual" in text


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("route", [None, "host", "device"])
def test_on_a_device_it_is_said_by_a_later_call(
    route: str | None, grad: bool, heard: Heard
) -> None:
    layer = fpi.FPILayer(Module().cuda(), max_steps=2, route=route)
    z = z_of().cuda()
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            layer(z)
            torch.cuda.synchronize()
    (text,) = texts(heard)
    assert "8 of 8 samples did not converge (8 MAX_STEPS), worst relative residual" in text
