"""A solver and an adjoint of every kind."""

from __future__ import annotations

import fpi_cuda as fpi

SOLVERS = [fpi.Picard(), fpi.Anderson(m=5), fpi.Broyden(m=5)]
ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.Implicit(solver=fpi.ConjugateGradient()),
    fpi.JacobianFree(),
    fpi.Phantom(k=3, tau=0.5),
    fpi.Neumann(k=5),
    fpi.Unroll(),
]
