"""A plan that is kept is not used for a g that has changed, in whichever way it has."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import changing_maps as maps
import pytest
import torch
from changing_maps import F64, B, Case, D, by_hand, orthogonal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fpi_cuda as fpi
from fpi_cuda import cells
from fpi_cuda.loops import capture, traced
from fpi_cuda.loops.fused.forms import forms

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

MODULE, FUNCTION, CELL = "module", "function", "cell"
ALL = (MODULE, FUNCTION, CELL)
BOTH = (MODULE, CELL)
WAYS: list[tuple[str, Callable[[Case], None]]] = []


def way(*kinds: str) -> Callable[[Any], Any]:
    """Put a change of g into the table, for these kinds of g."""

    def put(change: Callable[[Case], None]) -> Callable[[Case], None]:
        WAYS.extend((kind, change) for kind in kinds)
        return change

    return put


# What g holds.


@way(*ALL)
def data_swapped(case: Case) -> None:
    case.weight.data = orthogonal().data


@way(*ALL)
def data_swapped_for_strides(case: Case) -> None:
    case.weight.data = orthogonal().data.mT


@way(*ALL)
def data_multiplied(case: Case) -> None:
    case.weight.data.mul_(0.5)


@way(*ALL)
def edited_under_no_grad(case: Case) -> None:
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*ALL)
def entry_edited_by_numpy(case: Case) -> None:
    case.weight.detach().numpy()[1, 2] = 0.3


@way(*ALL)
def optimizer_step(case: Case) -> None:
    optimizer = torch.optim.SGD([t for t in case.all_leaves() if t is not case.z], lr=0.01)
    case.call().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@way(*ALL)
def storage_set(case: Case) -> None:
    with torch.no_grad():
        case.weight.set_(orthogonal().detach())


@way(*BOTH)
def parameter_replaced(case: Case) -> None:
    case.first.weight = nn.Parameter(orthogonal().detach())


@way(*BOTH)
def parameter_became_tensor(case: Case) -> None:
    del case.first.weight
    case.first.weight = orthogonal().detach()


@way(*BOTH)
def parameter_became_computed(case: Case) -> None:
    leaf = orthogonal()
    del case.first.weight
    case.first.weight = 0.5 * leaf.sin()
    case.leaves = [leaf, case.z]


@way(*BOTH)
def state_loaded(case: Case) -> None:
    state = {name: 0.7 * t for name, t in case.g.state_dict().items()}
    case.g.load_state_dict(state)


@way(*BOTH)
def state_assigned(case: Case) -> None:
    state = {name: (0.7 * t).detach() for name, t in case.g.state_dict().items()}
    case.g.load_state_dict(state, assign=True)


@way(*BOTH)
def bias_removed(case: Case) -> None:
    linear = case.first if case.kind == MODULE else case.g.B
    linear.bias = None


@way(CELL)
def bias_added(case: Case) -> None:
    case.first.bias = nn.Parameter(torch.ones(D, dtype=F64))


@way(*ALL)
def no_longer_trained(case: Case) -> None:
    case.weight.requires_grad_(False)


@way(*ALL)
def frozen_and_back(case: Case) -> None:
    case.weight.requires_grad_(False)
    case.compare()
    case.weight.requires_grad_(True)


@way(*BOTH)
def all_frozen(case: Case) -> None:
    case.g.requires_grad_(False)


@way(*BOTH)
def tied(case: Case) -> None:
    linear = case.g.inputs[0] if case.kind == MODULE else case.g.B
    linear.weight = case.first.weight


@way(FUNCTION)
def closed_over_tensor_exchanged(case: Case) -> None:
    case.cell("weight").cell_contents = orthogonal()


@way(FUNCTION)
def closed_over_tensor_computed(case: Case) -> None:
    leaf = orthogonal()
    case.cell("weight").cell_contents = 0.5 * leaf.sin()
    case.leaves = [leaf, case.z]


@way(FUNCTION)
def closed_over_number(case: Case) -> None:
    for number in (0.5, 0.7, 0.9):
        case.cell("size").cell_contents = number
        case.compare()


@way(MODULE)
def number(case: Case) -> None:
    for number in (0.5, 0.7, 0.9, 1):
        case.g.size = number
        case.compare()


@way(MODULE)
def number_became_tensor(case: Case) -> None:
    leaf = torch.tensor(0.7, dtype=F64, requires_grad=True)
    case.g.size = leaf
    case.leaves = [leaf, case.z, case.weight]


@way(MODULE)
def number_became_parameter(case: Case) -> None:
    del case.g.size
    case.g.size = nn.Parameter(torch.tensor(0.7, dtype=F64))


@way(MODULE)
def list_element(case: Case) -> None:
    case.g.sizes[0] = 0.5


@way(MODULE)
def dict_entry(case: Case) -> None:
    case.g.named["a"] = 0.5


@way(MODULE)
def number_of_an_object_inside(case: Case) -> None:
    case.g.holder.size = 0.5


@way(MODULE)
def object_inside_replaced(case: Case) -> None:
    class Other(maps.Holder):
        def sized(self, u: Tensor) -> Tensor:
            return 0.5 * u

    case.g.holder = Other()


@way(MODULE)
def method_of_an_object_inside(case: Case) -> None:
    case.patch.setattr(maps.Holder, "sized", lambda self, u: 0.5 * u)


@way(MODULE)
def method_on_an_object_inside(case: Case) -> None:
    case.g.holder.sized = lambda u: 0.5 * u


@way(MODULE)
def number_of_the_class(case: Case) -> None:
    case.patch.setattr(maps.Map, "shared", 0.5)


@way(MODULE)
def number_over_that_of_the_class(case: Case) -> None:
    case.g.shared = 0.5


@way(MODULE)
def number_over_that_of_the_base(case: Case) -> None:
    case.patch.setattr(maps.Map, "of_the_base", 0.5, raising=False)


@way(MODULE)
def method_gone(case: Case) -> None:
    case.patch.delattr(maps.Map, "sized_by_map")


@way(MODULE, FUNCTION)
def method_of_an_object_by_name(case: Case) -> None:
    case.patch.setattr(maps.ByName, "sized", lambda self, u: 0.5 * u)


@way(MODULE, FUNCTION)
def method_over_that_of_an_object_by_name(case: Case) -> None:
    case.patch.setattr(maps.ByName, "kept", lambda self, u: 0.5 * u, raising=False)


@way(MODULE, FUNCTION)
def static_method_by_the_class(case: Case) -> None:
    case.patch.setattr(maps.ByName, "doubled", staticmethod(lambda u: u))


@way(MODULE, FUNCTION)
def code_of_a_method_of_an_object(case: Case) -> None:
    def sized(self: Any, u: Tensor) -> Tensor:
        return 0.5 * u

    case.patch.setattr(maps.ByName.sized, "__code__", sized.__code__)


@way(MODULE)
def table_of_the_class(case: Case) -> None:
    case.patch.setitem(maps.Map.table, "a", 0.5)


@way(MODULE, FUNCTION)
def number_by_name(case: Case) -> None:
    case.patch.setattr(maps, "SIZE", 0.5)


@way(MODULE, FUNCTION)
def table_by_name(case: Case) -> None:
    case.patch.setitem(maps.SIZES, "all", 0.5)


@way(MODULE, FUNCTION)
def default_argument(case: Case) -> None:
    function = maps.Base.forward if case.kind == MODULE else case.g
    case.patch.setattr(function, "__defaults__", (0.5,))


@way(MODULE, FUNCTION)
def default_argument_of_a_function(case: Case) -> None:
    case.patch.setattr(maps.moved, "__defaults__", (0.3,))


# What g does.


@way(MODULE, FUNCTION)
def function_by_name(case: Case) -> None:
    case.patch.setattr(maps, "bent", lambda u: torch.tanh(0.5 * u))


@way(MODULE, FUNCTION)
def function_called_by_a_function(case: Case) -> None:
    case.patch.setattr(maps, "moved", lambda u: 0.5 * u)


@way(MODULE, FUNCTION)
def code_of_a_function(case: Case) -> None:
    def other(u: Tensor, by: float = 0.0) -> Tensor:
        return 0.5 * u

    case.patch.setattr(maps.moved, "__code__", other.__code__)


@way(MODULE)
def code_of_forward(case: Case) -> None:
    def forward(self: Any, u: Tensor) -> Tensor:
        return torch.tanh(0.5 * u)

    case.patch.setattr(maps.Bent.forward, "__code__", forward.__code__)


@way(FUNCTION)
def code_of_g(case: Case) -> None:
    def other(weight: Tensor, size: float) -> Callable[..., Tensor]:
        def g(x: Tensor, z: Tensor, times: float = 1.0) -> Tensor:
            return torch.tanh(0.5 * size * x @ weight + z)

        return g

    case.g.__code__ = other(case.weight, 1.0).__code__


@way(*BOTH)
def forward_on_the_instance(case: Case) -> None:
    linear = case.first.weight
    case.g.forward = lambda x, z: torch.tanh(x @ linear.mT + 0.5 * z)


@way(*BOTH)
def forward_on_a_child(case: Case) -> None:
    linear = case.first
    linear.forward = lambda x: 0.5 * x @ linear.weight.mT


@way(*BOTH)
def forward_on_the_class(case: Case) -> None:
    kind = type(case.g)
    before = kind.forward
    case.patch.setattr(kind, "forward", lambda self, x, z: 0.5 * before(self, x, z))


@way(MODULE)
def forward_of_the_base(case: Case) -> None:
    before = maps.Base.forward
    case.patch.setattr(maps.Base, "forward", lambda self, x, z: 0.5 * before(self, x, z))


@way(MODULE)
def forward_of_a_childs_class(case: Case) -> None:
    case.patch.setattr(maps.Bent, "forward", lambda self, u: torch.tanh(0.5 * u))


@way(MODULE)
def method_of_the_class(case: Case) -> None:
    case.patch.setattr(maps.Base, "inherited", lambda self, u: 0.5 * u)


@way(MODULE)
def method_over_that_of_the_base(case: Case) -> None:
    case.patch.setattr(maps.Map, "inherited", lambda self, u: 0.5 * u, raising=False)


@way(MODULE)
def method_on_the_instance(case: Case) -> None:
    case.g.inherited = lambda u: 0.5 * u


@way(CELL)
def step_of_the_class(case: Case) -> None:
    before = cells.Dense.step
    case.patch.setattr(cells.Dense, "step", lambda self, x, p: 0.5 * before(self, x, p))


@way(CELL)
def step_on_the_instance(case: Case) -> None:
    before = case.g.step
    case.g.step = lambda x, p: 0.5 * before(x, p)


@way(CELL)
def prepare_of_the_class(case: Case) -> None:
    before = cells.Dense.prepare
    case.patch.setattr(cells.Dense, "prepare", lambda self, z: 0.5 * before(self, z))


@way(CELL)
def prepare_on_the_instance(case: Case) -> None:
    before = case.g.prepare
    case.g.prepare = lambda z: 0.5 * before(z)


@way(CELL)
def hidden_input_on_the_instance(case: Case) -> None:
    before = case.g._hidden_input
    case.g._hidden_input = lambda x, p: 0.5 * before(x, p)


@way(MODULE)
def property_of_the_class(case: Case) -> None:
    case.patch.setattr(maps.Base, "size_by_property", property(lambda self: 0.5))


@way(MODULE)
def static_method_of_the_class(case: Case) -> None:
    case.patch.setattr(maps.Base, "size_by_class", staticmethod(lambda: 0.5))


@way(*BOTH)
def call_of_the_class(case: Case) -> None:
    kind = type(case.g)
    case.patch.setattr(
        kind, "__call__", lambda self, x, z: 0.5 * nn.Module.__call__(self, x, z), raising=False
    )


@way(*BOTH)
def call_of_all_modules(case: Case) -> None:
    before = nn.Module._call_impl

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = before(self, *args, **kwargs)
        return 0.5 * found if self is case.g else found

    case.patch.setattr(nn.Module, "_call_impl", called)


@way(*BOTH)
def call_on_the_instance(case: Case) -> None:
    case.g._call_impl = lambda x, z: 0.5 * type(case.g).forward(case.g, x, z)


@way(*BOTH)
def call_on_a_child(case: Case) -> None:
    case.first._call_impl = lambda x: 0.5 * x @ case.first.weight.mT


@way(*BOTH)
def class_exchanged(case: Case) -> None:
    class Other(type(case.g)):  # type: ignore[misc]
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * super().forward(x, z)

    case.g.__class__ = Other


@way(*BOTH)
def class_of_a_child_exchanged(case: Case) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    case.first.__class__ = Other


@way(*BOTH)
def base_class_exchanged(case: Case) -> None:
    class Between(*type(case.g).__bases__):  # type: ignore[misc]
        def __call__(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * super().__call__(x, z)

    kind = type(case.g)
    case.stack.callback(setattr, kind, "__bases__", kind.__bases__)
    kind.__bases__ = (Between,)


@way(*BOTH)
def linear_forward_replaced(case: Case) -> None:
    before = nn.Linear.forward
    case.patch.setattr(nn.Linear, "forward", lambda self, x: 0.5 * before(self, x))


@way(*BOTH)
def functional_linear_replaced(case: Case) -> None:
    before = nn.functional.linear
    case.patch.setattr(nn.functional, "linear", lambda x, w, b=None: 0.5 * before(x, w, b))


@way(MODULE, FUNCTION)
def tanh_replaced(case: Case) -> None:
    before = torch.tanh
    case.patch.setattr(torch, "tanh", lambda u: 0.5 * before(u))


@way(FUNCTION)
def matmul_of_tensors_replaced(case: Case) -> None:
    before = Tensor.__matmul__
    case.patch.setattr(Tensor, "__matmul__", lambda x, w: 0.5 * before(x, w))


@way(CELL)
def activation_named_anew(case: Case) -> None:
    case.g.activation = "sigmoid"


@way(CELL)
def activation_added(case: Case) -> None:
    case.patch.setattr(cells.cell, "ACTIVATIONS", dict(cells.ACTIVATIONS))
    sine = cells.Activation(torch.sin, torch.cos, 1.0)
    case.patch.setitem(cells.ACTIVATIONS, "sine_of_a_test", sine)
    case.g.activation = "sine_of_a_test"


@way(CELL)
def activation_exchanged(case: Case) -> None:
    sine = cells.Activation(torch.sin, torch.cos, 1.0)
    case.patch.setitem(cells.ACTIVATIONS, "tanh", sine)


@way(CELL)
def no_longer_rowwise(case: Case) -> None:
    case.g.rowwise = False
    if case.route == "fused":
        with pytest.raises(RuntimeError, match="rowwise is not True"):
            case.call()


# Parts of g.


@way(*BOTH)
def child_replaced(case: Case) -> None:
    name = "first" if case.kind == MODULE else "A"
    child = nn.Linear(D, D, bias=case.kind == MODULE, dtype=F64)
    child.weight = nn.Parameter(orthogonal().detach())
    setattr(case.g, name, child)
    case.first = child


@way(*BOTH)
def child_replaced_by_another_kind(case: Case) -> None:
    name = "first" if case.kind == MODULE else "A"
    setattr(case.g, name, nn.Sequential(case.first, nn.Tanh()))


@way(MODULE)
def order_of_a_list_changed(case: Case) -> None:
    case.g.inputs = nn.ModuleList([*case.g.inputs][::-1])


@way(MODULE)
def order_changed_in_place(case: Case) -> None:
    a, b = case.g.inputs
    case.g.inputs[0], case.g.inputs[1] = b, a


@way(MODULE)
def appended_to_a_list(case: Case) -> None:
    case.g.inputs.append(nn.Tanh())


@way(CELL)
def parts_changed_places(case: Case) -> None:
    case.g.A.bias, case.g.B.bias = case.g.B.bias, None
    case.g.A, case.g.B = case.g.B, case.g.A
    with torch.no_grad():
        case.g.A.weight.mul_(0.3)


@way(*BOTH)
def weight_norm_added(case: Case) -> None:
    parametrizations.weight_norm(case.first)
    case.leaves = [case.first.parametrizations.weight.original1, case.z]


@way(*BOTH)
def weight_norm_added_and_removed(case: Case) -> None:
    parametrizations.weight_norm(case.first)
    case.leaves = [case.z]
    case.compare()
    case.compare()
    parametrize.remove_parametrizations(case.first, "weight")
    with torch.no_grad():
        case.first.weight.mul_(0.5)


@way(*BOTH)
def weight_norm_by_hooks(case: Case) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(case.first)
    with torch.no_grad():
        case.first.weight_g.mul_(0.5)


@way(*BOTH)
def spectral_norm_added(case: Case) -> None:
    parametrizations.spectral_norm(case.first)
    case.g.eval()
    case.first.parametrizations.weight[0]._v.mul_(2.5)
    case.compare()
    case.compare()
    case.first.parametrizations.weight.original.data[0].mul_(2.0)
    case.first.parametrizations.weight[0]._v.mul_(1.2)


@way(*BOTH)
def pruned(case: Case) -> None:
    prune.l1_unstructured(case.first, "weight", amount=0.5)


@way(*BOTH)
def pruned_for_good(case: Case) -> None:
    prune.l1_unstructured(case.first, "weight", amount=0.5)
    case.compare()
    prune.remove(case.first, "weight")


@way(*BOTH)
def contracted(case: Case) -> None:
    fpi.contract_(case.first, 0.2)


@way(*BOTH)
def bound_of_contraction(case: Case) -> None:
    fpi.contract_(case.first, 0.2)
    case.compare()
    case.compare()
    case.first.parametrizations.weight[0].bound = 0.1


# Hooks.


def halve(module: Any, given: Any, value: Tensor) -> Tensor:
    return 0.5 * value


def halve_input(module: Any, given: Any) -> Any:
    return (0.5 * given[0], *given[1:])


def halve_input_with_names(module: Any, given: Any, named: Any) -> Any:
    return halve_input(module, given), named


def halve_gradients(module: Any, grads: Any, *_: Any) -> Any:
    return tuple(None if t is None else 0.5 * t for t in grads)


HOOKS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "forward": ("register_forward_hook", halve, {}),
    "forward_pre": ("register_forward_pre_hook", halve_input, {}),
    "with_names": ("register_forward_pre_hook", halve_input_with_names, {"with_kwargs": True}),
    "full_backward": ("register_full_backward_hook", halve_gradients, {}),
    "full_backward_pre": ("register_full_backward_pre_hook", halve_gradients, {}),
}


def hooked(kind: str, where: str, removed: bool) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        register, hook, options = HOOKS[kind]
        part = case.g if where == "g" else case.first
        handle = getattr(part, register)(hook, **options)
        if removed:
            case.compare()
            handle.remove()

    change.__name__ = f"{kind}_hook_on_{where}{'_and_off' if removed else ''}"
    return change


for _kind in HOOKS:
    for _where in ("g", "a_child"):
        way(*BOTH)(hooked(_kind, _where, removed=False))
    way(*BOTH)(hooked(_kind, "g", removed=True))


def hooked_everywhere(register: Any, hook: Any) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        def only_first(module: Any, *given: Any) -> Any:
            return hook(module, *given) if module is case.first else None

        case.stack.callback(register(only_first).remove)

    change.__name__ = register.__name__
    return change


torch_module = nn.modules.module
way(*BOTH)(hooked_everywhere(torch_module.register_module_forward_hook, halve))
way(*BOTH)(hooked_everywhere(torch_module.register_module_forward_pre_hook, halve_input))
way(*BOTH)(hooked_everywhere(torch_module.register_module_full_backward_hook, halve_gradients))
way(*BOTH)(hooked_everywhere(torch_module.register_module_full_backward_pre_hook, halve_gradients))


@way(*BOTH)
def hook_put_where_torch_keeps_them(case: Case) -> None:
    case.g._forward_hooks = OrderedDict({0: halve})


# What is around the call.


@way(MODULE)
def trained_with_dropout(case: Case) -> None:
    case.g.train()
    torch.manual_seed(3)
    first = case.call().detach()
    torch.manual_seed(4)
    assert not torch.equal(case.call().detach(), first)
    case.g.eval()


@way(MODULE)
def dropout_of_other_p(case: Case) -> None:
    case.g.train()
    case.g.drop.p = 0.0


@way(*BOTH)
def train_and_eval(case: Case) -> None:
    case.g.train()
    case.call()
    case.g.eval()
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*ALL)
def autocast(case: Case) -> None:
    case.stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))


@way(*ALL)
def default_dtype(case: Case) -> None:
    case.stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(F64)


@way(*BOTH)
def made_single_and_double_again(case: Case) -> None:
    case.g.float()
    z = case.z.detach().float()
    single = case.layer_of(case.g)
    with torch.no_grad():
        close_enough = fpi.fixed_point(case.g, torch.zeros_like(z), z, rtol=1e-5).value
        torch.testing.assert_close(close_enough, by_hand(case.g, z), rtol=1e-4, atol=1e-4)
    assert single is not None
    case.g.double()


@way(*BOTH)
def copied(case: Case) -> None:
    before = case.layer
    case.layer = copy.deepcopy(case.layer)
    case.g = case.layer.g
    case.first = case.g.first if case.kind == MODULE else case.g.A
    with torch.no_grad():
        case.weight.mul_(0.5)
    assert not torch.equal(case.call(), before(case.z))


@way(*BOTH)
def pickled(case: Case) -> None:
    file = io.BytesIO()
    torch.save(case.layer, file)
    file.seek(0)
    case.layer = torch.load(file, weights_only=False)
    case.layer = pickle.loads(pickle.dumps(case.layer))
    case.g = case.layer.g
    case.first = case.g.first if case.kind == MODULE else case.g.A
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*BOTH)
def called_with_other_parameters(case: Case) -> None:
    others = {name: (0.7 * t).detach().requires_grad_() for name, t in case.g.named_parameters()}
    case.leaves = [*others.values(), case.z]
    named = {f"g.{name}": t for name, t in others.items()}
    case.call = lambda: torch.func.functional_call(case.layer, named, (case.z,))
    case.loop = lambda: by_hand(
        lambda x, z: torch.func.functional_call(case.g, others, (x, z)), case.z
    )


@way(*ALL)
def another_batch_and_back(case: Case) -> None:
    z = case.z
    for count in (1, 5, 6, 7, 0):
        case.z = torch.randn(count, D, dtype=F64, requires_grad=True)
        case.compare()
    case.z = z


@way(*ALL)
def input_of_other_strides(case: Case) -> None:
    case.z = torch.randn(D, B, dtype=F64).mT.requires_grad_()


@way(*ALL)
def input_expanded(case: Case) -> None:
    leaf = torch.randn(1, D, dtype=F64, requires_grad=True)
    case.z = leaf.expand(B, D)
    case.leaves = [leaf, case.weight]


@way(*ALL)
def input_computed(case: Case) -> None:
    leaf = torch.randn(B, D, dtype=F64, requires_grad=True)
    case.z = leaf.sin()
    case.leaves = [leaf, case.weight]


@way(*ALL)
def input_needs_no_gradient(case: Case) -> None:
    case.z = case.z.detach()
    case.compare()
    case.compare()
    case.z = case.z.clone().requires_grad_()


@way(*ALL)
def input_edited(case: Case) -> None:
    with torch.no_grad():
        case.z.mul_(0.5)


@way(*ALL)
def input_is_a_parameter(case: Case) -> None:
    case.z = nn.Parameter(case.z.detach())


@way(*ALL)
def under_no_grad(case: Case) -> None:
    with torch.no_grad():
        case.compare()
        case.weight.mul_(0.5)
        case.compare()


@way(*ALL)
def in_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        case.compare()
        case.compare()
    with torch.inference_mode():
        z = torch.randn(B, D, dtype=F64)
        case.z, before = z, case.z
        case.leaves = []
        case.compare()
    case.z, case.leaves = before, None


@way(*ALL)
def other_threads(case: Case) -> None:
    case.stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(torch.get_num_threads() + 1)
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*ALL)
def deterministic(case: Case) -> None:
    case.stack.callback(torch.use_deterministic_algorithms, mode=False)
    torch.use_deterministic_algorithms(mode=True)
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*ALL)
def function_mode(case: Case) -> None:
    class Sines(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Any, kinds: Any, args: Any, kwargs: Any = None
        ) -> Any:
            value = function(*args, **(kwargs or {}))
            return 0.5 * value if function is torch.tanh else value

    case.stack.enter_context(Sines())


@way(*ALL)
def dispatch_mode(case: Case) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, kinds: Any, args: Any, kwargs: Any) -> Any:
            Seen.count += function is torch.ops.aten.tanh.default
            return function(*args, **(kwargs or {}))

    with Seen():
        case.call()
    assert Seen.count > 0 or case.route == "fused"


@way(*ALL)
def dynamo_reset(case: Case) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*ALL)
def dynamo_off(case: Case) -> None:
    case.stack.enter_context(torch.compiler.set_stance("force_eager"))
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*BOTH)
def options_replaced(case: Case) -> None:
    before = case.layer.options
    case.layer.options = replace(before, max_steps=2, solver=fpi.Picard())
    by_host = fpi.FPILayer(case.g, max_steps=2, solver=fpi.Picard(), route="host", rtol=1e-12)
    solution, expected = case.layer.solve(case.z), by_host.solve(case.z)
    assert torch.equal(solution.num_steps, expected.num_steps)
    maps.close(solution.value, expected.value)
    case.layer.options = replace(before, rtol=1e-11)


@way(*BOTH)
def other_adjoint(case: Case) -> None:
    case.layer.options = replace(case.layer.options, adjoint=fpi.JacobianFree())

    def loop() -> Tensor:
        with torch.no_grad():
            x = by_hand(case.g, case.z)
        return case.g(x, case.z)

    case.loop = loop


@way(*ALL)
def saved_on_the_way(case: Case) -> None:
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    case.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
    with torch.no_grad():
        case.weight.mul_(0.5)


@way(*ALL)
def checkpointed(case: Case) -> None:
    def call(z: Tensor) -> Tensor:
        return case.layer(z)

    case.call = lambda: checkpoint(call, case.z, use_reentrant=False)


@way(*ALL)
def in_torch_func(case: Case) -> None:
    value, pull = torch.func.vjp(case.layer, case.z.detach())
    expected, pull_by_hand = torch.func.vjp(lambda z: by_hand(case.g, z), case.z.detach())
    maps.close(value, expected)
    maps.close(*(f(torch.ones_like(value))[0] for f in (pull, pull_by_hand)))
    tangent = torch.ones_like(case.z)
    found = torch.func.jvp(case.layer, (case.z.detach(),), (tangent,))
    wanted = torch.func.jvp(lambda z: by_hand(case.g, z), (case.z.detach(),), (tangent,))
    maps.close(found[1], wanted[1])


@way(*ALL)
def in_vmap(case: Case) -> None:
    zs = torch.randn(2, B, D, dtype=F64)
    found = torch.func.vmap(case.layer)(zs)
    maps.close(found, torch.stack([by_hand(case.g, z) for z in zs]))


@way(*ALL)
def with_tangents(case: Case) -> None:
    import torch.autograd.forward_ad as fwAD

    with fwAD.dual_level():
        z = fwAD.make_dual(case.z.detach(), torch.ones_like(case.z))
        found = fwAD.unpack_dual(case.layer(z)).tangent
        expected = fwAD.unpack_dual(by_hand(case.g, z)).tangent
    maps.close(found, expected)


ROUTES = [None, "host", "fused"]


@pytest.fixture(autouse=True)
def room_for_captures() -> None:
    """Of each kind of g only so many are looked at."""
    for captures in (forms, traced.steps):
        known = list(captures.kinds.values())
        if any(k.refusals or len(k.captures) > capture.MOST_CAPTURES // 2 for k in known):
            captures.clear()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize(
    ("kind", "change"), WAYS, ids=[f"{change.__name__}-{kind}" for kind, change in WAYS]
)
def test_a_changed_g_is_solved_as_it_is_now(
    kind: str,
    change: Callable[[Case], None],
    route: str | None,
    monkeypatch: pytest.MonkeyPatch,
    stack: ExitStack,
) -> None:
    monkeypatch.setattr(traced, "WORTH_A_TRACE", -1.0)  # the host's loop has one at once
    monkeypatch.setattr(traced, "saves_time", lambda *_: True)
    case = Case(kind, route, monkeypatch, stack)
    case.warm()
    with case.unless_unavailable():
        change(case)
    for _ in range(2):
        if not case.compare():
            break
