"""Faults that unseen programs showed: bounded answers, one answer, orders, ids."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build, norms, train
from normkit.doctor import Finding, diagnose, watch
from normkit.doctor.probes.repeats import Repeats


def told(model: nn.Module, data: Any, loss: Any, id_: str) -> list[Finding]:
    found = diagnose(model, list(data), loss).findings
    return [f for f in found if f.id == id_ and f.is_alarm]


class Forecast(nn.Module):
    """A recurrent layer over the rows of a digit, and perhaps a linear one."""

    def __init__(self, kind: type[nn.RNNBase], *, is_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = kind(8, 1 if is_last else 8, batch_first=True)
        self.last = nn.Identity() if is_last else nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rows(x.view(-1, 8, 8))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_targets_beyond_the_states_of_a_last_recurrent_layer(kind: Any) -> None:
    data = [(x, (y.float()[:, None] - 5) / 2) for x, y in batches()[:8]]
    (found,) = told(Forecast(kind, is_last=True), data, F.mse_loss, "D34")
    assert f"the output ends in {kind.__name__}" in found.evidence
    assert not told(Forecast(kind, is_last=False), data, F.mse_loss, "D34")
    small = [(x, y / 4) for x, y in data]
    assert not told(Forecast(kind, is_last=True), small, F.mse_loss, "D34")


class Cosines(nn.Module):
    def __init__(self, scale: float, how: str = "product") -> None:
        super().__init__()
        self.body, self.how = build("mlp")[:-1], how
        self.ways, self.scale = nn.Parameter(torch.randn(10, 48)), scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.how == "function":
            return F.cosine_similarity(h[:, None], self.ways, dim=2) * self.scale
        if self.how == "small":  # by chance, as of a network that begins to learn
            return torch.tanh(h @ self.ways.T / 10)
        return self.scale * F.normalize(h, dim=1) @ F.normalize(self.ways, dim=1).T


@pytest.mark.parametrize(
    ("scale", "steps", "expected"), [(1.0, 240, 1), (16.0, 240, 0), (1.0, 1, 0)]
)
def test_cosines_that_are_scores_are_named_once_they_are_right(
    scale: float, steps: int, expected: int
) -> None:
    torch.manual_seed(0)
    model = Cosines(scale)
    train(model, steps)

    def scaled(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(16 * scores, y)

    for loss, count in ((F.cross_entropy, expected), (scaled, 0)):
        found = told(model, batches()[:16], loss, "D34")
        assert len([f for f in found if "as of cosines" in f.evidence]) == count


@pytest.mark.parametrize(("how", "expected"), [("function", 1), ("small", 0)])
def test_cosines_are_told_from_other_small_scores(how: str, expected: int) -> None:
    torch.manual_seed(0)
    model = Cosines(1.0, how)
    train(model, 240)
    found = told(model, batches()[:16], F.cross_entropy, "D34")
    assert len([f for f in found if "as of cosines" in f.evidence]) == expected


def hardest(vectors: Tensor, y: Tensor, *, pushes: bool) -> Tensor:
    """Pull what is of one class together, and perhaps push other classes apart."""
    away = torch.cdist(vectors, vectors)
    same = y[:, None] == y
    pulled = away[same].mean()
    return pulled + F.relu(1 - away[~same]).mean() if pushes else pulled


@pytest.mark.parametrize("pushes", [True, False])
def test_vectors_that_are_pulled_to_one_point_are_named(*, pushes: bool) -> None:
    model = build("mlp", normalized=False, depth=2)

    def loss_fn(vectors: Tensor, y: Tensor) -> Tensor:
        return hardest(vectors, y, pushes=pushes)

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for x, y in batches():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    found = told(model, batches()[:16], loss_fn, "D34")
    assert [("all samples have one answer" in f.evidence) for f in found] == (
        [] if pushes else [True]
    )


def test_answers_whose_first_dimension_is_time_are_not_one_point() -> None:
    """As those of a CTC loss: nothing can be given to another sample."""
    model = build("mlp", normalized=False, depth=2)
    train(model, 60)

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).softmax(1).expand(5, -1, -1)

    def of_times(shares: Tensor, y: Tensor) -> Tensor:
        return 1 - (shares.mean(0) * F.one_hot(y, 10)).sum(1).mean()

    found = told(TimeFirst(), batches()[:16], of_times, "D34")
    assert not [f for f in found if "one answer" in f.evidence]


def test_of_two_losses_the_targets_of_each_are_its_own() -> None:
    """A binary cross entropy of targets that the loss makes, beside squared errors."""

    def both(answers: Tensor, y: Tensor) -> Tensor:
        value, is_high = answers.split([1, 1], 1)
        chance = F.binary_cross_entropy_with_logits(is_high, (y > 0).float())
        return F.mse_loss(value, y) + chance

    def wrong(answers: Tensor, y: Tensor) -> Tensor:
        value, is_high = answers.split([1, 1], 1)
        return F.mse_loss(value, y) + F.binary_cross_entropy_with_logits(is_high, y)

    data = [(x, y.float()[:, None] - 5) for x, y in batches()[:8]]
    model = nn.Sequential(build("mlp")[:-1], nn.Linear(48, 2))
    assert not told(model, data, both, "D34")
    assert "no least value" in told(model, data, wrong, "D34")[0].evidence


@pytest.mark.parametrize("are_read_as_ids", [True, False])
def test_numbers_of_customers_are_no_inputs_where_embeddings_read_them(
    *, are_read_as_ids: bool
) -> None:
    class Customers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vectors = nn.Embedding(90, 8) if are_read_as_ids else None
            self.last = nn.Linear(16 if are_read_as_ids else 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.vectors is None:
                return self.last(x)
            return self.last(self.vectors(x.long()).flatten(1))

    data = [
        (torch.randint(1, 90, (32, 2)).float(), torch.randn(32, 1)) for _ in range(8)
    ]
    found = diagnose(Customers(), data, F.mse_loss).readings
    expected = "not_judged" if are_read_as_ids else "warning"
    assert [f.severity for f in found if f.id == "D28"] == [expected]


@pytest.mark.parametrize(("factor", "expected"), [(0.03, True), (0.3, False)])
def test_scales_that_are_tiny_in_all_norms_are_the_cause(
    factor: float, *, expected: bool
) -> None:
    model = build("mlp")
    train(model, 120)
    for norm in norms(model).values():
        norm.weight.data.mul_(factor)
    found = diagnose(model.eval(), batches()[:16], F.cross_entropy).findings
    told_by = [f for f in found if "the rms of its scales" in f.evidence]
    assert [(f.id, f.severity) for f in told_by] == [("D19", "warning")] * expected


def trained_in(order: Callable[[Tensor], Tensor], rate: float) -> list[Finding]:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    x, y = x[order(y)], y[order(y)]
    model = build("mlp", normalized=False, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    with watch(model, optimizer) as seen:
        for _ in range(8):
            for given, label in zip(x.split(64), y.split(64), strict=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(given), label)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    return [f for f in seen.findings() if f.id == "D13"]


def test_samples_in_an_order_are_told_while_training() -> None:
    (found,) = trained_in(lambda y: y.argsort(stable=True), 1e-2)
    assert "samples come in an order" in found.evidence
    assert not trained_in(lambda y: torch.arange(len(y)), 1e-2)


def test_signals_of_any_phase_come_in_an_order_of_their_size() -> None:
    """The sum of such a signal has a mean of zero, whatever its class."""

    def order(labels: Tensor) -> tuple[float, float]:
        seen = Repeats()
        time = torch.arange(64.0)
        for y in labels.split(16):
            phase = 6.3 * torch.rand(len(y), 1)
            seen.add(((1 + y[:, None]) * (0.7 * time + phase).sin(),), {})
        return seen.order()

    labels = torch.randint(4, (1600,), generator=torch.Generator().manual_seed(0))
    alike, drift = order(labels.sort().values)
    assert (alike > 12, drift > 0.5) == (True, True)
    assert order(labels)[0] < 2


def fine_tuned(rate: float) -> list[Finding]:
    model = build("mlp")
    train(model, 120)
    model[-1] = nn.Linear(48, 10)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    draw = torch.Generator().manual_seed(0)
    with watch(model, optimizer, every=5) as seen:
        for x, y in 5 * batches():
            optimizer.zero_grad()
            # Nothing can be learned: the weights alone tell.
            F.cross_entropy(
                model(x), torch.randint(10, y.shape, generator=draw)
            ).backward()
            optimizer.step()
    return [f for f in seen.findings() if f.id == "D27" and f.is_alarm]


def test_weights_that_outgrow_their_training_are_told() -> None:
    assert any("was trained before" in f.evidence for f in fine_tuned(0.03))
    assert not any("was trained before" in f.evidence for f in fine_tuned(1e-4))


def test_scores_whose_classes_lie_last_are_no_error() -> None:
    """A loss in a lambda moves them; positions and classes differ in number."""
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12))
    data = [(torch.randint(12, (16, 7)), torch.randint(12, (16, 7))) for _ in range(4)]
    found = diagnose(model, data, lambda y, t: F.cross_entropy(y.mT, t))
    assert found.statistics.output is not None


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.ReLU])
def test_gradients_that_did_not_arrive_for_most_of_a_training(act: Any) -> None:
    """Adam moves the first layers by noise, until a gradient arrives."""
    torch.manual_seed(0)
    sizes = (64, *[48] * 8)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    body = [each for layer in layers for each in (layer, act())]
    model, data = nn.Sequential(*body, nn.Linear(48, 10)), batches()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch(model, optimizer, every=5) as seen:
        for step in range(400):
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    found = [f for f in seen.findings() if f.id == "D24" and f.is_alarm]
    assert len(found) == (act is nn.Sigmoid)
    for each in found:
        assert each.severity == "warning"
        assert "until then nothing that it does was learned" in each.evidence
