"""Cross-layer equalization: alike ranges, the same function, proven like a fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normkit import fold


class Spread(nn.Module):
    """Convolutions whose channels differ by up to 2¹⁰, as batch norms leave them."""

    def __init__(self, activation: nn.Module | None = None, *, residual: bool = False):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = activation or nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        self.residual = residual
        with torch.no_grad():
            spread = 2.0 ** torch.linspace(-8, 2, 8)
            self.bn.weight.copy_(spread)
            # So that each channel counts alike for the result.
            self.depthwise.weight.div_(spread.reshape(-1, 1, 1, 1))
            self.bn.running_var.uniform_(0.5, 2)
            self.bn.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.first(x)))
        y = self.act(self.second(self.act(self.depthwise(x))))
        y = y + x if self.residual else y
        return self.head(y.mean((2, 3)))


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def made(**settings) -> nn.Module:
    torch.manual_seed(0)
    return Spread(**settings).eval()


def rounded(model: nn.Module, bits: int = 8) -> nn.Module:
    """Round each weight to integers of one scale."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                step = weight.abs().max() / (2 ** (bits - 1) - 1)
                assert name
                weight.copy_((weight / step).round() * step)
    return model


@pytest.mark.parametrize("residual", [False, True])
def test_the_ranges_become_alike_and_the_function_stays(residual) -> None:
    model = made(residual=residual).double()
    folded, ledger = fold(model, X.double(), equalize=True)
    assert ledger.entries[0].folded
    assert ledger.max_difference < 1e-12
    torch.testing.assert_close(
        folded(X.double()), model(X.double()), rtol=1e-9, atol=1e-9
    )
    by_name = {each.layer: each for each in ledger.equalized}
    assert by_name["first"].before > 9
    # A stream has one scale for all four maps that write or read it.
    gained = 1 if residual else 4
    assert by_name["first"].after < by_name["first"].before - gained
    assert by_name["head"].reason == "the output of 'head' is returned by the model"
    assert "bits" in ledger.to_text().splitlines()[-1]


def test_the_ledger_names_the_maps_behind() -> None:
    _, ledger = fold(made(residual=True), X, equalize=True)
    by_name = {each.layer: each.readers for each in ledger.equalized}
    assert set(by_name["first"]) == {"depthwise", "head"}
    assert by_name["depthwise"] == ("second",)


def test_eight_bits_with_one_scale_lose_less() -> None:
    model = made()
    truth = model(X)
    plain, _ = fold(model, X)
    alike, _ = fold(model, X, equalize=True)
    gaps = [(rounded(each)(X) - truth).norm() / truth.norm() for each in (plain, alike)]
    assert gaps[1] < gaps[0] / 3  # Some channels had ten bits less.


def test_channels_that_still_lose_bits_are_named_with_the_remedy() -> None:
    model = made(activation=nn.ReLU6())
    with torch.no_grad():
        model.bn.weight[3] *= 2.0**-12
    _, ledger = fold(model, X, equalize=True)
    first = next(each for each in ledger.equalized if each.layer == "first")
    assert 3 in first.costly
    assert first.costly == tuple(sorted(first.costly))
    assert "one scale per channel" in ledger.to_text()


def test_a_clipped_relu_lets_no_scale_through() -> None:
    _, ledger = fold(made(activation=nn.ReLU6()), X, equalize=True)
    assert ledger.entries[0].folded
    reasons = {each.layer: each.reason for each in ledger.equalized}
    assert "hardtanh in 'act' reads" in reasons["first"]
    assert "hardtanh in 'act' reads" in reasons["depthwise"]
    assert all(each.before == each.after for each in ledger.equalized)


def test_a_layer_that_is_called_twice_is_scaled_in_both_calls_or_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            with torch.no_grad():
                self.layer.weight.mul_(2.0 ** torch.arange(6)[:, None])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))

    torch.manual_seed(0)
    model, x = Twice().eval().double(), torch.randn(4, 6).double()
    folded, ledger = fold(model, x, equalize=True)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert ledger.equalized[0].reason


def test_it_is_undone_where_the_proof_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from normkit.fold.torch import folding

    model = made()
    right = folding.Folding.rewrites

    def one_lost(self, plan):
        found = right(self, plan)
        return found[:-1] if plan.equalizing else found

    monkeypatch.setattr(folding.Folding, "rewrites", one_lost)
    folded, ledger = fold(model, X, equalize=True)
    assert "equalization was undone" in ledger.to_text().splitlines()[0]
    assert ledger.entries[0].folded
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-4)


def test_no_zero_bias_is_created() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)
    ).eval()
    with torch.no_grad():
        model[0].weight.mul_(2.0 ** torch.arange(6)[:, None])
    folded, ledger = fold(model, torch.randn(3, 4), equalize=True)
    assert not ledger.equalized[0].reason
    assert folded[0].bias is None
