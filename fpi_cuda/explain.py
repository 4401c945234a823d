"""What a solve will do, and why, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from fpi_cuda import ops
from fpi_cuda.evaluation.shortcuts import why_rows_unknown
from fpi_cuda.evaluation.state import Layout
from fpi_cuda.loops import plan_of
from fpi_cuda.loops.adjoint import LOOSEST_BY_ATOL
from fpi_cuda.loops.fused import says_how
from fpi_cuda.loops.plan import Plan, Unavailable
from fpi_cuda.loops.traced import words_of
from fpi_cuda.options import (
    MAX_DEPTH,
    PRECISIONS,
    Anderson,
    Implicit,
    JacobianFree,
    Neumann,
    Options,
    Phantom,
    Unroll,
    default_adjoint_solver,
)
from fpi_cuda.solution import AdjointRecord, Route

HOST_LOOP = "host loop: torch evaluates g, then one solver step advances all samples"
DEVICE_LOOP = (
    "device loop: a CUDA graph repeats g and the solver's step until all samples have stopped"
)


def explain(
    options: Options,
    g: Any,
    device: torch.device,
    dtype: torch.dtype,
    record: AdjointRecord | None = None,
) -> str:
    """Which way a solve goes for states of this device and dtype: one line per choice.

    Args:
        record: of the latest solve, if there was one.
    """
    features = getattr(g, "x_features", None) or 1
    layout = Layout((torch.Size((features,)),), is_tuple=False, batch=1, dtype=dtype, device=device)
    refused = None
    try:
        plan = plan_of(g, layout, options, rehearse=True)
    except Unavailable as error:
        refused = f'none: route="{options.route}" asks for the {options.route} loop, but '
        refused += error.reason
        plan = plan_of(g, layout, replace(options, route="host"))
    options = plan.options
    lines = {
        "route": taken(plan, g, record)
        if record and record.route
        else refused or foreseen(plan, g),
        "backend": backend_line(options, device, dtype),
        "solver": f"{options.solver}; a sample stops at ||g(x) - x|| <= {options.atol:g} + "
        f"{options.rtol:g} ||g(x)||, or after {options.max_steps} evaluations",
        "samples": samples_line(
            plan,
            g,
            joint=record is not None and record.joint,
            captured=record is not None and record.form is not None,
        ),
        "inputs": inputs_line(plan.whole),
        "adjoint": adjoint_line(options),
    }
    if record is not None and record.route is not None:
        lines["route"] = taken(plan, g, record)
    if options.precision != "ieee" and not lines["route"].startswith("fused"):
        lines["precision"] = f'as torch computes g: "{options.precision}" is for the fused loop'
    return "\n".join(f"{name:<8} {text}" for name, text in lines.items())


def foreseen(plan: Plan, g: object) -> str:
    """Who will run the loop, as far as that is known before a solve."""
    way = Route(plan.loop.name, plan.reasons)
    if way.name == "fused" and not says_how(g):
        return (
            f"{HOST_LOOP}; or the fused loop, where the first solve finds that g, once traced, "
            "has a form that the kernels run"
        )
    if way.name == "fused":
        return (
            f"{fused_loop(plan, g)}. Where x is not (batch, features), under autocast and inside "
            "torch.func transforms it is the host loop"
        )
    if way.name == "device":
        return (
            f"{DEVICE_LOOP}; the host does where g cannot be captured, which is not known yet "
            f"(not fused: {way.reason})"
        )
    return f"{HOST_LOOP} ({way.reason})"


def taken(plan: Plan, g: object, record: AdjointRecord) -> str:
    """Who ran the loop of the latest solve, and of its adjoint."""
    way, adjoint = record.route, record.adjoint_route
    assert way is not None
    if way.name == "host":
        trace = words_of(g)
        return f"{HOST_LOOP} ({way.reason}){f'; {trace}' if trace else ''}"
    words = fused_loop(plan, g) if way.name == "fused" else DEVICE_LOOP
    if record.form is not None:
        words = f"{words}. g was captured as {record.form}"
    if adjoint is None:
        return words
    if adjoint.name == "host":
        return f"{words}; the adjoint by the host loop ({adjoint.reason})"
    return f"{words}; the adjoint likewise"


def fused_loop(plan: Plan, g: object) -> str:
    """The fused loop, its tile and its precision."""
    options, dtype, engine = plan.options, plan.layout.dtype, cast("Any", plan.engine)
    depth = options.solver.m if isinstance(options.solver, Anderson) else 0
    hidden = getattr(getattr(g, "energy", g), "hidden_features", 0)
    precision = PRECISIONS.index(options.precision) if dtype == torch.float32 else 0
    words = engine.cell_loop_words(
        plan.layout.dim, hidden, depth, dtype, precision, plan.layout.device
    )
    return (
        f"fused loop: {words}, {arithmetic(options, dtype)}; one that stops makes room for the next"
    )


def arithmetic(options: Options, dtype: torch.dtype) -> str:
    """What the fused loop computes in."""
    name = str(dtype).removeprefix("torch.")
    if options.precision == "ieee":
        return f"in IEEE {name}"
    if dtype != torch.float32:
        return f'in IEEE {name} (precision="{options.precision}" is for float32)'
    return f"products in {options.precision} and sums in float32, judged by g in the end"


def backend_line(options: Options, device: torch.device, dtype: torch.dtype) -> str:
    """Whose kernels take the steps."""
    name = ops.resolve(options.backend, device, dtype).name
    if options.backend is not None:
        reason = "asked for"
    else:
        fast = "cuda" if device.type == "cuda" else "native"
        missing = ops.why_not(fast, device, dtype)
        reason = "the best available" if missing is None else f"{fast} is unavailable: {missing}"
    return f"{name} for {dtype} on {device} ({reason})"


def samples_line(plan: Plan, g: object, *, joint: bool, captured: bool) -> str:
    """What becomes of samples that have stopped.

    Args:
        captured: g was, in the latest solve.
        joint: rows were seen to depend on one another in the latest solve.
    """
    options = plan.options
    if not options.batch_dims:
        return "the whole state is one (batch_dims=0)"
    if captured:
        return "stopped ones leave the batch: the form of g shows that its rows are independent"
    if joint:
        return "all were solved as one, for rows of g were seen to depend on one another"
    source = "g.rowwise" if options.rowwise is None else "rowwise"
    if options.rowwise is None and getattr(g, "rowwise", False):
        reason = why_rows_unknown(g)
        if reason is not None:
            return f"all are evaluated until the last one stops (g.rowwise is True, but {reason})"
    if plan.rowwise:
        return (
            f"stopped ones leave the batch ({source} is True), where all that g reads has the "
            "batch in dim 0"
        )
    return (
        f"all are evaluated until the last one stops ({source} is not True); rows that are seen to "
        "depend on one another are solved as one"
    )


def inputs_line(whole: str | None) -> str:
    """What is computed once per solve.

    Args:
        whole: why prepare and step do not stand for g; None if they do.
    """
    if whole is None:
        return "g.prepare(*z) runs once per solve, g.step(x, prepared) once per step"
    return f"g(x, *z) runs whole in every step ({whole})"


def adjoint_line(options: Options) -> str:
    """Where gradients come from."""
    adjoint = options.adjoint
    if isinstance(adjoint, Implicit):
        solver, whose = adjoint.solver, "asked for"
        if solver is None:
            solver, whose = default_adjoint_solver(options.solver, MAX_DEPTH), "the forward's"
            if isinstance(solver, Anderson):
                whose = "the forward's without a ridge, at most as deep as x is long: c is linear"
        rtol = f"{options.rtol if adjoint.rtol is None else adjoint.rtol:g}"
        if adjoint.rtol is None and options.atol:
            rtol = f"({rtol} + {options.atol:g} / ||x||, at most {LOOSEST_BY_ATOL:g})"
        max_steps = options.adjoint_steps
        return (
            f"exact: c = J^T c + v to ||.|| <= {rtol} ||v|| by {solver} ({whose}), at most "
            f"{max_steps} products"
        )
    if isinstance(adjoint, JacobianFree):
        return "approximate: c = v, the identity for (I - J)^-T"
    if isinstance(adjoint, Neumann):
        return f"approximate: c = v + J^T v + ... + (J^T)^{adjoint.k} v"
    if isinstance(adjoint, Phantom):
        return f"approximate: through {adjoint.k} steps of damping {adjoint.tau:g} at the solution"
    assert isinstance(adjoint, Unroll)
    return "through every step of the solver, which runs in plain torch where grad mode is on"
