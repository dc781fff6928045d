"""Signs that a network was trained: writes to its weights, and their values."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import diagnose
from normkit.doctor.examination.start import WRITES, has_moved

KINDS = (nn.LSTM, nn.GRU, nn.RNN, nn.Embedding)
Batches = list[tuple[Tensor, Tensor]]


class Reader(nn.Module):
    """One of four classes, read at the first of twelve steps."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.is_embedding = kind is nn.Embedding
        self.layer = kind(8, 16) if self.is_embedding else kind(8, 16, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) if self.is_embedding else self.layer(F.one_hot(x, 8) * 2.0)[0]
        return self.last(h.mean(1))


def marked(*, is_paired: bool) -> Batches:
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(10):
        y = torch.randint(4, (64,), generator=draw)
        x = torch.randint(4, 8, (64, 12), generator=draw)
        x[:, ::2] = y[:, None]
        order = torch.randperm(64, generator=draw)
        found.append((x, y if is_paired else y[order]))
    return found


def answers_of(kind: type[nn.Module], steps: int, *, is_paired: bool) -> list[str]:
    """Train, and return what D34 says of what was learned."""
    torch.manual_seed(0)
    model, data = Reader(kind), marked(is_paired=is_paired)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    findings = diagnose(model, data, F.cross_entropy).findings
    return [f.evidence for f in findings if f.is_alarm]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_whose_weights_do_not_tell_are_known_by_their_steps(
    kind: type[nn.Module],
) -> None:
    (evidence,) = answers_of(kind, WRITES, is_paired=False)
    assert "it has learned nothing" in evidence
    assert answers_of(kind, WRITES, is_paired=True) == []
    # The first steps may show nothing yet.
    assert answers_of(kind, 10, is_paired=False) == []


def test_writes_of_a_start_are_no_steps() -> None:
    """A table of known words, set row by row, and a sparse start."""
    model = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 200), nn.Linear(200, 4))
    with torch.no_grad():
        for row, values in enumerate(torch.randn(300, 8)):
            model[0].weight[row] = values
    nn.init.sparse_(model[2].weight, 0.5)
    assert min(model[0].weight._version, model[2].weight._version) > WRITES
    assert not has_moved(model)


def test_steps_of_a_part_tell_where_the_rest_is_frozen() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), 1e-6)
    for _ in range(WRITES):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    assert has_moved(model)
    assert not has_moved(backbone)


@pytest.mark.parametrize(
    "layer", [nn.Bilinear(16, 4, 12), nn.MultiheadAttention(16, 4), nn.Linear(16, 12)]
)
def test_a_bias_beyond_its_bound_was_moved(layer: nn.Module) -> None:
    assert not has_moved(layer)
    bias = layer.in_proj_bias if hasattr(layer, "in_proj_bias") else layer.bias
    with torch.no_grad():
        bias[0] = 0.4
    assert has_moved(layer)


def test_a_bias_tells_beside_norms_that_were_never_used() -> None:
    """A head behind batch norms that stayed in eval mode."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    assert not has_moved(model)
    with torch.no_grad():
        model[2].bias[0] = 0.4
    assert has_moved(model)
