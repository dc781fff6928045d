"""One table of awkward tensors for every backend, and how far each may err."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.kernels import available_backends
from normkit.kernels.choose import backend_named

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A tensor layout and the dimensions its statistics run over."""

    name: str
    make: Callable[[torch.dtype, torch.Generator], Tensor]
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Fresh values of N(mean, std), the same at each call."""
        return self.make(dtype, torch.Generator().manual_seed(11), mean, std)


def normal(
    *shape: int, then: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[..., Tensor]:
    def make(dtype: torch.dtype, g: torch.Generator, mean: float, std: float) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64) * std + mean
        return then(x.to(dtype))

    return make


def channels_last(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last_3d)


CASES = [
    Case("nchw", normal(4, 3, 5, 7), (0, 2, 3)),
    Case("nchw-vector-width", normal(3, 16, 8, 8), (0, 2, 3)),
    Case("channels-last", normal(4, 3, 5, 7, then=channels_last), (0, 2, 3)),
    Case("channels-last-wide", normal(2, 67, 3, 3, then=channels_last), (0, 2, 3)),
    Case("matrix", normal(31, 5), (0,)),
    Case("ncl", normal(7, 1, 11), (0, 2)),
    Case("ncdhw", normal(2, 3, 4, 5, 6), (0, 2, 3, 4)),
    Case("ndhwc", normal(2, 5, 3, 4, 2, then=channels_last), (0, 2, 3, 4)),
    Case("more-than-a-chunk", normal(2, 2, 71, 73), (0, 2, 3)),
    Case("two-values", normal(2, 3), (0,)),
    Case("gaps", normal(4, 3, 5, 14, then=lambda x: x[..., ::2]), (0, 2, 3)),
    Case("transposed", normal(5, 31, then=lambda x: x.mT), (0,)),
    Case("offset-view", normal(6, 3, 4, then=lambda x: x[1:]), (0, 2)),
    Case("expanded", normal(1, 3, 4, then=lambda x: x.expand(5, 3, 4)), (0, 2)),
    Case("rows", normal(6, 37), (1,)),
    Case("rows-vector-width", normal(4, 3, 64), (2,)),
    Case("rows-of-one", normal(5, 1), (1,)),
    Case("one-long-row", normal(1, 9001), (1,)),
    Case("rows-of-two-dims", normal(3, 4, 5, 6), (2, 3)),
    Case("groups", normal(3, 2, 4, 5), (2, 3)),
    Case("rows-with-gaps", normal(6, 40, then=lambda x: x[:, 3:]), (1,)),
    Case("middle", normal(3, 7, 5), (1,)),
    Case("everything", normal(3, 4), (0, 1)),
]

EMPTY = [
    Case("no-samples", normal(0, 3, 4), (0, 2)),
    Case("no-positions", normal(2, 3, 0), (0, 2)),
    Case("no-channels", normal(2, 0, 4), (0, 2)),
    Case("no-rows", normal(0, 5), (1,)),
]


def tolerance(dtype: torch.dtype, terms: int = 1) -> dict[str, float]:
    """How far a kernel may be from float64, relative and absolute.

    A result of one rounding to `dtype` errs by half an ulp; float32 arithmetic adds a
    few roundings of 6e-8 before it, and a pairwise sum of n terms adds log2(n) more,
    relative to the sum of sizes (n·1 here: the terms are of order 1).
    """
    ulp = torch.finfo(dtype).eps
    working = 2.2e-16 if dtype == torch.float64 else 1.2e-7
    return {
        "rtol": 0.51 * ulp + 8 * working,
        "atol": 4 * working * max(terms, 1) ** 0.5,
    }


def backends_here() -> list[str]:
    """The backends that take tensors of this machine's CPU; devices have own suites."""
    x = torch.zeros(64, 64)
    names = available_backends()
    return [n for n in names if not backend_named(n).reasons_against(x, (0,))]
