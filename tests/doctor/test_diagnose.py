import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from doctor.models import batches, build, norms, trained
from normkit.doctor import diagnose
from normkit.errors import ArgumentError

LOSS = nn.CrossEntropyLoss()


class Uncopyable:
    def __deepcopy__(self, memo: dict) -> None:
        raise TypeError("this cannot be copied")


def everything_of(model: nn.Module) -> list[Any]:
    """All that a diagnosis could change in a model."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    return [
        hooks,
        [m.training for m in model.modules()],
        [id(t) for t in tensors],
        [t.detach().clone().numpy().tobytes() for t in tensors],
        [id(p.grad) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
    ]


def random_states(generator: torch.Generator) -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        generator.get_state().tolist(),
    ]


@pytest.mark.parametrize("copyable", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_diagnosis_leaves_everything_bit_for_bit(
    copyable: bool, fails: bool, training: bool
) -> None:
    model = build("mlp", dropout=0.2)
    model.train(training)
    model[1].eval()  # frozen by hand, whatever the mode of the rest
    if not copyable:
        model.extra = Uncopyable()
    x, y = batches()[0]
    LOSS(model(x), y).backward()
    model[0].weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(*map(torch.cat, zip(*batches()[:4], strict=True)))
    loader = DataLoader(data, 32, shuffle=True, generator=generator)
    calls = []

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if fails and len(calls) == 12:
            raise KeyboardInterrupt
        return LOSS(output, targets)

    before, states = everything_of(model), random_states(generator)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            diagnose(model, loader, loss_fn)
    else:
        diagnose(model, loader, loss_fn)
    assert everything_of(model) == before
    assert random_states(generator) == states


def test_the_same_model_and_batches_give_the_same_diagnosis() -> None:
    model = trained("mlp", 40, dropout=0.3)
    torch.manual_seed(1)
    first = diagnose(model, batches()[:6], LOSS).to_json()
    torch.manual_seed(2)
    assert diagnose(model, batches()[:6], LOSS).to_json() == first


def test_a_copy_and_the_model_itself_give_the_same_diagnosis() -> None:
    model = trained("residual", 20)
    found = diagnose(model, batches()[:6], LOSS).to_json()
    model.extra = Uncopyable()
    assert diagnose(model, batches()[:6], LOSS).to_json() == found


def test_json_is_strict_and_complete() -> None:
    model = trained("mlp", 40, momentum=0.001)
    diagnosis = diagnose(model, batches(), LOSS)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(diagnosis.to_json(), parse_constant=refuse)
    assert found["schema"] == "normkit.diagnosis/1"
    assert found["named"] == diagnosis.named
    assert found["named"][:2] == ["D04", "D01"]
    entries = [*found["findings"], *found["not_judged"], *found["clear"]]
    # A finding over several layers is one entry.
    said = {(e["id"], k) for e in entries for k in e.get("layers") or [e["layer"]]}
    assert said == {(reading.id, reading.layer) for reading in diagnosis.readings}
    keys = {"id", "name", "layer", "severity", "value", "threshold", "evidence"}
    for entry in entries:
        assert (
            keys | {"fix", "details"}
            <= entry.keys()
            <= keys | {*("fix", "details", "layers", "follows")}
        )
    layers = {k for e in found["findings"] if e["id"] == "D01" for k in e["layers"]}
    assert layers == set(norms(model))


def test_text_names_check_layer_value_and_fix() -> None:
    text = diagnose(trained("mlp", 20, momentum=0.001), batches(), LOSS).to_text()
    assert "1 error" in text.splitlines()[0]
    assert "first D04 momentum_convention" in text.splitlines()[0]
    assert "D04 momentum_convention  layer 1 and 3 more layers: momentum 0.001" in text
    assert "fix: set momentum=0.1" in text


def test_the_page_holds_untrusted_names_as_text(tmp_path: Any) -> None:
    pytest.importorskip("jinja2")
    name = "<script>alert(1)</script>"
    model = nn.Sequential()
    model.add_module(name, nn.BatchNorm1d(64, momentum=0.001))
    for x, _ in batches():
        model(5 + x)
    diagnosis = diagnose(model, batches())
    page = diagnosis.to_html(tmp_path / "page.html")
    assert diagnosis.findings[0].layer == name
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert (tmp_path / "page.html").read_text() == page


def test_without_a_loss_the_gap_is_not_judged() -> None:
    diagnosis = diagnose(trained("mlp", 60), batches())
    reasons = {f.id: f.evidence for f in diagnosis.not_judged}
    assert "loss_fn" in reasons["D02"]
    assert "loss_fn" in reasons["D24"]
    assert {f.id for f in diagnosis.clear} >= {"D01", "D22"}


def test_too_few_samples_are_not_judged() -> None:
    diagnosis = diagnose(trained("mlp", 60, momentum=0.001), batches(8)[:2], LOSS)
    judged = {f.id for f in diagnosis.readings if f.severity != "not_judged"}
    assert not judged & {"D01", "D02"}
    assert {f.id for f in diagnosis.not_judged} >= {"D01", "D02"}


def test_layers_kept_frozen_on_purpose_are_not_stale() -> None:
    class Frozen(nn.Module):
        """Fine-tuning as it should be: train() leaves the batch norms in eval."""

        def __init__(self) -> None:
            super().__init__()
            self.body = build("cnn")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            for norm in norms(self).values():
                norm.eval()
            return self

    for model in (Frozen().train(), Frozen().eval()):
        diagnosis = diagnose(model, batches(), LOSS)
        assert not {"D01", "D02", "D03", "D04"} & {f.id for f in diagnosis.readings}


def test_instance_norm_is_not_held_to_the_rules_of_batch_norm() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.InstanceNorm2d(1, track_running_stats=True, momentum=0.001),
    )
    found = diagnose(model, batches()[:3])
    assert not {"D01", "D03", "D04"} & {f.id for f in found.readings}


@pytest.mark.parametrize("pack", ["tuple", "list", "dict", "tensor", "custom"])
def test_batches_come_in_many_shapes(pack: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(64)

        def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.norm(x)[:, :10]}

    def loss_fn(output: dict[str, Tensor], targets: Any) -> Tensor:
        if isinstance(targets, dict):
            targets = targets["y"]
        if pack == "tensor":
            return output["logits"].square().mean()
        return LOSS(output["logits"], targets)

    packed = {
        "tuple": lambda x, y: (x, y),
        "list": lambda x, y: [x, y],
        "dict": lambda x, y: {"x": x, "y": y},
        "tensor": lambda x, y: x,
        "custom": lambda x, y: ("id", y, x),
    }[pack]
    loader = [packed(x, y) for x, y in batches()]
    forward = (lambda model, batch: model(batch[2])) if pack == "custom" else None
    diagnosis = diagnose(Model(), loader, loss_fn, forward=forward)
    assert diagnosis.statistics.evaluation is not None
    assert diagnosis.statistics.samples == sum(len(x) for x, _ in batches())


def test_a_mask_given_to_the_layer_is_respected() -> None:
    class Masked(nn.BatchNorm1d):
        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Masked(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=x[:, :1] < 100)

    torch.manual_seed(0)
    x = torch.randn(8, 64, 4, 5)
    x[..., 3:] = 1000.0
    statistics = diagnose(Model(), list(x)).statistics
    pooled = statistics.layers[0].norm.in_training.pooled
    kept = x[..., :3].transpose(1, 2).flatten(1).double()
    assert int(pooled.count[0]) == 8 * 64 * 3
    expected = x[..., :3].transpose(2, 1).reshape(8, 4, -1)
    mean = expected.double().mean((0, 2))
    assert torch.allclose(pooled.mean, mean, atol=1e-6)
    assert kept.numel() == 4 * int(pooled.count[0])


def test_statistics_are_those_of_all_batches_together() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 3, 4) * 2 + 10 for n in (7, 64, 32)]
    layer = nn.BatchNorm1d(3)
    stream = diagnose(layer, parts).statistics.layers[0].norm.in_training
    values = torch.cat(parts).transpose(0, 1).flatten(1).double()
    assert torch.allclose(stream.pooled.mean, values.mean(1), atol=1e-6)
    assert torch.allclose(stream.pooled.var, values.var(1, correction=0), rtol=1e-6)
    within = sum(
        p.transpose(0, 1).flatten(1).double().var(1, correction=0) * p[:, 0].numel()
        for p in parts
    )
    assert torch.allclose(stream.within, within, rtol=1e-5)
    per_sample = torch.cat(parts).double().mean(2)
    assert torch.allclose(stream.sample_means.var, per_sample.var(0, correction=0))
    assert (stream.batches, stream.values, stream.samples) == (3, 28, 7)


def test_bad_input_is_named() -> None:
    model = build("mlp")
    with pytest.raises(ArgumentError, match="no batch"):
        diagnose(model, [])
    with pytest.raises(ArgumentError, match="max_batches=0"):
        diagnose(model, batches(), max_batches=0)
    with pytest.raises(ArgumentError, match=r"shape \(64,\)"):
        diagnose(model, batches(), nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ArgumentError, match="no check is called D99"):
        diagnose(model, batches(), LOSS, checks_to_run=["D99"])
    with pytest.raises(ArgumentError, match=r"write checks_to_run=\['D01'\]"):
        diagnose(model, batches(), LOSS, checks_to_run="D01")
    with pytest.raises(ArgumentError, match="2 batches, all of 0 samples"):
        diagnose(model, [(x[:0], y[:0]) for x, y in batches()[:2]], LOSS)


def test_sparse_gradients_have_the_norms_of_dense_ones() -> None:
    torch.manual_seed(0)
    data = [(torch.randint(20, (32, 3)), torch.randint(2, (32,))) for _ in range(5)]

    def norms_of(layer: type[nn.Module], *, sparse: bool) -> list[tuple[float, ...]]:
        torch.manual_seed(0)
        table: Any = layer(20, 8, sparse=sparse)
        table.weight.data[3] = table.weight.data[5]  # equal rows are compared
        tail = [nn.Flatten(1), nn.LazyLinear(2)]
        model = nn.Sequential(table, *tail)
        model(data[0][0])
        layers = diagnose(model, data, LOSS).statistics.layers
        return [la.weight.gradient_norm for la in layers if la.weight is not None]

    for layer in (nn.Embedding, nn.EmbeddingBag):
        dense, sparse = (norms_of(layer, sparse=value) for value in (False, True))
        assert len(dense) > 0
        assert len(dense) == len(sparse)
        for one, other in zip(dense, sparse, strict=True):
            assert one == pytest.approx(other)


def test_a_model_of_complex_numbers_is_no_model_that_never_ran() -> None:
    torch.manual_seed(0)
    dtype = torch.complex64
    model = nn.Sequential(nn.Linear(4, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype))
    x, y = torch.randn(6, 32, 4, dtype=dtype), torch.randint(2, (6, 32))
    classes = diagnose(
        model, list(zip(x, y, strict=True)), lambda o, t: LOSS(o.abs(), t)
    )
    assert classes.statistics.samples == 192
    assert classes.statistics.evaluation.batch_metric == ()
    values = list(zip(x, x[..., :2], strict=True))
    found = diagnose(model, values, lambda o, t: (o - t).abs().square().mean())
    assert found.statistics.evaluation.batch_loss[0] > 0


def test_a_diagnosis_in_inference_mode_measures_gradients() -> None:
    model = trained("mlp")
    outside = diagnose(model, batches(), LOSS)
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in batches()]
        inside = diagnose(model, data, LOSS)
    assert inside.readings == outside.readings
    assert inside.statistics.layers[0].weight.gradient_norm
    assert not torch.is_inference_mode_enabled()
