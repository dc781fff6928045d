"""A fifteenth set of bugs, written by one who had not read the doctor's code.

Of the checks the author knew ids and titles; the doctor had run on none of these
programs when they were committed, with what is expected of it. Each bug costs
something. Measured in eval mode, on data not trained on, with the seeds 0, 1 and 2:

| program | measured by | with the bug | its twin |
| --- | --- | --- | --- |
| weights in a file | accuracy | 0.32, 0.88, 0.40 | 1.00, 1.00, 0.99 |
| folder of validation images | accuracy | 0.90, 0.90, 0.91 | 0.98, 0.99, 0.97 |
| second head on a frozen trunk | accuracy | 0.92, 0.93, 0.96 | 0.99, 0.99, 0.99 |
| average for the release | accuracy | 0.15, 0.58, 0.29 | 1.00, 1.00, 1.00 |
| ported from keras | accuracy | 0.81, 0.90, 0.95 | 0.99, 0.99, 0.98 |
| denoiser with slow statistics | squared error | 0.15, 0.14, 0.14 | 0.03, 0.03, 0.03 |
| three hospitals | accuracy | 0.20, 0.17, 0.19 | 0.96, 0.94, 0.96 |
| cells that fill the memory | overlap of masks | 0.18, 0.17, 0.17 | 0.64, 0.65, 0.58 |
| recordings of any length | accuracy | 0.81, 0.82, 0.80 | 0.86, 0.87, 0.86 |
| plant with four sensors | accuracy | 0.27, 0.27, 0.27 | 0.75, 0.93, 0.94 |
| token for each column | squared error | 1.10, 1.05, 1.03 | 0.09, 0.12, 0.08 |
| values with dropout | squared error | 0.21, 0.21, 0.20 | 0.11, 0.11, 0.11 |
| cells with a norm for all | overlap of masks | 0.30, 0.02, 0.43 | 0.67, 0.62, 0.63 |
| weights as in the tutorial | accuracy | 0.53, 0.64, 0.60 | 0.88, 0.91, 0.94 |
| decay of a recipe | accuracy | 0.55, 0.47, 0.64 | 0.97, 0.99, 0.98 |
| transformer in bfloat16 | accuracy | 0.33, 0.21, 0.20 | 0.85, 0.85, 0.87 |
| yield of a plant | squared error | 0.97, 0.99, 1.00 | 0.07, 0.07, 0.08 |
| digits with a schedule | accuracy | 0.61, 0.52, 0.71 | 0.99, 0.99, 0.98 |
| new classes for an old network | accuracy | 0.12, 0.11, 0.07 | 0.99, 0.98, 0.98 |
| ring of eight | energy distance | 2.22, 2.40, 1.64 | 0.01, 0.01, 0.02 |
"""

from __future__ import annotations

import fifteenth_loops  # noqa: F401 - these enter their programs in BUGS
import fifteenth_modes  # noqa: F401
import fifteenth_places  # noqa: F401
import fifteenth_scales  # noqa: F401
import fifteenth_statistics  # noqa: F401

__all__ = ["FIRST_SIGHT"]

# The watch of recordings_of_any_length raised an error; the alarm of its twin is that
# of the doctor which had this mended.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "yield_of_a_plant": (("D34",), ()),
    "digits_with_a_schedule": (("D27",), ()),
    "new_classes_for_an_old_network": (("D27", "D34"), ()),
    "ring_of_eight": (("D32", "D03", "D01", "D08", "D02"), ()),
    "weights_in_a_file": (("D32", "D03", "D01", "D02"), ()),
    "folder_of_validation_images": (("D09", "D01", "D02"), ()),
    "second_head_on_a_frozen_trunk": (("D07", "D01", "D27", "D02"), ("D27",)),
    "average_for_the_release": (("D32", "D03", "D01", "D02"), ()),
    "recordings_of_any_length": ((), ("D05",)),
    "plant_with_four_sensors": (("D34",), ()),
    "token_for_each_column": (("D29", "D34"), ()),
    "values_with_dropout": (("D11",), ()),
    "cells_with_a_norm_for_all": (("D33", "D02"), ()),
    "weights_as_in_the_tutorial": (("D19", "D16"), ()),
    "decay_of_a_recipe": (("D14",), ()),
    "transformer_in_bfloat16": (("D27",), ()),
    "ported_from_keras": (("D05", "D04", "D02"), ("D05",)),
    "denoiser_with_slow_statistics": (("D04", "D01", "D03", "D02"), ()),
    "three_hospitals": (("D01", "D02"), ()),
    "cells_that_fill_the_memory": (("D05", "D15"), ()),
}
