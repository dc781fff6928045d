"""Batches by length, and whether batches are well mixed."""

import itertools

import pytest
import torch
from torch import Tensor

from normkit.batches import LengthBucketSampler, mixing
from normkit.errors import ArgumentError, ShapeError

LENGTHS = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(1))


def padding(batches: list[list[int]]) -> float:
    """Padded positions for each valid one."""
    rows = [LENGTHS[torch.tensor(batch)] for batch in batches]
    padded = sum(int(row.max()) * len(row) for row in rows)
    return padded / sum(int(row.sum()) for row in rows) - 1


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_sample_comes_once_in_an_epoch(window: int, drop_last: bool) -> None:
    sampler = LengthBucketSampler(LENGTHS, 48, window=window, drop_last=drop_last)
    batches = [*sampler]
    assert len(batches) == len(sampler) == (20 if drop_last else 21)
    seen = sorted(itertools.chain.from_iterable(batches))
    assert len(set(seen)) == len(seen) == (960 if drop_last else 1000)
    short = [b for b in batches if len(b) != 48]
    assert len(short) == (0 if drop_last else 1)


def test_a_window_saves_padding() -> None:
    wastes = [
        padding([*LengthBucketSampler(LENGTHS, 32, window=w)]) for w in (1, 8, 1000)
    ]
    assert wastes[0] > 0.8
    assert wastes[1] < 0.15
    assert wastes[2] < 0.05


def test_the_order_is_the_seeds_and_the_epochs_and_no_generators() -> None:
    before = torch.get_rng_state()
    sampler = LengthBucketSampler(LENGTHS, 32, seed=3)
    first, second = [*sampler], [*sampler]
    assert first != second
    sampler.set_epoch(0)
    assert [*sampler] == first
    assert [*LengthBucketSampler(LENGTHS, 32, seed=4)] != first
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_takes_it() -> None:
    data = [torch.ones(int(n)) for n in LENGTHS[:40]]
    loader = torch.utils.data.DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=LengthBucketSampler(LENGTHS[:40], 8),
        collate_fn=torch.nn.utils.rnn.pad_sequence,
    )
    assert sum(int(batch.sum()) for batch in loader) == int(LENGTHS[:40].sum())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([1, -2], 2), "length of at least 0"),
        (([[1, 2]], 2), r"shape \(1, 2\)"),
        (([1, 2], 0), "batch_size=0"),
    ],
)
def test_arguments_that_make_no_sense_are_told(arguments: tuple, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        LengthBucketSampler(*arguments)
    with pytest.raises(ArgumentError, match="window=0"):
        LengthBucketSampler([1], 1, window=0)


def labels(order: str) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(10, (960,), generator=generator)
    if order == "sorted":
        return drawn.sort().values
    if order == "buffered":
        # Sorted, then let through a shuffle buffer that holds a tenth of the data.
        keys = torch.arange(960) + 96 * torch.rand(960, generator=generator)
        return drawn.sort().values[keys.argsort()]
    return drawn


def test_sorted_and_half_shuffled_labels_are_told_from_shuffled_ones() -> None:
    found = {o: mixing(labels(o).split(32)) for o in ("sorted", "buffered", "shuffled")}
    assert found["sorted"].ratio > found["buffered"].ratio > 3
    assert found["sorted"].p_value == found["buffered"].p_value == 1 / 200
    assert not found["sorted"].is_mixed
    assert not found["buffered"].is_mixed
    assert found["shuffled"].is_mixed
    assert 0.7 < found["shuffled"].ratio < found["shuffled"].chance < 1.5


def test_it_is_the_ratio_of_an_analysis_of_variance() -> None:
    x = torch.randn(60, generator=torch.Generator().manual_seed(3)).double()
    x[:20] += 1
    parts = x.split(20)
    between = sum(len(p) * (p.mean() - x.mean()) ** 2 for p in parts) / 2
    within = sum(((p - p.mean()) ** 2).sum() for p in parts) / 57
    assert mixing(parts).ratio == pytest.approx(float(between / within))


def test_a_shuffled_set_is_called_unmixed_once_in_a_hundred() -> None:
    generator = torch.Generator().manual_seed(4)
    alarms = 0
    for _ in range(100):
        x = torch.randn(120, 2, generator=generator)
        alarms += not mixing(x.split(10), shuffles=99).is_mixed
    assert alarms <= 5


def test_features_count_alike_whatever_their_scale_and_size() -> None:
    x = torch.randn(640, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    assert mixing(x.split(16)).is_mixed
    shade = torch.arange(640).view(-1, 1, 1) / 200
    x[:, 1] += shade
    found = mixing(x.split(16)).ratio
    x[:, 1] *= 1e-6
    assert mixing(x.split(16)).ratio == pytest.approx(found)
    assert not mixing(x.split(16)).is_mixed


def test_sorting_by_length_is_seen_and_a_window_keeps_other_labels_mixed() -> None:
    batches = [torch.tensor(b) for b in LengthBucketSampler(LENGTHS, 32, window=8)]
    other = torch.randint(10, (1000,), generator=torch.Generator().manual_seed(6))
    assert mixing([LENGTHS[b].float() for b in batches]).ratio > 100
    assert mixing([other[b] for b in batches]).is_mixed


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ArgumentError, match="got 1 of 8 samples"):
        mixing([torch.zeros(8)])
    with pytest.raises(ArgumentError, match="all 8 samples are the same"):
        mixing([torch.ones(4), torch.ones(4)])
    with pytest.raises(ArgumentError, match="got 3 of 3"):
        mixing([torch.ones(1)] * 3)
    with pytest.raises(ShapeError, match="same kind"):
        mixing([torch.ones(4, 2), torch.ones(4, 3)])


def test_it_says_and_tells_what_it_found() -> None:
    found = mixing(labels("sorted").split(32))
    assert "not mixed: shuffle" in str(found)
    assert found.to_json()["is_mixed"] is False
    assert "30 batches of 960 samples" in found.to_text()
