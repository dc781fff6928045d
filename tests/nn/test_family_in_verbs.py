"""The verbs on layers of normkit.nn that have no namesake in torch.nn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit import calibrate, convert, diagnose, explain_gap, fold
from normkit.errors import ArgumentError, ShapeError
from normkit.nn import PerActivationBatchNorm, RecurrentBatchNorm, WhiteningBatchNorm

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class OverSteps(nn.Module):
    """Two steps of 16 features through a recurrent batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RecurrentBatchNorm(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.stack([x, x]))[-1]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "whitening": lambda: WhiteningBatchNorm(16),
    "per activation": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)),
        PerActivationBatchNorm((4, 4)),
        nn.Flatten(),
    ),
    "recurrent": OverSteps,
}


def trained(kind: str) -> tuple[nn.Module, Pairs]:
    """Return a network whose running means are far off, and its batches."""
    y = torch.randint(4, (1600,))
    x = 10 * (3 * torch.randn(1600, 8) + 6 * F.one_hot(y, 8) + 2)
    data = list(zip(x.split(64), y.split(64), strict=True))
    model = nn.Sequential(nn.Linear(8, 16), LAYERS[kind](), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for inputs, targets in data * 6:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 40
    return model, data


def accuracy(output: Tensor, targets: Tensor) -> float:
    return float((output.argmax(1) == targets).double().mean())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_gap_between_the_modes_is_seen(kind: str) -> None:
    model, data = trained(kind)
    gap = explain_gap(model, data, accuracy)
    assert gap.batch - gap.running > 0.05
    found = diagnose(model, data, F.cross_entropy)
    assert any(f.id in ("D01", "D02") and f.is_alarm for f in found.findings)


@pytest.mark.parametrize("order", ["train", "eval"])
def test_calibrate_measures_each_activation(order: str) -> None:
    model, data = trained("per activation")
    norm = model[1][1]  # type: ignore[index]
    report = calibrate(model, data, order=order)
    h = model[0](torch.cat([x for x, _ in data])).detach().view(-1, 4, 4)
    assert torch.allclose(norm.running_mean, h.mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, h.var(0), rtol=1e-5)
    assert [layer.name for layer in report.layers] == ["1.1"]
    report.undo(model)
    assert not torch.allclose(norm.running_mean, h.mean(0), atol=1e-2)


def test_calibrate_refuses_values_of_another_shape() -> None:
    norm = PerActivationBatchNorm((3, 4))
    with pytest.raises(ShapeError, match="feature_shape"):
        calibrate(norm, [torch.randn(5, 3, 5)])
    assert norm.num_batches_tracked == 0


def test_calibrate_names_layers_with_other_statistics() -> None:
    model, data = trained("whitening")
    with pytest.raises(ArgumentError, match="'1': WhiteningBatchNorm keeps no mean"):
        calibrate(model, data)
    with pytest.raises(ArgumentError, match="'1': WhiteningBatchNorm keeps no mean"):
        calibrate(model, data, layers=["1"])
    model.append(nn.BatchNorm1d(4))
    assert list(calibrate(model, data).untouched) == ["1"]


@pytest.mark.parametrize("to", ["frozen", "sync", "torch"])
def test_convert_names_layers_without_a_namesake(to: str) -> None:
    model, _ = trained("whitening")
    assert "no namesake" in convert(model, to=to).untouched["1"]


def test_fold_names_layers_that_are_no_scale_for_each_channel() -> None:
    model, data = trained("whitening")
    folded, ledger = fold(model.eval(), data[0][0])
    assert [(e.name, e.kind, e.state) for e in ledger.entries] == [
        ("1", "WhiteningBatchNorm", "left")
    ]
    assert torch.equal(folded(data[0][0]), model(data[0][0]))
