"""Causes of a train/eval gap that take a mask, a reference or shards to be known."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from doctor.models import Batches, batches, norms, train, trained
from normkit.doctor import GapExplanation, diagnose, explain_gap
from normkit.doctor.probes.layer_probe import constant_ends
from normkit.errors import ArgumentError
from normkit.nn import BatchNorm1d

LOSS = nn.CrossEntropyLoss()


def score(out: Tensor, y: Tensor) -> float:
    return -LOSS(out, y).item()


class Rows(nn.Module):
    """Reads the rows of a digit; a position that is 0 in all columns is padding."""

    def __init__(self, norm: type[nn.Module], *, masks: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(8, 16, 3, padding=1), norm(16)
        self.conv2, self.norm2 = nn.Conv1d(16, 16, 1), norm(16)
        self.head = nn.Linear(16, 10)
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        valid = (x != 0).any(1, keepdim=True)
        mask = {"mask": valid} if self.masks else {}
        y = self.norm1(self.conv1(x), **mask).relu()
        y = self.norm2(self.conv2(y), **mask).relu()
        return self.head((y * valid).sum(2) / valid.sum(2))


def padded(positions: int) -> Batches:
    """Digits row by row, with so many positions of padding behind them."""
    return [
        (nn.functional.pad(x.view(-1, 8, 8).mT, (0, positions)), y)
        for x, y in batches()[:6]
    ]


@functools.cache
def _reader(norm: type[nn.Module]) -> Rows:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Rows(norm, masks=norm is BatchNorm1d)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        train(model, 60, data=padded(16), optimizer=optimizer)
    return model


def reader(norm: type[nn.Module], positions: int = 16) -> Rows:
    """Trained with 16 positions of padding; its running statistics are of so many."""
    model = copy.deepcopy(_reader(norm))
    see(model, 8 * padded(positions))
    return model


def see(model: nn.Module, data: Batches) -> None:
    """Running statistics move over the data, and the weights do not."""
    model.train()
    with torch.no_grad():
        for x, _ in data:
            model(x)


def state(model: nn.Module) -> list[bytes]:
    return [t.numpy().tobytes() for t in model.state_dict().values()]


def is_exact(found: GapExplanation) -> bool:
    total = sum(part.value for part in found.causes)
    return total == pytest.approx(found.gap, abs=1e-9)


def value(found: GapExplanation, name: str) -> float:
    part = found.part(name)
    assert part is not None
    return part.value


def largest(found: GapExplanation) -> str:
    return max(found.causes, key=lambda part: abs(part.value)).name


def is_nothing(found: GapExplanation, name: str) -> bool:
    """Whether the part is 0 within its interval, and small beside what is planted."""
    part = found.part(name)
    assert part is not None
    low, high = part.interval
    return low <= 0 <= high and abs(part.value) < 0.02


def test_running_statistics_gathered_without_the_mask_are_padding() -> None:
    model = reader(BatchNorm1d)
    data = padded(16)
    clean = explain_gap(model, data, score)
    assert is_exact(clean)
    assert is_nothing(clean, "padding")
    model.masks = False
    see(model, 8 * data)
    model.masks = True
    before = state(model)
    found = explain_gap(model, data, score)
    assert state(model) == before
    assert is_exact(found)
    assert found.cause.name == "padding"
    assert found.cause.value == pytest.approx(found.gap, rel=0.1)
    assert found.cause.interval[0] > 0.1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_padding_than_in_training_is_told_from_another_domain() -> None:
    """No mask: padding is known by the constant ends, in both loaders or in one."""
    model = reader(nn.BatchNorm1d)
    data, bare = padded(16), padded(0)
    clean = explain_gap(model, data, score, train_loader=data)
    assert is_exact(clean)
    assert is_nothing(clean, "padding")
    found = explain_gap(model, bare, score, train_loader=data)
    assert is_exact(found)
    assert largest(found) == "padding"
    # The convolution blurs the first position of the padding, which is then not seen.
    assert abs(value(found, "domain shift")) < 0.2 * abs(value(found, "padding"))


def test_another_domain_with_the_same_padding_is_no_padding() -> None:
    """By way of statistics without padding two parts would come, of opposite signs."""
    model = reader(nn.BatchNorm1d)
    data = padded(16)
    ends = [constant_ends(x) for x, _ in data]
    moved = [
        (torch.where(end[:, None], x, x + 1.5), y)
        for (x, y), end in zip(data, ends, strict=True)
    ]
    found = explain_gap(model, moved, score, train_loader=data)
    assert is_exact(found)
    assert largest(found) == "domain shift"
    assert value(found, "padding") == 0


def test_running_statistics_without_padding_meet_batches_with_it() -> None:
    model = reader(nn.BatchNorm1d, positions=0)
    found = explain_gap(model, padded(16), score)
    assert is_exact(found)
    assert largest(found) == "padding"
    # What the convolution blurs is data here and stale there.
    assert value(found, "stale statistics") < 0.2 * value(found, "padding")


def test_a_mask_is_that_of_the_layer_wherever_its_channels_lie() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm1d(3, channel_dim=-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=x[..., :1] < 100)

    x = torch.randn(64, 7, 3)
    x[:, 5:] = 1000
    found = diagnose(Last(), x.split(16))
    stream = found.statistics.norms[0][1].in_training
    assert stream is not None
    assert torch.allclose(stream.pooled.mean, x[:, :5].double().mean((0, 1)), atol=1e-6)


def test_stale_statistics_are_not_taken_for_padding() -> None:
    model = reader(BatchNorm1d)
    for norm in norms(model).values():
        norm.running_mean += 2.0
    found = explain_gap(model, padded(16), score)
    assert is_exact(found)
    assert found.cause.name == "stale statistics"
    assert value(found, "padding") == 0


def test_a_cause_of_which_nothing_is_known_is_absent_and_not_zero() -> None:
    found = explain_gap(trained("mlp"), batches()[:4])
    names = ["un-frozen statistics", "one rank's statistics", "padding", "domain shift"]
    assert list(found.absent) == names
    assert [found.part(name) for name in names] == [None] * 4
    assert "padding (needs a layer called with mask=" in found.to_text()


def test_frozen_layers_that_went_on_moving_are_told_from_stale_ones() -> None:
    model = trained("mlp")
    data = batches()[:8]
    reference = copy.deepcopy(model.state_dict())
    frozen = list(norms(model))[:3]
    for name in frozen:
        norms(model)[name].requires_grad_(False)
    see(model, batches(seed=1)[:14])
    clean = explain_gap(model, data, score, reference=reference)
    assert is_exact(clean)
    assert abs(value(clean, "un-frozen statistics")) < 0.01
    see(model, 2 * [(0.5 * x - 1, y) for x, y in data])
    last = norms(model)["10"]
    last.running_mean.copy_(reference["10.running_mean"])
    last.running_var.copy_(reference["10.running_var"])
    for given in (reference, {k: reference[k] for k in reference if k[0] in "147"}):
        found = explain_gap(model, data, score, reference=given)
        assert is_exact(found)
        assert found.cause.name == "un-frozen statistics"
        assert found.cause.interval[0] > 0.1
        assert abs(value(found, "stale statistics")) < 0.2 * found.cause.value
    for name in frozen:
        norms(model)[name].eval()
    found = explain_gap(model, data, score, reference=reference)
    assert is_exact(found)
    assert is_nothing(found, "un-frozen statistics")


def test_a_reference_of_another_model_is_refused() -> None:
    model, data = trained("mlp"), batches()[:2]
    with pytest.raises(ArgumentError, match=r"'1\.running_mean'"):
        explain_gap(model, data, reference={"a.running_mean": torch.zeros(48)})
    other = {"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)}
    with pytest.raises(ArgumentError, match=r"shape \(3,\) for '1'"):
        explain_gap(model, data, reference=other)


def test_statistics_of_one_rank_are_told_from_those_of_all() -> None:
    model = trained("mlp")
    shards = [
        [(scale * x + shift, y) for x, y in batches()[rank * 4 : rank * 4 + 4]]
        for rank, (scale, shift) in enumerate([(0.5, -1.0), (1.0, 0.0), (1.2, 0.5)])
    ]
    data = [batch for step in zip(*shards, strict=True) for batch in step]
    see(model, 6 * data)
    clean = explain_gap(model, data, score, shards=shards)
    assert is_exact(clean)
    assert clean.rank is None
    assert is_nothing(clean, "one rank's statistics")
    see(model, 10 * shards[0])
    found = explain_gap(model, data, score, shards=shards)
    assert is_exact(found)
    assert found.rank == 0
    assert found.cause.name == "one rank's statistics"
    assert found.cause.value > 0.3
    assert is_nothing(found, "domain shift")
    assert "those of rank 0" in found.to_text()


def test_shards_are_of_two_ranks_or_more_and_all_of_the_training_data() -> None:
    model, data = trained("mlp"), batches()[:2]
    with pytest.raises(ArgumentError, match="got 1; for one rank"):
        explain_gap(model, data, shards=[data])
    with pytest.raises(ArgumentError, match="got both"):
        explain_gap(model, data, shards=[data, data], train_loader=data)
