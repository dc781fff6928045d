"""Faults that unseen programs had: numbering, one answer, raw figures, lost means."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, trained
from normkit.doctor import Finding, diagnose, watch

LOSS = nn.CrossEntropyLoss()
Data = list[tuple[Any, Tensor]]


def told(model: nn.Module, data: Data, id_: str, loss: Any = LOSS) -> list[Finding]:
    found = diagnose(model, data, loss).findings
    return [f for f in found if f.id == id_ and f.is_alarm]


def fit(model: nn.Module, data: Data, steps: int, lr: float = 3e-3) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("is_renumbered", [True, False])
def test_answers_that_number_the_classes_otherwise(*, is_renumbered: bool) -> None:
    rank = torch.arange(10).roll(1) if is_renumbered else torch.arange(10)
    data = [(x, rank[y]) for x, y in batches()[:8]]
    found = told(trained("mlp", 200), data, "D34")
    assert len(found) == is_renumbered
    for each in found:
        assert each.severity == "error"
        assert "the answer to class 0 is mostly class 1" in each.evidence


def test_batches_in_the_order_of_their_classes_show_no_numbering() -> None:
    """One answer for all is as good as each there, so that nothing can be told."""
    x, y = (torch.cat(parts) for parts in zip(*batches()[:8], strict=True))
    order = y.argsort()
    whole = zip(x[order].split(64), (y[order] + 1).split(64), strict=True)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    fit(model, batches(), 200)
    data = [(x, y % 10) for x, y in whole]
    assert not any("other numbers" in f.evidence for f in told(model, data, "D34"))


def test_answers_that_are_wrong_have_no_other_numbering() -> None:
    """Each class is taken for the one before it in five of eight samples."""
    data = [
        (x, torch.where(torch.arange(64) % 8 > 4, y, (y + 1) % 10))
        for x, y in batches()[:8]
    ]
    assert not any(
        "other numbers" in f.evidence for f in told(trained("mlp", 200), data, "D34")
    )


def test_a_loss_may_number_the_classes_itself() -> None:
    """As one that compares vectors, whose largest value is no class."""

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return LOSS(y, t - 1)

    data = [(x, y + 1) for x, y in batches()[:8]]
    assert not told(trained("mlp", 200), data, "D34", loss)
    assert told(trained("mlp", 200), [(x, (y + 1) % 10) for x, y in data], "D34")


class Last(nn.Module):
    """Reads the last position of sequences, some of them padded."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(8, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.step(x.view(-1, 8, 8))[:, -1].relu())


@pytest.mark.parametrize("padded", [0.8, 0.2])
def test_one_answer_to_most_samples(padded: float) -> None:
    torch.manual_seed(0)
    data = []
    for x, y in batches()[:12]:
        rows = x.clone().view(-1, 8, 8)
        rows[torch.rand(len(x)) < padded, 4:] = 0
        data.append((rows.flatten(1), y))
    found = told(fit(Last(), data, 200), data, "D34")
    assert sum("exactly the same answer" in f.evidence for f in found) == (padded > 0.5)


class Beside(nn.Module):
    """A digit and three figures."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(67), nn.Linear(67, 10)

    def forward(self, x: Tensor, figures: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([x, figures], 1)))


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_raw_figures_beside_another_input(size: float) -> None:
    torch.manual_seed(0)
    data = [((x, size * torch.rand(64, 3)), y) for x, y in batches()[:8]]
    found = told(Beside(), data, "D28")
    assert [f.evidence.startswith("beside its first") for f in found] == [True] * (
        size > 1
    )


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_a_usual_eps_decides_where_the_inputs_are_tiny(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 10))
    data = [(scale * x, y) for x, y in batches()[:8]]
    assert len(told(model, data, "D16")) == (scale < 1)


@pytest.mark.parametrize("groups", [16, 2])
def test_a_norm_whose_mean_alone_is_read(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(groups, 16)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    found = diagnose(fit(model, batches(), 100), batches()[:16], LOSS).findings
    first = [(f.id, f.layer) for f in found if f.is_alarm][:1]
    assert first == ([("D29", "4")] if groups == 16 else [])


@pytest.mark.parametrize("every", [1, 20])
def test_a_cycle_of_batches_that_is_stepped_by_epochs(every: int) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 10)), batches()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=201)
    with watch(model, optimizer, every=10) as seen:
        for step in range(200):
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            if step % every == every - 1:
                cycle.step()
    found = [f for f in seen.findings() if f.id == "D27" and f.is_alarm]
    assert ["the schedule plans" in f.evidence for f in found] == [True] * (every > 1)


class OwnNorm(nn.Module):
    """Batch norm whose averages start at zero, or are corrected for that."""

    def __init__(self, *, is_corrected: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("var", torch.zeros(64))
        self.steps, self.is_corrected = 0, is_corrected

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean(0), x.var(0)
            self.mean.lerp_(mean.detach(), 0.01)
            self.var.lerp_(var.detach(), 0.01)
            self.steps += 1
        else:
            weight = 1 - 0.99**self.steps if self.is_corrected else 1.0
            mean, var = self.mean / weight, self.var / weight
        return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("is_corrected", [True, False])
def test_a_young_network_that_has_learned_has_a_gap(*, is_corrected: bool) -> None:
    torch.manual_seed(0)
    norm = functools.partial(OwnNorm, is_corrected=is_corrected)
    layers = [(nn.Linear(64, 64, bias=False), norm(), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*(m for each in layers for m in each), nn.Linear(64, 10))
    fit(model, batches(), 84, 1e-3)
    assert len(told(model, batches(), "D02")) == (not is_corrected)


def test_a_network_that_has_learned_all_may_saturate() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), []
    data = batches()[:4]
    fit(model, data, 300, 1e-2)
    with torch.no_grad():
        model[0].weight *= 30  # pyright: ignore[reportOperatorIssue]
        model[0].bias *= 30  # pyright: ignore[reportOperatorIssue]
    fit(model[2], [(model[:2](x).detach(), y) for x, y in data], 600, 3e-2)
    found = diagnose(model, data, LOSS)
    assert [f.severity for f in found.findings if f.id == "D20"] == ["info"]


@pytest.mark.parametrize("dim", [0, 2])
def test_the_softmax_of_a_sequence_is_over_its_classes(dim: int) -> None:
    torch.manual_seed(0)

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x).log_softmax(dim)

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        lengths = torch.full((16,), 12), torch.full((16,), 3)
        return F.ctc_loss(scores, y, *lengths)

    data = [(torch.randn(12, 16, 8), torch.randint(1, 5, (16, 3))) for _ in range(8)]
    found = told(Frames(), data, "D34", loss)
    assert ["softmax over dimension 0" in f.evidence for f in found] == [True] * (
        dim == 0
    )


class Code(nn.Module):
    """Digits from a code of four numbers, that may say nothing."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.code, self.size = nn.Linear(64, 4), size
        self.decoder = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.size * self.code(x))


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_units_that_get_a_bias_alone_are_not_dead_by_training(size: float) -> None:
    torch.manual_seed(0)
    data = [(x, x) for x, _ in batches()]
    model = Code(size)
    with torch.no_grad():
        model.decoder[0].bias[33:] = 1.0  # pyright: ignore[reportIndexIssue]
        model.decoder[0].bias[:33] = -30.0  # pyright: ignore[reportIndexIssue]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for x, y in data * 8:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert len(told(model, data, "D21", F.mse_loss)) == (size == 1.0)


@pytest.mark.parametrize("is_logged", [True, False])
def test_losses_that_fall_show_that_a_network_learns(*, is_logged: bool) -> None:
    """The gradient of an absolute error is a sign, and does not fall."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with watch(model, optimizer, every=5) as seen:
        for step in range(300):
            x = torch.randn(128, 8)
            loss = F.l1_loss(model(x), x[:, :2].sum(1, keepdim=True).sin())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if is_logged:
                seen.log(loss=loss.item())
            if step == 20:
                with torch.no_grad():
                    model[0].bias[:20] = -30.0  # pyright: ignore[reportIndexIssue]
    found = [f.severity for f in seen.findings() if f.id == "D21"]
    assert found == (["info"] if is_logged else ["warning"])
