"""Runs in which nothing was wrong and something was said, each beside its fault.

They are of the 41 healthy programs in benchmarks/doctor, whose author had not read how
the doctor judges.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build, train
from doctor.test_before_training import severity
from normkit.doctor import checks, diagnose, watch
from normkit.doctor.checks.progress import has_learned
from normkit.doctor.examination.start import FEW, has_just_begun
from normkit.doctor.measurements import Evaluation, LayerStatistics, Statistics
from normkit.moments import Moments

NOTHING = Evaluation((64, 64), (2.3, 2.3), (2.3, 2.3), shuffled_loss=(2.31, 2.3))
ALL = Evaluation((64, 64), (0.01, 0.01), (0.01, 0.01), shuffled_loss=(5.0, 6.0))


def after(steps: int, **changes: Any) -> nn.Module:
    model = build("mlp", **changes)
    train(model, steps)
    return model


def alarms(model: nn.Module) -> set[str]:
    return set(diagnose(model, batches()[:16], F.cross_entropy).named)


@pytest.mark.parametrize(("steps", "expected"), [(0, True), (5, True), (40, False)])
def test_a_training_of_a_few_steps_has_just_begun(steps: int, expected: bool) -> None:
    assert has_just_begun(after(steps)) == expected
    assert FEW < 40


def test_without_a_count_writes_and_scales_tell_that_it_has_just_begun() -> None:
    """A copy has the scales alone: writes are counted anew."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()

    for steps, by_writes, by_scales in ((0, True, True), (5, True, True)):
        step(steps)
        assert has_just_begun(model) == by_writes
        assert has_just_begun(copy.deepcopy(model)) == by_scales
    step(60)
    assert not has_just_begun(model)
    assert not has_just_begun(copy.deepcopy(model))
    assert not has_just_begun(nn.Linear(8, 8))


def test_cold_statistics_of_the_first_steps_are_told_and_not_warned_of() -> None:
    """The same statistics are an error where the network has learned."""
    model = after(5)
    found = diagnose(model, batches()[:16], F.cross_entropy)
    told = {f.id: f.severity for f in found.findings if f.id in ("D01", "D02", "D03")}
    assert set(told.values()) == {"info"}
    assert {"D01", "D03"} <= set(told)
    assert all("just begun" in f.evidence for f in found.findings if f.id in told)
    learned = after(60)
    for norm in learned.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.reset_running_stats()
            norm.num_batches_tracked += 5
    found = diagnose(learned, batches()[:16], F.cross_entropy)
    assert {"D01", "D02", "D03"} <= set(found.named)
    # They are no errors yet, as they are after 30 batches.
    told = [f.severity for f in found.findings if f.id in ("D01", "D02", "D03")]
    assert set(told) == {"warning"}
    for norm in learned.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.num_batches_tracked += 25
    later = diagnose(learned, batches()[:16], F.cross_entropy).findings
    assert "error" in {f.severity for f in later if f.id == "D01"}


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ((0.2, 0.21, 0.2), "info"),
        ((0.25, 0.26, 0.25), "warning"),
        # A difference within its error.
        ((0.3, 0.21, 0.2), "info"),
    ],
)
def test_statistics_that_are_off_and_cost_nothing_are_told(
    running: tuple[float, ...], expected: str
) -> None:
    off = norm_with_its_statistics_off()
    losses = Evaluation((64,) * 3, (0.2, 0.2, 0.2), running)
    assert severity(replace(off, evaluation=losses), "D01") == expected
    assert severity(replace(off, evaluation=None), "D01") == "warning"
    least = replace(losses, shuffled_loss=(30.0, 30.0, 30.0))
    assert severity(replace(off, evaluation=least), "D01") == "info"


def norm_with_its_statistics_off() -> Statistics:
    found = diagnose(after(100), batches()[:16], F.cross_entropy).statistics
    ((layer, norm), *_) = found.norms
    moved = replace(norm, running_mean=norm.running_mean + 0.4 * norm.running_var**0.5)
    return replace(found, layers=(replace(layer, norm=moved),))


def test_d34_reads_the_part_of_the_loss_that_takes_an_output() -> None:
    """Two heads: the cross entropy of one is no softmax over the other's one unit."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one = nn.Linear(64, 32), nn.Linear(32, 1)
            self.ten = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).relu()
            return self.one(h), self.ten(h)

    def loss(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.huber_loss(out[0][:, 0], y / 9) + F.cross_entropy(out[1], y)

    def one_unit(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out[0], 0 * y) + F.cross_entropy(out[1], y)

    def told(loss_fn: Callable[..., Tensor]) -> bool:
        found = diagnose(Heads(), batches()[:4], loss_fn).findings
        return any("softmax over one unit" in f.evidence for f in found)

    assert not told(loss)
    assert told(one_unit)


def judged(evaluation: Evaluation, *, has_just_begun: bool = False) -> list[Any]:
    found = diagnose(after(40), batches()[:2], F.cross_entropy).statistics
    changed = replace(found, evaluation=evaluation, has_just_begun=has_just_begun)
    return [f for f in checks.run(changed, ["D34"]) if "another sample" in f.evidence]


def test_d34_waits_for_a_training_that_has_just_begun() -> None:
    assert [f.severity for f in judged(NOTHING)] == ["warning"]
    assert judged(NOTHING, has_just_begun=True) == []


def test_d34_needs_a_loss_that_shows_a_gain() -> None:
    """The surrogate of a policy gradient is of either sign, and tells nothing."""
    noisy = replace(NOTHING, batch_loss=(-0.1, -0.1), shuffled_loss=(-0.2, 0.19))
    assert [f.severity for f in judged(noisy)] == ["not_judged"]


@pytest.mark.parametrize(
    ("samples", "side", "expected"),
    [(8, 24, "info"), (8, 1, "warning"), (4, 24, "warning"), (16, 1, "clear")],
)
def test_d05_counts_independent_values_where_samples_are_eight(
    samples: int, side: int, expected: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    model = model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)])
    data = [
        (torch.randn(samples, 3, side, side), torch.randint(2, (samples,)))
        for _ in range(40)
    ]
    for x, _ in data:
        model(x)
    found = diagnose(model, data, F.cross_entropy).readings
    assert {f.severity for f in found if f.id == "D05"} == {expected}


class Sampled(nn.Module):
    """Noise before a norm in training mode: as a code that is sampled, or dropout."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.first, self.noise, self.norm = nn.Linear(64, 32), noise, nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.noise(self.first(x))).relu())


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.std() * torch.randn_like(x) if self.training else x


class ZeroedNoise(Noise):
    """Noise of a class whose name tells that it drops something."""


ZeroedNoise.__name__ = "DropNoise"


@pytest.mark.parametrize(
    ("noise", "expected"), [(Noise, "info"), (ZeroedNoise, "warning")]
)
def test_d11_asks_what_noise_that_is_no_dropout_costs(
    noise: Callable[[], nn.Module], expected: str
) -> None:
    torch.manual_seed(0)
    model = Sampled(noise())
    train(model, 100)
    found = diagnose(model, batches()[:16], F.cross_entropy)
    assert {f.severity for f in found.readings if f.id == "D11"} == {expected}
    statistics = found.statistics
    assert statistics.evaluation is not None
    running = tuple(2 * loss for loss in statistics.evaluation.batch_loss)
    worse = replace(statistics.evaluation, batch_metric=(), running_metric=())
    worse = replace(worse, running_loss=running)
    assert severity(replace(statistics, evaluation=worse), "D11") == "warning"


def stream(names: list[str], sizes: list[float], *, fed_by: str = "") -> Statistics:
    """Weights whose outputs have these sizes, some of them behind a norm."""

    def layer(name: str, size: float) -> LayerStatistics:
        total = torch.tensor(1000 * size**2, dtype=torch.float64)
        values = Moments(torch.tensor(1000), torch.zeros(()).double(), total)
        found = LayerStatistics(name, "Linear", "weight", output=values, samples=100)
        return replace(found, fed_by=fed_by if "qkv" in name else "")

    norm = LayerStatistics("norm", "LayerNorm", "norm", output=None)
    norm = replace(norm, output=layer("", 1.0).output)
    layers = (norm, *map(layer, names, sizes))
    return Statistics(layers, evaluation=NOTHING)


@pytest.mark.parametrize(
    ("sizes", "fed_by", "expected"),
    [
        # A branch ends smaller than it begins, in every block alike.
        ([0.1, 0.001] * 4, "norm", "clear"),
        ([0.1, 0.001] * 4, "", "error"),
        ([0.1, 0.1, 0.02, 0.02, 4e-3, 4e-3, 8e-4, 8e-4], "norm", "error"),
    ],
)
def test_d22_compares_one_place_of_blocks_that_start_with_a_norm(
    sizes: list[float], fed_by: str, expected: str
) -> None:
    names = [f"blocks.{i}.{part}" for i in range(4) for part in ("qkv", "out")]
    assert severity(stream(names, sizes, fed_by=fed_by), "D22") == expected


def test_signals_that_grow_are_no_fault_where_all_is_learned() -> None:
    names, sizes = [f"{i}" for i in range(4)], [1.0, 3.0, 9.0, 27.0]
    found = stream(names, sizes)
    assert severity(found, "D23") == "warning"
    assert severity(replace(found, evaluation=ALL), "D23") == "info"
    larger = stream(names, [1.0, 6.0, 30.0, 150.0])
    assert severity(replace(larger, evaluation=ALL), "D23") == "error"


def test_d13_knows_batches_that_were_put_together() -> None:
    """Few-shot episodes: other digits in each, and the same share of each label."""
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    torch.manual_seed(0)

    def episode() -> tuple[Tensor, Tensor]:
        digits = torch.randperm(10)[:2]
        found = [x[y == d][torch.randperm(100)[:16]] for d in digits]
        return torch.cat(found), torch.arange(2).repeat_interleave(16)

    episodes = [episode() for _ in range(24)]
    of_digits = [(inputs, (inputs.sum(1) > 0).long()) for inputs, _ in episodes]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    for data, expected in ((episodes, "info"), (of_digits, "warning")):
        found = diagnose(model, data, F.cross_entropy).readings
        assert {f.severity for f in found if f.id == "D13"} == {expected}
    spoiled = nn.Sequential(nn.BatchNorm1d(64), model)
    found = diagnose(spoiled, episodes, F.cross_entropy).readings
    assert "info" not in {f.severity for f in found if f.id == "D13"}


def test_d02_of_recent_statistics_is_no_error() -> None:
    """The weights have moved since, a little in each layer: this passes."""
    found = diagnose(after(100), batches()[:16], F.cross_entropy).statistics
    gap = Evaluation((64,) * 2, (0.1,) * 2, (0.6,) * 2, (0.97,) * 2, (0.8, 0.81))
    assert severity(replace(found, evaluation=gap), "D02") == "warning"
    off = norm_with_its_statistics_off()
    assert severity(replace(off, evaluation=gap), "D02") == "error"
    assert severity(replace(found, layers=(), evaluation=gap), "D02") != "clear"


def test_a_watch_that_begins_with_a_trained_network_knows_that() -> None:
    """The error of its answers need not fall: it fell before."""
    model = after(150)
    x, y = batches()[0]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    told = []
    for subject in (model, after(0)):
        with watch(subject, optimizer) as seen:
            for _ in range(12):
                F.cross_entropy(subject(x), y).backward()
        told.append((seen.statistics().began_trained, has_learned(seen.statistics())))
    assert told == [(True, True), (False, False)]


@pytest.mark.parametrize(("last", "expected"), [(1.9, True), (2.1, False)])
def test_a_trained_network_whose_error_rises_is_not_taken_for_one(
    last: float, expected: bool
) -> None:
    layer = LayerStatistics(
        *("last", "Linear", "weight"),
        is_output=True,
        gradient_norm=(1.0,) * 5 + (last,) * 5,
    )
    found = Statistics((layer,), while_training=True, began_trained=True)
    assert has_learned(found) is expected
    assert not has_learned(replace(found, began_trained=False))


def test_d13_batches_of_one_class_each_are_not_mixed() -> None:
    """Without a norm, and with inputs that do not show it, the targets do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    data = [(torch.randn(16, 64), torch.full((16,), i % 10)) for i in range(24)]
    (found,) = (
        f for f in diagnose(model, data, F.cross_entropy).findings if f.id == "D13"
    )
    assert found.severity == "warning"
    assert "of one value, of the targets" in found.evidence


def test_d13_targets_that_never_vary_have_no_order() -> None:
    """The true word and five others, as word2vec has them: 1 and five 0."""
    torch.manual_seed(0)
    target = torch.zeros(16, 6)
    target[:, 0] = 1
    data = [(torch.randn(16, 64), target) for _ in range(24)]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
    found = diagnose(model, data, F.binary_cross_entropy_with_logits).readings
    assert {f.severity for f in found if f.id == "D13"} == {"clear"}
