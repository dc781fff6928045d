"""Every layer under torch.compile, export, autocast and torch.func."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import normkit.functional
import normkit.nn as n
from normkit.errors import DerivativeError
from transforms.compiling import fresh_compiler

C = 4
NOW = {"renorm_from": 0, "d_max_at": 0, "r_max_at": 0}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch 1-d": (lambda: n.BatchNorm1d(C), (6, C)),
    "batch 2-d": (lambda: n.BatchNorm2d(C), (6, C, 3, 5)),
    "batch, channels last": (lambda: n.BatchNorm1d(C, channel_dim=-1), (6, 5, C)),
    "renorm": (lambda: n.BatchRenorm1d(C, **NOW), (6, C, 5)),
    "per activation": (lambda: n.PerActivationBatchNorm((C, 5)), (6, C, 5)),
    "recurrent": (lambda: n.RecurrentBatchNorm(C, 5, first_weight=1.0), (5, 6, C)),
    "whitening, zca": (lambda: n.WhiteningBatchNorm(C, 2), (16, C)),
    "whitening, newton": (lambda: n.WhiteningBatchNorm(C, method="newton"), (16, C)),
    "domain": (lambda: n.DomainBatchNorm(n.BatchNorm1d(C), ("a", "b")), (6, C)),
    "instance": (lambda: n.InstanceNorm1d(C, affine=True), (6, C, 5)),
    "filter response": (lambda: n.FilterResponseNorm(C), (6, C, 5)),
    "filter response, eps": (
        lambda: n.FilterResponseNorm(C, learnable_eps=True),
        (6, C, 5),
    ),
    "layer": (lambda: n.LayerNorm(C), (6, 5, C)),
    "layer over channels": (lambda: n.LayerNorm(C, channel_dim=1), (6, C, 3, 5)),
    "group": (lambda: n.GroupNorm(2, C), (6, C, 5)),
    "rms": (lambda: n.RMSNorm(C), (6, 5, C)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
QUICK = ("batch 2-d", "renorm", "recurrent", "whitening, zca", "layer over channels")
quick_or_slow = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in LAYERS
    ],
)


def built(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    layer = build()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return layer, 2 + torch.randn(shape)


def outcome(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients and state of one step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy, allow_unused=True)
    return [y, *(g for g in grads if g is not None), *layer.buffers()]


@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@quick_or_slow
def test_it_compiles_whole_and_for_every_batch_size(name: str, training: bool) -> None:
    """One graph, no break, and no recompilation when the batch grows."""
    layer, x = built(name)
    layer.train(training)
    twin = copy.deepcopy(layer)
    along = 1 if name == "recurrent" else 0
    graphs = []

    def counted(graph: torch.fx.GraphModule, example: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    with fresh_compiler():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counted)
        for times in (1, 2, 3):
            more = torch.cat([x + k for k in range(times)], along)
            dy = torch.randn(more.shape)
            found, wanted = outcome(compiled, more, dy), outcome(twin, more, dy)
            torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    assert len(graphs) == 1


@quick_or_slow
def test_an_exported_program_is_the_layer_in_eval(name: str) -> None:
    layer, x = built(name)
    layer(x)
    layer.eval()
    along = 1 if name == "recurrent" else 0
    size = torch.export.Dim("n", min=2, max=1024)
    with fresh_compiler(), torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({along: size},))
        for times in (1, 3):
            more = torch.cat([x + k for k in range(times)], along)
            torch.testing.assert_close(
                program.module()(more), layer(more), rtol=1e-5, atol=1e-5
            )
    kinds = {str(node.target) for node in program.graph.nodes}
    assert not [kind for kind in kinds if "normkit" in kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_autocast_leaves_its_statistics_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    """After a linear layer that autocast runs in half precision, as in real models."""
    layer, x = built(name)
    layer.train()
    half = (20 + x).to(dtype)
    reference = copy.deepcopy(layer).double()
    wanted = reference(half.double())
    with torch.autocast("cpu", dtype):
        y = layer(half)
    ulp = torch.finfo(dtype).eps
    loose = 8 if name.startswith("whitening") else 1
    assert ((y - wanted).abs() <= loose * ulp * wanted.abs().clamp(min=1)).all()
    for (key, ours), theirs in zip(
        layer.named_buffers(), reference.buffers(), strict=True
    ):
        assert ours.dtype in (torch.float32, torch.int64), key
        if ours.is_floating_point():
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


# What these layers store they write in place, which torch.func lets them.
@each_layer
def test_grad_and_jacobians_are_those_of_autograd(name: str) -> None:
    layer, x = built(name)
    layer, x = layer.double(), x.double()
    x = x[:, :4] if name == "recurrent" else x[:4]
    if hasattr(layer, "momentum"):
        layer.momentum = 0.0  # each call sees the same state
    dy = torch.randn_like(x)
    names = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,)) * dy).sum()

    detached = {key: p.detach() for key, p in names.items()}
    found = grad(loss)(detached, x)
    wanted = torch.autograd.grad(loss(names, x), [*names.values()])
    for key, value in zip(names, wanted, strict=True):
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-9)
    if name == "renorm":
        return  # r and d are constants, which finite tangents cannot know
    backward = jacrev(loss, argnums=1)(detached, x)
    forward = jacfwd(loss, argnums=1)(detached, x)
    torch.testing.assert_close(backward, forward, rtol=1e-7, atol=1e-8)


@quick_or_slow
def test_the_hessian_is_that_of_autograd(name: str) -> None:
    if name == "renorm":
        pytest.skip("r and d are constants for one, and no constants for the other")
    layer, x = built(name)
    layer, x = layer.double(), x.double()
    if name == "per activation" or name == "recurrent":
        x = x[:, :3] if name == "recurrent" else x[:3]
    elif x.dim() == 4:
        x = x[:2, :, :2, :1]
    elif x.dim() == 3:
        x = x[:3]
    dy = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        return (layer(x).sin() * dy).sum()

    found = hessian(loss)(x).reshape(x.numel(), x.numel())
    wanted = torch.autograd.functional.hessian(loss, x).reshape(found.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert found.abs().max() > 1e-3


STATELESS = ("instance", "filter response", "layer", "group", "rms")


@pytest.mark.parametrize("name", STATELESS)
def test_gradients_of_single_samples_by_vmap_are_those_one_by_one(name: str) -> None:
    layer, x = built(name)
    dy = torch.randn_like(x)
    detached = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        y = functional_call(layer, parameters, (x.unsqueeze(0),))
        return (y.squeeze(0) * dy).sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(detached, x, dy)
    for k in range(len(x)):
        alone = grad(loss)(detached, x[k], dy[k])
        for key, value in alone.items():
            torch.testing.assert_close(found[key][k], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["batch 2-d", "per activation", "layer", "whitening, zca"]
)
def test_the_third_derivative_is_exact(name: str) -> None:
    """Against a fourth-order difference of the second."""
    layer, x = built(name)
    layer, x = layer.double(), x.double()
    if hasattr(layer, "momentum"):
        layer.momentum = 0.0
    u, dy = torch.randn_like(x), torch.randn_like(x)

    def along(t: Tensor) -> Tensor:
        return (layer(x + t * u) * dy).sum()

    def derivative(at: float, order: int) -> Tensor:
        t = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        f = along(t)
        for _ in range(order):
            (f,) = torch.autograd.grad(f, t, create_graph=True)
        return f.detach()

    h = 1e-3
    slope = 8 * (derivative(h, 2) - derivative(-h, 2))
    slope = (slope - derivative(2 * h, 2) + derivative(-2 * h, 2)) / (12 * h)
    torch.testing.assert_close(derivative(0.0, 3), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_have_no_forward_gradient_as_in_torch(
    name: str, which: str
) -> None:
    """Without the error the derivative would lack their share, silently."""
    x = torch.randn(4, C, 5)
    buffers = {"running_mean": torch.zeros(C), "running_var": torch.ones(C)}
    flag = "training" if name == "batch_norm" else "use_input_stats"
    for library in (torch.nn.functional, normkit.functional):
        for uses_batch in (True, False):
            given = {k: t.clone() for k, t in buffers.items()}
            with forward_ad.dual_level():
                given[which] = forward_ad.make_dual(given[which], torch.ones(C))
                dual, options = forward_ad.make_dual(x, x), {flag: uses_batch}
                call = getattr(library, name)
                if uses_batch:  # the output does not read them
                    y = call(dual, **given, **options)
                    assert forward_ad.unpack_dual(y).tangent is not None
                else:
                    with pytest.raises(RuntimeError, match="wrt running_mean and"):
                        call(dual, **given, **options)
    layer = n.BatchNorm1d(C).eval()
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    state = {k: t.detach().clone() for k, t in state.items() if t.is_floating_point()}
    ones = {k: torch.ones_like(t) for k, t in state.items()}
    with pytest.raises(DerivativeError, match="running_mean and running_var"):
        torch.func.jvp(lambda s: functional_call(layer, s, (x,)), (state,), (ones,))


def _small() -> Any:
    return n.BatchNorm1d(C, on_small_batch="running")


READERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "batch": (lambda: n.BatchNorm1d(C).eval(), (4, C, 5)),
    "sync": (lambda: n.SyncBatchNorm(C).eval(), (4, C, 5)),
    "frozen": (lambda: n.FrozenBatchNorm(C), (4, C, 5)),
    "renorm": (lambda: n.BatchRenorm1d(C).eval(), (4, C, 5)),
    "instance": (
        lambda: n.InstanceNorm1d(C, track_running_stats=True).eval(),
        (4, C, 5),
    ),
    "per activation": (lambda: n.PerActivationBatchNorm((C, 5)).eval(), (4, C, 5)),
    "recurrent": (lambda: n.RecurrentBatchNorm(C, 4).eval(), (4, 6, C)),
    "a small batch": (_small, (1, C)),
}


@pytest.mark.parametrize("name", READERS)
def test_running_statistics_that_an_output_reads_have_no_gradient_as_in_torch(
    name: str,
) -> None:
    """Without the error it would be 0, silently."""
    make, shape = READERS[name]
    layer, x = make(), torch.randn(shape)
    layer(x)  # remembered
    for which in ("running_mean", "running_var"):
        values = getattr(layer, which).detach().clone()

        def loss(v: Tensor, which: str = which) -> Tensor:
            return functional_call(layer, {which: v}, (x,)).square().sum()

        with pytest.raises(DerivativeError, match="running_mean and running_var"):
            jvp(loss, (values,), (torch.ones_like(values),))
        with pytest.raises(DerivativeError, match="running_mean and running_var"):
            grad(loss)(values)
        with pytest.raises(DerivativeError, match="require a gradient"):
            loss(values.clone().requires_grad_())
        with torch.no_grad():
            assert loss(values.clone().requires_grad_()) == loss(values)
    if name not in ("frozen", "a small batch"):
        # In training they are not read, and the gradient is 0.
        layer.train()
        found = grad(lambda v: functional_call(layer, {which: v}, (x,)).sum())(values)
        assert not found.any()
