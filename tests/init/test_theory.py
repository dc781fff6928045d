"""The variance recursion, against numbers known in closed form and against networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normkit.errors import ArgumentError
from normkit.init import (
    gain_of,
    gaussian_mean,
    initialize,
    kept_gradient,
    kept_signal,
    variance_recursion,
)


def test_gaussian_means_are_those_known_in_closed_form() -> None:
    assert gaussian_mean(lambda z: z**0) == pytest.approx(1.0, abs=1e-14)
    assert gaussian_mean(lambda z: z**6) == pytest.approx(15.0, abs=1e-12)
    assert gaussian_mean(torch.cos) == pytest.approx(math.exp(-0.5), abs=1e-14)
    assert gaussian_mean(torch.abs) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-13)
    inside = math.erf(0.7 / math.sqrt(2))  # a jump within a panel
    assert gaussian_mean(lambda z: (z.abs() < 0.7).double()) == (
        pytest.approx(inside, abs=0.02)
    )


@pytest.mark.parametrize("q", [0.3, 1.0, 4.0])
def test_relu_keeps_half_of_signal_and_gradient(q: float) -> None:
    assert kept_signal("relu", q) == pytest.approx(q / 2, abs=1e-12)
    assert kept_gradient("relu", q) == pytest.approx(0.5, abs=1e-12)
    slope = 0.2
    assert kept_signal("leaky_relu", q, slope) == pytest.approx(q * (1 + slope**2) / 2)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu", "silu", "elu", "softplus"])
def test_what_activations_keep_agrees_with_a_million_samples(name: str) -> None:
    z = torch.randn(1_000_000, dtype=torch.float64) * math.sqrt(1.7)
    function = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "gelu": nn.functional.gelu,
        "silu": nn.functional.silu,
        "elu": nn.functional.elu,
        "softplus": nn.functional.softplus,
    }[name]
    signal = float(function(z).square().mean())
    assert kept_signal(name, 1.7) == pytest.approx(signal, rel=0.01)
    z.requires_grad_()
    (d,) = torch.autograd.grad(function(z).sum(), z)
    gradient = float(d.square().mean())
    assert kept_gradient(name, 1.7) == pytest.approx(gradient, rel=0.01)


def test_a_gain_keeps_normal_pre_activations_at_variance_one() -> None:
    for name in ("tanh", "sigmoid", "gelu", "relu"):
        assert gain_of(name) ** 2 * kept_signal(name) == pytest.approx(1.0)
    assert gain_of(torch.tanh) == gain_of("tanh")


def test_small_weights_of_the_textbook_die_out() -> None:
    """Six tanh layers of 4096, std 0.01: .49 .29 .18 .11 .071 .045 (CS231n's slide)."""
    found = [s.after**0.5 for s in variance_recursion([4096 * 0.01**2] * 6, "tanh")]
    slide = [0.49, 0.29, 0.18, 0.11, 0.071, 0.045]
    assert found == pytest.approx(slide, rel=0.03)


def test_not_so_small_weights_saturate_but_gradients_grow_backwards() -> None:
    """0.05: units sit at ±1, and yet n·Var[w] = 10.2 makes gradients grow."""
    signals = variance_recursion([4096 * 0.05**2] * 6, "tanh")
    assert signals[0].after ** 0.5 == pytest.approx(0.87, rel=0.02)
    assert signals[-1].after ** 0.5 == pytest.approx(0.85, rel=0.02)
    gradients = [s.gradient for s in signals]
    assert gradients == sorted(gradients, reverse=True)


def test_xavier_decays_under_tanh_and_halves_under_relu_kaiming_is_flat() -> None:
    tanh = [s.after**0.5 for s in variance_recursion([1.0] * 6, "tanh")]
    assert tanh == pytest.approx([0.63, 0.49, 0.41, 0.36, 0.32, 0.29], rel=0.03)
    relu = [s.after for s in variance_recursion([1.0] * 6, "relu")]
    assert relu == pytest.approx([2.0**-k for k in range(1, 7)])
    flat = [s.after for s in variance_recursion([2.0] * 6, "relu")]
    assert flat == pytest.approx([1.0] * 6)


def test_biases_and_rectangular_layers_enter_the_recursion() -> None:
    signals = variance_recursion(
        [2.0, 2.0], "relu", backward=[2.0, 6.0], mean_square=3.0, bias_variance=0.5
    )
    assert [s.before for s in signals] == pytest.approx([6.5, 7.0])
    # Last: E[φ'²] = 1/2; first: 1/2 · 6 · 1/2.
    assert [s.gradient for s in signals] == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize(
    ("activation", "scheme", "options"),
    [
        (nn.Tanh, "normal", {"std": 0.02}),
        (nn.Tanh, "normal", {"std": 0.08}),
        (nn.Tanh, "xavier", {}),
        (nn.ReLU, "xavier", {"distribution": "uniform"}),
        (nn.ReLU, "kaiming", {}),
        (nn.Sigmoid, "auto", {}),
        (nn.GELU, "auto", {"distribution": "truncated_normal"}),
        (nn.Tanh, "orthogonal", {}),
    ],
)
def test_wide_networks_do_what_the_recursion_says(
    activation: type[nn.Module], scheme: str, options: dict[str, object]
) -> None:
    """In all of five layers, 512 wide; the theory is of infinite width.

    A width of n makes q of one sample fluctuate by √(5/n) per ReLU layer (E[φ⁴]/E[φ²]²
    = 6), and homogeneous layers pass it on: up to √(25/512) = 22 % after five, less
    over a batch. Means as those of a sigmoid, common to the batch, do it by √(2/n).
    Odd saturating ones forget. A forgotten gain is a factor of 2 per layer.
    """
    is_forgetting = activation is nn.Tanh
    source = torch.Generator().manual_seed(1)
    layers = [m for _ in range(5) for m in (nn.Linear(512, 512), activation())]
    model = nn.Sequential(*layers, nn.Linear(512, 512))
    x = torch.randn(96, 512, generator=source)
    report = initialize(
        model,
        scheme,
        example_inputs=x,
        generator=source,
        **options,  # type: ignore[arg-type]
    )
    assert len(report.lines) == 6
    for line in report.lines:
        rel = 0.06 if is_forgetting else 0.15
        assert line.signal_measured == pytest.approx(line.signal_predicted, rel=rel)
        assert line.gradient_measured == pytest.approx(line.gradient_predicted, rel=0.2)
    if scheme in ("normal", "xavier"):
        factor = report.lines[0].predicted
        name = {nn.Tanh: "tanh", nn.ReLU: "relu"}[activation]
        q = float(x.square().mean())
        for line, signal in zip(
            report.lines,
            variance_recursion([factor] * 6, name, mean_square=q),
            strict=True,
        ):
            assert line.signal_predicted == pytest.approx(signal.before, rel=1e-6)


def test_a_constant_input_has_no_variance() -> None:
    """√q·√q is above q for some q, by rounding."""
    for q in (0.1, 0.5, 2.0, 3.0, 5.0, 7.7):
        mean = math.sqrt(q)
        wanted = float(F.gelu(torch.tensor(mean, dtype=torch.float64)).square())
        assert kept_signal("gelu", q, mean=mean) == pytest.approx(wanted, rel=1e-6)
    assert kept_gradient("relu", 2.0, mean=math.sqrt(2.0)) == pytest.approx(1.0)


def test_a_mean_above_the_root_mean_square_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"mean=2.0 has a square of 4"):
        kept_signal("relu", 1.0, mean=2.0)
