"""No alarm on fresh networks of other libraries; benchmarks/doctor runs all of them."""

from importlib.util import find_spec

import pytest

from doctor.architectures import STARTS, alarms, cases

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
