"""Norms that write their formula out are known by what they compute."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from normkit.convert import convert

C = 8


class WrittenNorm(nn.Module):
    """Shape of all below: a weight, an eps under some name."""

    def __init__(self, size: int = C, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon = eps


class LlamaNorm(WrittenNorm):
    """As in Llama."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class GemmaNorm(WrittenNorm):
    """As in Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (y * (1.0 + self.weight.float())).type_as(x)


class ChannelRMSNorm(WrittenNorm):
    def forward(self, x: Tensor) -> Tensor:
        size = x.pow(2).mean(1, keepdim=True)
        y = x * torch.rsqrt(size + self.variance_epsilon)
        return y * self.weight.view(1, -1, 1, 1)


class NormWithoutWeights(nn.Module):
    """As in OLMo; its eps is written in the forward."""

    normalized_shape = (C,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, eps=1e-5).to(x.dtype)


class LayerNorm2d(nn.LayerNorm):
    """As in ConvNeXt."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y = input.permute(0, 2, 3, 1)
        y = F.layer_norm(y, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class GroupNormAct(nn.GroupNorm):
    """As in timm."""

    def __init__(self) -> None:
        super().__init__(2, C)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y = F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(y))


class StdNorm(WrittenNorm):
    """By the standard deviation, the mean left in: a formula of timm's."""

    def forward(self, x: Tensor) -> Tensor:
        var = x.var(-1, correction=0, keepdim=True)
        return x * torch.rsqrt(var + self.variance_epsilon) * self.weight


class EpsOutsideNorm(WrittenNorm):
    def forward(self, x: Tensor) -> Tensor:
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        return x / (rms + self.variance_epsilon) * self.weight


class DetachedNorm(WrittenNorm):
    def forward(self, x: Tensor) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True).detach()
        return x * torch.rsqrt(size + self.variance_epsilon) * self.weight


class NoisyNorm(LlamaNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        y = super().forward(hidden_states)
        return y + torch.randn_like(y) if self.training else y


class WritingNorm(LlamaNorm):
    """Leaves another value in its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = super().forward(hidden_states)
        with torch.no_grad():
            hidden_states.mul_(2)
        return y


KNOWN = [
    (LlamaNorm, normkit.nn.RMSNorm, (3, 5, C)),
    (GemmaNorm, normkit.nn.RMSNorm, (3, 5, C)),
    (ChannelRMSNorm, normkit.nn.RMSNorm, (3, C, 5, 4)),
    (NormWithoutWeights, normkit.nn.LayerNorm, (3, 5, C)),
    (lambda: LayerNorm2d(C), normkit.nn.LayerNorm, (3, C, 5, 4)),
    (GroupNormAct, normkit.nn.GroupNorm, (3, C, 5, 4)),
]


def outcome(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.parametrize(("make", "target", "shape"), KNOWN)
def test_a_known_formula_is_exchanged_with_equal_values_and_gradients(
    make: Any, target: type[nn.Module], shape: tuple[int, ...]
) -> None:
    layer, x = make(), 30 + torch.randn(shape)
    plain, kind = copy.deepcopy(layer), type(layer)
    keys = list(layer.state_dict())
    draws = torch.get_rng_state()
    report = convert(layer, to="normkit")
    assert torch.equal(torch.get_rng_state(), draws)
    assert [each.after for each in report.layers] == [target.__name__]
    assert isinstance(layer, target)
    assert isinstance(layer, kind)
    assert list(layer.state_dict()) == keys
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for ours, theirs in zip(outcome(twin, x), outcome(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5)
    assert not convert(layer, to="normkit").layers
    convert(layer, to="torch")
    assert type(layer) is kind
    assert vars(layer).keys() == vars(plain).keys()


def test_it_is_the_exchanged_layer_that_runs() -> None:
    layer, seen = LlamaNorm(), []
    convert(layer, to="normkit")

    def watched(self: Any, x: Tensor) -> Tensor:
        seen.append(self)
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaNorm, "forward", watched)
        layer(torch.randn(3, C))
    assert not seen


@pytest.mark.parametrize(
    "kind", [StdNorm, EpsOutsideNorm, DetachedNorm, NoisyNorm, WritingNorm]
)
def test_a_formula_that_is_not_quite_ours_is_left(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), nn.LayerNorm(C))
    report = convert(model, to="normkit")
    assert [each.name for each in report.layers] == ["1"]
    assert "no formula that normkit has" in report.untouched["0"]
    assert type(model[0]) is kind


def test_what_else_is_asked_of_it_the_layer_answers_itself() -> None:
    layer, x = LlamaNorm(), torch.randn(3, C)
    wanted = layer(x)
    convert(layer, to="normkit")
    torch.testing.assert_close(layer(hidden_states=x), wanted)
    half = layer(x.half())
    assert half.dtype == torch.float32  # as Llama's, of a half input under its weight
    seen: list[int] = []
    other = LlamaNorm()
    other.register_forward_hook(lambda *_: seen.append(1))
    convert(other, to="normkit")
    assert not seen


def test_containers_and_layers_with_statistics_are_no_written_norms() -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(C), nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    report = convert(PreNorm(), to="normkit")
    assert [each.name for each in report.layers] == ["norm"]
    assert not report.untouched
