"""Every fault of the doctor's checks, planted in five networks, and its clean twin.

Each family registers its own: `statistics` (running statistics that are wrong),
`batches` (what a batch holds), `loops` (how the training goes), `layers` (weights and
layers), `ends` (input and output), `transformers` (blocks, attention, spikes).
"""

from doctor.faults import batches, ends, layers, loops, statistics, transformers
from doctor.faults.planting import ALL_NETS, FAULTS, WITHOUT, Fault, Program, told

__all__ = [
    "ALL_NETS",
    "FAULTS",
    "WITHOUT",
    "Fault",
    "Program",
    "batches",
    "ends",
    "layers",
    "loops",
    "statistics",
    "told",
    "transformers",
]
