"""The proof at run time: a fold that is wrong never leaves `fold`."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from fold.randomised import assert_same, randomised
from fold.test_traps import IMAGE, Net, conv, normal
from normkit.fold.algebra import WeightLayout
from normkit.fold.equivalence import difference
from normkit.fold.ir.nodes import BatchNorm, Linear, Move
from normkit.fold.search import solve
from normkit.fold.torch.harness import perturbed


def wrong_groups(patch):
    """The weight of a grouped transposed conv read as that of a plain one."""
    right = WeightLayout.to_goik
    patch.setattr(
        WeightLayout,
        "to_goik",
        lambda self, weight: right(self, weight).flip(0),
    )


def forgotten_bias(patch):
    right = Linear.edits

    def edits(self, gauges):
        found = right(self, gauges)
        return {s: t for s, t in found.items() if not s.name.endswith("bias")} or found

    patch.setattr(Linear, "edits", edits)


def forgotten_mean(patch):
    right = BatchNorm.affine

    def affine(self):
        found = right(self)
        return type(found)(found.scale, found.shift * 0 + 1.0)

    patch.setattr(BatchNorm, "affine", affine)


def eps_outside_the_root(patch):
    right = BatchNorm.affine

    def affine(self):
        eps, self.eps = self.eps, 0.0
        try:
            return right(self)
        finally:
            self.eps = eps

    patch.setattr(BatchNorm, "affine", affine)


def other_readers_forgotten(patch):
    right = solve.Search.around

    def around(self, value):
        return right(self, value)[:1]

    patch.setattr(solve.Search, "around", around)


def moved_the_wrong_way(patch):
    right = Move._numbered

    def numbered(self, shapes):
        found = right(self, shapes)
        return replace(found, outputs=tuple(out.flip(1) for out in found.outputs))

    patch.setattr(Move, "_numbered", numbered)


def network():
    def forward(net, x):
        y = F.gelu(net.bn1(net.up(x)))
        z = net.conv(y)
        return F.gelu(net.bn2(net.shuffle(z))) + F.gelu(net.narrow(y))

    net = Net(
        forward,
        up=nn.ConvTranspose2d(4, 8, 2, groups=2),
        bn1=nn.BatchNorm2d(8, eps=0.1),
        conv=conv(8, 6),
        shuffle=nn.ChannelShuffle(2),
        bn2=nn.BatchNorm2d(6, eps=0.1),
        narrow=conv(8, 6),
    )
    return randomised(net)


FAULTS = [
    wrong_groups,
    forgotten_bias,
    forgotten_mean,
    eps_outside_the_root,
    moved_the_wrong_way,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_fold_is_undone_and_said(fault, monkeypatch):
    net, x = network(), normal(*IMAGE)
    _, ledger = normkit.fold(net, x)
    assert len(ledger.folded) == 2
    fault(monkeypatch)
    folded, ledger = normkit.fold(net, x)
    assert_same(net, folded, x, normal(*IMAGE))
    assert any("differed by" in entry.reason for entry in ledger.left)


def test_a_fold_that_forgets_another_reader_is_undone(monkeypatch):
    net = Net(
        lambda net, x: F.gelu(net.bn(y := net.conv(x))) + F.gelu(y),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    other_readers_forgotten(monkeypatch)
    net, x = randomised(net), normal(*IMAGE)
    folded, ledger = normkit.fold(net, x)
    assert_same(net, folded, x)
    assert "outputs differed by" in ledger.left[0].reason


def test_only_the_culprit_is_undone(monkeypatch):
    net, x = network(), normal(*IMAGE)
    right = BatchNorm.affine

    def affine(self):
        found = right(self)
        return type(found)(found.scale * (1 + (self.label == "'bn2'")), found.shift)

    monkeypatch.setattr(BatchNorm, "affine", affine)
    folded, ledger = normkit.fold(net, x)
    assert [entry.name for entry in ledger.left] == ["bn2"]
    assert_same(net, folded, x)


def test_a_fold_that_holds_for_the_first_input_alone_is_undone():
    class Coincidence(nn.Module):
        """Adds a copy of the conv's output only where the input is not all ones."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(), nn.BatchNorm2d(4))

        def forward(self, x):
            if torch.equal(x, torch.ones_like(x)):
                return F.gelu(self.body(x))
            return F.gelu(self.body(x)) + F.gelu(self.body[0](x))

    net = randomised(Coincidence())
    x = torch.ones(IMAGE, dtype=torch.float64)
    folded, ledger = normkit.fold(net, x)
    assert len(ledger.left) == 1
    assert_same(net, folded, x, normal(*IMAGE))


def test_a_model_in_float32_is_proven_in_float64():
    net = Net(
        lambda net, x: net.bn(net.conv(x.float())).to(torch.float32) * torch.ones(1),
        conv=conv(),
        bn=nn.BatchNorm2d(4),
    )
    _, ledger = normkit.fold(randomised(net).float(), torch.randn(IMAGE))
    assert len(ledger.folded) == 1
    assert ledger.max_difference < 1e-13
    assert torch.get_default_dtype() == torch.float32


def test_differences_are_relative_to_the_largest_value():
    one = {"a": torch.tensor([1.0, -200.0]), "b": torch.tensor([3])}
    other = {"a": torch.tensor([1.5, -200.0]), "b": torch.tensor([3])}
    assert difference(one, other) == 0.5 / 200
    assert difference(one, {**other, "b": torch.tensor([4])}) == float("inf")
    assert difference(one, {"a": one["a"]}) == float("inf")
    assert difference(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == 0
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0])
    for one, other in itertools.product(values, repeat=2):
        same = torch.allclose(one, other, equal_nan=True)
        assert same == (difference(one, other) == 0)
        for a, b in (
            (one, other),
            (torch.complex(one, one), torch.complex(one, other)),
        ):
            is_ordinary = bool(one.isfinite() and other.isfinite())
            assert same or is_ordinary == (difference(a, b) < float("inf"))


def test_random_inputs_look_like_the_given_ones_and_draw_nothing():
    given = (5 + torch.randn(40), torch.arange(9), torch.tensor([True, False]), "s")
    state = torch.get_rng_state()
    made = perturbed(given, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(made[0], given[0])
    assert sorted(made[1].tolist()) == list(range(9))
    assert made[2].dtype == torch.bool
    assert made[3] == "s"


def test_nothing_but_the_result_changes():
    net = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(0.5), conv()))
    net[2].train()
    flags = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    x = normal(*IMAGE)
    state = torch.get_rng_state()
    folded, _ = normkit.fold(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == flags
    assert folded[2].training
    assert all(p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()


def test_what_a_forward_keeps_of_the_size_of_its_input_does_not_reach_the_next():
    class Window(nn.Module):
        """As in Swin: a small input makes the window small for ever."""

        def __init__(self):
            super().__init__()
            self.size, self.body = 96, nn.Sequential(conv(), nn.BatchNorm2d(4))

        def forward(self, x):
            self.size = min(self.size, x.shape[-1])
            y = self.body(x).unflatten(-1, (-1, self.size))
            return F.gelu(y)

    net = randomised(Window())
    _, ledger = normkit.fold(net, normal(2, 4, 96, 96))
    assert len(ledger.folded) == 1, ledger
    assert net.size == 96
