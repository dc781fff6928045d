"""Large outputs ask for large pages, where the system leaves that to the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from normkit.kernels.cpu.loading import library, why_absent

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = [
    pytest.mark.skipif(library() is None, reason=why_absent() or "built"),
    pytest.mark.skipif(
        not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
        reason="this system does not leave large pages to the program",
    ),
]
# Whether the mapping that holds the output has the flag of madvise(MADV_HUGEPAGE).
PROGRAM = """
import torch, normkit
x = torch.randn(8, 3, 700, 700)
y = normkit.functional.batch_norm(x, None, None, training=True)
middle, is_there = y.data_ptr() + y.nbytes // 2, False
for line in open("/proc/self/smaps"):
    ends = line.split()[0].split("-")
    if len(ends) == 2:
        is_there = int(ends[0], 16) <= middle < int(ends[1], 16)
    elif is_there and line.startswith("VmFlags"):
        print("hg" in line.split())
"""


@pytest.mark.parametrize(("setting", "expected"), [("1", "True"), ("0", "False")])
def test_an_output_of_megabytes_is_on_large_pages_if_wanted(setting, expected) -> None:
    variables = os.environ | {"NORMKIT_LARGE_PAGES": setting}
    variables.pop("THP_MEM_ALLOC_ENABLE", None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [expected]
