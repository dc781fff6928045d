"""What a fresh network of a library shows by its nature, and what is a fault in it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import moments_of
from normkit.doctor import Statistics, checks, diagnose, watch
from normkit.doctor.checks.gradients import BATCH_NORM_GROWTH
from normkit.doctor.examination.start import has_moved
from normkit.doctor.measurements import LayerStatistics, NormStatistics
from normkit.doctor.transformer_statistics import AttentionStatistics, GainStatistics
from normkit.moments import Moments


def severity(statistics: Statistics, id_: str) -> str:
    found = {f.severity for f in checks.run(statistics, [id_])}
    (only,) = found - {"not_judged"} or {"not_judged"}
    return only


def chain(*responses: float, norms: int = 0) -> Statistics:
    layers = [
        LayerStatistics(
            *(f"fc{i}", "Linear", "weight"),
            output=moments_of(100, 0, 1),
            gradient_norm=(response,),
        )
        for i, response in enumerate(responses)
    ]
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    trained = NormStatistics(0.1, 1e-5, 100, False, zeros, ones + 1, weight=ones)
    layers += [
        LayerStatistics(f"bn{i}", "BatchNorm1d", "norm", norm=trained)
        for i in range(norms)
    ]
    return Statistics(tuple(layers))


@pytest.mark.parametrize(
    ("ratio", "norms", "expected"),
    [
        (99.0, 0, "clear"),
        (300.0, 0, "error"),
        (300.0, 10, "info"),
        (99.0 * BATCH_NORM_GROWTH**10, 10, "info"),
        (101.0 * BATCH_NORM_GROWTH**10, 10, "error"),
    ],
)
def test_d25_leaves_to_batch_norm_what_batch_norm_does(
    ratio: float, norms: int, expected: str
) -> None:
    assert severity(chain(ratio, 1, 1, 1, norms=norms), "D25") == expected


def test_batch_norms_make_gradients_grow_as_the_theory_says() -> None:
    """Per layer √(π/(π−1)) = 1.21; measured 1.17 at batch 256 and 1.25 at 16."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(20):
        layers += [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    data = [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(8)]
    readings = diagnose(model, data, F.cross_entropy).readings
    (found,) = (f for f in readings if f.id == "D25")
    assert found.value ** (1 / 20) == pytest.approx(BATCH_NORM_GROWTH, abs=0.03)


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        # The encoder of a new Bart, its decoder, and the words.
        ((1e-6, 1e-6, 8e-5, 8e-5, 8e-3), "info"),
        # As far in all, and over the depth.
        ((1e-6, 1e-5, 8e-5, 8e-4, 8e-3), "warning"),
        ((1e-6, 1e-6, 1e-6, 1e-6, 2e-2), "error"),
    ],
)
def test_d24_tells_the_depth_from_single_places(
    responses: tuple[float, ...], expected: str
) -> None:
    attention = (AttentionStatistics("encoder.attention"),)
    in_transformer = replace(chain(*responses), attention=attention)
    assert severity(in_transformer, "D24") == expected
    # In a chain of layers every step is a part of the depth.
    assert severity(chain(*responses), "D24") in ("warning", "error")


@pytest.mark.parametrize(
    ("responses", "has_moved", "expected"),
    [
        # The patches of a new CaiT, and its class token.
        ((1e-6, 1e-6, 1e-6, 1e-6, 2e-2), False, "info"),
        ((1e-6, 1e-6, 1e-6, 1e-6, 2e-2), True, "error"),
        ((1e-6, 1e-6, 1e-6, 1e-6, 2e-2), None, "error"),
        ((1e-8, 1e-6, 1e-4, 1e-2, 1.0), False, "error"),
    ],
)
def test_d24_lets_a_branch_start_at_almost_nothing(
    responses: tuple[float, ...], has_moved: bool | None, expected: str
) -> None:
    attention = (AttentionStatistics("blocks.0.attn"),)
    found = replace(chain(*responses), attention=attention, has_moved=has_moved)
    assert severity(found, "D24") == expected


class Branch(nn.Module):
    """A shortcut that reads one pixel of four, and a branch of scale `scale`."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(width, width, 1, 2, bias=False)
        self.branch = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        nn.init.constant_(self.norm2.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm1(self.shortcut(x)) + self.norm2(self.branch(x))).relu()


def corners(scale: float) -> list[Any]:
    """Findings where the shortcuts see nothing but corners, which are constant."""
    torch.manual_seed(0)
    x = F.pad(torch.randn(128, 3, 12, 12), (2, 2, 2, 2))
    y = torch.randint(3, (128,))
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(
        stem, *(Branch(16, scale) for _ in range(3)), nn.Flatten(), nn.Linear(16, 3)
    )
    data = list(zip(x.split(16), y.split(16), strict=True))
    return diagnose(model, data, F.cross_entropy).readings


def test_shortcuts_that_read_a_constant_are_told_before_branches_count() -> None:
    starting = {f.severity for f in corners(0.0) if f.id == "D18"}
    assert "info" in starting
    assert not starting & {"warning", "error"}
    assert not [f.to_text() for f in corners(0.0) if f.is_alarm]


def of_norm(var: list[float], **changes: Any) -> Statistics:
    from doctor.test_checks import norm

    found = norm(eps=1e-5)
    channels = found.in_training
    assert channels is not None
    inside = 1000 * torch.tensor(var, dtype=torch.float64)
    pooled = Moments(torch.tensor(1000), torch.zeros(len(var)).double(), inside)
    channels = replace(channels, pooled=pooled, within=inside)
    found = replace(found, in_training=channels)
    found = replace(found, **changes)
    first = LayerStatistics("fc", "Linear", "weight")
    return Statistics((first, LayerStatistics("bn", "BatchNorm2d", "norm", norm=found)))


@pytest.mark.parametrize(
    ("var", "expected"),
    [
        ([1.0, 1.0, 0.0], "warning"),
        ([1e-7, 1.0, 1.0], "warning"),
        # All are small, and none is constant.
        ([2e-6, 9e-6, 4e-5], "clear"),
        ([0.0, 0.0, 0.0], "warning"),
    ],
)
def test_d18_compares_a_channel_with_the_others(
    var: list[float], expected: str
) -> None:
    assert severity(of_norm(var), "D18") == expected


def erased(kind: str, gain: float, left: float, **more: Any) -> Statistics:
    gains = GainStatistics(16, 0, gain, gain, 1 / 16, gain)
    layer = LayerStatistics(
        *("norm", kind, "norm"),
        input=moments_of(1000, 0, 1),
        output=moments_of(1000, 0, left**2),
        gains=gains,
        **more,
    )
    return Statistics((layer,))


def test_d29_measures_what_is_left_by_the_scale() -> None:
    assert severity(erased("GroupNorm", 1.0, 5e-4), "D29") == "error"
    # The first steps of a branch that starts at zero.
    assert severity(erased("GroupNorm", 6e-4, 5e-4), "D29") == "clear"
    assert severity(erased("GroupNorm", 6e-4, 5e-8), "D29") == "error"


def test_d29_leaves_constant_inputs_of_a_batch_norm_to_d18() -> None:
    norm = of_norm([1.0, 1.0]).norms[0][1]
    assert severity(erased("BatchNorm2d", 1.0, 1e-5, norm=norm), "D29") == "clear"


def test_scales_of_one_value_are_a_start_and_those_that_differ_a_training() -> None:
    zeros, ones = torch.zeros(4).double(), torch.ones(4).double()
    new = NormStatistics(0.1, 1e-5, 0, False, zeros, ones, weight=ones, bias=zeros)
    assert new.is_new
    assert replace(new, weight=0.2 * ones).is_new
    assert not replace(new, weight=torch.tensor([1.0, 1.0, 1.0, 0.9])).is_new
    assert not replace(new, weight=0.9 * ones[:1]).is_new


@pytest.mark.parametrize("momentum", [3e-4, 0.997])
def test_d04_asks_whether_something_reads_the_statistics(momentum: float) -> None:
    found = of_norm([1.0, 1.0], momentum=momentum, in_training=None)
    watched = replace(found, while_training=True)
    is_high = momentum > 0.5
    assert severity(watched, "D04") == ("warning" if is_high else "info")
    layer = watched.layers[1]
    assert layer.norm is not None
    read = replace(layer, norm=replace(layer.norm, is_read_in_eval=True))
    assert severity(replace(watched, layers=(read,)), "D04") == "warning"
    new = replace(layer.norm, tracked=0)
    fresh = Statistics((replace(layer, norm=new),))
    assert new.is_new
    assert severity(fresh, "D04") == ("warning" if is_high else "info")
    assert math.isclose(checks.run(fresh, ["D04"])[0].value, momentum)


def test_scales_that_are_drawn_are_no_sign_of_training() -> None:
    """RepVGG draws them; running statistics that moved are a sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert not has_moved(model)
    nn.init.normal_(model[1].weight, 1, 0.1)
    assert not has_moved(model)
    for _ in range(3):
        model(torch.randn(16, 8))
    assert has_moved(model)


def test_default_statistics_are_judged_where_something_was_learned() -> None:
    """On two batches, too few to compare the modes: fresh, and loaded in part."""

    def alarms(steps: int) -> list[str]:
        torch.manual_seed(0)
        layers = [nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)]
        model = nn.Sequential(*layers)
        nn.init.normal_(model[1].weight, 1, 0.3)
        data = [(x := 2 + torch.randn(16, 8), (x[:, 0] > 2).long()) for _ in range(2)]
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(steps):
            for x, y in data:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        model[1].reset_running_stats()
        found = diagnose(model, data, F.cross_entropy).findings
        return [f.id for f in found if f.is_alarm and f.id in ("D01", "D03", "D32")]

    assert alarms(steps=0) == []
    assert "D32" in alarms(steps=60)


def test_d18_of_a_fresh_network_is_told_and_not_warned_of() -> None:
    constant = of_norm([1.0, 1.0, 0.0])
    assert severity(replace(constant, has_moved=False), "D18") == "info"
    assert severity(replace(constant, has_moved=True), "D18") == "warning"


@pytest.mark.parametrize(("size", "expected"), [(1, "not_judged"), (3, "clear")])
def test_d27_leaves_out_a_factor_that_a_norm_removes(size: int, expected: str) -> None:
    """A depthwise convolution of one pixel before a batch norm, as in FastViT."""
    torch.manual_seed(0)
    first = nn.Conv2d(8, 8, size, padding=size // 2, groups=8, bias=False)
    model = nn.Sequential(first, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    with watch(model, optimizer) as seen:
        for _ in range(20):
            optimizer.zero_grad()
            x, y = 9 * torch.randn(16, 8, 4, 4), torch.randint(3, (16,))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    found = {f.layer: f.severity for f in seen.readings() if f.id == "D27"}
    assert found.get("0", "not_judged") == expected
    assert found["3"] == "clear"


class SpatialGate(nn.Module):
    """The gate of gMLP: a map of the positions that starts at almost zero, around 1."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.proj = nn.Linear(positions, positions)
        nn.init.normal_(self.proj.weight, std=1e-6)
        nn.init.ones_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        return u * self.proj(v.mT).mT


@pytest.mark.parametrize(("rate", "expected"), [(0.01, "clear"), (100.0, "warning")])
def test_d27_measures_a_weight_that_starts_near_zero_by_its_usual_size(
    rate: float, expected: str
) -> None:
    """Its n-th step is 1/n of it, or 1/√n, at any rate."""
    torch.manual_seed(0)
    mix = [nn.Linear(8, 32), nn.GELU(), SpatialGate(16), nn.Linear(16, 8)]
    model = nn.Sequential(*mix, nn.Flatten(), nn.Linear(128, 3))
    optimizer = torch.optim.SGD(model[2].parameters(), rate)
    with watch(model, optimizer) as seen:
        for _ in range(20):
            x, y = torch.randn(32, 16, 8), torch.randint(3, (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    (found,) = [f for f in seen.readings() if f.id == "D27" and f.layer == "2.proj"]
    weight = next(s.weight for s in seen.statistics().layers if s.name == "2.proj")
    assert weight is not None
    assert sorted(weight.update_ratio)[10] > 0.1
    assert found.severity == expected


def behind_norms(*scales: float, outputs: tuple[float, ...] = ()) -> Statistics:
    """Norms and their activations, whose outputs are the scales unless given."""
    layers = []
    for i, scale in enumerate(scales):
        gains = GainStatistics(8, 0, scale, scale, 1 / 8, scale)
        rms = outputs[i] if outputs else 0.7 * scale
        layers += [
            LayerStatistics(
                f"bn{i}", "BatchNorm2d", "norm", output=moments_of(9, 0, 1), gains=gains
            ),
            LayerStatistics(
                f"act{i}",
                "ReLU",
                "activation",
                output=moments_of(9, 0, rms**2),
                fed_by=f"bn{i}",
            ),
        ]
    return Statistics(tuple(layers))


@pytest.mark.parametrize(
    ("statistics", "vanish", "explode"),
    [
        (behind_norms(1, 1, 1, 0.003), "clear", "clear"),
        (behind_norms(0.003, 1, 1, 1), "clear", "clear"),
        (behind_norms(1, 1, 1, 1, 0), "clear", "clear"),
        (behind_norms(1, 1, 1, 1, outputs=(0.7, 0.2, 0.05, 0.01)), "error", "clear"),
        (behind_norms(1, 10, 30, 200), "clear", "error"),
    ],
)
def test_a_branch_in_its_first_steps_is_no_trend_over_the_depth(
    statistics: Statistics, vanish: str, explode: str
) -> None:
    """Of timm's darknet17 the last activation has a scale of 0.003 after 20 steps."""
    assert severity(statistics, "D22") == vanish
    assert severity(statistics, "D23") == explode


def test_a_norm_may_hold_its_activation() -> None:
    found = behind_norms(1, 1, 1, 0.003)
    layers = [
        replace(s, name=f"bn{s.name[3:]}.act", fed_by="") if "act" in s.name else s
        for s in found.layers
    ]
    assert severity(Statistics(tuple(layers)), "D22") == "clear"
