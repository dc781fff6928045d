"""Change the normalizations of a whole model for others, in place, and back.

targets.py          the class that each layer is converted to, or a reason against it
detect.py           norms that write their formula out, known by what they compute
class_swap.py       the exchange of one layer: the same object gets another class
group_norm_fit.py   group norm fitted to the outputs of batch norm on data
fused.py            batch norms that compute together with what follows them
run.py              the transaction: all layers or none
conventions.py      momentum, eps and variance as Keras, flax and ONNX define them
"""

from normkit.convert.conventions import settings_from, settings_of
from normkit.convert.report import Conversion, ConversionReport
from normkit.convert.run import convert

__all__ = [
    "Conversion",
    "ConversionReport",
    "convert",
    "settings_from",
    "settings_of",
]
