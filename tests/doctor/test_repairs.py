"""Repairs that need no training, each on its own fault."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import normkit
from doctor.models import batches, norms, trained
from normkit.doctor import Diagnosis, diagnose

LOSS = nn.CrossEntropyLoss()


def examined(model: nn.Module, data: object = None) -> Diagnosis:
    return diagnose(model, data or batches()[:14], LOSS)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def outcome(diagnosis: Diagnosis, id_: str) -> tuple[float, float, bool]:
    (found,) = [c for c in diagnosis.confirmations if c.id == id_]
    assert found.measure == "alarms"
    return found.before, found.after, found.helps


def test_d06_a_layer_learns_to_take_a_batch_of_one() -> None:
    model = trained("mlp")
    before, kept = weights(model), model.state_dict()
    data = TensorDataset(*map(torch.cat, zip(*batches(), strict=True)))
    loader = DataLoader(Subset(data, range(321)), 64)
    diagnosis = examined(model, loader).confirm()
    assert outcome(diagnosis, "D06") == (1, 0, True)
    single = batches(1)[0][0]
    model.train()
    with pytest.raises(ValueError, match="more than 1 value"):
        model(single)
    assert diagnosis.repair() == ["D06"]
    assert model(single).isfinite().all()
    assert all(map(torch.equal, before, model.parameters()))
    assert model.state_dict().keys() == kept.keys()
    assert examined(model, loader).named == []


def test_d07_what_is_frozen_stays_so_after_train() -> None:
    model = trained("cnn")
    for norm in norms(model).values():
        norm.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    diagnosis = examined(model).confirm()
    assert outcome(diagnosis, "D07") == (4, 0, True)
    assert diagnosis.repair() == ["D07"]
    model.train()
    model(batches()[0][0])
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(isinstance(n, normkit.nn.FrozenBatchNorm) for n in norms_of(model))
    assert examined(model).named == []


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


def test_d16_half_statistics_are_kept_in_float32() -> None:
    model = trained("mlp").bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches()[:14]]
    diagnosis = examined(model, data).confirm()
    assert outcome(diagnosis, "D16") == (4, 0, True)
    assert diagnosis.repair() == ["D16"]
    assert {n.running_var.dtype for n in norms_of(model)} == {torch.float32}
    assert model[0].weight.dtype == torch.bfloat16
    assert "D16" not in examined(model, data).named


def test_d16_an_eps_that_decides_is_no_matter_of_precision() -> None:
    model = trained("mlp")
    norms(model)["4"].eps = 10.0
    diagnosis = examined(model)
    assert "D16" in diagnosis.named
    assert "D16" not in diagnosis.repair()


@pytest.mark.parametrize("is_last", [True, False])
def test_d34_a_softmax_before_a_loss_that_has_one_is_left_out(is_last: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = trained("mlp")
            self.inner, self.outer = nn.Softmax(1), nn.Softmax(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x) * self.inner(x).amax(1, keepdim=True).sign()
            # As a function it is no layer, and cannot be left out.
            return self.outer(y) if is_last else y.softmax(1)

    model = Model()
    diagnosis = examined(model).confirm()
    assert diagnosis.named == ["D34"]
    assert diagnosis.repair() == (["D34"] if is_last else [])
    if is_last:
        assert outcome(diagnosis, "D34") == (1, 0, True)
        assert isinstance(model.inner, nn.Softmax)
        assert isinstance(model.outer, nn.Identity)
        assert examined(model).named == []


def brighter(size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(4 - 2 * x, y) for x, y in batches(size)]


def trained_in_eval_mode(**kwargs: float) -> nn.Module:
    """A network trained on one domain, then on another with frozen batch norms."""
    model = trained("mlp", **kwargs)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.eval()
    for _ in range(6):
        for x, y in brighter():
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    return model


def test_weights_trained_on_their_running_statistics_keep_them() -> None:
    model = trained_in_eval_mode()
    diagnosis = examined(model, brighter()[:14])
    found = {f.severity for f in diagnosis.findings if f.id == "D01"}
    assert found == {"info"}
    assert not {"D01", "D02", "D03", "D32"} & set(diagnosis.named)
    assert "the weights fit them" in diagnosis.to_text()
    before = copy.deepcopy(model.state_dict())
    assert diagnosis.repair() == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_repair_that_does_harm_is_declined_with_the_numbers() -> None:
    """A momentum that looks wrong, and statistics that the weights need."""
    model = trained_in_eval_mode()
    for norm in norms(model).values():
        norm.momentum = 0.6
    diagnosis = examined(model, brighter()[:14])
    assert diagnosis.named == ["D04"]
    (found,) = diagnosis.confirm().confirmations
    assert found.harms
    assert not found.improves
    applied = diagnosis.repair()
    assert applied == []
    assert "does not help" in applied.declined["D04"]
    assert "declined D04" in str(applied)
    assert {norm.momentum for norm in norms(model).values()} == {0.6}


def test_a_repair_is_measured_on_batches_that_it_was_not_computed_from() -> None:
    """Every second batch comes from another domain."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2, momentum=0.001, affine=False)
    model = nn.Sequential(norm, nn.Linear(2, 2))
    norm.num_batches_tracked += 10
    data = [
        (torch.randn(64, 2) + 40 * (i % 2), torch.randint(2, (64,))) for i in range(8)
    ]
    diagnosis = diagnose(model, data, LOSS, metric=lambda y, t: -LOSS(y, t).item())
    found = diagnosis.confirm().confirmations[0]
    expected = []
    for i, (x, y) in enumerate(data):
        other = torch.cat([x for x, _ in data[:i] + data[i + 1 :]])
        z = (x - other.mean(0)) / (other.var(0) + norm.eps).sqrt()
        expected.append(-LOSS(model[1](z), y).item())
    assert found.after == pytest.approx(sum(expected) / 8, rel=1e-4)


def test_without_a_loss_nothing_is_confirmed_and_nothing_is_repaired() -> None:
    model = trained("mlp", momentum=0.001)
    before = copy.deepcopy(model.state_dict())
    applied = diagnose(model, [x for x, _ in batches()[:14]]).repair()
    assert applied == []
    assert "loss_fn" in applied.declined["D01"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_d13_calls_of_a_shared_norm_are_no_batches() -> None:
    """They differ by the model's doing, and the loader's batches are mixed well."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x) + self.norm(3 + x.roll(1, 0)))

    torch.manual_seed(0)
    named = examined(Two(), batches()[:24]).readings
    alarms = {f.id for f in named if f.is_alarm}
    assert "D33" in alarms
    assert "D13" not in alarms
