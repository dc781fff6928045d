"""Seeding, markers and the planted faults of the sabotage suite."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from ranks import Ranks

# Shared machines stall for seconds; a slow example is no failure.
settings.register_profile("normkit", deadline=None, derandomize=True)
settings.load_profile("normkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow")
    parser.addoption(
        "--sabotage",
        metavar="NAME",
        help="plant the fault NAME of a mutants.py before any test runs",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist has one core; more threads only wait for each other.
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if is_worker else min(2, os.cpu_count() or 1))
    name = config.getoption("--sabotage")
    if name:
        import sabotage

        # Workers of tests/ranks.py plant it, too.
        os.environ["NORMKIT_SABOTAGE"] = name

        patch = pytest.MonkeyPatch()
        config.add_cleanup(patch.undo)
        sabotage.FAULTS[name].plant(patch)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    skip_slow = pytest.mark.skip(reason="slow: run with --run-slow (make test-all)")
    skip_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(20150211)


@pytest.fixture(autouse=True)
def exports_are_counted_anew() -> Iterator[None]:
    """Torch 2.6 exports one forward, such as Sequential's, 8 times and no more."""
    yield
    if "torch._dynamo" in sys.modules and not hasattr(torch.compiler, "is_exporting"):
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    """Three gloo workers, started by the first test that asks for them."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()
