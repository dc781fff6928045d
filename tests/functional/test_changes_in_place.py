"""What a backward reads, changed in place after the forward: it raises, or is right.

As torch does where it saves a tensor itself; hooks on saved tensors, recipes and
outputs that wait for a reader have to notice it themselves.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.functional import signature

n = normkit.nn
IMAGES = (3, 4, 6, 6)
CHANGED = ("x", "weight", "bias", "residual", "running_mean", "running_var")


def waiting(layer: Any) -> Any:
    layer.defers = True
    return layer


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "batch": (lambda: n.BatchNorm2d(4), IMAGES),
    "silu": (lambda: n.BatchNorm2d(4, activation="silu"), IMAGES),
    "relu": (lambda: n.BatchNorm2d(4, activation="relu"), IMAGES),
    "ghosts": (lambda: n.BatchNorm2d(4, ghost_size=1, activation="silu"), IMAGES),
    "small": (
        lambda: n.BatchNorm2d(4, on_small_batch="running", activation="gelu"),
        IMAGES,
    ),
    "last": (lambda: n.BatchNorm1d(6, channel_dim=-1, activation="silu"), (3, 4, 6)),
    "sync": (lambda: n.SyncBatchNorm(4, activation="tanh"), IMAGES),
    "eval": (lambda: n.BatchNorm2d(4, activation="silu").eval(), IMAGES),
    "frozen": (lambda: n.FrozenBatchNorm(4), IMAGES),
    "renorm": (lambda: n.BatchRenorm2d(4), IMAGES),
    "waiting": (lambda: waiting(n.BatchNorm2d(4)), IMAGES),
    "waiting in eval": (lambda: waiting(n.BatchNorm2d(4)).eval(), IMAGES),
    "instance": (lambda: n.InstanceNorm2d(4, affine=True), IMAGES),
    "group": (lambda: n.GroupNorm(2, 4), IMAGES),
    "layer": (lambda: n.LayerNorm(6), IMAGES),
    "rms": (lambda: n.RMSNorm(6), IMAGES),
    "filter response": (lambda: n.FilterResponseNorm(4), IMAGES),
    "per activation": (lambda: n.PerActivationBatchNorm((4, 6)), (5, 4, 6)),
    "recurrent": (lambda: n.RecurrentBatchNorm(6, 3), (4, 5, 6)),
    "whitening": (lambda: n.WhiteningBatchNorm(4), (9, 4, 3)),
}
TAKE_RESIDUALS = (n.LayerNorm, n.RMSNorm, nn.modules.batchnorm._BatchNorm)
MEMORY = ("plain", "recompute", "int8")


def _forward(layer: Any, given: dict[str, Tensor], memory: str, reads: str) -> Tensor:
    """Run the layer and what reads its output; the block is that of both."""
    inputs = {k: v for k, v in given.items() if k == "residual"}

    def run() -> Tensor:
        y = layer(given["x"], **inputs)
        y, *rest = y if isinstance(y, tuple) else (y,)
        y = torch.relu(y) if reads == "relu" else y
        y = torch.sigmoid(y) if reads == "sigmoid" else y
        return y.square().sum() + sum(r.sum() for r in rest)

    if memory == "plain" or getattr(layer, "memory", None):
        return run()
    with normkit.less_memory(memory):  # type: ignore[arg-type]
        return run()


def _cases() -> list[Any]:
    cases = []
    for name, (make, _) in LAYERS.items():
        layer = make()
        takes = isinstance(layer, TAKE_RESIDUALS) and not getattr(
            layer, "defers", False
        )
        for memory in MEMORY:
            for how in ("layer", "block") if memory != "plain" else ("",):
                if how == "layer" and not hasattr(layer, "memory"):
                    continue
                residuals = (False, True) if takes else (False,)
                cases += [(name, memory, how, r) for r in residuals]
    return cases


@pytest.mark.parametrize(("name", "memory", "how", "has_residual"), _cases())
def test_a_backward_after_a_change_in_place_raises_or_is_right(
    name: str, memory: str, how: str, has_residual: bool
) -> None:
    make, shape = LAYERS[name]
    for reads in ("relu",) if "waiting" in name else ("", "sigmoid"):
        for changed in CHANGED:
            signature.calls.clear()
            torch.manual_seed(3)
            layer, x = make(), torch.randn(shape)
            if how == "layer":
                layer.memory = memory
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
            given = {"x": x, "residual": torch.randn(shape)}
            if not has_residual:
                del given["residual"]
            found = []
            for is_changed in (False, True):
                one = copy.deepcopy(layer)
                leaves = {k: v.clone().requires_grad_() for k, v in given.items()}
                # A leaf that needs a gradient may not be changed: the values of a layer
                # before may, as by an activation in place.
                inner = {k: v * 1 for k, v in leaves.items()}
                loss = _forward(one, inner, memory, reads)
                held = {**inner, **dict(one.named_parameters())}
                held |= dict(one.named_buffers())
                if is_changed:
                    target = held.get(changed)
                    if target is None:
                        break
                    with torch.no_grad():
                        target.mul_(0.5).add_(0.25)
                wanted = [*leaves.values(), *one.parameters()]
                wanted = [t for t in wanted if t.requires_grad]
                try:
                    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
                except RuntimeError as error:
                    if is_changed and "place" in str(error):
                        break
                    raise
                found.append(grads)
            if len(found) < 2:
                continue
            for right, after in zip(*found, strict=True):
                assert (right is None) == (after is None)
                if right is None:
                    continue
                gap = (right - after).abs().max()
                assert gap <= 1e-5 * right.abs().max().clamp(min=1), (reads, changed)
