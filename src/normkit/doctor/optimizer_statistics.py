"""The measurements of an optimizer: its rate over the steps, and its state."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OptimizerStatistics"]


@dataclass(frozen=True)
class OptimizerStatistics:
    """Use that the optimizer of a watched training made of its gradients.

    Attributes:
        full_steps: Sum of the learning rates of all steps over the largest of them: the
            number of steps at that rate which go as far.
        gone: Steps since the largest rate at less than a thousandth of it.
        eps: What Adam or RMSprop adds to the root of its mean squared gradients; None
            for other optimizers.
        damped: Share of the elements, of those with a gradient, whose root is below a
            tenth of `eps`, so that they move less than a tenth as far as the rate says.
        planned: The largest rate of a schedule of cycles (OneCycleLR, CyclicLR), over
            that of the steps; None without.
        changes: Steps whose rate is not that of the step before.
        is_rising: The last learning rate is the largest, and far above the first.
    """

    full_steps: float = 0.0
    gone: int = 0
    eps: float | None = None
    damped: float = 0.0
    is_rising: bool = False
    planned: float | None = None
    changes: int = 0
