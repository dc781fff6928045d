"""Every fault that the C++ kernels hold is caught by a test of theirs.

A library built with NORMKIT_FAULTS makes the mistake that NORMKIT_FAULT names; the one
that is installed holds none of them, not even their names.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from normkit.kernels.cpu import loading

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "src/normkit/kernels/cpu/native"
PLANTED = sorted(
    {
        name
        for file in NATIVE.iterdir()
        for name in re.findall(r'planted\("(\w+)"\)', file.read_text())
    }
)
FUSED = "tests/kernels/test_cpu_fused.py"
SIGNATURES = "tests/kernels/test_signatures.py"
# Where not one of FUSED catches it.
CAUGHT_BY = {
    "a_nan_moves_the_running_statistics": "tests/nn/test_batch_norm.py -k non_finite",
    "every_chunk_of_runs_begins_anew": "tests/kernels/test_cpu.py -k order_of_memory",
    "hidden_rows_are_normalized": "tests/functional/test_row_masks.py",
    "no_values_are_negated": SIGNATURES,
    "signatures_leave_out_running": SIGNATURES,
    "signatures_leave_out_strides": SIGNATURES,
    "no_mean_of_ranks_is_far": "tests/sync/test_short_way.py -k far_from_zero",
    "the_running_variance_is_biased": "tests/nn/test_batch_norm.py -k running",
    "the_sum_forgets_the_residual": "tests/functional/test_sum_norm.py",
    "what_torch_saved_is_always_exact": "tests/functional/test_routes.py",
}
TESTS_FAILED = 1


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with all of them, for the instruction set that every machine has."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("faulty")
    options = ["-DNORMKIT_FAULTS=ON", "-DNORMKIT_ISAS=baseline"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--parallel", "2"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return build / "_native.so"


def run_with(library: Path, fault: str, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line"]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", *tests.split()]
    variables = {"NORMKIT_CPU_LIBRARY": str(library), "NORMKIT_FAULT": fault}
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def test_the_installed_library_holds_no_fault() -> None:
    path = loading._path()
    if path is None or os.environ.get("NORMKIT_CPU_LIBRARY"):
        pytest.skip("the library in use is not the installed one")
    code = path.read_bytes()
    assert PLANTED
    assert b"normkit_forward" in code
    for name in ("NORMKIT_FAULT", *PLANTED):
        assert name.encode() not in code, name


@pytest.mark.slow
def test_without_a_fault_the_faulty_library_passes(faulty: Path) -> None:
    for tests in {FUSED, *CAUGHT_BY.values()}:
        run = run_with(faulty, "none", tests)
        assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_the_fault_is_caught(faulty: Path, fault: str) -> None:
    run = run_with(faulty, fault, CAUGHT_BY.get(fault, FUSED))
    assert run.returncode == TESTS_FAILED, f"{fault} survives\n{run.stdout[-3000:]}"
    assert " error" not in run.stdout.splitlines()[-1], run.stdout[-3000:]
