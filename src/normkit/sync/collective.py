"""The one collective of the layers: a sum over ranks, in float64.

In eager mode it is c10d's own call, in place: a functional collective takes nine times
its processor time. Compilers, which need values out of place, get the functional one,
and on a CPU an operation that makes c10d's call: a rank that compiles, or runs under a
mode, takes part in the checks of those that do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.errors import RanksError
from normkit.sync.agreement import agree, is_checking
from normkit.sync.first_sums import differs_on_a_rank
from normkit.sync.groups import Group, Ranks, is_running, process_group_of
from normkit.torch_state import (
    has_forward_mode,
    has_mode_or_tracer,
    has_transforms,
    is_compiling,
    process_group_by_name,
)

__all__ = ["all_reduce_", "sum_over"]


def sum_over(
    tensors: Sequence[Tensor], process_group: Group = None, *, action: str = "forward"
) -> list[Tensor]:
    """Sum `tensors` over ranks in float64, in one collective.

    Differentiable; a list of float64 copies when torch.distributed is not running.
    `action` is what the sums are for, in a word, for errors.
    """
    wide = [tensor.to(torch.float64) for tensor in tensors]
    if not is_running() or not wide:
        return wide
    if not isinstance(process_group, Ranks):
        process_group = process_group_of(process_group)
    flat = torch.cat([t.reshape(-1) for t in wide])
    if is_compiling():
        # torch.compile takes no function with a derivative of forward mode.
        flat = _SumOverRanks.apply(flat, process_group, action)
    elif has_transforms() or has_forward_mode() or flat.requires_grad:
        flat = _TransformedSum.apply(flat, process_group, action)
    else:
        flat = _all_reduce(flat, process_group, action)
    sizes = [t.numel() for t in wide]
    pieces = flat.split(sizes)
    return [piece.view(t.shape) for piece, t in zip(pieces, wide, strict=True)]


def all_reduce_(x: Tensor, ranks: Group, action: str = "forward") -> Tensor:
    """Sum a contiguous tensor over ranks, in place.

    Args:
        x: Values, of one shape on every rank.
        ranks: `Ranks` of a layer, or a ProcessGroup.
        action: What the sum is for, in a word.

    Raises:
        RanksError: The collective failed, or timed out because a rank did not come.
    """
    if not isinstance(ranks, Ranks):
        ranks = Ranks(ranks, lambda: "a statistic")
    if is_checking():
        agree(ranks, action)
    try:
        if x.is_cpu and differs_on_a_rank(
            x, ranks.group, is_backward=action == "backward"
        ):
            agree(ranks, action, f"{x.numel()} numbers")
        dist.all_reduce(x, group=ranks.group)
    except RanksError:
        raise
    except RuntimeError as error:
        raise RanksError(
            f"the {action} of {ranks.name()} did not get the sums of all ranks: "
            f"{error}. "
            "Every rank must call forward and backward of every synchronized layer "
            "equally often, in the same order, mode and number of channels; see the "
            "other ranks' errors, or run with NORMKIT_CHECK_RANKS=1 to learn which "
            "rank does otherwise"
        ) from error
    return x


class _SumOverRanks(torch.autograd.Function):
    """y = Σ over ranks of x; each rank's dx is the sum of every rank's dy."""

    @staticmethod
    def forward(x: Tensor, group: Group, action: str) -> Tensor:
        return _all_reduce(x, group, action)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, _ = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = grad_outputs
        again = _SumOverRanks if is_compiling() else _TransformedSum
        return again.apply(dy.contiguous(), ctx.group, "backward"), None, None


class _TransformedSum(_SumOverRanks):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _TransformedSum.apply(tangents[0].contiguous(), ctx.group, "tangent")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, Any]:
        # A mapped dimension is summed over ranks as any other.
        x, *others = args
        return _TransformedSum.apply(x.contiguous(), *others), in_dims[0]


def _all_reduce(x: Tensor, group: Group, action: str) -> Tensor:
    if not is_compiling() and not has_mode_or_tracer():
        return all_reduce_(x.detach().clone(), group, action)
    # Out of place, and traced whole.
    plain = group.group if isinstance(group, Ranks) else group
    if x.device.type == "cpu":  # torch 2.6 compiles no `is_cpu` of a backward
        return torch.ops.normkit.sum_over_ranks(x.detach(), plain.group_name, action)
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(x.detach(), "sum", plain))


def _sum_over_ranks(x: Tensor, group_name: str, action: str) -> Tensor:
    return all_reduce_(x.clone(), process_group_by_name(group_name), action)


_LIBRARY = torch.library.Library("normkit", "FRAGMENT")
_LIBRARY.define(
    "sum_over_ranks(Tensor x, str group_name, str action) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("sum_over_ranks", _sum_over_ranks, "CPU")
_LIBRARY.impl("sum_over_ranks", lambda x, *_: torch.empty_like(x), "Meta")
