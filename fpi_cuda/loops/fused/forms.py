"""A user's g that was captured as what the kernels run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda.evaluation.modules import modules_of
from fpi_cuda.loops.capture import Capture, Captures, Kind, leaf_of, traced
from fpi_cuda.loops.fused.recognise import recognised
from fpi_cuda.lowered import Lowered, NotLowered

NO_LOWER = "has no lower(prepared)"

KNOWN_MODULES = frozenset(
    (
        nn.Linear, nn.Identity, nn.Dropout, nn.Tanh, nn.ReLU, nn.Sigmoid, nn.GELU, nn.Softplus,
        nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
    )
)  # fmt: skip
"""Modules of torch that a map of the kernels' form is made of."""


def why_of_no_form(g: Any) -> str | None:
    """Which module of torch in g shows that it has none of the kernels' forms; None: none does."""
    for part in modules_of(g):
        kind = type(part)
        if isinstance(part, torch.jit.ScriptModule):
            return "it is in TorchScript"
        if kind.__module__.startswith("torch.nn.modules.") and kind not in KNOWN_MODULES:
            return f"the kernels have no {kind.__name__}"
    return None


class Forms(Captures):
    """Those captures, whose `found` is a Form."""

    def made(
        self, kind: Kind, g: Any, x: Tensor, z: tuple[Any, ...], *, fresh: bool = False
    ) -> Capture:
        """See Captures; with an x that requires grad where g makes a leaf of one that does not.

        Args:
            fresh: Dynamo has not met the evaluations of this kind.
        """
        try:
            return traced(self.read, kind.evaluation, g, x, z)
        except NotLowered as refusal:
            if "requires_grad_()" not in str(refusal):
                raise
        try:
            found = traced(self.read, kind.evaluation, g, leaf_of(x), z)
        except NotLowered as refusal:
            if "requires_grad_()" not in str(refusal):
                raise
            raise NotLowered("it takes a derivative by what it detached from x") from refusal
        found.plain = traced(self.read, kind.plain_evaluation, g, x, z, plain=True)
        if not found.found.differentiates or found.found.code != found.plain.found.code:
            if fresh:
                raise NotLowered("it computes another value where x requires grad")
            # Dynamo may have learnt of one evaluation alone that batches differ.
            kind.begin_anew()
            return self.made(kind, g, x, z, fresh=True)
        return found


forms = Forms(recognised, grad=True, why_not=why_of_no_form, refusal=f"{{}} {NO_LOWER}, and {{}}")


def lowered_by(capture: Capture, given: tuple[Any, ...]) -> Lowered:
    """The map that g is where it reads these, with the graph that the grad mode allows."""
    form = capture.found
    return form.lowered(form.hoisted(*given))
