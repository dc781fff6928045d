"""What the ranks run in test_merge_over.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.moments import Moments, moments
from normkit.sync import merge_all_over, merge_over, sum_over


def merged(
    rank: int, parts: list[Tensor], dim: int, mask: list[Tensor] | None, pivot: Any
) -> tuple[Tensor, Tensor, Tensor]:
    local = moments(parts[rank], dim, None if mask is None else mask[rank])
    whole = merge_over(local, pivot=pivot)
    return whole.count, whole.mean, whole.m2


def merged_with_an_empty_rank(rank: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = Moments.empty((x.shape[1],), dtype=x.dtype)
    whole = merge_over(moments(x, 0) if rank == 1 else empty)
    return whole.count, whole.mean, whole.m2


def merged_in_a_subgroup(rank: int, parts: list[Tensor]) -> Tensor | None:
    pair = dist.new_group([0, 2])
    if rank == 1:
        return None
    return merge_over(moments(parts[rank], 0), pair).mean


def merged_over_a_mesh(rank: int, parts: list[Tensor]) -> Tensor:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    return merge_over(moments(parts[rank], 0), mesh).mean


def merged_together(rank: int, parts: list[Tensor]) -> tuple[int, list[Tensor]]:
    x = parts[rank].double()
    wanted = [moments(x, 0), moments(x.square(), 0), moments(x[:, :2], 0)]
    calls = []
    real = dist.all_reduce

    def counted(x: Tensor, **options: Any) -> Any:
        calls.append(x.numel())
        return real(x, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        merge_all_over(wanted)
    single = [merge_over(part) for part in wanted]
    together = merge_all_over(wanted)
    assert len(calls) == 1
    for one, many in zip(single, together, strict=True):
        # Not bitwise: gloo's order of summation depends on the place in the message.
        torch.testing.assert_close(one.mean, many.mean, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(one.m2, many.m2, rtol=1e-14, atol=1e-14)
    return calls[0], [part.m2 for part in together]


def gradients(
    rank: int, parts: list[Tensor], cotangents: list[tuple[Tensor, Tensor]]
) -> Tensor:
    x = parts[rank].clone().requires_grad_()
    whole = merge_over(moments(x, 0))
    d_mean, d_m2 = cotangents[rank]
    ((whole.mean * d_mean).sum() + (whole.m2 * d_m2).sum()).backward()
    assert x.grad is not None
    return x.grad


def sums(rank: int, value: float) -> list[Tensor]:
    return sum_over([torch.tensor(value * (rank + 1)), torch.ones(2)])


def mismatched_pivots(rank: int) -> None:
    part = Moments.empty((1,))
    merge_all_over([part, part], pivots=[torch.zeros(1)])
