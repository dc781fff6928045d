"""A model is put back bit for bit, whatever its forward did to its buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.modeling.snapshot import Snapshot, preserved


class Counting(nn.Module):
    """Replaces one buffer in each forward, writes another, adds and drops a third."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("dropped", torch.zeros(()))
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.replaced: Tensor = self.replaced + 1
        self.written += 1
        self._buffers.pop("dropped", None)
        self.register_buffer("added", torch.ones(()))
        return self.norm(self.first(x)).relu()


def buffers_of(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    return {
        name: (id(t), t.detach().clone().numpy().tobytes())
        for name, t in model.named_buffers()
    }


def run_in_a_block(model: nn.Module, x: Tensor) -> None:
    with preserved(model):
        model(x)


VERBS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "calibrate": lambda m, x: normkit.calibrate(m, [x]).undo(m),
    "initialize": lambda m, x: normkit.initialize(m, example_inputs=x),
    "convert": lambda m, x: normkit.convert(m, to="normkit", example_inputs=x),
    "diagnose": lambda m, x: normkit.diagnose(m, [x, x]),
    "fold": lambda m, x: normkit.fold(m.eval(), x),
    "preserved": run_in_a_block,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_buffer_that_a_forward_replaced_is_the_same_object_again(verb: str) -> None:
    model, x = Counting(), torch.randn(16, 4)
    if verb == "convert":
        normkit.convert(model, to="normkit")
    before = buffers_of(model)
    VERBS[verb](model, x)
    after = buffers_of(model)
    assert list(after) == list(before)
    assert after == before


def test_what_was_committed_stays_beside_a_buffer_that_is_put_back() -> None:
    model, x = Counting(), torch.randn(16, 4)
    before = buffers_of(model)
    normkit.calibrate(model, [x])
    after = buffers_of(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"norm.{name}" for name in model.norm.state_dict()} - {
        "norm.weight",
        "norm.bias",
    }
    assert {n: i for n, (i, _) in after.items()} == {
        n: i for n, (i, _) in before.items()
    }


def test_modes_gradients_and_parameters_are_put_back() -> None:
    linear, dropout = nn.Linear(2, 2), nn.Dropout()
    model = nn.Sequential(linear, dropout)
    dropout.eval()
    model(torch.ones(3, 2)).sum().backward()
    gradient = linear.weight.grad
    assert gradient is not None
    values = [t.detach().clone() for t in (linear.weight, gradient)]
    before = Snapshot.take(model, parameters=True)
    model.train()
    with torch.no_grad():
        linear.weight.zero_()
    gradient.zero_()
    linear.weight.grad = None
    before.restore()
    assert (model.training, dropout.training) == (True, False)
    assert linear.weight.grad is gradient
    assert torch.equal(linear.weight, values[0])
    assert torch.equal(gradient, values[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("verb", ["calibrate", "initialize", "diagnose", "fold"])
def test_a_scripted_part_is_put_back(verb: str) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    model, x = nn.Sequential(Counting(), scripted), torch.randn(16, 4)
    before = {name: t.clone() for name, t in model.named_buffers()}
    VERBS[verb](model, x)
    after = dict(model.named_buffers())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())
