"""Batch norms of traced graphs: modules inside the block, the same graph after it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normkit.errors import ArgumentError
from normkit.modeling.graph_norms import (
    GraphBatchNorm,
    graph_model,
    has_graph_norms,
    norms_as_modules,
    with_norm_modules,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3))
    model = nn.Sequential(stem, nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model


X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def graph(*, training: bool) -> fx.GraphModule:
    model = net().train(training)
    size = torch.export.Dim("n", min=2, max=64)
    return torch.export.export(model, (X,), dynamic_shapes=({0: size},)).module()


@pytest.mark.parametrize("training", [True, False])
def test_a_call_is_a_module_under_the_name_of_its_layer(training: bool) -> None:
    module = graph(training=training)
    before, code = copy.deepcopy(module.state_dict()), module.code
    own = module.get_submodule("3").weight
    nodes = [(n.op, n.target, n.args) for n in module.graph.nodes]
    assert has_graph_norms(module)
    with norms_as_modules(module):
        found = {
            name: m
            for name, m in module.named_modules()
            if isinstance(m, GraphBatchNorm)
        }
        assert list(found) == ["0.1", "3"]
        layer = found["0.1"]
        assert (layer.eps, layer.momentum, layer.num_features) == (1e-3, 0.3, 4)
        assert layer.training == training
        assert set(module.state_dict()) == set(before)
        assert found["3"].weight is own
        inside = module(X)
    assert module.code == code
    assert [(n.op, n.target, n.args) for n in module.graph.nodes] == nodes
    for name, tensor in before.items():
        moves = training and ("running" in name or "tracked" in name)
        assert torch.equal(module.state_dict()[name], tensor) != moves
    reference = net().train(training)
    torch.testing.assert_close(inside, reference(X))


def test_statistics_inside_move_those_of_the_graph() -> None:
    module = graph(training=False)
    with norms_as_modules(module):
        layer = module.get_submodule("3")
        assert isinstance(layer, GraphBatchNorm)
        layer.running_mean.fill_(7.0)
    assert bool((module.get_submodule("3").running_mean == 7).all())


def test_the_mode_of_a_module_is_that_of_its_call_afterwards() -> None:
    module = graph(training=True)
    with norms_as_modules(module):
        module.get_submodule("3").training = False
    flags = [
        node.args[5]
        for node in module.graph.nodes
        if node.target is torch.ops.aten.batch_norm.default
    ]
    assert flags == [True, False]
    before = module.get_submodule("3").running_mean.clone()
    module(X)
    assert torch.equal(module.get_submodule("3").running_mean, before)


def test_another_reader_of_the_variance_keeps_the_layers_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) * self.bn.running_var.sqrt()

    model = Scaled().eval()
    model.bn.running_var.uniform_(2, 3)
    x = torch.randn(4, 3)
    # torch 2.6's default, strict, knows no buffer that is read from outside its layer.
    module = torch.export.export(model, (x,), strict=False).module()
    wanted = module(x)
    with norms_as_modules(module):
        layer = module.get_submodule("bn")
        own = layer.running_var
        layer._buffers["running_var"] = torch.full_like(own, 9.0)
        ratio = module(x) / wanted
        layer._buffers["running_var"] = own
    torch.testing.assert_close(ratio, ((own + 1e-5) / (9 + 1e-5)).sqrt().expand(4, 3))


def test_an_exception_inside_puts_the_graph_back() -> None:
    module = graph(training=True)
    code = module.code
    with pytest.raises(KeyError), norms_as_modules(module):
        raise KeyError
    assert module.code == code
    assert not any(isinstance(m, GraphBatchNorm) for m in module.modules())


def test_a_functional_call_with_buffers_of_the_model_is_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, training=False)

    module = fx.symbolic_trace(Functional())
    names = set(module.state_dict())
    with norms_as_modules(module):
        found = [m for m in module.modules() if isinstance(m, GraphBatchNorm)]
        assert len(found) == 1
        assert set(module.state_dict()) == names
        found[0].running_mean.fill_(1.0)
    assert bool((module.mean == 1).all())


def test_one_layer_called_in_two_modes_is_refused_and_left() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            held = self.running_mean, self.running_var
            return F.batch_norm(x, *held, training=True) + F.batch_norm(x, *held)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = Both()

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x)

    module = fx.symbolic_trace(Outer())
    code = module.code
    with pytest.raises(ArgumentError, match="in training"), norms_as_modules(module):
        pass
    assert module.code == code


def test_a_view_shares_the_tensors_and_leaves_the_graph() -> None:
    module = graph(training=False)
    code = module.code
    view = with_norm_modules(module)
    assert module.code == code
    layers = [m for m in view.modules() if isinstance(m, GraphBatchNorm)]
    assert len(layers) == 2
    torch.testing.assert_close(view(X), module(X))
    layers[1].running_mean.fill_(3.0)
    assert bool((module.get_submodule("3").running_mean == 3).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code.
        copied = copy.deepcopy(view)
    torch.testing.assert_close(copied(X), view(X))


def test_other_models_are_as_they_were() -> None:
    model = net()
    assert graph_model(model) is model
    assert with_norm_modules(model) is model
    assert not has_graph_norms(model)
    with norms_as_modules(model):
        pass
