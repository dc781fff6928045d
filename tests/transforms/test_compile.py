"""Every layer and option under torch.compile: one graph, forward and backward.

In float64, so that equal means 1e-9: values, gradients of input, parameters and
residual, and every buffer after two steps.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
import normkit.nn as n
from normkit.kernels.epilogue import ACTIVATIONS
from transforms.compiling import fresh_compiler

C = 4
NOW: dict[str, Any] = {"renorm_from": 0, "d_max_at": 0, "r_max_at": 0}
TRACKED: dict[str, Any] = {"affine": True, "track_running_stats": True}
Build = Callable[[], nn.Module]

# What every layer of torch.nn and normkit is called with: build, shape of the input.
LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "BatchNorm1d rows": (lambda: n.BatchNorm1d(C), (6, C)),
    "BatchNorm1d": (lambda: n.BatchNorm1d(C), (6, C, 5)),
    "BatchNorm2d": (lambda: n.BatchNorm2d(C), (6, C, 3, 5)),
    "BatchNorm3d": (lambda: n.BatchNorm3d(C), (3, C, 2, 3, 5)),
    "BatchNorm1d last": (lambda: n.BatchNorm1d(C, channel_dim=-1), (6, 5, C)),
    "BatchNorm2d average": (lambda: n.BatchNorm2d(C, momentum=None), (6, C, 3, 5)),
    "BatchNorm2d bare": (
        lambda: n.BatchNorm2d(C, affine=False, track_running_stats=False),
        (6, C, 3, 5),
    ),
    "SyncBatchNorm": (lambda: n.SyncBatchNorm(C), (6, C, 3, 5)),
    "FrozenBatchNorm": (lambda: n.FrozenBatchNorm(C), (6, C, 3, 5)),
    "LazyBatchNorm2d": (lambda: ready(n.LazyBatchNorm2d()), (6, C, 3, 5)),
    "BatchRenorm1d": (lambda: n.BatchRenorm1d(C, **NOW), (6, C, 5)),
    "BatchRenorm2d": (lambda: n.BatchRenorm2d(C), (6, C, 3, 5)),
    "BatchRenorm3d": (lambda: n.BatchRenorm3d(C), (3, C, 2, 3, 5)),
    "WhiteningBatchNorm zca": (lambda: n.WhiteningBatchNorm(C, 2), (16, C)),
    "WhiteningBatchNorm newton": (
        lambda: n.WhiteningBatchNorm(C, method="newton"),
        (16, C),
    ),
    "PerActivationBatchNorm": (lambda: n.PerActivationBatchNorm((C, 5)), (6, C, 5)),
    "RecurrentBatchNorm": (
        lambda: n.RecurrentBatchNorm(C, 5, first_weight=1.0),
        (5, 6, C),
    ),
    "BatchNormLSTM": (lambda: n.BatchNormLSTM(C, 3, max_steps=5), (5, 6, C)),
    "DomainBatchNorm": (
        lambda: n.DomainBatchNorm(n.BatchNorm1d(C), ("a", "b")),
        (6, C),
    ),
    "InstanceNorm1d": (lambda: n.InstanceNorm1d(C, **TRACKED), (6, C, 5)),
    "InstanceNorm2d": (lambda: n.InstanceNorm2d(C, affine=True), (6, C, 3, 5)),
    "InstanceNorm3d": (lambda: n.InstanceNorm3d(C), (3, C, 2, 3, 5)),
    "FilterResponseNorm": (lambda: n.FilterResponseNorm(C), (6, C, 5)),
    "FilterResponseNorm eps": (
        lambda: n.FilterResponseNorm(C, learnable_eps=True),
        (6, C, 5),
    ),
    "TLU": (lambda: n.TLU(C), (6, C, 5)),
    "LayerNorm": (lambda: n.LayerNorm(C), (6, 5, C)),
    "LayerNorm channels": (lambda: n.LayerNorm(C, channel_dim=1), (6, C, 3, 5)),
    "GroupNorm": (lambda: n.GroupNorm(2, C), (6, C, 5)),
    "RMSNorm": (lambda: n.RMSNorm(C), (6, 5, C)),
    "weight standardization": (
        lambda: n.weight_standardization(nn.Conv2d(C, 3, 2)),
        (6, C, 3, 5),
    ),
}


def ready(layer: nn.Module) -> nn.Module:
    """A lazy layer that has seen its channels."""
    layer(torch.randn(3, C, 2, 2))
    return layer


def frozen(layer: Any) -> nn.Module:
    layer.freeze()
    return layer


def batch(**options: Any) -> tuple[Build, tuple[int, ...]]:
    return lambda: n.BatchNorm2d(C, **options), (6, C, 3, 5)


OPTIONS: dict[str, tuple[Build, tuple[int, ...]]] = {
    **{name: batch(activation=name) for name in ACTIVATIONS if name != "none"},
    "recompute": batch(activation="relu", memory="recompute"),
    "small: running": batch(on_small_batch="running", momentum=0.3),
    "small: renorm": batch(on_small_batch="renorm", momentum=0.3),
    "ghosts": batch(ghost_size=3),
    "biased": batch(estimator="biased"),
    "debias": batch(debias=True),
    "frozen": (lambda: frozen(n.BatchNorm2d(C)), (6, C, 3, 5)),
}


def built(build: Build, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    layer = build()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return layer.double(), (2 + torch.randn(shape)).double()


def steps(run: Any, layer: nn.Module, x: Tensor, given: dict[str, Any]) -> list[Any]:
    """Output, gradients and buffers of two steps; the second has moved statistics."""
    found: list[Any] = []
    wanted = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    for k in range(2):
        x = (x + k).detach().requires_grad_()
        y = run(x, **given)
        y = y[0] if isinstance(y, tuple) else y
        draw = torch.Generator().manual_seed(k)
        dy = torch.randn(y.shape, generator=draw, dtype=y.dtype)
        learned = [p for p in layer.parameters() if p.requires_grad]
        grads = torch.autograd.grad(y, [x, *learned, *wanted], dy, allow_unused=True)
        found += [y.detach(), *(g for g in grads if g is not None)]
        found += [b.clone() for b in layer.buffers()]
    return found


def check(
    layer: nn.Module, x: Tensor, *, backend: Any = "aot_eager", **given: Any
) -> None:
    """One graph, equal to eager."""
    twin = copy.deepcopy(layer)
    with fresh_compiler():
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        found = steps(compiled, layer, x, given)
        wanted = steps(twin, twin, x, given)
    assert len(found) == len(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def quick_or_slow(names: Any, quick: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name in quick else pytest.mark.slow)
            for name in names
        ],
    )


training_or_not = pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)]
)


@training_or_not
@quick_or_slow(LAYERS, ("BatchRenorm1d",))
def test_a_layer_compiles_whole_and_equals_eager(name: str, training: bool) -> None:
    layer, x = built(*LAYERS[name])
    check(layer.train(training), x)


@training_or_not
@quick_or_slow(OPTIONS, ("recompute",))
@pytest.mark.parametrize(
    "has_residual", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_an_option_compiles_whole_and_equals_eager(
    name: str, training: bool, has_residual: bool
) -> None:
    layer, x = built(*OPTIONS[name])
    given: dict[str, Any] = (
        {"residual": torch.randn_like(x).requires_grad_()} if has_residual else {}
    )
    check(layer.train(training), x, **given)


TAKE_NO_MASK = ("TLU", "weight standardization", "BatchNormLSTM", "BatchNorm1d rows")


@training_or_not
@quick_or_slow([k for k in LAYERS if k not in TAKE_NO_MASK], ("BatchNorm1d",))
def test_a_mask_compiles_whole_and_equals_eager(name: str, training: bool) -> None:
    layer, x = built(*LAYERS[name])
    # A covariance needs whole observations.
    whole = (*x.shape[:1], 1) if name.startswith("Whitening") else x.shape
    check(layer.train(training), x, mask=torch.rand(whole) < 0.8)


@training_or_not
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"small: {k}", marks=pytest.mark.slow)
        for k in ("running", "renorm")
    ],
)
def test_a_channel_with_one_value_reads_statistics_as_the_forward_saw_them(
    name: str, training: bool
) -> None:
    """Buffers move before the backward; batch renorm's, above, do so too."""
    layer, x = built(*OPTIONS[name])
    mask = torch.rand(x.shape) < 0.8
    mask[:, 0] = False
    mask[0, 0, 0, 0] = True
    check(layer.train(training), x, mask=mask)


@pytest.mark.slow
def test_an_int8_layer_compiles_to_one_that_keeps_what_the_compiler_says() -> None:
    layer, x = built(*batch(memory="int8"))
    twin, _ = built(*batch())
    twin.load_state_dict(layer.state_dict())
    with fresh_compiler():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found = steps(compiled, layer, x, {})
    torch.testing.assert_close(found, steps(twin, twin, x, {}), rtol=1e-9, atol=1e-9)


class Block(nn.Module):
    """Module and function activations, a relu used twice, sums, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norms[0](self.convs[0](x)))
        y = torch.tanh(self.norms[1](self.convs[1](y)))
        y = self.norms[2](self.convs[2](y))
        y += self.norms[3](self.convs[3](x))
        return self.relu(y)


@training_or_not
@pytest.mark.parametrize(
    "memory", ["recompute", pytest.param(None, marks=pytest.mark.slow)]
)
def test_a_converted_and_fused_model_compiles_whole(
    memory: Any, training: bool
) -> None:
    model, x = built(lambda: nn.Sequential(Block(), Block()), (6, C, 5, 5))
    report = normkit.convert(model, to="normkit", example_inputs=x, memory=memory)
    assert list(report.fused.values()) == ["relu", "tanh", "add+relu"] * 2
    model.train(training)
    check(model, x)


@pytest.mark.slow
def test_a_forward_in_a_block_of_less_memory_compiles_to_equal_gradients() -> None:
    model, x = built(lambda: nn.Sequential(Block()), (6, C, 5, 5))
    normkit.convert(model, to="normkit", example_inputs=x)
    twin = copy.deepcopy(model)
    with fresh_compiler():
        compiled = torch.compile(model, backend="aot_eager")

        def run(x: Tensor) -> Tensor:
            with normkit.less_memory():
                return compiled(x)

        found = steps(run, model, x, {})
    torch.testing.assert_close(found, steps(twin, twin, x, {}), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchRenorm1d"])
def test_inductors_code_is_equal_to_eager(name: str) -> None:
    layer, x = built(*LAYERS[name])
    check(layer.train(), x, backend="inductor")
