"""Adapter of another library: its version, its calls, its results as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit.bench.call_cases import CallCase

__all__ = ["Given", "Peer"]


@dataclass(frozen=True)
class Given:
    """Arguments of one call.

    Attributes:
        case: Layer, layout and shape; always the plain form in float32.
        training: Forward and backward with the statistics of the batch, or forward
            alone with the running ones.
        threads: Number of threads.
        layer: The layer of torch.nn with the parameters and running statistics.
        x: The input.
        dy: The gradient of the output.
    """

    case: CallCase
    training: bool
    threads: int
    layer: Any
    x: Tensor
    dy: Tensor


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        name: Name of the library.
        version: Returns its version, or None where it is not installed.
        serves: Returns whether it has the operation of a case, in training or in eval.
        call: Makes the call for a case that it has.
        tensors: Converts the result of a call to torch tensors: the output, or in
            training the gradients of input, weight and bias.
    """

    name: str
    version: Callable[[], str | None]
    serves: Callable[[CallCase, bool], bool]
    call: Callable[[Given], Callable[[], Any]]
    tensors: Callable[[Any], list[torch.Tensor]]
