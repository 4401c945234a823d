"""Every op that draws random numbers, in a g: one draw per solve, wherever g is evaluated."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fpi_cuda as fpi
from fpi_cuda.evaluation.random_draws import Generators, Recording, Replaying, here

F64 = torch.float64
B, D = 6, 5
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 400}
OWN = torch.Generator()
SEED = torch.Generator().manual_seed(1)
WEIGHT = (0.4 * torch.linalg.qr(torch.randn(D, D, dtype=F64, generator=SEED))[0]).requires_grad_()


def cell(x: Tensor, z: Tensor) -> Tensor:
    return torch.tanh(x @ WEIGHT + z)


def noise(*size: int, **kwargs: Any) -> Tensor:
    return torch.rand(*size, dtype=F64, **kwargs)


def image(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def attended(x: Tensor) -> Tensor:
    return 0.2 * F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3)[0]


def segment(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=False)


def segments(x: Tensor, z: Tensor) -> Tensor:
    """Dropout before, in, around and after checkpoints inside of each other."""

    def inner(t: Tensor) -> Tensor:
        return F.dropout(cell(t, z), 0.3)

    first = segment(lambda t: segment(inner, t), F.dropout(x, 0.1))
    return 0.3 * first + 0.2 * segment(lambda t: F.dropout(segment(inner, t), 0.2), x)


DRAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropout": lambda x, z: F.dropout(cell(x, z), 0.3),
    "dropout in place": lambda x, z: F.dropout(1 * cell(x, z), 0.3, inplace=True),
    "native_dropout": lambda x, z: torch.native_dropout(cell(x, z), 0.3, True)[0],
    "dropout of nothing": lambda x, z: torch.native_dropout(cell(x, z), 0.3, False)[0],
    "alpha_dropout": lambda x, z: 0.3 * F.alpha_dropout(cell(x, z), 0.3, True),
    "feature_alpha_dropout": lambda x, z: 0.3 * F.feature_alpha_dropout(cell(x, z), 0.3, True),
    "dropout2d": lambda x, z: F.dropout2d(image(cell(x, z)), 0.3)[:, :, 0, 0],
    "rand": lambda x, z: cell(x * noise(B, D), z),
    "rand_like": lambda x, z: cell(x * torch.rand_like(x), z),
    "rand out": lambda x, z: cell(x * torch.rand(B, D, out=torch.empty(B, D)), z),
    "randn": lambda x, z: cell(x, z + torch.randn(B, D, dtype=F64)),
    "randn_like": lambda x, z: cell(x, z + torch.randn_like(x.detach())),
    "randint": lambda x, z: cell(x * torch.randint(2, (B, D)), z),
    "randint low": lambda x, z: cell(x * torch.randint(-1, 2, (B, D)), z),
    "randint_like": lambda x, z: cell(x * torch.randint_like(x, 2), z),
    "randperm": lambda x, z: cell(x[:, torch.randperm(D)], z),
    "normal_": lambda x, z: cell(x, z + torch.empty_like(x).normal_()),
    "normal of x": lambda x, z: cell(x, z) + 0.1 * torch.normal(0.1 * x.detach(), 1.0),
    "bernoulli p": lambda x, z: cell(x * torch.bernoulli(x.detach(), 0.5), z),
    "bernoulli of a tensor": lambda x, z: cell(x * torch.bernoulli(torch.full_like(x, 0.5)), z),
    "exponential_": lambda x, z: cell(x, z + torch.empty_like(x).exponential_()),
    "gumbel_softmax": lambda x, z: cell(x, z) * F.gumbel_softmax(0.3 * x),
    "multinomial": lambda x, z: cell(x[:, torch.multinomial(torch.ones(D), D)], z),
    "poisson": lambda x, z: cell(x, z + torch.poisson(torch.ones_like(x))),
    "gamma": lambda x, z: cell(x, z + torch._standard_gamma(torch.ones_like(x))),
    "rrelu": lambda x, z: F.rrelu(cell(x, z), training=True),
    "rrelu in place": lambda x, z: F.rrelu(1 * cell(x, z), training=True, inplace=True),
    "attention": lambda x, z: attended(x) + cell(x, z),
    "own generator": lambda x, z: cell(x * (noise(B, D, generator=OWN) > 0.5), z),
    "own generator in place": lambda x, z: cell(
        x * torch.empty_like(x).bernoulli_(0.5, generator=OWN), z
    ),
    "own multinomial": lambda x, z: cell(
        x[:, torch.multinomial(torch.ones(D), D, generator=OWN)], z
    ),
    "checkpoint": segments,
}


def rewound(g: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """g that draws the same in each evaluation, by winding the generators back."""
    states = (torch.get_rng_state(), OWN.get_state())

    def once_more(x: Tensor, z: Tensor) -> Tensor:
        torch.set_rng_state(states[0])
        OWN.set_state(states[1])
        return g(x, z)

    return once_more


def oracle(g: Any, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The fixed point of a g that always draws the same, and derivatives, step by step."""
    with torch.no_grad():
        x = torch.zeros(B, D, dtype=F64)
        for _ in range(150):
            x = g(x, z)
    y = x
    for _ in range(60):
        y = g(y, z)
    first = torch.autograd.grad(y.square().sum(), (z, WEIGHT), create_graph=True)
    (second,) = torch.autograd.grad(first[1].square().sum(), WEIGHT)
    return x, first, second


@pytest.mark.parametrize("name", DRAWS)
def test_an_op_that_draws_is_given_the_same_numbers(name: str) -> None:
    g = DRAWS[name]
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    torch.manual_seed(1)
    OWN.manual_seed(2)
    again = rewound(g)
    again(torch.zeros(B, D, dtype=F64), z)
    after = (torch.get_rng_state(), OWN.get_state())
    x, first, second = oracle(again, z)
    for evaluated_before in (False, True):
        torch.manual_seed(1)
        OWN.manual_seed(2)
        sol = fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **TIGHT)
        assert sol.converged.all(), (sol, evaluated_before)
        torch.testing.assert_close(sol.value.detach(), x)
        once = torch.autograd.grad(sol.value.square().sum(), (z, WEIGHT), create_graph=True)
        torch.testing.assert_close(once, first)
        (twice,) = torch.autograd.grad(once[1].square().sum(), WEIGHT, retain_graph=True)
        torch.testing.assert_close(twice, second)
        plain = torch.autograd.grad(sol.value.square().sum(), (z, WEIGHT))
        torch.testing.assert_close(plain, first)
        # As one evaluation leaves them.
        assert torch.equal(torch.get_rng_state(), after[0])
        assert torch.equal(OWN.get_state(), after[1])
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        OWN.manual_seed(2)
        with mode():
            value = fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **TIGHT).value
        torch.testing.assert_close(value.clone(), x)
        assert torch.equal(torch.get_rng_state(), after[0])


@pytest.mark.parametrize("name", ["dropout", "rrelu", "own generator"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": fpi.Picard()},
        {"solver": fpi.Broyden(m=10)},
        {"backend": "reference"},
        {"adjoint": fpi.Unroll()},
        {"adjoint": fpi.Neumann(k=60)},
        {"adjoint": fpi.Phantom(k=60, tau=1.0)},
        {"adjoint": fpi.Implicit(solver=fpi.GMRES())},
        {"rowwise": True},
    ],
    ids=str,
)
def test_every_way_of_solving_gives_the_same_numbers(name: str, options: Any) -> None:
    g = DRAWS[name]
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    torch.manual_seed(1)
    OWN.manual_seed(2)
    x, first, _ = oracle(rewound(g), z)
    torch.manual_seed(1)
    OWN.manual_seed(2)
    sol = fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **{**TIGHT, **options})
    assert sol.converged.all()
    torch.testing.assert_close(sol.value.detach(), x)
    grads = torch.autograd.grad(sol.value.square().sum(), (z, WEIGHT))
    torch.testing.assert_close(grads, first)


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_draws_meanwhile_does_not_change_what_a_known_g_draws() -> None:
    """That a g is known to draw nothing, or was, is no matter."""
    z = torch.randn(B, D, dtype=F64)
    share, elsewhere = [0.0], [False]

    def g(x: Tensor, z: Tensor) -> Tensor:
        if elsewhere[0]:
            in_thread(lambda: torch.rand(3))
        return F.dropout(cell(x, z), share[0])

    def masked(value: Tensor) -> float:
        return float((value == 0).double().mean())

    for share[0], elsewhere[0] in [(0.0, False), (0.0, True), (0.3, True), (0.3, False)] * 2:
        sol = fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, **TIGHT)
        assert sol.converged.all()
        assert (masked(sol.value) > 0) == (share[0] > 0)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_g_that_works_in_place_is_repeated_from_what_it_was_given(share: float) -> None:
    """Where another thread draws, g is evaluated again to see whether it did."""
    elsewhere, seen = [False], []

    def g(x: Tensor, z: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        if elsewhere[0]:
            in_thread(lambda: torch.rand(3))
        x.mul_(0.5)
        return F.dropout(cell(x, z), share if elsewhere[0] else 0.0)

    z = torch.randn(B, D, dtype=F64)
    for adjoint in (fpi.Implicit(), fpi.Unroll()):
        for elsewhere[0] in (False, True):
            seen.clear()
            sol = fpi.fixed_point(g, torch.ones_like(z), z, adjoint=adjoint, **TIGHT)
            assert sol.converged.all()
        assert (seen[1] == 1).all()
        torch.autograd.grad(sol.value.sum(), WEIGHT)


@torch.library.custom_op("fpi_cuda_tests::hidden_mask", mutates_args=())
def hidden_mask(x: Tensor) -> Tensor:
    return (torch.rand(x.shape) > 0.5).to(x.dtype)


@torch.library.custom_op(
    "fpi_cuda_tests::tagged_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def tagged_mask(x: Tensor) -> Tensor:
    return (torch.rand(x.shape) > 0.5).to(x.dtype)


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("op", "message"),
    [(hidden_mask, "in an op that is not tagged"), (tagged_mask, "in fpi_cuda_tests::tagged")],
    ids=["hidden", "tagged"],
)
def test_an_op_whose_numbers_are_out_of_reach_is_refused(
    op: Any, message: str, known: bool, with_dropout: bool
) -> None:
    draws = [not known]

    def g(x: Tensor, z: Tensor) -> Tensor:
        x = F.dropout(x, 0.2) if with_dropout else x
        return 0.5 * torch.tanh(x * op(x.detach()) if draws[0] else x) + z

    z = torch.randn(40, D, dtype=F64)
    with torch.no_grad():
        if known:
            fpi.fixed_point(g, torch.ones_like(z), z)
        draws[0] = True
        with pytest.raises(RuntimeError, match=message):
            fpi.fixed_point(g, torch.ones_like(z), z)
    assert here.depth == 0


@pytest.mark.parametrize(
    "g",
    [
        lambda x, z, n: F.dropout(x, 0.3 + 0.1 * (n > 3)) @ WEIGHT + z,
        lambda x, z, n: (F.dropout(x, 0.3) if n < 3 else x) @ WEIGHT + z,
        lambda x, z, n: F.dropout(F.dropout(x, 0.3) if n > 3 else x, 0.3) @ WEIGHT + z,
        lambda x, z, n: (x * (torch.rand_like(x) if n < 3 else torch.randn_like(x))) @ WEIGHT + z,
    ],
    ids=["share", "fewer", "more", "other"],
)
def test_a_g_that_draws_otherwise_each_time_is_refused(g: Any) -> None:
    calls = [0]

    def counted(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        return g(x, z, calls[0])

    z = torch.randn(B, D, dtype=F64)
    with pytest.raises(RuntimeError, match="differently from evaluation to evaluation"):
        fpi.fixed_point(counted, torch.zeros_like(z), z, **TIGHT)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_dropout_in_a_reentrant_checkpoint_is_refused() -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return checkpoint(lambda t: F.dropout(cell(t, z), 0.3), x, use_reentrant=True)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), z, adjoint=fpi.JacobianFree())


@pytest.mark.parametrize("name", [name for name in DRAWS if "own" not in name])
def test_a_rehearsal_draws_what_will_be_drawn_and_takes_nothing(name: str) -> None:
    g, x = DRAWS[name], torch.randn(B, D, dtype=F64)
    state = torch.get_rng_state()
    source = Generators([state], torch.device("cpu"))
    with torch.no_grad():
        with Recording(source) as recording:
            rehearsed = g(x, x)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(rehearsed, g(x, x))
        with Replaying(recording.draws) as replaying:
            torch.testing.assert_close(g(x, x), rehearsed)
            replaying.require_all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_g(backend: str) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    compiled = torch.compile(DRAWS["dropout"], backend=backend)
    torch.manual_seed(1)
    compiled(z.detach(), z)
    torch.manual_seed(1)
    sol = fpi.fixed_point(compiled, torch.zeros(B, D, dtype=F64), z, **TIGHT)
    grads = torch.autograd.grad(sol.value.square().sum(), (z, WEIGHT))
    torch.manual_seed(1)
    expected = fpi.fixed_point(DRAWS["dropout"], torch.zeros(B, D, dtype=F64), z, **TIGHT)
    torch.testing.assert_close(sol.value, expected.value)
    oracle = torch.autograd.grad(expected.value.square().sum(), (z, WEIGHT))
    torch.testing.assert_close(grads, oracle)


def test_records_go_with_the_graph_of_the_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[weakref.ref[Tensor]] = []
    draw = Recording.draw

    def watched(self: Recording, *args: Any) -> Any:
        out = draw(self, *args)
        records.append(weakref.ref(self.draws[-1].numbers))
        return out

    def alive() -> int:
        gc.collect()
        return sum(record() is not None for record in records)

    monkeypatch.setattr(Recording, "draw", watched)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    with torch.no_grad():
        sol = fpi.fixed_point(DRAWS["dropout"], torch.zeros(B, D, dtype=F64), z)
    assert records
    assert alive() == 0
    sol = fpi.fixed_point(DRAWS["dropout"], torch.zeros(B, D, dtype=F64), z)
    assert alive() == 1
    del sol
    assert alive() == 0
