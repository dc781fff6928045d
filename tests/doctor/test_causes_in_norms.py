"""Faults of norms, and of what an optimizer holds, are named before what they do."""

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from doctor.models import batches, norms, train, trained
from normkit.doctor import Diagnosis, Finding, Statistics, checks, diagnose, watch
from normkit.doctor.finding import ranked
from normkit.doctor.layer_statistics import Rows
from normkit.doctor.measurements import LayerStatistics

LOSS = nn.CrossEntropyLoss()
DATA = batches()[:24]


def examined(model: nn.Module) -> Diagnosis:
    return diagnose(model, DATA, LOSS)


def ids(found: list[Finding]) -> list[str]:
    return list(dict.fromkeys(f.id for f in ranked(found) if f.is_alarm))


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_one_channel_that_eval_mode_blows_up_is_named_before_the_gap(net: str) -> None:
    model = trained(net, 200)
    name, last = [*norms(model).items()][-1]
    last.running_var[3] = 1e-7
    found = examined(model)
    first = found.findings[0]
    assert (first.id, first.severity, first.layers) == ("D01", "error", (name,))
    assert "channel 3" in first.evidence
    assert [f.follows for f in found.findings if f.id == "D02"] == ["D01"]
    assert not examined(trained(net, 200)).named


def test_a_feature_that_was_rare_of_late_is_no_fault_while_it_costs_nothing() -> None:
    model = trained("mlp", 200)
    first = norms(model)["1"]
    with torch.no_grad():
        model[3].weight[:, 5] = 0  # nothing reads it
    first.running_var[5] = 1e-7
    found = examined(model)
    assert "D01" not in found.named
    assert not found.errors


class Slim(nn.Module):
    """Two layers of which a part can run alone; empty channels fill up its norms."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        sizes = (24, 24) if is_bad else (24, 6)
        self.first, self.last = nn.Linear(64, 24), nn.Linear(24, 10)
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes)
        self.is_bad, self.width = is_bad, 24

    def forward(self, x: Tensor) -> Tensor:
        c = self.width
        h = F.linear(x, self.first.weight[:c], self.first.bias[:c])
        if self.is_bad:
            h = self.norms[0](F.pad(h, (0, 24 - c)))[:, :c]
        else:
            h = self.norms[int(c < 24)](h)
        return F.linear(h.relu(), self.last.weight[:, :c], self.last.bias)


def test_a_norm_whose_channels_are_empty_in_every_other_forward_is_told() -> None:
    def found(*, is_bad: bool) -> list[str]:
        model = Slim(is_bad=is_bad)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        with watch(model, optimizer, every=5) as seen:
            for x, y in itertools.islice(itertools.cycle(batches()), 60):
                optimizer.zero_grad()
                for model.width in (24, 6):
                    LOSS(model(x), y).backward()
                optimizer.step()
        return ids(list(seen.findings()))

    assert found(is_bad=True)[0] == "D33"
    assert "D33" not in found(is_bad=False)


@pytest.mark.parametrize("kind", ["dying", "blank", "sparse"])
def test_channels_that_die_or_blank_batches_are_no_second_width(kind: str) -> None:
    made = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, every=1) as seen:
        for step in range(40):
            x = torch.randn(8, 32, generator=made)
            if kind == "dying":
                x[:, :step] = 0
            elif kind == "blank" and step % 2:
                x[:] = 0
            elif kind == "sparse":
                x = (x - 1.5).relu()
            optimizer.zero_grad()
            LOSS(model(x), torch.arange(8) % 2).backward()
            optimizer.step()
    assert "D33" not in ids(list(seen.findings()))


def normalized(norm: Callable[[int], nn.Module], depth: int = 5) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(32 if index else 64, 32), norm(32), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm])
def test_scales_drawn_like_weights_are_named_first(norm: type[nn.Module]) -> None:
    def found(mean: float) -> list[str]:
        torch.manual_seed(0)
        model = normalized(norm)
        for layer in model:
            if isinstance(layer, norm):
                nn.init.normal_(layer.weight, mean, 0.02)
        train(model, 150, lr=0.01)
        return examined(model).named

    assert found(0.0)[0] == "D19"
    assert "D19" not in found(1.0)


class Offset(nn.RMSNorm):
    """An RMS norm that keeps its scales less one."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class Branches(nn.Module):
    """Residual blocks whose last norms started at a scale of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(64, 32), nn.LayerNorm(32)
        self.bodies = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32))
            for _ in range(3)
        )
        self.last = nn.Linear(32, 10)
        for body in self.bodies:
            nn.init.normal_(body[2].weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        for body in self.bodies:
            x = x + body(x)
        return self.last(x)


class BranchesOnly(Branches):
    """The same, without any other norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()


def pruned() -> nn.Module:
    """A network most of whose scales a penalty has brought to about zero."""
    model = trained("mlp", 200)
    for norm in norms(model).values():
        size = len(norm.weight)
        with torch.no_grad():
            norm.weight[: size * 3 // 4] = 1e-3 * torch.randn(size * 3 // 4)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: normalized(Offset), Branches, BranchesOnly, pruned],
    ids=["offset", "branches", "branches_only", "pruned"],
)
def test_small_scales_of_both_signs_that_are_meant_are_no_fault(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    assert "D19" not in examined(make()).named


class Frozen(nn.Module):
    """Batch norm whose four tensors are buffers."""

    def __init__(self, width: int, var: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.full((width,), var))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.running_var + 1e-5).rsqrt()[:, None, None]


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(8):
        conv = nn.Conv2d(16 if index else 1, 16, 3, padding=1, bias=False)
        layers += [conv, norm(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


@pytest.mark.parametrize("var", [1.0, 1 - 1e-5])
def test_frozen_norms_that_are_the_identity_are_named_first(var: float) -> None:
    model = convolutions(lambda width: Frozen(width, var))
    train(model, 60, lr=0.02)
    found = examined(model).findings
    assert (found[0].id, len(found[0].layers)) == ("D32", 8)
    assert {f.follows for f in found if f.id in ("D22", "D24")} == {"D32"}


def test_frozen_norms_of_a_checkpoint_and_those_that_nothing_needs_are_silent() -> None:
    loaded = convolutions(lambda width: Frozen(width, 0.07))
    assert "D32" not in examined(loaded).named
    folded = convolutions(Frozen)
    for layer in folded:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    assert "D32" not in examined(folded).named


def fine_tuned(saved: dict[str, Tensor], *, bias: bool, steps: int) -> nn.Module:
    """A new head behind a frozen backbone in eval mode, with what fits of a file."""
    torch.manual_seed(1)
    model = backbone(bias=bias)
    model.load_state_dict(saved, strict=False)
    model.requires_grad_(False).eval()
    head = nn.Linear(256, 10)
    for step in range(steps):
        x, y = DATA[step % len(DATA)]
        F.cross_entropy(head(model(x)), y).backward()
        with torch.no_grad():
            for p in head.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    return nn.Sequential(model, head)


def backbone(*, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for fan_in in (1, 16, 16):
        conv = nn.Conv2d(fan_in, 16, 3, padding=1, bias=bias)
        layers += [conv, nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())


@functools.cache
def saved_backbone(*, is_folded: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(backbone(bias=False), nn.Linear(256, 10))
    train(model, 60)
    model, found = model.eval()[0], {}
    if is_folded:
        for index in (1, 4, 7):
            nn.init.constant_(model[index + 1].weight, 0.2)
            conv = fuse_conv_bn_eval(model[index], model[index + 1])
            found |= {f"{index}.{k}": v for k, v in conv.state_dict().items()}
        return found
    return model.state_dict()


def test_norms_that_are_frozen_before_they_were_loaded_are_told() -> None:
    saved = saved_backbone(is_folded=False)
    renamed = {f"module.{name}": value for name, value in saved.items()}
    found, *others = examined(fine_tuned(renamed, bias=False, steps=100)).findings
    assert all(f.follows == "D32" for f in others)
    assert (found.id, found.layers) == ("D32", ("0.2", "0.5", "0.8"))
    assert "strict=False" in found.fix


def test_new_norms_behind_a_bias_are_told_where_eval_mode_says_nothing() -> None:
    """A bias may be that of a fold, but a folded network answers."""
    model = fine_tuned({}, bias=True, steps=100).eval()
    assert "D32" not in examined(model).named  # 256 random features tell something
    nn.init.normal_(model[1].weight, 0, 1e-4)  # pyright: ignore[reportArgumentType]
    found = examined(model).findings[0]
    assert (found.id, found.layers) == ("D32", ("0.2", "0.5", "0.8"))
    assert "no better than the most frequent class" in found.evidence


@pytest.mark.parametrize("kind", ["loaded", "folded", "fresh"])
def test_frozen_norms_that_are_meant_as_they_are_are_silent(kind: str) -> None:
    saved = saved_backbone(is_folded=kind == "folded")
    if kind == "fresh":
        saved = {}
    steps = 0 if kind == "fresh" else 100
    model = fine_tuned(saved, bias=kind == "folded", steps=steps)
    assert "D32" not in examined(model).named


class RMSNorm(nn.Module):
    """An RMS norm that computes in a dtype of its own."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight, self.dtype = nn.Parameter(torch.ones(width)), dtype

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.dtype)
        squares = h.pow(2).sum(-1, keepdim=True) / h.shape[-1]
        return (h * (squares + 1e-5).rsqrt()).to(x.dtype) * self.weight


class Loud(nn.Module):
    """Rows of which about half have a sum of squares above 65,504."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 272), norm, nn.Linear(272, 10)
        nn.init.normal_(self.first.weight, 0.0, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def test_squares_that_overflow_in_half_precision_are_named_first() -> None:
    torch.manual_seed(0)
    found = examined(Loud(RMSNorm(272, torch.float16))).findings
    assert (found[0].id, found[0].layer) == ("D16", "norm")
    assert "sum the squares in float32" in found[0].fix
    assert "D16" not in examined(Loud(RMSNorm(272))).named


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (Rows(50, 50, 50, 0), "error"),
        # Padding is left out by its place, not by its size.
        (Rows(50, 10, 50, 0), "clear"),
        (Rows(50, 50, 50, 10), "clear"),
        (Rows(50, 0, 50, 0), "clear"),
        # Three rows of padding may be large by chance.
        (Rows(3, 3, 50, 0), None),
        # Where all rows are large, they may be zero for another reason.
        (Rows(50, 50, 0, 0), None),
    ],
)
def test_lost_rows_must_be_the_large_ones(rows: Rows, expected: str | None) -> None:
    layer = LayerStatistics("norm", "RMSNorm", "norm", rows=rows)
    found = [f.severity for f in checks.run(Statistics((layer,)), ["D16"])]
    assert found == ([expected] if expected else [])


def watched(*, is_bad: bool, is_idle: bool = False) -> Iterator[Finding]:
    """Training whose optimizer was made before the first layers were unfrozen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 10),
    )
    held = model[4] if is_bad else model
    optimizer = torch.optim.SGD(held.parameters(), 0.05)
    other = torch.optim.SGD(model[:4].parameters(), 0.05)
    with watch(model, optimizer, every=2) as seen:
        for x, y in itertools.islice(itertools.cycle(batches()), 60):
            optimizer.zero_grad()
            other.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            if is_idle:
                other.step()
    yield from seen.findings()


def test_layers_that_the_optimizer_does_not_hold_are_told_as_that() -> None:
    found = [f for f in ranked(watched(is_bad=True)) if f.is_alarm]
    assert [(f.id, f.layers) for f in found] == [("D27", ("0", "2"))]
    assert "does not hold it" in found[0].evidence
    assert not ids(list(watched(is_bad=False)))


def test_layers_that_another_optimizer_holds_are_not_left_out() -> None:
    found = watched(is_bad=True, is_idle=True)
    assert not [f for f in found if "does not hold it" in f.evidence]
