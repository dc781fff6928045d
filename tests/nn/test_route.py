"""The fixture `route` takes four ways, or its tests would be one test four times."""

from typing import Any

import pytest
import torch

import normkit
from normkit.functional import engine, signature
from normkit.kernels import reference
from normkit.kernels.cpu.call import NativeCall
from normkit.kernels.cpu.loading import library

OWN = "a native call" if library() is not None else "sums"
TAKEN = {
    "kernels": {OWN},
    "reference": {"sums"},
    "fixed order": {"pairwise sums"},
    "formula": {"the formula"},
}


def test_each_route_is_another(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: set[str] = set()
    signature.calls.clear()
    for owner, name, called in (
        (NativeCall, "forward", "a native call"),
        (reference, "plain_sum", "sums"),
        (reference, "pairwise_sum", "pairwise sums"),
        (engine.differentiable, "normalize", "the formula"),
    ):
        honest = getattr(owner, name)

        def noting(
            *given: Any, honest: Any = honest, called: str = called, **named: Any
        ) -> Any:
            taken.add(called)
            return honest(*given, **named)

        monkeypatch.setattr(owner, name, noting)
    normkit.nn.BatchNorm2d(3)(torch.randn(4, 3, 5, 5))
    assert taken == TAKEN[route]
