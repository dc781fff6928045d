"""The kinds of nodes, each with the rule by which a gauge crosses it."""

from normkit.fold.ir.nodes.arithmetic import Add, Gate, Quotient, Scale
from normkit.fold.ir.nodes.batch_norm import BatchNorm
from normkit.fold.ir.nodes.commuting import Commuting
from normkit.fold.ir.nodes.experts import Experts, Rows
from normkit.fold.ir.nodes.linear import Embedding, Linear
from normkit.fold.ir.nodes.matmul import MatMul
from normkit.fold.ir.nodes.move import Move
from normkit.fold.ir.nodes.norm_affine import NormAffine
from normkit.fold.ir.nodes.parameters import Parameter
from normkit.fold.ir.nodes.quantized import Quantized
from normkit.fold.ir.nodes.rules import Opaque

__all__ = [
    "Add",
    "BatchNorm",
    "Commuting",
    "Embedding",
    "Experts",
    "Gate",
    "Linear",
    "MatMul",
    "Move",
    "NormAffine",
    "Opaque",
    "Parameter",
    "Quantized",
    "Quotient",
    "Rows",
    "Scale",
]
