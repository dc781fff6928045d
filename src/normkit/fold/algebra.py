"""Affine maps moved into the weights next to them.

A linear map y = W·x + b with an affine map on either side is again a linear map:

    scale·(W·x + b) + shift   =  (scale·W)·x + (scale·b + shift)
    W·(scale·x + shift) + b   =  (W·scale)·x + (b + Σ W·shift)

Shape legend: G conv groups, O output channels per group, I input channels per group,
K kernel taps. Every op keeps its weight in some order of these four axes; a
`WeightLayout` is that order, and the algebra is written once, on `W_GOIK`.

Everything is computed in float64; the caller rounds once, when it stores the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.errors import ShapeError

__all__ = [
    "LINEAR",
    "MATMUL",
    "WeightLayout",
    "conv_layout",
    "conv_transpose_layout",
    "fold_input_affine",
    "fold_output_affine",
    "identity_kernel",
]


@dataclass(frozen=True)
class WeightLayout:
    """Positions of the group, output, input and tap axes of a weight.

    Attributes:
        axes: The weight's own dimensions, outermost first, each one a run of
            letters for axes merged into it: `("GO", "I", "K")` is a convolution,
            `("GI", "O", "K")` a transposed one, `("O", "I")` a linear layer.
            `K` stands for all trailing dimensions at once.
        groups: The size of G.

    Example:
        >>> weight = torch.arange(12.0).reshape(4, 3, 1)     # (G·I, O, K), G = 2
        >>> layout = WeightLayout(("GI", "O", "K"), groups=2)
        >>> layout.to_goik(weight).shape                      # (G, O, I, K)
        torch.Size([2, 3, 2, 1])
        >>> back = layout.from_goik(layout.to_goik(weight), weight.shape)
        >>> torch.equal(back, weight)
        True
    """

    axes: tuple[str, ...]
    groups: int = 1

    def to_goik(self, weight: Tensor) -> Tensor:
        """Return `weight` as a `(G, O, I, K)` tensor; axes it lacks have size 1."""
        sizes, order = self._split(tuple(weight.shape))
        split = weight.reshape([sizes[axis] for axis in order])
        present = [axis for axis in "GOIK" if axis in order]
        split = split.permute([order.index(axis) for axis in present])
        return split.reshape([sizes.get(axis, 1) for axis in "GOIK"])

    def from_goik(self, weight_goik: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the weight of `shape` that `to_goik` maps to `weight_goik`."""
        sizes, order = self._split(tuple(shape))
        present = [axis for axis in "GOIK" if axis in order]
        split = weight_goik.reshape([sizes[axis] for axis in present])
        return split.permute([present.index(axis) for axis in order]).reshape(shape)

    def output_channels(self, shape: tuple[int, ...]) -> int:
        """Return G·O of a weight of `shape`."""
        sizes, _ = self._split(tuple(shape))
        return sizes.get("G", 1) * sizes["O"]

    def input_channels(self, shape: tuple[int, ...]) -> int:
        """Return G·I of a weight of `shape`."""
        sizes, _ = self._split(tuple(shape))
        return sizes.get("G", 1) * sizes["I"]

    def _split(self, shape: tuple[int, ...]) -> tuple[dict[str, int], str]:
        fixed = [axis for axis in self.axes if axis != "K"]
        if len(shape) < len(fixed) or ("K" not in self.axes and shape[len(fixed) :]):
            raise ShapeError(
                f"a weight laid out as {self.axes} needs {len(fixed)} or more "
                f"dimensions, got shape {shape}"
            )
        sizes = {}
        for axis, size in zip(fixed, shape, strict=False):
            if "G" in axis:
                if size % self.groups:
                    raise ShapeError(
                        f"{size} channels must divide into {self.groups} groups"
                    )
                sizes["G"] = self.groups
            sizes[axis[-1]] = size // self.groups if "G" in axis else size
        if "K" in self.axes:
            sizes["K"] = math.prod(shape[len(fixed) :])
        return sizes, "".join(self.axes)


LINEAR = WeightLayout(("O", "I"))
MATMUL = WeightLayout(("I", "O"))


def conv_layout(groups: int = 1) -> WeightLayout:
    """Return the layout of a convolution's weight: (groups·O, I, *kernel)."""
    return WeightLayout(("GO", "I", "K"), groups)


def conv_transpose_layout(groups: int = 1) -> WeightLayout:
    """Return the layout of a transposed convolution: (groups·I, O, *kernel)."""
    return WeightLayout(("GI", "O", "K"), groups)


def fold_output_affine(
    weight: Tensor, bias: Tensor | None, affine: Affine, layout: WeightLayout
) -> tuple[Tensor, Tensor]:
    """Absorb an affine map of the output channels into the weights before it.

    scale·(W·x + b) + shift = (scale·W)·x + (scale·b + shift)

    Args:
        weight: W, in the layout of its op.
        bias: b, shape `(G·O,)`, or None for zero.
        affine: The map after the op; its scale and shift have shape `(G·O,)`.
        layout: Where W keeps its output channels.

    Returns:
        The new weight, of the shape of `weight`, and the new bias, `(G·O,)`;
        both float64.

    Example:
        >>> import torch.nn.functional as F
        >>> w, b, x = torch.randn(6, 2, 3), torch.randn(6), torch.randn(1, 4, 8)
        >>> after = Affine(torch.randn(6), torch.randn(6))
        >>> w2, b2 = fold_output_affine(w, b, after, conv_layout(2))
        >>> before = after(F.conv1d(x, w, b, groups=2), dim=1)
        >>> torch.allclose(before, F.conv1d(x, w2.float(), b2.float(), groups=2),
        ...                atol=1e-5)
        True
    """
    w_goik = layout.to_goik(weight.to(torch.float64))
    scale = affine.scale.to(torch.float64)
    shift = affine.shift.to(torch.float64)
    scaled = w_goik * scale.reshape(w_goik.shape[0], w_goik.shape[1], 1, 1)
    new_bias = shift if bias is None else scale * bias.to(torch.float64) + shift
    return layout.from_goik(scaled, tuple(weight.shape)), new_bias


def fold_input_affine(
    weight: Tensor, bias: Tensor | None, affine: Affine, layout: WeightLayout
) -> tuple[Tensor, Tensor]:
    """Absorb an affine map of the input channels into the weights after it.

    W·(scale·x + shift) + b = (W·scale)·x + (b + Σ W·shift)

    Exact where every output sees all taps of the kernel: zero padding would have
    to be padding with −shift/scale instead, so under zero padding only a map with
    shift 0 may be folded. The caller checks that; a weight does not know its padding.

    Args:
        weight: W, in the layout of its op.
        bias: b, shape `(G·O,)`, or None for zero.
        affine: The map before the op; its scale and shift have shape `(G·I,)`.
        layout: Where W keeps its input channels.

    Returns:
        The new weight, of the shape of `weight`, and the new bias, `(G·O,)`;
        both float64.
    """
    w_goik = layout.to_goik(weight.to(torch.float64))
    groups, _, per_group, _ = w_goik.shape
    scale = affine.scale.to(torch.float64).reshape(groups, 1, per_group, 1)
    shift = affine.shift.to(torch.float64).reshape(groups, 1, per_group, 1)
    new_bias = (w_goik * shift).sum((2, 3)).reshape(-1)
    if bias is not None:
        new_bias = new_bias + bias.to(torch.float64)
    return layout.from_goik(w_goik * scale, tuple(weight.shape)), new_bias


def identity_kernel(
    shape: tuple[int, ...], layout: WeightLayout, tap: int, *, scale: Tensor
) -> Tensor:
    """Return the weight, float64, whose map multiplies channel c by `scale[c]`.

    Args:
        shape: The shape of the weight; as many input as output channels.
        layout: Where it keeps them.
        tap: Which of the K taps stands on the output position itself.
        scale: Factor per channel, `(G·O,)`.
    """
    blank = torch.zeros(shape, dtype=torch.float64, device=scale.device)
    w_goik = layout.to_goik(blank).clone()
    groups, outputs, inputs, _ = w_goik.shape
    if outputs != inputs:
        raise ShapeError(
            f"an identity needs as many outputs as inputs, got {outputs} and {inputs}"
        )
    diagonal = scale.to(torch.float64).reshape(groups, outputs)
    w_goik[..., tap] = torch.diag_embed(diagonal)
    return layout.from_goik(w_goik, shape)
