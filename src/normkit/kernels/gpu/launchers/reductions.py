"""Launch the reductions: statistics, and the sums of the backward."""

# A kernel's type is its list of untyped arguments.
# pyright: reportUnknownVariableType=false, reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels.gpu import config, launch
from normkit.kernels.gpu.geometry import Placement, Reduction
from normkit.kernels.gpu.launchers.operands import (
    NO_GATE,
    Gate,
    Statistics,
    empty,
    tile_arguments,
    width_arguments,
)
from normkit.kernels.gpu.statistics import statistics_kernel
from normkit.kernels.gpu.sums import sums_kernel
from normkit.kernels.spec import Running

__all__ = ["statistics", "sums", "sums_of_batch_norm"]


def statistics(
    x: Tensor,
    reduction: Reduction,
    *,
    eps: float | None = None,
    weight: Tensor | None = None,
    centered: bool = True,
    running: Running | None = None,
) -> Statistics:
    """Return mean and m2 of each statistic; with `eps`, inv_std and scale too."""
    grid, warps, sizes = _plan(reduction, x.element_size(), x.device)
    count = reduction.statistics
    # Results of an operator must not share memory, so each has its own.
    mean = x.new_empty((count,), dtype=torch.float64)
    m2, inv_std = torch.empty_like(mean), torch.empty_like(mean)
    parts = mean.new_empty((3, grid[1], count))
    scale = x.new_empty((count,), dtype=torch.float32)
    moves, old_mean, old_var, rate, tracked, skipped = "no", mean, mean, 0.0, None, None
    if running is not None and running.mean is not None:
        old_mean, old_var, rate, tracked, skipped, _ = running
        moves = "cumulative" if rate is None else "ema"
    launch.submit(
        statistics_kernel,
        grid,
        warps,
        config.REDUCTION_REGISTERS,
        x_ptr=x,
        parts_ptr=parts,
        ticket_ptr=launch.tickets(x.device, grid[0] + 1),
        mean_ptr=mean,
        m2_ptr=m2,
        inv_std_ptr=inv_std,
        scale_ptr=scale,
        weight_ptr=scale if weight is None else weight,
        running_mean_ptr=old_mean,
        running_var_ptr=old_var,
        tracked_ptr=mean if tracked is None else tracked,
        skipped_ptr=mean if skipped is None else skipped,
        count=x.numel() // count,
        eps=0.0 if eps is None else eps,
        momentum=rate or 0.0,
        CENTERED=centered,
        WRITES_SCALE=eps is not None,
        HAS_WEIGHT=weight is not None,
        RUNNING=moves,
        SKIPS_NONFINITE=running is not None and running.skips_nonfinite,
        COUNTS_BATCHES=tracked is not None,
        COUNTS_SKIPPED=skipped is not None,
        **sizes,
        BLOCK_RUNNING=1024,
    )
    if eps is None:
        return Statistics(mean, m2)
    return Statistics(mean, m2, inv_std, scale)


def sums(
    dy: Tensor,
    x: Tensor,
    reduction: Reduction,
    center: Tensor,
    along: Placement,
    *,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    weight_along: Placement | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Σ dy·weight and Σ dy·weight·(x − center)·scale, flat, in float64."""
    total, total_rest = empty(x, (2, reduction.statistics), torch.float64).unbind(0)
    _submit_sums(
        *(dy, x, reduction, center, along, NO_GATE),
        scale=scale,
        weight=weight,
        weight_along=weight_along,
        finish="sums",
        sum_ptr=total,
        sum_rest_ptr=total_rest,
    )
    return total, total_rest


def sums_of_batch_norm(
    dy: Tensor,
    x: Tensor,
    reduction: Reduction,
    center: Tensor,
    inv_std: Tensor,
    scale: Tensor,
    gate: Gate,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return b and c of `apply_grads`, and dweight and dbias (None without them)."""
    b, c = empty(x, (2, reduction.statistics), torch.float32).unbind(0)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    own = Placement("statistic")
    _submit_sums(
        *(dy, x, reduction, center, own, gate),
        scale=scale,
        finish="batch_norm",
        inv_std_ptr=inv_std,
        b_ptr=b,
        c_ptr=c,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
    )
    return b, c, dweight, dbias


def _submit_sums(
    dy: Tensor,
    x: Tensor,
    reduction: Reduction,
    center: Tensor,
    along: Placement,
    gate: Gate,
    *,
    scale: Tensor | None,
    finish: str,
    weight: Tensor | None = None,
    weight_along: Placement | None = None,
    **outputs: Tensor | None,
) -> None:
    grid, warps, sizes = _plan(reduction, x.element_size(), x.device)
    part = empty(x, (grid[1], 2, reduction.statistics), torch.float32)
    names = ("sum", "sum_rest", "inv_std", "dweight", "dbias", "b", "c")
    written = {f"{name}_ptr": outputs.get(f"{name}_ptr") for name in names}
    weights = Placement("row") if weight_along is None else weight_along
    launch.submit(
        sums_kernel,
        grid,
        warps,
        dy_ptr=dy,
        x_ptr=x,
        part_ptr=part,
        ticket_ptr=launch.tickets(x.device, grid[0] + 1),
        center_ptr=center,
        scale_ptr=center if scale is None else scale,
        shift_ptr=center if gate.shift is None else gate.shift,
        residual_ptr=x if gate.operand is None else gate.operand,
        bits_ptr=x if gate.bits is None else gate.bits,
        weight_ptr=center if weight is None else weight,
        **{name: part if t is None else t for name, t in written.items()},
        repeat=along.repeat,
        period=along.period,
        weight_repeat=weights.repeat,
        weight_period=weights.period,
        count=x.numel() // reduction.statistics,
        slope=gate.slope,
        ALONG=along.along,
        WEIGHT_ALONG=weights.along,
        HAS_WEIGHT=weight is not None,
        HAS_SCALE=scale is not None and along.along != "statistic",
        HAS_SHIFT=gate.shift is not None,
        HAS_RESIDUAL=gate.residual is not None,
        GATE=gate.kind,
        ACTIVATION=gate.activation,
        FINISH=finish,
        WRITES_DWEIGHT=outputs.get("dweight_ptr") is not None,
        WRITES_DBIAS=outputs.get("dbias_ptr") is not None,
        **sizes,
    )


@config.cached
def _plan(
    r: Reduction, itemsize: int, device: torch.device
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Return the grid, the warps, and the arguments that the sizes decide."""
    tile = config.reduction_tile_for(r.steps, r.block, itemsize)
    programs = config.reduction_programs(device)
    grid = config.reduction_grid(
        *(r.steps, r.statistics, r.block, r.kind, tile, programs)
    )
    # The last program of a block merges so many parts at once: 1024 values, or all.
    width = r.block if r.kind == "columns" else 1
    parts = max(1, min(1024 // width, 1 << max(0, grid.splits - 1).bit_length()))
    sizes = {
        "steps": r.steps,
        "statistics": r.statistics,
        "pieces": r.pieces,
        "KIND": r.kind,
        "BLOCK_PARTS": parts,
        **width_arguments(r.width),
        **tile_arguments(tile),
    }
    return (grid.blocks, grid.splits), tile.warps, sizes
