"""Each planted fault is named first or second, at its layer; its twin is silent.

The whole matrix of checks and networks is slow. Always run those cells that share a
trained network, and add to what the tests of single checks have on perceptrons.
"""

import pytest

from doctor.faults import ALL_NETS, FAULTS, WITHOUT, told
from normkit.doctor.checks import CHECKS
from normkit.doctor.finding import Finding

QUICK = {
    "mlp": ("D01", "D02", "D03", "D04"),
    "gru": ("D02", "D06", "D07", "D13", "D17", "D19", "D25", "D32", "D34"),
}
CELLS = [
    pytest.param(id_, net, marks=() if id_ in QUICK.get(net, ()) else pytest.mark.slow)
    for id_ in sorted(FAULTS)
    for net in ALL_NETS
    if net not in WITHOUT[id_]
]


def ids(found: list[Finding], *, alarms: bool = True) -> list[str]:
    return list(dict.fromkeys(f.id for f in found if f.is_alarm or not alarms))


@pytest.mark.parametrize(("id_", "net"), CELLS)
def test_a_planted_fault_is_named_at_its_layer(id_: str, net: str) -> None:
    fault = FAULTS[id_]
    program = fault.plant(net, True)
    found = told(program)
    named = ids(found, alarms=not fault.is_info)
    assert id_ in named[:2]
    layers = {f.layer for f in found if f.id == id_ and (fault.is_info or f.is_alarm)}
    assert layers <= program.at
    assert set(ids(found)) <= {id_, *fault.brings}


@pytest.mark.parametrize(("id_", "net"), CELLS)
def test_the_clean_twin_of_a_fault_is_silent(id_: str, net: str) -> None:
    fault = FAULTS[id_]
    found = told(fault.plant(net, False))
    assert ids(found) == []
    if fault.is_info:
        assert id_ not in ids(found, alarms=False)


def test_every_check_is_planted_in_every_network_or_says_why_not() -> None:
    assert set(FAULTS) == set(CHECKS)
    for id_, fault in FAULTS.items():
        assert set(WITHOUT[id_]) < set(ALL_NETS)
        assert set(fault.brings) < set(CHECKS)
        reasons = [*WITHOUT[id_].values(), *fault.brings.values()]
        assert all(len(reason) > 20 for reason in reasons)
