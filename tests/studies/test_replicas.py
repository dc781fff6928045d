"""K networks as one batched matmul are the K networks a user would write."""

import pytest
import torch
from torch.nn import functional as F

from normkit.studies.replicas import Recipe, Replicas, stds_for

WIDTHS = (9, 8, 7, 4)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        (
            3 + torch.randn(16, 9, generator=draw),
            torch.randint(4, (16,), generator=draw),
        )
        for _ in range(count)
    ]


def made(recipe: Recipe, count: int = 3, **options) -> Replicas:
    stds = torch.tensor([0.3, 1.0, 2.0])[:count]
    return Replicas(recipe, stds, torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize(
    ("activation", "norm", "place"),
    [
        ("sigmoid", "batch", "before"),
        ("tanh", "batch", "after"),
        ("relu", "", "before"),
        ("relu", "layer", "before"),
        ("tanh", "layer", "after"),
    ],
)
def test_replicas_train_as_separate_modules(activation, norm, place) -> None:
    nets = made(Recipe(WIDTHS, activation, norm, place), paired=False)
    rates = torch.tensor([0.05, 0.2, 0.1])
    modules = [nets.module(k) for k in range(3)]
    # Few: at a rate of 0.2 a difference of rounding grows twentyfold in three steps.
    for x, y in batches(5):
        nets.step(x, y, rates)
        for k, module in enumerate(modules):
            loss = F.cross_entropy(module(x), y)
            module.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= rates[k] * p.grad
            assert nets.last_losses[k].item() == pytest.approx(loss.item(), rel=2e-4)
    x, y = batches(1)[0]
    nets.training = False
    together = nets(x)
    for k, module in enumerate(modules):
        torch.testing.assert_close(together[k], module.eval()(x), rtol=1e-3, atol=1e-4)
        again = nets.module(k).eval()(x)
        torch.testing.assert_close(again, module(x), rtol=1e-3, atol=1e-4)


def test_a_diverging_replica_leaves_the_others_bitwise_as_they_are() -> None:
    calm = made(Recipe(WIDTHS, "relu", "batch"))
    wild = made(Recipe(WIDTHS, "relu", "batch"))
    with torch.no_grad():
        wild.weights[0][2] = torch.nan
    for x, y in batches(6):
        calm.step(x, y, torch.tensor([0.1, 0.1, 0.1]))
        wild.step(x, y, torch.tensor([0.1, 0.1, 0.1]))
    for mine, theirs in zip(calm.parameters, wild.parameters, strict=True):
        assert torch.equal(mine[:2], theirs[:2])
    assert wild.weights[1][2].isnan().any()
    for (mean, var), (other_mean, other_var) in zip(
        calm.running, wild.running, strict=True
    ):
        assert torch.equal(mean[:2], other_mean[:2])
        assert torch.equal(var[:2], other_var[:2])


def test_rates_per_layer_move_only_their_layer() -> None:
    nets = made(Recipe(WIDTHS, "tanh", "batch"))
    before = [p.detach().clone() for p in nets.parameters]
    rates = torch.zeros(3, 3)
    rates[1, 1] = 0.5
    x, y = batches(1)[0]
    nets.step(x, y, rates)
    moved = [
        (i, k)
        for i, (p, old) in enumerate(zip(nets.parameters, before, strict=True))
        for k in range(3)
        if not torch.equal(p[k], old[k])
    ]
    # Weight, bias, gain and offset of layer 1; a bias before batch norm has gradient 0
    # up to rounding.
    assert {(1, 1), (7, 1), (9, 1)} <= set(moved) <= {(1, 1), (4, 1), (7, 1), (9, 1)}


def test_population_statistics_are_exact_inside_and_put_back_after() -> None:
    nets = made(Recipe(WIDTHS, "tanh", "batch"))
    x, y = batches(1)[0]
    nets.step(x, y, torch.full((3,), 0.1))
    kept = [mean.clone() for mean, _ in nets.running]
    with nets.population(x):
        mean, _ = nets.running[0]
        first = torch.baddbmm(nets.biases[0], x.expand(3, -1, -1), nets.weights[0])
        torch.testing.assert_close(mean, first.mean(1, keepdim=True))
    assert all(
        torch.equal(mean, old)
        for (mean, _), old in zip(nets.running, kept, strict=True)
    )


def test_stds_give_the_asked_gain() -> None:
    stds = stds_for((100, 400, 10), 2.0)
    torch.testing.assert_close(
        stds.square() * torch.tensor([100.0, 400.0]), torch.tensor([4.0, 4.0])
    )
