"""Batch norms of a traced graph as modules, for the time of a block.

`torch.export` and the quantization built on it turn a layer into a call of
`aten.batch_norm` with its buffers; no module is left to hook. Inside `norms_as_modules`
each such call is a module again, under the name of the layer that its buffers belong
to: a `GraphBatchNorm`, with the same tensors and the training flag of the call.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import ArgumentError

__all__ = [
    "SIGNATURES",
    "GraphBatchNorm",
    "graph_model",
    "has_graph_norms",
    "norms_as_modules",
    "with_norm_modules",
]

# Names of the arguments of the operators, in order.
SIGNATURES: dict[Any, tuple[str, ...]] = {
    torch.ops.aten.batch_norm.default: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class GraphBatchNorm(_BatchNorm):
    """One batch norm call of a graph, as a module.

    Args:
        held: Its parameters and buffers by name; None for one that it lacks.
        training: The training flag of the call.
        momentum: The momentum of the call.
        eps: The eps of the call.
    """

    def __init__(
        self,
        held: dict[str, Tensor | None],
        *,
        training: bool,
        momentum: float,
        eps: float,
    ) -> None:
        nn.Module.__init__(self)
        mean = held["running_mean"]
        assert mean is not None
        self.num_features = mean.numel()
        self.eps, self.momentum = eps, momentum
        self.affine = held["weight"] is not None
        self.track_running_stats = True
        for name, tensor in held.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.training = training
        # A module beside the one that holds the tensors adds no names of its own.
        self._is_guest = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return what the call computes; the graph itself counts the batches."""
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1 if self.momentum is None else self.momentum,
            self.eps,
        )

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Accept every rank, as the operator does."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_guest:
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_guest:
            super()._load_from_state_dict(*args, **kwargs)


def graph_model(model: Any) -> Any:
    """Return an exported program as a module with the same tensors; others as given."""
    return model.module() if type(model).__name__ == "ExportedProgram" else model


def has_graph_norms(model: nn.Module) -> bool:
    """Return whether a graph in `model` calls batch norm."""
    return any(True for graph in _graphs(model) for _ in _calls(graph))


@contextmanager
def norms_as_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Replace batch norm calls in the graphs of `model` by modules inside the block.

    The model computes the same. A module whose training flag is changed inside the
    block leaves it to the call. The state_dict has the same names inside as outside.

    Yields:
        The model itself.

    Raises:
        ArgumentError: One graph calls batch norm twice on the same buffers in
            different modes, which one module cannot stand for.
    """
    with ExitStack() as stack:
        for graph in list(_graphs(model)):
            if any(True for _ in _calls(graph)):
                stack.enter_context(_swapped(graph))
        yield model


def with_norm_modules(model: nn.Module) -> nn.Module:
    """Return a graph with batch norm modules that shares all tensors with `model`.

    Other models are returned as they are.
    """
    if not isinstance(model, fx.GraphModule) or not has_graph_norms(model):
        return model
    with norms_as_modules(model):
        # It takes over the modules and tensors that the edited graph names.
        view = fx.GraphModule(model, _copied(model.graph), type(model).__name__)
        view.training = model.training
    return view


def _graphs(model: nn.Module) -> Iterator[fx.GraphModule]:
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            yield module


def _calls(module: fx.GraphModule) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
    """Yield each batch norm call that reads its tensors from the module, with them.

    Calls without running statistics are left out.
    """
    for node in module.graph.nodes:
        signature = SIGNATURES.get(node.target) if node.op == "call_function" else None
        if signature is None:
            continue
        given = {**dict(zip(signature, node.args, strict=False)), **node.kwargs}
        sources = [given.get(name) for name in _TENSORS]
        if given.get("running_mean") is None or given.get("running_var") is None:
            continue
        if any(s is not None and not _is_stored(s) for s in sources):
            continue
        yield node, given


def _is_stored(source: Any) -> bool:
    return isinstance(source, fx.Node) and source.op == "get_attr"


@contextmanager
def _swapped(module: fx.GraphModule) -> Iterator[None]:
    original = module.graph
    edited = _copied(original)
    module.graph = edited
    made: dict[str, GraphBatchNorm] = {}
    undo: list[tuple[nn.Module, str, nn.Module | None]] = []
    aliases: list[str] = []
    flags: list[tuple[str, fx.Node]] = []
    mode = module.training
    order = [node for node, _ in _calls_of(original, module)]
    try:
        for old, (node, given) in zip(order, list(_calls(module)), strict=True):
            path = _path(given["running_mean"], node)
            if path not in made:
                made[path] = _built(module, given)
                undo.append(_installed(module, path, made[path]))
            elif made[path].training != bool(given.get("training", False)):
                raise ArgumentError(
                    f"the graph calls the batch norm of '{path}' in training and in "
                    "eval mode, which one layer cannot stand for; export the model "
                    "with one mode"
                )
            flags.append((path, old))
            with edited.inserting_before(node):
                call = edited.call_module(path, (given["input"],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            edited.erase_node(node)
        for node in list(edited.nodes):
            if node.op != "get_attr":
                continue
            if not node.users:
                edited.erase_node(node)
            elif str(node.target).rpartition(".")[0] in made:
                # Other readers, such as the scaled weight of quantization-aware
                # training, keep the layer's own tensors while a calibration lends it
                # others.
                aliases.append(_aliased(module, node))
        module.recompile()
        # The flag of a graph says nothing, those of its calls do.
        module.training = any(layer.training for layer in made.values())
        yield
    finally:
        module.training = mode
        for name in aliases:
            vars(module).pop(name, None)
        for parent, name, before in reversed(undo):
            if before is None:
                del parent._modules[name]
            else:
                parent._modules[name] = before
        _write_flags(flags, made)
        module.graph = original


def _copied(graph: fx.Graph) -> fx.Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code.
        return copy.deepcopy(graph)


def _calls_of(
    graph: fx.Graph, module: fx.GraphModule
) -> list[tuple[fx.Node, dict[str, Any]]]:
    """Return the calls of `graph` while `module` may hold another one."""
    current = module._graph
    try:
        module._graph = graph
        return list(_calls(module))
    finally:
        module._graph = current


def _path(mean: fx.Node, node: fx.Node) -> str:
    """Return the name of the layer: of the holder of its buffers, else of the call."""
    holder, _, name = str(mean.target).rpartition(".")
    return holder if holder and name == "running_mean" else str(node.name)


def _built(module: fx.GraphModule, given: dict[str, Any]) -> GraphBatchNorm:
    held: dict[str, Tensor | None] = {}
    for name in _TENSORS:
        source = given.get(name)
        held[name] = None if source is None else _fetched(module, str(source.target))
    holder, _, name = str(given["running_mean"].target).rpartition(".")
    held["num_batches_tracked"] = None
    if name == "running_mean":
        counter = f"{holder}.num_batches_tracked".lstrip(".")
        held["num_batches_tracked"] = _fetched(module, counter)
    momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
    return GraphBatchNorm(
        held, training=bool(given.get("training", False)), momentum=momentum, eps=eps
    )


def _fetched(module: nn.Module, path: str) -> Tensor | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _installed(
    root: nn.Module, path: str, layer: GraphBatchNorm
) -> tuple[nn.Module, str, nn.Module | None]:
    """Put `layer` at `path`, with what else was there; return how to undo it."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    before = parent._modules.get(name)
    layer._is_guest = before is None
    if before is not None:
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in getattr(before, kind).items():
                if key not in layer._parameters and key not in layer._buffers:
                    getattr(layer, kind)[key] = value
    parent._modules[name] = layer
    return parent, name, before


def _aliased(module: fx.GraphModule, node: fx.Node) -> str:
    """Let a node read its tensor under a name of its own; return the name."""
    name = "_graph_norms_" + str(node.target).replace(".", "_")
    vars(module)[name] = _fetched(module, str(node.target))
    node.target = name
    return name


def _write_flags(
    flags: list[tuple[str, fx.Node]], made: dict[str, GraphBatchNorm]
) -> None:
    """Give each call of the original graph the mode that its module is in."""
    for path, node in flags:
        signature = SIGNATURES[node.target]
        place = signature.index("training")
        training = made[path].training
        if "training" in node.kwargs or len(node.args) <= place:
            if node.kwargs.get("training", False) != training:
                node.kwargs = {**node.kwargs, "training": training}
        elif node.args[place] != training:
            node.args = (*node.args[:place], training, *node.args[place + 1 :])
