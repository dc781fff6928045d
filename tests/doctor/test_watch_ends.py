"""A watch after its block, and one that has observed nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkit.doctor import Watch, watch
from normkit.errors import ArgumentError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(model: nn.Module, groups: list[dict[str, object]], lr: float) -> Watch:
    optimizer = torch.optim.SGD(groups, lr)
    with watch(model, optimizer) as seen:
        for _ in range(40):
            x = torch.randn(32, 4)
            loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return seen


def test_findings_are_those_of_the_end_of_the_block() -> None:
    model = network()
    seen = trained(model, [{"params": model.parameters()}], 0.1)
    before = [f.to_json() for f in seen.readings()]
    with torch.no_grad():
        model.get_buffer("1.running_var").fill_(torch.nan)
        model.get_parameter("0.weight").zero_()
    assert [f.to_json() for f in seen.readings()] == before


def test_a_watch_that_was_not_entered_says_so() -> None:
    with pytest.raises(ArgumentError, match="the watch was not entered"):
        watch(network()).findings()


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_a_watch_that_has_observed_nothing_has_no_findings_to_give(how: str) -> None:
    model = network()
    with watch(model) as seen:
        if how == "eval":
            model.eval()(torch.randn(4, 4))
        else:
            with torch.no_grad():
                model(torch.randn(4, 4))
        assert seen.findings() == []  # steps may follow
    with pytest.raises(ArgumentError, match="not called in training mode with grad"):
        seen.findings()
    assert "0 of 0 training steps observed: the model was not" in seen.to_text()


def test_a_group_without_a_learning_rate_is_named_as_that() -> None:
    model = network()
    groups: list[dict[str, object]] = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [*model[1].parameters(), *model[3].parameters()]},
    ]
    found = [f for f in trained(model, groups, 0.1).findings() if f.is_alarm]
    assert [(f.id, f.layer) for f in found] == [("D27", "0")]
    assert found[0].evidence == (
        "the learning rate of its parameter group is 0: no step changes it"
    )


def test_layers_that_are_made_inside_the_block_are_told() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made: nn.Module | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.made is None:
                self.made = network()
            return self.made(x)

    model = Late()
    with watch(model) as seen:
        for _ in range(3):
            model(torch.randn(32, 4)).square().mean().backward()
    text = seen.to_text()
    assert "3 layers were made inside the block and not observed (made.0 …)" in text
    model(torch.randn(32, 4))
    with watch(model) as seen:
        model(torch.randn(32, 4)).square().mean().backward()
    assert "made inside" not in seen.to_text()
    model.head = nn.Linear(2, 2)
    assert "made inside" not in seen.to_text()


def test_a_watch_that_is_entered_again_goes_on_and_leaves_no_hooks() -> None:
    model = network()
    seen = watch(model, every=1)
    for _ in range(2):
        with seen:
            for _ in range(3):
                model(torch.randn(32, 4)).square().mean().backward()
    assert seen.steps == 6
    assert seen.history["steps"] == list(range(6))
    assert len(seen.statistics().training.steps) == 6
    hooks = [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]
    assert not any(hooks)
    assert not any(p._backward_hooks for p in model.parameters())
