"""The checks of batches, buffers, modes, weights and basics: fault and clean twin."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from doctor.models import Batches, batches, build, digits, norms, train, trained
from normkit.doctor import Diagnosis, Finding, checks, diagnose, watch
from normkit.doctor.examination.examine import norm_statistics

LOSS = nn.CrossEntropyLoss()


def of(found: list[Finding], id_: str) -> list[Finding]:
    return [f for f in found if f.id == id_]


def worst(found: list[Finding], id_: str) -> str:
    order = ("clear", "info", "warning", "error")
    judged = [f.severity for f in of(found, id_) if f.severity != "not_judged"]
    return max(judged, key=order.index)


def examined(model: nn.Module, data: Batches | None = None) -> Diagnosis:
    return diagnose(model, data or batches()[:24], LOSS)


def healthy() -> nn.Module:
    return trained("mlp")


# Batches


@pytest.mark.parametrize(
    ("net", "size", "expected"),
    [("mlp", 2, "error"), ("mlp", 8, "info"), ("residual", 4, "warning")],
)
def test_d05_small_batches_are_named(net: str, size: int, expected: str) -> None:
    data = batches(size)[:40]
    model = trained(net, 120, size=size)
    diagnosis = examined(model, data)
    assert worst(diagnosis.readings, "D05") == expected
    # Eight are enough for a network that has learned with them.
    assert ("D05" in diagnosis.named[:2]) is (expected != "info")
    unlearned = replace(diagnosis.statistics, evaluation=None)
    found = checks.run(unlearned, ["D05"])
    assert worst(found, "D05") == ("warning" if expected == "info" else expected)


def test_d05_batches_of_enough_samples_are_clear() -> None:
    assert worst(examined(healthy(), batches(16)[:60]).readings, "D05") == "clear"


def test_d06_an_epoch_that_ends_with_one_sample() -> None:
    data = TensorDataset(*map(torch.cat, zip(*batches(), strict=True)))
    data = torch.utils.data.Subset(data, range(321))
    for drop, expected in ((False, "error"), (True, "clear")):
        diagnosis = examined(healthy(), DataLoader(data, 64, drop_last=drop))
        assert worst(diagnosis.readings, "D06") == expected
    diagnosis = examined(healthy(), DataLoader(data, 64))
    assert diagnosis.named == ["D06"]
    # A convolution has many values per sample, and the loader says nothing here.
    assert not of(examined(trained("cnn"), DataLoader(data, 64)).readings, "D06")
    plain = examined(healthy(), batches()[:5]).readings
    assert worst(plain, "D06") == "clear"


@pytest.mark.parametrize("dropout", [0.2, 0.5])
def test_d11_dropout_before_a_norm_changes_its_variance(dropout: float) -> None:
    model = trained("mlp", 120, dropout=dropout)
    found = of(examined(model).readings, "D11")
    assert found[0].value == 1  # there is no dropout before the first
    assert worst(found[1:], "D11") == ("warning" if dropout == 0.5 else "info")
    assert worst(examined(healthy()).readings, "D11") == "clear"


def test_d11_the_variance_falls_as_dropout_rises() -> None:
    model = trained("mlp", 120, dropout=0.1)
    ratios = []
    for p in (0.0, 0.1, 0.3, 0.5, 0.7):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        ratios.append(min(f.value for f in of(examined(model).readings, "D11")))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == 1


def sequences(share: float) -> tuple[nn.Module, Batches]:
    """Digits as sequences of 8 rows, the last ones padded."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (8, 8)),
        nn.Conv1d(8, 24, 1),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    data = []
    for x, y in batches()[:24]:
        rows = x.view(-1, 8, 8).clone()
        rows[..., 8 - round(8 * share) :] = 0
        data.append((rows.flatten(1), y))
    train(model, 72, data=data)
    return model, data


def test_d12_padding_enters_the_statistics() -> None:
    readings = []
    for share in (0.0, 0.125, 0.25, 0.5, 0.75):
        model, data = sequences(share)
        readings.append(of(examined(model, data).readings, "D12")[0])
    shifts = [f.value for f in readings]
    assert max(shifts[:2]) < 0.02  # some digits end in empty rows by themselves
    assert shifts[1:] == sorted(shifts[1:])
    assert [f.severity for f in readings[:2]] == ["clear", "clear"]
    assert {f.severity for f in readings[3:]} == {"warning"}
    assert readings[3].details["share"] == pytest.approx(0.5, abs=0.02)


def by_class(buffer: int) -> Batches:
    """Digits sorted by class, through a shuffle buffer."""
    x, y = digits()
    order = torch.argsort(y, stable=True).tolist()
    g = torch.Generator().manual_seed(0)
    held, out = order[:buffer], []
    for index in [*order[buffer:], *([None] * buffer)]:
        pick = int(torch.randint(len(held), (), generator=g))
        out.append(held[pick])
        if index is None:
            held.pop(pick)
        else:
            held[pick] = index
    parts = torch.tensor(out).split(64)
    return [(x[i], y[i]) for i in parts if len(i) == 64]


def test_d13_sorted_batches_are_named_and_shuffled_ones_are_not() -> None:
    model = healthy()
    readings = [
        of(examined(model, by_class(buffer)).readings, "D13")[0]
        for buffer in (1, 100, 1700)
    ]
    values = [f.value for f in readings]
    assert values == sorted(values, reverse=True)
    assert [f.severity for f in readings] == ["error", "error", "clear"]
    assert worst(examined(model, batches()[:24]).readings, "D13") == "clear"
    few = of(examined(model, batches()[:12]).readings, "D13")
    assert [f.severity for f in few] == ["not_judged"]


def test_d13_sorted_batches_are_named_first_when_trained_on() -> None:
    model = build("mlp")
    data = by_class(1)
    train(model, 112, data=data)
    assert "D13" in examined(model, data).named[:2]


def loop(
    model: nn.Module,
    step: Callable[[nn.Module, int], None],
    steps: int = 12,
    **options: float,
) -> list[Finding]:
    """Train with `step` between the updates; the readings of watch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, **options)
    model.train()
    with watch(model, optimizer) as seen:
        for index, (x, y) in enumerate(batches(8)[:steps]):
            step(model, index)
            LOSS(model(x), y).backward()
            if index % getattr(model, "accumulate", 1) == 0:
                optimizer.step()
                optimizer.zero_grad()
    return seen.readings()


def nothing(model: nn.Module, index: int) -> None:
    """The clean twin."""


def test_d15_small_accumulated_batches_are_named() -> None:
    model = build("mlp")
    assert worst(loop(model, nothing), "D15") == "clear"
    model.accumulate = 4
    assert worst(loop(model, nothing), "D15") == "warning"
    with watch(model) as seen:
        train(model, 3)
    assert [f.severity for f in of(seen.readings(), "D15")] == ["not_judged"]


def test_d33_one_norm_for_two_domains_is_named() -> None:
    class Two(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.norm, self.shift = nn.BatchNorm1d(64), shift
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x) + self.norm(x.roll(1, 0) + self.shift))

    for shift, expected in ((0.0, "info"), (3.0, "warning")):
        model = Two(shift)
        train(model, 30)
        assert worst(examined(model).readings, "D33") == expected


# Modes


def test_d07_a_frozen_norm_whose_statistics_move() -> None:
    model = trained("cnn")
    for norm in norms(model).values():
        norm.requires_grad_(False)
    diagnosis = examined(model)
    assert diagnosis.named == ["D07"]
    (found,) = diagnosis.errors
    assert found.layers == tuple(norms(model))
    for norm in norms(model).values():
        norm.eval()
    assert examined(model).named == []
    # Nothing at all is trained here, so nothing is frozen either.
    assert examined(trained("cnn").requires_grad_(False)).named == []


def test_d08_training_that_goes_on_in_eval_mode() -> None:
    def validates_and_forgets(model: nn.Module, index: int) -> None:
        if index == 4:
            model.eval()

    def keeps_one_in_eval(model: nn.Module, index: int) -> None:
        norms(model)["1"].eval()

    def forgets_one(model: nn.Module, index: int) -> None:
        norms(model)["1"].train(index < 6)

    assert worst(loop(build("mlp"), nothing), "D08") == "clear"
    found = of(loop(build("mlp"), validates_and_forgets), "D08")
    assert (found[0].severity, found[0].value) == ("error", 8)
    kept = loop(trained("mlp"), keeps_one_in_eval)
    assert worst(kept, "D08") == "info"
    # A new one has no statistics to keep.
    found = loop(build("mlp"), keeps_one_in_eval)
    assert worst(found, "D08") == "warning"
    assert not [f for f in of(found, "D32") if f.is_alarm]
    assert worst(loop(build("mlp"), forgets_one), "D08") == "warning"


def test_d09_validation_in_training_mode() -> None:
    x, _ = batches()[0]

    def validates(model: nn.Module, index: int) -> None:
        if index % 4 == 3:
            with torch.no_grad():
                for _ in range(3):
                    model(x)

    def validates_well(model: nn.Module, index: int) -> None:
        model.eval()
        validates(model, index)
        model.train()

    def generates(model: nn.Module, index: int) -> None:
        with torch.no_grad():
            model(x)  # one call inside a step, as a generator for its critic

    critic = nn.Linear(10, 1)
    of_critic = torch.optim.SGD(critic.parameters(), 0.1)

    def feeds(model: nn.Module, index: int) -> None:
        for _ in range(2):
            with torch.no_grad():
                fake = model(x)
            of_critic.zero_grad()
            critic(fake).mean().backward()
            of_critic.step()

    def feeds_and_validates(model: nn.Module, index: int) -> None:
        feeds(model, index)
        validates(model, index)

    assert worst(loop(build("mlp"), validates), "D09") == "error"
    assert worst(loop(build("mlp"), validates_well), "D09") == "clear"
    assert worst(loop(build("mlp"), generates), "D09") == "clear"
    # Two steps of the critic for each of the generator are no validation either.
    assert worst(loop(build("mlp"), feeds), "D09") == "clear"
    assert worst(loop(build("mlp"), feeds_and_validates), "D09") == "error"


# Buffers


def test_d16_half_statistics_are_named() -> None:
    model = healthy()
    norm = norms(model)["4"]
    norm.running_var = norm.running_var.half()
    norm.eps = 1e-8
    statistics = examined(healthy()).statistics
    found = norm_statistics(model)["4"]
    layer = replace(statistics.layers[0], norm=found)
    (reading,) = checks.run(replace(statistics, layers=(layer,)), ["D16"])
    assert reading.severity == "error"
    assert worst(examined(healthy()).readings, "D16") == "clear"


def test_d16_an_eps_that_decides_the_scale() -> None:
    model = healthy()
    norms(model)["4"].eps = 10.0
    found = {f.layer: f.severity for f in of(examined(model).readings, "D16")}
    assert found["4"] == "warning"
    assert found["1"] == "clear"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_d17_statistics_that_cannot_be(bad: float) -> None:
    model = healthy()
    norms(model)["4"].running_var[3] = bad
    diagnosis = examined(model)
    assert diagnosis.named[0] == "D17"
    assert diagnosis.findings[0].layer == "4"
    assert diagnosis.findings[0].details["channels"] == [3]
    assert worst(examined(healthy()).readings, "D17") == "clear"


def test_d31_averaged_weights_need_their_own_statistics() -> None:
    model = trained("mlp", 20)
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        train(model, 30, optimizer=optimizer)
        averaged.update_parameters(model)
    for norm in norms(averaged).values():
        norm.running_mean += 1.0
    diagnosis = examined(averaged)
    assert diagnosis.named[0] == "D31"
    torch.optim.swa_utils.update_bn([x for x, _ in batches()], averaged)
    assert "D31" not in examined(averaged).named
    assert not of(examined(healthy()).readings, "D31")


def test_d32_weights_that_came_without_their_buffers() -> None:
    source = healthy()
    model = build("mlp")
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        mine.data.copy_(theirs)
    diagnosis = examined(model)
    assert diagnosis.named[0] == "D32"
    assert worst(examined(source).readings, "D32") == "clear"
    # A new network is not a broken one.
    new = examined(build("mlp"))
    assert new.named == []
    assert {f.severity for f in of(new.readings, "D32")} == {"not_judged"}


# Units and weights


def test_d18_channels_that_carry_nothing() -> None:
    model = healthy()
    with torch.no_grad():
        model[0].weight[:10] = 0
    found = {f.layer: f for f in of(examined(model).readings, "D18")}
    assert found["1"].severity == "warning"
    assert found["1"].value == pytest.approx(10 / 48)
    assert worst(examined(healthy()).readings, "D18") == "clear"


def test_d19_scales_that_switched_off() -> None:
    model = healthy()
    with torch.no_grad():
        norms(model)["4"].weight[:40] = 1e-6
    found = {f.layer: f.severity for f in of(examined(model).readings, "D19")}
    assert found == {"1": "clear", "4": "info", "7": "clear", "10": "clear"}


@pytest.mark.parametrize(("dead", "expected"), [(10, "warning"), (40, "error")])
def test_d21_units_that_never_answer(dead: int, expected: str) -> None:
    model = trained("mlp", normalized=False, depth=3)
    with torch.no_grad():
        model[3].bias[:dead] -= 100.0
    # A network that learns with the rest of its units can lose up to three quarters.
    found = {f.layer: f for f in of(examined(model).readings, "D21")}
    assert found["5"].severity == ("info" if dead == 10 else expected)
    with torch.no_grad():
        model[-1].weight.copy_(model[-1].weight.roll(1, 0))  # it is wrong throughout
    found = {f.layer: f for f in of(examined(model).readings, "D21")}
    assert found["5"].severity == expected
    assert "D21" in examined(model).named[:2]
    few = examined(model, batches()[:4]).readings
    assert {f.severity for f in of(few, "D21")} == {"not_judged"}
    assert worst(examined(healthy()).readings, "D21") == "clear"


def test_d21_is_seen_while_training() -> None:
    model = build("mlp", normalized=False, depth=2)
    with torch.no_grad():
        model[0].bias[:30] -= 100.0
    with watch(model) as seen:
        train(model, 50)
    found = {f.layer: f.severity for f in of(seen.readings(), "D21")}
    assert found["2"] == "error"


@pytest.mark.parametrize("gain", [1.0, 3.0, 6.0])
def test_d23_activations_that_grow(gain: float) -> None:
    model = build("mlp", normalized=False, depth=6)
    with torch.no_grad():
        for module in model[:-1]:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                module.weight *= gain
    expected = {1.0: "clear", 3.0: "error", 6.0: "error"}[gain]
    assert worst(examined(model).readings, "D23") == expected


def test_d25_gradients_that_are_not_finite_or_grow() -> None:
    model = build("mlp", act=nn.Tanh, normalized=False, depth=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in model[:-1]:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 4 / module.in_features**0.5)
    assert worst(examined(model).readings, "D25") == "error"
    assert worst(examined(healthy()).readings, "D25") == "clear"
    broken = healthy()
    with torch.no_grad():
        broken[3].weight[0, 0] = float("nan")
    assert "D25" in examined(broken).named


def test_d10_a_bias_that_the_norm_takes_out() -> None:
    found = {f.layer: f.severity for f in of(examined(healthy()).readings, "D10")}
    assert found == {"0": "info", "3": "info", "6": "info", "9": "info"}
    plain = trained("mlp", normalized=False, depth=2)
    assert worst(examined(plain).readings, "D10") == "clear"
    layered = nn.Sequential(
        nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10)
    )
    assert worst(examined(layered).readings, "D10") == "clear"


def test_d14_decay_on_scales() -> None:
    model = build("mlp")
    assert worst(loop(model, nothing), "D14") == "clear"
    assert worst(loop(model, nothing, weight_decay=1e-4), "D14") == "info"
    assert worst(loop(model, nothing, weight_decay=1e-2), "D14") == "warning"


@pytest.mark.parametrize("value", [0.0, 0.05])
def test_d26_units_that_are_one_unit(value: float) -> None:
    model = build("mlp", normalized=False, depth=2, act=nn.Tanh)
    for module in model[:-1]:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, value)
            nn.init.constant_(module.bias, value)
    nn.init.constant_(model[-1].weight, 0.1)
    train(model, 10)
    diagnosis = examined(model)
    assert diagnosis.named[0] == "D26"
    assert worst(examined(healthy()).readings, "D26") == "clear"


def test_d26_a_head_of_zeros_or_a_branch_that_starts_at_zero_is_no_symmetry() -> None:
    model = trained("residual")
    with torch.no_grad():
        model[4].conv2.weight.zero_()
        model[-1].weight.zero_()
    model[-1].weight.data += 0.01 * torch.randn_like(model[-1].weight)
    assert worst(examined(model).readings, "D26") == "clear"


@pytest.mark.parametrize(
    ("lr", "expected"), [(0.05, "clear"), (1e-7, "warning"), (500.0, "error")]
)
def test_d27_steps_that_do_not_fit_the_weights(lr: float, expected: str) -> None:
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with watch(model, optimizer) as seen:
        train(model, 25, optimizer=optimizer)
    assert worst(seen.readings(), "D27") == expected


# Basics


@pytest.mark.parametrize(
    ("scale", "shift", "expected"),
    [(1, 0, "clear"), (80, 33, "warning"), (1, 5, "warning"), (0.01, 0, "warning")],
)
def test_d28_inputs_far_from_unit_scale(
    scale: float, shift: float, expected: str
) -> None:
    data = [(x * scale + shift, y) for x, y in batches()[:24]]
    model = build("mlp", normalized=False, depth=2)
    assert worst(examined(model, data).readings, "D28") == expected
    first = nn.Sequential(nn.BatchNorm1d(64), model)
    assert worst(examined(first, data).readings, "D28") == "clear"


def test_d28_one_batch_that_is_not_finite_is_the_first_cause() -> None:
    data = batches()[:24]
    data[3] = (torch.full_like(data[3][0], torch.nan), data[3][1])
    diagnosis = examined(healthy(), data)
    assert diagnosis.named[0] == "D28"
    assert "not finite" in diagnosis.findings[0].evidence
    assert "D01" not in diagnosis.named
    assert {f.severity for f in of(diagnosis.readings, "D01")} == {"not_judged"}


def test_d29_a_norm_that_erases_its_input() -> None:
    class Grouped(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 32)
            self.norm = nn.GroupNorm(groups, 32)
            self.head = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.fc(x)[..., None, None]).flatten(1))

    diagnosis = examined(Grouped(32))
    assert diagnosis.named[0] == "D29"
    assert worst(examined(Grouped(4)).readings, "D29") == "clear"


def test_d29_sequences_of_many_lengths() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8))
    torch.manual_seed(0)
    data = [torch.randn(32, 4, n) for n in (5, 9, 7, 30)]
    assert worst(diagnose(model, data).readings, "D29") == "warning"
    assert worst(diagnose(model, data[:1] * 3).readings, "D29") == "clear"


def test_d34_what_is_wrong_before_any_normalization_is() -> None:
    def found(*layers: nn.Module) -> set[str]:
        torch.manual_seed(0)
        readings = examined(nn.Sequential(*layers)).readings
        return {f.evidence for f in of(readings, "D34") if f.is_alarm}

    def one(*layers: nn.Module) -> str:
        (evidence,) = found(*layers)
        return evidence

    assert not found(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    double = one(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10), nn.Softmax(1))
    assert "already a softmax" in double
    assert "one linear map" in one(nn.Linear(64, 32), nn.Linear(32, 10))
    assert not found(nn.Linear(64, 4), nn.Linear(4, 10))  # a bottleneck
    silent, last = nn.Linear(64, 32), nn.Linear(32, 10)
    nn.init.zeros_(silent.weight)
    assert "same for every input" in one(silent, nn.ReLU(), last)
    # A last layer of zero is a start, and a step ends it.
    nn.init.zeros_(last.weight)
    assert not found(nn.Linear(64, 32), nn.ReLU(), last)


def test_d34_a_start_that_is_far_worse_than_guessing() -> None:
    model = build("mlp")
    clear = of(examined(model).readings, "D34")
    assert {f.severity for f in clear} == {"clear", "not_judged"}
    assert [f.evidence for f in clear if f.severity == "not_judged"] == [
        "its answers say nothing of the targets, as before training"
    ]
    with torch.no_grad():
        model[-1].weight *= 40
    # It costs the first steps, and nothing is lost before them.
    assert worst(examined(model).readings, "D34") == "info"


def test_a_gradient_that_vanishes_is_no_gradient_that_explodes() -> None:
    model = build("mlp", act=nn.Sigmoid, normalized=False, depth=6)
    assert set(examined(model).named) == {"D24"}


def test_the_network_is_the_same_after_all_of_it() -> None:
    model = healthy()
    twin = copy.deepcopy(model)
    examined(model)
    for mine, theirs in zip(
        model.state_dict().values(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    x, _ = batches()[0]
    assert torch.equal(F.relu(model(x)), F.relu(twin(x)))
