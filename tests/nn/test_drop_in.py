"""What looks for a torch.nn layer finds one: signatures, tools, tracing, old files."""

import inspect
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
from ranks import Ranks

BUILDS = {
    "BatchNorm1d": ((3,), (4, 3, 7)),
    "BatchNorm2d": ((3,), (4, 3, 5, 4)),
    "BatchNorm3d": ((3,), (4, 3, 2, 3, 4)),
    "InstanceNorm1d": ((3, 1e-5, 0.1, True, True), (4, 3, 7)),
    "InstanceNorm2d": ((3, 1e-5, 0.1, True, True), (4, 3, 5, 4)),
    "InstanceNorm3d": ((3, 1e-5, 0.1, True, True), (4, 3, 2, 3, 4)),
    "GroupNorm": ((3, 3), (4, 3, 5)),
    "LayerNorm": ((5,), (4, 3, 5)),
    "RMSNorm": ((5,), (4, 3, 5)),
}
each_layer = pytest.mark.parametrize("name", BUILDS)


def built(name: str, namespace: object = normkit.nn) -> tuple[nn.Module, Tensor]:
    arguments, shape = BUILDS[name]
    layer = getattr(namespace, name)(*arguments)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
    return layer, torch.randn(shape)


@each_layer
def test_its_buffers_are_those_of_torchs(name: str) -> None:
    """Averages pair them, `functional_call` asks for all, a trace saves them."""
    layer, x = built(name)
    theirs, _ = built(name, nn)
    layer.train()(x)
    wanted = [key for key, _ in theirs.named_buffers()]
    assert [key for key, _ in layer.named_buffers()] == wanted
    average = torch.optim.swa_utils.AveragedModel(theirs, use_buffers=True)
    average.update_parameters(theirs)
    average.update_parameters(layer)
    y = torch.func.functional_call(layer, dict(layer.state_dict()), (x,), strict=True)
    assert y.shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace warns of what it fixes
        traced = torch.jit.trace(layer.eval(), x)
    theirs.load_state_dict(traced.state_dict())


@each_layer
def test_it_is_an_instance_of_the_layer_of_torch(name: str) -> None:
    layer, _ = built(name)
    assert isinstance(layer, getattr(nn, name))
    # DistributedDataParallel refuses that one on a CPU.
    assert not isinstance(layer, nn.SyncBatchNorm)


@pytest.mark.parametrize("name", [n for n in normkit.nn.__all__ if hasattr(nn, n)])
def test_its_arguments_are_those_of_torch(name: str) -> None:
    theirs = inspect.signature(getattr(nn, name)).parameters
    ours = inspect.signature(getattr(normkit.nn, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default, key
        assert ours[key].kind == parameter.kind, key


@each_layer
def test_its_forward_takes_the_keyword_of_torch(name: str) -> None:
    layer, x = built(name)
    (keyword,) = [
        key
        for key, parameter in inspect.signature(
            getattr(nn, name).forward
        ).parameters.items()
        if key != "self" and parameter.default is parameter.empty
    ]
    torch.testing.assert_close(layer.eval()(**{keyword: x}), layer(x))


@each_layer
def test_a_layer_of_torch_becomes_ours_by_its_class_alone(name: str) -> None:
    """Extras have defaults on the class, so no constructor needs to have run."""
    theirs, x = built(name, nn)
    wanted = theirs.eval()(x)
    kept = dict(theirs.named_parameters())
    theirs.__class__ = getattr(normkit.nn, name)
    torch.testing.assert_close(theirs(x), wanted)
    theirs.train()(x)
    assert all(p is kept[key] for key, p in theirs.named_parameters())


@each_layer
def test_hooks_see_inputs_outputs_and_gradients(name: str) -> None:
    layer, x = built(name)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    layer.register_forward_hook(lambda m, args, y: seen.append("after"))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append("backward"))
    layer(x.requires_grad_()).mul(torch.randn(x.shape)).sum().backward()
    assert seen == ["before", "after", "backward"]


@each_layer
def test_a_symbolic_trace_records_one_call_and_runs_nothing(name: str) -> None:
    layer, x = built(name)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), layer))
    calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert calls == ["0", "1"]
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    # The mode is that of the layer when it runs, not when it was traced.
    for training in (True, False):
        traced.train(training)
        twin, _ = built(name)
        twin.load_state_dict(layer.state_dict())
        torch.testing.assert_close(traced(x), twin.train(training)(x))


def test_a_traced_call_keeps_its_mask() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normkit.nn.LayerNorm(5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    model, x, mask = Padded(), torch.randn(4, 5), torch.arange(5) < 3
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x, mask), model.norm(x, mask=mask))


def test_a_subclass_is_traced_as_a_subclass_of_torch_is() -> None:
    """Recording it as one call, from within its own forward, would run it twice."""
    for namespace in (nn, normkit.nn):

        class Activated(namespace.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(nn.Sequential(Activated(3)))


@each_layer
def test_a_subclass_of_tensor_comes_out_as_one(name: str) -> None:
    class Labelled(Tensor):
        pass

    layer, x = built(name)
    y = layer(x.as_subclass(Labelled))
    assert type(y) is Labelled
    twin, _ = built(name)
    torch.testing.assert_close(y.as_subclass(Tensor), twin(x))


def test_a_subclass_may_change_the_check_of_dimensions() -> None:
    class AnyRank(normkit.nn.BatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
            pass

    x = torch.randn(4, 3, 7)
    torch.testing.assert_close(AnyRank(3)(x), normkit.nn.BatchNorm1d(3)(x))


def test_a_checkpoint_from_before_batches_were_counted_loads() -> None:
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    del old._metadata
    layer = normkit.nn.BatchNorm2d(3)
    assert not any(layer.load_state_dict(dict(old)))
    assert int(layer.num_batches_tracked) == 0


def test_an_instance_norm_checkpoint_from_before_0_4_is_explained() -> None:
    old = nn.InstanceNorm2d(3, track_running_stats=True).state_dict()
    old._metadata = {}
    messages = []
    for namespace in (nn, normkit.nn):
        with pytest.raises(RuntimeError, match="Unexpected running stats") as caught:
            namespace.InstanceNorm2d(3).load_state_dict(old)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_an_unknown_or_missing_key_is_an_error_as_in_torch() -> None:
    for change in (lambda d: d.pop("weight"), lambda d: d.update(more=torch.ones(1))):
        state = nn.BatchNorm2d(3).state_dict()
        change(state)
        for namespace in (nn, normkit.nn):
            with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
                namespace.BatchNorm2d(3).load_state_dict(state)


def test_torch_fuses_it_into_a_convolution() -> None:
    conv = nn.Conv2d(2, 3, 3)
    layer, _ = built("BatchNorm2d")
    x = torch.randn(2, 2, 6, 6)
    fused = nn.utils.fuse_conv_bn_eval(conv.eval(), layer.eval())
    torch.testing.assert_close(fused(x), layer(conv(x)))


def test_torch_recalibrates_it() -> None:
    model = nn.Sequential(normkit.nn.BatchNorm1d(3))
    batches = [k + torch.randn(8, 3) for k in range(4)]
    torch.optim.swa_utils.update_bn(batches, model)
    means = torch.stack([b.mean(0) for b in batches])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))
    assert model[0].momentum == 0.1


def test_torch_converts_it_to_a_synchronized_layer() -> None:
    layer, _ = built("BatchNorm2d")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].weight is layer.weight
    assert model[0].running_mean is layer.running_mean


def two_forwards(rank: int) -> tuple[bool, int]:
    model = nn.Sequential(nn.Linear(4, 3), normkit.nn.BatchNorm1d(3))
    parallel = nn.parallel.DistributedDataParallel(model)
    a, b = torch.randn(2, 8, 4)
    loss = (parallel(a) * torch.randn(8, 3)).sum() + parallel(b).square().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return all(g.isfinite().all() for g in grads), int(model[1].num_batches_tracked)


def test_it_trains_under_distributed_data_parallel_with_two_forwards(
    three_ranks: Ranks,
) -> None:
    """torch#175024: buffers are broadcast in place between the two forwards."""
    assert three_ranks.run(two_forwards) == [(True, 2)] * 3


def test_the_transformer_layer_of_torch_runs_with_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 8)
    for mode in (True, False):
        wanted = layer.train(mode)(x)
        norms = layer.norm1, layer.norm2
        layer.norm1, layer.norm2 = normkit.nn.LayerNorm(8), normkit.nn.LayerNorm(8)
        torch.testing.assert_close(layer.train(mode)(x), wanted)
        layer.norm1, layer.norm2 = norms


@each_layer
def test_jit_trace_records_the_operator_of_torch(name: str) -> None:
    """Exporters know it, and the trace takes shapes that it has not seen."""
    layer, x = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # torch.nn's own
        traced = torch.jit.trace(layer.eval(), x)
    operators = {node.kind() for node in traced.inlined_graph.nodes()}
    short = name.rstrip("123d").removesuffix("Norm").lower()
    assert f"aten::{short}_norm" in operators
    longer = torch.randn(2, *x.shape[1:]) if name[-4:] != "Norm" else x[:2]
    torch.testing.assert_close(traced(longer), layer(longer))


@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_captures_the_layer_whole(name: str, training: bool) -> None:
    layer, x = built(name)
    layer.train(training)
    program = torch.export.export(layer, (x,))
    twin, _ = built(name)
    y = 3 + torch.randn(x.shape)
    torch.testing.assert_close(program.module()(y), twin.train(training)(y))


@pytest.mark.slow
@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_captures_the_layer_whole(name: str, training: bool) -> None:
    layer, x = built(name)
    twin, _ = built(name)
    compiled = torch.compile(layer.train(training), fullgraph=True, backend="aot_eager")
    dy = torch.randn(x.shape)
    for k in range(2):
        a, b = ((k + x).requires_grad_() for _ in range(2))
        y, wanted = compiled(a), twin.train(training)(b)
        torch.testing.assert_close(y, wanted)
        grads = torch.autograd.grad(y, [a, *layer.parameters()], dy)
        truth = torch.autograd.grad(wanted, [b, *twin.parameters()], dy)
        torch.testing.assert_close(grads, truth)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
