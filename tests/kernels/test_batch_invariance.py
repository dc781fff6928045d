"""A sample has the same bits alone and in any batch, and training on every run.

Forward, where a sample does not depend on the others (layer, RMS, group and instance
norm, and batch norm with given statistics): whatever else is in the batch, wherever in
it the sample lies, with any number of threads, with outputs past the caches or not.
Backward, and batch norm in training: with any number of threads, and again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.cases import DTYPES, channels_last
from kernels.native import CENTERED, GIVEN, STREAM, call
from normkit.kernels.cpu.loading import library, why_absent
from normkit.kernels.epilogue import ACTIVATIONS

pytestmark = pytest.mark.skipif(library() is None, reason=why_absent() or "built")

ISAS = library().isas if library() is not None else ()
# Below a vector of each instruction set, one, some, between; a row of thousands.
LENGTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 49, 64, 65, 127, 196, 1001, 4099)
BATCHES = (1, 2, 3, 5, 17, 67)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native = library()
    assert native is not None
    before = native.isa
    native.choose_isa(request.param)
    yield request.param
    native.choose_isa(before)


def as_it_is(x: Tensor) -> Tensor:
    return x


def last(x: Tensor) -> Tensor:
    """Dimension 1 innermost, and the one after it if there are groups."""
    if x.dim() == 5:
        return channels_last(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
    return channels_last(x)


@dataclass(frozen=True)
class Norm:
    """A normalization of samples along dimension 0.

    Attributes:
        sample: The shape of one sample.
        dims: The reduced dimensions, without that of samples.
        varies: The dimensions that weight and bias have; none of them: no affine.
        layout: How a batch lies in memory.
        given: The statistics are given, one for each channel: batch norm in eval mode.
        centered: As in `call.hpp`.
    """

    name: str
    sample: tuple[int, ...]
    dims: tuple[int, ...]
    varies: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = as_it_is
    given: bool = False
    centered: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def affine(self) -> tuple[int, ...] | None:
        shape = (1, *self.sample)
        kept = tuple(n if d in self.varies else 1 for d, n in enumerate(shape))
        return kept if self.varies else None

    def statistic(self, samples: int) -> tuple[int, ...]:
        shape = (1 if self.given else samples, *self.sample)
        return tuple(1 if d in self.dims else n for d, n in enumerate(shape))


def norms_of(n: int) -> list[Norm]:
    """Every kind of layer and layout, of `n` positions or values."""
    found = [
        Norm(f"layer-{n}", (n,), (1,), (1,)),
        Norm(f"layer-plain-{n}", (n,), (1,), ()),
        Norm(f"layer-rows-{n}", (3, n), (2,), (2,)),
        Norm(f"rms-{n}", (n,), (1,), (1,), centered=False),
        Norm(f"group-matrix-{n}", (2, n), (2,), (1, 2)),
        Norm(f"group-{n}", (2, 3, n), (2, 3), (1, 2)),
        Norm(f"instance-{n}", (3, n), (2,), (1,)),
        Norm(f"eval-{n}", (5, n), (2,), (1,), given=True),
        Norm(f"eval-matrix-{n}", (n,), (), (1,), given=True),
    ]
    if n > 1:
        found += [
            Norm(f"group-last-{n}", (2, 3, n, 2), (2, 3, 4), (1, 2), last),
            Norm(f"group-of-all-last-{n}", (1, 6, n, 2), (2, 3, 4), (1, 2), last),
            Norm(f"instance-last-{n}", (3, n, 2), (2, 3), (1,), last),
            Norm(f"instance-wide-last-{n}", (n, 3, 2), (2, 3), (1,), last),
            Norm(f"eval-last-{n}", (5, n, 2), (2, 3), (1,), last, given=True),
        ]
    return found


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def forward(
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    threads: int,
    streams: bool = False,
) -> Tensor:
    """The one call of this page: y, with statistics, weight and bias as drawn."""
    statistic, affine = norm.statistic(x.shape[0]), norm.affine
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    center, scale = torch.empty(2, math.prod(statistic), dtype=torch.float64)
    if norm.given:
        center.copy_(values(center.shape, torch.float64, 3))
        scale.copy_(values(center.shape, torch.float64, 4).abs() + 0.1)
    y = torch.empty_like(x)
    call(
        "forward",
        *(statistic, affine),
        flags=CENTERED * norm.centered | GIVEN * norm.given | STREAM * streams,
        threads=threads,
        activation=activation,
        x=x,
        residual=residual,
        weight=None if affine is None else values(affine, wide, 1),
        bias=None if affine is None else values(affine, wide, 2),
        center=center,
        scale=scale,
        y=y,
    )
    return y


def check(norm: Norm, dtype: torch.dtype, activation: str, has_residual: bool) -> None:
    most = max(n for n in BATCHES if n == 2 or n * math.prod(norm.sample) <= 60_000)
    x = values((most, *norm.sample), dtype, 5) * 2 + 3
    x[most // 2] *= 40  # a sample of another size among them
    residual = values(x.shape, dtype, 6) if has_residual else None

    def y_of(low: int, high: int, threads: int, streams: bool = False) -> Tensor:
        """Of samples `low` to `high`, in fresh memory."""
        some, others = (
            None if t is None else norm.layout(t[low:high].clone())
            for t in (x, residual)
        )
        assert some is not None
        return forward(norm, some, others, activation, threads, streams)

    alone = {k: y_of(k, k + 1, 1)[0] for k in {0, 1, most // 2, most - 1}}
    for n in BATCHES:
        for threads, streams in ((1, False), (2, False), (3, True)):
            for low in {0, min(1, most - n), most - n} if n <= most else ():
                y = y_of(low, low + n, threads, streams)
                for k, expected in alone.items():
                    if low <= k < low + n:
                        assert torch.equal(y[k - low], expected), (
                            f"{norm}, {k} of {low}..{low + n}, {threads} threads: "
                            f"{(y[k - low] != expected).sum()} of {expected.numel()} "
                            f"values differ"
                        )


@pytest.mark.parametrize("n", LENGTHS)
def test_a_sample_has_the_same_bits_in_every_batch(isa, n) -> None:
    for norm in norms_of(n):
        check(norm, torch.float32, "none", has_residual=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 17, 49, 1001])
def test_in_every_dtype_with_what_follows(isa, n, dtype) -> None:
    for norm in norms_of(n):
        check(norm, dtype, "relu", has_residual=False)
        check(norm, dtype, "relu", has_residual=True)
        check(norm, dtype, "none", has_residual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_every_activation(isa, activation, dtype) -> None:
    for n in (7, 33, 101):
        for norm in norms_of(n):
            check(norm, dtype, activation, has_residual=n == 33)


@pytest.mark.parametrize("n", [40_000, 70_001])
def test_samples_of_many_blocks(isa, n) -> None:
    for norm in (
        Norm("layer", (n,), (1,), (1,)),
        Norm("layer-plain", (n,), (1,), ()),
        Norm("group", (2, 3, n // 4), (2, 3), (1, 2)),
        Norm("group-last", (2, 2, n // 8, 4), (2, 3, 4), (1, 2), last),
        Norm("instance-last", (2, n // 8, 4), (2, 3), (1,), last),
        Norm("eval", (2, n), (2,), (1,), given=True),
    ):
        check(norm, torch.float32, "none", has_residual=False)
