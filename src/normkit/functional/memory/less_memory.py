"""Keep less between forward and backward.

    with less_memory():                conv → batch norm + relu → conv → …
        loss = model(x).sum()          keeps one activation per layer instead of two:
    loss.backward()                    the next layer's input is computed again from x

`"int8"` also keeps x itself as one byte per value where y cannot replace it (a
residual is added, or no activation follows): gradients are then off by the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from normkit.errors import ArgumentError
from normkit.functional.memory.block import Block, Mode

__all__ = ["less_memory"]


class less_memory:  # noqa: N801  a context manager, named as the verb it is
    """Save fewer activations for the backward, in everything that runs in the block.

    Args:
        mode: `"recompute"`: exact, about 4 bytes of extra traffic per value.
            `"int8"`: also rounds the inputs of normalizations with a residual, or with
            no activation, to a byte; gradients are approximate, and second derivatives
            through such a layer raise. Where leaky_relu follows, the input stays whole:
            its slope jumps at 0.

    Raises:
        ArgumentError: `mode` is neither of the two.

    Example:
        >>> import torch
        >>> import normkit
        >>> from normkit import saved_memory
        >>> conv = torch.nn.Conv1d(3, 3, 1)
        >>> x = torch.randn(2, 3, 5)
        >>> with saved_memory() as plain:
        ...     y = conv(normkit.functional.instance_norm(conv(x)))
        >>> with less_memory(), saved_memory() as less:
        ...     y = conv(normkit.functional.instance_norm(conv(x)))
        >>> plain.bytes - less.bytes == x.numel() * 4
        True
    """

    def __init__(self, mode: Mode = "recompute") -> None:
        if mode not in ("recompute", "int8"):
            raise ArgumentError(f"mode={mode!r} must be 'recompute' or 'int8'")
        self._mode: Mode = mode

    def __enter__(self) -> less_memory:
        Block(self._mode, owner=self).__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        # One object may be open in several threads, as hooks of a model are.
        Block.close(self)

    @classmethod
    def during(
        cls, model: torch.nn.Module, mode: Mode = "recompute"
    ) -> list[RemovableHandle]:
        """Enter the block in every forward of `model` until its handles are removed."""
        block = cls(mode)

        def before(module: torch.nn.Module, args: Any) -> None:
            block.__enter__()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            block.__exit__(None, None, None)

        return [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),
        ]
