"""Lists that a new layer, activation or check has to be entered in."""

from collections import OrderedDict
from pathlib import Path

import pytest
from torch import nn

import normkit.nn
from normkit.doctor.checks import CHECKS
from normkit.fold.torch.remains import Rest
from normkit.kernels.cpu.packing import ACTIVATION_CODES
from normkit.kernels.epilogue import ACTIVATIONS

ROOT = Path(__file__).parents[1]
LAYERS = [
    name
    for name in normkit.nn.__all__
    if isinstance(getattr(normkit.nn, name), type)
    and issubclass(getattr(normkit.nn, name), nn.Module)
]

# Namesakes of torch.nn, which tests/nn runs against torch's tests; and what is no norm.
USUAL = {"BatchNorm", "InstanceNorm", "LayerNorm", "GroupNorm", "RMSNorm"}
USUAL |= {"SyncBatchNorm", "FrozenBatchNorm"}
OTHERS = {"TLU", "BatchNormLSTM", "WeightStandardization"}
PLAIN = {name.removeprefix("Lazy").rstrip("123d") for name in LAYERS}


def test_each_activation_has_a_number_and_a_module() -> None:
    assert set(ACTIVATION_CODES) == set(ACTIVATIONS)
    for name in set(ACTIVATIONS) - {"none"}:
        left = Rest(activation=name).of(nn.Identity(), OrderedDict())
        assert not isinstance(left, nn.Identity), name


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_in_the_reference(name: str) -> None:
    reference = (ROOT / "docs/reference/nn.md").read_text(encoding="utf-8")
    assert f":: {name}\n" in reference


@pytest.mark.parametrize(
    "path", ["docs/guide/family.md", "tests/transforms/test_layers.py"]
)
@pytest.mark.parametrize("name", sorted(PLAIN - USUAL - OTHERS))
def test_each_norm_of_its_own_is_described_and_transformed(
    name: str, path: str
) -> None:
    assert name in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_last_check_is_named_on(page: str) -> None:
    assert f"D01–{max(CHECKS)}" in (ROOT / page).read_text(encoding="utf-8")
