"""Fresh networks as the field starts them, and programs that are no fault."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit
from normkit.doctor import diagnose, watch


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


@pytest.mark.parametrize("is_initialized", [True, False])
def test_a_residual_branch_that_starts_at_zero_is_healthy(is_initialized: bool) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))) for _ in "1234"]
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(16) for _ in range(3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    if is_initialized:
        normkit.initialize(model, example_inputs=batches[0][0])
    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.bn2.weight)
    assert diagnose(model, batches, F.cross_entropy).named == []


def test_a_model_of_one_linear_layer_is_not_fed_by_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    data = [(part, part @ torch.ones(5, 1)) for part in x.split(20)]
    assert diagnose(nn.Linear(5, 1), data, nn.MSELoss()).named == []


def test_a_nan_in_the_first_layer_is_no_vanishing_and_no_explosion() -> None:
    torch.manual_seed(0)
    layers = [k for _ in range(5) for k in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    data = [(torch.randn(32, 16), torch.randint(3, (32,))) for _ in range(40)]
    assert not {"D22", "D23"} & set(diagnose(model, data, F.cross_entropy).named)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_a_validation_with_its_norms_in_eval_mode_is_no_d09() -> None:
    torch.manual_seed(0)
    model, x = Part(), torch.randn(20, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer) as seen:
        for _ in range(3):
            model.part.train()
            model(x).square().mean().backward()
            optimizer.step()
            model.part.eval()
            with torch.no_grad():
                for _ in range(4):
                    model(x)
    assert {f.severity for f in seen.readings() if f.id == "D09"} == {"clear"}


def test_a_batch_that_failed_does_not_make_a_new_layer_a_trained_one() -> None:
    model = Part()
    with watch(model) as seen, pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 5))
    assert not seen.findings()


def test_a_layer_that_does_not_count_has_an_average_of_unknown_age() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.running_mean.lerp_(x.mean(0), 0.1)
                    self.running_var.lerp_(x.var(0), 0.1)
                return F.batch_norm(x, None, None, training=True)
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Own(16))
    with watch(model) as seen:
        for _ in range(40):
            model(torch.randn(32, 16)).sum().backward()
    assert {f.severity for f in seen.readings() if f.id == "D03"} == {"not_judged"}
