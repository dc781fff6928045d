"""Checks of gradients that never come or are never cleared, or are cut off."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.progress import has_learned
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics
from normkit.results import counted

__all__ = ["cut_off", "detached", "no_gradient", "uncleared"]

# Fewer may be batches that lie beyond the margin of a hinge.
MIN_STEPS = 5
# Calls in a forward that are a loop over steps.
MIN_CALLS = 4

_D24 = partial(Finding, "D24", "gradients_vanish")


def no_gradient(statistics: Statistics) -> Iterator[Finding]:
    """Check for optimizers that find no gradient other than zero in any step."""
    loop = statistics.training
    if loop is None or loop.is_trial or loop.steps_without_gradient < MIN_STEPS:
        return
    if loop.losses and not any(loss for _, loss in loop.losses):
        return  # nothing is left to learn
    what = "zero" if loop.had_gradients else "None"
    yield _D24(
        "",
        "error",
        0.0,
        0.0,
        f"in all {loop.steps_without_gradient} steps of the optimizer the gradient of "
        f"every parameter that it holds is {what}: nothing is trained",
        "draw one factor at random where two that are multiplied start at zero (as A "
        "and B of LoRA), and see that the loss depends on the trained parameters"
        if loop.had_gradients
        else "call optimizer.step() behind loss.backward() and before zero_grad(), on "
        "the parameters of the model that the loss is computed with",
        {"is_origin": True},
    )


def detached(statistics: Statistics) -> Iterator[Finding]:
    """Check for layers that the loss depends on and whose gradients are cut off.

    Layers that were trained before may give features on purpose.
    """
    names = statistics.detached
    if not names:
        return
    is_kept = statistics.has_moved_detached
    before = counted(len(names) - 1, "layer")
    others = f" and on {before} before it" * (len(names) > 1)
    yield _D24(
        names[-1],
        "info" if is_kept else "warning",
        0.0,
        0.0,
        f"the loss depends on it{others}, and no gradient arrives there: "
        "the forward takes values out of the graph"
        + "; they were trained before, and may be meant to stay"
        * is_kept,
        "set requires_grad=False on these parameters, and leave them out of the "
        "optimizer"
        if is_kept
        else "remove .detach(), .data, .item(), .numpy() or torch.tensor(...) from the "
        "forward, between this layer and the loss",
        {"is_origin": True, "layers": list(names)},
    )


def uncleared(statistics: Statistics) -> Iterator[Finding]:
    """Check for gradients that add up over all steps: no zero_grad. Part of D34."""
    loop = statistics.training
    if loop is None or loop.is_trial or loop.uncleared_steps < MIN_STEPS:
        return
    yield Finding(
        "D34",
        "basics",
        "",
        "error",
        loop.uncleared_steps,
        0,
        f"the gradient was cleared before none of {loop.uncleared_steps} steps: each "
        "follows the sum of all gradients since the first",
        "call optimizer.zero_grad() in each step, before backward",
        {"is_origin": True},
    )


def cut_off(statistics: Statistics) -> Iterator[Finding]:
    """Check for a cell in a loop over steps of which a single one gets a gradient.

    A layer behind it may be called at each step and read at the last alone; the cell,
    which carries the state, gets gradients at all of them then.
    """
    looped = [s for s in statistics.of_role("recurrent") if s.reached[0] >= MIN_CALLS]
    if not looped or any(s.reached[1] > 1 for s in looped) or has_learned(statistics):
        return
    yield _D24(
        looped[0].name,
        "warning",
        1.0,
        2.0,
        f"a forward calls it {looped[0].reached[0]} times, and only one of these calls "
        "gets a gradient: nothing is learned of the steps before it",
        "do not detach the state inside the loop; detach it between batches, or after "
        "tens of steps",
        {"is_origin": True},
    )
