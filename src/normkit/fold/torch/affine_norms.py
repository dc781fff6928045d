"""Layer, group, instance and RMS norms of a torch model that lose weight and bias.

The norm keeps its class. Classes of torch.nn get None for weight and bias, others, and
those of a TransformerEncoderLayer, a weight of 1 (0 where they use 1 + weight) and a
bias of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit.fold.ir.graph import Refusal, Slot
from normkit.fold.ir.nodes import NormAffine
from normkit.fold.search.solve import Solution
from normkit.fold.torch.rewrite import SetParameter, exchange, places_of
from normkit.fold.torch.trace import Trace

__all__ = ["AffineNorm", "DropAffine", "ToRMS", "affine_norms"]

# Their forward hands weight and bias, None included, to a function of torch.
_WITHOUT_AFFINE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _InstanceNorm)

# Their forward hands weight and bias of their norms to one operator of torch, in eval
# mode without gradients.
_READERS = (nn.TransformerEncoderLayer,)


@dataclass(eq=False)
class AffineNorm:
    """A module that normalizes by its own statistics, with a weight.

    Attributes:
        path: Its name in the model, or that of its weight if it holds several norms.
        module: The module of the traced copy.
        module_path: The path of `module`.
        nodes: Its calls; none if it did not run.
        refusal: Reason why it must stay; empty if weight and bias may go.
        places: Each (path of the parent, name) under which the model holds it.
        is_lent: Whether it runs with other weights than it holds.
        is_read_outside: Whether the module that holds it reads its weight by name.
    """

    path: str
    module: nn.Module
    module_path: str
    nodes: list[NormAffine]
    refusal: str = ""
    places: tuple[tuple[str, str], ...] = ()
    is_lent: bool = False
    is_read_outside: bool = False

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def note(self) -> str:
        """Words of the ledger for the parts that stay; empty for none."""
        return ""

    @property
    def stored(self) -> int:
        """The number of numbers in its weight and bias, if it can do without."""
        if not self.drops_affine:
            return 0
        return sum(
            slot.tensor.numel() for slot in self.slots() if slot.tensor is not None
        )

    @property
    def drops_affine(self) -> bool:
        """True if None in the place of weight and bias is the same norm without."""
        # What is dropped could be neither lent nor read by the layer around it.
        if self.is_lent or self.is_read_outside:
            return False
        own = {f"{self.module_path}.{name}" for name in ("weight", "bias")}
        is_known = isinstance(self.module, _WITHOUT_AFFINE)
        return is_known and {slot.name for slot in self.slots()} <= own

    def slots(self) -> list[Slot]:
        """Return the slots of its weight and bias."""
        values = [v for node in self.nodes for v in (node.weight, node.bias)]
        slots = [slot for value in values if value is not None for slot in value.roots]
        return list(dict.fromkeys(slots))

    def rewrites(self, solution: Solution) -> list[SetParameter | DropAffine]:
        """Return the edits that take weight and bias away, but for the remainder."""
        node = self.nodes[0]
        if solution.remainder is None and self.drops_affine:
            return [DropAffine(self.module_path)]
        edits = node.without_affine(solution.remainder)
        return [SetParameter.of(slot, tensor) for slot, tensor in edits.items()]


@dataclass(frozen=True)
class DropAffine:
    """Set weight and bias of a norm of torch.nn to None."""

    path: str

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Apply it; return a function to undo it."""
        module: Any = model.get_submodule(self.path)
        held = module._parameters
        parameters = {name: held[name] for name in ("weight", "bias") if name in held}
        flags = [n for n in ("elementwise_affine", "affine") if n in vars(module)]
        before = {name: getattr(module, name) for name in flags}
        for name in parameters:
            module._parameters[name] = None
        for name in flags:
            setattr(module, name, False)

        def undo() -> None:
            module._parameters.update(parameters)
            for name, value in before.items():
                setattr(module, name, value)

        return undo


@dataclass(frozen=True)
class ToRMS:
    """Replace a layer norm without affine by an RMS norm of the same eps."""

    path: str
    places: tuple[tuple[str, str], ...]

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Apply it; return a function to undo it."""
        old: Any = model.get_submodule(self.path)
        new = nn.RMSNorm(old.normalized_shape, old.eps, elementwise_affine=False)
        new.training = old.training
        return exchange(model, self.places, new)


def affine_norms(trace: Trace) -> list[AffineNorm]:
    """Return every norm with a weight of its own, in the order of the modules."""
    groups: dict[nn.Module, dict[tuple[Slot, ...], list[NormAffine]]] = {}
    for node in trace.graph.nodes:
        if isinstance(node, NormAffine):
            parts = [value for value in (node.weight, node.bias) if value is not None]
            slots = tuple(slot for value in parts for slot in value.roots)
            if parts:
                calls = groups.setdefault(trace.call_of[node].module, {})
                calls.setdefault(slots, []).append(node)
    found = []
    places = places_of(trace.root.module)
    for path, module in trace.root.module.named_modules():
        for slots, nodes in groups.get(module, {}).items():
            name = path
            if len(groups[module]) > 1 or not path:
                name = slots[0].name if slots else f"{path} (computed weight)"
            norm = AffineNorm(name, module, path, nodes)
            norm.places = tuple(places.get(module, ()))
            norm.is_lent = any(trace.call_of[node].is_lent for node in nodes)
            parents = [trace.root.module.get_submodule(p) for p, _ in norm.places]
            norm.is_read_outside = any(isinstance(p, _READERS) for p in parents)
            norm.refusal = _reason_against(norm)
            found.append(norm)
        has_weight = getattr(module, "weight", None) is not None
        if isinstance(module, _WITHOUT_AFFINE) and module not in groups and has_weight:
            why = "it did not run on the example inputs"
            found.append(AffineNorm(path, module, path, [], why))
    return found


def _reason_against(norm: AffineNorm) -> str:
    try:
        for node in norm.nodes:
            node.without_affine(None)
    except Refusal as refusal:
        return str(refusal)
    mine = set(norm.nodes)
    for slot in norm.slots():
        others = [reader for reader in slot.readers if reader not in mine]
        if others:
            return f"{slot.name} is also used by {others[0].label}"
    return ""
