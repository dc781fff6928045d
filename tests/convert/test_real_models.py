"""Architectures that others wrote, against the record that the documentation shows."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "convert" / "record.json"
PAGE = ROOT / "docs" / "convert_coverage.md"
MEASURES = ("eval", "train", "gradients", "state")


def test_the_page_shows_the_record() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.convert.page import page
    finally:
        sys.path.remove(str(ROOT))
    records = json.loads(RECORD.read_text())
    if PAGE.read_text() != page(records.values()):
        pytest.fail("the page is old: run python -m benchmarks.convert page")


QUICK = ("timm/lcnet_035", "torchvision/shufflenet_v2_x0_5", "transformers/Llama")
OTHERS = (
    *("timm/resnet18", "timm/efficientvit_b0", "timm/vit_tiny_patch16_224"),
    *("transformers/T5", "transformers/Wav2Vec2"),
)


@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_real_models_convert_as_the_record_says(names: tuple[str, ...]) -> None:
    """In one process of its own, where the libraries load once."""
    for library in ("timm", "torchvision", "transformers"):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    records = json.loads(RECORD.read_text())
    command = [sys.executable, "-m", "benchmarks.convert", "one", *names]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    for name, line in zip(names, lines, strict=True):
        found, expected = json.loads(line), records[name]
        assert "failed" not in found, found["failed"]
        for key in ("norms", "swapped", "fused", "unfused", "same_keys"):
            assert found[key] == expected[key], (name, key)
        distance = found.get("in_float64", max(found[k] for k in MEASURES))
        assert distance <= 1e-9, name
