"""Weights and layers: D07, D10, D18 to D23, D25, D26."""

import torch
from torch import Tensor, nn

from doctor.faults.planting import (
    Program,
    data,
    fault,
    first_norm,
    names_of,
    usual,
    weights_of,
)
from doctor.models import batches, build, norms, train
from normkit.calibrate import calibrate
from normkit.init import initialize

__all__ = []

_ONE_TREND = "it has one activation, and a trend takes four layers of a kind"
_SKIPS = "skip connections carry the signal past every layer, so none of it is lost"


@fault("D07")
def frozen_yet_training(net: str, is_bad: bool) -> Program:
    """Frozen scales in training mode."""
    model = usual(net).train()
    for norm in norms(model).values() if is_bad else ():
        norm.requires_grad_(False)
    return Program(model, data(), at=frozenset(norms(model)))


class Along(nn.Module):
    """Batch norm along the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT


@fault("D10", is_info=True)
def bias_before_norm(net: str, is_bad: bool) -> Program:
    """A bias that the next layer subtracts."""
    model = build(net)
    normalized = weights_of(model)[:-1]
    if net == "transformer":
        # Its skip connections keep a bias; between two layers of a block none does.
        block = model.blocks[0]
        normalized = [block.hidden]
        block.act = nn.Sequential(Along(32), block.act)
    at = names_of(model, normalized)
    for layer in () if is_bad else normalized:
        layer.bias = None
    # After 120 steps eval mode of a residual network is 6 points behind: D02.
    train(model, 200)
    return Program(model, data(), at=at)


@fault(
    "D18",
    is_info=True,
    brings={"D25": "batch norm multiplies the gradient of such a channel by 1/√eps"},
)
def channels_without_input(net: str, is_bad: bool) -> Program:
    """A quarter of the channels carry nothing."""
    model = usual(net)
    first = weights_of(model)[0]
    with torch.no_grad():
        if is_bad:
            first.weight[: first.weight.shape[0] // 4] = 0
            if net == "transformer":
                model.position[:, :8] = 0
    calibrate(model, data())
    return Program(model, data(), at=names_of(model, [first_norm(model)]))


@fault("D19", is_info=True)
def scales_near_zero(net: str, is_bad: bool) -> Program:
    """Most scales of one layer are zero."""
    model = usual(net)
    norm = first_norm(model)
    share = 3 * len(norm.weight) // 4
    with torch.no_grad():
        if is_bad:
            norm.weight[:share] = 1e-6
            norm.bias[:share] = 0.5
    calibrate(model, data())
    return Program(model, data(), at=names_of(model, [norm]))


_LOGITS = {"D36": "weights of query and key are as large, and so are their logits"}


@fault("D20", brings=_LOGITS)
def large_weights(net: str, is_bad: bool) -> Program:
    """Weights that drive every tanh into its ends.

    In the GRU those of the layer behind it: its own gates are one fused call.
    """
    model = build(net, act=nn.Tanh, normalized=False)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in weights_of(model)[:-1]:
            nn.init.xavier_normal_(layer.weight, 12.0 if is_bad else 0.8)
    return Program(model, data(), at=names_of(model, nn.Tanh))


@fault("D21")
def dead(net: str, is_bad: bool) -> Program:
    """Most units of a layer never answer."""
    model = usual(net, width=32)
    layer = model.blocks[0].hidden if net == "transformer" else first_norm(model)
    with torch.no_grad():
        if is_bad:
            layer.bias[:28] -= 100.0
    calibrate(model, data())
    first = next(m for m in model.modules() if isinstance(m, nn.ReLU))
    return Program(model, data(), at=names_of(model, [first]))


def rescaled(net: str, act: type, gain: float) -> nn.Module:
    """Six layers without normalization; of size 1 by LSUV, and then times `gain`."""
    model = build(net, act=act, depth=6, normalized=False)
    x, _ = batches()[0]
    initialize(model, "lsuv", example_inputs=x, generator=torch.Generator())
    with torch.no_grad():
        for layer in weights_of(model)[:-1]:
            layer.weight *= gain
    return model


@fault(
    "D22",
    brings={"D24": "gradients shrink with the same weights"},
    without={"residual": _SKIPS, "transformer": _SKIPS, "gru": _ONE_TREND},
)
def small_weights(net: str, is_bad: bool) -> Program:
    """Weights a fifth of what keeps a signal, layer after layer.

    At a third the convolutions still learn: 0.23 after 150 steps, and 0.07 at 1.
    """
    model = rescaled(net, nn.Tanh, 0.2 if is_bad else 1.0)
    return Program(model, data(), at=names_of(model, nn.Tanh))


@fault(
    "D23",
    brings={
        "D25": "gradients grow with the same weights",
        "D35": "so does the stream that the blocks add to",
        **_LOGITS,
    },
    without={"gru": _ONE_TREND},
)
def large_weights_without_bounds(net: str, is_bad: bool) -> Program:
    """Weights three times what keeps a signal, layer after layer."""
    # Of deep ReLU networks a tenth of the units is dead from the start.
    model = rescaled(net, nn.LeakyReLU, 3.0 if is_bad else 1.0)
    return Program(model, data(), at=names_of(model, nn.LeakyReLU))


@fault(
    "D25",
    brings={
        "D02": "which of several infinite scores wins is chance, in either mode",
        "D34": "scores that are not finite are no answers",
    },
)
def overflow(net: str, is_bad: bool) -> Program:
    """Scores beyond the largest number of float32."""
    model = usual(net)
    with torch.no_grad():
        weights_of(model)[-1].weight *= 1e38 if is_bad else 1.0
    return Program(model, data(), at=names_of(model, weights_of(model)))


@fault("D26")
def one_unit(net: str, is_bad: bool) -> Program:
    """Every layer takes the mean of its inputs, and the last one weighs all alike."""
    model = build(net, act=nn.Tanh, normalized=False, depth=2)
    *hidden, last = weights_of(model)
    if is_bad:
        for layer in hidden:
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            last.weight.copy_(last.weight[:, :1].expand_as(last.weight))
    return Program(model, data(), at=names_of(model, hidden))
