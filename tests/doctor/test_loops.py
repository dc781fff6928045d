"""D24 of a loop over steps in which the state is detached."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import Finding, diagnose, watch

Pairs = list[tuple[Tensor, Tensor]]


class FirstRow(nn.Module):
    """A cell over the rows of an image, of which the first is the answer."""

    def __init__(self, *, is_detached: bool, reads: str = "last") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.last = nn.GRUCell(8, 24), nn.Linear(24, 4)
        self.is_detached, self.reads = is_detached, reads

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 24)
        scores = []
        for row in x.unbind(1):
            h = self.cell(row, h.detach() if self.is_detached else h)
            scores.append(self.last(h))
        return scores[-1] if self.reads == "last" else torch.stack(scores).mean(0)


def rows(steps: int, count: int = 12) -> Pairs:
    draw = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        y = torch.randint(0, 4, (32,), generator=draw)
        x = 0.1 * torch.randn(32, steps, 8, generator=draw)
        x[torch.arange(32), 0, y] += 2.0
        made.append((x, y))
    return made


def told(model: nn.Module, data: Pairs, steps: int = 30) -> list[Finding]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with watch(model, optimizer) as seen:
        for step in range(steps):
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    found = [*seen.findings(), *diagnose(model, data, F.cross_entropy).findings]
    return [f for f in found if "gets a gradient" in f.evidence]


def test_a_state_that_is_detached_in_the_loop_is_told() -> None:
    found = told(FirstRow(is_detached=True), rows(8))
    assert [(f.id, f.layer, f.severity) for f in found] == [
        ("D24", "cell", "warning")
    ] * 2
    assert "calls it 8 times" in found[0].evidence


@pytest.mark.parametrize(
    ("is_detached", "reads", "steps"),
    [
        (False, "last", 8),  # the head's scores are read at the last step alone
        (True, "all", 8),  # each step has a loss of its own
        (True, "last", 3),  # too few to be a loop
    ],
)
def test_other_loops_are_not(is_detached: bool, reads: str, steps: int) -> None:
    assert not told(FirstRow(is_detached=is_detached, reads=reads), rows(steps))


def test_a_network_that_has_learned_with_its_last_step_may_detach() -> None:
    """Here the answer is in the last row."""
    data = [(x.flip(1), y) for x, y in rows(8)]
    assert not told(FirstRow(is_detached=True), data, steps=150)


def test_a_head_that_is_read_at_the_last_step_carries_no_state() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rows, self.last = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            states, _ = self.rows(x)
            return [self.last(h) for h in states.unbind(1)][-1]

    assert not told(Fused(), rows(8), steps=3)
