"""The GPU kernels without a GPU: interpreted, compiled ahead of time; and on one."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import normkit
from normkit.errors import KernelError
from normkit.kernels.choose import backend_named
from normkit.kernels.gpu import config

TESTS = Path(__file__).parents[1]
TRITON = find_spec("triton") is not None
# Its interpreter is patched, and its compiler called, as those of this version.
needs_triton = pytest.mark.skipif(
    not TRITON or tuple(map(int, version("triton").split(".")[:2])) < (3, 6),
    reason="triton 3.6 or newer is not installed",
)

# The contract's own tests on layouts that reach every kernel.
CONTRACT = (
    "gpu and offset and float32 and (nchw- or channels-last- or rows-t or groups)"
)


def run(*arguments: str, interpreted: bool = True) -> None:
    """Pytest in a process of its own, where Triton interprets or compiles."""
    plugin = ("-p", "kernels.interpreted") if interpreted else ()
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *plugin, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout[-500:]


@needs_triton
def test_the_layers_agree_with_float64_in_the_interpreter() -> None:
    run("tests/kernels/gpu_suite.py")


@needs_triton
def test_the_contract_holds_in_the_interpreter() -> None:
    run("tests/kernels/test_agree.py", "-k", CONTRACT)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_in_the_interpreter() -> None:
    run("--run-slow", "tests/kernels/gpu_suite.py")
    run("tests/kernels/test_agree.py", "-k", "gpu")
    run("tests/functional/test_gradients.py", "tests/functional/test_contract.py")


@pytest.mark.gpu
@needs_triton
@pytest.mark.timeout(1800)
def test_the_layers_agree_with_float64_on_the_device() -> None:
    run("--run-slow", "tests/kernels/gpu_suite.py", interpreted=False)


def compiled(architecture: int, *plans: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "kernels.compiled", str(architecture), *plans],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# Registers per thread. 65536 of them make 2 programs of 8 warps at 128, 4 of 4 warps
# at 128, and 1 of 16 warps.
CEILINGS = {
    "statistics_kernel": 104,
    "sums_kernel": 128,
    "apply_kernel": 104,
    "apply_grads_kernel": 128,
    "rows_forward_kernel": 104,
    "rows_backward_kernel": 128,
}
# The exact gelu of backward takes more: 3 programs of 4 warps still fit, and on
# Blackwell, where `sums` takes 155 registers and 128 elsewhere, 1 program of 8.
COSTLY = {
    ("batch-norm-gelu", "apply_grads_kernel"): 168,
    ("batch-norm-gelu", "sums_kernel"): 160,
}


FENCED = "st.global bar.sync atom.global.gpu.acq_rel.add.u32 bar.sync"


def check_code(found: list[dict]) -> None:
    for launch in found:
        name = f"{launch['plan']} {launch['kernel']} sm_{launch['architecture']}"
        ceiling = COSTLY.get((launch["plan"], launch["kernel"]))
        assert launch["spills"] == launch["local_bytes"] == 0, name
        assert launch["registers"] <= (ceiling or CEILINGS[launch["kernel"]]), name
        # The writes of all threads come before the release, the reads after the
        # acquire: a barrier stands on either side.
        for around in launch["tickets"]:
            assert around == FENCED, (name, around)
        if "odd" in launch["plan"]:
            continue
        # Tensors as large as x travel 16 bytes at a time; 2 bytes at a time only a
        # pilot's samples do.
        assert launch["loads"].get("128", 0) >= 2, (name, launch["loads"])
        assert launch["loads"].get("16", 0) <= 1, (name, launch["loads"])
        assert "16" not in launch["stores"], (name, launch["stores"])


@needs_triton
def test_hopper_code_has_no_spills_and_loads_16_bytes() -> None:
    check_code(compiled(90, "batch-norm", "batch-norm-nchw", "rows-4096"))


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all_code_has_no_spills_and_loads_16_bytes(architecture: int) -> None:
    check_code(compiled(architecture))


def test_a_tensor_on_the_cpu_is_refused_with_the_reason() -> None:
    explanation = normkit.explain(torch.zeros(2, 3, 4))
    assert "x is on cpu, it needs a CUDA device" in explanation.reasons["gpu"]
    with normkit.backend("gpu"), pytest.raises(KernelError, match="x is on cpu"):
        normkit.functional.layer_norm(torch.zeros(2, 3), (3,))


def test_reasons_name_what_the_kernels_do_not_run() -> None:
    kernels = backend_named("gpu")
    reasons = kernels.reasons_against(torch.zeros(2, 6, dtype=torch.float64), (0,))
    assert any("torch.float64" in reason for reason in reasons)
    reasons = kernels.reasons_against(torch.zeros(2, 6)[:, ::2], (0,))
    assert any("gaps" in reason for reason in reasons)


@pytest.mark.parametrize("width", [1, 7, 49, 196, 784, 3136, 5000])
def test_a_piece_wastes_little(width: int) -> None:
    piece = config.piece_of(width)
    assert piece % 8 == 0
    waste = -(-width // piece) * piece / width - 1
    assert waste <= 1 / 16 or piece == 8


@pytest.mark.parametrize("steps", [1, 63, 10_000, 3_000_000])
@pytest.mark.parametrize("statistics", [1, 64, 2048])
def test_no_lane_of_a_reduction_adds_more_than_64_terms(steps, statistics) -> None:
    tile = config.reduction_tile_for(steps, 64, 2)
    grid = config.reduction_grid(steps, statistics, 64, "columns", tile, 264)
    tiles = -(-steps // tile.rows)
    assert 1 <= grid.splits <= tiles
    assert -(-tiles // grid.splits) <= 64
