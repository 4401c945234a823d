"""Random layers as users build them, each held to its word by a judge that shares nothing with it.

A case composes what may hang on a g: rows that depend on one another, hooks, patched methods,
autocast, inputs that are changed in place before backward, other threads, states of any size,
derivatives of both orders and modes. The judge evaluates g in float64, all rows together and
without autocast, and takes gradients from a dense implicit solve.

- CONVERGED rows have the residual that was asked for, and every row the one that is reported.
- STALLED rows are at the floor of the arithmetic.
- Where forward and adjoint have converged, the gradient is that of the dense solve, or it raises
  where something was changed in between.
- A non-finite incoming gradient stays one.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi

F64 = torch.float64
HOOKS = ("none", "none", "none", "forward", "pre", "patched", "backward")
ROWS = ("apart", "apart", "graph", "centred", "attention")
ORDERS = ("no_grad", "first", "first", "second", "jvp", "infinite")
MAPS = ("tanh", "linear", "softplus", "cell")
SOLVERS = (fpi.Picard(), fpi.Anderson(), fpi.Anderson(m=2), fpi.Broyden(m=8))
LINEAR = (None, None, fpi.Picard(), fpi.Broyden(m=8), fpi.GMRES(), fpi.ConjugateGradient())
APPROXIMATE = (None, fpi.JacobianFree(), fpi.Neumann(3), fpi.Phantom(3), fpi.Unroll())


@dataclass(frozen=True)
class LayerCase:
    """One layer and one call of it, drawn from (seed, index)."""

    index: int
    dtype: torch.dtype
    batch: int
    features: int
    scale: float
    gain: float
    rows: str
    kind: str
    hook: str
    autocast: bool
    changed: float
    threaded: bool
    order: str
    solver: Any
    linear: Any
    adjoint: Any
    rtol: float
    max_steps: int
    batch_dims: int

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def draw_layer(seed: int, index: int) -> LayerCase:
    """The case called `index`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

    def pick(choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    dtype = pick((torch.float32, torch.float32, F64))
    kind = pick(MAPS)
    autocast = dtype == torch.float32 and pick(range(5)) == 0
    order = pick(ORDERS)
    large = pick(range(3)) == 0 and kind != "cell" and not autocast
    return LayerCase(
        index=index,
        dtype=dtype,
        batch=1 + pick(range(10)),
        features=1 + pick(range(6)),
        scale=10 ** uniform(-30, 30) if large else 1.0,
        gain=uniform(0.1, 0.9),
        rows="apart" if kind == "cell" else pick(ROWS),
        kind=kind,
        hook=pick(HOOKS),
        autocast=autocast,
        changed=pick((0.0, 0.0, 0.0, 1e-6, 1e-3, 1e-1)),
        threaded=pick(range(6)) == 0,
        order=order,
        solver=pick(SOLVERS),
        linear=pick(LINEAR),
        # These are biased: all that is asked of them is that they hide nothing.
        adjoint=pick(APPROXIMATE) if order == "infinite" else None,
        rtol=10 ** uniform(-10 if dtype == F64 else -5, -2),
        max_steps=pick((3, 20, 200, 200)),
        batch_dims=0 if kind != "cell" and pick(range(6)) == 0 else 1,
    )


class FuzzedMap(nn.Module):
    """scale h(mix x / scale) with weights of a known norm; z is added inside, in units of scale."""

    def __init__(self, case: LayerCase, generator: torch.Generator) -> None:
        super().__init__()
        n, d = case.batch, case.features

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        weight = torch.linalg.qr(normal(d, d))[0] * case.gain
        self.weight = nn.Parameter(weight.to(case.dtype))
        mix = torch.rand(n, n, dtype=F64, generator=generator) * (
            torch.rand(n, n, dtype=F64, generator=generator) < 0.4
        )
        self.register_buffer("mix", (mix / mix.sum(1, keepdim=True).clamp(min=1)).to(case.dtype))
        self.rows, self.kind, self.scale = case.rows, case.kind, case.scale

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = x / self.scale
        if self.rows == "graph":
            h = self.mix @ h
        elif self.rows == "centred":
            h = h - h.mean(0)
        elif self.rows == "attention":
            h = torch.softmax(h @ h.T / (1 + h.square().sum()), -1) @ h
        u = h @ self.weight.T + z / self.scale
        if self.kind == "tanh":
            u = torch.tanh(u)
        elif self.kind == "softplus":
            u = nn.functional.softplus(u)
        return (self.scale * u).to(x.dtype)


def layer_map(case: LayerCase, generator: torch.Generator) -> tuple[nn.Module, list[int]]:
    """g, and a list that its backward hook appends to."""
    if case.kind == "cell":
        cell = fpi.cells.Dense(case.features, case.features).to(case.dtype)
        weight = torch.randn(case.features, case.features, dtype=F64, generator=generator)
        with torch.no_grad():
            cell.A.weight.copy_(torch.linalg.qr(weight)[0] * case.gain)
            cell.B.weight.copy_(torch.eye(case.features))
            cell.B.bias.zero_()
        g: nn.Module = cell
    else:
        g = FuzzedMap(case, generator)
    calls: list[int] = []
    if case.hook == "forward":
        g.register_forward_hook(lambda module, args, out: 0.5 * out)
    elif case.hook == "pre":
        g.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))
    elif case.hook == "patched":
        plain = type(g).forward
        # Of the instance at hand: a copy for the judge is another one.
        g.forward = Patched(plain).__get__(g)  # type: ignore[method-assign]
    elif case.hook == "backward":
        g.register_full_backward_hook(lambda module, v, out: calls.append(1))
    return g, calls


class Patched:
    """Half of a forward."""

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self._plain = plain

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Tensor]:
        return lambda *args: 0.5 * self._plain(owner, *args)


def judged_map(case: LayerCase, g: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """g in float64, without autocast and without the layer."""
    plain = type(g).forward
    twin = copy.deepcopy(g).to(F64)
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks):
        hooks.clear()
    twin.__dict__.pop("forward", None)

    def evaluate(x: Tensor, z: Tensor) -> Tensor:
        if case.hook == "pre":
            z = 2 * z
        out = plain(twin, x, z)
        return 0.5 * out if case.hook in ("forward", "patched") else out

    return evaluate


class Judge:
    """What a case has to answer for."""

    def __init__(self, case: LayerCase) -> None:
        self.case = case
        self.found: list[str] = []

    def run(self) -> list[str]:
        """What is wrong, one line each."""
        if not self.case.threaded:
            self._run()
            return self.found
        thread = threading.Thread(target=self._run)
        thread.start()
        thread.join()
        return self.found

    def _run(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._solve()
        except Exception as error:  # whatever it is, a user would meet it
            self.found.append(f"raises {type(error).__name__}: {str(error).splitlines()[0]}")

    def _solve(self) -> None:
        case = self.case
        generator = torch.Generator().manual_seed(case.index)
        g, calls = layer_map(case, generator)
        z = torch.randn(case.batch, case.features, dtype=F64, generator=generator) * case.scale
        z = z.to(case.dtype).requires_grad_(case.order not in ("no_grad", "jvp"))
        tangent = torch.randn(z.shape, dtype=F64, generator=generator).to(case.dtype)
        judge = judged_map(case, g)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            call = self._layer(g)
            if case.order == "jvp":
                value, pushed = torch.func.jvp(call, (z,), (tangent,))
                self._compare_jvp(judge, value, pushed, z, tangent)
                return
            with torch.set_grad_enabled(case.order != "no_grad"):
                value = call(z)
        sol = self.solution
        if not self._account_holds(judge, sol, z.detach()) or case.order == "no_grad":
            return
        asked = z.detach().clone()
        # z itself reached the layer, so that a change of it in place reaches what was saved.
        used = z if case.changed == 0 else self.used
        if case.changed:
            with torch.no_grad():
                used.mul_(1 + case.changed)
        v = torch.randn(z.shape, dtype=F64, generator=generator).to(case.dtype)
        if case.order == "infinite":
            v[0, 0] = torch.inf
        try:
            self._backward(judge, value, z, v, asked, calls)
        except RuntimeError:
            if not case.changed:
                raise

    def _layer(self, g: nn.Module) -> Callable[[Tensor], Tensor]:
        case = self.case

        def call(z: Tensor) -> Tensor:
            self.used = z.clone() if case.changed else z
            sol = fpi.fixed_point(
                g,
                torch.zeros_like(z),
                self.used,
                solver=case.solver,
                rtol=case.rtol,
                max_steps=case.max_steps,
                batch_dims=case.batch_dims,
                adjoint=case.adjoint or fpi.Implicit(solver=case.linear, max_steps=500),
            )
            self.solution = sol
            return sol.value

        return call

    @property
    def epsilon(self) -> float:
        """Of the arithmetic that g runs in."""
        low = torch.bfloat16 if self.case.autocast else self.case.dtype
        return torch.finfo(low).eps

    def _account_holds(self, judge: Any, sol: fpi.Solution, z: Tensor) -> bool:
        """Whether all has converged, after a look at the account."""
        case = self.case
        x = sol.value.detach().double()
        gx = judge(x, z.double())

        def norms(t: Tensor) -> Tensor:
            # In units of the state's size: float64 squares vanish below 1e-154.
            return (t / case.scale).norm(dim=1) if case.batch_dims else (t / case.scale).norm()

        residual, size = norms(gx - x), torch.maximum(norms(gx), norms(x))
        # In a joint problem a row's rounding is that of what it reads: of all rows.
        whole = torch.maximum(size, size.norm() / max(1, size.numel()) ** 0.5)
        if case.rows != "apart":
            whole = torch.maximum(whole, size.max())
        noise = 40 * self.epsilon * (whole + norms(z.double()))
        reported = sol.residual.double() / case.scale
        self._flag(
            "residual is not that of all rows",
            (reported - residual).abs() > noise + 1e-2 * residual,
        )
        above = residual > case.rtol * norms(gx) * (1 + 1e-3) + noise
        self._flag("CONVERGED above the tolerance", sol.converged & above)
        floor = 64 * torch.finfo(case.dtype).eps * size
        if case.autocast:
            floor = torch.maximum(floor, 8 * self.epsilon * size)
        stalled = sol.status == fpi.Status.STALLED
        self._flag("STALLED above the floor", stalled & (residual > floor + noise))
        if (
            case.max_steps >= 200
            and case.rtol > 1e3 * self.epsilon
            and not isinstance(case.solver, fpi.Broyden)
            and case.rows != "attention"
        ):
            # The map contracts, so that a plain loop would get there; attention does so near its
            # fixed points only. No safeguard of Broyden's promises that it does.
            self._flag("a contraction is not solved", ~sol.converged)
        return bool(sol.converged.all())

    def _backward(
        self, judge: Any, value: Tensor, z: Tensor, v: Tensor, asked: Tensor, calls: list[int]
    ) -> None:
        case = self.case
        second = case.order == "second"
        (found,) = torch.autograd.grad(value, z, v, create_graph=second)
        if case.order == "infinite":
            self._flag("an infinite gradient is hidden", found[:1].isfinite().all().reshape(1))
            return
        if case.hook == "backward" and not calls:
            self.found.append("a backward hook is not called")
        stats = self.solution.adjoint_stats
        if stats is None or not bool(stats.converged.all()):
            return
        x = value.detach().double()
        want, slack = self._dense(judge, x, asked.double(), v.double())
        self._compare("the gradient", found.double(), want, slack, v.double())
        if second:
            w = torch.ones_like(found)
            (again,) = torch.autograd.grad(found, z, w, allow_unused=True)
            if case.autocast:
                return  # rounded twice, it says nothing
            got = torch.zeros_like(want) if again is None else again.double()
            step = 1e-4 * case.scale

            def gradient_at(at: Tensor) -> Tensor:
                x_at = x
                for _ in range(400):
                    x_at = judge(x_at, at)
                return self._dense(judge, x_at, at, v.double())[0]

            ahead = gradient_at(asked.double() + step * w.double())
            behind = gradient_at(asked.double() - step * w.double())
            # w^T H = d/dt of the gradient along w, for H is symmetric.
            curvature = (ahead - behind) / (2 * step)
            unit = want.norm() / case.scale
            error = (got - curvature).norm()
            self._flag(
                "the second derivative",
                (error > (100 * slack + 1e-5) * unit + 100 * slack * curvature.norm()).reshape(1),
            )

    def _dense(self, judge: Any, x: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of <v, x*> in z, and by what share an honest one may differ."""
        n = x.numel()
        unit = self.case.scale
        # Jacobians in units of the state's size are of order one.
        by_x, by_z = torch.autograd.functional.jacobian(
            lambda x, z: judge(unit * x, unit * z) / unit, (x / unit, z / unit)
        )
        system = torch.eye(n, dtype=F64) - by_x.reshape(n, n)
        c = torch.linalg.solve(system.T, v.reshape(n))
        condition = torch.linalg.matrix_norm(torch.linalg.inv(system), 2)
        share = condition**2 * (20 * self.case.rtol + 100 * self.epsilon)
        return (by_z.reshape(n, n).T @ c).reshape(x.shape), share

    def _compare(
        self, what: str, found: Tensor, want: Tensor, share: Tensor, along: Tensor
    ) -> None:
        # A slope 1 - tanh^2 where tanh is almost 1 is rounded to a share of 1, not of itself.
        rounding = 100 * self.epsilon * along.norm()
        error = (found - want).norm()
        self._flag(what, (~(error <= share * want.norm() + rounding)).reshape(1))

    def _compare_jvp(
        self, judge: Any, value: Tensor, pushed: Tensor, z: Tensor, tangent: Tensor
    ) -> None:
        if not bool(self.solution.converged.all()):
            return
        x, n = value.detach().double(), value.numel()
        unit = self.case.scale
        by_x, by_z = torch.autograd.functional.jacobian(
            lambda x, z: judge(unit * x, unit * z) / unit, (x / unit, z.double() / unit)
        )
        stats, grows = self.solution.adjoint_stats, spectral_radius(by_x.reshape(n, n)) >= 1
        if grows and isinstance(self.case.linear, fpi.Picard) and not bool(stats.converged.all()):
            return  # and says so
        system = torch.eye(n, dtype=F64) - by_x.reshape(n, n)
        want = torch.linalg.solve(system, by_z.reshape(n, n) @ tangent.double().reshape(n))
        condition = torch.linalg.matrix_norm(torch.linalg.inv(system), 2)
        share = condition**2 * (20 * self.case.rtol + 100 * self.epsilon)
        self._compare(
            "the tangent", pushed.double(), want.reshape(x.shape), share, tangent.double()
        )

    def _flag(self, what: str, where: Tensor) -> None:
        if bool(where.any()):
            self.found.append(what)


def spectral_radius(matrix: Tensor) -> float:
    """The size of the largest eigenvalue."""
    return float(torch.linalg.eigvals(matrix).abs().max())


def fuzz_layer(seed: int, index: int) -> list[str]:
    """What is wrong with one case, one line each, the case in it."""
    case = draw_layer(seed, index)
    return [f"{what}: layer {case}" for what in Judge(case).run()]
