"""Every verb takes every shape of batch, and says what is wrong with any other."""

from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normkit
from normkit.errors import ArgumentError, ShapeError
from normkit.modeling.batch import inputs_of

Options = dict[str, Any]
LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Scales its input by `scale`, if one is given; takes labels and ignores them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Any = 1.0, labels: Any = None) -> Tensor:
        return self.last(self.norm(self.first(x * scale)).relu())


def x() -> Tensor:
    return torch.randn(16, 6)


def y() -> Tensor:
    return torch.randint(3, (16,))


class Encoding(UserDict[str, Any]):
    """A mapping that is no dict and moves itself, as transformers' BatchEncoding."""

    def to(self, device: Any) -> "Encoding":
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


BY_LABEL: Options = {"targets": lambda batch: batch["labels"]}
SHAPES: dict[str, tuple[Callable[[], Any], Options]] = {
    "(x, y)": (lambda: (x(), y()), {}),
    "[x, y]": (lambda: [x(), y()], {}),
    "((x, s), y)": (lambda: ((x(), torch.ones(1)), y()), {}),
    "[[x, s], y]": (lambda: [[x(), torch.ones(1)], y()], {}),
    "({x: s:}, y)": (lambda: ({"x": x(), "scale": torch.ones(1)}, y()), {}),
    "(x, s, y)": (
        lambda: (x(), torch.ones(1), y()),
        {
            "forward": lambda model, batch: model(batch[0], batch[1]),
            "targets": lambda batch: batch[2],
        },
    ),
    "{x: labels:}": (lambda: {"x": x(), "labels": y()}, BY_LABEL),
    "mapping": (lambda: Encoding(x=x(), labels=y()), BY_LABEL),
    "x": (x, {"targets": lambda batch: torch.zeros(len(batch), dtype=torch.int64)}),
}

Verb = Callable[[nn.Module, Any, Options], Any]


def watched(model: nn.Module, batches: Any, options: Options) -> Any:
    with normkit.watch(model) as seen:
        for batch in batches:
            if "forward" in options:
                out = options["forward"](model, batch)
            else:
                inputs = inputs_of(batch)
                named = inputs if hasattr(inputs, "keys") else {}
                given = inputs if isinstance(inputs, tuple) else (inputs,)
                out = model(**named) if named else model(*given)
            out.sum().backward()
    return seen.history


def calls(options: Options) -> Options:
    return {name: value for name, value in options.items() if name == "forward"}


def example(batches: Any, options: Options) -> Any:
    batch = next(iter(batches))
    return batch if "forward" in options else inputs_of(batch)


VERBS: dict[str, Verb] = {
    "calibrate": lambda m, b, o: normkit.calibrate(m, b, **calls(o)),
    "diagnose": lambda m, b, o: normkit.diagnose(m, b, LOSS, **o),
    "explain_gap": lambda m, b, o: normkit.explain_gap(m, b, **o),
    "convert": lambda m, b, o: normkit.convert(m, to="group", batches=b, **calls(o)),
    "fuse": lambda m, b, o: normkit.convert(
        m, to="normkit", example_inputs=example(b, o), **calls(o)
    ),
    "initialize": lambda m, b, o: normkit.initialize(
        m, example_inputs=example(b, o), **calls(o)
    ),
    "watch": watched,
}
TAKE_BATCHES = ("calibrate", "diagnose", "explain_gap", "convert")
FROM_LOADER = ("calibrate", "diagnose", "explain_gap")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_a_batch(verb: str, shape: str) -> None:
    make, options = SHAPES[shape]
    assert VERBS[verb](Net(), [make() for _ in range(3)], options) is not None


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_a_generator(verb: str) -> None:
    def batches() -> Iterator[Any]:
        for _ in range(3):
            yield x(), y()

    assert VERBS[verb](Net(), batches(), {}) is not None


def test_the_inputs_of_every_shape_reach_the_layer() -> None:
    for make, options in SHAPES.values():
        model = Net()
        batches = [make() for _ in range(2)]
        torch.manual_seed(0)
        report = normkit.calibrate(model, batches, **calls(options))
        assert report.layers[0].count == 32
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: Any, seen: list[Tensor] = seen) -> None:
            seen.append(args[0])

        handle = model.norm.register_forward_pre_hook(keep)
        for batch in batches:
            # By hand: the first item or the mapping, as each shape says.
            given = batch
            if isinstance(batch, tuple | list):
                given = batch[0]
            if isinstance(given, tuple | list):
                given = given[0]
            model(given if isinstance(given, Tensor) else given["x"])
        handle.remove()
        torch.testing.assert_close(
            report.layers[0].mean.float(), torch.cat(seen).mean(0).detach()
        )


@pytest.mark.parametrize("verb", TAKE_BATCHES)
def test_a_data_set_for_a_loader_is_told_to_be_wrapped(verb: str) -> None:
    data = TensorDataset(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"data set \(TensorDataset\).*DataLoader"):
        VERBS[verb](Net(), data, {})
    assert VERBS[verb](Net(), DataLoader(data, batch_size=4), {}) is not None


@pytest.mark.parametrize("verb", TAKE_BATCHES)
def test_a_single_batch_is_told_to_be_wrapped(verb: str) -> None:
    with pytest.raises(ArgumentError, match=r"one Tensor.*list"):
        VERBS[verb](Net(), x(), {})


@pytest.mark.parametrize("verb", TAKE_BATCHES)
def test_a_model_and_a_loader_that_are_swapped_are_named(verb: str) -> None:
    with pytest.raises(ArgumentError, match=rf"list for the model.*{verb}\(model"):
        VERBS[verb]([(x(), y())], Net(), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", [*TAKE_BATCHES, "initialize"])
def test_a_class_is_no_model(verb: str) -> None:
    with pytest.raises(ArgumentError, match=f"{verb} got the class Net.*an instance"):
        VERBS[verb](Net, [(x(), y())], {})  # type: ignore[arg-type]


def test_a_class_is_no_loss_and_no_metric() -> None:
    with pytest.raises(ArgumentError, match=r"loss_fn=CrossEntropyLoss\(\)"):
        normkit.diagnose(Net(), [(x(), y())], nn.CrossEntropyLoss)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="metric= is a str; it must be a function"):
        normkit.explain_gap(Net(), [(x(), y())], "accuracy")  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", TAKE_BATCHES)
def test_a_batch_that_does_not_fit_shows_both_arguments(verb: str) -> None:
    class Two(Net):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, scale)

    with pytest.raises(ArgumentError, match=r"forward=.*targets=") as told:
        VERBS[verb](Two(), [(x(), torch.ones(1), y())], {})
    assert "tuple of tensor(16, 6), tensor(1,), tensor(16,)" in str(told.value)
    assert "missing a required argument: 'scale'" in str(told.value)


@pytest.mark.parametrize("verb", TAKE_BATCHES)
def test_an_error_of_the_model_itself_is_passed_on(verb: str) -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + "no tensor"  # type: ignore[operator]

    with pytest.raises(TypeError) as told:
        VERBS[verb](Failing(), [(x(), y())], {})
    assert not isinstance(told.value, ArgumentError)


@pytest.mark.parametrize("library", [nn, normkit.nn], ids=["torch", "normkit"])
@pytest.mark.parametrize("verb", [*TAKE_BATCHES, "initialize"])
def test_a_wrong_number_of_channels_names_the_layer(verb: str, library: Any) -> None:
    model = nn.Sequential(nn.Identity(), library.BatchNorm2d(3), nn.Flatten())
    batches = [(torch.randn(4, 5, 2, 2), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ShapeError, match=r"layer '1'.*requires 3 channels.*got 5"):
        VERBS[verb](model, batches, {})


def test_a_calibration_of_nothing_gives_the_reason() -> None:
    with pytest.raises(ArgumentError, match="no layer with running statistics"):
        normkit.calibrate(nn.Linear(6, 3), [x()])
    frozen = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8).eval())
    with pytest.raises(ArgumentError, match=r"'1': frozen.*layers="):
        normkit.calibrate(frozen, [x()])


def test_an_average_of_a_model_in_eval_mode_is_calibrated() -> None:
    average = torch.optim.swa_utils.AveragedModel(Net().eval())
    report = normkit.calibrate(average, [x()])
    assert [layer.name for layer in report.layers] == ["norm"]
    report.undo(average)


@pytest.mark.parametrize("verb", [*FROM_LOADER, "initialize", "fuse", "watch"])
def test_a_model_without_values_is_refused(verb: str) -> None:
    with pytest.raises(ArgumentError, match=r"meta device.*'first.weight'"):
        VERBS[verb](Net().to("meta"), [(x(), y())], {})


def test_weights_that_each_call_fetches_may_be_on_meta() -> None:
    model = Net()
    held = model.first.weight.data

    def fetch(module: nn.Module, _: Any) -> None:
        module._parameters["weight"] = nn.Parameter(held)

    def drop(module: nn.Module, _: Any, __: Any) -> None:
        module._parameters["weight"] = nn.Parameter(held.to("meta"))

    model.first.register_forward_pre_hook(fetch)
    model.first.register_forward_hook(drop)
    drop(model.first, None, None)
    assert normkit.calibrate(model, [x(), x()]).batches == 2


class Force(nn.Module):
    """The derivative of a network, taken in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8)),
            nn.Linear(8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        e = self.energy(x).square().sum()
        return torch.autograd.grad(e, x, create_graph=True)[0]


@pytest.mark.filterwarnings("error")
def test_a_forward_that_differentiates_runs_with_gradients() -> None:
    torch.manual_seed(0)
    model, loss = Force(), nn.MSELoss()
    data = [(3 + x(), torch.randn(16, 6)) for _ in range(10)]
    values = model.energy[0](torch.cat([x for x, _ in data])).detach()
    found = normkit.diagnose(model, data, loss, gradient_batches=4)
    layers = {layer.name: layer for layer in found.statistics.layers}
    norm = layers["energy.1"].norm
    assert int(norm.in_training.pooled.count[0]) == 160
    assert torch.allclose(norm.in_training.pooled.mean, values.double().mean(0))
    assert int(layers["energy.3"].before.counts.sum()) == 160 * 8

    gap = normkit.explain_gap(model, data, lambda o, t: -loss(o, t))
    model.eval()
    right = -sum(float(loss(model(x), t).detach()) for x, t in data) / 10
    assert gap.running == pytest.approx(right)

    with torch.inference_mode():
        report = normkit.calibrate(model, data)
    assert [layer.count for layer in report.layers] == [160.0]
    assert torch.allclose(model.energy[1].running_mean, values.mean(0), atol=1e-5)


def test_the_gradients_of_layers_are_those_of_the_loss_alone() -> None:
    torch.manual_seed(0)
    model, loss = Force(), nn.MSELoss()
    data = [(x(), torch.randn(16, 6))]
    found = normkit.diagnose(model, data, loss, gradient_batches=1)
    first = found.statistics.layers[0]

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    kept: list[Tensor] = []
    model.energy[0].register_forward_hook(keep)
    (gradient,) = torch.autograd.grad(loss(model(data[0][0]), data[0][1]), kept)
    assert first.gradient_norm[0] == pytest.approx(float(gradient.norm()), rel=1e-4)
