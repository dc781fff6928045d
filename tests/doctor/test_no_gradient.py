"""D24 of parameters that get no gradient: all, or those behind a cut."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build
from normkit.doctor import Finding, diagnose, watch


class LowRank(nn.Module):
    """A frozen layer, and a product of two factors that are trained."""

    def __init__(self, layer: nn.Linear, *, is_drawn: bool) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        draw = torch.randn if is_drawn else torch.zeros
        self.a = nn.Parameter(draw(4, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def adapted(*, is_drawn: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build("mlp").requires_grad_(False)
    model[-1] = LowRank(model[-1], is_drawn=is_drawn)
    return model


def told(
    model: nn.Module, *, is_cleared: bool = False, scale: float = 1.0, steps: int = 10
) -> list[Finding]:
    """Train, and return the errors of D24."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, weight_decay=1e-4)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:steps]:
            optimizer.zero_grad()
            loss = scale * F.cross_entropy(model(x), y)
            loss.backward()
            if is_cleared:
                optimizer.zero_grad()
            optimizer.step()
            seen.log(loss=loss.item())
    return [f for f in seen.findings() if f.id == "D24" and f.severity == "error"]


def test_two_factors_that_start_at_zero_are_told() -> None:
    (found,) = told(adapted(is_drawn=False))
    assert "in all 10 steps" in found.evidence
    assert "is zero" in found.evidence
    assert not told(adapted(is_drawn=True))


def test_gradients_that_are_cleared_before_the_step_are_told() -> None:
    (found,) = told(build("mlp"), is_cleared=True)
    assert "is None" in found.evidence
    assert not told(build("mlp"))


def test_a_loss_of_zero_and_a_few_steps_are_no_fault() -> None:
    assert not told(build("mlp"), scale=0.0)
    assert not told(adapted(is_drawn=False), steps=4)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_part_that_is_not_trained_beside_a_head_is_no_fault(is_frozen: bool) -> None:
    model, head = build("mlp"), nn.Linear(10, 10)
    model.requires_grad_(not is_frozen)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:10]:
            optimizer.zero_grad()
            F.cross_entropy(head(model(x).detach()), y).backward()
            optimizer.step()
    assert not [f for f in seen.findings() if f.id == "D24" and f.severity == "error"]


@pytest.mark.parametrize("is_kept", [False, True])
def test_gradients_of_a_closure_count(is_kept: bool) -> None:
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with watch(model, optimizer) as seen:
        for x, y in batches()[:8]:
            optimizer.step(partial(closure, x, y))
            if not is_kept:
                optimizer.zero_grad()
    assert not [f for f in seen.findings() if f.id == "D24" and f.severity == "error"]


class TwoParts(nn.Module):
    """Features and a head; `passes` is how the features get to the head."""

    def __init__(self, passes: Callable[[Tensor], Tensor], kind: str = "") -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)
        )
        self.head, self.pooler = nn.Linear(16, 3), nn.Linear(16, 5)
        self.passes, self.kind = passes, kind

    def forward(self, x: Tensor) -> Any:
        if self.kind == "no_grad":
            with torch.no_grad():
                h = self.features(x)
        else:
            h = self.features(x)
            if self.kind == "pooler_before":
                self.pooler(h)  # nothing reads it, and it gets no gradient either
            h = self.passes(h)
        if self.kind == "pooler":
            self.pooler(h)  # nothing reads it
        if self.kind == "first":
            return self.pooler(h), self.head(h)
        return self.head(h)


def _labelled() -> list[tuple[Tensor, Tensor]]:
    y = torch.randint(3, (400,))
    x = torch.randn(400, 8) + 2 * F.one_hot(y, 8)
    return list(zip(x.split(40), y.split(40), strict=True))


def _cut_off(model: nn.Module, loss: Any = F.cross_entropy) -> list[Finding]:
    found = diagnose(model, _labelled(), loss).readings
    return [f for f in found if f.id == "D24" and "out of the graph" in f.evidence]


@pytest.mark.parametrize(
    "passes",
    [
        Tensor.detach,
        lambda h: h.data,
        lambda h: torch.tensor(h.tolist()),
        lambda h: torch.from_numpy(h.detach().numpy()),
    ],
    ids=["detach", "data", "tolist", "numpy"],
)
def test_a_forward_that_leaves_the_graph_is_named_with_its_layers(passes: Any) -> None:
    model = TwoParts(passes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    (found,) = _cut_off(model)
    assert [p._version for p in model.parameters()] == versions
    assert (found.severity, found.layer) == ("warning", "features.3")
    assert found.details["layers"] == ["features.0", "features.1", "features.3"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["", "pooler", "no_grad", "first"])
def test_layers_without_a_gradient_that_no_loss_reads_are_no_fault(kind: str) -> None:
    """Nor features that are computed without gradients, which D07 tells of."""

    def loss(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out[1] if kind == "first" else out, y)

    assert not _cut_off(TwoParts(lambda h: h, kind), loss)


def test_what_nothing_reads_is_not_named_with_what_is_cut_off() -> None:
    (found,) = _cut_off(TwoParts(Tensor.detach, "pooler_before"))
    assert found.details["layers"] == ["features.0", "features.1", "features.3"]


def test_features_that_were_trained_may_be_detached() -> None:
    model = TwoParts(Tensor.detach)
    norm = model.features[1]
    assert isinstance(norm, nn.BatchNorm1d)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    (found,) = _cut_off(model)
    assert found.severity == "info"


def test_a_loss_that_refuses_other_weights_is_left_alone() -> None:
    """And a model that cannot be copied has its own weights afterwards."""

    class Uncopied(TwoParts):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("holds a handle")

    model = Uncopied(Tensor.detach)
    weight = model.features[3].weight
    own = weight.detach().clone()
    kept = [(p, p.data_ptr(), p._version) for p in model.parameters()]
    refused = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if not torch.equal(weight, own):
            refused.append(out)
            raise ValueError("these are no logits")
        return F.cross_entropy(out, y)

    assert not _cut_off(model, loss)
    assert refused
    assert torch.equal(weight, own)
    assert [(p, p.data_ptr(), p._version) for p in model.parameters()] == kept
