"""oneDNN by torch's mkldnn tensors, which keep its own memory format."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.bench.call_cases import CallCase
from normkit.bench.peers.peer import Given, Peer

__all__ = ["PEER"]


def _version() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return None
    found = re.search(r"MKL-DNN v?([\d.]+)|oneDNN v?([\d.]+)", torch.__config__.show())
    return (found[1] or found[2]) if found else "of torch"


def _serves(case: CallCase, training: bool) -> bool:
    # torch has no layer norm, group norm or RMS norm of mkldnn tensors, and their
    # format hides the layout.
    del training
    return (case.layer, case.layout) == ("batch", "NCHW")


def _call(given: Given) -> Callable[[], Any]:
    layer = given.layer
    x, dy = given.x.detach().to_mkldnn(), given.dy.to_mkldnn()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    training, eps = given.training, layer.eps

    def evaluate() -> Tensor:
        with torch.no_grad():
            return torch.batch_norm(x, weight, bias, mean, var, False, 0.1, eps, False)

    if not training:
        return evaluate
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    x.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = torch.batch_norm(x, weight, bias, mean, var, True, 0.1, eps, False)
        return torch.autograd.grad(y, [x, weight, bias], dy)

    return step


def _tensors(found: Any) -> list[Tensor]:
    tensors = found if isinstance(found, tuple) else (found,)
    return [t.to_dense() if t.is_mkldnn else t for t in tensors]


PEER = Peer("oneDNN", _version, _serves, _call, _tensors)
