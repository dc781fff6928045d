"""One model converted, compared with itself before, in float64.

Outputs in eval mode, outputs and gradients of a training step under random cotangents,
and the state after it. Equal is a distance of at most `TOLERANCE`. What needs more said
about it:

    zeros       a bias before a batch norm has the gradient 0, and what is computed is
                rounding alone, of another size each time. Gradients below `ZERO` of
                the largest in both models are left out, and the largest of them kept:
                `[torch's, ours]`.
    rounding    a network may amplify the last digit more than that. Then torch's own
                model is run again with every input and parameter off by its last digit;
                `times_rounding` is our distance over that one, of what is worst: the
                outputs in either mode, or a gradient.
    casts       a forward that asks for float32 rounds to 1e-7 in the original, where
                ours, exchanged, does not. Then both run once more with float64 for
                every float32 that a forward asks for: `in_float64`.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from benchmarks.fold import zoo
from benchmarks.fold.zoo import Case
from torch import Tensor, nn

__all__ = ["TOLERANCE", "measure"]

# Values and gradients of the two models differ by rounding: 1e-9 of the largest.
TOLERANCE = 1e-9
# Of the largest gradient of the model; its own rounding is 1e-16 times the number of
# terms of a sum.
ZERO = 1e-12

_DRAWS_OF_ROUNDING = 2


def measure(chosen: Case) -> dict[str, Any]:
    """Convert one model, and compare it with itself before."""
    import normkit
    from normkit.fold.torch.float64 import InFloat64, to_float64, widen
    from normkit.modeling.pytree import map_tensors
    from normkit.nn import deferral

    deferral.MIN_VALUES = 0  # what is fused is compared at any size
    record: dict[str, Any] = {"name": chosen.name}
    _seed(0)
    with _in_doubles():
        plain = chosen.build()
        zoo.randomise(plain)
        _randomise_others(plain)
        plain = to_float64(plain)
        given, why = None, ""
        for inputs in chosen.inputs:
            given = _enlarged(map_tensors(inputs, widen))
            try:
                _step(copy.deepcopy(plain), given)
                break
            except Exception as error:
                why = f"{type(error).__name__}: {error}"[:200]
        else:
            return record | {"failed": f"run: {why}"}
        ours = copy.deepcopy(plain)
        try:
            report = normkit.convert(
                ours, to="normkit", example_inputs=_example(given), strict=False
            )
        except Exception as error:
            return record | {
                "failed": f"convert: {type(error).__name__}: {error}"[:400]
            }
        record |= {
            "norms": len(report.layers) + len(report.untouched),
            "swapped": len(report.layers),
            "kinds": dict(Counter(layer.after for layer in report.layers)),
            "untouched": dict(report.untouched),
            "not_known": dict(Counter(_unknown(ours))),
            "fused": dict(Counter(report.fused.values())),
            "unfused": dict(Counter(map(_kind, report.unfused.values()))),
            "same_keys": list(ours.state_dict()) == list(plain.state_dict()),
        }
        compared, zeros = _compared(plain, ours, given)
        record |= compared
        if zeros is not None:
            record["zeros"] = zeros
        if max(compared.values()) > TOLERANCE:
            with InFloat64():
                widened, _ = _compared(plain, ours, given)
            if max(widened.values()) <= TOLERANCE:
                record["in_float64"] = max(widened.values())
            else:
                record["times_rounding"] = _times_rounding(plain, ours, given)
        return record


def _randomise_others(model: nn.Module) -> None:
    for module in model.modules():
        if "norm" not in type(module).__name__.lower() or "running_var" in (
            module._buffers
        ):
            continue
        for p in module.parameters(recurse=False):
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.2)


def _unknown(model: nn.Module) -> list[str]:
    """Classes that are called a norm, have parameters, and are none of ours."""
    return [
        type(module).__name__
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        and any(True for _ in module.parameters(recurse=False))
        and not any(c.__module__.startswith("normkit") for c in type(module).__mro__)
    ]


def _kind(reason: str) -> str:
    """Return the reason without the names of layers."""
    for part in (
        "is fused into the other batch norm",
        "readers",
        "no activation and no plain sum",
        "changed in place",
        "returned",
        "times",
        "not called",
        "hooks",
    ):
        if part in reason:
            return part
    return reason


@contextmanager
def _in_doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _seed(seed: int) -> None:
    """Of every generator: some forwards draw from NumPy's or Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # the global one, which they draw from
    random.seed(seed)


def _enlarged(given: Any) -> Any:
    """Four images for two: with two values per channel, batch norm is a sign."""
    if isinstance(given, Tensor):
        return torch.cat([given, given.flip(2, 3) * 0.7])
    return given


def _example(given: Any) -> Any:
    is_detection = isinstance(given, tuple) and isinstance(given[0], list)
    return given[:1] if is_detection else given


def _call(model: nn.Module, given: Any) -> Any:
    if isinstance(given, dict):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


def _step(model: nn.Module, given: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return outputs of a training step and the gradients of random cotangents."""
    from normkit.modeling.pytree import tensors_in

    model.train()
    _seed(7)
    outputs = [t for t in tensors_in(_call(model, given)) if t.requires_grad]
    draw = torch.Generator().manual_seed(3)
    loss = sum((t * torch.randn(t.shape, generator=draw)).sum() for t in outputs)
    assert isinstance(loss, Tensor)
    names = {k: p for k, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*names.values()], allow_unused=True)
    grads = zip(names, found, strict=True)
    return outputs, {k: g for k, g in grads if g is not None}


def _evaluated(model: nn.Module, given: Any) -> Any:
    """Return outputs in eval mode, on inputs other than the example."""
    from normkit.modeling.pytree import map_tensors

    fresh = map_tensors(
        _example(given), lambda t: t * 0.9 if t.is_floating_point() else t
    )
    _seed(7)
    with torch.no_grad():
        return _call(model.eval(), fresh)


def _compared(
    plain: nn.Module, ours: nn.Module, given: Any
) -> tuple[dict[str, float], list[float] | None]:
    """Return the distances, and the largest gradients that are 0 but for rounding."""
    from normkit.fold.equivalence import difference

    found = {"eval": difference(_evaluated(plain, given), _evaluated(ours, given))}
    before, after = copy.deepcopy(plain), copy.deepcopy(ours)
    (y, dy), (z, dz) = _step(before, given), _step(after, given)
    found["train"] = difference(y, z)
    found["gradients"] = max(_distances(dy, dz).values(), default=0.0)
    zeros = _zeros(dy, dz)
    state = after.state_dict()
    pairs = [(v, state[k]) for k, v in before.state_dict().items()]
    found["state"] = max((difference([a], [b]) for a, b in pairs), default=0.0)
    sizes = [[of[k] for k in zeros] for of in (_sizes(dy), _sizes(dz))]
    return found, [max(each) for each in sizes] if zeros else None


def _sizes(grads: dict[str, Tensor]) -> dict[str, float]:
    """Return each parameter's largest gradient, as a share of the largest of all."""
    sizes = {k: float(g.abs().max()) if g.numel() else 0.0 for k, g in grads.items()}
    largest = max(sizes.values(), default=0.0)
    return {k: size / max(largest, 1e-300) for k, size in sizes.items()}


def _zeros(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    mine, theirs = _sizes(found), _sizes(wanted)
    return [k for k in theirs if k in mine and max(mine[k], theirs[k]) <= ZERO]


def _distances(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Return the distance of each parameter's two gradients, relative to the larger.

    Without those that are 0 but for rounding.
    """
    if wanted.keys() != found.keys():
        return {"(not the same parameters)": float("inf")}
    zeros = {*_zeros(wanted, found)}
    return {
        k: float((found[k] - g).abs().max()) / float(g.abs().max().clamp(min=1e-300))
        for k, g in wanted.items()
        if g.numel() and k not in zeros
    }


def _times_rounding(plain: nn.Module, ours: nn.Module, given: Any) -> float:
    """Our distance over that which the last digit makes, of what is worst."""
    from normkit.modeling.pytree import map_tensors

    wanted = _outcome(plain, given)
    moved: dict[str, float] = {}
    for k in range(_DRAWS_OF_ROUNDING):
        draw = torch.Generator().manual_seed(k)
        other = copy.deepcopy(plain)
        with torch.no_grad():
            for p in other.parameters():
                p.copy_(_off_by_a_digit(p, draw))
        changed = map_tensors(given, lambda t, draw=draw: _off_by_a_digit(t, draw))
        for name, distance in _apart(wanted, _outcome(other, changed)).items():
            moved[name] = max(moved.get(name, 0.0), distance)
    far = _apart(wanted, _outcome(ours, given))
    return max(
        (
            distance / max(moved.get(name, 0.0), 1e-300)
            for name, distance in far.items()
            if distance > TOLERANCE
        ),
        default=0.0,
    )


_Outcome = tuple[Any, list[Tensor], dict[str, Tensor]]


def _outcome(model: nn.Module, given: Any) -> _Outcome:
    """Run eval mode, then a training step; leave the model unchanged."""
    return _evaluated(model, given), *_step(copy.deepcopy(model), given)


def _apart(wanted: _Outcome, found: _Outcome) -> dict[str, float]:
    """Return the distance of each gradient by its name, of the outputs by `(mode)`."""
    from normkit.fold.equivalence import difference

    outputs = zip(("(eval)", "(train)"), wanted[:2], found[:2], strict=True)
    distances = {name: difference(one, other) for name, one, other in outputs}
    return distances | _distances(wanted[2], found[2])


def _off_by_a_digit(t: Tensor, draw: torch.Generator) -> Tensor:
    """Every value up or down by its last binary digit."""
    if not t.is_floating_point():
        return t
    up = torch.rand(t.shape, generator=draw) < 0.5
    towards = torch.where(up, torch.inf, -torch.inf).to(t)
    return torch.nextafter(t, towards)
