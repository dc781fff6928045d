"""torch.jit.trace of every layer: right in another batch, or refused in words."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit.nn as n
from normkit.errors import ArgumentError

IMAGES = (4, 4, 5, 6)


def _waiting() -> nn.Module:
    layer = n.BatchNorm2d(4)
    layer.defers = True
    return nn.Sequential(layer, nn.ReLU())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: n.BatchNorm2d(4, activation="relu"), IMAGES),
    "channels last": (lambda: n.BatchNorm2d(6, channel_dim=-1), IMAGES),
    "recompute": (
        lambda: n.BatchNorm2d(4, activation="silu", memory="recompute"),
        IMAGES,
    ),
    "waiting": (_waiting, IMAGES),
    "biased": (lambda: n.BatchNorm2d(4, estimator="biased"), IMAGES),
    "debiased": (lambda: n.BatchNorm2d(4, debias=True), IMAGES),
    "small": (lambda: n.BatchNorm2d(4, on_small_batch="running"), IMAGES),
    "ghosts": (lambda: n.BatchNorm2d(4, ghost_size=2), IMAGES),
    "renorm": (lambda: n.BatchRenorm2d(4), IMAGES),
    "frozen": (lambda: n.FrozenBatchNorm(4), IMAGES),
    "sync": (lambda: n.SyncBatchNorm(4), IMAGES),
    "instance": (lambda: n.InstanceNorm2d(4, track_running_stats=True), IMAGES),
    "layer": (lambda: n.LayerNorm(6), IMAGES),
    "layer, channels": (lambda: n.LayerNorm(4, channel_dim=1), IMAGES),
    "group": (lambda: n.GroupNorm(2, 4), IMAGES),
    "rms": (lambda: n.RMSNorm(6), IMAGES),
    "filter response": (lambda: n.FilterResponseNorm(4), IMAGES),
    "per activation": (lambda: n.PerActivationBatchNorm((4, 5)), (4, 4, 5)),
    "recurrent": (lambda: n.RecurrentBatchNorm(4, 3), (5, 4, 4)),
    "whitening": (lambda: n.WhiteningBatchNorm(4), (9, 4, 5)),
}
REFUSED = {("ghosts", True)}


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer_computes_what_it_does(
    name: str, training: bool, checks: bool
) -> None:
    make, shape = LAYERS[name]
    layer = make().train(training)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    traced_from = copy.deepcopy(layer)

    def trace() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(traced_from, torch.randn(shape), check_trace=checks)

    if (name, training) in REFUSED:
        with pytest.raises(ArgumentError, match=r"torch\.jit\.trace"):
            trace()
        return
    traced = trace()
    # Tracing runs the layer; from here on both start from one state.
    traced.load_state_dict(layer.state_dict(), strict=False)
    dim = 1 if name == "recurrent" else 0
    for samples in (shape[dim], shape[dim] + 3):
        sizes = (*shape[:dim], samples, *shape[dim + 1 :])
        x = 2 * torch.randn(sizes) + 1
        torch.testing.assert_close(_first(traced(x)), _first(layer(x)))
    state = layer.state_dict()
    for key, value in traced.state_dict().items():
        if key.endswith(("running_mean", "running_var", "running_whitening")):
            torch.testing.assert_close(value, state[key], msg=key)
