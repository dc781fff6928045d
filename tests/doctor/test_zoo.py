"""No alarm on healthy programs: no error at all, at most 2 % warnings per check."""

import collections
import os

import pytest

from doctor.zoo import ON_FILES, PROGRAMS, run

SEEDS = (0, 1)
QUICK = ("mlp_plain_kaiming", "functional_cnn", "gru", "siamese")


@pytest.mark.parametrize("name", QUICK)
def test_a_healthy_program_raises_no_alarm(name: str) -> None:
    for readings in run(name, 0)[:2]:
        assert [f.to_text() for f in readings if f.is_alarm] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    "NORMKIT_DATA" not in os.environ,
    reason="NORMKIT_DATA names no folder with mnist.npz and cifar10_12k.npz",
)
@pytest.mark.parametrize("name", ON_FILES)
def test_a_healthy_program_on_mnist_or_cifar_raises_no_alarm(name: str) -> None:
    for readings in run(name, 0)[:2]:
        assert [f.to_text() for f in readings if f.is_alarm] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_zoo_raises_no_error_and_hardly_a_warning() -> None:
    alarms: dict[str, list[str]] = collections.defaultdict(list)
    errors = []
    for name in PROGRAMS:
        for seed in SEEDS:
            diagnosed, watched, _ = run(name, seed)
            alarming = [f for f in diagnosed + watched if f.is_alarm]
            errors += [(name, seed, f.id) for f in alarming if f.severity == "error"]
            for id_ in {f.id for f in alarming}:
                alarms[id_].append(f"{name}/{seed}")
    runs = len(PROGRAMS) * len(SEEDS)
    assert runs >= 60
    assert not errors
    assert {i: names for i, names in alarms.items() if len(names) > 0.02 * runs} == {}
