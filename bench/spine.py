"""How long the way from a layer to the op is, and how much code its gradient takes.

    python -m bench.spine [--calls host|fused] [--out DIR]

For a host solve and a fused one on the CPU, a later call of a layer: Python calls inside
fpi_cuda, functions, files, how often the next call is in another file, and how many frames of
fpi_cuda lie between the caller and the op. For the derivative code: statements, branches, and uses
of names that are private to torch. Results go to DIR/spine.json. With --calls the calls of one
forward pass are printed instead, a line for each change of file.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fpi_cuda as fpi
from bench import machine
from bench.record import Record
from bench.report import piped

PACKAGE = Path(fpi.__file__).parent
DERIVATIVE_CODE = (
    "autograd/*.py",
    "evaluation/bound_map.py",
    "evaluation/transforms.py",
    "loops/adjoint.py",
)
"""Of fpi_cuda: what stands between g and its gradient."""

BATCH, FEATURES, STEPS, REPEATS = 8, 16, 3, 9
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case, ast.BoolOp,
    ast.comprehension,
)  # fmt: skip

SOLVERS = ("anderson_step_", "broyden_step_", "cell_loop_", "step", "solve")
"""The ops that solve, and the host loop's way to what they do; others look at what was solved."""
OURS = ("self", "cls", "other")
"""What objects of this package's own classes are called in their methods."""
NAMED_SO = {"_asdict", "_fields", "_getframe", "_make", "_replace"}
"""Public in spite of the underscore: of named tuples, and of sys."""

COLUMNS = ("calls", "functions", "files", "changes", "frames")
Call = tuple[str, str]
"""The file, below fpi_cuda, and the function."""


class Trace(NamedTuple):
    """What one call did inside fpi_cuda.

    Attributes:
        calls: of Python functions, in order.
        frames: of fpi_cuda, on the stack where an op of it was called: the most, by op.
    """

    calls: list[Call]
    frames: dict[str, int]

    def changes(self) -> int:
        """How often the next call is in another file."""
        return sum(a[0] != b[0] for a, b in itertools.pairwise(self.calls))

    def row(self) -> dict[str, int]:
        """What the table shows."""
        return {
            "calls": len(self.calls),
            "functions": len(set(self.calls)),
            "files": len({file for file, _ in self.calls}),
            "changes": self.changes(),
            "frames": max((self.frames.get(op, 0) for op in SOLVERS), default=0),
        }


def file_of(frame: FrameType) -> str | None:
    """Where a frame's code stands below fpi_cuda; None for other code."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def traced(call: Callable[[], object]) -> Trace:
    """call(), looked at; on whatever thread autograd uses."""
    calls: list[Call] = []
    frames: dict[str, int] = {}
    known: dict[Any, str | None] = {}

    def note(op: str, frame: FrameType) -> None:
        depth = sum(file_of(f) is not None for f in stack(frame))
        frames[op] = max(depth, frames.get(op, 0))

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__module__", "") == "fpi_cuda._C":
            note(called.__name__, frame)
        if event != "call":
            return
        code = frame.f_code
        if code not in known:
            known[code] = file_of(frame)
        file = known[code]
        if file is not None:
            calls.append((file, getattr(code, "co_qualname", code.co_name)))
        elif code.co_filename.endswith("_ops.py") and code.co_name == "__call__":
            package, _, name = str(frame.f_locals["self"]).partition(".")
            if package == "fpi_cuda":
                note(name.partition(".")[0], frame)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return Trace(calls, frames)


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def layer_of(route: str) -> fpi.FPILayer:
    """A layer that goes this way: "host" takes three steps with a plain g, "fused" has a cell."""
    if route == "fused":
        return fpi.FPILayer(fpi.cells.Dense(FEATURES, FEATURES), route="fused")
    weight = (torch.randn(FEATURES, FEATURES) * 0.1).requires_grad_()

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight + z)

    return fpi.FPILayer(g, route="host", max_steps=STEPS, rtol=0.0)


def way(route: str) -> dict[str, Trace]:
    """What a layer's later calls do, forward, backward and under no_grad; of several, the worst.

    They differ by the order in which a set of a graph's nodes is gone through.
    """
    torch.manual_seed(0)
    layer, z = layer_of(route), torch.randn(BATCH, FEATURES, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fpi.FixedPointWarning)
        layer(z).sum().backward()
        forward = worst(lambda: traced(lambda: layer(z)))
        backward = worst(lambda: traced(layer(z).sum().backward))
        with torch.no_grad():
            layer(z)
            no_grad = worst(lambda: traced(lambda: layer(z)))
    return {"forward": forward, "backward": backward, "no_grad": no_grad}


def worst(once: Callable[[], Trace]) -> Trace:
    """The one of several with most changes of file."""
    return max((once() for _ in range(REPEATS)), key=Trace.changes)


class Code(NamedTuple):
    """How much code there is.

    Attributes:
        files, lines: of source.
        statements: ast.stmt nodes, docstrings included. docstrings: how many of them are such.
        branches: what may go two ways: conditions, loops, handlers, `and` and `or`.
        private: uses of names that are private to torch, by name.
    """

    files: int
    lines: int
    statements: int
    docstrings: int
    branches: int
    private: dict[str, int]


def code_of(patterns: Sequence[str]) -> Code:
    """All modules of fpi_cuda that match one of the patterns."""
    sources = [p.read_text() for pattern in patterns for p in sorted(PACKAGE.glob(pattern))]
    trees = [ast.parse(source) for source in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    private: dict[str, int] = {}
    for tree in trees:
        for name in private_names(tree):
            private[name] = private.get(name, 0) + 1
    return Code(
        len(sources),
        sum(len(source.splitlines()) for source in sources),
        sum(isinstance(node, ast.stmt) for node in nodes),
        sum(map(is_docstring, nodes)),
        sum(isinstance(node, BRANCHES) for node in nodes),
        dict(sorted(private.items())),
    )


def is_docstring(node: ast.AST) -> bool:
    """Whether it is a statement that is only a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module) -> Iterator[str]:
    """Each use of a name that is private to torch, as far as the source shows.

    That is an attribute that begins with one underscore and that this package does not define, or
    whatever is reached through such a module of torch, also by the name it was imported as.
    """
    known = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            known.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
    inner: set[int] = set()
    for node in ast.walk(tree):  # the outermost attribute of a chain comes first
        if id(node) in inner:
            continue
        if isinstance(node, (ast.Attribute, ast.Name)):
            base: ast.expr = node
            names: list[str] = []
            while isinstance(base, ast.Attribute):
                names.insert(0, base.attr)
                base = base.value
                inner.add(id(base))
            root = base.id if isinstance(base, ast.Name) else ""
            if root in known:
                path = [*known[root].split("."), *names]
                if any(map(is_private, path)):
                    yield ".".join(path)
            elif any(is_private(n) and n not in OWN for n in names) and root not in OURS:
                yield f".{names[-1]}"
        elif isinstance(node, ast.Call) and called(node) in ("getattr", "hasattr", "attrgetter"):
            yield from (
                f".{a.value!s}"
                for a in node.args
                if isinstance(a, ast.Constant) and is_private(str(a.value)) and a.value not in OWN
            )


def called(node: ast.Call) -> str:
    """The name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def own_names() -> set[str]:
    """Private names that fpi_cuda defines: functions, classes, and what is assigned to."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id in OURS
            ):
                found.add(node.attr)
    return {name for name in found if is_private(name)} | NAMED_SO


OWN = own_names()


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, and keep."""
    parser = argparse.ArgumentParser(prog="bench.spine", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", choices=("host", "fused"), help="print the calls of a forward")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="results folder")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.calls:
        for file, group in itertools.groupby(way(given.calls)["forward"].calls, lambda c: c[0]):
            print(f"{file}: {' | '.join(name for _, name in group)}")
        return
    where = machine.describe(torch.device("cpu"), 1, machine.command_line())
    record = Record(given.out / "spine.json", {"kind": "spine", "machine": where})
    print("solve, pass     " + "".join(f"{name:>11}" for name in COLUMNS))
    for route in ("host", "fused"):
        rows = {name: trace.row() for name, trace in way(route).items()}
        record.results[route] = rows
        for name, row in rows.items():
            print(f"{route:6}{name:10}" + "".join(f"{row[c]:11}" for c in COLUMNS))
    code = code_of(DERIVATIVE_CODE)
    record.results["derivative_code"] = {"modules": list(DERIVATIVE_CODE), **code._asdict()}
    print(
        f"\nderivative code ({', '.join(DERIVATIVE_CODE)}): {code.files} files, {code.lines} lines,"
        f"\n{code.statements} statements ({code.statements - code.docstrings} without docstrings), "
        f"{code.branches} branches,\n{sum(code.private.values())} uses of {len(code.private)} names"
        " private to torch:"
    )
    for name, uses in code.private.items():
        print(f"  {uses:3} {name}")
    record.results["readme"] = section(record.results)
    record.finish()
    print("written:", record.path)


def section(results: dict[str, Any]) -> str:
    """The section of bench/results/README.md: the counts, a line for each pass."""
    table = [("solve", "pass", *COLUMNS)]
    for route in ("host", "fused"):
        for name, row in results[route].items():
            table.append((route, name, *(str(row[column]) for column in COLUMNS)))
    code, where = results["derivative_code"], results["machine"]
    return (
        "### The way from a layer to the op\n\nPython calls inside fpi_cuda in a later call of a "
        "layer, functions, files, changes of file, and frames between the caller and the op.\n\n"
        f"{piped(table)}\n\nDerivative code: {code['files']} files, {code['statements']} "
        f"statements, {sum(code['private'].values())} uses of names private to torch. Commit "
        f"{where['commit']}, {where['date']}: `python -m bench.spine`."
    )


if __name__ == "__main__":
    main()
