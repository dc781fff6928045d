"""Too little data is not judged: never "ok", and never an alarm either."""

import math
from dataclasses import replace
from functools import reduce

import pytest
import torch

from doctor.models import moments_of
from normkit.doctor import Statistics, checks
from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.measurements import (
    DataStatistics,
    LayerStatistics,
    NormStatistics,
    OutputStatistics,
    TrainingStatistics,
    WeightStatistics,
)
from normkit.doctor.transformer_statistics import (
    AttentionStatistics,
    BlockEnd,
    BlockStatistics,
    GainStatistics,
)
from normkit.moments import moments


def weights(layers: int, last: float = 1.0, **weight: object) -> Statistics:
    """A stack of linear layers; every output 100 times the one before it."""
    made = [
        LayerStatistics(
            f"fc{i}",
            "Linear",
            "weight",
            output=moments_of(100, 0, 100.0 ** (2 * i)),
            gradient_norm=(1.0,),
            weight=WeightStatistics(1.0, **weight),  # pyright: ignore[reportArgumentType]
        )
        for i in range(layers)
    ]
    made[-1] = replace(made[-1], gradient_norm=(last,))
    return Statistics(tuple(made))


def norm(samples: int, **changes: object) -> Statistics:
    """A batch norm whose running mean is 9 standard deviations off."""
    x = torch.randn(samples, 2, dtype=torch.float64)
    seen = moments(x, 0)
    measured = NormStatistics(
        momentum=0.1,
        eps=1e-5,
        tracked=1000,
        frozen=False,
        running_mean=torch.full((2,), 9.0, dtype=torch.float64),
        running_var=torch.ones(2, dtype=torch.float64),
        in_training=ChannelStatistics.of_batch(seen, seen),
    )
    layer = LayerStatistics("bn", "BatchNorm1d", "norm", norm=measured)
    return replace(Statistics((layer,)), **changes)  # pyright: ignore[reportArgumentType]


def seen_by_norm(samples: int, **seen: object) -> Statistics:
    """The same layer, after more was seen of it than its input."""
    statistics = norm(samples)
    layer = statistics.layers[0]
    assert layer.norm is not None
    measured = replace(layer.norm, **seen)  # pyright: ignore[reportArgumentType]
    changed = replace(
        layer,
        norm=measured,
        input=moments_of(samples, 0.0, 1.0),
        output=moments_of(samples, 0.0, 1.0),
    )
    return replace(statistics, layers=(changed,))


def stream(samples: int, *lengths: int) -> ChannelStatistics:
    """One batch of sequences of each length, `samples` of them in all."""
    batches: list[ChannelStatistics] = []
    for k, length in enumerate(lengths):
        n = samples * (k + 1) // len(lengths) - samples * k // len(lengths)
        seen = moments(torch.randn(n, 2, dtype=torch.float64), 0)
        batches.append(ChannelStatistics.of_batch(seen, seen, length))
    return reduce(ChannelStatistics.merge, batches)


NAN = math.nan


def blocks(count: int, end: BlockEnd) -> Statistics:
    """So many blocks in a row, each of which gives what it gets."""
    made = [
        BlockStatistics(
            f"b{i}", "Block", f"b{i - 1}" if i else "", (1.0,), (1.0,), end=end
        )
        for i in range(count)
    ]
    return Statistics(blocks=tuple(made))


def gains(channels: int) -> Statistics:
    """A layer norm whose first gain is a hundred times the others."""
    gain = torch.ones(channels)
    gain[0] = 100.0
    found = GainStatistics.of(gain)
    output = moments_of(100, 0.0, found.rms**2)
    layer = LayerStatistics("ln", "LayerNorm", "norm", output=output, gains=found)
    return Statistics((layer,))


CONSTANT = OutputStatistics(spread=0.0, scale=1.0, units=3, sums_to_one=False)
GRU = LayerStatistics("gru", "GRU", "recurrent")

LITTLE = {
    "D06": norm(300, data=DataStatistics(last=None)),
    "D08": norm(300, training=TrainingStatistics(is_trial=True)),
    "D09": norm(300, training=TrainingStatistics()),
    "D10": weights(4, gradient_norm=(0.0,), bias_gradient_norm=(1e-9,)),
    "D11": seen_by_norm(99, without_dropout=stream(99, 0)),
    "D12": seen_by_norm(99, in_training=stream(99, 8, 8)),
    "D20": Statistics((GRU,)),
    "D22": weights(3),
    "D23": weights(3),
    "D24": weights(4, last=0.0),
    "D25": weights(3),
    "D27": weights(1, update_ratio=(9.0,)),
    "D28": replace(weights(1), data=DataStatistics(input=moments_of(99, 50.0, 1e4))),
    "D29": seen_by_norm(300, in_training=stream(300, 8)),
    "D31": norm(9, is_averaged=True),
    "D34": replace(weights(1), output=CONSTANT, samples=99),
    "D35": blocks(3, "sum"),
    "D36": Statistics(attention=(AttentionStatistics("a", (99.0,), (NAN,), (NAN,)),)),
    "D37": gains(15),
    "D38": blocks(4, "norm"),
    "D39": Statistics(training=TrainingStatistics(losses=((0, 1.0),) * 20)),
}
# The same findings on enough data, where the check takes a side.
ENOUGH = {
    "D06": norm(300, data=DataStatistics(last=1)),
    "D09": norm(300, training=TrainingStatistics(forwards=1)),
    "D10": weights(4, gradient_norm=(1.0,), bias_gradient_norm=(1e-9,)),
    "D11": seen_by_norm(100, without_dropout=stream(100, 0)),
    "D12": seen_by_norm(100, in_training=stream(100, 8, 8)),
    "D22": weights(4),
    "D23": weights(4),
    "D24": weights(4),
    "D25": weights(4),
    "D27": weights(1, update_ratio=(9.0,) * 50),
    "D28": replace(weights(1), data=DataStatistics(input=moments_of(101, 50.0, 1e4))),
    "D29": seen_by_norm(300, in_training=stream(300, 8, 9)),
    "D31": norm(3000, is_averaged=True),
    "D34": replace(weights(1), output=CONSTANT, samples=100),
    "D35": blocks(4, "sum"),
    "D36": Statistics(attention=(AttentionStatistics("a", (99.0,), (0.5,), (0.5,)),)),
    "D37": gains(16),
    "D38": replace(
        blocks(4, "norm"),
        layers=(
            LayerStatistics(
                "b0.fc",
                "Linear",
                "weight",
                weight=WeightStatistics(1.0, update_ratio=(0.1,)),
            ),
        ),
    ),
    "D39": Statistics(training=TrainingStatistics(losses=((0, 1.0),) * 21)),
}


@pytest.mark.parametrize("check", LITTLE)
def test_too_little_is_not_judged_and_says_why(check: str) -> None:
    found = checks.run(LITTLE[check], [check])
    assert [f.severity for f in found[:1]] == ["not_judged"], found
    assert all(f.evidence for f in found if f.severity == "not_judged")
    assert not [f for f in found if f.is_alarm]


@pytest.mark.parametrize("check", ENOUGH)
def test_enough_is_judged(check: str) -> None:
    found = checks.run(ENOUGH[check], [check])
    assert found
    assert "not_judged" not in {f.severity for f in found}
