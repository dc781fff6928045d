"""Threads about what is kept, and what the words mean."""

import pytest
import torch
from torch import nn

import normkit
import normkit.nn

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def test_pytorch_62399_which_variance_is_normalized_by_and_which_is_kept() -> None:
    """Normalized by m2/n, kept is m2/(n − 1), as in torch; or m2/n, if asked for."""
    layer = normkit.nn.BatchNorm1d(3, momentum=1.0, affine=False)
    y = layer(X)
    scale = (X.var(0, correction=0) + layer.eps).rsqrt()
    torch.testing.assert_close(y, (X - X.mean(0)) * scale)
    torch.testing.assert_close(layer.running_var, X.var(0, correction=1))
    biased = normkit.nn.BatchNorm1d(3, momentum=1.0, estimator="biased")
    biased(X)
    torch.testing.assert_close(biased.running_var, X.var(0, correction=0))


def test_pytorch_15298_momentum_is_the_share_of_the_new_value() -> None:
    layer = normkit.nn.BatchNorm1d(3, momentum=0.25)
    layer(X)
    torch.testing.assert_close(layer.running_mean, 0.25 * X.mean(0))
    with pytest.raises(ValueError, match=r"a decay of 0\.9 is momentum=0\.1"):
        normkit.nn.BatchNorm1d(3, momentum=99.0)
    nn.BatchNorm1d(3, momentum=99.0)  # torch takes it without a word


def test_a_young_average_is_not_half_of_its_initial_value() -> None:
    """After 5 steps of mean 10, torch's running mean is 4.1."""
    theirs, ours = nn.BatchNorm1d(1), normkit.nn.BatchNorm1d(1, debias=True)
    for _ in range(5):
        x = 10 + torch.randn(64, 1)
        theirs(x)
        ours(x)
    assert theirs.running_mean.item() < 4.3
    assert 9.7 < ours.running_mean.item() < 10.3


def test_pytorch_49082_calibration_calls_the_model_as_the_caller_says() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normkit.nn.BatchNorm1d(3)

        def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.norm(left + right)

    model = Two()
    batches = [
        {"left": torch.randn(8, 3), "right": torch.randn(8, 3)} for _ in range(3)
    ]
    with pytest.raises(TypeError):
        torch.optim.swa_utils.update_bn(batches, Two())
    normkit.calibrate(model, batches, forward=lambda m, b: m(**b))
    seen = torch.cat([b["left"] + b["right"] for b in batches])
    torch.testing.assert_close(model.norm.running_mean, seen.mean(0))


def test_pytorch_49082_a_small_last_batch_weighs_what_it_holds() -> None:
    batches = [torch.zeros(64, 1), 10 + torch.randn(2, 1)]
    theirs, ours = (nn.Sequential(m.BatchNorm1d(1)) for m in (nn, normkit.nn))
    torch.optim.swa_utils.update_bn(batches, theirs)
    normkit.calibrate(ours, batches)
    wanted = torch.cat(batches).mean().item()
    assert theirs[0].running_mean.item() > 10 * wanted
    assert ours[0].running_mean.item() == pytest.approx(wanted, rel=1e-5)


def test_keras_7057_and_pytorch_4741_eval_is_worse_than_train_and_why() -> None:
    """The doctor names the layer and the cause; it is the momentum here."""
    torch.manual_seed(3)
    x = 20 + torch.randn(512, 6)
    y = (x[:, 0] > x[:, 1]).long()
    model = nn.Sequential(nn.BatchNorm1d(6, momentum=1e-4), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    loss = nn.CrossEntropyLoss()
    for rows in torch.randint(512, (80, 64)):
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    batches = [(x[k : k + 64], y[k : k + 64]) for k in range(0, 512, 64)]
    found = normkit.diagnose(model, batches, loss)
    assert "momentum" in found.to_text()
    right = (model.eval()(x).argmax(1) == y).float().mean().item()
    normkit.calibrate(model, [b[0] for b in batches])
    fixed = (model(x).argmax(1) == y).float().mean().item()
    assert fixed > max(0.9, right)
