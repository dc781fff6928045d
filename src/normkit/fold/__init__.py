"""Fold batch norms into the weights around them; prove it; say why others stay.

The way through: `capture` runs the model and reads who feeds whom (`lowering` says
what each call is), `solve` looks for a change of gauge (`gauge`, `graph`) that every
node can bear (`nodes`, on `algebra`), `rewrite` edits the module, `proof` compares,
`ledger` tells.
"""

from normkit.fold.ledger import FoldEntry, FoldLedger
from normkit.fold.modules import fold

__all__ = ["FoldEntry", "FoldLedger", "fold"]
