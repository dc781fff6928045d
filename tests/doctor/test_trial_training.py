"""A few steps of training for the checks that need them, and nothing is left of it."""

import hashlib
import random

import pytest
import torch
from torch import nn

from doctor.models import batches, build, train
from normkit.doctor import Diagnosis, diagnose
from normkit.errors import ArgumentError

LOSS = nn.CrossEntropyLoss()


def working() -> tuple[nn.Module, torch.optim.Optimizer, Diagnosis]:
    model = build("mlp", depth=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    train(model, 3, optimizer=optimizer)
    return model, optimizer, diagnose(model, batches()[:4], LOSS)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """Digests: where CI is set pytest shows all of a difference, which took minutes."""
    momenta = [s["momentum_buffer"] for s in optimizer.state.values()]
    gradients = [p.grad for p in model.parameters()]
    values = [*model.state_dict().values(), *momenta, *gradients]
    modes = [module.training for module in model.modules()]
    draws = torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode()
    parts = [*(v.numpy().tobytes() for v in values), repr(modes).encode(), *draws]
    return [hashlib.sha256(part).hexdigest() for part in parts]


@pytest.mark.parametrize("is_own", [True, False])
def test_model_optimizer_and_random_states_are_put_back(is_own: bool) -> None:
    model, optimizer, diagnosis = working()
    before = state(model, optimizer)

    def own(steps: int) -> None:
        train(model, steps, optimizer=optimizer)
        torch.rand(3)

    after = diagnosis.train(5, optimizer, own if is_own else None)
    assert state(model, optimizer) == before
    added = {f.id for f in after.readings} - {f.id for f in diagnosis.readings}
    assert {"D08", "D09", "D14", "D15", "D27"} <= added
    judged = {f.id for f in after.clear}
    assert ("D09" in judged) == ("D15" in judged) == is_own


def test_what_was_judged_with_still_weights_stays() -> None:
    _, optimizer, diagnosis = working()
    after = diagnosis.train(5, optimizer)
    kept = [f for f in diagnosis.readings if f.severity != "not_judged"]
    assert [f for f in after.readings if f in kept] == kept


def test_a_loop_that_fails_leaves_the_model_as_it_was() -> None:
    model, optimizer, diagnosis = working()
    before = state(model, optimizer)

    def own(steps: int) -> None:
        train(model, 2, optimizer=optimizer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnosis.train(5, optimizer, own)
    assert state(model, optimizer) == before


def test_what_cannot_be_trained_is_said() -> None:
    model, optimizer, diagnosis = working()
    other = torch.optim.SGD(build("mlp").parameters(), 0.1)
    without = diagnose(model, batches()[:4])
    for found, arguments, told in (
        (diagnosis, (0, optimizer), "steps=0"),
        (diagnosis, (5,), "needs an optimizer"),
        (diagnosis, (5, other), "none of the parameters of this SGD"),
        (without, (5, optimizer), "need a loss"),
    ):
        with pytest.raises(ArgumentError, match=told):
            found.train(*arguments)
