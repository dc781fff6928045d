"""Norms that are not torch's classes, and layers that run without gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches
from normkit.doctor import diagnose, explain_gap, watch
from normkit.doctor.checks.batch_size import batch_too_small
from normkit.errors import ArgumentError
from normkit.modeling.norm_types import is_batch_norm


class Own(nn.Module):
    """A batch norm of another library, known by its buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1)


class Frozen(nn.Module):
    """A frozen batch norm, as detectron2's: four buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0}.items():
            self.register_buffer(name, torch.full((width,), value))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return (x - self.running_mean) * scale + self.bias


def trained(norm: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), norm, nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(4):
        for x, y in batches(seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def test_statistics_of_another_librarys_norm_can_be_stale() -> None:
    model = trained(Own(32))
    found = diagnose(model, batches(), F.cross_entropy)
    assert found.named == []
    assert "D01" in {f.id for f in found.clear}
    model[1].running_mean += 3 * model[1].running_var.sqrt()
    found = diagnose(model, batches(), F.cross_entropy)
    assert found.named[0] == "D01"
    assert found.findings[0].layer == "1"
    assert "D01" in found.repair()
    assert diagnose(model, batches(), F.cross_entropy).named == []


def test_the_momentum_of_another_class_has_an_unknown_meaning() -> None:
    norm = Own(32)
    norm.momentum = 0.99
    assert "D04" not in diagnose(trained(norm), batches(), F.cross_entropy).named


def test_a_frozen_norm_with_buffers_is_frozen_and_its_values_are_checked() -> None:
    model = trained(Frozen(32))
    found = diagnose(model, batches(), F.cross_entropy)
    assert found.named == []
    assert [norm.frozen for _, norm in found.statistics.norms] == [True]
    model[1].running_var[3] = float("nan")
    assert "D17" in diagnose(model, batches(), F.cross_entropy).named


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (Own(3), True),
        (Frozen(3), True),
        (nn.InstanceNorm2d(3, track_running_stats=True), False),
        (nn.LayerNorm(3), False),
    ],
)
def test_batch_norms_are_known_by_class_or_buffers(
    module: nn.Module, expected: bool
) -> None:
    assert is_batch_norm(module) == expected


class Headed(nn.Module):
    """A body that is called without gradients, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x)
        return self.head(features)


def watched(model: nn.Module, *, evaluates: bool) -> list[str]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:8]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if evaluates:
            model.eval()
            with torch.no_grad():
                model(batches()[0][0])
            model.train()
    return [f.id for f in seen.findings() if f.is_alarm]


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_body_under_no_grad_still_moves_its_statistics(evaluates: bool) -> None:
    model = Headed()
    assert "D07" in watched(model, evaluates=evaluates)
    assert "D07" in diagnose(model, batches(), F.cross_entropy).named
    model.body[1] = Frozen(32)
    assert watched(model, evaluates=evaluates) == []


class Helped(nn.Module):
    """A helper network whose features enter the loss in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8))
        self.helper.requires_grad_(False)
        self.net = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y + 0 * self.helper(x).mean() if self.training else y


def test_statistics_that_eval_mode_never_reads_may_move() -> None:
    model = Helped()
    assert watched(model, evaluates=True) == []
    assert "D07" not in diagnose(model, batches(), F.cross_entropy).named


def test_a_network_that_is_only_called_without_gradients_is_judged() -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16)).requires_grad_(False)
    with watch(model) as seen, torch.no_grad():
        for x, _ in batches():
            model(x)
    (found,) = [f for f in seen.findings() if f.is_alarm]
    assert (found.id, found.severity) == ("D09", "error")
    with watch(model.eval()) as seen, torch.no_grad():
        model(batches()[0][0])
    assert [f.severity for f in seen.readings()] == ["not_judged"]


class Rows(nn.Module):
    """Sequences through a batch norm, as they are or flattened."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.norm, self.out, self.layout = nn.BatchNorm1d(8), nn.Linear(8, 3), layout

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "channels":
            h = self.norm(x.mT).mT
        elif self.layout == "by sample":
            h = self.norm(x.flatten(0, 1)).view_as(x)
        else:
            h = self.norm(x.transpose(0, 1).flatten(0, 1)).view_as(x.transpose(0, 1))
            h = h.transpose(0, 1)
        return self.out(h.mean(1))


def sequences(*, padded: bool) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(40):
        x = 2 + torch.randn(32, 20, 8, generator=draw)
        ends = torch.randint(4, 21, (32, 1, 1), generator=draw)
        if padded:
            x = x * (torch.arange(20)[None, :, None] < ends)
        made.append((x, torch.randint(3, (32,), generator=draw)))
    return made


@pytest.mark.parametrize("layout", ["channels", "by sample", "by position"])
def test_padding_shows_behind_a_flatten(layout: str) -> None:
    for padded in (True, False):
        model, data = Rows(layout), sequences(padded=padded)
        for x, _ in 3 * data:
            model(x)
        found = diagnose(model, data, F.cross_entropy)
        (reading,) = [f for f in found.readings if f.id == "D12"] or [None]
        if padded:
            assert reading is not None
            assert reading.severity == "warning"
            share = sum(float((x == 0).all(2).double().mean()) for x, _ in data) / 40
            # A sequence that lacks one position has an end of one, which is no run.
            assert reading.details["share"] == pytest.approx(share, abs=0.005)
        else:
            assert "D12" not in found.named
        assert "D13" not in found.named


def test_flattened_sequences_count_as_samples() -> None:
    model = Rows("by sample")
    x = torch.randn(32, 20, 8)
    model(x)
    found = diagnose(model, [(x, torch.zeros(32).long())], F.cross_entropy)
    ((_, norm),) = found.statistics.norms
    assert norm.in_training is not None
    assert norm.in_training.samples == 32
    assert int(norm.in_training.pooled.count.max()) == 640
    assert next(batch_too_small(found.statistics)).value == 32


class Functional(nn.Module):
    """A network that calls `F.batch_norm` on buffers of its own, before a dropout."""

    def __init__(self, mean: str = "mean", var: str = "var") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.names = mean, var
        self.register_buffer(mean, torch.zeros(32))
        self.register_buffer(var, torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (getattr(self, name) for name in self.names)
        h = F.batch_norm(self.first(x), mean, var, training=self.training, momentum=0.1)
        return self.head(F.dropout(h.relu(), 0.5, self.training))


@pytest.mark.parametrize("names", [("mean", "var"), ("running_mean", "running_var")])
def test_a_call_outside_batch_norms_takes_batch_statistics(
    names: tuple[str, str],
) -> None:
    torch.manual_seed(0)
    model = Functional(*names)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(6):
        for x, y in batches(seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    healthy = diagnose(model, batches(), F.cross_entropy)
    assert not any(finding.is_alarm for finding in healthy.findings)
    getattr(model, names[0]).sub_(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    found = diagnose(model, batches(), F.cross_entropy)
    assert found.named == ["D02"]
    gap = explain_gap(model, batches())
    right = {"batch": 0, "running": 0}
    for x, y in batches():
        h = model.first(x)
        batch = F.batch_norm(h, None, None, training=True)
        running = F.batch_norm(h, *(before[name] for name in names))
        right["batch"] += (model.head(batch.relu()).argmax(1) == y).sum().item()
        right["running"] += (model.head(running.relu()).argmax(1) == y).sum().item()
    samples = sum(len(y) for _, y in batches())
    assert gap.batch == pytest.approx(right["batch"] / samples)
    assert gap.running == pytest.approx(right["running"] / samples)
    assert sum(part.value for part in gap.causes) == pytest.approx(gap.gap)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())


def test_a_call_that_is_frozen_while_training_stays_so() -> None:
    class Still(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.batch_norm(self.first(x), self.mean, self.var).relu())

    model = Still()
    model.mean.sub_(3)
    assert explain_gap(model, batches()).gap == 0


@pytest.mark.filterwarnings("ignore")  # scripts are deprecated, and no leaves
def test_the_gap_of_a_scripted_model_is_found_and_a_traced_one_refused() -> None:
    model = trained(nn.BatchNorm1d(32))
    model[1].running_mean -= 5
    # Of a copy no write is counted, so that values alone tell of the training.
    scripted = torch.jit.script(copy.deepcopy(model))
    found = diagnose(scripted, batches(), F.cross_entropy)
    assert "D02" in found.named
    model.eval()
    traced = torch.jit.trace(model, batches()[0][0])
    for verb in (lambda m, b: diagnose(m, b, F.cross_entropy), explain_gap):
        with pytest.raises(ArgumentError, match="layer '1' is a batch norm in a trac"):
            verb(traced, batches())
