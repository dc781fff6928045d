"""Cases of the speed benchmark: layers, shapes, layouts, dtypes, epilogues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkit

__all__ = ["CASES", "COMPILED", "QUICK", "SpeedCase", "inputs_of", "ours", "theirs"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class SpeedCase:
    """One layer on one kind of tensor.

    Attributes:
        layer: `"batch"`, `"group"`, `"instance"`, `"layer"` or `"rms"`.
        shape: Shape of the input.
        layout: `"nchw"` or `"nhwc"` for images, `"rows"` for others.
        dtype: Name of the input's dtype.
        follows: Epilogue: `"none"`, `"relu"`, or `"add+relu"` with a residual.
    """

    layer: str
    shape: tuple[int, ...]
    layout: str
    dtype: str = "float32"
    follows: str = "none"

    def __str__(self) -> str:
        follows = "" if self.follows == "none" else f"+{self.follows}"
        sizes = "×".join(map(str, self.shape))
        return f"{self.layer}{follows} {sizes} {self.layout} {self.dtype}"


def _images(shapes: Sequence[tuple[int, ...]], dtype: str) -> Iterator[SpeedCase]:
    for shape in shapes:
        for layout in ("nchw", "nhwc"):
            for follows in ("none", "relu", "add+relu"):
                yield SpeedCase("batch", shape, layout, dtype, follows)


# Feature maps of ResNet-50 at batch 32.
RESNET = (
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 28, 28),
    (32, 256, 14, 14),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
)
# Rows of transformers; the last is larger than any cache.
ROWS = ((4096, 1024), (512, 4096), (8192, 256), (8192, 4096))
CASES: tuple[SpeedCase, ...] = (
    *_images(RESNET, "float32"),
    *_images(RESNET[:4], "bfloat16"),
    SpeedCase("batch", (4096, 1024), "rows"),
    SpeedCase("batch", (4096, 1024), "rows", "float32", "relu"),
    SpeedCase("batch", (256, 512), "rows"),
    *(
        SpeedCase(layer, shape, "nchw", "float32")
        for layer in ("group", "instance")
        for shape in (RESNET[0], RESNET[3], RESNET[6])
    ),
    *(
        SpeedCase(layer, shape, "rows", dtype)
        for layer in ("layer", "rms")
        for shape in ROWS
        for dtype in ("float32", "bfloat16")
    ),
    SpeedCase("batch", (8, 32), "rows"),
    SpeedCase("batch", (8, 16, 8, 8), "nchw"),
    SpeedCase("layer", (8, 32), "rows"),
)
QUICK: tuple[SpeedCase, ...] = (
    SpeedCase("batch", (32, 64, 56, 56), "nchw"),
    SpeedCase("batch", (32, 64, 56, 56), "nchw", "float32", "relu"),
    SpeedCase("batch", (32, 64, 56, 56), "nhwc", "float32", "relu"),
    SpeedCase("batch", (32, 64, 56, 56), "nhwc", "float32", "add+relu"),
    SpeedCase("batch", (32, 512, 28, 28), "nchw", "bfloat16", "relu"),
    SpeedCase("batch", (4096, 1024), "rows"),
    SpeedCase("group", (32, 64, 56, 56), "nchw"),
    SpeedCase("instance", (32, 64, 56, 56), "nchw"),
    SpeedCase("layer", (4096, 1024), "rows"),
    SpeedCase("rms", (4096, 1024), "rows"),
    SpeedCase("batch", (8, 32), "rows"),
    SpeedCase("layer", (8, 32), "rows"),
)
# torch.compile takes ten seconds or more for each, so only a few cases run it.
COMPILED: tuple[SpeedCase, ...] = (
    *QUICK[1:4],
    SpeedCase("batch", (32, 512, 28, 28), "nchw", "bfloat16", "relu"),
    SpeedCase("layer", (4096, 1024), "rows"),
    SpeedCase("rms", (4096, 1024), "rows"),
)


def inputs_of(case: SpeedCase) -> list[Tensor]:
    """Return the input and the other tensors of the layer: weight, bias, residual."""
    dtype, is_per_row = _DTYPES[case.dtype], case.layer in ("layer", "rms")
    x = torch.randn(case.shape).to(dtype)
    if case.layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    width = case.shape[-1] if is_per_row else case.shape[1]
    # Half-precision rows have weights of their dtype, images weights of float32.
    of_weights = dtype if case.layer != "batch" else torch.float32
    weight, bias = (torch.randn(width).to(of_weights).requires_grad_() for _ in "wb")
    given = [x.requires_grad_(), weight]
    if case.layer != "rms":
        given.append(bias)
    if case.follows == "add+relu":
        given.append(torch.randn_like(x).detach().requires_grad_())
    return given


def ours(case: SpeedCase) -> Callable[..., Tensor]:
    """Return a call of normkit's layer."""
    f = normkit.functional
    activation = "none" if case.follows == "none" else "relu"
    if case.layer == "batch":
        mean, var = torch.zeros(case.shape[1]), torch.ones(case.shape[1])

        def batch(
            x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
        ) -> Tensor:
            return f.batch_norm(
                *(x, mean, var, weight, bias, True),
                activation=activation,
                residual=residual,
            )

        return batch
    return _called(f, case)


def theirs(case: SpeedCase) -> Callable[..., Tensor]:
    """Return a call of torch's layer."""
    if case.layer == "batch":
        mean, var = torch.zeros(case.shape[1]), torch.ones(case.shape[1])

        def batch(
            x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
        ) -> Tensor:
            y = F.batch_norm(x, mean, var, weight, bias, True)
            # In place, as torchvision's networks do.
            if residual is not None:
                y += residual
            return y if case.follows == "none" else F.relu_(y)

        return batch
    return _called(F, case)


def _called(f: Any, case: SpeedCase) -> Callable[..., Tensor]:
    """Return a call of the norms that `f`, torch's module or ours, has alike."""
    width = case.shape[-1:]
    if case.layer == "group":
        return lambda x, weight, bias: f.group_norm(x, 32, weight, bias)
    if case.layer == "instance":
        return lambda x, weight, bias: f.instance_norm(x, weight=weight, bias=bias)
    if case.layer == "layer":
        return lambda x, weight, bias: f.layer_norm(x, width, weight, bias)
    return lambda x, weight: f.rms_norm(x, width, weight)
