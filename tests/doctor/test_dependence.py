"""Answers that depend on more than their own sample; each beside its clean twin."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import Finding, diagnose


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def told(model: nn.Module, data: Any, loss: Any = F.cross_entropy) -> list[Finding]:
    found = diagnose(model, list(data), loss).readings
    return [f for f in found if f.id == "D34" and f.is_alarm]


def sequences(size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(8):
        x = torch.randn(size, 12, 8)
        yield x, x[:, 3:6].mean(2).argmax(1)


class Recurrent(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(8, 24, **how), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0][:, -1])


def test_every_rank_runs_as_many_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward of a sharded model waits for that of the other ranks."""

    def calls(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> int:
        seen: list[int] = []
        model.register_forward_hook(lambda *_: seen.append(1))
        diagnose(model, data, F.cross_entropy)
        return len(seen)

    def of_all() -> set[int]:
        mixing, own = Recurrent(), Recurrent(batch_first=True)
        data = list(sequences())
        return {calls(mixing, data), calls(own, data)}

    assert len(of_all()) == 2  # on one rank answers decide
    name = "normkit.doctor.examination.examine._world_size"
    monkeypatch.setattr(name, lambda: 2)
    assert len(of_all()) == 1


class Attentive(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, **how)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.attention(h, h, h)[0].mean(1))


@pytest.mark.parametrize("kind", [Recurrent, Attentive])
def test_a_layer_over_the_samples_is_told(kind: type[nn.Module]) -> None:
    (found,) = told(kind(), sequences())
    assert found.severity == "error"
    assert "depends on the others in its batch" in found.evidence
    assert not told(kind(batch_first=True), sequences())


def test_rounding_of_answers_that_are_all_the_same_is_no_fault() -> None:
    class Alike(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            return 1 + 1e-6 * super().forward(x)

    assert not any("others" in f.evidence for f in told(Alike(), sequences()))


class Mixed(nn.Module):
    """Rows after a view or a transpose of (time, batch, features)."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.first, self.last, self.is_bad = nn.Linear(8, 16), nn.Linear(16, 3), is_bad

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.transpose(0, 1).contiguous())
        h = h.view(len(x), -1, 16) if self.is_bad else h.transpose(0, 1)
        return self.last(h.relu().mean(1))


def test_a_view_that_mixes_samples_is_told() -> None:
    assert told(Mixed(is_bad=True), sequences())
    assert not told(Mixed(is_bad=False), sequences())


class OneSize(nn.Module):
    """It takes no batch but of sixteen; one norm is of the batch, one of a sample."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.norm = nn.LayerNorm([16, 12, 16] if is_bad else [12, 16])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x).view(16, 12, 16))
        return self.last(h.relu().mean(1))


def test_a_layer_norm_over_the_batch_is_told() -> None:
    """No part of the batch can be given alone."""
    (found,) = told(OneSize(is_bad=True), sequences())
    assert found.severity == "error"
    assert "depends on the others in its batch" in found.evidence
    assert not told(OneSize(is_bad=False), sequences())


def test_nodes_of_one_graph_depend_on_each_other() -> None:
    """They take one size as well."""

    class Nodes(OneSize):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((torch.eye(16).roll(1, 0) @ x.flatten(1)).view_as(x))

    assert not told(Nodes(is_bad=False), sequences())


class Made(nn.Module):
    """A norm of features that no module holds, by one of three ways, or of a module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(8, 16), nn.Linear(16, 3), kind
        if kind == "held":
            self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).mT
        if self.kind == "held":
            h = self.norm(h)
        elif self.kind == "made":
            h = nn.BatchNorm1d(16)(h)
        elif self.kind == "called":
            h = F.batch_norm(h, None, None, training=True)
        elif self.kind == "instances":
            rows = F.batch_norm(h.reshape(1, -1, h.shape[2]), None, None, training=True)
            h = rows.view_as(h)
        return self.last(h.relu().mean(2))


@pytest.mark.parametrize("kind", ["made", "called"])
def test_a_batch_norm_of_no_module_is_named(kind: str) -> None:
    found = [
        f
        for f in diagnose(Made(kind), sequences(), F.cross_entropy).findings
        if f.is_alarm
    ]
    assert [f.id for f in found] == ["D09"]
    assert "belongs to none of its modules" in found[0].evidence


def test_such_a_norm_is_named_in_a_large_batch_of_images() -> None:
    """Each of its statistics is that of thousands of values there."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.batch_norm(self.first(x), None, None, training=True)
            return self.last(h.relu().mean((2, 3)))

    data = [(torch.randn(64, 1, 12, 12), torch.randint(0, 3, (64,))) for _ in range(4)]
    found = diagnose(Images(), data, F.cross_entropy).findings
    assert [f.id for f in found if f.is_alarm] == ["D09"]


@pytest.mark.parametrize("kind", ["held", "instances", "none"])
def test_a_norm_of_a_module_or_of_single_samples_is_no_fault(kind: str) -> None:
    assert "D09" not in diagnose(Made(kind), sequences(), F.cross_entropy).named


def test_a_call_beside_another_layer_over_the_samples_is_only_a_call() -> None:
    """Weights that are standardized by a batch norm, as timm does."""

    class Standard(Made):
        def forward(self, x: Tensor) -> Tensor:
            F.batch_norm(self.first.weight[None], None, None, training=True)
            return super().forward(x)

    assert "D09" not in diagnose(Standard("none"), sequences(), F.cross_entropy).named


def test_one_sequence_without_a_batch_is_not_judged() -> None:
    """The rows of a matrix that a recurrent layer reads are its steps, not samples."""

    class Steps(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0][:, : self.last.in_features])

    data = [(x[0], x[0, :, :3].argmax(1)) for x, _ in sequences()]
    assert not told(Steps(), data)


@pytest.mark.parametrize("size", [16, 12])
def test_time_first_is_no_fault(size: int) -> None:
    """Also where a batch has as many samples as steps: half of it is no batch."""

    class TimeFirst(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.rnn(x)[0][-1])

    data = [(x.transpose(0, 1), y) for x, y in sequences(size)]
    assert not told(TimeFirst(bidirectional=False), data)


def test_batch_statistics_in_eval_mode_are_no_fault() -> None:
    norm = nn.BatchNorm1d(24, track_running_stats=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(96, 24), norm, nn.Linear(24, 3))
    assert not told(model, sequences())


def functional(x: Tensor, *, is_on: bool) -> Tensor:
    return F.dropout(x, 0.5, is_on)


def fused(x: Tensor, *, is_on: bool) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if is_on else 0.0)


class Dropped(nn.Module):
    def __init__(self, drop: Any, *, is_bad: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.drop, self.is_bad = drop, is_bad

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x), is_on=self.training or self.is_bad)
        return self.last(h.mean(1))


@pytest.mark.parametrize("drop", [functional, fused])
def test_dropout_in_eval_mode_is_told(drop: Any) -> None:
    (found,) = told(Dropped(drop, is_bad=True), sequences())
    assert "dropout is on in eval mode" in found.evidence
    assert not told(Dropped(drop, is_bad=False), sequences())


def test_noise_without_dropout_is_no_fault() -> None:
    """As in a variational autoencoder, whose samples are drawn in eval mode too."""

    class Sampled(Dropped):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last((h + torch.randn_like(h)).mean(1))

    assert not told(Sampled(functional, is_bad=False), sequences())


class Language(nn.Module):
    def __init__(self, *, is_causal: bool, classes_first: bool, words: int) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(words, 16), nn.Linear(16, words)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.is_causal, self.classes_first = is_causal, classes_first

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.last(self.block(self.embed(x), mask if self.is_causal else None))
        return y.mT if self.classes_first else y


def flattened(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.reshape(-1, y.shape[2]), target.reshape(-1))


@pytest.mark.parametrize("words", [10, 9])
@pytest.mark.parametrize("classes_first", [True, False])
def test_a_model_that_sees_its_targets_is_told(words: int, classes_first: bool) -> None:
    text = [torch.randint(words, (16, 10)) for _ in range(8)]
    data = [(part[:, :-1], part[:, 1:]) for part in text]
    loss = F.cross_entropy if classes_first else flattened
    how = {"words": words, "classes_first": classes_first}
    (found,) = told(Language(is_causal=False, **how), data, loss)
    assert "the model sees that token" in found.evidence
    assert not told(Language(is_causal=True, **how), data, loss)
    # Tags of the tokens are no targets that it should not see.
    tags = [(x, (x + 1) % words) for x, _ in data]
    assert not told(Language(is_causal=False, **how), tags, loss)


def by_view(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.reshape(-1, y.shape[1]), target.reshape(-1))


def by_permute(y: Tensor, target: Tensor) -> Tensor:
    y = y.permute(0, 2, 3, 1)
    return F.cross_entropy(y.reshape(-1, y.shape[3]), target.reshape(-1))


def overlap(y: Tensor, target: Tensor) -> Tensor:
    """Dice loss, in which each pixel acts on all."""
    p, t = y.softmax(1), F.one_hot(target, 3).permute(0, 3, 1, 2)
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def test_targets_of_other_pixels_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    images = [torch.randn(8, 1, 7, 7) for _ in range(8)]
    data = [(x, (x[:, 0] > 0).long() + (x[:, 0] > 1).long()) for x in images]
    (found,) = told(model, data, by_view)
    assert "other pixels" in found.evidence
    for loss in (by_permute, F.cross_entropy, overlap):
        assert not told(model, data, loss)


def test_a_generator_has_targets_of_one_value() -> None:
    """Its critic tells its answers apart, which a classifier's targets do not."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    critic, decide = nn.Linear(8, 1), F.binary_cross_entropy_with_logits
    data = [(torch.randn(32, 8), torch.ones(32, 1)) for _ in range(8)]
    assert not told(model, data, lambda y, ones: decide(critic(y), ones))
    (found,) = told(nn.Sequential(model, nn.ReLU(), critic), data, decide)
    assert "every target is 1" in found.evidence


def test_a_trained_shift_does_not_hide_an_erased_input() -> None:
    """The norm has one value per group; what differs in its output is its shift."""

    def named(*between: nn.Module) -> list[str]:
        norm = nn.GroupNorm(16, 16)
        nn.init.normal_(norm.bias)
        order = [norm, *between] if between else [norm]
        model = nn.Sequential(nn.Linear(8, 16), *order, nn.ReLU(), nn.Linear(16, 3))
        data = [(x[:, 0], y) for x, y in sequences(32)]
        if not between:
            return diagnose(model, data, F.cross_entropy).named
        norm.num_groups = 2
        return diagnose(model, data, F.cross_entropy).named

    assert named()[0] == "D29"
    assert "D29" not in named(nn.Identity())


def lit(draws: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(draws):
        x = torch.randn(32, 1, 6, 6)
        y = (x[:, 0, :3].mean((1, 2)) > x[:, 0, 3:].mean((1, 2))).long()
        yield x * (0.2 + 3 * torch.rand(32, 1, 1, 1)) + 3 * torch.randn(32, 1, 1, 1), y


def test_running_statistics_of_an_instance_norm_are_a_gap() -> None:
    def named(*, is_bad: bool) -> list[str]:
        torch.manual_seed(0)
        norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=is_bad)
        conv = nn.Conv2d(1, 8, 3, padding=1)
        model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for x, y in lit(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found = diagnose(model, list(lit()), F.cross_entropy)
        found.repair()  # which changes nothing here, and harms nothing
        return found.named

    assert "D02" in named(is_bad=True)
    assert "D02" not in named(is_bad=False)
