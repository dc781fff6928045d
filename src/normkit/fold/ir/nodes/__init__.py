"""The kinds of nodes, each with the rule by which a gauge crosses it."""

from normkit.fold.ir.nodes.arithmetic import Add, Gate, Scale
from normkit.fold.ir.nodes.commuting import Commuting
from normkit.fold.ir.nodes.linear import Embedding, Linear
from normkit.fold.ir.nodes.matmul import MatMul
from normkit.fold.ir.nodes.move import Move
from normkit.fold.ir.nodes.norms import BatchNorm, NormAffine
from normkit.fold.ir.nodes.parameters import Parameter
from normkit.fold.ir.nodes.rules import Opaque

__all__ = [
    "Add",
    "BatchNorm",
    "Commuting",
    "Embedding",
    "Gate",
    "Linear",
    "MatMul",
    "Move",
    "NormAffine",
    "Opaque",
    "Parameter",
    "Scale",
]
