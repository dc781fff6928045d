"""Output, loss and targets that do not belong together; each beside its clean twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches, build, train
from normkit.doctor import Diagnosis, diagnose

Batches = list[tuple[Tensor, Tensor]]


def network(units: int, *end: nn.Module, seed: int = 0) -> nn.Sequential:
    model = build("mlp", seed=seed)
    assert isinstance(model, nn.Sequential)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*model[:-1], nn.Linear(48, units), *end)


def data(target: Callable[[Tensor], Tensor]) -> Batches:
    return [(x, target(y)) for x, y in batches()[:8]]


def number(y: Tensor) -> Tensor:
    return y.float()[:, None]


def share(y: Tensor) -> Tensor:
    return y.float()[:, None] / 9


def is_even(y: Tensor) -> Tensor:
    return (y % 2 == 0).float()[:, None]


def factors(y: Tensor) -> Tensor:
    return torch.stack([(y % n == 0).float() for n in range(2, 6)], 1)


def squared(y: Tensor, target: Tensor) -> Tensor:
    """A loss that is no class and no function of torch."""
    return (y - target).square().mean()


def weighted(*weights: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, target: F.cross_entropy(y, target, torch.tensor(weights))


def weighting_ones(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, target: LOGITS(y, target, pos_weight=torch.tensor(weight))


def is_zero(y: Tensor) -> Tensor:
    return (y == 0).long()


class Words(nn.Module):
    """The log-probabilities (N, L, K) of ten words' classes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.body = dim, network(40)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).view(-1, 10, 4).log_softmax(self.dim)


def as_words(y: Tensor) -> Tensor:
    return (y[:, None] + torch.arange(10)) % 4


def of_words(y: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(y.flatten(0, 1), target.flatten())


def as_distribution(y: Tensor) -> Tensor:
    return 0.9 * F.one_hot(y, 10).float() + 0.01


def divergence(
    taken: Callable[[Tensor, int], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, t: F.kl_div(taken(y, 1), t, reduction="batchmean")


def in_another_unit(y: Tensor, number: int) -> Tensor:
    """Give digits of which so many in each batch of 64 are hundreds."""
    return torch.cat([100 * number_of(y[:number]), number_of(y[number:])])


def number_of(y: Tensor) -> Tensor:
    return y.float()[:, None] + 1


def in_a_function(y: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy that its name does not tell."""
    return F.cross_entropy(y, target)


SIGMOID, TANH, RELU = nn.Sigmoid(), nn.Tanh(), nn.ReLU()
BCE, LOGITS = F.binary_cross_entropy, F.binary_cross_entropy_with_logits
# name: (model, targets, loss) with the fault, the same without, words of the evidence
PAIRS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "targets above a sigmoid": (
        (network(1, SIGMOID), number, F.mse_loss),
        (network(1, SIGMOID), share, F.mse_loss),
        "ends in sigmoid",
    ),
    "targets below a relu": (
        (network(1, RELU), lambda y: number(y) - 5, squared),
        (network(1, RELU), number, squared),
        "ends in relu",
    ),
    "targets above a tanh, by l1": (
        (network(1, TANH), number, F.l1_loss),
        (network(1, TANH), share, F.l1_loss),
        "ends in tanh",
    ),
    "class numbers in binary cross-entropy": (
        (network(1), number, LOGITS),
        (network(1), is_even, LOGITS),
        "no least value",
    ),
    "class numbers that the loss itself makes zeros and ones": (
        (network(1), number, LOGITS),
        (network(1), number, lambda y, t: LOGITS(y, (t > 4).float())),
        "no least value",
    ),
    "labels of -1 and 1": (
        (network(1), lambda y: 2 * is_even(y) - 1, LOGITS),
        (network(1), is_even, LOGITS),
        "no least value",
    ),
    "several labels": (
        (network(4), factors, F.cross_entropy),
        (network(4), factors, LOGITS),
        "labels on average",
    ),
    "one class": (
        (network(10), lambda y: y * 0 + 3, F.cross_entropy),
        (network(10), lambda y: y, F.cross_entropy),
        "nothing to tell apart",
    ),
    "one value": (
        (network(1), lambda y: is_even(y) * 0, LOGITS),
        (network(1), is_even, LOGITS),
        "nothing to tell apart",
    ),
    "nll of probabilities": (
        (network(10, nn.Softmax(1)), lambda y: y, F.nll_loss),
        (network(10, nn.LogSoftmax(1)), lambda y: y, F.nll_loss),
        "gets probabilities",
    ),
    "softmax over one unit": (
        (network(1, nn.Softmax(1)), is_even, BCE),
        (network(1, SIGMOID), is_even, BCE),
        "over one unit",
    ),
    "two sigmoids": (
        (network(1, SIGMOID), is_even, LOGITS),
        (network(1), is_even, LOGITS),
        "applies another",
    ),
    "scores behind a tanh": (
        (network(10, TANH), lambda y: y, in_a_function),
        (network(10), lambda y: y, in_a_function),
        "scores end in tanh",
    ),
    "two softmaxes, in a lambda": (
        (network(10, nn.Softmax(1)), lambda y: y, in_a_function),
        (network(10), lambda y: y, in_a_function),
        "already a softmax",
    ),
    "a rare class that counts still less": (
        (network(2), is_zero, weighted(0.9, 0.1)),
        (network(2), is_zero, weighted(0.1, 0.9)),
        "rare classes count still less",
    ),
    "rare ones that count still less": (
        (network(1), lambda y: is_zero(y).float()[:, None], weighting_ones(0.1)),
        (network(1), lambda y: is_zero(y).float()[:, None], weighting_ones(9.0)),
        "rare classes count still less",
    ),
    "a minus before the loss": (
        (network(10), lambda y: y, lambda y, t: -F.cross_entropy(y, t)),
        (network(10), lambda y: y, F.cross_entropy),
        "minus a cross-entropy",
    ),
    "answers of a batch norm": (
        (network(1, nn.BatchNorm1d(1)), number, F.mse_loss),
        (network(1), number, F.mse_loss),
        "the output of a batch norm",
    ),
    "a softmax over the words": (
        (Words(1), as_words, of_words),
        (Words(2), as_words, of_words),
        "the classes lie along dimension 2",
    ),
    "a divergence of probabilities": (
        (network(10), as_distribution, divergence(torch.softmax)),
        (network(10), as_distribution, divergence(torch.log_softmax)),
        "a divergence is never negative",
    ),
    "a few targets in another unit": (
        (network(1), lambda y: in_another_unit(y, 1), F.mse_loss),
        (network(1), lambda y: in_another_unit(y, 40), F.mse_loss),
        "a few targets lie far",
    ),
    "a class without a unit": (
        (network(9), lambda y: y, F.cross_entropy),
        (network(10), lambda y: y, F.cross_entropy),
        "class 9, and the output has 9 units",
    ),
    "classes from -1 on": (
        (network(10), lambda y: y - 1, nn.CrossEntropyLoss()),
        (network(10), lambda y: y - 1, nn.CrossEntropyLoss(ignore_index=-1)),
        "a target is class -1",
    ),
}


def basics(found: Diagnosis) -> list[str]:
    return [f.evidence for f in found.findings if f.id == "D34" and f.is_alarm]


@pytest.mark.parametrize("name", PAIRS)
def test_a_fault_of_the_targets_is_named_and_its_twin_is_silent(name: str) -> None:
    (model, target, loss), (twin, right, its_loss), words = PAIRS[name]
    found = diagnose(model, data(target), loss)
    assert any(words in evidence for evidence in basics(found))
    assert found.named[0] == "D34"
    assert basics(diagnose(twin, data(right), its_loss)) == []


def test_without_a_loss_for_each_label_nothing_of_the_loss_is_judged() -> None:
    found = diagnose(network(9), data(lambda y: y), F.cross_entropy)
    assert found.statistics.evaluation is None
    assert found.repair().declined == {}


def test_an_error_of_the_loss_that_no_label_explains_is_the_users() -> None:
    def fails(y: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("of the loss itself")

    with pytest.raises(RuntimeError, match="of the loss itself"):
        diagnose(network(10), data(lambda y: y), fails)


def test_ignored_labels_are_no_classes() -> None:
    made = [(x, y.where(y > 0, -100)) for x, y in batches()[:8]]
    assert basics(diagnose(network(10), made, F.cross_entropy)) == []


def shuffled_apart() -> Batches:
    """Targets in another order than the inputs."""
    order = torch.Generator().manual_seed(1)
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    y = y[torch.randperm(len(y), generator=order)]
    return list(zip(x.split(64), y.split(64), strict=True))


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_a_network_that_learned_nothing_is_named(net: str) -> None:
    model = build(net)
    train(model, 60, lr=0.05, data=shuffled_apart())
    other = [(x, y) for x, y in batches(seed=3)[:14]]
    found = diagnose(model, other, F.cross_entropy)
    assert any("learned nothing" in evidence for evidence in basics(found))
    twin = build(net)
    train(twin, 60, lr=0.05)
    assert basics(diagnose(twin, other, F.cross_entropy)) == []


def test_a_new_network_is_only_not_trained_yet() -> None:
    found = diagnose(build("mlp"), batches()[:14], F.cross_entropy)
    assert basics(found) == []
    reasons = [f.evidence for f in found.not_judged if f.id == "D34"]
    assert any("as before training" in reason for reason in reasons)


def sorted_data() -> Batches:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    order = y.argsort(stable=True)
    return [(x[i], y[i]) for i in order.split(64)]


@pytest.mark.parametrize("kind", ["inputs", "targets"])
def test_the_order_of_samples_shows_without_batch_norm(kind: str) -> None:
    model = build("mlp", normalized=False)
    made = sorted_data()
    if kind == "targets":  # token numbers, which have no columns
        model = nn.Sequential(nn.Embedding(2, 4), nn.Flatten(), nn.Linear(256, 10))
        made = [((x > 0).long(), y) for x, y in made]
    found = [
        f for f in diagnose(model, made, F.cross_entropy).findings if f.id == "D13"
    ]
    assert [f.severity for f in found] == ["warning"]
    assert kind in found[0].evidence or kind == "inputs"
    shuffled = [
        ((x > 0).long(), y) if kind == "targets" else (x, y) for x, y in batches()
    ]
    assert "D13" not in diagnose(model, shuffled, F.cross_entropy).named


def test_batches_of_one_class_say_nothing_of_what_was_learned() -> None:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    model = build("mlp")
    train(model, 40)
    order = y.argsort(stable=True)
    parts = list(zip(x[order].split(64), y[order].split(64), strict=True))
    found = diagnose(model, parts, nn.CrossEntropyLoss())
    assert "learned nothing" not in found.to_text()


@pytest.mark.parametrize("reads_targets", [True, False])
def test_d34_a_loss_without_targets_has_no_pairs_to_learn(reads_targets: bool) -> None:
    """As of a generator whose critic sees its output alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
    model.append(nn.Linear(16, 1))
    data = [(torch.randn(64, 8), torch.randn(64, 1)) for _ in range(8)]

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        kept = targets if reads_targets else 0.5
        return (output - kept).square().mean()

    nn.init.normal_(model[1].weight, 1, 0.1)  # as after a training
    for x, _ in 4 * data:
        model(x)
    found = [f for f in diagnose(model, data, loss).readings if f.id == "D34"]
    told = any("learned nothing" in f.evidence for f in found if f.is_alarm)
    assert told == reads_targets
    assert any("any pairing" in f.evidence for f in found) != reads_targets


def test_the_targets_are_those_that_the_loss_makes() -> None:
    """A loss may make two classes of ten digits, or values that are too large."""

    def told(model: nn.Module, target: Callable[[Tensor], Tensor], loss: Any) -> bool:
        return any(
            "targets go" in text for text in basics(diagnose(model, data(target), loss))
        )

    def of_two(compare: Any, scale: float = 1) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda output, y: compare(output, (y > 4).float() * scale)

    assert not told(network(1), number, of_two(LOGITS))
    assert not told(network(1, SIGMOID), number, of_two(BCE))
    assert not told(network(1, SIGMOID), number, of_two(F.mse_loss))
    assert told(network(1), number, LOGITS)
    assert told(network(1), share, lambda output, y: LOGITS(output, 9 * y))
    assert told(network(1, SIGMOID), number, of_two(F.mse_loss, 5))


def regression(offset: float, loss: Any = F.mse_loss) -> Diagnosis:
    """A network trained for 60 steps of Adam on numbers about `offset`."""
    model, pairs = network(1), data(lambda y: offset + offset / 8 * number(y))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        x, y = pairs[step % len(pairs)]
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return diagnose(model, pairs, loss)


def test_targets_far_from_the_answers_are_the_cause() -> None:
    found = regression(3e5)
    assert found.named[0] == "D34"
    assert "have not arrived" in found.findings[0].evidence
    assert all(f.follows == "D34" for f in found.findings[1:] if f.is_alarm)
    assert not basics(regression(1.0))

    def scaled(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y, target / 3e5)

    assert not basics(regression(3e5, scaled))


LOGITS_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda y: y.softmax(1),
    "sigmoid": torch.sigmoid,
    "tanh": lambda y: torch.tanh(y).view_as(y),
    "relu": torch.relu,
}


@pytest.mark.parametrize("function", LOGITS_ONLY)
def test_scores_that_the_loss_squashes_are_named(function: str) -> None:
    squash = LOGITS_ONLY[function]
    for units, target, loss in ((10, itself, in_a_function), (1, is_even, LOGITS)):
        if function == "softmax" and units == 1:
            continue  # another fault
        model, pairs = network(units), data(target)
        assert basics(diagnose(model, pairs, loss)) == []
        found = diagnose(model, pairs, lambda y, t, loss=loss: loss(squash(y), t))
        (evidence,) = basics(found)
        assert f"the {function} of the output" in evidence


def itself(y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: F.cross_entropy(y, t) + 0.1 * (y.softmax(1) * y).sum(1).mean(),
        lambda y, t: F.cross_entropy(10 * torch.tanh(y / 10), t),
        lambda y, t: F.nll_loss(y.softmax(1).log(), t),
        lambda y, t: F.cross_entropy(y.log_softmax(1), t),
    ],
)
def test_logits_that_the_loss_reads_more_than_once_are_no_fault(loss: Any) -> None:
    """With a reward for entropy, or tanh that keeps logits in bounds."""
    assert basics(diagnose(network(10), data(itself), loss)) == []


@pytest.mark.parametrize("is_scaled", [True, False])
def test_each_binary_cross_entropy_has_targets_of_its_own(is_scaled: bool) -> None:
    """Kinds of 0 to 3 in one column are one hot in the loss, beside a share."""
    torch.manual_seed(0)
    kind, share = torch.randint(4, (128,)), torch.rand(128)
    t = torch.stack([kind.float(), share if is_scaled else 3 * share], 1)

    def loss(y: Tensor, t: Tensor) -> Tensor:
        hot = F.one_hot(t[:, 0].long(), 4).float()
        told = F.binary_cross_entropy_with_logits(y[:, :4], hot)
        return told + F.binary_cross_entropy_with_logits(y[:, 4], t[:, 1])

    data = list(zip(torch.randn(128, 6).split(32), t.split(32), strict=True))
    found = diagnose(nn.Linear(6, 5), data, loss).findings
    assert any("outside 0 to 1" in f.evidence for f in found) is not is_scaled
