"""Batch norms of graphs in the verbs: calibrated, frozen, diagnosed, watched."""

import copy

import pytest
import torch
from torch import fx, nn

import normkit
from normkit.errors import ArgumentError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 25, 2)),
    )


def data(batches: int = 6) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [2 + 3 * torch.randn(8, 3, 9, 9, generator=draw) for _ in range(batches)]


def program(*, training: bool) -> torch.export.ExportedProgram:
    size = torch.export.Dim("n", min=2, max=64)
    model = net().train(training)
    return torch.export.export(model, (data()[0],), dynamic_shapes=({0: size},))


@pytest.mark.parametrize("order", ["train", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_gets_the_statistics_of_its_model(training: bool, order: str) -> None:
    module, model = program(training=training).module(), net()
    report = normkit.calibrate(module, data(), order=order)
    normkit.calibrate(model, data(), order=order)
    assert [layer.name for layer in report.layers] == ["1", "4"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor)
    old = net().state_dict()
    report.undo(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, old[name])


def test_an_exported_program_is_calibrated_in_place() -> None:
    exported, model = program(training=False), net()
    normkit.calibrate(exported, data())
    normkit.calibrate(model, data())
    torch.testing.assert_close(exported.module()(data()[0]), model.eval()(data()[0]))


def test_a_failure_leaves_the_graph_and_its_tensors() -> None:
    module = program(training=True).module()
    before, code = copy.deepcopy(module.state_dict()), module.code

    def broken():
        yield data()[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        normkit.calibrate(module, broken())
    assert module.code == code
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_call_in_eval_among_calls_in_training_is_frozen() -> None:
    model = net()
    model[4].eval()
    model.training = True
    module = torch.export.export(model, (data()[0],)).module()
    report = normkit.calibrate(module, data())
    assert [layer.name for layer in report.layers] == ["1"]
    assert "frozen" in report.untouched["4"]


def test_freezing_sets_the_calls_to_eval() -> None:
    module = program(training=True).module()
    report = normkit.convert(module, to="frozen")
    assert [layer.name for layer in report.layers] == ["1", "4"]
    before = copy.deepcopy(module.state_dict())
    module(data()[0]).sum().backward()
    for name in ("1.running_mean", "4.running_var"):
        assert torch.equal(module.state_dict()[name], before[name])
    assert module.get_submodule("4").weight.grad is None
    assert module.get_submodule("3").weight.grad is not None
    assert not normkit.convert(module, to="frozen").layers


def test_stale_statistics_of_a_graph_are_found_and_named() -> None:
    module = program(training=False).module()
    for name in ("1", "4"):
        layer = module.get_submodule(name)
        layer.num_batches_tracked.fill_(500)
        layer.running_mean.fill_(9.0)
    found = normkit.diagnose(module, data(20))
    layers = {name for f in found.findings for name in f.layers}
    assert {"D01", "D03"} & set(found.named)
    assert {"1", "4"} & layers
    assert any(norm is not None for norm in (x.norm for x in found.statistics.layers))


def test_a_watched_graph_trains_as_it_would_and_is_measured() -> None:
    def trained(watched: bool) -> tuple[fx.GraphModule, object]:
        module = program(training=True).module()
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        seen = normkit.watch(module, optimizer) if watched else None
        if seen is not None:
            seen.__enter__()
        for x in data():
            module(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if seen is not None:
            seen.__exit__(None, None, None)
        return module, seen

    plain, _ = trained(watched=False)
    module, seen = trained(watched=True)
    assert module.code == plain.code
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    norms = {x.name for x in seen.statistics().layers if x.norm is not None}
    assert norms == {"1", "4"}


@pytest.mark.parametrize("verb", ["watch", "convert"])
def test_an_exported_program_has_to_be_a_module_to_run(verb: str) -> None:
    options = {"to": "frozen"} if verb == "convert" else {}
    with pytest.raises(ArgumentError, match=r"take model = program\.module\(\)"):
        getattr(normkit, verb)(program(training=True), **options)
