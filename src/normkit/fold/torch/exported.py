"""An exported program as a module whose layers hold their own weights.

`torch.export` flattens a model into one forward that reads every weight by name. To be
folded, each convolution, linear map and batch norm becomes a module again; then it is
traced like any other model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from normkit.fold.torch.op_names import op_name

__all__ = ["ExportedLayer", "as_module"]

# Positions of the parameters and statistics among the arguments of each operation.
_WEIGHTS = {"weight": 1, "bias": 2}
_STATISTICS = _WEIGHTS | {"running_mean": 3, "running_var": 4}
_LAYERS = {
    **{f"conv{rank}d": _WEIGHTS for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _WEIGHTS for rank in (1, 2, 3)},
    "linear": _WEIGHTS,
    "batch_norm": _STATISTICS,
    "_native_batch_norm_legit_no_training": _STATISTICS,
}


class ExportedLayer(nn.Module):
    """One call of an exported program, with the tensors that it reads.

    Args:
        call: The operation.
        held: Its parameters and statistics by name; None for one that it lacks.
        positions: The position of each of them among the arguments.
        rest: All positional arguments, None in these positions.
        kwargs: The named arguments.
    """

    def __init__(
        self,
        call: Any,
        held: dict[str, Tensor | None],
        positions: dict[str, int],
        rest: list[Any],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__()
        self.call, self.positions = call, positions
        self.rest, self.kwargs = rest, kwargs
        for name, tensor in held.items():
            if name.startswith("running"):
                self.register_buffer(name, tensor)
            elif tensor is None or isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the operation on `x`."""
        args = list(self.rest)
        args[0] = x
        for name, position in self.positions.items():
            args[position] = getattr(self, name)
        result = self.call(*args, **self.kwargs)
        return result[0] if isinstance(result, tuple | list) else result


def as_module(program: ExportedProgram) -> nn.Module:
    """Return `program` as a module that computes the same, made of layers."""
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node.target)
        if name not in _LAYERS:
            continue
        layer = _layer(module, node, _LAYERS[name])
        if layer is None:
            continue
        path = f"{node.name}_layer"
        module.add_submodule(path, layer)
        with module.graph.inserting_before(node):
            new = module.graph.call_module(path, (node.args[0],))
        if name.startswith("_native"):
            for reader in list(node.users):
                reader.replace_all_uses_with(new)
                module.graph.erase_node(reader)
        else:
            node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.clear()  # It holds tensors without data, which no copy takes.
            part.meta.clear()
    module.recompile()
    return module


def _layer(
    module: fx.GraphModule, node: fx.Node, positions: dict[str, int]
) -> ExportedLayer | None:
    """Return the layer of one call; None if it reads other tensors than weights."""
    rest = list(node.args) + [None] * (max(positions.values()) + 1 - len(node.args))
    held: dict[str, Tensor | None] = {}
    for name, position in positions.items():
        given, rest[position] = rest[position], None
        if given is None:
            held[name] = None
        elif isinstance(given, fx.Node) and given.op == "get_attr":
            tensor: Any = module
            for part in str(given.target).split("."):
                tensor = getattr(tensor, part)
            held[name] = tensor
        else:
            return None
    others = [*rest[1:], *node.kwargs.values()]
    if any(isinstance(each, fx.Node) for each in others) or any(
        op_name(reader.target) != "getitem" or reader.args[1] != 0
        for reader in node.users
        if str(node.target).find("_native") >= 0
    ):
        return None
    return ExportedLayer(node.target, held, positions, rest, dict(node.kwargs))
