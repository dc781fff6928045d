"""The measurements of a training loop: its calls, its steps, its losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normkit.doctor.optimizer_statistics import OptimizerStatistics

__all__ = ["TrainingStatistics"]


@dataclass(frozen=True)
class TrainingStatistics:
    """The calls and steps of the training loop.

    Attributes:
        forwards: Calls in training mode with gradients.
        updates: Steps of the optimizer; None without one.
        updates_in_eval: Steps of the optimizer after calls in eval mode only.
        updates_before_eval: Steps of the optimizer before the first of these.
        idle_bursts: Number of runs of two or more calls in training mode without
            gradients, and without a step of any optimizer between them.
        samples: Samples per forward; nan where a call has no tensor.
        weight_decay: The largest decay on a normalization layer's parameters; None
            without an optimizer.
        is_decoupled: The decay is multiplied by the learning rate alone (AdamW).
        decay_per_step: The share of these parameters that it then takes in a step, at
            the present rate; 0 where it is not decoupled.
        is_trial: The loop was a trial on a copy, not the program's own.
        losses: Step and value of each loss given to `log`.
        steps: The observed steps.
        optimizer: Its rates and its state; None without one.
        left_out: Parameters with gradients that the optimizer was not given and nothing
            changed, but for the weights of layers, which tell that themselves.
        steps_without_gradient: Steps of optimizers that hold parameters of the model,
            where none of these had a gradient other than zero in any step; else 0.
        had_gradients: Some parameter had a gradient in such a step.
        uncleared_steps: Steps whose gradient was added to that of the step before,
            where it was so in all; else 0.
        compared_calls: Of the first calls, those whose samples were compared.
        compared_samples: The number of these samples.
        different_samples: That of different ones among them; 0 where they may be few by
            nature, as the states of a game.
        order: By one sum over each sample, the variance between the means of batches
            over that of random batches (F), and the correlation of each mean with the
            one before; nan without enough calls.
        input_dims: Dimensions of a batch.
    """

    forwards: int = 0
    updates: int | None = None
    updates_in_eval: int = 0
    updates_before_eval: int = 0
    idle_bursts: int = 0
    samples: float = 0.0
    weight_decay: float | None = None
    is_decoupled: bool = False
    decay_per_step: float = 0.0
    is_trial: bool = False
    losses: tuple[tuple[int, float], ...] = ()
    steps: tuple[int, ...] = ()
    optimizer: OptimizerStatistics | None = None
    left_out: tuple[str, ...] = ()
    steps_without_gradient: int = 0
    had_gradients: bool = True
    uncleared_steps: int = 0
    compared_calls: int = 0
    compared_samples: int = 0
    different_samples: int = 0
    order: tuple[float, float] = (math.nan, math.nan)
    input_dims: int = 0
