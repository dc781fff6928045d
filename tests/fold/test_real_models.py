"""Architectures that others wrote, against the record that the documentation shows."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "fold" / "coverage.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "timm/mobilenetv4_hybrid_medium_075",
        "timm/repvgg_a0",
        "timm/resnetv2_18",
        "timm/lambda_resnet26t",
        "torchvision/shufflenet_v2_x0_5",
        "torchvision/mobilenet_v3_small",
    ],
)
def test_a_real_model_folds_as_far_as_the_record_says(name):
    library = name.split("/")[0]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    records = [json.loads(line) for line in RECORD.read_text().splitlines()]
    expected = {record["name"]: record for record in records}[name]
    script = str(RECORD.with_name("coverage.py"))
    command = [sys.executable, script, "one", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.splitlines()[-1])
    assert "failed" not in found, found["failed"]
    assert found["difference"] <= 1e-9
    assert (found["norms"], found["folded"]) == (expected["norms"], expected["folded"])
