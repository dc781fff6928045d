"""Steps that never come: parameters left out (D27), a warm-up without an end (D27)."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from doctor.models import batches, build
from normkit.doctor import Finding, watch


def watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    others: torch.optim.Optimizer | None = None,
    rate: Callable[[int], float] | None = None,
    steps: int = 40,
) -> list[Finding]:
    """Train, and return the alarms of D27."""
    made = batches()
    with watch(model, optimizer) as seen:
        for step in range(steps):
            x, y = made[step % len(made)]
            for each in filter(None, (optimizer, others)):
                each.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if rate is not None:
                optimizer.param_groups[0]["lr"] = rate(step)
            for each in filter(None, (optimizer, others)):
                each.step()
            seen.log(loss=loss.item())
    return [f for f in seen.findings() if f.id == "D27" and f.is_alarm]


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    norms = [p for p in model.parameters() if p.dim() == 1]
    return norms, [p for p in model.parameters() if p.dim() > 1]


def test_scales_that_the_optimizer_was_not_given_are_told() -> None:
    model = build("mlp")
    _, others = parts(model)
    (found,) = watched(model, torch.optim.Adam(others, 1e-3))
    assert "the optimizer does not hold them" in found.evidence
    assert {"1", "4"} <= set(found.layers)
    whole = build("mlp")
    assert not watched(whole, torch.optim.Adam(whole.parameters(), 1e-3))


def test_scales_that_another_optimizer_holds_or_that_are_frozen_are_no_fault() -> None:
    model = build("mlp")
    norms, others = parts(model)
    second = torch.optim.SGD(norms, 1e-2)
    assert not watched(model, torch.optim.Adam(others, 1e-3), others=second)
    frozen = build("mlp")
    norms, others = parts(frozen)
    for parameter in norms:
        parameter.requires_grad_(False)
    assert not watched(frozen, torch.optim.Adam(others, 1e-3))


def test_scales_that_the_program_moves_itself_are_no_fault() -> None:
    """By no optimizer, as the averages of a target network."""
    model = build("mlp")
    norms, others = parts(model)
    optimizer = torch.optim.Adam(others, 1e-3)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:25]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for parameter in norms:
                    parameter -= 1e-4 * parameter.grad
    assert not [f for f in seen.findings() if f.id == "D27" and f.is_alarm]


@pytest.mark.parametrize("is_first", [False, True])
def test_weights_that_another_optimizer_moves_are_not_judged_by_their_steps(
    is_first: bool,
) -> None:
    model = build("mlp")
    head = torch.optim.Adam(model[-1].parameters(), 1e-3)
    body = torch.optim.SGD(model[:-1].parameters(), 0.05)
    with watch(model, head, every=1) as seen:
        for x, y in batches()[:25]:
            head.zero_grad()
            body.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for each in (body, head) if is_first else (head, body):
                each.step()
    found = [f for f in seen.readings() if f.id in ("D24", "D27")]
    assert not [f for f in found if f.is_alarm]
    name = str(len(model) - 1)
    assert [f.layer for f in found if f.id == "D27"] == [name]
    layers = seen.history["layers"]
    assert all(layers[name]["update_ratio"])
    assert not any(layers["0"]["update_ratio"])


def test_a_head_that_was_replaced_behind_its_optimizer_is_told() -> None:
    """On a frozen network in eval mode, whose calls are no training steps."""

    def told(*, is_behind: bool) -> list[Finding]:
        model = build("mlp").eval()
        model.requires_grad_(False)
        old = nn.Linear(48, 10)
        model[-1] = nn.Linear(48, 10)
        held = old if is_behind else model[-1]
        return watched(model, torch.optim.Adam(held.parameters(), 1e-2))

    (found,) = told(is_behind=True)
    assert "weight and bias got gradients" in found.evidence
    assert not told(is_behind=False)


def test_an_optimizer_of_flattened_parameters_holds_them() -> None:
    model = build("mlp")
    parts = list(model.parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parts]))
    sizes = [p.numel() for p in parts]
    for p, values in zip(parts, flat.detach().split(sizes), strict=True):
        p.data = values.view_as(p)

    class Flat(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            flat.grad = torch.cat(
                [p.grad.flatten() for p in parts if p.grad is not None]
            )
            super().step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            model.zero_grad(set_to_none)

    assert not watched(model, Flat([flat], 0.05))


@pytest.mark.parametrize(
    ("rate", "steps", "expected"),
    [
        (lambda step: 1e-8 * (step + 1), 240, 1),
        # It may be the first of many.
        (lambda step: 1e-8 * (step + 1), 150, 0),
        # The steps arrive, and the network learns.
        (lambda step: 1e-5 * (step + 1), 240, 0),
        # A warm-up that ends.
        (lambda step: 1e-6 * min(step + 1, 100), 240, 0),
    ],
)
def test_a_warm_up_that_does_not_end_is_told(
    rate: Callable[[int], float], steps: int, expected: int
) -> None:
    model = build("mlp")
    found = watched(
        model, torch.optim.Adam(model.parameters(), 0.0), rate=rate, steps=steps
    )
    told = [f for f in found if "rises to the last" in f.evidence]
    assert len(told) == expected
