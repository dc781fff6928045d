"""Ghost batches: each part of a batch is normalized by its own statistics.

The samples are split in order into ⌊N/ghost_size⌋ ghost batches whose sizes differ by
at most one; so each has at least `ghost_size` samples, and a smaller batch is a single
one. Ghost batches of one size are one call, so there are at most two calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.errors import ShapeError
from normkit.functional.engine import normalize
from normkit.kernels.epilogue import Epilogue
from normkit.masks import broadcast_mask
from normkit.moments import Moments

__all__ = ["ghost_sizes", "normalize_ghosts"]

_NONE = Epilogue()


def ghost_sizes(samples: int, ghost_size: int) -> list[int]:
    """Return the sizes of the ghost batches of a batch of `samples` samples.

    Example:
        >>> ghost_sizes(64, 16), ghost_sizes(39, 16), ghost_sizes(5, 16)
        ([16, 16, 16, 16], [20, 19], [5])
    """
    ghosts, size, larger = _shares(samples, ghost_size)
    return [size + 1] * larger + [size] * (ghosts - larger)


def _shares(samples: int, ghost_size: int) -> tuple[int, int, int]:
    """Return the number of ghosts, their size, and how many have a sample more.

    Operators alone: a compiler's symbolic sizes know neither divmod nor max.
    """
    ghosts = samples // ghost_size if samples >= ghost_size else 1
    size = samples // ghosts
    return ghosts, size, samples - size * ghosts


def normalize_ghosts(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    ghost_size: int,
    mask: Tensor | None = None,
    epilogue: Epilogue = _NONE,
) -> tuple[Tensor, Moments]:
    """Standardize each ghost batch of `x` by its own statistics over `dims`.

    Args:
        x: Values, shape `(N, *)`.
        dims: Distinct, non-negative dimensions that share a statistic, 0 among them.
        weight: Factor after standardizing, of as many dimensions as `x`.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance, inside the root.
        ghost_size: The least number of samples in a ghost, where the batch has them.
        mask: Which values count, broadcastable to `x`; outputs are 0 elsewhere.
        epilogue: A residual to add and an activation to apply, in the same pass.

    Returns:
        The standardized values, and the Moments of the whole batch: the merge of the
        ghosts, so that the running statistics are those of the population.

    References:
        Hoffer, Hubara & Soudry, "Train longer, generalize better: closing the
        generalization gap in large batch training of neural networks", NeurIPS 2017.
    """
    if epilogue.residual is not None and epilogue.residual.shape != x.shape:
        raise ShapeError(
            f"residual of shape {tuple(epilogue.residual.shape)} must have the shape "
            f"of x, {tuple(x.shape)}; use expand()"
        )
    count, least, larger = _shares(x.shape[0], ghost_size)
    valid = None if mask is None else broadcast_mask(mask, x)
    added = epilogue.residual
    inner = (1, *(d + 1 for d in dims if d))
    gain, offset = (None if v is None else v.unsqueeze(0) for v in (weight, bias))
    pieces: list[Tensor] = []
    whole: Moments | None = None
    start = 0
    for ghosts, size in ((larger, least + 1), (count - larger, least)):
        if not ghosts:
            continue
        stop = start + ghosts * size
        shape = (ghosts, size, *x.shape[1:])
        y, measured = normalize(
            x[start:stop].reshape(shape),
            inner,
            gain,
            offset,
            eps,
            mask=None if valid is None else valid[start:stop].reshape(shape),
            # Not by dataclasses.replace, which torch 2.6 cannot compile.
            epilogue=Epilogue(
                epilogue.activation,
                epilogue.slope,
                None if added is None else added[start:stop].reshape(shape),
            ),
        )
        pieces.append(y.reshape(ghosts * size, *x.shape[1:]))
        merged = measured.merge_dim(0)
        whole = merged if whole is None else whole.merge(merged)
        start = stop
    assert whole is not None
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces), whole
