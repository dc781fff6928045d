"""Measurements of normkit beside torch.nn: how exact, and how fast."""

from normkit.bench.numerics import Numerics, numerics

__all__ = ["Numerics", "numerics"]
