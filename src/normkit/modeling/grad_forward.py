"""Forwards that differentiate inside: physics losses, force fields, energy models.

`torch.autograd.grad` in a forward fails under `torch.no_grad`, in which most passes of
a calibration or a diagnosis run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normkit.modeling.batch import Forward, run_model
from normkit.modeling.pytree import map_tensors

__all__ = ["GradForward"]


class GradForward:
    """Run a model on batches; with gradients enabled, where its forward needs them.

    A forward that fails for want of gradients is run again with them, and all that
    follow. Without gradients around the call the output is detached.

    Args:
        forward: As in `run_model`.
        before_again: Called before a forward is run again, to drop what was recorded.

    Attributes:
        needs_gradients: A forward has failed without gradients.
    """

    def __init__(
        self,
        forward: Forward | None = None,
        *,
        before_again: Callable[[], Any] | None = None,
    ) -> None:
        self.needs_gradients = False
        self._forward = forward
        self._before_again = before_again

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return the output of `model` on `batch`; raises what `run_model` raises."""
        if torch.is_grad_enabled():
            return run_model(model, batch, self._forward)
        if not self.needs_gradients:
            try:
                return run_model(model, batch, self._forward)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            self.needs_gradients = True
            if self._before_again is not None:
                self._before_again()
        with torch.inference_mode(False), torch.enable_grad():
            output = run_model(model, batch, self._forward)
        return map_tensors(output, Tensor.detach)
