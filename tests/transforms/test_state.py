"""`batch_norm_with_state` is pure, and every transform of torch sees through it."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import normkit.functional as F
import oracles

N, C, L = 6, 3, 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def state_of(mean: Tensor | None = None) -> F.BatchNormState:
    start = F.init_state(C, dtype=torch.float64)
    return start if mean is None else start._replace(mean=mean)


def loss(x: Tensor, state: F.BatchNormState, weight: Tensor, dy: Tensor):
    y, state = F.batch_norm_with_state(x, state, weight)
    return (y * dy).sum(), state


def oracle_loss(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    return (oracles.batch_norm(x, weight) * dy).sum()


def test_it_is_the_layer_with_its_statistics_outside() -> None:
    weight, bias = torch.randn(2, C)
    layer = torch.nn.BatchNorm1d(C, momentum=0.3)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    state = F.init_state(C)
    for _ in range(3):
        x = 2 + torch.randn(N, C, L)
        y, state = F.batch_norm_with_state(x, state, weight, bias, momentum=0.3)
        torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(state.mean, layer.running_mean)
    torch.testing.assert_close(state.var, layer.running_var)
    assert int(state.batches) == 3
    y, after = F.batch_norm_with_state(x, state, weight, bias, training=False)
    torch.testing.assert_close(y, layer.eval()(x))
    assert after is state


def test_the_state_that_went_in_is_left_as_it_was() -> None:
    state = state_of()
    copies = [t.clone() for t in state]
    _, after = F.batch_norm_with_state(drawn(N, C), state)
    assert all(map(torch.equal, state, copies))
    assert not any(map(torch.equal, state, after))


def test_without_momentum_every_batch_has_the_same_share() -> None:
    state, batches = state_of(), drawn(4, N, C)
    for x in batches:
        _, state = F.batch_norm_with_state(x, state, momentum=None)
    torch.testing.assert_close(state.mean, batches.mean((0, 1)))
    torch.testing.assert_close(state.var, batches.var(1).mean(0))


def test_a_mask_and_a_channel_dim_mean_what_they_mean_in_the_layer() -> None:
    x = drawn(N, L, C)
    mask = torch.rand(N, L, 1) > 0.3
    y, state = F.batch_norm_with_state(
        x.masked_fill(~mask, math.nan), state_of(), mask=mask, channel_dim=-1
    )
    values = x[mask.squeeze(2)]
    wanted, alone = F.batch_norm_with_state(values, state_of())
    torch.testing.assert_close(y[mask.squeeze(2)], wanted)
    torch.testing.assert_close(state.mean, alone.mean)
    torch.testing.assert_close(state.var, alone.var)
    assert not y[~mask.squeeze(2)].any()


def test_a_poisoned_or_empty_batch_does_not_move_the_state() -> None:
    x = drawn(N, C)
    x[1, 1] = math.inf
    y, state = F.batch_norm_with_state(x, state_of())
    assert y[:, 1].isnan().all()
    assert all(map(torch.equal, state, state_of()))
    _, state = F.batch_norm_with_state(x, state_of(), on_nonfinite="update")
    assert not state.mean.isfinite().all()
    _, state = F.batch_norm_with_state(x[:0], state_of())
    assert all(map(torch.equal, state, state_of()))


def test_vmap_over_models_is_each_model_by_itself() -> None:
    x, weight = drawn(5, N, C, L), drawn(5, C)
    states = vmap(state_of)(drawn(5, C))
    y, after = vmap(F.batch_norm_with_state)(x, states, weight)
    for k in range(5):
        one = F.BatchNormState(*(t[k] for t in states))
        wanted, moved = F.batch_norm_with_state(x[k], one, weight[k])
        torch.testing.assert_close(y[k], wanted)
        torch.testing.assert_close(after.mean[k], moved.mean)
        torch.testing.assert_close(after.var[k], moved.var)
    assert after.batches.tolist() == [1] * 5


def test_grad_jacrev_jacfwd_jvp_and_hessian_are_those_of_the_definition() -> None:
    x, weight, dy, tangent = drawn(N, C), drawn(C), drawn(N, C), drawn(N, C)
    ours = partial(loss, state=state_of(), weight=weight, dy=dy)
    truth = partial(oracle_loss, weight=weight, dy=dy)
    gradient, state = grad(ours, has_aux=True)(x)
    torch.testing.assert_close(gradient, grad(truth)(x))
    assert int(state.batches) == 1
    for transform in (jacrev, jacfwd, hessian):
        found = transform(lambda x: ours(x)[0])(x)
        torch.testing.assert_close(found, transform(truth)(x), rtol=1e-8, atol=1e-10)
    _, slope = jvp(lambda x: ours(x)[0], (x,), (tangent,))
    torch.testing.assert_close(slope, (grad(truth)(x) * tangent).sum())


def test_gradients_of_many_models_at_once_are_those_of_each() -> None:
    x, weight, dy = drawn(4, N, C), drawn(4, C), drawn(4, N, C)
    states = vmap(state_of)(drawn(4, C))
    found, after = vmap(grad(loss, argnums=2, has_aux=True))(x, states, weight, dy)
    for k in range(4):
        wanted = grad(oracle_loss, argnums=1)(x[k], weight[k], dy[k])
        torch.testing.assert_close(found[k], wanted)
    torch.testing.assert_close(after.mean, 0.9 * states.mean + 0.1 * x.mean(1))


def test_the_second_and_third_derivative_are_exact() -> None:
    x, dy, u, v = (drawn(N, C) for _ in range(4))
    x.requires_grad_()

    def third(f) -> Tensor:
        (g,) = torch.autograd.grad(f(x), x, dy, create_graph=True)
        (h,) = torch.autograd.grad(g, x, u, create_graph=True)
        return torch.autograd.grad(h, x, v)[0]

    found = third(lambda x: F.batch_norm_with_state(x, state_of())[0])
    torch.testing.assert_close(found, third(oracles.batch_norm), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_whole_and_for_every_batch_size(training: bool) -> None:
    def step(x: Tensor, state: F.BatchNormState):
        return F.batch_norm_with_state(x, state, training=training)

    torch._dynamo.reset()
    graphs = []

    def counted(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counted)
    for n in (6, 9, 31):
        x = drawn(n, C)
        found, wanted = compiled(x, state_of()), step(x, state_of())
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(tuple(found[1]), tuple(wanted[1]))
    assert len(graphs) == 1


def test_functional_call_of_a_module_around_it_gives_gradients() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(drawn(C))

        def forward(self, x: Tensor, state: F.BatchNormState):
            return F.batch_norm_with_state(x, state, self.weight)

    net, x, dy = Net(), drawn(N, C), drawn(N, C)

    def run(parameters):
        y, state = functional_call(net, parameters, (x, state_of()))
        return (y * dy).sum(), state

    found, state = grad(run, has_aux=True)(dict(net.named_parameters()))
    wanted = grad(oracle_loss, argnums=1)(x, net.weight.detach(), dy)
    torch.testing.assert_close(found["weight"], wanted)
    assert int(state.batches) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_keep_their_state_in_float32(dtype: torch.dtype) -> None:
    x = (100 + torch.randn(64, C)).to(dtype)
    y, state = F.batch_norm_with_state(x, F.init_state(C))
    assert y.dtype == dtype
    assert state.mean.dtype == state.var.dtype == torch.float32
    torch.testing.assert_close(state.mean, 0.1 * x.float().mean(0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input": torch.randn(1, C)}, "more than one value"),
        ({"input": torch.randn(N, C + 1)}, r"state.mean should contain 4"),
        ({"input": torch.randn(N, C).int()}, "floating"),
        ({"input": torch.randn(N)}, "no dimension 1"),
        ({"weight": torch.ones(2)}, "weight should contain 3"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"on_nonfinite": "drop"}, "'skip' or 'update'"),
    ],
)
def test_what_does_not_fit_is_told(change: dict, told: str) -> None:
    given = {"input": torch.randn(N, C), "state": F.init_state(C), **change}
    with pytest.raises(Exception, match=told):
        F.batch_norm_with_state(**given)
