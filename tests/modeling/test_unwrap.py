"""Every verb finds the model, and the optimizer, inside their wrappers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import normkit
from normkit.modeling.unwrap import (
    is_average,
    is_compiled,
    unwrapped,
    unwrapped_optimizer,
)


class ModelEmaV3(nn.Module):
    """As timm's: a child `module` and a `decay`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay = 0.9

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As accelerate's: derives from Optimizer, and lacks what its __init__ makes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())


WRAPPERS = {
    "none": lambda m: m,
    "parallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "averaged": AveragedModel,
    "ema": ModelEmaV3,
    "averaged, compiled": lambda m: torch.compile(AveragedModel(m), backend="eager"),
}
VERBS = {
    "calibrate": lambda m, x: normkit.calibrate(m, [x]).layers[0].name,
    "initialize": lambda m, x: normkit.initialize(m, example_inputs=x).lines[0].name,
    "convert": lambda m, x: normkit.convert(m, to="normkit").layers[0].name,
    "diagnose": lambda m, x: normkit.diagnose(m, [x, x]).statistics.layers[0].name,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("verb", VERBS)
def test_layers_have_the_names_that_they_have_inside(verb: str, wrapper: str) -> None:
    name = VERBS[verb](WRAPPERS[wrapper](network()), torch.randn(16, 4))
    assert name == {"calibrate": "1", "convert": "1"}.get(verb, "0")


def test_what_is_compiled_or_averaged_is_known_through_its_wrappers() -> None:
    model = network()
    compiled: Any = torch.compile(nn.DataParallel(model), backend="eager")
    assert unwrapped(compiled) is model
    assert is_compiled(compiled)
    assert not is_compiled(nn.DataParallel(model))
    assert is_average(AveragedModel(model))
    assert is_average(ModelEmaV3(model))


def test_a_module_that_holds_another_and_a_decay_is_no_average() -> None:
    class Schedule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.decay = module, 0.1

    held = Schedule(network())
    assert unwrapped(held) is held


def test_a_wrapped_optimizer_is_watched() -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = AcceleratedOptimizer(inner)
    assert unwrapped_optimizer(optimizer) is inner
    with normkit.watch(model, optimizer) as seen:
        for _ in range(2):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert None not in seen.history["layers"]["0"]["update_ratio"]
