"""Start of the kernels, and the tickets that they share on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["options_of", "submit", "tickets"]

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def submit(
    kernel: Any,
    grid: tuple[int, ...],
    num_warps: int,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Start `kernel` on the current stream of the device of its `x_ptr`.

    `max_registers` is what a thread may use when the grid leaves room for it; without
    it the compiler saves registers for programs that are never started. Multiply and
    add may contract to one rounding (`enable_fp_fusion`): every kernel
    that recomputes a value of another writes the same expression.
    """
    x: Tensor = arguments["x_ptr"]
    options = options_of(num_warps, max_registers)
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](**options, **arguments)
    else:
        kernel[grid](**options, **arguments)


def options_of(num_warps: int, max_registers: int | None) -> dict[str, Any]:
    """Return the options of the compiler for a launch."""
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": True}
    # Only Triton's NVIDIA backend has the option.
    if max_registers is not None and torch.version.hip is None:
        options["maxnreg"] = max_registers
    return options


def tickets(device: torch.device, count: int) -> Tensor:
    """Return at least `count` int32 zeros that every kernel leaves at zero.

    One tensor per stream, on which launches follow one another. A CUDA graph may be
    replayed on any stream and gets its own, zeroed by the graph itself.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream)
    kept = _tickets.get(key)
    if kept is None or kept.numel() < count:
        # Enough for 4096 channels at once, so that it rarely grows.
        kept = torch.zeros(max(count, 4097), dtype=torch.int32, device=device)
        _tickets[key] = kept
    return kept
