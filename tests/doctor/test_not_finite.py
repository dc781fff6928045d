"""A value that is not finite is one cause: where the first is made."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build
from normkit.doctor import Diagnosis, Finding, diagnose, watch

BATCHES = [
    (torch.randn(32, 16, generator=g), torch.randint(3, (32,), generator=g))
    for g in [torch.Generator().manual_seed(0)]
    for _ in range(40)
]


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x if self.training else x.abs()).log()


def deep(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [k for _ in range(4) for k in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*layers[:4], *middle, *layers[4:], nn.Linear(16, 3))


def causes(found: Diagnosis) -> list[tuple[str, str]]:
    return [(f.id, f.layer) for f in found.findings if f.is_alarm and not f.follows]


def trained(model: nn.Module, rate: float = 0.1) -> list[Finding]:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with watch(model, optimizer, every=1) as seen:
        for x, y in BATCHES[:30]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return seen.findings()


@pytest.mark.parametrize("name", ["0", "4", "8"])
def test_the_layer_whose_weight_has_a_nan_is_the_one_cause(name: str) -> None:
    model = deep()
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = math.nan
    found = diagnose(model, BATCHES, F.cross_entropy)
    assert causes(found) == [("D34", name)]
    assert "its weight is not finite" in found.findings[0].evidence


def test_attention_and_stream_behind_a_nan_are_consequences() -> None:
    model = build("transformer")
    with torch.no_grad():
        model.blocks[0].hidden.weight[0, 0] = math.nan
    found = diagnose(model, batches()[:24], F.cross_entropy)
    assert causes(found) == [("D34", "blocks.0.hidden")]


def test_what_lies_between_two_layers_is_named_by_the_layer_behind_it() -> None:
    model = deep(Log())
    found = diagnose(model, BATCHES, F.cross_entropy)
    assert causes(found) == [("D34", "5")]
    assert "between the layers before it" in found.findings[0].evidence


def test_numbers_too_large_for_their_dtype_are_named_where_they_overflow() -> None:
    model = deep()
    with torch.no_grad():
        model[4].weight.fill_(3e38)
    found = diagnose(model, BATCHES, F.cross_entropy)
    assert causes(found)[0] == ("D34", "4")
    assert "of finite inputs and a finite weight" in found.findings[0].evidence


def test_while_training_the_first_step_decides_and_not_the_first_layer() -> None:
    """The step after the first NaN, every weight is one."""
    told = trained(deep(Log()))
    assert (told[0].id, told[0].layer) == ("D34", "5")
    assert "at step 0" in told[0].evidence


def test_weights_that_a_step_made_infinite_name_the_step() -> None:
    first = trained(deep(), rate=1e38)[0]
    assert first.id == "D34"
    assert first.details["observation"] > 0
    assert "at step" in first.evidence


def test_inputs_that_are_not_finite_are_the_cause_of_all_that_follows() -> None:
    batches = [(x.clone(), y) for x, y in BATCHES]
    batches[3][0][0, 0] = math.nan
    assert causes(diagnose(deep(), batches, F.cross_entropy)) == [("D28", "")]


def test_scores_masked_with_infinity_inside_are_no_fault() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.softmax = nn.Linear(16, 16), nn.Softmax(1)
            self.last = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.first(x).masked_fill(torch.arange(16) > 7, -math.inf)
            return self.last(self.softmax(scores) + x)

    torch.manual_seed(0)
    assert causes(diagnose(Masked(), BATCHES, F.cross_entropy)) == []


def test_a_gradient_that_alone_is_not_finite_is_named_where_backward_meets_it() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # Of infinite slope at zero.
            return x + (x - x.detach()).abs().sqrt()

    found = diagnose(deep(Root()), BATCHES, F.cross_entropy)
    named = [f for f in found.findings if f.id == "D25"]
    assert [f.layer for f in named] == ["2"]
    assert named[0].layers == ("2", "0")
