"""Audit a pair of models: are they the same function, and where do they part.

`verify` runs two models on the same inputs, `torch_side` and `onnx_side` record what
each computes (`recording`), `parting` finds the first place where the records differ,
`equivalence` is the verdict and `page` its report.
"""

from normkit.audit.equivalence import Equivalence
from normkit.audit.verify import verify

__all__ = ["Equivalence", "verify"]
