"""Check of what the answers depend on beside their own sample: part of D34."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    DependenceStatistics,
    Statistics,
    TargetStatistics,
)

__all__ = ["DEPENDS_BY_NORM", "dependence", "reads_batch"]

# Change of an answer, as a share of the spread of all answers, that is no rounding:
# another size of batch changes the order of sums, in bfloat16 by 0.004 a layer.
DEPENDS = 0.05
# The same where a batch norm takes the statistics of the batch, seen by its call: of
# weights it changes nothing (rounding, 1e-6).
DEPENDS_BY_NORM = 0.005

# How often a class is, over the median of the classes, between which it is one of them:
# a mark of samples without a label is more frequent, or rare.
LIKE_OTHERS = (0.5, 2.0)

_D34 = partial(Finding, "D34", "basics")


def dependence(statistics: Statistics) -> Iterator[Finding]:
    """Check that an answer in eval mode is that of its own sample."""
    found = statistics.dependence
    if found is None:
        return
    if found.dropout and (found.on_chance or 0.0) > DEPENDS:
        # Monte Carlo dropout: a forward that switches on what eval() has switched off
        # does so on purpose.
        is_chosen = found.is_switched_on
        yield _D34(
            "",
            "info" if is_chosen else "warning",
            found.on_chance or 0.0,
            DEPENDS,
            f"dropout is on in eval mode ({found.dropout}"
            + ", which the forward itself switches on" * is_chosen
            + "), and a second call gives other answers, by "
            f"{found.on_chance:.2g} of their spread",
            "leave it where random answers are wanted, and call no train() in the "
            "forward where they are not"
            if is_chosen
            else "pass training=self.training to F.dropout, and dropout_p=0 to "
            "attention; leave it where random answers are wanted",
        )
    # A softmax over the samples has its own finding, with the dimension, and a batch
    # norm that is made for each call has D09.
    is_known = statistics.output is not None and statistics.output.softmax_dim == 0
    is_known |= reads_batch(found)
    if (found.on_others or 0.0) > DEPENDS and not is_known:
        yield _D34(
            "",
            "error",
            found.on_others or 0.0,
            DEPENDS,
            "in eval mode the answer to a sample depends on the others in its batch: "
            "without most of them, or among copies of itself, it changes by "
            f"{found.on_others:.2g} of the spread",
            "find the layer that takes the samples for another dimension: batch_first "
            "of recurrent layers and attention, the dim of a softmax or a mean, the "
            "shape of a layer norm, view in place of permute",
        )
    for label in found.ignored:
        share = _frequency(statistics.targets, label)
        if LIKE_OTHERS[0] <= share <= LIKE_OTHERS[1]:
            yield _D34(
                "",
                "warning",
                0.0,
                0.0,
                f"targets of class {label} have no share in the loss, and are "
                f"{share:.2g} times as frequent as others are: the class is never "
                "learned",
                "pass an ignore_index= to the loss that is no class (torch's default "
                "is -100), and a weight above 0 for each class",
                {"class": label},
            )
    if (found.on_future or 0.0) > DEPENDS:
        yield _D34(
            "",
            "error",
            found.on_future or 0.0,
            DEPENDS,
            "the target at each position is the token after it, and the model sees "
            "that token: another last token changes the answers before it by "
            f"{found.on_future:.2g} of their spread",
            "give the attention a causal mask, or read the sequence in one direction",
        )
    if found.is_elsewhere:
        yield _D34(
            "",
            "error",
            1.0,
            0.0,
            "the target of a pixel acts on the scores of other pixels, not on its own",
            "move the classes to the last dimension with permute(0, 2, 3, 1) before "
            "they are flattened, or give cross_entropy (N, C, H, W) as it is",
        )


def reads_batch(found: DependenceStatistics) -> bool:
    """Return True where a batch norm of no module mixes the samples in eval mode.

    By itself a call with the statistics of the batch tells nothing: with a sample for
    each batch it is instance norm, and of weights it is their standardization.
    """
    return found.made_norms > 0 and (found.on_others or 0.0) > DEPENDS_BY_NORM


def _frequency(wanted: TargetStatistics | None, label: int) -> float:
    """Return how often a class is, over the median of the classes; nan when unknown."""
    if wanted is None or wanted.channels is None or wanted.classes is None:
        return math.nan
    shares = wanted.channels.pooled.mean
    if wanted.classes > len(shares):
        return math.nan  # several classes share a column
    return float(shares[label] / shares.median())
