"""D08 and D09: modes that a whole training has, or that eval() does not reach."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from doctor.models import batches, build, trained
from normkit.doctor import Finding, Watch, diagnose, watch


def watched(model: nn.Module, *, steps: int = 30) -> Watch:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return seen


def alarms(found: list[Finding]) -> list[str]:
    return [f.id for f in found if f.is_alarm]


def test_a_training_that_is_in_eval_mode_throughout_is_told() -> None:
    """As after a first validation, where train() is called once before it."""
    model = build("mlp").eval()
    (found,) = [f for f in watched(model).findings() if f.is_alarm]
    assert (found.id, found.severity) == ("D08", "warning")
    assert "with the whole model in eval mode" in found.evidence
    assert "D08" not in alarms(watched(build("mlp").train()).findings())


def on_frozen(model: nn.Module) -> nn.Module:
    """Put a head on a network that is frozen, and left in eval mode."""
    body = model.requires_grad_(False)[:-1]  # pyright: ignore[reportIndexIssue]
    return nn.Sequential(body, nn.Linear(48, 10)).eval()


def test_a_head_on_a_frozen_network_in_eval_mode_is_no_fault() -> None:
    model = on_frozen(copy.deepcopy(trained("mlp")))
    assert alarms(watched(model).findings()) == []
    data = batches()[:16]
    assert diagnose(model, data, F.cross_entropy).named == []
    # In training mode its statistics would change.
    assert diagnose(model.train(), data, F.cross_entropy).named == ["D07"]


class Checkpointed(nn.Module):
    """A reentrant checkpoint, whose first input requires no gradients."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_layer_that_lost_its_gradients_is_not_called_frozen() -> None:
    model = Checkpointed(copy.deepcopy(trained("mlp"))[:-1])
    found = diagnose(model, batches()[:16], F.cross_entropy)
    (lost,) = [f for f in found.findings if f.id == "D07"]
    assert "require gradients and get none" in lost.evidence
    assert "use_reentrant=False" in lost.fix
    model.body.requires_grad_(False)
    found = diagnose(model, batches()[:16], F.cross_entropy)
    (frozen,) = [f for f in found.findings if f.id == "D07"]
    assert "require" not in frozen.evidence
    assert "use_reentrant" not in frozen.fix


class Unreached(nn.Module):
    """A network whose train() sets its norms last, to one mode."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def train(self, mode: bool = True) -> "Unreached":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_norm_that_eval_does_not_reach_is_told_first() -> None:
    data = batches()[:16]
    found = diagnose(Unreached(trained("mlp")), data, F.cross_entropy).findings
    assert found[0].id == "D09"
    assert "model.eval() leaves it in training mode" in found[0].evidence
    assert set(found[0].layers) == {"body.1", "body.4", "body.7", "body.10"}
    assert "D09" not in diagnose(trained("mlp"), data, F.cross_entropy).named


class OwnNorm(nn.Module):
    """Batch norm as a course writes it; its averages are buffers, or attributes."""

    def __init__(self, width: int, kept: float, *, are_buffers: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.kept = kept
        for name, start in (("moving_mean", 0.0), ("moving_var", 1.0)):
            value = torch.full((1, width), start)
            if are_buffers:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean(0, keepdim=True), x.var(0, keepdim=True)
            with torch.no_grad():
                self.moving_mean = self.moving_mean.lerp(mean, 1 - self.kept)
                self.moving_var = self.moving_var.lerp(var, 1 - self.kept)
        else:
            mean, var = self.moving_mean, self.moving_var
        return self.gamma * (x - mean) / (var + 1e-5).sqrt() + self.beta


@pytest.mark.parametrize("are_buffers", [True, False])
def test_d02_a_norm_of_a_class_of_its_own_has_two_modes(*, are_buffers: bool) -> None:
    """A momentum of the other convention: the averages hardly move."""

    def model(kept: float) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(
            *(nn.Linear(64, 48), OwnNorm(48, kept, are_buffers=are_buffers), nn.ReLU()),
            *(nn.Linear(48, 48), OwnNorm(48, kept, are_buffers=are_buffers), nn.ReLU()),
            nn.Linear(48, 10),
        )
        optimizer = torch.optim.SGD(made.parameters(), 0.1, momentum=0.9)
        for _ in range(5):
            for x, y in batches()[:25]:
                optimizer.zero_grad()
                F.cross_entropy(made(x), y).backward()
                optimizer.step()
        return made

    data = batches()[:16]
    slow = model(0.999)
    before = slow[1].moving_mean.clone()  # pyright: ignore[reportIndexIssue]
    found = diagnose(slow, data, F.cross_entropy).findings
    (gap,) = [f for f in found if f.id == "D02"]
    assert gap.is_alarm
    assert "class of their own" in gap.fix
    assert torch.equal(slow[1].moving_mean, before)  # pyright: ignore[reportIndexIssue]
    assert "D02" not in diagnose(model(0.9), data, F.cross_entropy).named


@pytest.mark.parametrize(("is_frozen", "expected"), [(True, False), (False, True)])
def test_norms_that_are_unfrozen_late_were_not_left_in_eval_mode(
    *, is_frozen: bool, expected: bool
) -> None:
    """As in gradual unfreezing: a part trains, with its norms, from some step on."""
    model = copy.deepcopy(trained("mlp"))
    body = list(model[:-1])  # pyright: ignore[reportIndexIssue]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, every=1) as seen:
        for step, (x, y) in enumerate(batches()[:24]):
            is_late = step >= 12
            model.train()
            for layer in body:
                layer.train(is_late)
                layer.requires_grad_(is_late or not is_frozen)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert ("D08" in alarms(seen.findings())) is expected
