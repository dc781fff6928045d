"""What the ranks run in test_short_way.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import normkit
from normkit.functional import engine, remembered
from normkit.kernels import backend
from sync.layers_on_ranks import first


def _layer(state: dict[str, Tensor], dtype: torch.dtype, **extras: Any) -> Any:
    channels = state["weight"].numel()
    layer = normkit.nn.SyncBatchNorm(
        channels, process_group=first(2), dtype=dtype, **extras
    )
    layer.load_state_dict(state)
    return layer


def both_ways(
    rank: int,
    state: dict[str, Tensor],
    parts: list[Tensor],
    masks: list[Tensor] | None,
    residuals: list[Tensor] | None,
    cotangents: list[Tensor],
    extras: dict[str, Any],
    is_last: bool,
) -> Any:
    """A step by native parts, and by the primitives of the reference backend."""
    if rank >= 2:
        first(2)
        return None
    results = []
    for name in ("cpu", "reference"):
        layer = _layer(state, torch.float32, **extras)
        x = parts[rank].clone()
        if is_last:
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        residual = None
        if residuals is not None:
            residual = residuals[rank].clone().requires_grad_()
        mask = None if masks is None else masks[rank]
        with backend(name):
            y = layer(x, mask=mask, residual=residual)
            dy = cotangents[rank]
            grads = torch.autograd.grad(
                y,
                [
                    x,
                    layer.weight,
                    layer.bias,
                    *([] if residual is None else [residual]),
                ],
                dy,
            )
        results.append([y.detach(), *grads, layer.running_mean, layer.running_var])
    return results


def route(rank: int, parts: list[Tensor]) -> Any:
    """The kind of call that a layer over ranks runs by."""
    group = first(2)
    if rank >= 2:
        return None
    kinds: list[str] = []
    real = engine.autograd.run

    def seen(call: Any, *args: Any) -> Tensor:
        kinds.append(type(call).__name__)
        return real(call, *args)

    layer = normkit.nn.SyncBatchNorm(4, process_group=group)
    with (
        mock.patch.object(engine.autograd, "run", seen),
        mock.patch.object(remembered, "run", seen),
    ):
        layer(parts[rank])
        layer(parts[rank])
        layer(parts[rank][:0])
    return kinds


def far_off(rank: int, parts: list[Tensor], name: str) -> Any:
    group = first(2)
    if rank >= 2:
        return None
    calls: list[int] = []
    real = dist.all_reduce

    def counted(x: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(x.numel())
        return real(x, *args, **options)

    layer = normkit.nn.SyncBatchNorm(
        parts[0].shape[1], process_group=group, affine=False
    )
    x = parts[rank].clone().requires_grad_()
    with mock.patch.object(dist, "all_reduce", counted), backend(name):
        y = layer(x)
    (dx,) = torch.autograd.grad(y, x, x.detach().cos())
    return y.detach(), dx, layer.running_mean, layer.running_var, calls


def derivative(rank: int, state: dict[str, Tensor], parts: list[Tensor]) -> Any:
    """By autograd, torch.func.grad, torch.func.jvp, and mapped over two inputs."""
    group = first(2)
    if rank >= 2:
        return None
    layer = normkit.nn.SyncBatchNorm(
        4, process_group=group, dtype=torch.float64, track_running_stats=False
    )
    layer.load_state_dict({k: state[k] for k in ("weight", "bias")})

    def loss(x: Tensor) -> Tensor:
        return (layer(x) ** 3).sum()

    x = parts[rank].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(x), x)
    by_func = torch.func.grad(loss)(parts[rank])
    tangent = parts[rank].sin()
    _, directional = torch.func.jvp(loss, (parts[rank],), (tangent,))
    twice = torch.stack([parts[rank], parts[rank].cos()])
    mapped = torch.func.vmap(torch.func.grad(loss))(twice)
    other = torch.func.grad(loss)(twice[1])
    found = by_autograd, by_func, directional, tangent, mapped, other
    return [t.detach() for t in found]


def kept(rank: int, memory: str | None) -> Any:
    group = first(2)
    if rank >= 2:
        return None
    torch.manual_seed(rank)
    layer = normkit.nn.SyncBatchNorm(
        16, process_group=group, activation="relu", memory=memory
    )
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    with normkit.saved_memory() as saved:
        y = layer(x)
        loss = y.square().sum()  # keeps y
    loss.backward()
    return saved.bytes / (x.numel() * 4), y.detach().clone(), x.grad
