"""Population statistics of every layer, as a transaction.

    report = normkit.calibrate(model, loader)
    print(report.to_text())
    report.undo(model)

`layers` finds what to measure, `passes` measures, `estimators` hold the three formulas,
`transaction` puts the model back, `run` ties them together.
"""

from normkit.calibrate.passes import SkippedBatch
from normkit.calibrate.report import CalibrationReport, LayerCalibration
from normkit.calibrate.run import calibrate
from normkit.calibrate.temporary_statistics import adapted, averaged
from normkit.modeling.atomic_file import save_atomically

__all__ = [
    "CalibrationReport",
    "LayerCalibration",
    "SkippedBatch",
    "adapted",
    "averaged",
    "calibrate",
    "save_atomically",
]
