"""Branches of the code that one trace does not show: dtype, values, sizes, rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normkit
from fold.randomised import assert_same, randomised
from fold.test_traps import IMAGE, Net, conv, normal


def single(net):
    """`net` with random statistics, in float32."""
    return randomised(net).float()


def conv_norm(forward, **more):
    return Net(forward, conv=conv(), bn=nn.BatchNorm2d(4), **more)


def test_a_branch_on_the_dtype_keeps_the_batch_norm():
    def forward(net, x):
        y = net.conv(x)
        return net.bn(y.clamp(-0.1, 0.1) if x.dtype == torch.float32 else y)

    net, x = single(conv_norm(forward)), torch.randn(IMAGE)
    folded, ledger = normkit.fold(net, x)
    assert torch.equal(folded(x), net(x))
    assert "looks at the dtype of tensors" in ledger.left[0].reason


def test_a_number_that_depends_on_the_dtype_undoes_the_fold():
    def forward(net, x):
        return net.bn(net.conv(x)) * (1.0 if x.dtype == torch.float32 else 3.0)

    net, x = single(conv_norm(forward)), torch.randn(IMAGE)
    folded, ledger = normkit.fold(net, x)
    assert torch.equal(folded(x), net(x))
    assert "in float32 the model itself differs" in ledger.left[0].reason


SIZES = {
    "mask": lambda x: x[x > 50].numel(),
    "mask in a tuple": lambda x: len(x[0, x[0] > 50]),
    "masked_select": lambda x: x.masked_select(x > 50).shape[0],
    "nonzero": lambda x: torch.nonzero(x > 50).size(0),
    "where": lambda x: torch.where(x > 50)[0].numel(),
    "unique": lambda x: torch.unique(x > 50).numel() - 1,
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_branch_on_a_size_that_depends_on_values_keeps_the_batch_norm(size):
    def forward(net, x):
        y = net.conv(x)
        return net.bn(F.gelu(y) if size(x) else y)

    net, x = randomised(conv_norm(forward)), normal(*IMAGE)
    folded, ledger = normkit.fold(net, x)
    assert_same(net, folded, x, 100 * x)
    assert "sizes that depend on values of tensors" in ledger.left[0].reason


def test_a_size_of_values_is_followed_to_the_module_that_asks_for_it():
    class Select(nn.Module):
        def forward(self, x):
            return 2 * x[x > 50]

    def forward(net, x):
        y = net.conv(x)
        return net.bn(F.gelu(y) if net.select(x).numel() else y)

    net, x = randomised(conv_norm(forward, select=Select())), normal(*IMAGE)
    folded, ledger = normkit.fold(net, x)
    assert_same(net, folded, x, 100 * x)
    assert "the forward of '' looks at sizes" in ledger.left[0].reason


def test_indices_that_are_numbers_have_a_known_size():
    order = torch.tensor([2, 0, 3, 1])
    net = single(conv_norm(lambda net, x: net.bn(net.conv(x[:, order]))))
    _, ledger = normkit.fold(net, torch.randn(IMAGE))
    assert len(ledger.folded) == 1


@pytest.mark.parametrize("dim", [0, 3], ids=["batch", "width"])
def test_a_fold_that_is_wrong_at_another_size_is_undone(dim):
    def forward(net, x):
        y = net.conv(x)
        return F.gelu(net.bn(y)) + (0 if x.shape[dim] == IMAGE[dim] else F.gelu(y))

    net, x = randomised(conv_norm(forward)), normal(*IMAGE)
    folded, ledger = normkit.fold(net, x)
    assert_same(net, folded, x, normal(3, 4, 9, 9))
    assert "the outputs differed" in ledger.left[0].reason


def test_a_model_that_takes_one_size_alone_folds_and_the_ledger_says_so():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Flatten(0), nn.Linear(240, 2))
    _, ledger = normkit.fold(randomised(net), normal(*IMAGE))
    assert len(ledger.folded) == 1
    assert "another" not in ledger.proof
    assert "on other sizes or arguments, with gradients" in ledger.to_text()


def test_another_size_that_the_model_takes_is_named():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4))
    _, ledger = normkit.fold(single(net), torch.randn(IMAGE))
    assert "another batch and spatial size" in ledger.proof
    assert "; float32 on the example inputs" in ledger.proof


def test_a_fold_that_only_float64_can_hold_is_undone():
    net = nn.Sequential(normkit.nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    net[0].running_mean.fill_(1e5)
    x = 1e5 + torch.randn(64, 4)
    folded, ledger = normkit.fold(net, x)
    exact = net.double()(x.double())
    assert (folded(x) - exact).abs().max() < 1e-5
    assert "in the model's own dtype the outputs differed" in ledger.left[0].reason
