"""Write docs/guide/checks.md from the checks themselves.

python docs/checks.py            writes the page
python docs/checks.py --check    exit code 1 if it is not up to date
"""

import inspect
import re
import sys
from pathlib import Path

from normkit.doctor.checks import CHECKS

PAGE = Path(__file__).parent / "guide" / "checks.md"

HEAD = """\
<!-- Written by `python docs/checks.py`; do not edit. -->
# The doctor's checks

The thresholds are at the top of each file in `src/normkit/doctor/checks`, each with the
measurement behind it. Every check has a planted fault and a healthy twin in
tests/doctor/faults.

| check | name | what is wrong | file |
| --- | --- | --- | --- |
"""


def page() -> str:
    """Return the page as it should be."""
    rows = []
    for id_, check in CHECKS.items():
        first = (inspect.getdoc(check) or "").split("\n\n")[0].replace("\n", " ")
        what = re.sub(rf"^Check {id_}: ", "", first).rstrip(".")
        file = check.__module__.rpartition(".")[2]
        name = check.__name__.replace("_", " ")
        rows.append(f"| {id_} | {name} | {what} | {file}.py |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is not up to date; run python docs/checks.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")
        print(PAGE)
