"""Calibration of a model that simulates quantization: its observers are held.

Statistics are measured with fake quantization on, as inference will have it, and with
observers off: data that pass through move no range. Then the weights. Quantization-
aware training quantizes W·γ/σ, with σ² = running_var + eps, by a scale per channel;
after a new σ' that product is another one, and its integers would be others than those
that were trained. The range of each channel is multiplied by σ/σ', so that

    q = round(W·γ/σ' / (scale·σ/σ')) = round(W·γ/σ / scale)

stays; the layer's input does, too, and with it the statistics that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from normkit.modeling.graph_norms import GraphBatchNorm

__all__ = ["observers_held", "weight_ranges_follow"]

_RANGES = ("scale", "min_val", "max_val")


@contextmanager
def observers_held(model: nn.Module) -> Iterator[None]:
    """Let no observer in `model` record inside the block; fake quantization stays on.

    Observers are known by what they have: `observer_enabled` of a fake quantization,
    or `calculate_qparams` of an observer that stands alone.
    """
    with ExitStack() as stack:
        for module in model.modules():
            enabled = getattr(module, "observer_enabled", None)
            if isinstance(enabled, Tensor):
                stack.enter_context(_disabled(enabled))
            elif callable(getattr(module, "calculate_qparams", None)):
                stack.enter_context(_passing(module))
        yield


@contextmanager
def _disabled(flag: Tensor) -> Iterator[None]:
    before = flag.clone()
    with torch.no_grad():
        flag.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            flag.copy_(before)


@contextmanager
def _passing(observer: nn.Module) -> Iterator[None]:
    """Let an observer return its input and record nothing."""
    held = vars(observer)
    own = held.get("forward")
    held["forward"] = lambda x: x
    try:
        yield
    finally:
        del held["forward"]
        if own is not None:
            held["forward"] = own


@contextmanager
def weight_ranges_follow(model: nn.Module) -> Iterator[None]:
    """Keep the integer weights when the block changes running variances.

    Per channel: the ranges of quantized weights that a batch norm scales are multiplied
    by σ/σ'. A range of a whole tensor cannot follow channels that move apart; it is
    left as it was, and weights that no longer fit into it are clipped, as in training.
    """
    found = [
        (layer, quantizer, layer.running_var.detach().clone())
        for graph in model.modules()
        if isinstance(graph, fx.GraphModule)
        for layer, quantizer in _scaled_weights(graph)
        if layer.running_var is not None
    ]
    yield
    with torch.no_grad():
        for layer, quantizer, before in found:
            after = layer.running_var
            assert after is not None
            if torch.equal(before, after):
                continue
            ratio = (
                (before.double() + layer.eps) / (after.double() + layer.eps)
            ).sqrt()
            for module in (
                quantizer,
                getattr(quantizer, "activation_post_process", None),
            ):
                for name in _RANGES:
                    held = getattr(module, name, None)
                    if isinstance(held, Tensor) and held.numel() == ratio.numel():
                        held.copy_(held.double() * ratio)


def _scaled_weights(
    graph: fx.GraphModule,
) -> Iterator[tuple[GraphBatchNorm, nn.Module]]:
    """Yield each batch norm whose variance scales a weight before its quantizer.

    From the other reader of the variance forwards, through the arithmetic on weights,
    to the first module.
    """
    layers = {
        id(module.running_var): module
        for module in graph.modules()
        if isinstance(module, GraphBatchNorm)
    }
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor: Any = graph
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part, None)
        layer = layers.get(id(tensor))
        if layer is None:
            continue
        seen: set[fx.Node] = set()
        todo = list(node.users)
        while todo:
            reader = todo.pop()
            if reader in seen or reader.op == "output":
                continue
            seen.add(reader)
            if reader.op == "call_module":
                module = graph.get_submodule(str(reader.target))
                scale = getattr(module, "scale", None)
                if isinstance(scale, Tensor) and getattr(module, "is_per_channel", 0):
                    yield layer, module
                continue
            todo += reader.users
