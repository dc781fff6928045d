"""Hypothesis strategies: the shapes and fills on which normalization goes wrong."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FILLS = ("normal", "offset", "constant", "outlier", "tiny", "far")


def filled(shape: tuple[int, ...], fill: str, seed: int, dtype=torch.float64) -> Tensor:
    """A tensor whose values are hard in the named way."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if fill == "offset":
        x = 1e4 + 1e-2 * x
    elif fill == "constant":
        x = torch.full(shape, 0.1, dtype=torch.float64)
    elif fill == "outlier" and x.numel():
        x.view(-1)[0] = 1e4
    elif fill == "tiny":
        x = 1e-6 * x
    elif fill == "far":
        x = 1e6 + x
    return x.to(dtype)


@st.composite
def tensors(draw: st.DrawFn, *, min_rows: int = 0, dtype=torch.float64) -> Tensor:
    """A matrix (rows, columns) of one of the fills; rows may be 0, 1 or a prime."""
    rows = draw(st.sampled_from([n for n in (0, 1, 2, 3, 7, 31) if n >= min_rows]))
    columns = draw(st.sampled_from([1, 2, 5]))
    fill = draw(st.sampled_from(FILLS))
    return filled((rows, columns), fill, draw(st.integers(0, 2**16)), dtype)
