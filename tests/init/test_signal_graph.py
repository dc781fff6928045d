"""Auto and LSUV: what a run of the model shows, and what is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit.nn
from normkit.errors import ArgumentError
from normkit.init import initialize, linear_maps
from normkit.init.tracer import trace_signals


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mixed(nn.Module):
    """Activations as modules, functions, methods and in place, out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(32, 5)
        self.a = nn.Linear(16, 32)
        self.b = nn.Linear(32, 32)
        self.c = nn.Conv1d(1, 4, 3, padding=1)
        self.d = nn.Linear(128, 32)
        self.drop = nn.Dropout(0.9)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.a(x), 0.3, inplace=True)
        x = torch.tanh(self.drop(self.norm(self.b(x))))
        x = self.c(x.unsqueeze(1)).relu_().flatten(1)
        x = self.d(x)
        return self.last(x)


def test_the_activation_that_follows_is_found_however_it_is_called() -> None:
    model = Mixed()
    flow = trace_signals(model, torch.randn(7, 16), linear_maps(model)[0])
    found = {n: flow.following_activation(n) for n in flow.order()}
    assert list(found) == ["a", "b", "c", "d", "last"]
    names = {name: None if s is None else s.name for name, s in found.items()}
    assert names == {
        "a": "leaky_relu",
        "b": "tanh",
        "c": "relu",
        "d": None,
        "last": None,
    }
    leaky = found["a"]
    assert leaky is not None
    assert leaky.function is not None
    assert float(leaky.function(torch.tensor(-1.0))) == pytest.approx(-0.3)


def test_auto_scales_by_what_precedes_and_what_follows() -> None:
    model = Mixed()
    report = initialize(
        model, "auto", example_inputs=torch.randn(64, 16), generator=source()
    )
    found = {line.name: line.predicted for line in report.lines}
    assert list(found) == ["a", "b", "c", "d", "last"]  # in the order they run
    assert found["a"] == pytest.approx(2 / 1.09)  # outputs of φ get 1
    assert found["b"] == pytest.approx(1.0)
    assert found["c"] == pytest.approx(2 / 0.3943, rel=1e-3)  # E[tanh²] = 0.394 goes in
    assert found["d"] == pytest.approx(1.0)
    assert found["last"] == pytest.approx(1.0)


class Block(nn.Module):
    """A residual block, with its norm last or first."""

    def __init__(self, i: int, o: int, stride: int, norm: Any, *, first: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = norm(i if first else o), norm(o)
        has_down = stride > 1 or i != o
        self.down = nn.Conv2d(i, o, 1, stride) if has_down else nn.Identity()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            h = self.conv1(self.bn1(x).relu())
            return self.conv2(self.bn2(h).relu()) + self.down(x)
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        h += self.down(x)
        return h.relu_()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, normkit.nn.BatchNorm2d])
def test_a_norm_that_ends_a_branch_starts_at_zero(norm: Any) -> None:
    blocks = [Block(8, 8, 1, norm, first=False), Block(8, 16, 2, norm, first=False)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), *blocks)
    x = torch.randn(4, 3, 12, 12)
    report = initialize(model, "auto", example_inputs=x, generator=source())
    zero = {n for n, m in model.named_modules() if n.endswith("bn2")}
    assert zero == {"3.bn2", "4.bn2"}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            expected = 0.0 if name in zero else 1.0
            assert torch.equal(module.weight, torch.full_like(module.weight, expected))
    assert len(report.notes) == 2
    # The block is the identity of a rectified input, the shortcut alone elsewhere.
    stem = model[:3](x)
    assert torch.equal(blocks[0](stem), stem)


def test_a_map_that_ends_a_branch_is_scaled_by_the_number_of_branches() -> None:
    blocks = [Block(8, 8, 1, nn.BatchNorm2d, first=True) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks)
    x = torch.randn(8, 3, 10, 10)
    report = initialize(model, "auto", example_inputs=x, generator=source())
    lines = {line.name: line for line in report.lines}
    assert lines["0"].predicted == pytest.approx(2.0)  # the trunk, before a ReLU
    for i in range(1, 5):
        # Of the trunk's size over 4, from inputs of 1/2; after the last no ReLU is.
        q = 2.0 if i < 4 else 1.0
        assert lines[f"{i}.conv2"].predicted == pytest.approx(q / 4 / 0.5)
        assert "1 of 4 residual branches" in lines[f"{i}.conv2"].rule
        assert lines[f"{i}.conv1"].predicted == pytest.approx(4.0)
    plain = initialize(
        model, "auto", example_inputs=x, residual=False, generator=source()
    )
    conv2 = next(line for line in plain.lines if line.name == "4.conv2")
    assert conv2.predicted == pytest.approx(2.0)
    assert plain.notes == ()


def test_attention_branches_are_scaled_at_their_output_projection() -> None:
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.3, norm_first=True, batch_first=True, activation="gelu"
    )
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    report = initialize(
        model, "auto", example_inputs=torch.randn(4, 9, 32), generator=source()
    )
    lines = {line.label: line for line in report.lines}
    for i in range(3):
        assert lines[f"layers.{i}.self_attn.out_proj"].predicted == pytest.approx(1 / 6)
        assert lines[f"layers.{i}.self_attn query"].predicted == pytest.approx(1.0)
        assert "1 of 6" in lines[f"layers.{i}.linear2"].rule
        assert lines[f"layers.{i}.linear1"].predicted == pytest.approx(1.0)
    assert all(
        torch.equal(m.weight, torch.ones(32))
        for m in model.modules()
        if isinstance(m, nn.LayerNorm)
    )


def test_a_sum_of_two_equal_paths_is_no_residual() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.b(y) + (self.b(x) + self.a(x))

    model = Twins()
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    report = initialize(model, "auto", example_inputs=(x, y), generator=source())
    assert report.notes == ()
    assert torch.equal(model.norm.weight, torch.ones(4))


def test_recording_leaves_the_model_bit_for_bit_as_it_was() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(4 * 36, 5)),
    )
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    trace_signals(
        model, torch.randn(4, 3, 8, 8, generator=source()), linear_maps(model)[0]
    )
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))
    assert modes == [m.training for m in model.modules()]
    assert all(not m._forward_hooks for m in model.modules())
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


class Shared(nn.Module):
    """A layer that runs twice, a residual, an existing batch norm, in no order."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(24, 7)
        self.twice = nn.Linear(24, 24)
        self.conv = nn.ConvTranspose1d(24, 24, 4, stride=2, groups=2)
        self.bn = nn.BatchNorm1d(24)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(x).tanh()
        h = x + self.drop(self.twice(h)).tanh()
        h = self.bn(self.conv(h.unsqueeze(-1).expand(-1, -1, 5))).relu()
        return self.out(h.mean(-1))


def outputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each linear map puts out, all calls together, dropout off."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        m.register_forward_hook(
            lambda m, i, o, n=n: seen.setdefault(n, []).append(o.detach())
        )
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.ConvTranspose1d))
    ]
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
    model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_lsuv_gives_every_layer_outputs_of_variance_one() -> None:
    model = Shared()
    x = torch.randn(128, 24) * 5 + 2
    report = initialize(model, "lsuv", example_inputs=x, generator=source())
    assert [line.name for line in report.lines] == ["twice", "conv", "out"]
    for name, y in outputs_of(model, x).items():
        assert float(y.var(correction=0)) == pytest.approx(1.0, abs=0.06), name
    for line in report.lines:
        assert line.rule.startswith("lsuv, outputs of variance")


def test_lsuv_shows_its_progress_when_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(64, 8)
    initialize(model, "lsuv", example_inputs=x)
    assert not capsys.readouterr().err
    initialize(model, "lsuv", example_inputs=x, progress=True)
    assert "initialize" in capsys.readouterr().err


def test_lsuv_per_channel_centres_and_scales_each_one() -> None:
    model = Shared()
    x = torch.randn(256, 24) * 5 + 2
    initialize(model, "lsuv", example_inputs=x, per_channel=True, generator=source())
    for name, y in outputs_of(model, x).items():
        flat = y.transpose(0, 1).flatten(1)
        torch.testing.assert_close(
            flat.var(1, correction=0), torch.ones(len(flat)), rtol=0.06, atol=0.0
        )
        assert float(flat.mean(1).abs().max()) < 0.06, name


def test_lsuv_that_fails_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ArgumentError, match="outputs of '0' have variance 0"):
        initialize(model, "lsuv", example_inputs=torch.zeros(5, 4))
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )


def test_lsuv_trains_a_deep_tanh_net_that_small_weights_do_not() -> None:
    """Twenty layers, n·Var[w] = 0.41 as in the textbook: the net stays at chance."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    x = torch.tensor(data, dtype=torch.float32)
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels)

    def accuracy(scheme: str, **options: Any) -> float:
        layers = [m for _ in range(20) for m in (nn.Linear(64, 64), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(64, 10))
        initialize(model, scheme, generator=source(), **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        rows = source(1)
        for _ in range(80):
            batch = torch.randint(len(x), (128,), generator=rows)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((model(x).argmax(1) == y).double().mean())

    assert accuracy("normal", std=0.08) < 0.3
    assert accuracy("lsuv", example_inputs=x[:256]) > 0.8


def test_inputs_may_be_keywords() -> None:
    model = Mixed()
    report = initialize(model, "auto", example_inputs={"x": torch.randn(9, 16)})
    assert len(report.lines) == 5


def test_a_norm_before_a_map_of_another_class_is_not_the_end_of_its_branch() -> None:
    class Map(nn.Module):
        """x @ weight, as transformers' Conv1D."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.02 * torch.randn(8, 8))
            self.bias = nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight)

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.map = nn.LayerNorm(8), Map()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.map(self.norm(x))

    model = nn.Sequential(nn.Linear(8, 8), PreNorm(), PreNorm(), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    initialize(model, "auto", example_inputs=x, generator=source())
    for name in ("1.norm", "2.norm"):
        assert torch.equal(model.get_submodule(name).weight, torch.ones(8))


class Cached(nn.Module):
    """Keys are appended to a cache that starts without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.tensor([]), self.key(x)]))


def test_signals_pass_what_is_appended_to_an_empty_cache() -> None:
    x = torch.randn(256, 32, generator=source())
    report = initialize(Cached(), example_inputs=x, generator=source(1))
    for line in report.lines:
        assert line.signal_predicted == pytest.approx(1.0, rel=0.2)
        assert line.gradient_predicted == pytest.approx(1.0, rel=0.2)
    assert not report.notes


class Positions(nn.Module):
    """The cosine makes a signal of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + torch.cos(torch.zeros(x.shape)))


def test_a_signal_that_theory_cannot_predict_is_no_number_and_has_a_reason() -> None:
    report = initialize(Positions(), example_inputs=torch.randn(4, 8))
    first, last = report.lines
    assert first.signal_predicted is not None
    assert last.signal_predicted is None
    assert last.signal_measured is not None
    assert "nan" not in report.to_text()
    assert report.notes == (
        "predicted as - past cos: theory has no factor where inputs are 0 and outputs "
        "are not",
    )


class Gated(nn.Module):
    """The feed-forward part of Llama, behind its own RMS norm, written out."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_each_factor_of_a_product_has_the_gradient_of_the_other() -> None:
    """That of `up` is the size of silu(gate), a quarter of that of `gate`'s input."""
    torch.manual_seed(0)
    first, block = nn.Linear(256, 256), Gated()
    x = 0.05 * torch.randn(512, 256)
    model = nn.Sequential(first, block)
    report = initialize(model, "kaiming", example_inputs=x, generator=source())
    for line in report.lines:
        measured, predicted = line.gradient_measured, line.gradient_predicted
        assert measured is not None
        assert predicted == pytest.approx(measured, rel=0.35), line.name


def test_a_square_hands_its_gradient_back_once() -> None:
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), Squared(), nn.Linear(256, 256))
    x = torch.randn(512, 256)
    report = initialize(model, "kaiming", example_inputs=x, generator=source())
    line = report.lines[0]
    assert line.gradient_measured is not None
    assert line.gradient_predicted == pytest.approx(line.gradient_measured, rel=0.2)
