"""Alarms that unseen programs led to: their cause first, and silence on their twins."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build, train
from normkit.doctor import Finding, diagnose, watch
from normkit.doctor.finding import by_cause


class Judged(nn.Module):
    """A network whose images are compared by the frozen features of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
        layers = nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24)
        self.features = nn.Sequential(*layers, nn.BatchNorm1d(24))
        for x, _ in batches():
            self.features(x)
        self.features.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self.net(x))


def judged(*, is_frozen: bool) -> list[Finding]:
    model = Judged()
    optimizer = torch.optim.Adam(model.net.parameters(), 3e-3)

    def loss_fn(answers: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(answers, model.features(x))

    data = [(x + 0.3 * torch.randn_like(x), x) for x, _ in batches()]
    with watch(model, optimizer) as seen:
        model.train()
        if is_frozen:
            model.features.eval()
        for step in range(120):
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    if is_frozen:
        model.eval()  # as a user may who has just evaluated it
    found = diagnose(model, data, loss_fn).readings
    return [f for f in by_cause([*found, *seen.readings()]) if f.is_alarm]


def test_frozen_features_that_go_on_counting_are_the_cause() -> None:
    """Also where they were never trained: what feeds them is frozen, too."""
    assert judged(is_frozen=False)[0].id == "D07"


def test_features_that_are_compared_may_end_in_a_frozen_norm() -> None:
    assert not judged(is_frozen=True)


def skipped(*, is_kept: bool) -> list[Finding]:
    """Train on batches of which one is NaN; its loss is skipped, or trained on."""
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with watch(model, optimizer, every=1) as seen:
        for step, (x, y) in enumerate(batches()[:20]):
            given = x * math.nan if step == 7 else x
            loss = F.cross_entropy(model(given), y)
            if is_kept or bool(loss.isfinite()):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return [f for f in seen.findings() if f.is_alarm]


def test_a_batch_that_is_skipped_behind_the_norms_is_told_by_the_norms() -> None:
    found = skipped(is_kept=False)
    assert [(f.id, f.follows) for f in found] == [("D17", ""), ("D34", "")]
    # Where the weights have kept it, what it did to the norms is the least.
    assert skipped(is_kept=True)[0].id == "D34"


def test_a_norm_that_gives_one_row_to_all_samples_has_not_erased_it() -> None:
    """It gives scale · row + shift, whose spread may be below the shift's."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(64, 24), nn.LayerNorm(24)
            self.last = nn.Linear(24, 10)
            with torch.no_grad():
                self.first.weight.mul_(1e-3)
                row = F.layer_norm(self.first.bias, (24,))
                self.norm.weight.fill_(0.05)
                self.norm.bias.copy_(-0.1 * row)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))

    found = diagnose(Narrow(), batches()[:8], F.cross_entropy)
    assert "D29" not in [f.id for f in found.findings if f.is_alarm]


class Plain(nn.Module):
    """Sixteen layers as torch draws them, or two, with biases that stop units."""

    def __init__(self, depth: int, stopped: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = (64, *[64] * depth)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in itertools.pairwise(sizes)
        )
        self.out = nn.Linear(64, 10)
        with torch.no_grad():
            self.layers[-1].bias[:stopped] -= 100.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(x)


def test_half_of_the_units_are_zero_where_signals_have_become_alike() -> None:
    """D22 and D24 tell of these; units that a bias stops are another matter."""

    def first(model: nn.Module) -> str:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        with watch(model, optimizer, every=1) as seen:
            train(model, 60, optimizer=optimizer)
        return next(f.id for f in seen.findings() if f.is_alarm)

    assert first(Plain(16)) in ("D22", "D24")
    assert first(Plain(2, stopped=40)) == "D21"


def test_inputs_far_from_zero_do_no_harm_to_a_network_that_has_learned() -> None:
    data = [(0.2 * x + 1, y) for x, y in batches()]
    model = build("mlp")
    told = []
    for steps in (1, 300):
        train(model, steps, data=data)
        found = diagnose(model, data[:16], F.cross_entropy).findings
        told.append([f.severity for f in found if f.id == "D28"])
    assert told == [["warning"], ["info"]]
