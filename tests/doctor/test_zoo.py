"""No alarm on healthy programs."""

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
@pytest.mark.skipif(
    "NORMKIT_DATA" not in os.environ,
    reason="NORMKIT_DATA names no folder with mnist.npz and cifar10_12k.npz",
)
@pytest.mark.parametrize("name", ON_FILES)
def test_a_healthy_program_on_mnist_or_cifar_raises_no_alarm(name: str) -> None:
    for readings in run(name, 0)[:2]:
        assert [f.to_text() for f in readings if f.is_alarm] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_of_the_zoo_is_silent_with_two_seeds(name: str) -> None:
    """Stricter than the aim of 2 % of warnings per check, which no program needs."""
    for seed in SEEDS:
        for readings in run(name, seed)[:2]:
            assert [f.to_text() for f in readings if f.is_alarm] == []


def test_the_zoo_is_large_enough_to_speak_of_shares() -> None:
    assert len(SEEDS) * len(PROGRAMS) >= 60
