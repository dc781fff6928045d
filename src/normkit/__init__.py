"""Normalization for PyTorch: exact while training, explained, gone at inference."""

from normkit import batches, functional, nn
from normkit.affine import Affine
from normkit.audit import Equivalence, verify
from normkit.calibrate import CalibrationReport, calibrate
from normkit.convert import ConversionReport, convert
from normkit.doctor import Diagnosis, GapExplanation, diagnose, explain_gap, watch
from normkit.fold import FoldLedger, fold, fold_onnx
from normkit.functional.explain import explain
from normkit.functional.memory.less_memory import less_memory
from normkit.functional.memory.saved_memory import saved_memory
from normkit.init import InitReport, initialize
from normkit.kernels import backend, deterministic
from normkit.moments import Moments, moments
from normkit.version import __version__

__all__ = [
    "Affine",
    "CalibrationReport",
    "ConversionReport",
    "Diagnosis",
    "Equivalence",
    "FoldLedger",
    "GapExplanation",
    "InitReport",
    "Moments",
    "__version__",
    "backend",
    "batches",
    "calibrate",
    "convert",
    "deterministic",
    "diagnose",
    "explain",
    "explain_gap",
    "fold",
    "fold_onnx",
    "functional",
    "initialize",
    "less_memory",
    "moments",
    "nn",
    "saved_memory",
    "verify",
    "watch",
]
