"""Statistics of batch norm inputs with padding counted the other way.

Where layers are called with `mask=`, over all positions; elsewhere without the constant
ends of sequences `(N, C, L)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.doctor.examination.case import Case
from normkit.doctor.examination.working_copy import open_working_copy
from normkit.doctor.probes.layer_probe import constant_ends, merged
from normkit.doctor.probes.tensor_statistics import first_tensor
from normkit.moments import Moments, moments
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["other_padding"]


def other_padding(
    case: Case, names: Iterable[str], *, drops_masks: bool
) -> dict[str, Moments]:
    """Return moments of inputs with masks ignored, or without constant ends.

    Empty where this changes nothing: no layer has a mask, or no end is constant.
    """
    with open_working_copy(case) as working, torch.no_grad():
        hooks = _OtherPadding(drops_masks=drops_masks)
        with hooks.attached(working.model, names):
            working.run("answers", evaluate=False)
    return hooks.moments if hooks.is_other else {}


class _OtherPadding:
    """Hooks that normalize and measure with padding counted the other way."""

    def __init__(self, *, drops_masks: bool) -> None:
        self.drops_masks = drops_masks
        self.is_other = False
        self.moments: dict[str, Moments] = {}
        self._found: dict[nn.Module, Moments] = {}

    @contextmanager
    def attached(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        modules = dict(model.named_modules())
        handles = []
        try:
            for name in names:
                module = modules[name]

                def before(
                    module: nn.Module, args: Any, kwargs: Any, name: str = name
                ) -> Any:
                    return self._before(name, module, args, kwargs)

                handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(self._after),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_tensor(args)
        x = first_tensor(kwargs) if x is None else x
        if x is None or x.dim() < 2:
            return None
        dim = getattr(module, "channel_dim", 1)
        x = x.detach().movedim(dim, 1)
        valid = None
        is_ours = isinstance(module, BatchNormLayer)
        if self.drops_masks:
            mask = kwargs.get("mask")
            if isinstance(mask, Tensor):
                self.is_other = True
                kwargs = {**kwargs, "mask": torch.ones_like(mask)}
        elif x.dim() == 3 and (ends := constant_ends(x)).any():
            self.is_other = True
            valid = ~ends[:, None]
            if is_ours:
                kwargs = {**kwargs, "mask": valid.movedim(1, dim)}
        dims = (0, *range(2, x.dim()))
        found = moments(x, dims, None if valid is None else valid.expand(x.shape))
        if valid is not None and not is_ours:
            self._found[module] = found  # torch's layers take no mask: see `_after`
        found = found.to(device="cpu", dtype=torch.float64)
        self.moments[name] = merged(self.moments.get(name), found)
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        found = self._found.pop(module, None)
        if found is None or not isinstance(module, _BatchNorm):
            return None
        x, dtype = args[0], args[0].dtype
        weight, bias = module.weight, module.bias
        mean, var = found.mean.to(dtype), found.var.to(dtype)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, module.eps)
