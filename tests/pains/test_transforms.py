"""Threads about torch.func, the compiler and higher derivatives."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap

import normkit.functional as F
import normkit.nn
import oracles


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_pytorch_85533_jacobians_do_not_work_with_batchnorm(transform) -> None:
    """In-place updates of running statistics stop torch's layer in training."""
    x = torch.randn(4, 3, dtype=torch.float64)
    theirs, ours = (m.BatchNorm1d(3).double() for m in (nn, normkit.nn))
    with pytest.raises(RuntimeError, match="in-place"):
        transform(theirs)(x)
    found = transform(ours)(x)
    torch.testing.assert_close(found, transform(oracles.batch_norm)(x))
    torch.testing.assert_close(ours.running_mean, 0.1 * x.mean(0))


def test_functorch_986_an_ensemble_of_batch_norms_by_vmap() -> None:
    """Five models in one call, each with statistics of its own."""
    weights, x = torch.randn(5, 3), torch.randn(5, 8, 3)
    states = vmap(lambda _: F.init_state(3))(torch.arange(5))
    y, states = vmap(F.batch_norm_with_state)(x, states, weights)
    for k in range(5):
        layer = nn.BatchNorm1d(3)
        with torch.no_grad():
            layer.weight.copy_(weights[k])
        torch.testing.assert_close(y[k], layer(x[k]))
        torch.testing.assert_close(states.mean[k], layer.running_mean)
        torch.testing.assert_close(states.var[k], layer.running_var)


def test_functorch_986_in_eval_an_ensemble_of_layers_works_as_it_is() -> None:
    layers = [normkit.nn.BatchNorm1d(3) for _ in range(4)]
    for layer in layers:
        layer(torch.randn(8, 3))
        layer.eval()
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0])
    x = torch.randn(6, 3)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (p, b), (x,))

    y = vmap(call)(parameters, buffers)
    for k, layer in enumerate(layers):
        torch.testing.assert_close(y[k], layer(x))


def test_torch_blue_61_per_sample_gradients_with_the_state_outside() -> None:
    x, weight = torch.randn(6, 3), torch.randn(3)
    state = F.init_state(3)._replace(mean=torch.randn(3), var=torch.rand(3) + 1)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        y, _ = F.batch_norm_with_state(sample[None], state, weight, training=False)
        return y.square().sum()

    found = vmap(grad(loss), (None, 0))(weight, x)
    wanted = 2 * weight * (x - state.mean) ** 2 / (state.var + 1e-5)
    torch.testing.assert_close(found, wanted)


def test_pytorch_194504_momentum_none_compiles_without_a_graph_break() -> None:
    layer = normkit.nn.BatchNorm1d(3, momentum=None)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    batches = torch.randn(3, 8, 3)
    for x in batches:
        compiled(x)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    torch._dynamo.reset()


def test_pytorch_186779_third_order_gradients() -> None:
    x, u, v, w = torch.randn(4, 5, 3, dtype=torch.float64).unbind()
    x.requires_grad_()

    def third(f) -> Tensor:
        (g,) = torch.autograd.grad(f(x), x, u, create_graph=True)
        (h,) = torch.autograd.grad(g, x, v, create_graph=True)
        return torch.autograd.grad(h, x, w)[0]

    found = third(normkit.nn.BatchNorm1d(3).double())
    torch.testing.assert_close(found, third(oracles.batch_norm), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (normkit.nn.BatchNorm2d(5, channel_dim=-1), (2, 4, 3, 5)),
        (normkit.nn.InstanceNorm2d(5, channel_dim=-1), (2, 4, 3, 5)),
        (normkit.nn.LayerNorm(5, channel_dim=1), (2, 5, 4)),
        (normkit.nn.PerActivationBatchNorm((5, 4)), (2, 5, 4)),
        (normkit.nn.FilterResponseNorm(5), (2, 5, 4, 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else "",
)
def test_layers_that_torch_does_not_have_are_traced_by_torch_jit(
    layer: torch.nn.Module, shape: tuple[int, ...], training: bool
) -> None:
    layer = copy.deepcopy(layer).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(copy.deepcopy(layer), torch.randn(shape))
    x = torch.randn(shape)
    torch.testing.assert_close(traced(x), layer(x))
