"""Claims about batch norm as experiments that print verdicts.

    study → trials (one per seed, arms paired) → record → verdicts → docs

`run` measures and writes records; `write_report` writes their pages. The studies are
the files `sNN_….py`, each with the rule of its verdicts in `evaluate`, in the words of
`verdict`; `all_studies` lists them, `find` returns one by its id, and
`normkit study list` prints the question of each.
"""

from normkit.studies.claims import CLAIMS, Claim
from normkit.studies.interval import Interval, median_interval
from normkit.studies.record import Record
from normkit.studies.registry import all_studies, find
from normkit.studies.report import write_report
from normkit.studies.runner import data_folder, run
from normkit.studies.study import Scale, Study, Trial
from normkit.studies.verdict import Part, Verdict

__all__ = [
    "CLAIMS",
    "Claim",
    "Interval",
    "Part",
    "Record",
    "Scale",
    "Study",
    "Trial",
    "Verdict",
    "all_studies",
    "data_folder",
    "find",
    "median_interval",
    "run",
    "write_report",
]
