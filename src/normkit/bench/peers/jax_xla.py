"""JAX: batch norm in plain JAX, compiled by XLA.

channels_last is an array `(N, H, W, C)`; in training the running statistics are
returned, as a functional library does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from normkit.bench.call_cases import CallCase
from normkit.bench.peers.peer import Given, Peer

__all__ = ["PEER"]


def _version() -> str | None:
    try:
        return metadata.version("jax")
    except metadata.PackageNotFoundError:
        return None


def _serves(case: CallCase, training: bool) -> bool:
    del training
    return case.layer == "batch"


def _call(given: Given) -> Callable[[], Any]:
    import importlib

    # Not among the extras of normkit, so type checkers do not find it.
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")

    is_last = given.case.layout == "channels_last"
    dims, shape = ((0, 1, 2), (-1,)) if is_last else ((0, 2, 3), (-1, 1, 1))
    layer, eps, momentum = given.layer, given.layer.eps, 0.1
    count = given.x.numel() // given.x.shape[1]

    def array(t: Tensor) -> Any:
        t = t.detach().movedim(1, -1) if is_last and t.dim() == 4 else t.detach()
        return jnp.array(t.contiguous().numpy())

    def affine(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + eps)
        centred = x - mean.reshape(shape)
        return centred * scale.reshape(shape) + bias.reshape(shape)

    weight, bias, mean, var = map(
        array, (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    )
    x, dy = array(given.x), array(given.dy)

    if not given.training:
        evaluate = jax.jit(affine)
        return lambda: evaluate(x, mean, var, weight, bias).block_until_ready()

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        mean, var = x.mean(dims), x.var(dims)
        return affine(x, mean, var, weight, bias), (mean, var)

    @jax.jit
    def step(x: Any, weight: Any, bias: Any, dy: Any, mean: Any, var: Any) -> Any:
        _, backward, found = jax.vjp(forward, x, weight, bias, has_aux=True)
        unbiased = found[1] * count / (count - 1)
        moved = (
            mean + momentum * (found[0] - mean),
            var + momentum * (unbiased - var),
        )
        return backward(dy), moved

    return lambda: jax.block_until_ready(step(x, weight, bias, dy, mean, var))


def _tensors(found: Any) -> list[Tensor]:
    arrays = found[0] if isinstance(found, tuple) else (found,)
    return [torch.tensor(array.tolist()) for array in arrays]


PEER = Peer("JAX", _version, _serves, _call, _tensors)
