"""No alarm on fresh networks of other libraries; benchmarks/doctor runs all of them."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import torchvision_operators
from doctor.architectures import STARTS, alarms, cases
from normkit.doctor import diagnose

# A zero last gamma, group norm, no norm, dead units at the start, q and k projections,
# a decoder, frozen classes of timm: each was a false alarm once, or is of a kind alone.
SOME = (
    "timm/test_resnet",
    "timm/test_efficientnet_gn",
    "timm/test_nfnet",
    "timm/test_vit",
    "timm/test_convnext",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x0_5",
    "transformers/bert",
    "transformers/llama",
    "transformers/t5",
    "transformers/resnet",
)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", SOME)
def test_a_fresh_network_raises_no_alarm(name: str, start: str) -> None:
    library = name.partition("/")[0]
    if not find_spec(library):
        pytest.skip(f"{library} is not installed")
    assert [f.to_text() for f in alarms(name, start)] == []


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_a_network_that_is_cut_off_from_its_head_is_named(name: str) -> None:
    """At the features of another library's networks; D24 names the last layer."""
    if not find_spec("timm"):
        pytest.skip("timm is not installed")
    torchvision_operators.declare()
    import timm

    class CutOff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model(name, num_classes=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net.forward_head(self.net.forward_features(x).detach())

    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 160, 160), torch.randint(3, (8,))) for _ in range(2)]
    found = diagnose(CutOff(), data, nn.functional.cross_entropy).readings
    told = [f for f in found if f.id == "D24" and "out of the graph" in f.evidence]
    assert [f.severity for f in told] == ["warning"]
    assert len(told[0].details["layers"]) > 5


@pytest.mark.slow
def test_no_other_architecture_of_the_installed_libraries_raises_an_alarm() -> None:
    """An hour; benchmarks/doctor has the record."""
    names = [name for name in cases() if name not in SOME]
    if not names:
        pytest.skip("none of the libraries is installed")
    told = {
        (name, start): [f.to_text() for f in alarms(name, start)]
        for name in names
        for start in STARTS
    }
    assert {run: found for run, found in told.items() if found} == {}


def test_what_the_suite_runs_is_in_the_list_of_all() -> None:
    here = [name for name in SOME if find_spec(name.partition("/")[0])]
    assert set(here) <= set(cases())
