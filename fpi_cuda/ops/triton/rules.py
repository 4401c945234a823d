"""fpi_cuda.ops.rules for Triton: the same source, with triton.language in the place of torch."""

import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fpi_cuda.ops import rules
from fpi_cuda.ops.solver_state import CONTROL_SIZE, NORMS, counter_at

# Triton's kernels may read no other globals than these.
ACTIVE = tl.constexpr(rules.ACTIVE)
STOP, MIX, PICARD, REJECT, RETURN, ANCHOR = map(tl.constexpr, rules.MOVES)
CONTROL_STRIDE = tl.constexpr(CONTROL_SIZE)
NUM_NORMS = tl.constexpr(len(NORMS))
FLOATS = tl.constexpr(tl.pointer_type(tl.float32))
FIRST_COUNTER = tl.constexpr(2 * len(NORMS))
LEAST_FLOOR = tl.constexpr(counter_at("floor"))
COLUMNS = tl.constexpr(counter_at("columns"))
HEAD = tl.constexpr(counter_at("head"))
HAS_PREVIOUS = tl.constexpr(counter_at("has_previous"))

SCOPE: dict[str, Any] = {
    name: tl.constexpr(value) for name, value in vars(rules).items() if type(value) in (int, float)
}
SCOPE.update(xp=tl, Tensor=tl.tensor, __name__=__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """A function of fpi_cuda.ops.rules as a Triton kernel may call it."""
    kernel = triton.jit(types.FunctionType(function.__code__, SCOPE))
    SCOPE[function.__name__] = kernel
    return kernel


drift_limits = compiled(rules.drift_limits)
decide = compiled(rules.decide)
solve_small = compiled(rules.solve_small)
worth_mixing = compiled(rules.worth_mixing)
