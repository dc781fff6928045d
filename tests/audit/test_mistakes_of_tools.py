"""Mistakes that fusing tools have made, rebuilt small; each is found at its place."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normkit


def randomised(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and an affine that a mistake shows on."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 2)
            module.running_var.uniform_(0.2, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def image(channels: int = 3, size: int = 12) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator())


class TwoReaders(nn.Module):
    """A convolution that is read by a batch norm and by a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + self.relu(y)


def test_executorch_20601_a_convolution_with_a_second_reader_is_folded() -> None:
    """The guard counted the readers of the batch norm, not of the convolution."""
    model = randomised(TwoReaders())
    fused = copy.deepcopy(model)
    fused.conv = fuse_conv_bn_eval(fused.conv, fused.bn)
    fused.bn = nn.Identity()
    verdict = normkit.verify(model, fused, image())
    assert not verdict
    parting = verdict.parting
    assert parting.place == "'conv'"
    # It names the reader that gets the wrong tensor, and what it gets.
    assert "what a computes at 'bn'" in parting.note
    assert "relu" in parting.note
    assert "'bn'" not in parting.region_a


class CalledTwice(nn.Module):
    """One convolution, called with a batch norm and without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv1(x) + self.bn1(self.conv1(y))


def test_pytorch_104593_a_module_called_twice_is_folded_for_one_call() -> None:
    """`torch.fx`'s fuser looks at one call of the convolution."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch imports its own deprecated parts.
        from torch.fx.experimental.optimization import fuse

    model = randomised(CalledTwice())
    fused = fuse(model)
    x, y = image(1), image(1) + 1
    if torch.equal(fused(x, y), model(x, y)):
        pytest.skip("this version of torch.fx no longer makes the mistake")
    verdict = normkit.verify(model, fused, (x, y))
    assert not verdict
    # The call with the batch norm is right; the other one is not.
    assert verdict.parting.place == "'conv1'"
    assert not any("call 2" in label for label in verdict.parting.region_a)
    assert not any("bn1" in label for label in verdict.parting.region_a)


def folded_by_hand(model: nn.Sequential, change: str) -> nn.Sequential:
    """Fold '1' into '0' of a Sequential with one of the usual mistakes."""
    fused = copy.deepcopy(model)
    conv, bn = fused[0], fused[1]
    eps = {"hard-coded eps": 1e-5}.get(change, bn.eps)
    scale = bn.weight / torch.sqrt(bn.running_var + eps)
    shift = bn.bias - bn.running_mean * scale
    bias = conv.bias
    if change == "bias not scaled":
        shift = shift + bias
    elif change == "bias forgotten":
        pass
    else:
        shift = shift + bias * scale
    if change == "scale on the inputs":
        conv.weight.data = conv.weight.data * scale[None, :, None, None]
    else:
        conv.weight.data = conv.weight.data * scale[:, None, None, None]
    conv.bias.data = shift.detach()
    fused[1] = nn.Identity()
    return fused


@pytest.mark.parametrize(
    "change",
    ["hard-coded eps", "bias not scaled", "bias forgotten", "scale on the inputs"],
)
def test_the_arithmetic_of_a_fold_is_wrong(change: str) -> None:
    model = randomised(
        nn.Sequential(
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, eps=1e-2),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
        )
    )
    assert normkit.verify(model, folded_by_hand(model, ""), image(4))
    verdict = normkit.verify(model, folded_by_hand(model, change), image(4))
    assert not verdict
    # The value of '0' is another one in a right fold, too; '1' is where it shows.
    assert verdict.parting.place == "'1'"
    assert not verdict.parting.last
    is_affine = "scale and a shift" in verdict.parting.pair.relation
    assert is_affine == (change != "scale on the inputs")


def test_a_shift_that_is_folded_through_zero_padding() -> None:
    """W·(s·x + t) is a convolution of s·x with another bias, but not at the border."""
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1)))
    fused = copy.deepcopy(model)
    bn, conv = fused[0], fused[1]
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    conv.bias.data = conv.bias.data + (conv.weight.sum((2, 3)) @ shift).detach()
    conv.weight.data = conv.weight.data * scale[None, :, None, None]
    fused[0] = nn.Identity()
    verdict = normkit.verify(model, fused, image())
    assert not verdict
    assert verdict.parting.place == "'1'"
    assert "at the border alone" in verdict.parting.pair.relation


def test_a_batch_norm_in_training_mode_is_folded() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)))
    fused, _ = normkit.fold(model, image())
    assert normkit.verify(model, fused, image())
    verdict = normkit.verify(model.train(), fused, image())
    assert not verdict
    assert verdict.parting.place == "'1'"


def test_a_linear_before_a_batch_norm_over_steps() -> None:
    """BatchNorm1d on (N, T, F) acts on T; where T == F a wrong fold has no error."""
    model = randomised(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()))
    fused = copy.deepcopy(model)
    bn, linear = fused[1], fused[0]
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    linear.weight.data = linear.weight.data * scale[:, None]
    linear.bias.data = (linear.bias - bn.running_mean) * scale + bn.bias
    fused[1] = nn.Identity()
    x = torch.randn(6, 5, 5)
    assert normkit.verify(model, fused, x[:, 0])
    verdict = normkit.verify(model, fused, x)
    assert not verdict
    assert verdict.parting.place == "'1'"
