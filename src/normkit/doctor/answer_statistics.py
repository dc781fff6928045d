"""Measurements of the answers: targets, outputs, and what the answers depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normkit.doctor.channel_statistics import ChannelStatistics

__all__ = [
    "DependenceStatistics",
    "Erased",
    "OutputStatistics",
    "Renumbered",
    "TargetStatistics",
]


@dataclass(frozen=True)
class TargetStatistics:
    """The targets of the loss.

    Attributes:
        low: The least value, or class number.
        high: The largest.
        classes: Number of classes; None unless they are class numbers.
        most_frequent: Share of the most frequent class; None without classes.
        spread: Standard deviation of all values; 0 for class numbers.
        mean: Mean of all values; 0 for class numbers.
        labels_per_sample: Ones per row of targets `(N, K)` of zeros and ones; None for
            other targets.
        sums_to_one: Every row of targets `(N, K)` is a distribution over K > 1 classes.
        kurtosis: Mean fourth power of the standardized values of a column, the largest
            of few columns; nan for others.
        channels: Statistics of the labels as one-hot vectors, or of the values.
        beyond: A class number without a unit in the output, and the units; None where
            every label has one.
        not_finite: Share of the values that are NaN or infinite.
    """

    low: float
    high: float
    classes: int | None = None
    most_frequent: float | None = None
    spread: float = 0.0
    mean: float = 0.0
    labels_per_sample: float | None = None
    sums_to_one: bool = False
    kurtosis: float = math.nan
    channels: ChannelStatistics | None = None
    beyond: tuple[int, int] | None = None
    not_finite: float = 0.0


@dataclass(frozen=True)
class Renumbered:
    """Answers that give most classes another number than the targets do.

    Attributes:
        right: Share of the samples whose answer is right.
        explained: Share whose answer is the one that their class gets most often.
        label: A class with another answer, and
        answer: that answer.
    """

    right: float
    explained: float
    label: int
    answer: int


@dataclass(frozen=True)
class OutputStatistics:
    """The outputs of the model.

    Attributes:
        spread: Standard deviation over the samples, rms over the units.
        scale: rms of the values.
        units: Size of the last dimension.
        sums_to_one: Every row is a probability distribution.
        classes: Number of classes in the targets; None unless they are class numbers.
        loss_kind: Name of the loss's class or function.
        softmax: Name of the `nn.Softmax` whose output is the model's; "" for none.
        activation: The operation of autograd that gives the output, such as "Sigmoid";
            "" when no gradient was measured.
        operations: Those between the output and the loss, such as "NllLoss".
        squashed_by: The function inside the loss whose values it takes for logits, such
            as "Softmax"; "" for none.
        most_chosen: Share of the samples whose largest score is that of the class
            chosen most often; None without scores.
        are_cosines: They are products of vectors that were divided, as by their norms.
        largest: The largest size of a value.
        right: Share of the labels whose score is the largest; None without scores.
        softmax_dim: The dimension of the softmax that gives the output; None where
            none does.
        class_dim: The dimension of the scores that class numbers lack; None where
            several could be it.
        unregistered: Parameters that the output depends on and that the model does not
            own, as those of layers in a plain list.
        has_critic: The loss computes with parameters that the model does not own, as
            those of a critic.
        broadcast: The shapes of output and targets, where they hold as many values and
            a loss that takes them as they are would compare each with all the others.
        compared: The range and spread of the values that the loss itself makes of the
            targets, in one batch; None where it compares with the targets.
        compared_binary: The same of all binary cross-entropies in it.
        has_their_size: Outputs hold as many values as targets, so that each can be
            compared with one.
        has_distributions: The loss weights the log-probabilities of a sample by
            numbers that sum to one.
        class_weights: The weight of each class in the loss; of a binary cross-entropy
            those of zeros and of ones. Empty without.
        renumbered: The numbering of the answers, where it is another than that of the
            targets.
        same: Share of the samples whose answer is exactly the one given most often,
            less that of the inputs; 0 where answers are no rows of scores.
    """

    spread: float
    scale: float
    units: int
    sums_to_one: bool
    classes: int | None = None
    loss_kind: str = ""
    softmax: str = ""
    activation: str = ""
    operations: frozenset[str] = frozenset()
    squashed_by: str = ""
    most_chosen: float | None = None
    are_cosines: bool = False
    largest: float = math.nan
    right: float | None = None
    softmax_dim: int | None = None
    class_dim: int | None = None
    unregistered: tuple[str, ...] = ()
    has_critic: bool = False
    broadcast: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    compared: TargetStatistics | None = None
    compared_binary: TargetStatistics | None = None
    has_their_size: bool = True
    has_distributions: bool = False
    class_weights: tuple[float, ...] = ()
    renumbered: Renumbered | None = None
    same: float = 0.0


@dataclass(frozen=True)
class Erased:
    """A property of samples that explains a target, and does not reach the answers.

    Attributes:
        what: The "mean" of a sample, or its "size": the log of its deviation.
        change: rms change of the answers when all inputs are shifted by the deviation
            of the means, or doubled; as a share of the answers' spread.
        by_it: Share of a target's variance that it explains: a squared correlation.
        by_answers: Share that the answers explain.
    """

    what: str
    change: float
    by_it: float
    by_answers: float


@dataclass(frozen=True)
class DependenceStatistics:
    """On what the answers of one batch depend in eval mode, beyond their own samples.

    Each change is the rms of the difference over the spread of all answers; None where
    it was not measured.

    Attributes:
        dropout: Name of a dropout function that is on in eval mode; "" for none.
        is_switched_on: It is that of modules which were in eval mode before the call,
            so that the model's own forward has switched them on.
        on_chance: Change from one call to the next; measured where there is such a
            dropout, or where something else changes the answers.
        on_others: Change of the answers to two samples without the rest of the batch.
        on_future: Change of the answers before the last token when that is another,
            where the targets are the tokens that follow.
        is_elsewhere: The target of a pixel acts on the scores of other pixels, and not
            on its own.
        dropped: The share of the answers that is dropped in training mode: they are the
            output of a dropout; 0 where they are not.
        dropped_by: Name of its module; "" for a function.
        most_dropped: The largest share that a dropout takes away in training mode.
        most_dropped_by: Name of its module; "" for a function.
        erased: The mean or the size of the samples, where it explains a target far
            better than the answers do; None where neither does.
        made_norms: Calls of a batch norm that take the statistics of the batch in eval
            mode and belong to no module of the model.
    """

    dropout: str = ""
    dropped: float = 0.0
    dropped_by: str = ""
    most_dropped: float = 0.0
    most_dropped_by: str = ""
    made_norms: int = 0
    erased: Erased | None = None
    is_switched_on: bool = False
    on_chance: float | None = None
    on_others: float | None = None
    on_future: float | None = None
    is_elsewhere: bool = False
    ignored: tuple[int, ...] = ()
