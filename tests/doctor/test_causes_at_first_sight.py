"""Causes of programs that a doctor once missed, planted beside their clean twins."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build, norms, train, trained
from normkit.doctor import Finding, diagnose
from normkit.doctor.finding import Severity, ranked

LOSS = nn.CrossEntropyLoss()


def alarms(model: nn.Module, data: Any, loss: Any = LOSS) -> list[Finding]:
    return [f for f in diagnose(model, data, loss).findings if f.is_alarm]


def ids(found: list[Finding]) -> list[str]:
    return [f.id for f in found]


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_an_eps_that_is_the_number_of_channels_comes_before_what_it_does(
    net: str,
) -> None:
    model = build(net, eps=48.0, depth=6)
    train(model, 60)
    first, *others = alarms(model, batches()[:24])
    assert (first.id, set(first.layers)) == ("D16", set(norms(model)))
    assert "BatchNorm2d(64, 64)" in first.fix
    assert all(f.follows == "D16" for f in others if f.id in ("D21", "D22", "D24"))
    assert not alarms(trained(net), batches()[:24])


def test_the_eps_of_a_layer_norm_is_judged_by_its_inputs() -> None:
    def found(eps: float, scale: float = 1.0) -> list[str]:
        model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32, eps), nn.ReLU())
        nn.init.normal_(model[0].weight, 0.0, scale / 8)
        nn.init.zeros_(model[0].bias)
        return [f.layer for f in alarms(model.append(nn.Linear(32, 10)), batches()[:8])]

    assert "1" in found(32.0)
    assert "1" not in found(1e-5)
    # A small signal is not the fault of a usual eps, nor a large one below the signal.
    assert "1" not in found(1e-5, 1e-4)
    assert "1" not in found(0.01)


def without_averages(net: str) -> nn.Module:
    """A trained network whose batch norms forget their running statistics."""
    model = copy.deepcopy(trained(net))
    for norm in norms(model).values():
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return model


@pytest.mark.parametrize("net", ["mlp", "gru"])
def test_answers_that_depend_on_few_others_are_told(net: str) -> None:
    model = without_averages(net)
    (found,) = alarms(model, batches(4)[:80])
    assert (found.id, set(found.layers)) == ("D05", set(norms(model)))
    assert "depends on the 4 samples" in found.evidence
    assert not alarms(model, batches(64)[:24])


def test_batch_statistics_of_many_positions_are_no_fault() -> None:
    """Few images in training mode at evaluation, as in pix2pix, are instance norm."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8, track_running_stats=False),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
    )
    noise = [(torch.randn(2, 1, 32, 32), torch.randint(10, (2,))) for _ in range(60)]
    assert "D05" not in ids(alarms(model, noise))


class Sequences(nn.Module):
    """A layer over the rows of a digit, a norm, and a mean over time."""

    def __init__(self, net: str, *, is_bad: bool) -> None:
        super().__init__()
        self.net, self.is_bad = net, is_bad
        if net == "conv":
            self.first, size = nn.Conv1d(8, 24, 3, padding=1), 8 if is_bad else 24
            self.norm: nn.Module = nn.LayerNorm(size)
        else:
            self.first = nn.GRU(8, 24, batch_first=True)
            self.norm = nn.BatchNorm1d(8 if is_bad else 24)
        self.last = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.view(len(x), 8, 8))
        h = h if self.net == "conv" else h[0]
        h = self.norm(h) if self.is_bad else self.norm(h.mT).mT
        return self.last(h.relu().mean(2 if self.net == "conv" else 1))


@pytest.mark.parametrize("net", ["conv", "gru"])
def test_a_norm_that_takes_the_steps_for_the_features_is_told(net: str) -> None:
    model = Sequences(net, is_bad=True)
    train(model, 60)
    (found,) = (f for f in alarms(model, batches()[:24]) if f.id == "D29")
    assert found.layer == "norm"
    twin = Sequences(net, is_bad=False)
    train(twin, 150)
    assert "D29" not in ids(alarms(twin, batches()[:24]))


class Pooled(nn.Module):
    """Attention over the rows of a digit, with padding behind them."""

    def __init__(self, net: str, *, is_bad: bool) -> None:
        super().__init__()
        self.net, self.is_bad = net, is_bad
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(torch.randn(12, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.view(len(x), 8, 8), (0, 0, 0, 4))
        is_empty = (rows == 0).all(2)
        h = self.embed(rows) + self.place
        if self.net == "module":
            hidden = ~is_empty if self.is_bad else is_empty
            found = self.attention(h, h, h, key_padding_mask=hidden)[0]
        else:
            # True is read here, and left out above.
            read = is_empty if self.is_bad else ~is_empty
            heads = h.unflatten(2, (4, 8)).transpose(1, 2)
            mask = read[:, None, None]
            found = F.scaled_dot_product_attention(heads, heads, heads, mask)
            found = found.transpose(1, 2).flatten(2)
        return self.last((found * ~is_empty[..., None]).sum(1))


@pytest.mark.parametrize("net", ["module", "function"])
def test_a_mask_that_hides_all_but_padding_is_told_first(net: str) -> None:
    diagnosis = diagnose(Pooled(net, is_bad=True), batches()[:24], LOSS)
    found = [f for f in diagnosis.findings if f.is_alarm]
    assert found[0].id == "D36"
    assert "turn the mask round" in diagnosis.to_html()
    assert "turn the mask round" in found[0].fix
    assert "D36" not in ids(alarms(Pooled(net, is_bad=False), batches()[:24]))


def test_a_causal_mask_hides_no_key_from_all_queries() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    start = torch.zeros(8, 1, 16)  # the same first token in all samples
    data = [torch.cat([start, torch.randn(8, 4, 16)], 1) for _ in range(8)]
    found = diagnose(
        layer,
        data,
        lambda out, x: out.square().mean(),
        forward=lambda model, x: model(x, src_mask=mask),
    )
    assert "D36" not in ids([f for f in found.findings if f.is_alarm])


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_a_class_that_the_loss_ignores_is_told(net: str) -> None:
    def found(ignored: int) -> list[Finding]:
        loss = nn.CrossEntropyLoss(ignore_index=ignored)
        return alarms(trained(net), batches()[:24], loss)

    assert "targets of class 3 have no share" in found(3)[0].evidence
    assert not found(-100)


def marked(share: float) -> list[tuple[Tensor, Tensor]]:
    """Digits of which a share is marked as class 0, whatever it shows."""
    source = torch.Generator().manual_seed(0)
    made = []
    for x, y in batches(256):
        kept = (y > 0).nonzero().flatten()
        x, y = x[kept], y[kept].clone()
        y[torch.rand(len(y), generator=source) < share] = 0
        made.append((x[:192], y[:192]))
    return made


def hardest(scores: Tensor, y: Tensor) -> Tensor:
    """The mean loss of the quarter of a batch that is worst."""
    each = F.cross_entropy(scores, y, reduction="none")
    return each.topk(max(1, len(each) // 4)).values.mean()


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        # A mark of samples without a label is no class.
        (nn.CrossEntropyLoss(ignore_index=0), marked(0.5)),
        (hardest, batches()[:24]),
    ],
)
def test_samples_that_a_loss_leaves_out_on_purpose_are_no_fault(
    loss: Callable[..., Tensor], data: Any
) -> None:
    found = alarms(trained("mlp"), data, loss)
    assert not [f for f in found if "no share in the loss" in f.evidence]


def test_what_explains_a_gap_stands_before_it() -> None:
    def order(*found: tuple[str, Severity]) -> list[str]:
        return [f.id for f in ranked(Finding(i, "", "", s) for i, s in found)]

    gap: tuple[str, Severity] = ("D02", "error")
    assert order(gap, ("D33", "warning")) == ["D33", "D02"]
    # So do statistics that are off, which may be a consequence themselves.
    off: tuple[str, Severity] = ("D01", "warning")
    assert order(gap, off) == ["D01", "D02"]
    assert order(gap, off, ("D33", "warning")) == ["D33", "D01", "D02"]
    assert order(gap, off, ("D05", "warning")) == ["D05", "D01", "D02"]
    # Errors that a shared norm does not explain stay before both.
    assert order(gap, ("D33", "warning"), ("D25", "error")) == ["D25", "D33", "D02"]
    assert order(gap, ("D33", "info")) == ["D02", "D33"]
    assert order(gap, ("D14", "warning")) == ["D02", "D14"]
