"""Batch norm with statistics per time step, and the LSTM made of it."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
import oracles
from normkit.errors import ArgumentError, ShapeError

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

T, N, C, H = 6, 5, 3, 4


def norm_of(**kwargs) -> nn.Module:
    layer = normkit.nn.RecurrentBatchNorm(C, **{"max_steps": T, **kwargs})
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


def steps_mask(lengths: list[int]) -> Tensor:
    return torch.arange(T).view(-1, 1, 1) < torch.tensor(lengths).view(1, -1, 1)


def test_a_sequence_is_its_steps_one_by_one() -> None:
    x = 100 + torch.randn(T, N, C)
    whole, single = norm_of(momentum=0.3), norm_of(momentum=0.3)
    single.load_state_dict(whole.state_dict())
    y = whole(x)
    for t in range(T):
        truth = oracles.normalized(x[t], (0,), whole.weight[None], whole.bias[None])
        assert ((y[t] - truth).abs() <= 2e-6 * truth.abs().clamp(min=1)).all()
        torch.testing.assert_close(single(x[t], step=t), y[t])
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, single.state_dict()[key])
    torch.testing.assert_close(whole.running_mean, 0.3 * x.mean(1))
    torch.testing.assert_close(whole.running_var, 0.7 + 0.3 * x.var(1))
    assert whole.num_batches_tracked.tolist() == [1] * T


def test_gradients_are_those_of_the_definition() -> None:
    x = torch.randn(T, N, C, requires_grad=True)
    layer = norm_of()
    y, dy = layer(x), torch.randn(T, N, C)
    truth = oracles.normalized(x, (1,), layer.weight.view(1, 1, C), layer.bias)
    inputs = [x, layer.weight, layer.bias]
    found = torch.autograd.grad(y, inputs, dy)
    exact = torch.autograd.grad(truth, inputs, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_eval_uses_the_statistics_of_the_step() -> None:
    layer = norm_of(momentum=1.0)
    x = torch.randn(T, N, C) + torch.arange(T).view(-1, 1, 1)
    layer(x)
    layer.eval()
    inv_std = (x.var(1, keepdim=True) + layer.eps).rsqrt()
    wanted = (x - x.mean(1, keepdim=True)) * inv_std * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[3], step=3), wanted[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fewer", [3, 1])
def test_steps_behind_the_last_known_use_the_last_known(fewer: int) -> None:
    """Sequences longer than any in training, or than max_steps."""
    x = torch.randn(T, N, C) + torch.arange(T).view(-1, 1, 1)
    seen, few = norm_of(momentum=1.0), norm_of(momentum=1.0, max_steps=fewer)
    seen(x[:fewer])
    few(x[:fewer])
    few.weight, few.bias = seen.weight, seen.bias
    last = seen.eval()(x[-1], step=fewer - 1)
    assert torch.equal(seen(x)[-1], last)
    assert torch.equal(seen(x[-1], step=99), last)
    assert torch.equal(few.eval()(x)[-1], last)


def test_training_steps_behind_max_steps_share_its_statistics() -> None:
    x = torch.randn(T, N, C) + torch.arange(T).view(-1, 1, 1)
    layer = norm_of(max_steps=2, momentum=0.5)
    layer(x)
    mean = torch.zeros(C)
    for step in range(1, T):
        mean = 0.5 * mean + 0.5 * x[step].mean(0)
    torch.testing.assert_close(layer.running_mean[1], mean)
    assert layer.num_batches_tracked.tolist() == [1, T - 1]


def test_without_momentum_every_batch_of_a_step_has_the_same_share() -> None:
    layer, batches = norm_of(momentum=None), torch.randn(4, T, N, C)
    lengths = [T, 3, T, 1]
    for x, length in zip(batches, lengths, strict=True):
        layer(x[:length])
    torch.testing.assert_close(layer.running_mean[0], batches[:, 0].mean((0, 1)))
    torch.testing.assert_close(layer.running_mean[5], batches[::2, 5].mean((0, 1)))
    assert layer.num_batches_tracked.tolist() == [4, 3, 3, 2, 2, 2]


def test_padding_does_not_exist() -> None:
    x = torch.randn(T, N, C, dtype=torch.float64)
    lengths = [T, 2, 4, 1, T]
    mask = steps_mask(lengths)
    layer = norm_of(momentum=1.0).double()
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    for t in range(T):
        alive = mask[t, :, 0]
        truth = oracles.normalized(
            x[t, alive], (0,), layer.weight[None], layer.bias[None]
        )
        torch.testing.assert_close(y[t, alive], truth)
        torch.testing.assert_close(layer.running_mean[t], x[t, alive].mean(0))
        torch.testing.assert_close(layer.running_var[t], x[t, alive].var(0))
        assert not y[t, ~alive].any()
    y = layer.eval()(torch.where(mask, x, math.nan), mask=mask)
    torch.testing.assert_close(y, torch.where(mask, layer(x), torch.zeros_like(x)))


def test_the_last_sequence_alone_gives_the_bias_and_moves_the_mean_only() -> None:
    layer, x = norm_of(momentum=1.0), torch.randn(T, N, C)
    y = layer(x, mask=steps_mask([T, 2, 2, 2, 2]))
    torch.testing.assert_close(y[4, 0], layer.bias.detach())
    torch.testing.assert_close(layer.running_mean[4], x[4, 0])
    assert (layer.running_var[4] == 1).all()


def test_a_poisoned_step_leaves_its_own_state_alone_and_no_others() -> None:
    layer, x = norm_of(momentum=1.0), torch.randn(T, N, C)
    x[2, 1, 1] = math.inf
    layer(x)
    assert not layer.running_mean[2].any()
    assert layer.running_mean[[0, 1, 3, 4, 5]].all()
    assert layer.num_batches_tracked.tolist() == [1, 1, 0, 1, 1, 1]


def test_what_does_not_fit_is_told() -> None:
    layer = norm_of()
    with pytest.raises(ShapeError, match=r"\(N, C\) with a step"):
        layer(torch.randn(N, C))
    with pytest.raises(ShapeError, match=r"\(T, N, C\) without"):
        layer(torch.randn(T, N, C + 1))
    with pytest.raises(ArgumentError, match="must not be negative"):
        layer(torch.randn(N, C), step=-1)
    with pytest.raises(ArgumentError, match="more than one sample"):
        layer(torch.randn(1, C), step=0)
    with pytest.raises(ArgumentError, match="max_steps"):
        normkit.nn.RecurrentBatchNorm(C, 0)


def lstm_of(layers: int = 1, **kwargs) -> nn.Module:
    lstm = normkit.nn.BatchNormLSTM(C, H, layers, **{"max_steps": T, **kwargs})
    with torch.no_grad():
        for p in lstm.parameters():
            p.copy_(torch.randn(p.shape))
    return lstm


def weights_of(lstm: nn.Module) -> dict[str, Tensor]:
    return {
        "ih": lstm.weight_ih_l0,
        "hh": lstm.weight_hh_l0,
        "bias": lstm.bias_l0,
        "gamma_ih": lstm.norm_ih_l0.weight,
        "gamma_hh": lstm.norm_hh_l0.weight,
        "gamma_cell": lstm.norm_cell_l0.weight,
        "beta_cell": lstm.norm_cell_l0.bias,
    }


@pytest.mark.parametrize("lengths", [None, [6, 2, 4, 3, 6]], ids=["equal", "varied"])
def test_the_lstm_is_that_of_the_paper(lengths: list[int] | None) -> None:
    x = torch.randn(T, N, C, dtype=torch.float64, requires_grad=True)
    lstm = lstm_of().double()
    given = None if lengths is None else torch.tensor(lengths)
    y, (h, c) = lstm(x, lengths=given)
    wanted = oracles.batch_norm_lstm(x, weights_of(lstm), lengths or [T] * N)
    for found, truth in zip((y, h[0], c[0]), wanted, strict=True):
        torch.testing.assert_close(found, truth)
    inputs, dy = [x, *weights_of(lstm).values()], torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, dy)
    exact = torch.autograd.grad(wanted[0], inputs, dy)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_two_layers_are_one_on_top_of_the_other() -> None:
    x, lstm = torch.randn(T, N, C), lstm_of(2)
    below, above = lstm_of(), normkit.nn.BatchNormLSTM(H, H, max_steps=T)
    state = lstm.state_dict()
    for k, layer in enumerate((below, above)):
        part = {
            n.replace(f"_l{k}", "_l0"): t for n, t in state.items() if f"_l{k}" in n
        }
        layer.load_state_dict(part)
    lengths = torch.tensor([6, 2, 4, 3, 6])
    y, (h, c) = lstm(x, lengths=lengths)
    middle, first = below(x, lengths=lengths)
    wanted, second = above(middle, lengths=lengths)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(
        (h, c), tuple(map(torch.cat, zip(first, second, strict=True)))
    )


def test_batch_first_and_a_state_in_pieces() -> None:
    x, lstm = torch.randn(T, N, C), lstm_of(momentum=1.0)
    lstm(x)
    lstm.eval()
    y, last = lstm(x)
    other = lstm_of(batch_first=True)
    other.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(other.eval()(x.transpose(0, 1))[0].transpose(0, 1), y)
    zero = torch.zeros(1, N, H)
    torch.testing.assert_close(lstm(x, (zero, zero))[0], y)
    again, _ = lstm(x[:1], last)
    assert not torch.allclose(again, y[:1])


def test_padding_has_no_effect_in_training_and_in_eval() -> None:
    x, lstm = torch.randn(T, N, C), lstm_of(2)
    lengths = torch.tensor([6, 2, 4, 3, 6])
    poisoned = torch.where(steps_mask(lengths.tolist()), x, math.nan)
    for training in (True, False):
        state = {k: t.clone() for k, t in lstm.state_dict().items()}
        y, last = lstm.train(training)(x, lengths=lengths)
        after = {k: t.clone() for k, t in lstm.state_dict().items()}
        lstm.load_state_dict(state)
        z, other = lstm(poisoned, lengths=lengths)
        assert torch.equal(y, z)
        assert all(map(torch.equal, last, other))
        for key, tensor in lstm.state_dict().items():
            assert torch.equal(tensor, after[key]), key


def test_weights_of_torchs_lstm_load() -> None:
    theirs, lstm = nn.LSTM(C, H, 2), lstm_of(2)
    state = {k: t for k, t in theirs.state_dict().items() if k.startswith("weight")}
    missing = lstm.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not [k for k in missing.missing_keys if k.startswith("weight")]


def test_it_learns_what_came_first() -> None:
    """Remember the first of three steps: a loss far below that of guessing."""
    lstm = normkit.nn.BatchNormLSTM(1, 16, max_steps=3)
    head = nn.Linear(16, 1)
    both = [*lstm.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(both, 0.05)
    losses = []
    for _ in range(60):
        x = torch.randint(2, (3, 32, 1)) * 2.0 - 1
        loss = (head(lstm(x)[1][0][0]) - x[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 0.8
    assert sum(losses[-5:]) / 5 < 0.1


@pytest.mark.parametrize("bad", [[0, 1, 1, 1, 1], [7, 1, 1, 1, 1]], ids=str)
def test_lengths_outside_the_input_are_told(bad: list[int]) -> None:
    with pytest.raises(ArgumentError, match="within 1 and 6"):
        lstm_of()(torch.randn(T, N, C), lengths=torch.tensor(bad))


def test_shapes_that_do_not_fit_are_told() -> None:
    lstm, x = lstm_of(), torch.randn(T, N, C)
    with pytest.raises(ShapeError, match=r"\(T, N, C\) with C = 3"):
        lstm(x[..., :2])
    with pytest.raises(ShapeError, match="one for each sequence"):
        lstm(x, lengths=torch.ones(N + 1).long())
    with pytest.raises(ShapeError, match="h and c of shape"):
        lstm(x, (torch.zeros(1, N, H), torch.zeros(1, N, H + 1)))
    for sizes in itertools.product((0, 1), repeat=2):
        if 0 in sizes:
            with pytest.raises(ArgumentError, match="must be at least 1"):
                normkit.nn.BatchNormLSTM(*sizes, max_steps=T)
