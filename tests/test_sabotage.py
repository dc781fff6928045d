"""Every planted fault is caught by the test that is named for it."""

import subprocess
import sys
from pathlib import Path

import pytest

import sabotage

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(sabotage.FAULTS))
def test_the_fault_is_caught(name: str) -> None:
    fault = sabotage.FAULTS[name]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-p", "no:xdist", "--tb=line", "--sabotage", name),
            *(arg for test in fault.caught_by.split() for arg in [test]),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # 1: tests ran and failed. 0 is a survivor; 2-5 a broken sabotage.
    assert done.returncode == 1, (
        f"{name} is not caught by {fault.caught_by} (exit {done.returncode})\n"
        + done.stdout[-2000:]
        + done.stderr[-2000:]
    )
    # A failing test, not a test that could not be set up.
    assert " failed" in done.stdout, done.stdout[-2000:]
    assert " error" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
