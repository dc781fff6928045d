"""D12 of any model: answers that padding which no sample needs makes worse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, train
from normkit.doctor import Finding, diagnose
from normkit.doctor.examination.trimmed import (
    _trimmed,  # pyright: ignore[reportPrivateUsage]
)

Pairs = list[tuple[Any, Tensor]]


class Reader(nn.Module):
    """The mean of the vectors of words, with padding or without."""

    def __init__(self, *, is_masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(20, 16), nn.Linear(16, 2)
        self.is_masked = is_masked

    def forward(self, x: Tensor) -> Tensor:
        real = (x != 0) if self.is_masked else torch.ones_like(x, dtype=torch.bool)
        vectors = self.words(x) * real[..., None]
        return self.last(vectors.sum(1) / real.sum(1, keepdim=True))


def sentences(places: int, count: int = 12) -> Pairs:
    """Sentences of 4 to 10 words; the answer is in which half most of them are."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        words = torch.randint(1, 20, (32, 10), generator=draw)
        lengths = torch.randint(4, 11, (32, 1), generator=draw)
        real = torch.arange(10) < lengths
        y = (((words > 9) & real).sum(1) * 2 > lengths[:, 0]).long()
        made.append((F.pad(words * real, (0, places - 10)), y))
    return made


def told(model: nn.Module, data: Pairs) -> list[Finding]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for x, y in sentences(10, 200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = diagnose(model, data, F.cross_entropy).readings
    return [f for f in found if f.id == "D12" and f.layer == ""]


@pytest.mark.parametrize(
    ("is_masked", "expected"), [(False, "warning"), (True, "clear")]
)
def test_a_model_that_reads_padding_is_told(expected: str, *, is_masked: bool) -> None:
    (found,) = told(Reader(is_masked=is_masked), sentences(80))
    assert found.severity == expected
    assert "without 70 positions" in found.evidence


def test_padding_to_the_longest_sample_is_not_judged() -> None:
    assert not told(Reader(is_masked=False), sentences(10))


def batch(kind: str) -> Any:
    x = torch.rand(4, 9, 3) + 1
    lengths = torch.tensor([6, 5, 2, 6])
    x[torch.arange(9) >= lengths[:, None]] = 0
    if kind == "features":
        return x, torch.arange(4)
    if kind == "channels first":
        return x.movedim(1, 2), torch.arange(4)
    if kind == "tokens with a mask":
        tokens = x.sum(2).ceil().long()
        return {"x": tokens, "mask": tokens[:, None] == tokens[..., None]}, tokens
    if kind == "of one length":
        return torch.cat([torch.ones(4, 6, 3), torch.zeros(4, 3, 3)], 1), None
    if kind == "images":
        return x[:, None], None
    return torch.rand(4, 9, 3), None


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("features", [(4, 6, 3), (4,)]),
        ("channels first", [(4, 3, 6), (4,)]),
        ("tokens with a mask", [(4, 6), (4, 6, 6), (4, 6)]),
        ("of one length", None),
        ("images", None),
        ("whole", None),
    ],
)
def test_what_is_cut(kind: str, shapes: list[tuple[int, ...]] | None) -> None:
    found = _trimmed(batch(kind))
    if shapes is None:
        assert found is None
        return
    assert found is not None
    (inputs, targets), kept, length = found
    parts = [*(inputs.values() if isinstance(inputs, dict) else [inputs]), targets]
    assert [tuple(part.shape) for part in parts] == shapes
    assert (kept, length) == (6, 9)


def test_a_model_of_one_length_is_not_judged() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 4))
    data = [batch("features") for _ in range(6)]
    found = diagnose(model, data, F.cross_entropy).readings
    assert not [f for f in found if f.id == "D12"]


class SideBySide(nn.Module):
    """Rows of a digit, a batch norm over them, and what reads them."""

    def __init__(self, *, is_pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv1d(8, 24, 1), nn.BatchNorm1d(24)
        self.last, self.is_pooled = nn.Linear(24 if is_pooled else 192, 10), is_pooled

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x.mT)).relu()
        return self.last(h.mean(2) if self.is_pooled else h.flatten(1))


@pytest.mark.parametrize(
    ("rows", "is_pooled", "expected"),
    [(2, False, "info"), (2, True, "warning"), (4, False, "warning")],
)
def test_some_padding_is_no_fault_of_a_network_that_takes_one_length(
    rows: int, expected: str, *, is_pooled: bool
) -> None:
    data = []
    for x, y in batches():
        images = x.view(-1, 8, 8) + 0.3
        images[:, 8 - rows :] = 0
        data.append((images, y))
    model = SideBySide(is_pooled=is_pooled)
    train(model, 240, data=data)
    found = diagnose(model, data, F.cross_entropy)
    assert {f.severity for f in found.readings if f.id == "D12"} == {expected}
    if expected == "info":
        new = diagnose(SideBySide(is_pooled=False).train(), data, F.cross_entropy)
        assert {f.severity for f in new.readings if f.id == "D12"} == {"warning"}
