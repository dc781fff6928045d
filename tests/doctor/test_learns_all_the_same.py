"""What healthy programs have that looks like a fault, and costs them little."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches
from normkit.doctor import Diagnosis, diagnose, watch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def severities(found: Diagnosis, id_: str, text: str = "") -> set[str]:
    return {f.severity for f in found.readings if f.id == id_ and text in f.evidence}


@pytest.mark.parametrize("hidden", [1, 2, 3, 6])
def test_one_pair_of_linear_layers_costs_a_deep_network_little(hidden: int) -> None:
    """A gate of a paper, a map of codes; of three or four layers it is half of all."""
    layers = [nn.Linear(64, 32), nn.Linear(32, 32)]
    for _ in range(hidden):
        layers += [nn.ReLU(), nn.Linear(32, 32)]
    found = diagnose(nn.Sequential(*layers), batches()[:8])
    wanted = "warning" if hidden < 3 else "info"
    assert severities(found, "D34", "one linear map") == {wanted}


@pytest.mark.parametrize("is_given", [True, False])
def test_counts_that_the_network_is_given_are_no_labels(is_given: bool) -> None:
    """A multinomial autoencoder (Mult-VAE), and a softmax over several true labels."""
    rows = (torch.rand(8, 32, 40) < 0.2).float()
    labels = rows if is_given else rows.flip(1)
    data = list(zip(rows, labels, strict=True))
    found = diagnose(nn.Sequential(nn.Linear(40, 40)), data, F.cross_entropy)
    told = severities(found, "D34", "the softmax shares one")
    assert told == (set() if is_given else {"warning"})


@pytest.mark.parametrize("is_divided", [True, False])
def test_labels_that_the_loss_divides_are_a_distribution(is_divided: bool) -> None:
    """ListNet: one or two of the offers of a search are booked."""
    x = torch.randn(8, 32, 10)
    labels = (x > 1).float()
    labels[..., 0] = 1

    def loss_fn(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores, y / y.sum(1, keepdim=True) if is_divided else y)

    data = list(zip(x, labels, strict=True))
    found = diagnose(nn.Sequential(nn.Linear(10, 10)), data, loss_fn)
    told = severities(found, "D34", "the softmax shares one")
    assert told == (set() if is_divided else {"warning"})


@pytest.mark.parametrize("is_generator", [True, False])
def test_logits_of_a_critic_are_not_those_of_the_model(is_generator: bool) -> None:
    """A generator of pictures ends in a sigmoid, and its critic gives logits."""
    critic = nn.Linear(10, 1) if is_generator else nn.Identity()

    def loss_fn(made: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(critic(made)[:, :1], y)

    data = [(x, (x[:, :1] > 0).float()) for x in torch.randn(8, 32, 16)]
    found = diagnose(nn.Sequential(nn.Linear(16, 10), nn.Sigmoid()), data, loss_fn)
    told = severities(found, "D34", "already a sigmoid")
    assert told == (set() if is_generator else {"warning"})


@pytest.mark.parametrize("is_generator", [True, False])
def test_scores_of_a_critic_are_not_those_of_the_model(is_generator: bool) -> None:
    """A generator ends in tanh; a classifier scores what it made."""
    classifier = nn.Linear(10, 10) if is_generator else nn.Identity()

    def loss_fn(made: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(classifier(made), y)

    data = [(x, x[:, :10].argmax(1)) for x in torch.randn(8, 32, 16)]
    found = diagnose(nn.Sequential(nn.Linear(16, 10), nn.Tanh()), data, loss_fn)
    told = severities(found, "D34", "the scores end in tanh")
    assert told == (set() if is_generator else {"warning"})


@pytest.mark.parametrize(("p", "expected"), [(0.35, "info"), (0.6, "warning")])
def test_a_dropout_of_a_third_before_a_norm_costs_little(
    p: float, expected: str
) -> None:
    layers: list[nn.Module] = []
    for width in (64, 48):
        layers += [nn.Linear(width, 48), nn.Dropout(p), nn.BatchNorm1d(48), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for i in range(200):
        x, y = batches()[i % 16]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = diagnose(model, batches()[:16], F.cross_entropy)
    told = [f for f in found.readings if f.id == "D11" and f.severity != "clear"]
    assert told
    assert {f.severity for f in told if f.value < 0.7} == {expected}


def half_dead(*, steps: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """60 % of the units are off for all samples, and six labels of ten are random."""
    model = nn.Sequential(nn.Linear(16, 50), nn.ReLU(), nn.Linear(50, 4))
    with torch.no_grad():
        model[0].bias[:30] = -100.0  # pyright: ignore[reportIndexIssue, reportArgumentType]
    x = torch.randn(48, 32, 16)
    y = x[..., :4].argmax(2)
    y = torch.where(torch.rand(y.shape) < 0.5, torch.randint(4, y.shape), y)
    data = list(zip(x, y, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for i in range(steps):
        xi, yi = data[i % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(xi), yi).backward()
        optimizer.step()
    return model, data


def test_d21_dead_units_are_no_alarm_where_the_network_is_learning() -> None:
    assert severities(diagnose(*half_dead(steps=3), F.cross_entropy), "D21") == {
        "error"
    }
    assert severities(diagnose(*half_dead(steps=300), F.cross_entropy), "D21") == {
        "info"
    }


class _Graph(nn.Module):
    """The last layer makes features, and the answer are the places."""

    def __init__(self, *, gives_features: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.move = nn.Linear(32, 10)
        self.node = nn.Linear(32, 10)
        self.gives_features = gives_features

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        places, features = self.move(h), self.node(h)
        return features if self.gives_features else places


@pytest.mark.parametrize("gives_features", [False, True])
def test_d27_what_nothing_reads_need_not_change(gives_features: bool) -> None:
    """A head that the model answers with, and that the loss forgets, has to."""
    model = _Graph(gives_features=gives_features)
    kept: list[Any] = []
    model.move.register_forward_hook(lambda _m, _i, y: kept.append(y))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as training:
        for x, y in batches()[:40]:
            optimizer.zero_grad()
            _ = model(x)
            (F.cross_entropy(kept.pop(), y) + 0.0 * model.node.weight.sum()).backward()
            optimizer.step()
    told = {f.layer for f in training.findings() if f.id == "D27" and f.is_alarm}
    assert ("node" in told) is gives_features


def test_units_whose_number_varies_are_positions() -> None:
    """A rectifier over `(N, C, L)` whose length L is that of the longest recording."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten(0, 1), nn.ReLU())
    with watch(model, every=1) as seen:
        for i in range(90):
            x = torch.randn(1, 40, 20 + i % 7, 8)
            model[2](model[0](x).mean(-1)[0]).sum().backward()
    assert {f.severity for f in seen.readings() if f.id == "D21"} == {"not_judged"}


def test_a_diagnosis_takes_batches_of_several_numbers_of_nodes() -> None:
    """Graphs are padded to the largest of their batch; a rectifier sees `(N, V, F)`."""

    class Graphs(nn.Module):
        """A batch norm over all nodes of a batch, and a rectifier."""

        def __init__(self) -> None:
            super().__init__()
            self.map, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.map(x)
            return F.relu(self.norm(h.flatten(0, 1)).view_as(h))

    model = Graphs()
    data = [(torch.randn(4, v, 3), torch.randn(4, v, 8)) for v in (6, 18, 6)]
    found = diagnose(model, data, F.mse_loss)
    assert severities(found, "D21") <= {"not_judged", "clear"}


@pytest.mark.parametrize("learns", [True, False])
def test_d05_batches_of_four_are_no_alarm_where_the_network_learns(
    learns: bool,
) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
    model.append(nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3 if learns else 0.0)
    parts = [(x, y) for xs, ys in batches() for x, y in zip(xs.split(4), ys.split(4))]  # noqa: B905
    with watch(model, optimizer) as seen:
        for x, y in parts[:400]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    told = {f.severity for f in seen.readings() if f.id == "D05"}
    assert told == {"info" if learns else "warning"}


def test_d27_gradients_of_an_earlier_training_are_none_of_this_one() -> None:
    """A second head on a frozen trunk: the first still has its last gradients."""
    trunk, first, second = nn.Linear(64, 32), nn.Linear(32, 10), nn.Linear(32, 10)
    model = nn.ModuleDict({"trunk": trunk, "first": first, "second": second})
    data = batches()[:30]
    F.cross_entropy(first(trunk(data[0][0]).relu()), data[0][1]).backward()
    trunk.requires_grad_(False)
    optimizer = torch.optim.SGD(second.parameters(), 0.1)
    with watch(model, optimizer) as seen:
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(second(trunk(x).relu()), y).backward()
            optimizer.step()
    assert not [f for f in seen.findings() if f.id == "D27" and f.is_alarm]
    # Gradients that gather are of this one.
    with watch(model, optimizer) as seen:
        for x, y in data:
            optimizer.zero_grad()
            h = trunk(x).relu()
            F.cross_entropy(first(h) + second(h), y).backward()
            optimizer.step()
    told = {f.layer for f in seen.findings() if f.id == "D27" and f.is_alarm}
    assert told == {"first"}


@pytest.mark.parametrize("are_shares", [True, False])
def test_d28_words_may_be_shares_of_their_row(are_shares: bool) -> None:
    """As in a graph of papers; the same numbers in other rows are small inputs."""
    y = torch.randint(4, (400,))
    x = (
        torch.rand(400, 200) < 0.04 + 0.2 * (y[:, None] == torch.arange(200) % 4)
    ).float()
    x = x / x.sum(1, keepdim=True)
    if not are_shares:
        x = x.flatten()[torch.randperm(x.numel())].view_as(x)
    model = nn.Sequential(nn.Linear(200, 32), nn.ReLU(), nn.Linear(32, 4))
    data = list(zip(x.split(50), y.split(50), strict=True))
    found = [
        f for f in diagnose(model, data, F.cross_entropy).readings if f.id == "D28"
    ]
    assert [f.severity for f in found] == ["info" if are_shares else "warning"]


class Boxes(nn.Module):
    """Boxes by a sigmoid beside the scores of kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
        self.box, self.kind = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.box(y).sigmoid(), self.kind(y)


@pytest.mark.parametrize("has_kinds", [True, False])
def test_d34_of_targets_a_loss_takes_apart_no_range_is_known(has_kinds: bool) -> None:
    """The kind, 0 to 2, lies in a column behind the box; or boxes of 0 to 2."""
    x = torch.randn(256, 6)
    box, kind = torch.rand(256, 4), torch.randint(3, (256, 1)).float()
    if not has_kinds:
        box = 2 * box

    def loss_fn(out: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        far = (out[0] - t[:, :4]).abs().mean()
        return far + F.cross_entropy(out[1], t[:, 4].long()) if has_kinds else far

    t = torch.cat((box, kind), 1) if has_kinds else box
    data = list(zip(x.split(32), t.split(32), strict=True))
    found = diagnose(Boxes(), data, loss_fn)
    alarms = [f.evidence for f in found.findings if f.id == "D34" and f.is_alarm]
    assert any("ends in sigmoid" in text for text in alarms) is not has_kinds


def _statistics_off_by(factor: float) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a trained network whose running variance is off, and its batches."""
    y = torch.randint(4, (1600,))
    x = 3 * F.one_hot(y, 8).float() + torch.randn(1600, 8)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
    )
    data = list(zip(x.split(100), y.split(100), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for inputs, wanted in data * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), wanted).backward()
        optimizer.step()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.running_var *= factor
    norm.num_batches_tracked.fill_(300)  # no young network, whose averages lag
    return model, data


@pytest.mark.parametrize("factor", [2.2, 8.0])
def test_d01_statistics_that_cost_no_right_answer_are_no_alarm(factor: float) -> None:
    """The loss is larger for smaller scores; as many answers are right."""
    model, data = _statistics_off_by(factor)
    found = diagnose(model, data, F.cross_entropy)
    seen = found.statistics.evaluation
    assert seen is not None
    loss, batch = seen.mean(seen.running_loss), seen.mean(seen.batch_loss)
    assert loss > 1.1 * batch
    severities = {f.severity for f in found.readings if f.id == "D01"}
    assert severities == {"info" if factor < 3 else "warning"}


class Words(nn.Module):
    """Convolutions with batch norms over recordings of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU()
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean(-1))


def _served_singly(*, is_trained_so: bool) -> Diagnosis:
    """Diagnose a network on single recordings, trained on 16 of them at a time."""
    y = torch.randint(3, (960,))
    x = torch.randn(960, 4, 24) + 1.5 * F.one_hot(y, 4)[:, :, None]
    model, size = Words(), 1 if is_trained_so else 16
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for inputs, wanted in zip(x.split(size), y.split(size), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), wanted).backward()
        optimizer.step()
    held = [(x[i : i + 1, :, : 12 + i % 9], y[i : i + 1]) for i in range(60)]
    return diagnose(model.eval(), held, F.cross_entropy)


def test_single_samples_that_a_network_serves_are_not_its_training() -> None:
    found = _served_singly(is_trained_so=False)
    assert not [f for f in found.findings if f.is_alarm]
    assert severities(found, "D05") == {"info"}
    assert severities(_served_singly(is_trained_so=True), "D05") == {"error"}


@pytest.mark.parametrize("is_a_row", [True, False])
def test_d34_one_number_a_sample_may_depend_on_the_others(is_a_row: bool) -> None:
    """An encoder without batch_first, whose answer is `(N,)` or `(N, 1)`."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 16)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
            self.head = nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.encoder(self.table(x)).mean(1))
            return y.squeeze(1) if is_a_row else y

    data = [(torch.randint(9, (16, 7)), torch.rand(16)) for _ in range(4)]
    if not is_a_row:
        data = [(x, y[:, None]) for x, y in data]
    found = diagnose(Reader(), data, F.binary_cross_entropy_with_logits)
    assert "error" in severities(found, "D34", "depends on the others")


@pytest.mark.parametrize("lights", [True, False])
def test_d29_a_size_that_halves_the_error_is_erased(lights: bool) -> None:
    """The answers explain most of the target, and its size would explain the rest."""
    mark, size = torch.randn(512), torch.randn(512)
    x = torch.randn(512, 1, 8, 8) * size.mul(0.5).exp()[:, None, None, None]
    shape = torch.ones(8, 8)
    shape[4:] = -1
    x = x + (mark * size.mul(0.5).exp())[:, None, None, None] * shape
    target = size + 0.5 * mark if lights else mark
    inner = nn.Sequential(
        nn.InstanceNorm2d(1), nn.Flatten(), nn.Linear(64, 1, bias=False)
    )
    with torch.no_grad():
        inner[2].weight.copy_(shape.flatten()[None] / 64)
    data = list(zip(x.split(128), target[:, None].split(128), strict=True))
    found = diagnose(inner, data, F.mse_loss)
    assert bool(severities(found, "D29", "of a sample explains")) is lights


@pytest.mark.parametrize("batches_counted", [12, 48, 300])
def test_averages_lag_behind_a_network_that_begins_to_learn(
    batches_counted: int,
) -> None:
    """What is off by less than half a deviation passes, but not after 300 batches.

    Nor does it after so few that the initial values are still there.
    """
    y = torch.randint(4, (3200,))
    x = 1.5 * F.one_hot(y, 8).float() + torch.randn(3200, 8)
    data = list(zip(x.split(100), y.split(100), strict=True))
    norm, last = nn.BatchNorm1d(32), nn.Linear(32, 4)
    model = nn.Sequential(nn.Linear(8, 32), norm, nn.ReLU(), last)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for inputs, wanted in (data * 2)[:48]:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), wanted).backward()
        optimizer.step()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    side = (last.weight[0] - last.weight[1]).detach().sign()
    norm.running_mean -= 0.47 * norm.running_var.sqrt() * side
    norm.num_batches_tracked.fill_(batches_counted)
    found = diagnose(model, data, F.cross_entropy)
    told = {(f.id, f.severity) for f in found.findings if f.id in ("D01", "D02")}
    is_young = batches_counted == 48
    assert told == {(id_, "info" if is_young else "warning") for id_ in ("D01", "D02")}
