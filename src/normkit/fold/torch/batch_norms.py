"""Batch norms of a torch model: modules to replace, and calls to make neutral."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.fold.ir.graph import Node, Refusal, Slot, Value
from normkit.fold.ir.nodes import Add, BatchNorm
from normkit.fold.search.solve import Solution
from normkit.fold.torch.lowering import values_in
from normkit.fold.torch.op_names import ACTIVATIONS, op_name
from normkit.fold.torch.remains import Applied, Copied, Rest, Shift
from normkit.fold.torch.rewrite import SetParameter, exchange, like, places_of
from normkit.fold.torch.trace import ModuleCall, Trace

__all__ = ["NormModule", "Replace", "norm_modules"]

# The replacement of a module is shown to its hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(eq=False)
class NormModule:
    """A module of the model that is a batch norm at inference.

    Attributes:
        path: Its name in the model.
        module: The module of the traced copy.
        nodes: Its calls; none if it did not run.
        refusal: Reason why it must stay; empty if it may go.
        rest: Its operations that stay.
        places: Each (path of the parent, name) under which the model holds it.
        is_called: Whether it is a call of batch_norm in a forward that does other
            things; the call stays, with statistics and weights that change nothing.
    """

    path: str
    module: nn.Module
    nodes: list[BatchNorm]
    refusal: str = ""
    rest: Rest = field(default_factory=Rest)
    places: tuple[tuple[str, str], ...] = ()
    is_called: bool = False

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def note(self) -> str:
        """Words of the ledger for the parts that stay; empty for none."""
        return "its call stays, and changes nothing" if self.is_called else ""

    @property
    def stored(self) -> int:
        """The number of floating-point numbers that go with it."""
        if self.is_called:
            return 0
        held = [*self.module._parameters.values(), *self.module._buffers.values()]
        return sum(t.numel() for t in held if t is not None and t.is_floating_point())

    def rewrites(self, solution: Solution) -> list[Replace] | list[SetParameter]:
        """Return the edits that remove it, but for the remainder."""
        if self.is_called:
            edits = self.nodes[0].neutral(solution.remainder)
            return [SetParameter.of(slot, tensor) for slot, tensor in edits.items()]
        return [Replace(self, solution.needs_copy, solution.remainder)]

    def replacement(
        self, old: nn.Module, *, needs_copy: bool, shift: Tensor | None
    ) -> nn.Module:
        """Return the replacement of `old`, this module in one of the copies."""
        first: dict[str, nn.Module] = {}
        if shift is not None:
            model_on = like(old, "bias")
            dim = self.nodes[0].channel_dim - len(self.nodes[0].inputs[0].shape)
            first["shift"] = Shift(shift.to(model_on.device, model_on.dtype), dim)
        elif needs_copy:
            first["copied"] = Copied()
        return self.rest.of(old, OrderedDict(first))


@dataclass(frozen=True)
class Replace:
    """Replace the batch norm `norm` in every place where the model holds it.

    With `shift`, a sum per channel stays.
    """

    norm: NormModule
    needs_copy: bool = False
    shift: Tensor | None = None

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Apply it; return a function to undo it."""
        old = model.get_submodule(self.norm.path)
        new = self.norm.replacement(old, needs_copy=self.needs_copy, shift=self.shift)
        new.training = old.training
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
        return exchange(model, self.norm.places, new)


def norm_modules(trace: Trace) -> list[NormModule]:
    """Return every batch norm of a traced model, in the order of its modules.

    A batch norm is a module whose own forward normalizes an activation by fixed
    statistics, or one of torch's classes that did not run. A forward that calls
    batch_norm among other things holds one for each set of statistics.
    """
    calls: dict[nn.Module, list[tuple[BatchNorm, ModuleCall]]] = {}
    for node in trace.graph.nodes:
        if isinstance(node, BatchNorm):
            call = trace.call_of[node]
            calls.setdefault(call.module, []).append((node, call))
    found = []
    places = places_of(trace.root.module)
    for path, module in trace.root.module.named_modules():
        if module in calls:
            found += _in_module(trace, path, calls[module], places.get(module, []))
        elif isinstance(module, _BatchNorm):
            why = "it did not run on the example inputs"
            if module.training:
                why = "it is in training mode; call model.eval() first"
            found.append(NormModule(path, module, [], refusal=why))
    return found


def _in_module(
    trace: Trace,
    path: str,
    calls: list[tuple[BatchNorm, ModuleCall]],
    places: list[tuple[str, str]],
) -> list[NormModule]:
    """Return the batch norms among the `calls` of one module."""
    nodes = [node for node, _ in calls]
    norm = NormModule(path, calls[0][1].module, nodes, places=tuple(places))
    if any(call.is_lent for _, call in calls):
        norm.refusal = (
            "it runs with other weights than it holds (functional_call), which would "
            "be given to whatever takes its place"
        )
        return [norm]
    bodies = [_body(trace, node, call) for node, call in calls]
    if all(body == bodies[0] for body in bodies) and isinstance(bodies[0], Rest):
        norm.rest = bodies[0]
        norm.refusal = _reason_against(norm)
        return [norm]
    reason = bodies[0] if isinstance(bodies[0], str) else "is called in several ways"
    groups: dict[tuple[Slot, ...], list[BatchNorm]] = {}
    for node in nodes:
        groups.setdefault(_slots(node), []).append(node)
    found = []
    for slots, own in groups.items():
        name = path
        if len(groups) > 1 or not path:
            name = slots[0].name if slots else f"{path} (no statistics)"
        each = NormModule(name, norm.module, own, is_called=True)
        each.refusal = _reason_against(each) or _cannot_be_neutral(each, reason)
        found.append(each)
    return found


def _slots(node: BatchNorm) -> tuple[Slot, ...]:
    parts = (node.mean, node.var, node.weight, node.bias)
    return tuple(slot for value in parts if value is not None for slot in value.roots)


def _cannot_be_neutral(norm: NormModule, reason: str) -> str:
    """Return `reason` unless edits of its statistics make each call do nothing."""
    try:
        for node in norm.nodes:
            node.neutral(None)
    except Refusal:
        return reason
    return ""


def _functions(
    trace: Trace, nodes: list[Node], value: Value
) -> tuple[tuple[Applied, ...], Value] | None:
    """Return the activations of a chain of nodes after `value`, and its end, or None.

    Their arguments are slopes and bounds. Those of other functions may have been
    computed from the size of the input, which another one need not have.
    """
    found = []
    for node in nodes:
        if node.inputs != [value] or len(node.outputs) != 1:
            return None
        func, args, kwargs = trace.functions[node]
        if op_name(func) not in ACTIVATIONS:
            return None
        given = [*enumerate(args), *kwargs.items()]
        places = [place for place, each in given if each is value]
        others = [each for _, each in given if each is not value]
        if len(places) != 1 or any(values_in(each) for each in others):
            return None
        kept = tuple(None if each is value else each for each in args)
        named = {key: None if each is value else each for key, each in kwargs.items()}
        found.append(Applied(func, kept, named, places[0]))
        value = node.outputs[0]
    return tuple(found), value


def _body(trace: Trace, node: BatchNorm, call: ModuleCall) -> str | Rest:
    """Return the operations after the normalization, or why the module must stay."""
    name = type(call.module).__name__
    own = [node, *node.epilogue]
    value, rest = own[-1].outputs[0], []
    behind = _functions(trace, call.nodes[len(own) :], value)
    if call.nodes[: len(own)] != own or behind is None or (behind[0] and call.children):
        return (
            f"the forward of {name} calls batch_norm as a function among other things, "
            "and would still call it; make it a module of its own"
        )
    if not call.inputs or call.inputs[0] is not node.inputs[0]:
        return f"{name} changes its input before it normalizes"
    functions, value = behind
    names = {child: key for key, child in call.module._modules.items()}
    for child in call.children:
        if child.inputs != [value] or len(child.outputs) != 1:
            return f"{name} does more than normalize and activate"
        if child.module not in names:
            return f"{name} calls a module that is not its own"
        value = child.outputs[0]
        rest.append(names[child.module])
    if call.outputs != [value]:
        return f"{name} returns something else than what it normalized"
    adds = any(isinstance(other, Add) for other in node.epilogue)
    if adds and (rest or functions):
        return f"{name} adds a residual and does more behind it"
    calls = tuple(each.describe() for each in functions)
    return Rest(tuple(rest), node.activation, node.slope, adds, functions, calls)


def _reason_against(norm: NormModule) -> str:
    module = norm.module
    locked = [node.locked for node in norm.nodes if node.locked]
    if locked:
        return f"it {locked[0]}"
    if not norm.path:
        return "it is the model itself"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    mine = set(norm.nodes)
    for node in norm.nodes:
        for value in (node.weight, node.bias, node.mean, node.var):
            for slot in () if value is None else value.roots:
                others = [r for r in slot.readers if r not in mine]
                if others:
                    return f"{slot.name} is also used by {others[0].label}"
    return ""
