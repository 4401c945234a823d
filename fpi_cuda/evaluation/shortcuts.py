"""What hangs on a call of g, and whether prepare and step may stand for that call."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fpi_cuda.evaluation.modules import modules_in

LINEAR = nn.Linear
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LINEAR_PARTS = ("A", "B", "W")
"""What the cells of this package call their Linears."""
NOTHING_TO_HOIST = "it has no prepare and step"
WRITTEN_OTHERWISE = (
    "its call is not written as return self.step(x, self.prepare(*z)), so they may differ"
)
ALL_HOOKED = "there are hooks on all modules, which must see their evaluations"


def written_as(function: Any, name: str) -> Any:
    """`function`, if it is the one that torch wrote under this name; None if it was replaced.

    Some libraries replace it before this one is imported.
    """
    written = getattr(getattr(function, "__code__", None), "co_qualname", name)
    return function if written == name else None


CALL = written_as(nn.Module.__call__, "Module._wrapped_call_impl")
CALL_IMPL = written_as(nn.Module._call_impl, "Module._call_impl")
LINEAR_FORWARD = written_as(LINEAR.forward, "Linear.forward")
FUNCTIONAL_LINEAR = torch._C._nn.linear


def offers_hoisting(g: object) -> bool:
    """Whether g separates what does not depend on x."""
    return callable(getattr(g, "prepare", None)) and callable(getattr(g, "step", None))


def why_not_hoisted(g: object) -> str | None:
    """Why g(x, *z) may be something else than step(x, prepare(*z)), or None.

    It is the same only where the call says so itself, see is_composition: a call that is written
    otherwise may agree today, and for these inputs, and not tomorrow.
    """
    if not offers_hoisting(g):
        return NOTHING_TO_HOIST
    reason = why_call_matters(g) if isinstance(g, nn.Module) else None
    if reason is not None or is_composition(g):
        return reason
    return redefined(g) or WRITTEN_OTHERWISE


def why_call_matters(module: nn.Module) -> str | None:
    """Why a call of this module may be more than its class's forward(), or None."""
    return ALL_HOOKED if hooks_on_all() else why_own_call_matters(module)


def why_own_call_matters(module: nn.Module) -> str | None:
    """The same where there are no hooks on all modules."""
    own = module.__dict__
    if (
        own.get("_forward_hooks")
        or own.get("_forward_pre_hooks")
        or own.get("_backward_hooks")
        or own.get("_backward_pre_hooks")
    ):
        return f"{type(module).__name__} has hooks, which must see its evaluations"
    if "forward" in own or "_call_impl" in own:
        return f"{type(module).__name__} has a forward() that was set on the instance"
    if own.get("_compiled_call_impl") is not None:
        return f"{type(module).__name__} was compiled to be called whole"
    kind = type(module)
    if kind.__call__ is not CALL or kind._call_impl is not CALL_IMPL:
        return f"{type(module).__name__} is not called as nn.Module is"
    return None


def any_backward_hooks(g: object) -> bool:
    """Whether g is a module with backward hooks on it, on one inside it, or on all modules."""
    if not isinstance(g, nn.Module):
        return False
    on_all = torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    return bool(on_all) or any(
        part._backward_hooks or part._backward_pre_hooks for part in modules_in(g)
    )


def hooks_on_all() -> bool:
    """Whether there are hooks on all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_composition(g: object) -> bool:
    """Whether a call of g, hooks aside, is step(x, prepare(*z)) in so many words.

    Read off the code, so that nothing has to be evaluated for it. False where it is written in
    another way.
    """
    kind: Any = type(g)
    called = kind.forward if isinstance(g, nn.Module) else kind.__call__
    if called is nn.Module.forward:
        return True  # There is no other meaning that a call could have.
    return (
        type(called) is FunctionType
        and called.__defaults__ is None
        and shape_of(called) in COMPOSITIONS
    )


def shape_of(function: Any) -> tuple[Any, ...]:
    """What two functions share that do the same with the names in co_names."""
    code = function.__code__
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount


def in_two_lines(self: Any, x: Any, *z: Any) -> Any:
    """The composition, as some write it."""
    prepared = self.prepare(*z)
    return self.step(x, prepared)


WAYS: tuple[Callable[..., Any], ...] = (
    in_two_lines,
    lambda self, x, *z: self.step(x, self.prepare(*z)),
    lambda self, x: self.step(x, self.prepare()),
    lambda self, x, z: self.step(x, self.prepare(z)),
    lambda self, x, y, z: self.step(x, self.prepare(y, z)),
)
COMPOSITIONS = {shape_of(way) for way in WAYS}


def redefined(g: object) -> str | None:
    """Why the call was given another meaning than step and prepare have, or None."""
    call = "forward" if isinstance(g, nn.Module) else "__call__"
    if not all(redefined_below(g, (call,), method) for method in ("step", "prepare")):
        return None
    return f"{plain_classes(g)[0].__name__} redefines {call}() and inherits step()"


def redefined_below(owner: object, methods: tuple[str, ...], description: str) -> str | None:
    """The first of these methods that is defined nearer to `owner` than `description` is.

    Nearest is the instance, then its class, then the class above it.
    """
    own = getattr(owner, "__dict__", {})
    for names in ((*own, *own.get("_modules", ())), *map(vars, plain_classes(owner))):
        if description in names:
            break
        for method in methods:
            if method in names:
                return method
    return None


def plain_classes(owner: object) -> tuple[type, ...]:
    """The classes of `owner`, without the one that holds its parametrizations."""
    classes = type(owner).__mro__
    parametrized = isinstance(owner, nn.Module) and "parametrizations" in owner._modules
    return classes[1:] if parametrized else classes


def why_parts_matter(module: nn.Module) -> str | None:
    """Why calls of a module, or of one inside it, must not be passed over, or None."""
    if hooks_on_all():
        return ALL_HOOKED
    reasons = map(why_own_call_matters, modules_in(module))
    return next(filter(None, reasons), None) or why_linear_matters()


def why_linear_matters() -> str | None:
    """Why a Linear may compute something else than its weight and bias say, or None."""
    if LINEAR.forward is LINEAR_FORWARD and functional.linear is FUNCTIONAL_LINEAR:
        return None
    return "nn.Linear.forward() or functional.linear() was replaced"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the value of a call of the module is weight x + bias, hooks on all aside.

    It is asked at every step, so functional.linear() is left to why_parts_matter.
    """
    own = module.__dict__
    return (
        type(module).forward is LINEAR_FORWARD
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and "forward" not in own
    )


def why_modes_matter() -> str | None:
    """Why what torch computes must not be passed over, whoever asks for it, or None."""
    modes: list[Any] = []
    if torch._C._len_torch_function_stack():
        modes += _get_current_function_mode_stack()
    if torch._C._len_torch_dispatch_stack():
        modes += _get_current_dispatch_mode_stack()
    for mode in modes:
        own = type(mode).__module__.startswith("fpi_cuda.")
        if not own and not isinstance(mode, DeviceContext):
            return f"a {type(mode).__name__} is active, which must see what torch computes"
    return None


def why_not_captured(g: object) -> str | None:
    """Why each evaluation of g has to run its Python code, or None if that is not known.

    Hooks of torch's weight_norm, spectral_norm and pruning only compute weights: they may run once.
    """
    if not isinstance(g, nn.Module):
        return None
    if hooks_on_all():
        return ALL_HOOKED
    for part in modules_in(g):
        own = vars(part)
        hooks = [type(hook) for kind in HOOKS for hook in (own.get(kind) or {}).values()]
        if not all(hook.__module__.startswith("torch.nn.utils.") for hook in hooks):
            return f"{type(part).__name__} has hooks, which must see its evaluations"
    return None


def asks_rowwise(g: object, rowwise: bool | None, batch_dims: int) -> bool:
    """Whether the option or g promises that g may be evaluated on some rows alone."""
    if not batch_dims:
        return False
    if rowwise is not None:
        return rowwise
    return bool(getattr(g, "rowwise", False)) and why_rows_unknown(g) is None


def why_rows_unknown(g: object) -> str | None:
    """Why a class's claim to be row-wise need not hold of this g, or None if it does.

    What hangs on a call may look at all rows, and so may batch norm, and modules that were put
    in the place of a cell's own.
    """
    reason = None
    if offers_hoisting(g) and not is_composition(g):
        reason = redefined(g)
        call = "forward" if isinstance(g, nn.Module) else "__call__"
        if reason is None and redefined_below(g, (call,), "rowwise"):
            reason = WRITTEN_OTHERWISE  # by a class below the one that claims to be row-wise
    if reason is not None or not isinstance(g, nn.Module):
        return reason
    if hooks_on_all():
        return ALL_HOOKED
    for part in modules_in(g):
        reason = why_own_call_matters(part)
        if reason is not None:
            return reason
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            return f"{type(part).__name__} computes with all samples"
        for name, child in part._modules.items() if is_ours(part) else ():
            kind = type(child)
            if name in LINEAR_PARTS and getattr(kind, "forward", None) is not LINEAR_FORWARD:
                return f"{type(part).__name__}.{name} is a {kind.__name__}, not nn.Linear"
    return why_linear_matters()


def is_rowwise_by_construction(g: object) -> bool:
    """Whether nobody's word is needed for it: g is a cell of this package, as it was written."""
    return is_ours(g) and is_ours(getattr(g, "energy", g)) and why_rows_unknown(g) is None


def is_ours(part: object) -> bool:
    """Whether it is a cell of this package, or a part of one."""
    return type(part).__module__.startswith("fpi_cuda.cells.")
