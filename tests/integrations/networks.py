"""Small networks and data, and packages that may be absent."""

import importlib
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchvision_operators

FEATURES, CLASSES = 6, 3


def library(name: str) -> Any:
    """Import a package, or skip the test where it is not installed."""
    package = name.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(
            f"{package} is not installed: pip install 'normkit[integrations]'",
            allow_module_level=True,
        )
    torchvision_operators.declare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own code
        return importlib.import_module(name)


def network() -> nn.Sequential:
    """Return a classifier with two batch norms and a dropout."""
    return nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


def samples(count: int = 96) -> tuple[Tensor, Tensor]:
    """Return inputs away from 0, and labels that depend on them."""
    source = torch.Generator().manual_seed(5)
    x = 3 + 2 * torch.randn(count, FEATURES, generator=source)
    return x, x[:, :CLASSES].argmax(1)


def population(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of the input of a layer, over all of `x`.

    Earlier batch norms normalize by all of `x`, as they do when it is one batch.
    """
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        module.train(isinstance(module, nn.modules.batchnorm._NormBase))
    with torch.no_grad():
        model(x)
    hook.remove()
    model.load_state_dict(state)
    for module, mode in modes.items():
        module.training = mode
    values = seen[0].double()
    return values.mean(0), values.var(0)
