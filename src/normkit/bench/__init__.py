"""Benchmarks of normkit against torch.nn: accuracy and speed."""

from normkit.bench.numerics import Numerics, numerics
from normkit.bench.speed import Speed, speed

__all__ = ["Numerics", "Speed", "numerics", "speed"]
