"""The operations of the autograd graph around a model's output.

A functional sigmoid and a loss in a lambda show here, as modules and names do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from normkit.doctor.examination.targets import sum_to_one
from normkit.doctor.probes.functions import VIEWS

__all__ = [
    "are_cosines",
    "class_weights",
    "compared_values",
    "has_distributions",
    "last_operation",
    "operations_between",
    "softmax_dim",
    "squashed_by",
]

# Losses that take logits, and functions that do not give any.
_OF_LOGITS = frozenset(["LogSoftmax", "BinaryCrossEntropyWithLogits"])
_SQUASHING = frozenset(["Softmax", "Sigmoid", "Hardsigmoid", "Tanh", "Relu"])
# A loss has a dozen operations; one that does not use the output would lead through
# the whole model.
MAX_NODES = 64


def last_operation(output: Tensor) -> str:
    """Return the operation that gave the values of `output`, such as "Sigmoid".

    "" where no graph was recorded.
    """
    node: Any = output.grad_fn
    while node is not None and _name(node) in VIEWS:
        node = next(iter(_parents(node)), None)
    return "" if node is None else _name(node)


def softmax_dim(output: Tensor) -> int | None:
    """Return the dimension of the softmax that gives the values of `output`.

    None where no softmax does, or where a view lies between.
    """
    node: Any = output.grad_fn
    if node is None or _name(node) not in ("Softmax", "LogSoftmax"):
        return None
    # A negative one is read as an unsigned number.
    dim = int(node._saved_dim)
    return dim if dim < output.dim() else dim - (1 << 64) + output.dim()


def operations_between(loss: Tensor, output: Tensor) -> frozenset[str]:
    """Return the operations that make `loss` out of `output`, such as "NllLoss".

    Empty where the graph does not lead from one to the other.
    """
    return frozenset(map(_name, _nodes_between(loss, output)))


def compared_values(loss: Tensor, output: Tensor) -> tuple[Tensor | None, ...]:
    """Return what a loss compares `output` with: values, and those of 0 to 1.

    As it made them; the second are those of all binary cross-entropies. None for class
    numbers, and where not one operation keeps values.
    """
    kept = [
        (_name(node).startswith("BinaryCrossEntropy"), values.detach())
        for node in _nodes_between(loss, output)
        if isinstance(values := getattr(node, "_saved_target", None), Tensor)
        and values.is_floating_point()
        and values.numel()
    ]
    others = [values for is_binary, values in kept if not is_binary]
    binary = [values.flatten() for is_binary, values in kept if is_binary]
    return (
        others[0] if len(others) == 1 else None,
        torch.cat(binary) if binary else None,
    )


def class_weights(loss: Tensor, output: Tensor) -> tuple[float, ...]:
    """Return the weight of each class in a cross entropy; () where it has none.

    Of a binary one those of zeros and of ones.
    """
    for node in _nodes_between(loss, output):
        weights = getattr(node, "_saved_weight", None)
        if _name(node) in ("NllLoss", "NllLoss2D") and isinstance(weights, Tensor):
            return tuple(map(float, weights.detach().flatten()))
        of_ones = getattr(node, "_saved_pos_weight", None)
        if isinstance(of_ones, Tensor) and of_ones.numel() == 1:
            return 1.0, float(of_ones)
    return ()


def has_distributions(loss: Tensor, output: Tensor) -> bool:
    """Return True where log-probabilities are weighted by rows that sum to one.

    As `cross_entropy(scores, counts / counts.sum(1, keepdim=True))`, and ListNet.
    """
    for node in _nodes_between(loss, output):
        behind = [_name(parent) for parent in _parents(node)]
        if _name(node) != "Mul" or "LogSoftmax" not in behind:
            continue
        for kept in ("_saved_self", "_saved_other"):
            weights = getattr(node, kept, None)
            if isinstance(weights, Tensor) and weights.dim() > 1:
                rows = weights.detach().float().flatten(1)
                if sum_to_one(rows):
                    return True
    return False


def are_cosines(output: Tensor) -> bool:
    """Return True for products of vectors that were divided, as by their norms.

    Perhaps with a factor that is a number. What else is divided is not excluded: the
    values tell.
    """
    node = _before_factors(output.grad_fn)
    if node is not None and _name(node) == "Sum":
        node = _before_factors(next(iter(_parents(node)), None), products=False)
    if node is None or _name(node) not in ("Mm", "Bmm", "Mul"):
        return False
    given = [_before_factors(parent) for parent in _parents(node)]
    return len(given) == 2 and all(n is not None and _name(n) == "Div" for n in given)


def _before_factors(node: Any, *, products: bool = True) -> Any:
    """Return the node behind views, and behind factors that are numbers."""
    while node is not None:
        parents = list(_parents(node))
        is_factor = products and _name(node) in ("Mul", "Div") and len(parents) == 1
        if _name(node) not in VIEWS and not is_factor:
            return node
        node = next(iter(parents), None)
    return None


def squashed_by(loss: Tensor, output: Tensor) -> str:
    """Return the function inside the loss whose values it takes for logits.

    Such as "Softmax" of `cross_entropy(softmax(output), targets)`; "" for none.
    """
    between = _nodes_between(loss, output)
    for node in between:
        if _name(node) not in _OF_LOGITS:
            continue
        given: Any = node
        while given in between:
            given = next(iter(_parents(given)), None)
            if given is None or _name(given) not in VIEWS:
                break
        if given in between and _name(given) in _SQUASHING:
            return _name(given)
    return ""


def _nodes_between(loss: Tensor, output: Tensor) -> set[Any]:
    """Return the nodes on the ways from `loss` to the one that gives `output`.

    Not those of other outputs, as in a loss of several heads.
    """
    end: Any = output.grad_fn
    if end is None or loss.grad_fn is None or loss.grad_fn is end:
        return set()
    children: dict[Any, set[Any]] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting and len(seen) < MAX_NODES:
        node = waiting.pop(0)
        if node in seen or node is end:
            continue
        seen.add(node)
        for parent in _parents(node):
            children.setdefault(parent, set()).add(node)
            waiting.append(parent)
    found: set[Any] = set()
    waiting = list(children.get(end, ()))
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += children.get(node, ())
    return found


def _name(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _parents(node: Any) -> Iterator[Any]:
    return (parent for parent, _ in node.next_functions if parent is not None)
