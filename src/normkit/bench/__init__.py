"""Measurements of normkit beside torch.nn: how exact, and how fast."""

from normkit.bench.numerics import Numerics, numerics
from normkit.bench.speed import Speed, speed

__all__ = ["Numerics", "Speed", "numerics", "speed"]
