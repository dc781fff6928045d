"""A model that is not called is not healthy; a part that is called is diagnosed."""

import pytest
import torch
from torch import Tensor, nn

from normkit.doctor import Diagnosis, diagnose, watch
from normkit.doctor.checks import CHECKS
from normkit.errors import ArgumentError

LOSS = nn.CrossEntropyLoss()


class Wrapper(nn.Module):
    """A module whose own forward is never called, as a training module may be."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16, momentum=0.001), nn.ReLU()
        )
        self.head = nn.Linear(16, 2)


def data(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(x, (x[:, 0] > 5).long()) for x in 5 + 3 * torch.randn(40, size, 4)]


def test_a_part_that_forward_calls_is_diagnosed() -> None:
    model = Wrapper()
    for x, _ in data():
        model.net(x)
    found = diagnose(
        model, data(), LOSS, forward=lambda m, batch: m.head(m.net(batch[0]))
    )
    assert found.named[0] == "D04"
    assert found.findings[0].layer == "net.1"


def test_a_forward_that_calls_another_model_is_an_error() -> None:
    other = nn.Linear(4, 2)
    with pytest.raises(ArgumentError, match="no layer of this Wrapper ran"):
        diagnose(Wrapper(), data(), LOSS, forward=lambda m, batch: other(batch[0]))


def trained(model: Wrapper, steps: int = 30) -> list[int]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, every=1) as seen:
        for x, y in data()[:steps]:
            optimizer.zero_grad()
            LOSS(model.head(model.net(x)), y).backward()
            optimizer.step()
    assert [f.id for f in seen.findings()] == ["D04", "D03"]
    history = seen.history["layers"]
    assert list(history) == ["net.0", "net.1", "net.2", "head"]
    assert None not in history["head"]["update_ratio"]
    assert None not in history["head"]["gradient_norm"]
    assert seen.statistics().training.forwards == steps
    return seen.history["steps"]


def test_watch_sees_the_parts_that_a_loop_calls_one_by_one() -> None:
    assert trained(Wrapper()) == list(range(30))


def test_a_model_that_is_called_itself_is_counted_once() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.ReLU())
    with watch(model) as seen:
        with torch.no_grad():
            model.eval()(data()[0][0])
        for _ in range(5):
            model.train()(data()[0][0]).sum().backward()
    assert seen.history["steps"] == [0, 1, 2, 3, 4]
    training = seen.statistics().training
    assert (training.forwards, training.idle_bursts) == (5, 0)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_block_in_which_nothing_was_called_is_an_error() -> None:
    with watch(Wrapper()) as seen:
        assert seen.findings() == []
    with pytest.raises(ArgumentError, match="no module of the watched Wrapper"):
        seen.findings()


def single(model: nn.Module) -> Diagnosis:
    torch.manual_seed(0)
    made = [(torch.randn(1, 1, 8, 8), torch.randint(3, (1,))) for _ in range(30)]
    return diagnose(model, made, LOSS)


def test_batches_of_one_value_are_an_error_of_the_program_not_of_the_doctor() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)),
        *(nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3)),
    )
    found = single(model)
    assert [(f.id, f.severity, f.layer) for f in found.findings] == [
        ("D05", "error", "3")
    ]
    assert len(found.not_judged) == len(CHECKS) - 1
    assert found.repair() == []


def test_another_error_of_the_model_is_raised_as_it_is() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(f"broken {self.norm(x).shape}")

    with pytest.raises(ValueError, match="broken"):
        single(Broken())
