"""Arguments that cannot be used are refused with what was given and what to give."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from normkit.errors import ArgumentError

LOSS = F.cross_entropy
BATCHES = [(x, (x[:, 0] > 0).long()) for x in torch.randn(20, 32, 4)]


def network(*, is_lazy: bool = False) -> nn.Module:
    first = nn.LazyLinear(8) if is_lazy else nn.Linear(4, 8)
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def diagnosed(loss: Callable[..., object] = LOSS, **options: object) -> object:
    return normkit.diagnose(network(), BATCHES, loss, **options)  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "a loss that is a float": (
        lambda: diagnosed(lambda y, t: LOSS(y, t).item()),
        r"loss_fn gave a float; .* without \.item\(\)",
    ),
    "a loss of several things": (
        lambda: diagnosed(lambda y, t: (LOSS(y, t), y)),
        "loss_fn gave a tuple",
    ),
    "one batch": (
        lambda: normkit.diagnose(network(), BATCHES[0], LOSS),
        r"one batch of \(inputs, targets\).* wrap it in a list",
    ),
    "no targets": (
        lambda: normkit.diagnose(network(), [x for x, _ in BATCHES], LOSS),
        "has no second item to be the targets",
    ),
    "max_batches": (lambda: diagnosed(max_batches="5"), "no number of batches"),
    "seed": (lambda: diagnosed(seed="a"), "no seed"),
    "targets": (lambda: diagnosed(targets="y"), "targets= is a str"),
    "forward": (lambda: diagnosed(forward="x"), "forward= is a str"),
    "metric": (lambda: diagnosed(metric=F.mse_loss), "negate it"),
    "metric of a gap": (
        lambda: normkit.explain_gap(network(), BATCHES, nn.CrossEntropyLoss()),
        "negate it",
    ),
    "every": (lambda: normkit.watch(network(), every=2.5), "observes no step"),  # type: ignore[arg-type]
    "reference": (
        lambda: normkit.explain_gap(network(), BATCHES, reference="a.pt"),  # type: ignore[arg-type]
        r"reference is a str; .* torch\.load",
    ),
    "repair": (lambda: diagnosed().repair(5), "repair got <class 'int'>"),  # type: ignore[attr-defined]
    "steps": (lambda: diagnosed().train(2.5), "trains nothing"),  # type: ignore[attr-defined]
    "train": (lambda: diagnosed().train(3, train=3), "train= is a int"),  # type: ignore[attr-defined]
    "optimizer": (
        lambda: diagnosed().train(3, torch.optim.SGD),  # type: ignore[attr-defined]
        "the optimizer is the class SGD",
    ),
    "watch of a class": (
        lambda: normkit.watch(network(), torch.optim.SGD),  # type: ignore[arg-type]
        "the optimizer is the class SGD",
    ),
    "lazy, diagnose": (
        lambda: normkit.diagnose(network(is_lazy=True), BATCHES, LOSS),
        "'0.weight'; run the model on one batch first",
    ),
    "lazy, watch": (
        lambda: normkit.watch(network(is_lazy=True)),
        "run the model on one batch first",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_says_what_was_given_and_what_to_give(case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_two_batches_of_inputs_may_be_a_tuple() -> None:
    given = tuple(torch.randn(2, 64, 4))
    assert normkit.diagnose(network(), given).statistics.batches == 2
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    of_two_lengths = torch.randn(16, 4, 10), torch.randn(16, 4, 12)
    assert normkit.calibrate(norm, of_two_lengths).batches == 2


def test_targets_that_are_not_finite_are_the_cause_of_such_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    batches = [(x, x[:, :1].clone()) for x, _ in BATCHES]
    batches[3][1][5] = torch.nan
    found = normkit.diagnose(model, batches, F.mse_loss)
    first, *others = found.findings
    assert (first.id, first.severity) == ("D34", "error")
    assert "0.0016 of the targets are not finite" in first.evidence
    assert {f.follows for f in others if f.is_alarm} <= {"D34"}

    def masked(y: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(y[t.isfinite()], t[t.isfinite()])

    told = normkit.diagnose(model, batches, masked).findings
    assert not any("not finite" in f.evidence for f in told)
