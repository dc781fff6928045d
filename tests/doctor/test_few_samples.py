"""D34 of a training that gets the same few samples again and again."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build
from normkit.doctor import Finding, watch
from normkit.doctor.probes.repeats import MOST, Repeats

Pair = tuple[Tensor, Tensor]


def told(model: nn.Module, data: Iterable[Pair], steps: int = 120) -> list[Finding]:
    """Train on the batches in turn, and return what is said of them."""
    given = list(data)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with watch(model, optimizer) as seen:
        for step in range(steps):
            x, y = given[step % len(given)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return [f for f in seen.findings() if "again and again" in f.evidence]


@pytest.mark.parametrize(("count", "size"), [(1, 32), (1, 64), (2, 32), (4, 16)])
def test_a_few_batches_again_and_again_are_named(count: int, size: int) -> None:
    (found,) = told(build("mlp"), batches(size)[:count])
    assert (found.id, found.severity) == ("D34", "warning")
    assert f"the same {count * size} samples" in found.evidence


def test_a_few_batches_of_whole_numbers_are_named() -> None:
    x, y = batches(32)[0]
    (found,) = told(build("mlp"), [((4 * x).round(), y)])
    assert "the same 32 samples" in found.evidence


def test_the_same_few_samples_in_other_batches_are_named() -> None:
    x, y = (torch.cat(parts) for parts in zip(*batches(16)[:2], strict=True))
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(x), (16,), generator=draw) for _ in range(120)]
    (found,) = told(build("mlp"), [(x[i], y[i]) for i in drawn])
    assert "the same 32 samples" in found.evidence


def test_states_of_a_game_and_nodes_of_a_graph_are_few_by_nature() -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(24, 3, generator=draw)
    grids = (torch.randn(24, 64, generator=draw) > 1).float()
    y = torch.randint(4, (32,), generator=draw)
    for kinds in (states, grids):
        drawn = [torch.randint(24, (32,), generator=draw) for _ in range(120)]
        model = nn.Sequential(
            nn.Linear(kinds.shape[1], 99), nn.ReLU(), nn.Linear(99, 4)
        )
        assert not told(model, [(kinds[i], y) for i in drawn])
    # One batch of a graph's 240 nodes, of which 17 have other features.
    nodes = torch.eye(17)[torch.arange(240) % 17]
    model = nn.Sequential(nn.Linear(17, 200), nn.ReLU(), nn.Linear(200, 4))
    assert not told(model, [(nodes, torch.arange(240) % 4)])


def noisy(pair: Pair) -> list[Pair]:
    return [(pair[0] + 0.01 * torch.randn_like(pair[0]), pair[1]) for _ in range(120)]


@pytest.mark.parametrize(
    ("data", "steps"),
    [
        (batches(64), 120),  # many batches
        (batches(128)[:1], 120),  # a small set of data, whole
        (batches(8)[:1], 120),  # a truth table
        (batches(32)[:1], 60),  # a test of the program
        (noisy(batches(32)[0]), 120),  # augmented
    ],
)
def test_what_may_be_meant_is_not_named(data: list[Pair], steps: int) -> None:
    assert not told(build("mlp"), data, steps)


def test_a_small_network_cannot_learn_by_heart() -> None:
    x, y = batches(64)[0]
    assert not told(nn.Linear(16, 10), [(x[:, 16:32], y)])


def test_inputs_are_told_apart_by_values_and_order() -> None:
    seen, x = Repeats(), torch.randn(16, 4)
    assert (seen.repeated, seen.different, seen.samples) == (0, 0, 0)
    for given in (x, x.clone(), x.flip(0), {"x": x + 1}, x.double(), x[:3]):
        seen.add((given,), {})
    assert (seen.calls, seen.samples, seen.different) == (6, 83, 32)
    seen.add((x.flip(1),), {})
    seen.add((), {"tokens": torch.arange(6)[None]})
    seen.add((), {"tokens": torch.arange(6).flip(0)[None]})
    seen.add(("no tensor",), {})
    assert (seen.calls, seen.different) == (9, 32 + 16 + 2)
    for _ in range(MOST):
        seen.add((x,), {})
    assert seen.calls == MOST


@pytest.mark.parametrize(("count", "expected"), [(4, True), (16, False)])
def test_images_are_few_where_they_are_not_changed(
    count: int, *, expected: bool
) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    )
    images = [(x.view(-1, 1, 8, 8), y) for x, y in batches(32)[:count]]
    found = told(model, images, steps=200)
    assert [f.id for f in found] == ["D34"] * expected
