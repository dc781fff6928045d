"""Kernels: one contract, several backends, one choice.

`primitives` is the contract, `reference` its definition in plain torch, `choose` says
which backend runs a case.
"""

from normkit.kernels.choose import (
    Explanation,
    available_backends,
    backend,
    choose,
    explain,
)
from normkit.kernels.deterministic import deterministic
from normkit.kernels.primitives import Backend

__all__ = [
    "Backend",
    "Explanation",
    "available_backends",
    "backend",
    "choose",
    "deterministic",
    "explain",
]
