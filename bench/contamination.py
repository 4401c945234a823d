"""How far a sample's answer moves when hard or NaN neighbours join its batch."""

from __future__ import annotations

from typing import Any

import torch

from bench.measure import time_limit
from bench.problems import Problem
from bench.settings import Chosen

WATCHED = 32
EASY_SCALE = 3.0
"""Inputs this large saturate the tanh cell: those samples converge in a few steps."""

LONGEST = 30.0
"""Seconds of a solve that is watched."""

SLACK = 2.0
"""Tolerances were found on other inputs: close to rtol counts."""


def contamination(chosen: Chosen, problem: Problem, seed: int = 2) -> dict[str, Any]:
    """Solve 32 easy samples beside 32 others: easy, hard, or NaN.

    Returns:
        for "hard" and "nan" neighbours: moved, the largest relative change of a watched answer
        against easy neighbours; solved, the share of watched samples within SLACK rtol; steps, the
        mean over the watched samples. An exception is reported as `error`.
    """
    generator = torch.Generator().manual_seed(seed)
    features = problem.z.shape[1]
    watched = EASY_SCALE * torch.randn(WATCHED, features, generator=generator)
    neighbours = {
        "easy": EASY_SCALE * torch.randn(WATCHED, features, generator=generator),
        "hard": 0.1 * torch.randn(WATCHED, features, generator=generator),
        "nan": torch.full((WATCHED, features), torch.nan),
    }
    peer, tol = chosen.forward.peer, chosen.forward.tol.tol
    result: dict[str, Any] = {"label": chosen.label, "setting": peer.name}
    alone = None
    for kind, others in neighbours.items():
        batch = problem.with_inputs(torch.cat([watched, others]).to(problem.z))
        try:
            with time_limit(LONGEST):
                x = peer.solve(batch, tol)
                steps = peer.num_steps(batch, tol)
        except Exception as error:
            result[kind] = {"error": type(error).__name__}
            continue
        answer = x[:WATCHED].double()
        alone = answer if alone is None else alone
        moved = ((answer - alone).norm(dim=1) / alone.norm(dim=1)).max()
        solved = batch.true_residual(x)[:WATCHED] <= SLACK * problem.rtol
        result[kind] = {
            "moved": float(torch.nan_to_num(moved, nan=torch.inf)),
            "solved": float(solved.double().mean()),
            "steps": float(steps[:WATCHED].double().mean()),
        }
    return result
