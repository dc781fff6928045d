"""Normalization for PyTorch: exact while training, explained, gone at inference."""

from normkit import functional
from normkit.affine import Affine
from normkit.kernels import backend, explain
from normkit.moments import Moments, moments

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Moments",
    "__version__",
    "backend",
    "explain",
    "functional",
    "moments",
]
