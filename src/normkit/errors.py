"""Exceptions of normkit.

Each message says what arrived, what is required and what to do.
Every class derives from `NormkitError` and from the builtin type that torch raises
in the same place, so that code written against `torch.nn` keeps catching it.
"""

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "DependencyError",
    "DerivativeError",
    "DtypeError",
    "FoldError",
    "KernelError",
    "NormkitError",
    "RanksError",
    "ShapeError",
    "TargetError",
]


class NormkitError(Exception):
    """Base of every error that normkit raises on purpose."""


class ArgumentError(NormkitError, ValueError):
    """An argument whose value cannot be used."""


class ShapeError(NormkitError, RuntimeError):
    """Tensors whose sizes do not fit together; torch raises RuntimeError there."""


class DtypeError(NormkitError, NotImplementedError):
    """A dtype that the operation is not defined for (torch: NotImplementedError)."""


class KernelError(NormkitError, RuntimeError):
    """A backend that was asked for by name and cannot run this case."""


class DerivativeError(NormkitError, RuntimeError):
    """A derivative that is not defined, or that was given up for memory."""


class FoldError(NormkitError, RuntimeError):
    """A fold that cannot be done on the model as given."""


class CalibrationError(NormkitError, RuntimeError):
    """A calibration that was undone; the model is as it was before."""


class RanksError(NormkitError, RuntimeError):
    """Ranks that do not do the same: a collective of a layer failed or would mix."""


class DependencyError(NormkitError, ImportError):
    """A package that only some tasks need and that is not installed."""


class TargetError(NormkitError, ValueError):
    """A command-line target that does not name a usable factory."""
