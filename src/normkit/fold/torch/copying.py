"""Private copies of models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import FoldError

__all__ = ["copied"]


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of `model`.

    Raises:
        FoldError: It holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in vars(module).values():
            # The weight that an old-style weight_norm leaves behind; deepcopy
            # would refuse it.
            if isinstance(held, Tensor) and not held.is_leaf:
                memo[id(held)] = held.detach().clone()
    try:
        # Tensors of a scripted module's copy are no leaves else. torch warns about its
        # own code when it copies a graph.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise FoldError(
            f"{type(model).__name__} cannot be deep-copied ({error}), and a copy is "
            "run so that a failure leaves the model as it was; remove attributes that "
            "cannot be copied (open files, locks, streams) first"
        ) from error
