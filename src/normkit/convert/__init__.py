"""Change the normalizations of a whole model for others, in place, and back.

kinds.py         what each layer becomes, or the reason why it cannot
recognised.py    norms that write their formula out, known by what they compute
becoming.py      one layer changed for another, as the same object
fused.py         batch norms that compute together with what follows them
run.py           the transaction: all layers or none
matching.py      group norm whose outputs match batch norm's on data
conventions.py   momentum, eps and variance as Keras, flax and ONNX mean them
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
