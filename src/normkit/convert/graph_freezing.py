"""Freezing of the batch norm calls in a traced graph."""

from __future__ import annotations

from torch import nn

from normkit.convert.report import Conversion, ConversionReport
from normkit.modeling.graph_norms import GraphBatchNorm, norms_as_modules

__all__ = ["freeze_graph"]


def freeze_graph(given: nn.Module, model: nn.Module) -> ConversionReport:
    """Set every batch norm call of the graphs in `model` to eval mode.

    Their weights and biases get no gradient from then on.

    Args:
        given: The model of the report.
        model: The same, unwrapped.
    """
    done: list[Conversion] = []
    untouched: dict[str, str] = {}
    with norms_as_modules(model):
        for name, module in model.named_modules():
            if not isinstance(module, GraphBatchNorm):
                continue
            if not module.training:
                untouched[name] = "it is in eval mode already"
                continue
            module.training = False
            for parameter in module.parameters():
                parameter.requires_grad_(False)
            done.append(Conversion(name, "batch_norm in training", "in eval"))
    return ConversionReport(given, "frozen", tuple(done), untouched)
