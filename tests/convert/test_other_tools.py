"""Other tools change a fused model as they change the plain one: nothing is lost."""

import copy
import importlib
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normkit
import torchvision_operators


def library(name: str) -> Any:
    """Import a library that may be absent."""
    if find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    torchvision_operators.declare()
    return importlib.import_module(name)


class Block(nn.Module):
    """A residual block as torchvision's: one relu for both places, the sum in place."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


def sequential() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten()]
    return nn.Sequential(*layers)


def residual() -> nn.Module:
    return nn.Sequential(Block(3, 8), Block(8, 8), Block(8, 4))


def of_torchvision() -> nn.Module:
    return library("torchvision").models.resnet18(weights=None, num_classes=10)


def of_timm() -> nn.Module:
    return library("timm").create_model("test_resnet", num_classes=10)


MODELS = (sequential, residual, of_torchvision, of_timm)


def folded(model: nn.Module) -> nn.Module:
    """Every convolution that a batch norm follows in its container, by torch's tool."""
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (other, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, other, nn.Identity())
    return model


def with_gelu(model: nn.Module) -> nn.Module:
    """Every activation exchanged, as users do."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.SiLU):
                setattr(parent, name, nn.GELU("tanh"))
    return model


def frozen(model: nn.Module) -> nn.Module:
    return library("timm.layers").freeze_batch_norm_2d(model)


def synchronized_by_lightning(model: nn.Module) -> nn.Module:
    plugins = library("pytorch_lightning.plugins.layer_sync")
    return plugins.TorchSyncBatchNorm().apply(model)


def folded_by_fx(model: nn.Module) -> nn.Module:
    from torch.fx.experimental import optimization

    return optimization.fuse(model)


TOOLS: tuple[Callable[[nn.Module], nn.Module], ...] = (
    nn.SyncBatchNorm.convert_sync_batchnorm,
    folded,
    with_gelu,
    frozen,
    synchronized_by_lightning,
    folded_by_fx,
)


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model.double().train()(x)
    return model.eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_a_tool_does_to_a_fused_model_what_it_does_to_the_plain_one(
    tool: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module]
) -> None:
    x = torch.randn(2, 3, 32, 32).double()
    plain = with_statistics(build(), x)
    model = copy.deepcopy(plain)
    report = normkit.convert(model, to="normkit", example_inputs=x)
    assert report.fused
    plain, model = tool(plain).eval(), tool(model).eval()
    found = []
    for each in (model, plain):
        given = x.clone().requires_grad_()
        y = each(given)
        (dx,) = torch.autograd.grad(y.sin().sum(), given)
        found.append((y, dx))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
