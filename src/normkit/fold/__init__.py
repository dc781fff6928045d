"""Fold batch norms into the weights around them; prove it; say why others stay.

The way through: `capture` runs the model and reads who feeds whom into a `trace`
(`lowering` says what each call is), `solve` and `beside` look for a change of gauge
(`gauge`, `graph`) that every node can bear (`nodes`, on `algebra`), `plan` tries the
ways in turn, `rewrite` edits the module, `proof` compares, `ledger` tells. `onnx` is a
second front end; it alone loads onnx, when it is called.
"""

from normkit.fold.ledger import FoldEntry, FoldLedger
from normkit.fold.onnx import fold_onnx
from normkit.fold.torch.module import fold

__all__ = ["FoldEntry", "FoldLedger", "fold", "fold_onnx"]
