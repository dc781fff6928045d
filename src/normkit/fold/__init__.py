"""Fold batch norms into the weights around them, prove it, say why others stay.

`ir` holds the graph, `search` looks for folds, `torch` and `onnx` are the front ends,
`ledger` is the record; README.md tells the way of a fold through the files.
"""

from normkit.fold.ledger import FoldEntry, FoldLedger
from normkit.fold.onnx import fold_onnx
from normkit.fold.torch.module import fold

__all__ = ["FoldEntry", "FoldLedger", "fold", "fold_onnx"]
