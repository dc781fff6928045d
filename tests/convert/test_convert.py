"""One normalization for another in a whole model, and back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.convert import convert, settings_from, settings_of
from normkit.errors import ArgumentError


class Activated(nn.BatchNorm2d):
    """Behaviour of its own around torch's layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ByItself(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, training=True)


def network(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    shared = norm(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False),
        shared,
        nn.Conv2d(4, 4, 1, bias=False),
        shared,
        Activated(4),
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    y = model(x)
    optimizer.zero_grad()
    (y * y.detach().cos()).sum().backward()
    optimizer.step()
    return y.detach()


@pytest.mark.parametrize("to", ["sync", "ghost", "normkit"])
def test_converting_changes_no_step_of_training(to: str) -> None:
    """Parameters, optimizer state, hooks, sharing and subclass behaviour stay."""
    model = network()
    twin = copy.deepcopy(model)
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (model, twin)
    ]
    x = torch.randn(6, 3, 5, 5)
    seen: list[Any] = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    step(model, optimizers[0], x)
    step(twin, optimizers[1], x)
    kept = dict(model.state_dict(keep_vars=True))
    options = {"ghost_size": 6} if to == "ghost" else {}
    report = convert(model, to=to, **options)
    assert report.model is model
    assert [layer.name for layer in report.layers] == ["1", "4"]
    assert model[1] is model[3]
    assert all(v is kept[k] for k, v in model.state_dict(keep_vars=True).items())
    for _ in range(2):
        torch.testing.assert_close(
            step(model, optimizers[0], x), step(twin, optimizers[1], x)
        )
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert len(seen) == 6
    convert(model, to="torch")
    assert [type(m) for m in model] == [type(m) for m in twin]
    assert vars(model[1]).keys() == vars(twin[1]).keys()
    assert dict(model[1].named_buffers()).keys() == dict(twin[1].named_buffers()).keys()
    torch.testing.assert_close(model(x), twin(x))


def test_torch_187298_a_subclass_keeps_its_activation() -> None:
    model = nn.Sequential(Activated(4))
    x = torch.randn(6, 4, 3, 3)
    wanted = model(x)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(theirs[0]) is nn.SyncBatchNorm
    convert(model, to="sync")
    layer = model[0]
    assert isinstance(layer, Activated)
    assert isinstance(layer, normkit.nn.SyncBatchNorm)
    torch.testing.assert_close(model(x), wanted)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(layer)
        torch.testing.assert_close(twin(x), wanted)
    convert(model, to="torch")
    assert type(model[0]) is Activated


def test_what_cannot_be_carried_is_refused_by_name_and_nothing_changes() -> None:
    replaced = nn.BatchNorm2d(4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.Sequential(
        nn.BatchNorm2d(4), ByItself(4), replaced, nn.LazyBatchNorm2d()
    )
    with pytest.raises(ArgumentError) as caught:
        convert(model, to="sync")
    for words in (
        "'1': the forward of ByItself",
        "'2': its forward",
        "'3': it is lazy",
    ):
        assert words in str(caught.value)
    assert type(model[0]) is nn.BatchNorm2d
    report = convert(model, to="sync", strict=False)
    assert [layer.name for layer in report.layers] == ["0"]
    assert list(report.untouched) == ["1", "2", "3"]
    assert "left as it is, it is lazy" in report.to_text()
    assert report.to_json()["to"] == "sync"


def test_frozen_and_back_keeps_modes_and_gradients() -> None:
    model = network().train()
    model[4].weight.requires_grad_(False)
    model(torch.randn(6, 3, 5, 5)).square().sum().backward()
    optimizer = torch.optim.AdamW(model[1].parameters(), 0.1)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 3, 5, 5)
    wanted = copy.deepcopy(model).eval()(x)
    convert(model, to="frozen")
    optimizer.step()  # between backward and step: no last move, no decay
    model.train()
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model.state_dict(), state)
    assert not any(p.requires_grad for p in model[1].parameters())
    convert(model, to="torch")
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].training
    assert model[1].weight.requires_grad
    assert not model[4].weight.requires_grad
    assert "is_frozen" not in vars(model[1])


def test_every_norm_has_a_namesake_both_ways() -> None:
    model = nn.Sequential(
        *(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4)),
        *(nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.BatchNorm3d(4)),
    )
    before = [type(m) for m in model]
    report = convert(model, to="normkit")
    assert [type(m) for m in model] == [
        getattr(normkit.nn, cls.__name__) for cls in before
    ]
    assert len(report.layers) == 7
    assert convert(model, to="normkit").layers == ()
    convert(model, to="torch")
    assert [type(m) for m in model] == before


def test_a_single_layer_is_a_model() -> None:
    layer = nn.BatchNorm1d(3)
    assert convert(layer, to="sync").layers[0].name == ""
    assert isinstance(layer, normkit.nn.SyncBatchNorm)


def test_opacus_472_group_norm_matches_batch_norm_on_data() -> None:
    model = network()[:3].append(nn.BatchNorm2d(4, affine=False)).double().train()
    x = torch.randn(64, 3, 6, 6).double()
    with torch.no_grad():
        for _ in range(60):
            model(x)
    model.eval()
    wanted = model(x)
    kept, blind = copy.deepcopy(model), copy.deepcopy(model)
    parameters = list(model.parameters())
    convert(blind, to="group", num_groups=2)
    report = convert(model, to="group", num_groups=2, batches=list(x.split(20)))
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=False))
    assert isinstance(model[1], nn.GroupNorm)
    assert model[1].num_groups == 2
    assert not list(model.buffers())
    errors = [(m(x) - wanted).square().mean() for m in (model, blind)]
    assert errors[0] < errors[1]
    # The first layer alone, against a solved least squares problem.
    h = kept[0](x)
    z = nn.functional.group_norm(h, 2)[:, 1].flatten()
    y = kept[1](h)[:, 1].flatten()
    truth = torch.linalg.lstsq(
        torch.stack([z, torch.ones_like(z)], 1), y[:, None]
    ).solution.flatten()
    found = torch.stack([model[1].weight[1], model[1].bias[1]])
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)
    assert all(0 < layer.explained <= 1 for layer in report.layers)
    assert not model.training
    assert not model[1]._forward_pre_hooks


def test_arguments_that_do_not_belong_together_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    for options, words in (
        ({"to": "batch"}, "must be one of"),
        ({"to": "ghost"}, "which needs it"),
        ({"to": "sync", "ghost_size": 4}, "belongs to to='ghost'"),
        ({"to": "torch", "process_group": "0"}, "belongs to to='sync'"),
        ({"to": "sync", "batches": []}, "belongs to to='group'"),
        ({"to": "group", "batches": []}, "no batch reached 2 of 2"),
    ):
        with pytest.raises(ArgumentError, match=words):
            convert(model, **options)
    assert all(type(m) is nn.BatchNorm2d for m in model)


def test_an_error_on_the_way_undoes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from normkit.convert import run

    model = network()
    model(torch.randn(6, 3, 5, 5)).square().sum().backward()
    before = [dict(vars(m)) for m in model]
    honest, calls = run.swap_class, []

    def fails(module: nn.Module, *args: Any) -> None:
        calls.append(module)
        honest(module, *args)
        if len(calls) == 2:
            raise KeyError

    monkeypatch.setattr(run, "swap_class", fails)
    with pytest.raises(KeyError):
        convert(model, to="frozen")
    assert [type(m) for m in model][1:] == [
        *(nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, Activated)
    ]
    assert [vars(m).keys() for m in model] == [b.keys() for b in before]
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert model[1].training


def test_a_batch_norm_of_a_class_of_its_own_is_left_and_reported() -> None:
    """Torchvision's FrozenBatchNorm2d, and in-place ABN."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, *buffers: str) -> None:
            super().__init__()
            for name in ("running_mean", "running_var", *buffers):
                self.register_buffer(name, torch.ones(3))

    model = nn.Sequential(FrozenBatchNorm2d("weight", "bias"), FrozenBatchNorm2d())
    for to in ("sync", "frozen", "ghost", "normkit", "torch", "group"):
        size = {"ghost_size": 2} if to == "ghost" else {}
        left = convert(model, to=to, **size).untouched  # type: ignore[arg-type]
        assert "frozen by its class" in left["0"]
        assert "a batch norm by its buffers" in left["1"]


@pytest.mark.parametrize("system", ["keras", "flax", "onnx", "torch"])
def test_torch_15298_the_conventions_of_other_systems(system: str) -> None:
    """Three steps of each system's own recurrence."""
    decay = {"keras": 0.8, "flax": 0.8, "onnx": 0.8, "torch": 0.2}[system]
    layer = normkit.nn.BatchNorm1d(2, **settings_from(system, momentum=decay)).double()
    mean, var = torch.zeros(2).double(), torch.ones(2).double()
    for _ in range(3):
        x = torch.randn(7, 2).double()
        layer(x)
        if system == "torch":
            mean, var = 0.8 * mean + 0.2 * x.mean(0), 0.8 * var + 0.2 * x.var(0)
        else:
            spread = x.var(0, correction=0)
            mean = mean * decay + x.mean(0) * (1 - decay)
            var = var * decay + spread * (1 - decay)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert settings_of(layer, system)["momentum"] == pytest.approx(decay)


def test_conventions_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ArgumentError, match="must be one of 'torch', 'keras'"):
        settings_from("caffe")
    with pytest.raises(ArgumentError, match=r"\[0, 1\]"):
        settings_from("keras", momentum=99.0)
    with pytest.raises(ArgumentError, match="momentum=None"):
        settings_of(normkit.nn.BatchNorm1d(2, momentum=None), "keras")


REFUSES_EPS_OF_0 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@pytest.mark.parametrize("to", ["normkit", "sync", "frozen"])
def test_an_eps_of_0_does_what_it_does_in_torch(to: str) -> None:
    """In eval it is used as it is; a training step raises what torch 2.13 raises."""
    model = nn.Sequential(nn.BatchNorm1d(3, eps=0.0))
    model[0].running_var.uniform_(0.5, 2)
    x = torch.randn(8, 3)
    wanted = model.eval()(x)
    if REFUSES_EPS_OF_0:
        with pytest.raises(ValueError, match="eps must be positive during training"):
            model.train()(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    convert(model, to=to)
    torch.testing.assert_close(model.eval()(x), wanted)
    if to == "frozen":  # is never in training mode
        torch.testing.assert_close(model.train()(x), wanted)
    else:
        with pytest.raises(ValueError, match="eps must be positive during training"):
            model.train()(x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
