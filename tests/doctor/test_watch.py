import copy
import gc
import io
import math
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

import normkit
from doctor.models import batches, build, train
from normkit.doctor import watch
from normkit.errors import ArgumentError


class Shared(nn.Module):
    """One block, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(32, 10)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return self.head(x)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {
        "mlp": build("mlp", dropout=0.3),
        "cnn": build("cnn", dropout=0.1),
        "residual": build("residual"),
        "shared": Shared(),
        "checkpointed": Checkpointed(reentrant=False),
        "checkpointed_reentrant": Checkpointed(reentrant=True),
        "spectral": nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(64, 32)),
            nn.Sigmoid(),
            nn.Linear(32, 10),
        ),
        "one_layer": nn.Linear(64, 10),
    }


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ] + [
        len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
        for p in model.parameters()
    ]


def run(name: str, *, every: int | None) -> tuple[list, list, tuple, nn.Module]:
    """Ten steps; the losses, the state, the random states, the model."""
    model = models()[name]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(7)
    random.seed(7)
    if every is None:
        losses = train(model, 10, optimizer=optimizer)
    else:
        with watch(model, optimizer, every=every) as seen:
            losses = train(model, 10, optimizer=optimizer)
            assert seen.findings() is not None
    gradients = [p.grad for p in model.parameters()]
    state = [*model.state_dict().values(), *gradients]
    return losses, state, (torch.get_rng_state(), random.getstate()), model


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", sorted(models()))
def test_a_watched_run_is_bitwise_the_run_without(name: str, every: int) -> None:
    losses, state, states, model = run(name, every=None)
    losses2, state2, states2, watched = run(name, every=every)
    assert losses == losses2
    assert all(torch.equal(a, b) for a, b in zip(state, state2, strict=True))
    assert torch.equal(states[0], states2[0])
    assert states[1] == states2[1]
    assert hooks_of(watched) == hooks_of(model)


def test_a_step_that_is_not_observed_has_hooks_on_the_model_alone() -> None:
    """So it costs what a handful of calls cost, however many layers there are."""
    seen_inside: list[list[int]] = []

    class Network(Shared):
        def forward(self, x: Tensor) -> Tensor:
            seen_inside.append(hooks_of(self))
            return super().forward(x)

    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    softmax = torch.softmax
    with watch(model, optimizer, every=3):
        for step in range(5):
            train(model, 1, optimizer=optimizer)
            # Those of the layers stay until the next call; what they do, they did.
            seen_inside[step].append(torch.softmax is softmax)
    root = len(hooks_of(nn.Module()))
    own = [1, 1, *[0] * (root - 2)]
    observed, *idle = seen_inside
    assert sum(observed) > 10
    for hooks in (idle[0], idle[1], idle[3]):
        assert hooks[:root] == own
        assert sum(hooks[root:-1]) == 0
        assert hooks[-1]


def test_no_hook_is_left_after_an_exception() -> None:
    model = build("cnn")
    before = hooks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        with watch(model, optimizer):
            train(model, 2, optimizer=optimizer)
            model(torch.zeros(3, 7))

    with pytest.raises(RuntimeError, match="unflatten"):
        step()
    assert hooks_of(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not _global_optimizer_post_hooks


def test_no_activation_outlives_its_step() -> None:
    model = build("cnn")
    x, y = batches()[0]

    def large() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.numel() > 1000 for o in gc.get_objects())

    before = large()
    with watch(model) as seen:
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        del loss
        assert large() == before
        assert seen.history["layers"]
        assert large() == before


def test_a_copy_or_a_pickle_of_a_watched_model_reports_to_nobody() -> None:
    model = build("mlp")
    x, y = batches()[0]
    with watch(model) as seen:
        nn.functional.cross_entropy(model(x), y).backward()
        twin = copy.deepcopy(model)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
        assert pickle.dumps(model)
        for double in (twin, other):
            nn.functional.cross_entropy(double(x), y).backward()
        assert seen.steps == 1
        assert seen.history["steps"] == [0]


def one_step(model: nn.Module, x: Tensor) -> dict:
    with watch(model) as seen:
        (model(x) ** 2).sum().backward()
    return seen.history["layers"]


def test_the_recorded_numbers_are_those_of_the_definitions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight *= 8
        model[2].bias[1] = -50.0  # a dead unit
    x = torch.randn(32, 6)
    z1 = model[0](x)
    h1 = torch.sigmoid(z1)
    z2 = model[2](h1)
    for t in (z1, h1, z2):
        t.retain_grad()
    (torch.relu(z2) ** 2).sum().backward()
    layers = one_step(model, x)
    assert list(layers) == ["0", "1", "2", "3"]
    for name, t in (("1", z1), ("2", h1), ("3", z2)):
        t64 = t.detach().double()
        assert layers[name]["input_mean"][0] == pytest.approx(t64.mean().item(), 1e-5)
        std = t64.std(correction=0).item()
        assert layers[name]["input_std"][0] == pytest.approx(std, 1e-5)
        band = torch.quantile(t64[:, 0], torch.tensor([0.15, 0.5, 0.85]).double())
        found = [layers[name][k][0] for k in ("low", "middle", "high")]
        assert found == pytest.approx(band.tolist(), abs=1e-5)
    slope = h1 * (1 - h1) * 4
    share = (slope < 0.05).double().mean().item()
    assert 0.1 < share < 0.9
    assert layers["1"]["saturated"][0] == pytest.approx(share)
    dead = (z2 <= 0).all(dim=0)
    assert dead[1]
    assert not dead.all()
    assert layers["3"]["dead"][0] == dead.double().mean()
    assert layers["0"]["dead"] == [None]
    rms = h1.detach().square().mean().sqrt().item()
    assert layers["1"]["output_rms"][0] == pytest.approx(rms, 1e-5)
    for name, t in (("0", z1), ("1", h1), ("2", z2)):
        norm = t.grad.norm().item()
        assert layers[name]["gradient_norm"][0] == pytest.approx(norm, 1e-5)
    weight = model[2].weight
    assert layers["2"]["weight_norm"][0] == pytest.approx(weight.norm().item(), 1e-5)


def test_the_update_ratio_is_what_the_optimizer_did() -> None:
    model = build("mlp")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = batches()[0]
    expected, gradients = [], []
    with watch(model, optimizer) as seen:
        for _ in range(3):
            old = model[3].weight.detach().clone()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gradients.append(model[3].weight.grad.norm().item())
            optimizer.step()
            change = (model[3].weight.detach() - old).norm() / old.norm()
            expected.append(change.item())
    layer = seen.history["layers"]["3"]
    assert layer["update_ratio"] == pytest.approx(expected, rel=1e-4)
    assert layer["weight_gradient_norm"] == pytest.approx(gradients, rel=1e-4)


def test_an_observed_step_has_its_own_gradient_and_update() -> None:
    """Once the weights were cloned on every step, and the last one's numbers kept."""
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected, gradients = [], []
    with watch(model, optimizer, every=3) as seen:
        for x, y in batches()[:5]:
            old = model[3].weight.detach().clone()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gradients.append(model[3].weight.grad.norm().item())
            optimizer.step()
            expected.append(((model[3].weight - old).norm() / old.norm()).item())
            assert not seen._recorder._updates._old
            assert not seen._recorder._updates._handles
    layer = seen.history["layers"]["3"]
    assert layer["update_ratio"] == pytest.approx(expected[::3], rel=1e-4)
    assert layer["weight_gradient_norm"] == pytest.approx(gradients[::3], rel=1e-4)
    weight = next(s.weight for s in seen.statistics().layers if s.name == "3")
    assert weight is not None
    assert weight.updated_at == (0, 3)


def test_units_lie_along_the_dimension_that_a_norm_names() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5, 4)
    for norm, units in (
        (normkit.nn.LayerNorm(3, channel_dim=1), 3),
        (nn.LayerNorm(4), 4),
        (nn.LayerNorm((3, 5, 4)), 3),  # where those of the convolution were
    ):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU())
        with watch(model) as seen:
            model(x).sum().backward()
        found = {layer.name: layer.units for layer in seen.statistics().layers}
        assert found["1"] == found["2"] == units


def test_values_before_and_after_a_norm_are_counted_while_training() -> None:
    model = build("cnn")
    with watch(model, every=2) as seen:
        train(model, 12)
    norms = [s for s in seen.statistics().layers if s.role == "norm"]
    assert len(norms) == 4
    for layer in norms:
        # One of every five observed steps, of 64 images of 8 channels of 8x8; each 9th
        # value is counted, for each 8th would be of one column.
        assert layer.before.counts.sum() == layer.after.counts.sum() == 3641
        middle = sum(layer.after.edges) / len(layer.after.edges)
        assert middle == pytest.approx(0.0, abs=0.2)


def test_an_in_place_activation_shows_what_it_was_given() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(6, 5)
    x = torch.randn(64, 6)
    given = linear(x).detach()
    layers = one_step(nn.Sequential(linear, nn.ReLU(inplace=True)), x)
    assert layers["1"]["input_mean"][0] == pytest.approx(given.mean().item(), 1e-5)
    assert layers["0"]["output_mean"][0] == pytest.approx(given.mean().item(), 1e-5)
    after = given.relu().mean().item()
    assert layers["1"]["output_mean"][0] == pytest.approx(after, 1e-5)


def test_a_shared_layer_counts_all_its_calls() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(5, 5)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.again = layer, layer

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.layer(x))

    x = torch.randn(40, 5)
    both = torch.cat([x, layer(x).detach()]).double()
    layers = one_step(Twice(), x)
    assert list(layers) == ["layer"]
    mean, std = both.mean().item(), both.std(correction=0).item()
    assert layers["layer"]["input_mean"][0] == pytest.approx(mean, rel=1e-5)
    assert layers["layer"]["input_std"][0] == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_counted_once_and_has_its_gradient(
    reentrant: bool,
) -> None:
    torch.manual_seed(1)
    model = Checkpointed(reentrant=reentrant)
    model.block[2].p = 0.0
    x, y = batches()[0]
    given = model.first(x)
    middle = model.block[0](given)
    middle.retain_grad()
    out = model.head(model.block[1](middle))
    nn.functional.cross_entropy(out, y).backward()
    with watch(model) as seen:
        nn.functional.cross_entropy(model(x), y).backward()
    found = seen.statistics().layers
    layer = next(s for s in found if s.name == "block.0")
    assert layer.samples == len(x)
    assert layer.input.count == given.numel()
    assert layer.gradient_norm[0] == pytest.approx(middle.grad.norm().item(), rel=1e-4)


def test_only_training_steps_are_observed() -> None:
    model = build("mlp")
    x, y = batches()[0]
    with watch(model, every=2) as seen:
        for _ in range(4):
            model.eval()
            model(x)
            model.train()
            with torch.no_grad():
                model(x)
            nn.functional.cross_entropy(model(x), y).backward()
            seen.log(loss=1.0)
    assert seen.steps == 4
    assert seen.history["steps"] == [0, 2]
    assert seen.history["logged"]["loss"] == [[0, 1.0], [1, 1.0], [2, 1.0], [3, 1.0]]


def test_gradients_of_two_calls_in_one_step_are_not_lost() -> None:
    """A discriminator sees real and fake samples before one backward."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    x, _ = batches()[0]
    with watch(model) as seen:
        (model(x).mean() - model(-x).mean()).backward()
    norms = seen.history["layers"]["0"]["gradient_norm"]
    assert norms[0] is None
    assert norms[1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_in_float32_or_better(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid()).to(dtype)
    x = torch.randn(512, 16, dtype=dtype) + 100
    layers = one_step(model, x)
    exact = x.double().std(correction=0).item()
    assert layers["0"]["input_std"][0] == pytest.approx(exact, rel=1e-5)


def test_autocast_is_watched() -> None:
    model = build("cnn")
    x, y = batches()[0]
    with watch(model) as seen, torch.autocast("cpu", torch.bfloat16):
        nn.functional.cross_entropy(model(x), y).backward()
    layers = seen.history["layers"]
    assert all(layer["output_rms"][0] > 0 for layer in layers.values())


def test_a_model_of_one_layer_is_seen() -> None:
    model = nn.Linear(64, 10)
    x, y = batches()[0]
    with watch(model) as seen:
        for _ in range(2):
            nn.functional.cross_entropy(model(x), y).backward()
    layer = seen.history["layers"][""]
    assert layer["input_mean"] == pytest.approx([x.mean().item()] * 2, rel=1e-4)
    assert None not in layer["gradient_norm"]


def test_values_that_are_not_finite_are_shown_as_such() -> None:
    x = torch.randn(8, 4)
    x[0, 0] = float("nan")
    layers = one_step(nn.Sequential(nn.Sigmoid(), nn.Linear(4, 2)), x.requires_grad_())
    assert layers["0"]["input_mean"][0] != layers["0"]["input_mean"][0]
    assert layers["0"]["middle"][0] != layers["0"]["middle"][0]
    assert layers["0"]["saturated"][0] == pytest.approx(1 / 32)


def test_a_model_that_was_never_called_is_an_error() -> None:
    with watch(build("mlp")) as seen:
        pass
    with pytest.raises(ArgumentError, match="no module of the watched Sequential"):
        seen.readings()


def test_statistics_that_move_with_the_weights_are_not_called_stale() -> None:
    model = build("mlp", momentum=0.001)
    with watch(model) as seen:
        train(model, 30)
    d01 = [f for f in seen.readings() if f.id == "D01"]
    assert d01
    assert {f.severity for f in d01} == {"not_judged"}
    assert {"D03", "D04"} <= {f.id for f in seen.findings()}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="every=0"):
        watch(build("mlp"), every=0)
    with pytest.raises(ArgumentError, match="step hooks"):
        watch(build("mlp"), optimizer=object())


def test_the_report_holds_untrusted_names_as_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    pytest.importorskip("jinja2")
    model = nn.Sequential()
    model.add_module("first", nn.Linear(64, 10))
    model.add_module(name, nn.Tanh())
    with watch(model) as seen:
        train(model, 3)
    seen.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    assert "&lt;img" in page


def test_frozen_layers_are_not_said_to_stand_still() -> None:
    """Found by a careful fine-tuning program among the bugs of real programs."""
    model = build("mlp")
    for parameter in model[:-1].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model[-1].parameters(), 0.05)
    with watch(model, optimizer) as seen:
        train(model, 8, optimizer=optimizer)
    assert "D24" not in {f.id for f in seen.findings()}
    layers = seen.history["layers"]
    assert set(layers["0"]["update_ratio"]) == {None}
    assert None not in list(layers.values())[-1]["update_ratio"]


@pytest.mark.parametrize("shape", [(6,), (5, 6), (5, 6, 3), (5, 6, 2, 3), (5, 2, 3, 6)])
def test_a_unit_is_alive_where_one_of_its_values_is_not_zero(shape: tuple) -> None:
    from normkit.doctor.probes.tensor_statistics import alive_units

    draw = torch.Generator().manual_seed(0)
    for unit_dim in range(len(shape)):
        y = torch.rand(shape, generator=draw) * torch.randint(-1, 2, shape)
        y = torch.where(torch.rand(shape, generator=draw) < 0.8, 0.0, y)
        y.flatten()[0] = math.nan
        others = tuple(dim for dim in range(y.dim()) if dim != unit_dim)
        expected = (y != 0).any(dim=others) if others else y != 0
        assert torch.equal(alive_units(y, unit_dim), expected)


def test_a_scripted_model_is_refused_as_the_watch_begins() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    with pytest.raises(ArgumentError, match="watch the module before"):
        watch(model)
