"""Activations that are functions: `torch.relu(self.fc(x))` as `nn.ReLU` is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy, relu
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.doctor import diagnose
from normkit.doctor.measurements import LayerStatistics
from normkit.doctor.watch import Watch

Call = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Linear layers with an activation after each but the last."""

    def __init__(self, *activations: Call, std: float = 0.2, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fcs = nn.ModuleList(nn.Linear(20, 20) for _ in activations)
        self.last = nn.Linear(20, 4)
        self.calls = activations
        for i, call in enumerate(activations):
            if isinstance(call, nn.Module):
                self.add_module(f"act{i}", call)
        for fc in self.fcs:
            nn.init.normal_(fc.get_parameter("weight"), 0, std)
            nn.init.constant_(fc.get_parameter("bias"), bias)

    def forward(self, x: Tensor) -> Tensor:
        for fc, call in zip(self.fcs, self.calls, strict=True):
            x = call(fc(x))
        return self.last(x)


def batches(count: int = 8, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 20, generator=draw),
            torch.randint(0, 4, (size,), generator=draw),
        )
        for _ in range(count)
    ]


def train(model: nn.Module, steps: int = 3) -> Watch:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = batches(4)
    with normkit.watch(model, optimizer) as seen:
        for step in range(steps):
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return seen


def hidden(found: Any) -> list[LayerStatistics]:
    return found.of_role("activation")


FORMS: list[tuple[type[nn.Module], tuple[Call, ...]]] = [
    (
        nn.ReLU,
        (torch.relu, F.relu, relu, Tensor.relu, lambda x: F.relu(x, inplace=True)),
    ),
    (nn.Tanh, (torch.tanh, F.tanh, Tensor.tanh, lambda x: x.tanh_())),
    (nn.Sigmoid, (torch.sigmoid, F.sigmoid, Tensor.sigmoid)),
    (nn.ReLU6, (F.relu6,)),
    (nn.Hardtanh, (F.hardtanh,)),
]


@pytest.mark.parametrize(
    ("kind", "call"), [(kind, call) for kind, calls in FORMS for call in calls]
)
def test_a_function_is_measured_as_the_layer(kind: type[nn.Module], call: Call) -> None:
    layer, function = Net(kind(), std=1.0), Net(call, std=1.0)
    for judge in (
        lambda model: diagnose(model, batches(), cross_entropy).statistics,
        lambda model: train(model).statistics(),
    ):
        (wanted,), (found,) = hidden(judge(layer)), hidden(judge(function))
        assert found.kind == wanted.kind
        assert found.where.endswith(" after fcs.0")
        assert found.fed_by == "fcs.0"
        assert found.samples == wanted.samples
        assert found.units == wanted.units == 20
        for side in ("input", "output"):
            ours, theirs = getattr(found, side), getattr(wanted, side)
            assert int(ours.count) == int(theirs.count)
            torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours.var, theirs.var, rtol=2e-2, atol=1e-3)
        assert found.saturated == pytest.approx(wanted.saturated, abs=1e-3)
        assert found.dead == wanted.dead
        assert found.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("act", [torch.tanh, nn.Tanh()])
def test_saturation_of_either_form_is_named(act: Call) -> None:
    found = diagnose(Net(act, act, std=2.0), batches(), cross_entropy)
    assert [f.id for f in found.findings if f.is_alarm][:1] == ["D20"]
    assert "D20" in [f.id for f in train(Net(act, std=2.0)).findings()]


@pytest.mark.parametrize("act", [torch.relu, nn.ReLU()])
def test_dead_units_of_either_form_are_counted(act: Call) -> None:
    # More batches than a diagnosis runs backward on.
    found = diagnose(Net(act, std=0.1, bias=-3.0), batches(16, 80), cross_entropy)
    (layer,) = hidden(found.statistics)
    assert (layer.dead, layer.dead_samples) == (1.0, 16 * 80)
    assert "D21" in [f.id for f in found.readings if f.severity != "clear"]


def test_names_follow_the_layer_before() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(torch.tanh(x))
            for _ in range(3):
                h = torch.tanh(self.a(h)) * torch.sigmoid(h) + torch.tanh(h)
            return self.b(h)

    names = [s.name for s in hidden(train(Gated()).statistics())]
    # Those of three calls in a row are one, as the layer's are.
    assert names == ["tanh after a", "sigmoid after a", "tanh after a (2)"]
    layers = [s.name for s in train(Gated()).statistics().layers]
    assert layers == ["a", *names, "b"]


def test_an_activation_of_the_input_needs_no_layer_before() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(20)), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(x * self.scale))

    found = diagnose(First(), batches(), cross_entropy).statistics
    assert [s.name for s in found.layers] == ["relu of the input", "fc"]
    assert hidden(found)[0].input is None


def test_what_layers_compute_inside_is_theirs() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    found = diagnose(Net(Swish(), nn.Tanh()), batches(), cross_entropy).statistics
    assert [s.name for s in hidden(found)] == ["act0", "act1"]


def test_outputs_are_outputs_and_gates_at_the_end_are_neither() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(20, 1), nn.Linear(20, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            gate = torch.sigmoid(self.a(x))
            return {
                "y": torch.sigmoid(9 * self.b(x)).flatten(),
                "z": gate * self.b(x),
            }

    data = [(x, (y > 1).float()) for x, y in batches()]
    found = diagnose(
        Ends(),
        data,
        lambda y, target: F.binary_cross_entropy(y["y"], target),
        metric=lambda y, target: 0.0,
    )
    (end,) = hidden(found.statistics)
    assert end.is_output
    assert end.name == "sigmoid after b"


def test_a_run_with_probes_is_the_run_without() -> None:
    def weights(watched: bool) -> list[Tensor]:
        model = Net(torch.relu, torch.tanh, torch.sigmoid)
        if watched:
            train(model, steps=30)
        else:
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            data = batches(4)
            for step in range(30):
                x, y = data[step % 4]
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(weights(True), weights(False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_checkpointed_activations_are_not_computed_again(is_reentrant: bool) -> None:
    calls = []

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(20, 20), nn.Linear(20, 4)

        def inner(self, x: Tensor) -> Tensor:
            calls.append(1)
            return torch.tanh(self.fc(x))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            y: Any = checkpoint(self.inner, x, use_reentrant=is_reentrant)
            return self.last(torch.relu(y))

    names = [s.name for s in hidden(train(Stage(), steps=3).statistics())]
    assert names == ["relu after fc"]
    assert len(calls) == 2 * 3


def test_a_result_that_was_written_to_is_left_out() -> None:
    def doubled(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        with torch.no_grad():
            y.mul_(2)
        return y

    model = Net(doubled, torch.relu)
    with normkit.watch(model) as seen:
        model(batches()[0][0])
    assert [s.name for s in hidden(seen.statistics())] == ["relu after fcs.1"]


def test_parts_called_one_by_one_are_read_once() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Net(torch.tanh), Net(torch.relu)

    model = Parts()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with normkit.watch(model, optimizer) as seen:
        for x, y in batches(3):
            optimizer.zero_grad()
            cross_entropy(model.two(F.pad(model.one(x), (0, 16))), y).backward()
            optimizer.step()
    found = hidden(seen.statistics())
    assert [s.name for s in found] == ["tanh after one.fcs.0", "relu after two.fcs.0"]
    assert {s.samples for s in found} == {3 * 128}


def test_percentiles_of_a_tanh_are_those_of_its_input() -> None:
    bands = []
    for act in (torch.tanh, nn.Tanh()):
        layers = train(Net(act)).history["layers"]
        (series,) = [s for s in layers.values() if s["role"] == "activation"]
        bands.append(series["low"] + series["middle"] + series["high"])
    assert all(math.isfinite(x) for x in bands[0])
    assert bands[0] == pytest.approx(bands[1], abs=1e-4)


class GraphConvolution(nn.Module):
    """A linear layer of a class of its own, with its weight (in, out)."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(20, 20))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class PositionTable(GraphConvolution):
    """A table by its name, which holds no linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[0]


@pytest.mark.parametrize(("std", "expected"), [(0.2, False), (2.0, True)])
def test_a_linear_layer_of_a_class_of_its_own_is_one(
    std: float, *, expected: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(GraphConvolution(std), nn.Tanh(), GraphConvolution(std), nn.Tanh()),
        *(PositionTable(0.1), nn.Linear(20, 4)),
    )
    found = train(model).statistics()
    assert [s.name for s in found.of_role("weight")] == ["0", "2", "5"]
    assert all(s.weight and s.weight.update_ratio for s in found.of_role("weight"))
    told = [f.id for f in train(model).findings() if f.is_alarm]
    assert ("D20" in told) is expected


@pytest.mark.parametrize("std", [0.2, 2.0])
def test_products_that_a_program_holds_itself_follow_an_activation(std: float) -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Parameter(std * torch.randn(20, 40))
            self.last = nn.Parameter(std * torch.randn(40, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.first) @ self.last

    found = diagnose(Raw(), batches(), cross_entropy)
    assert [s.name for s in hidden(found.statistics)] == ["tanh of the input"]
    assert ("D20" in found.named) is (std > 1)
