"""Programs that look like a fault, each beside the fault that it looks like."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches
from normkit.doctor import Diagnosis, diagnose, watch
from normkit.doctor.checks import run
from normkit.doctor.examination.answers import Answers

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def severities(found: Diagnosis, id_: str) -> set[str]:
    return {f.severity for f in found.readings if f.id == id_}


def masks(*, is_sorted: bool) -> Pairs:
    """Noisy squares of 2 to 10 pixels, and which pixels are in them."""
    side = torch.randint(2, 11, (24 * 12,))
    side = side.sort().values if is_sorted else side
    inside = torch.arange(12) < side[:, None]
    target = (inside[:, :, None] & inside[:, None]).long()
    x = target[:, None] + torch.randn(len(side), 1, 12, 12)
    return list(zip(x.split(12), target.split(12), strict=True))


def pixelwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def flattened(y: Tensor, t: Tensor) -> Tensor:
    scores = y.movedim(1, -1).reshape(-1, 2) if t.dim() == 1 else y
    return F.cross_entropy(scores, t)


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_pixels_of_a_mask_are_one_sample(is_flat: bool) -> None:
    """Those of one image are alike; images in random order are mixed all the same."""

    def mixing(*, is_sorted: bool) -> set[str]:
        found = diagnose(
            pixelwise(),
            masks(is_sorted=is_sorted),
            flattened,
            targets=lambda batch: batch[1].flatten() if is_flat else batch[1],
        )
        return severities(found, "D13")

    assert mixing(is_sorted=False) == {"clear"}
    assert mixing(is_sorted=True) == {"warning"}


def test_labels_to_ignore_have_no_share_in_a_sample() -> None:
    answers = Answers()
    target = torch.tensor([[0, 1, -100, -100], [1, 1, 1, 0], [-100] * 4])
    answers.add(torch.randn(3, 2, 4), target)
    found = answers.targets.statistics()
    assert found is not None
    assert found.channels is not None
    assert found.classes == 2
    assert found.most_frequent == pytest.approx(4 / 6)
    assert found.channels.pooled.mean.tolist() == pytest.approx([2 / 6, 4 / 6])
    by_sample = found.channels.sample_means
    assert by_sample.mean.tolist() == pytest.approx([0.375, 0.625])
    assert by_sample.count.max() == 2


class Sampled(nn.Module):
    """The mean of a few answers under dropout, which its forward switches on."""

    def __init__(self, switched: Callable[[nn.Module], bool], p: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(p)),
            nn.Linear(48, 10),
        )
        self.switched = switched

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.body(x)
        for layer in self.body:
            layer.train(self.switched(layer))
        found = torch.stack([self.body(x) for _ in range(4)]).mean(0)
        self.body.eval()
        return found


class Forgotten(Sampled):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x), 0.3)


def trained(model: nn.Module) -> nn.Module:
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in 3 * batches():
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
    return model


def test_dropout_that_the_forward_switches_on_is_wanted() -> None:
    def examined(model: nn.Module) -> Diagnosis:
        return diagnose(trained(model), batches()[:16], F.cross_entropy)

    def of_dropout(model: nn.Module) -> set[str]:
        return {
            f.severity
            for f in examined(model).readings
            if f.id == "D34" and "dropout is on" in f.evidence
        }

    wanted = Sampled(lambda layer: isinstance(layer, nn.Dropout))
    assert of_dropout(wanted) == {"info"}
    assert of_dropout(Forgotten(lambda _: False)) == {"warning"}
    assert of_dropout(Sampled(lambda _: False)) == set()


def test_a_batch_norm_that_the_forward_switches_to_training_is_told_first() -> None:
    def examined(switched: Callable[[nn.Module], bool]) -> Diagnosis:
        model = trained(Sampled(switched))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = diagnose(model, batches()[:16], F.cross_entropy)
        after = model.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())
        return found

    found = examined(lambda _: True)
    assert found.named[0] == "D09"
    assert found.findings[0].layers == ("body.1",)
    assert found.findings[0].severity == "error"
    assert "D09" not in examined(lambda x: isinstance(x, nn.Dropout)).named


class Density(nn.Module):
    """Log-density of each sample under a normal distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.last = nn.Linear(64, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.map(x).relu())[:, 0]


@pytest.mark.parametrize("reads_targets", [True, False])
def test_a_loss_without_targets_is_not_judged_by_them(reads_targets: bool) -> None:
    """Its answers say nothing of targets that it never reads."""
    made = [(x, torch.randn(len(x))) for x, _ in batches()]

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return (y - t if reads_targets else y - 1).square().mean()

    model = Density()
    nn.init.normal_(model.map.bias, 0, 1)  # as after a training
    found = diagnose(model, made, loss)
    assert ("D34" in found.named) == reads_targets


def test_scores_of_zero_do_not_hide_the_targets() -> None:
    """The loss is one for any targets then; its gradient tells them apart."""
    x, y = batches()[0]
    answers = Answers()
    answers.add_shuffled(F.cross_entropy, torch.zeros(len(x), 10), y)
    assert answers.has_targets

    def unread(output: Any, _: Tensor) -> Tensor:
        return output[0].square().mean()

    answers = Answers()
    answers.add_shuffled(unread, (torch.randn(len(x), 3), None), y)
    assert not answers.has_targets


@pytest.mark.parametrize(("in_eval", "severity"), [(0.1, "info"), (-0.1, "warning")])
def test_dropout_before_a_norm_is_no_fault_where_eval_mode_is_better(
    in_eval: float, severity: str
) -> None:
    """The shift of the variance is a fault for what it costs in eval mode."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.6), nn.BatchNorm1d(32))
    model = trained(model.extend([nn.ReLU(), nn.Linear(32, 10)]))
    found = diagnose(model, batches()[:16], F.cross_entropy).statistics

    def judged(metric: tuple[float, ...]) -> set[str]:
        assert found.evaluation is not None
        changed = replace(found.evaluation, running_metric=metric)
        return {f.severity for f in run(replace(found, evaluation=changed), ["D11"])}

    assert found.evaluation is not None
    before = found.evaluation.batch_metric
    assert judged(tuple(value + in_eval for value in before)) == {severity}
    # A gain within its error, and no gain, leave it a warning.
    noise = torch.tensor([0.1, -0.1]).repeat(8).tolist()
    assert judged(tuple(map(sum, zip(before, noise, strict=True)))) == {"warning"}
    assert judged(before) == {"warning"}


def digits(size: int, *, is_sorted: bool = False) -> Pairs:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    order = torch.randperm(len(x))
    if is_sorted:  # in runs of four
        by_class = order[y[order].argsort(stable=True)]
        runs = by_class[: len(x) // 4 * 4].view(-1, 4)
        order = runs[torch.randperm(len(runs))].flatten()
    return list(zip(x[order].split(size), y[order].split(size), strict=True))


def learned(model: nn.Module, steps: int, rate: float = 1e-2) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    data = digits(64)
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("steps", "expected"), [(0, "warning"), (150, "info")])
def test_order_costs_nothing_where_the_network_has_learned(
    steps: int, expected: str
) -> None:
    """Runs of four samples of one class, in a network without batch norm."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    found = diagnose(learned(model, steps), digits(16, is_sorted=True), F.cross_entropy)
    assert severities(found, "D13") == {expected}


class Dropping(nn.Module):
    """A dropout by its function."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.relu(self.first(x)), self.share, self.training)
        return self.last(h)


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [(0.95, 0, True), (0.8, 300, False), (0.5, 0, False)],
)
def test_d11_a_dropout_that_leaves_little_is_told_where_little_was_learned(
    share: float, steps: int, *, expected: bool
) -> None:
    found = diagnose(learned(Dropping(share), steps), digits(64), F.cross_entropy)
    told = [f for f in found.findings if f.id == "D11" and f.is_alarm]
    assert bool(told) is expected
    if expected:
        assert "takes 95% of its values away" in told[0].evidence


@pytest.mark.parametrize(("steps", "expected"), [(0, "warning"), (150, "info")])
def test_d18_dead_units_before_a_norm_cost_nothing_where_it_has_learned(
    steps: int, expected: str
) -> None:
    model = nn.Sequential(
        *(nn.Linear(64, 40), nn.ReLU(), nn.BatchNorm1d(40), nn.Linear(40, 10))
    )
    learned(model, 5)
    with torch.no_grad():
        model[0].bias[:4] = -100.0  # pyright: ignore[reportIndexIssue]
    learned(model, steps)
    # At a rate of .01 eval mode can be 1.1 points worse, on some processors: D02.
    learned(model, steps // 2, 1e-3)
    found = diagnose(model, digits(64), F.cross_entropy)
    assert severities(found, "D18") == {expected}


@pytest.mark.parametrize(
    ("decay", "scale", "expected"),
    [(1e-3, 1.0, "info"), (1e-3, 0.1, "warning"), (2e-2, 1.0, "warning")],
)
def test_d14_asks_what_the_scales_have_kept(
    decay: float, scale: float, expected: str
) -> None:
    model = nn.Sequential(
        *(nn.Linear(64, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 10))
    )
    nn.init.constant_(model[1].weight, scale)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=decay)
    with watch(model, optimizer) as seen:
        for _ in range(4):
            for x, y in digits(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    assert {f.severity for f in seen.readings() if f.id == "D14"} == {expected}


@pytest.mark.parametrize(
    ("reads_all", "expected"), [(False, "info"), (True, "warning")]
)
def test_answers_may_be_masked_by_minus_infinity(
    expected: str, *, reads_all: bool
) -> None:
    """A pointer that cannot point at some places; they are no targets."""

    class Pointer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 12)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(12)
            mask[10:] = -torch.inf
            return self.fc(x) + mask

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return y.abs().mean() if reads_all else F.cross_entropy(y, target)

    found = diagnose(Pointer(), digits(64), loss)
    told = {f.severity for f in found.findings if "not finite" in f.evidence}
    assert told == {expected}
