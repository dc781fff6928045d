"""Change the normalizations of a whole model for others, in place, and back.

kinds.py         what each layer becomes, or the reason why it cannot
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
