"""Weights of the variance asked for, in the fans of what the layer computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normkit.errors import ArgumentError
from normkit.init import (
    NOT_SO_SMALL_STD,
    SMALL_STD,
    Fans,
    constant_,
    gain_of,
    initialize,
    kaiming_normal_,
    kaiming_uniform_,
    linear_maps,
    normal_,
    orthogonal_,
    variance_scaling_,
    xavier_normal_,
    xavier_uniform_,
)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tolerance(weight: Tensor, kurtosis: float = 3.0) -> float:
    """Five standard errors of a sample variance, relative."""
    return 5 * math.sqrt((kurtosis - 1) / weight.numel())


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
@pytest.mark.parametrize(
    ("mode", "n"), [("fan_in", 60), ("fan_out", 90), ("fan_avg", 75)]
)
def test_the_variance_is_scale_over_fan(distribution: str, mode: str, n: int) -> None:
    w = torch.empty(30, 20, 3)
    variance_scaling_(
        w, scale=1.7, mode=mode, distribution=distribution, generator=source()
    )
    assert float(w.var()) * n == pytest.approx(1.7, rel=tolerance(w))
    assert abs(float(w.mean())) < 5 * math.sqrt(1.7 / n / w.numel())


def test_distributions_have_their_bounds_and_shape() -> None:
    w = torch.empty(300, 300)
    variance_scaling_(w, distribution="uniform", generator=source())
    bound = math.sqrt(3 / 300)
    assert 0.999 * bound < float(w.abs().max()) <= bound
    variance_scaling_(w, distribution="truncated_normal", generator=source())
    edge = 2 / 0.8796256610342398 / math.sqrt(300)
    assert 0.99 * edge < float(w.abs().max()) <= edge * (1 + 1e-6)
    variance_scaling_(w, generator=source())
    kurtosis = (w**4).mean() / (w**2).mean() ** 2
    assert float(kurtosis) == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize(
    ("ours", "torchs", "kurtosis"),
    [
        (xavier_normal_, nn.init.xavier_normal_, 3),
        (xavier_uniform_, nn.init.xavier_uniform_, 1.8),
        (
            lambda w, generator: kaiming_normal_(
                w,
                mode="fan_out",
                activation="leaky_relu",
                slope=0.2,
                generator=generator,
            ),
            lambda w: nn.init.kaiming_normal_(w, 0.2, "fan_out", "leaky_relu"),
            3,
        ),
        (
            lambda w, generator: kaiming_uniform_(w, generator=generator),
            lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
            1.8,
        ),
    ],
)
def test_the_named_ones_agree_with_torch_on_a_plain_weight(
    ours: Any, torchs: Any, kurtosis: float
) -> None:
    a, b = torch.empty(80, 40, 3, 3), torch.empty(80, 40, 3, 3)
    ours(a, generator=source())
    torchs(b)
    ratio = float(a.var() / b.var())
    assert ratio == pytest.approx(1.0, rel=1.5 * tolerance(a, kurtosis))


def test_small_and_not_so_small_are_those_of_the_sources() -> None:
    w = torch.empty(4096, 100)
    assert (SMALL_STD, NOT_SO_SMALL_STD) == (0.01, 0.05)
    assert float(normal_(w, generator=source()).std()) == pytest.approx(0.01, rel=0.01)
    assert pytest.approx(10.24) == 4096 * NOT_SO_SMALL_STD**2
    assert torch.equal(constant_(w, 0.5), torch.full_like(w, 0.5))


@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60), (3, 20, 12)])
def test_orthogonal_rows_or_columns_are_orthonormal_times_gain(
    shape: tuple[int, ...],
) -> None:
    w = orthogonal_(
        torch.empty(shape, dtype=torch.float64), gain=1.5, generator=source()
    )
    matrices = w if w.dim() == 3 else w[None]
    for m in matrices:
        small = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
        torch.testing.assert_close(small, 2.25 * torch.eye(len(small)).double())
    # Uniform over such matrices: no entry prefers a sign.
    draws = torch.stack(
        [orthogonal_(torch.empty(3, 3), generator=source(i)) for i in range(300)]
    )
    assert float(draws.mean(0).abs().max()) < 5 / math.sqrt(3 * 300)


def test_half_weights_are_drawn_too() -> None:
    w = torch.empty(64, 64, dtype=torch.bfloat16)
    assert 64 * float(kaiming_normal_(w, generator=source()).float().var()) == (
        pytest.approx(2.0, rel=tolerance(w))
    )
    assert 64 * float(orthogonal_(w, generator=source()).float().square().mean()) == (
        pytest.approx(1.0, rel=0.01)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fan"}, "mode='fan' must be one of"),
        ({"distribution": "cauchy"}, "distribution='cauchy' must be one of"),
        ({"scale": -1.0}, "scale=-1.0 must be finite"),
        ({"scale": math.nan}, "scale=nan must be finite"),
    ],
)
def test_arguments_without_meaning_are_refused(
    options: dict[str, Any], message: str
) -> None:
    w = torch.zeros(3, 3)
    with pytest.raises(ArgumentError, match=message):
        variance_scaling_(w, **options)
    assert torch.equal(w, torch.zeros(3, 3))


def test_a_weight_without_terms_is_refused() -> None:
    with pytest.raises(ArgumentError, match="sums 0 terms"):
        variance_scaling_(torch.empty(3, 0))


# Every layer, n, and a padding-free input to measure on.
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(300, 200), (64, 300)),
    (nn.Conv1d(40, 30, 5), (8, 40, 60)),
    (nn.Conv2d(24, 48, 3, bias=False), (4, 24, 24, 24)),
    (nn.Conv3d(12, 20, 3), (2, 12, 10, 10, 10)),
    (nn.Conv2d(32, 64, 3, groups=4), (4, 32, 24, 24)),
    (nn.Conv2d(64, 64, 3, groups=64), (16, 64, 24, 24)),
    (nn.Conv2d(32, 64, 4, stride=2), (8, 32, 50, 50)),
    (nn.Conv2d(32, 64, 3, dilation=2), (4, 32, 26, 26)),
    (nn.ConvTranspose1d(40, 30, 4, stride=2, padding=3), (8, 40, 80)),
    (nn.ConvTranspose2d(48, 24, 3, padding=2), (4, 48, 24, 24)),
    (nn.ConvTranspose2d(48, 24, 4, stride=2, padding=3), (4, 48, 24, 24)),
    (nn.ConvTranspose2d(48, 24, 3, groups=4, padding=2), (8, 48, 24, 24)),
    (nn.ConvTranspose3d(16, 20, 2, stride=2), (2, 16, 8, 8, 8)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:50])
def test_fan_in_is_what_the_outputs_sum(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """Var[y] = E[x²] when fan_in·Var[w] = 1; torch's fan for transposed ones fails."""
    (line,) = initialize(layer, "xavier", generator=source()).lines
    (each,) = linear_maps(layer)[0]
    variance_scaling_(each.weight, fans=each.fans, generator=source(1))
    x = torch.randn(shape, generator=source(2))
    y = layer(x)
    assert float(y.detach().square().mean()) == pytest.approx(1.0, rel=0.08)
    assert line.fan_in == each.fans.fan_in


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:50])
def test_fan_out_is_what_the_gradients_sum(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    (each,) = linear_maps(layer)[0]
    variance_scaling_(each.weight, mode="fan_out", fans=each.fans, generator=source(1))
    x = torch.randn(shape, generator=source(2)).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=source(3)))
    assert x.grad is not None
    g = x.grad
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # At the border an input meets fewer outputs; padding crops the transposed.
        for dim in range(2, g.dim()):
            g = g.narrow(dim, 4, g.shape[dim] - 8) if g.shape[dim] > 10 else g
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        for dim in range(2, g.dim()):
            g = g.narrow(dim, 4, g.shape[dim] - 8)
    is_small = isinstance(layer, nn.Conv3d)
    if is_small:
        g = g[:, :, 2:-2, 2:-2, 2:-2]
    assert float(g.square().mean()) == pytest.approx(1.0, rel=0.1)


def test_the_fan_of_torch_is_wrong_for_transposed_convolutions() -> None:
    layer = nn.ConvTranspose2d(48, 24, 4, stride=2)
    (each,) = linear_maps(layer)[0]
    assert (each.fans.fan_in, each.fans.fan_out) == (48 * 4, 24 * 16)
    # What torch.nn.init makes of the shape (48, 24, 4, 4): twice the truth.
    assert Fans.of_tensor(layer.weight).fan_in == 24 * 16


def test_grouped_convolutions_have_the_fan_out_of_a_group() -> None:
    (each,) = linear_maps(nn.Conv2d(32, 64, 3, groups=4))[0]
    assert (each.fans.fan_in, each.fans.fan_out) == (8 * 9, 16 * 9)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:50])
def test_rows_are_the_sums_of_each_output(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """Scaling a row scales its output channel, in any layout of the weight."""
    (each,) = linear_maps(layer)[0]
    x = torch.randn(shape, generator=source(2))
    if each.bias is not None:
        with torch.no_grad():
            each.bias.zero_()
    dim = -1 if isinstance(layer, nn.Linear) else 1
    before = layer(x).movedim(dim, 0)
    with torch.no_grad():
        rows = each.rows().clone()
        factor = torch.rand(rows.shape[:2], generator=source(3)) + 0.5
        each.set_rows(rows * factor[..., None])
    after = layer(x).movedim(dim, 0)
    expected = before * factor.reshape(-1, *[1] * (before.dim() - 1))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_the_report_says_what_was_meant_and_drawn() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50))
    report = initialize(model, "kaiming", generator=source())
    line = report.lines[0]
    assert (line.fan_in, line.fan_out) == (200, 100)
    assert line.predicted == pytest.approx(2.0)
    assert line.predicted_back == pytest.approx(1.0)
    weight = model[0].weight
    measured = 200 * float(weight.detach().double().square().mean())  # type: ignore[operator]
    assert line.measured == pytest.approx(measured)
    assert line.measured_back == pytest.approx(measured / 2)
    assert line.measured == pytest.approx(2.0, rel=tolerance(weight))  # type: ignore[arg-type]
    assert "kaiming normal, fan_in, gain 1.414" in report.to_text()
    assert '"predicted_back"' in report.to_json()


def test_complex_weights_are_measured_by_their_absolute_value() -> None:
    layer = nn.Linear(256, 256, dtype=torch.complex64)
    (line,) = initialize(layer, "kaiming", generator=source()).lines
    assert line.measured == pytest.approx(2.0, rel=tolerance(layer.weight))


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_kaiming_mode_keeps_signal_or_gradient(mode: str) -> None:
    model = nn.Linear(300, 100)
    (line,) = initialize(model, "kaiming", mode=mode, generator=source()).lines
    kept = line.measured if mode == "fan_in" else line.measured_back
    assert kept == pytest.approx(2.0, rel=tolerance(model.weight))


def test_gain_follows_the_activation_and_slope() -> None:
    assert gain_of("relu") == pytest.approx(math.sqrt(2))
    assert gain_of("leaky_relu", 0.3) == pytest.approx(math.sqrt(2 / 1.09))
    assert gain_of("linear") == 1.0
    assert gain_of("selu") == pytest.approx(1.0, abs=1e-6)  # self-normalizing
    (line,) = initialize(
        nn.Linear(400, 400), "kaiming", activation="leaky_relu", slope=1.0
    ).lines
    assert line.predicted == pytest.approx(1.0)
    with pytest.raises(ArgumentError, match="activation='relux' must be"):
        gain_of("relux")


def test_biases_become_zero_unless_kept() -> None:
    model = nn.Linear(3, 3)
    before = model.bias.detach().clone()
    initialize(model, "xavier", bias=None)
    assert torch.equal(model.bias, before)
    initialize(model, "xavier")
    assert torch.equal(model.bias, torch.zeros(3))


def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    torch.set_rng_state(before)
    for scheme in ("normal", "xavier", "kaiming", "orthogonal"):
        initialize(first, scheme, generator=source(3))
        initialize(second, scheme, generator=source(3))
        assert torch.equal(first.weight, second.weight)
    x = torch.ones(4, 5)
    x[0, 1] = 3.0
    for scheme in ("auto", "lsuv"):
        initialize(first, scheme, example_inputs=x, generator=source(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_that_are_linear_maps_of_their_own_are_drawn_as_such() -> None:
    attention = nn.MultiheadAttention(64, 4)
    lines = {line.label: line for line in initialize(attention, "xavier").lines}
    assert [label.strip() for label in lines] == ["query", "key", "value", "out_proj"]
    assert lines[" query"].predicted == pytest.approx(1.0)  # torch takes 64 + 192
    lstm = nn.LSTM(20, 30)
    lines = {line.label: line for line in initialize(lstm, "kaiming").lines}
    assert len(lines) == 8
    assert lines[" weight_ih_l0[2]"].fan_in == 20
    assert lines[" weight_hh_l0[0]"].fan_in == 30
    assert torch.equal(lstm.bias_ih_l0, torch.zeros(120))
    gru = {line.label for line in initialize(nn.GRUCell(3, 4), "normal").lines}
    assert len(gru) == 6


def test_what_is_left_alone_has_a_reason() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 10)
            self.table = nn.Embedding(10, 8)
            self.head.weight = self.table.weight
            self.free = nn.Linear(8, 8)
            self.again = nn.Linear(8, 8)
            self.again.weight = self.free.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.norm = nn.LayerNorm(8)
            self.lazy = nn.LazyLinear(3)
            self.scale = nn.PReLU()

    model = Model()
    kept = {n: p.clone() for n, p in model.named_parameters() if "lazy" not in n}
    report = initialize(model, "normal", std=0.5)
    assert report.left["table"] == "looks rows up and sums nothing"
    assert report.left["again"] == "shares its weight with 'free'"
    tied = "shares its weight with 'table', which is left alone"
    assert report.left["head"] == tied
    assert "parametrization" in report.left["normed"]
    assert "lazy" in report.left["lazy"]
    assert "PReLU is no linear map" in report.left["scale"]
    assert "norm" not in report.left
    assert [line.name for line in report.lines] == ["free"]
    for name in ("head.weight", "head.bias", "norm.weight", "scale.weight"):
        assert torch.equal(kept[name], model.get_parameter(name))


def test_layers_are_chosen_by_name() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    before = model["head"].weight.clone()  # type: ignore[operator]
    report = initialize(model, "kaiming", layers=["bo*"])
    assert [line.name for line in report.lines] == ["body"]
    assert report.left == {"head": "not named in layers="}
    assert torch.equal(model["head"].weight, before)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"layers='tail' matches no linear map"):
        initialize(model, "kaiming", layers=["tail"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "glorot"}, "scheme='glorot' must be one of"),
        ({"scheme": "auto"}, "pass example_inputs="),
        ({"scheme": "normal", "std": -1.0}, "std=-1.0 must be"),
        ({"scheme": "kaiming", "mode": "fan"}, "mode='fan' must be"),
        ({"scheme": "kaiming", "activation": "relux"}, "activation='relux'"),
        ({"scheme": "xavier", "distribution": "cauchy"}, "distribution='cauchy'"),
        ({"scheme": "kaiming", "gain": -1.0}, "gain=-1.0 must be"),
        ({"scheme": "kaiming", "gain": math.nan}, "gain=nan must be"),
        ({"scheme": "constant", "value": math.nan}, "value=nan must be finite"),
        ({"scheme": "kaiming", "bias": math.inf}, "bias=inf must be finite"),
        ({"scheme": "kaiming", "std": 0.1}, r"std=0.1 says nothing of .*'normal'"),
        ({"scheme": "normal", "gain": 2.0}, "gain=2.0 says nothing of"),
        ({"scheme": "xavier", "mode": "fan_out"}, "mode='fan_out' says nothing of"),
    ],
)
def test_a_refused_initialization_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ArgumentError, match=message):
        initialize(model, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_what_is_frozen_keeps_the_weights_of_its_checkpoint(kind: str) -> None:
    """Unless it is named; its own part of the report says so."""
    body = nn.MultiheadAttention(4, 2) if kind == "attention" else nn.Linear(4, 4)
    model = nn.ModuleDict({"body": body, "head": nn.Linear(4, 2)})
    body.requires_grad_(False)
    before = [p.clone() for p in body.parameters()]
    report = initialize(model, "kaiming")
    assert [line.name for line in report.lines] == ["head"]
    for name, reason in report.left.items():
        assert name.startswith("body")
        assert reason == "frozen (requires_grad is False); layers= draws it"
    for was, p in zip(before, body.parameters(), strict=True):
        assert torch.equal(was, p)
    assert initialize(model, "kaiming", layers=["body*"]).lines
    assert not torch.equal(before[0], next(body.parameters()))


def test_a_model_made_in_inference_mode_is_refused_in_words() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
        assert initialize(model, "kaiming").lines
    with pytest.raises(ArgumentError, match=r"made inside torch\.inference_mode"):
        initialize(model, "kaiming")


def test_constant_units_stay_equal_in_training() -> None:
    """Forward and backward: the rank of each layer is 1 for ever."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    model.append(nn.Linear(5, 1))
    initialize(model, "constant", value=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    middle = model[2].weight
    assert torch.equal(middle, middle[:1].expand_as(middle))  # type: ignore[index]
    assert not torch.allclose(middle, torch.full_like(middle, 0.3))  # type: ignore[arg-type]
