"""The error of a file that is read well and is no sound model."""

from normkit.errors import FoldError

__all__ = ["RejectedModelError"]


class RejectedModelError(FoldError):
    """`onnx.checker` does not accept a model."""
