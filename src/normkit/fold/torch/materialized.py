"""Weights that are computed in each forward, stored as they are now.

Parametrizations (weight_norm, spectral_norm and others of torch.nn.utils), the older
hooks of weight_norm and spectral_norm, and pruning masks.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm

from normkit.errors import FoldError

__all__ = ["computed_weights", "materialize"]


def computed_weights(model: nn.Module) -> list[str]:
    """Return the path of each module that computes a weight of its own anew."""
    return [
        path or type(module).__name__
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module) or _hooks(module)
    ]


def materialize(model: nn.Module) -> None:
    """Store the weights that the modules of `model` compute, in place.

    Raises:
        FoldError: a module computes them otherwise in training mode, and is in it.
    """
    for path, module in list(model.named_modules()):
        is_computed = parametrize.is_parametrized(module)
        hooks = _hooks(module)
        if (is_computed or hooks) and module.training:
            raise FoldError(
                f"'{path}' is in training mode, where the weight that it computes may "
                "change in each forward; call model.eval() first"
            )
        if is_computed:
            _store(module)
        for key, hook in hooks.items():
            _remove(module, key, hook)


def _store(module: nn.Module) -> None:
    """Undo all parametrizations of `module`, keeping the values.

    `remove_parametrizations` edits the class, which the copies of a model share.
    """
    lists: Any = module.parametrizations
    values = {name: cast("Tensor", getattr(module, name)).detach() for name in lists}
    is_parameter = {
        name: any(isinstance(each, nn.Parameter) for each in lists[name].parameters())
        for name in lists
    }
    plain = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    module.__class__ = plain
    for name, value in values.items():
        if is_parameter[name]:
            module.register_parameter(name, nn.Parameter(value.clone()))
        else:
            module.register_buffer(name, value.clone())


def _hooks(module: nn.Module) -> dict[int, object]:
    kinds = (SpectralNorm, WeightNorm, prune.BasePruningMethod)
    held = module._forward_pre_hooks.items()
    return {key: hook for key, hook in held if isinstance(hook, kinds)}


def _remove(module: nn.Module, key: int, hook: object) -> None:
    if isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, hook.name)
    elif isinstance(hook, WeightNorm):
        hook.remove(module)
        del module._forward_pre_hooks[key]
    elif isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, hook._tensor_name)
