"""The ways in which a layer is called: with a graph, by a transform, checkpointed.

Each returns what it found, by name: y, the gradients of the leaves that have one, the
sum that a row norm with a residual returns besides.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import normkit
from fuzz.cases import LayerCase

Found = dict[str, Tensor]
Way = Callable[..., Found]


def parts_of(y: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return (y[0], {"sum": y[1]}) if isinstance(y, tuple) else (y, {})


def _backward(
    case: LayerCase,
    forward: Any,
    x: Tensor,
    extra: Tensor | None,
    vectors: dict[str, Any],
    dy: Tensor,
    *,
    twice: bool = False,
    block: Callable[[], Any] | None = None,
) -> Found:
    factor = None
    with contextlib.nullcontext() if block is None else block():
        y, rest = parts_of(forward(x))
        read = y
        if block is not None or case.memory == "recompute":
            # A reader that needs the output for its own gradient.
            factor = torch.ones_like(dy).requires_grad_()
            read = y * factor
    wanted = {"x": x, "residual": extra, **vectors}
    leaves = {k: t for k, t in wanted.items() if t is not None and t.requires_grad}
    if not leaves or not y.requires_grad:
        return {"y": y, **rest}
    outputs = [read, *(t for t in rest.values() if t.requires_grad)]
    upstream = [dy] * len(outputs)
    if factor is not None:
        leaves["output again"] = factor
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), upstream, create_graph=twice, allow_unused=True
    )
    named = dict(zip(leaves, grads, strict=True))
    named = {k: g for k, g in named.items() if g is not None}
    if twice:
        _second(named, leaves)
    return {"y": y, **rest, **named}


def _second(grads: Found, leaves: Found) -> None:
    """The gradient of the gradients exists; the derivative tests judge its values."""
    total = sum(g.double().square().sum() for g in grads.values())
    if getattr(total, "requires_grad", False):
        torch.autograd.grad(total, list(leaves.values()), allow_unused=True)


def _with(context: Callable[[], Any]) -> Way:
    def run(case: Any, forward: Any, *rest: Any) -> Found:
        def inside(x: Tensor) -> Any:
            with context():
                return forward(x)

        return _backward(case, inside, *rest)

    return run


def _without_graph(context: Callable[[], Any]) -> Way:
    def run(case: Any, forward: Any, x: Tensor, *_: Any) -> Found:
        with context():
            y, rest = parts_of(forward(x))
        return {"y": y, **rest}

    return run


def _checkpointed(reentrant: bool) -> Way:
    def run(case: Any, forward: Any, *rest: Any) -> Found:
        def again(x: Tensor) -> Any:
            return checkpoint(forward, x, use_reentrant=reentrant)

        # A reentrant checkpoint gives gradients to nothing but its inputs' owners.
        if reentrant and not rest[0].requires_grad:
            return _backward(case, forward, *rest)
        if reentrant:
            return _grads_by_backward(again, *rest)
        return _backward(case, again, *rest)

    return run


def _grads_by_backward(
    forward: Any, x: Tensor, extra: Any, vectors: dict[str, Any], dy: Tensor
) -> Found:
    y, rest = parts_of(forward(x))
    leaves = {"x": x, "residual": extra, **vectors}
    torch.autograd.backward([y, *rest.values()], [dy] * (1 + len(rest)))
    found: Found = {}
    for name, leaf in leaves.items():
        if leaf is not None and leaf.grad is not None:
            found[name], leaf.grad = leaf.grad, None
    return {"y": y, **rest, **found}


def _vjp(case: Any, forward: Any, x: Tensor, _e: Any, _v: Any, dy: Tensor) -> Found:
    y, back = torch.func.vjp(forward, x.detach())
    y, rest = parts_of(y)
    (dx,) = back((dy, *([dy] * len(rest))) if rest else dy)
    return {"y": y, **rest, "x": dx}


def _jvp(case: Any, forward: Any, x: Tensor, _e: Any, _v: Any, dy: Tensor) -> Found:
    """⟨dy, J·t⟩ for a tangent t is judged as ⟨Jᵀdy, t⟩."""
    g = torch.Generator().manual_seed(case.seed + 4)
    t = torch.randn(x.shape, generator=g).to(x.dtype)
    if 0 in x.stride() or x.is_neg():
        # torch makes a tangent laid like its primal, and writes into it.
        x = x.clone(memory_format=torch.contiguous_format)
    y, moved = torch.func.jvp(forward, (x.detach(),), (t,))
    y, rest = parts_of(y)
    moved = parts_of(moved)[0]
    return {"y": y, **rest, "moved": moved, "tangent": t}


def _vmap(case: Any, forward: Any, x: Tensor, extra: Any, _v: Any, dy: Tensor) -> Found:
    y, rest = parts_of(torch.vmap(forward)(torch.stack([x.detach(), x.detach()])))
    # Both are judged by the truth: a vector unit and the rest of a row round apart.
    one = case.seed % 2
    return {"y": y[one], **{k: v[one] for k, v in rest.items()}}


WAYS: dict[str, Way] = {
    "plain": _backward,
    "deterministic": _with(normkit.deterministic),
    "reference": _with(lambda: normkit.backend("reference")),
    "checkpoint": _checkpointed(False),
    "reentrant": _checkpointed(True),
    "less memory": lambda *given: _backward(*given, block=normkit.less_memory),
    "no grad": _without_graph(torch.no_grad),
    "inference": _without_graph(torch.inference_mode),
    "vjp": _vjp,
    "jvp": _jvp,
    "vmap": _vmap,
    "graph of backward": lambda *given: _backward(*given, twice=True),
}
