"""Grid of `normkit bench calls`: layers, sizes and forms of a call.

Sizes are those of images of 64 channels, the shapes that the layers of a CNN have at a
batch of 4 to 32, with maps from 4×4 to 56×56; no map is a single row or column, so
that NCHW and channels_last differ at every size. Layers over rows take as many rows of
768 features as fit into the same number of values.

A form changes one thing of the plain call in float32:

    relu, add+relu   batch norm, then the in-place operations of torchvision's networks:
                     `relu_(bn(x))`, `relu_(bn(x) + residual)`
    bfloat16, float16, float64
                     the input; in half precision batch norm keeps its parameters in
                     float32, as under autocast, all other layers have theirs in the
                     dtype of the input
    mask             some positions are padding: they have no part in the statistics,
                     and the output is 0 there

torch.nn takes no mask. Its contestant is the shortest correct code on its layers:

    layer, RMS        `layer(x).masked_fill(~mask, 0)`: the mask removes whole rows
    batch, training   `rows[mask] = bn(x.movedim(1, -1)[mask])` in zeros: BatchNorm1d on
                      the valid positions alone; in eval masked_fill is enough
    group, instance   mean and variance from sums of `x * mask`, in torch operations
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import normkit

__all__ = [
    "CALL_CASES",
    "FEW_SIZES",
    "FORMS",
    "KINDS",
    "SIZES",
    "CallCase",
    "ours",
    "theirs",
]

CHANNELS, WIDTH, GROUPS = 64, 768, 8

# Batch and side of the map, by the number of values (rounded).
SIZES = {
    "4k": (4, 4),
    "16k": (4, 8),
    "64k": (4, 16),
    "130k": (8, 16),
    "200k": (4, 28),
    "400k": (8, 28),
    "800k": (4, 56),
    "1.6M": (8, 56),
    "3.2M": (16, 56),
    "6.4M": (32, 56),
}
FEW_SIZES = ("16k", "200k", "800k", "3.2M")

# Layer and layout.
KINDS = (
    ("batch", "NCHW"),
    ("batch", "channels_last"),
    ("group", "NCHW"),
    ("layer", "rows"),
    ("RMS", "rows"),
    ("instance", "NCHW"),
)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
FORMS = ("plain", "relu", "add+relu", *DTYPES, "mask")

_CLASSES = {
    "batch": "BatchNorm2d",
    "group": "GroupNorm",
    "layer": "LayerNorm",
    "RMS": "RMSNorm",
    "instance": "InstanceNorm2d",
}


@dataclass(frozen=True)
class CallCase:
    """One layer at one size.

    Attributes:
        layer: "batch", "group", "layer", "RMS" or "instance".
        layout: "NCHW", "channels_last" or "rows".
        form: One of `FORMS`.
        size: A name of `SIZES`.
    """

    layer: str
    layout: str
    form: str
    size: str

    def __str__(self) -> str:
        return f"{self.row}, {self.size} values"

    @property
    def row(self) -> str:
        """The case without its size."""
        layout = f" {self.layout}" if self.layer == "batch" else ""
        return f"{self.layer}{layout}" + (
            "" if self.form == "plain" else f", {self.form}"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input."""
        batch, side = SIZES[self.size]
        if self.layout == "rows":
            return batch * CHANNELS * side**2 // WIDTH, WIDTH
        return batch, CHANNELS, side, side

    def inputs(self) -> dict[str, Tensor]:
        """Return random `x` and `dy`, and for some forms `residual` or `mask`.

        The mask is True where a value counts: three rows of four, or for images the
        left half of the map and a part of the rest, as of padded pictures.
        """
        x = torch.randn(self.shape)
        if self.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x = x.to(DTYPES.get(self.form, torch.float32))
        found = {"x": x, "dy": torch.randn_like(x)}
        if self.form == "add+relu":
            found["residual"] = torch.randn_like(x)
        if self.form == "mask" and self.layout == "rows":
            found["mask"] = (torch.arange(len(x)) % 4 != 3).unsqueeze(1)
        elif self.form == "mask":
            batch, _, _, side = self.shape
            valid = torch.linspace(side // 2, side, batch).unsqueeze(1)
            columns = torch.arange(side) < valid
            found["mask"] = columns[:, None, None, :].expand(-1, 1, side, -1)
        return found

    def layers(self, *, training: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Return the layers of normkit.nn and of torch.nn with equal random parameters.

        Args:
            training: The mode that both are in. A batch norm of torch.nn that gets
                the valid positions as rows is a BatchNorm1d.
        """
        name = _CLASSES[self.layer]
        follows = {"activation": "relu"} if "relu" in self.form else {}
        ours = self._made(getattr(normkit.nn, name), **follows)
        if self.form == "mask" and self.layer == "batch" and training:
            name = "BatchNorm1d"
        theirs = self._made(getattr(torch.nn, name))
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_(1.0)
        theirs.load_state_dict(ours.state_dict())
        ours.train(training)
        theirs.train(training)
        if self.form not in DTYPES or (
            self.layer == "batch" and self.form != "float64"
        ):
            return ours, theirs
        return ours.to(DTYPES[self.form]), theirs.to(DTYPES[self.form])

    def _made(self, of: Any, **follows: str) -> torch.nn.Module:
        if self.layer in ("layer", "RMS"):
            return of(WIDTH)
        if self.layer == "group":
            return of(GROUPS, CHANNELS)
        is_instance = self.layer == "instance"
        return of(CHANNELS, **({"affine": True} if is_instance else {}), **follows)


CALL_CASES: tuple[CallCase, ...] = (
    *(CallCase(*kind, "plain", size) for kind in KINDS for size in SIZES),
    *(
        CallCase(*kind, form, size)
        for form in FORMS[1:]
        for kind in KINDS
        if kind[0] == "batch" or "relu" not in form
        for size in FEW_SIZES
    ),
)


def ours(layer: torch.nn.Module, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Run normkit's layer once."""
    x = given["x"]
    others = {n: t for n, t in given.items() if n in ("residual", "mask")}
    return lambda: layer(x, **others)


def theirs(
    case: CallCase, layer: torch.nn.Module, given: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """Run torch's layer once, as the module's docstring says."""
    x = given["x"]
    if case.form == "relu":
        return lambda: torch.relu_(layer(x))
    if case.form == "add+relu":
        residual = given["residual"]

        def added() -> Tensor:
            y = layer(x)
            y += residual
            return torch.relu_(y)

        return added
    if case.form != "mask":
        return lambda: layer(x)
    mask = given["mask"]
    if case.layer in ("group", "instance"):
        groups = GROUPS if case.layer == "group" else CHANNELS
        return lambda: _masked_groups(layer, x, mask, groups)
    if case.layer == "batch" and layer.training:
        return lambda: _masked_batch(layer, x, mask)
    return lambda: layer(x).masked_fill(~mask, 0.0)


def _masked_batch(layer: torch.nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    rows, valid = x.movedim(1, -1), mask.squeeze(1)
    y = torch.zeros_like(rows)
    y[valid] = layer(rows[valid])
    return y.movedim(-1, 1)


def _masked_groups(layer: Any, x: Tensor, mask: Tensor, groups: int) -> Tensor:
    grouped, valid = x.unflatten(1, (groups, -1)), mask.unsqueeze(1)
    dims = (2, 3, 4)
    count = valid.sum(dims, keepdim=True) * grouped.shape[2]
    mean = (grouped * valid).sum(dims, keepdim=True) / count
    centred = (grouped - mean) * valid
    var = centred.square().sum(dims, keepdim=True) / count
    y = (centred * torch.rsqrt(var + layer.eps)).flatten(1, 2)
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    return (y * weight + bias) * mask
