"""The keys that a mask lets queries read, and those that it hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Keys"]

# Samples and values of keys read per call; more are thinned by samples, then by
# channels.
MAX_SAMPLES, MAX_VALUES = 32, 1 << 20


@dataclass(frozen=True)
class Keys:
    """The keys of one call.

    Attributes:
        values: Shape `(N, keys, channels)`; or what the keys are made of.
        hidden: True for keys that no query may read, shape `(N, keys)`.
    """

    values: Tensor
    hidden: Tensor

    @classmethod
    def of_product(cls, keys: Tensor, mask: Tensor) -> Keys | None:
        """Return the keys of a product with heads; None for others.

        Args:
            keys: Shape `(N, heads, keys, channels)`.
            mask: True for what is read, shape `(N, heads, queries, keys)`.
        """
        if keys.dim() != 4:
            return None
        return cls(keys.transpose(1, 2).flatten(2), ~mask.any(-2).any(1))

    def spreads(self) -> tuple[Tensor, ...]:
        """Return how far keys differ between the samples, at one position.

        Returns:
            The summed squared deviations from the mean of the position, of the keys
            that are read and of those that are hidden; and the numbers of both. A key
            that is alone at its position counts for neither.
        """
        step = max(1, math.ceil(len(self.values) / MAX_SAMPLES))
        values, hidden = self.values[::step], self.hidden[::step]
        every = max(1, math.ceil(values.numel() / MAX_VALUES))
        values = values[..., ::every].float()
        found = [_spread(values, kept) for kept in (~hidden, hidden)]
        (read, num_read), (unread, num_hidden) = found
        return read, unread, num_read, num_hidden


def _spread(values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    weight = kept.to(values.dtype)
    counts = weight.sum(0)
    weight = weight * (counts > 1)
    mean = torch.einsum("nk,nkc->kc", weight, values) / counts.clamp(min=1)[:, None]
    away = (values - mean).square().mean(-1)
    return (away * weight).sum(), weight.sum()
