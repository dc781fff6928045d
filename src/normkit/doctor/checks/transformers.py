"""Checks of transformers: the residual stream, attention, gains: D35 to D38.

D35 and D38 read the rows of blocks that take each other's output, D36 the logits that
the softmax of an attention takes, D37 the scales of layer, group and RMS norms.
"""

from __future__ import annotations

import itertools
import math
import statistics as numbers
from collections.abc import Iterator, Sequence
from functools import partial

from normkit.doctor.checks.thresholds import NOT_ITS_LOOP, above
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics
from normkit.doctor.transformer_statistics import BlockStatistics, streams

__all__ = [
    "CHECKS",
    "attention_logits",
    "gain_outliers",
    "post_norm_without_warmup",
    "residual_growth",
]

MIN_BLOCKS = 4
# Growth per block in the second half of the depth. Branches of one size add up to 1.19
# (independent, 4 blocks) or 1.41 (all alike), and less the deeper the stack is. One
# that grows with the stream, as without a norm, multiplies it in every block.
GROWTH_WARNING, GROWTH_ERROR = 2.0, 4.0
# Growth of the stream over a training: more than doubled in each of three windows of
# five observed steps, and so large altogether.
WINDOW, DOUBLED, GROWN = 5, 2.0, 10.0
# Largest |logit|. Fresh networks have 0.1 to 6. Dehghani et al. (2023, ViT-22B) saw
# 50,000 before training diverged, Wortsman et al. (2023) set the limit at 1e4.
LOGIT_WARNING, LOGIT_ERROR = 100.0, 1e4
# With such logits: most queries read one key, and pass no gradient to the rest.
SHARP = 0.5
# Squared difference of what is read over that of what is hidden: rounding leaves 1e-14.
SAME = 1e-6
# Share of all squared gains that is one channel's; of 16 channels or more. Healthy
# programs reach 0.12, a group norm over 16 channels, the others 0.04
# (docs/doctor-score.md); one gain a hundred times the other 31 has 0.997.
GAIN_SHARE, MIN_CHANNELS = 0.5, 16
# How far the rms of the output may be from that of gains and shifts: channels that vary
# less than others carry less.
FIT = 3.0
# Observations that a layer is judged by.
RECENT = 5
# Blocks times the change of a weight, ‖Δw‖/‖w‖, in one of the first steps. Loss after
# 120 steps of Adam on digits (chance 2.30), 6 and 12 blocks with post-norm: 0.63, 0.89,
# 0.71 at 0.04, 0.08, 0.12, and 2.32, 2.26, 2.32 at 0.23, 0.39, 0.76. With a warm-up
# over 60 steps 1.70 and 1.55 in place of 2.32 and 2.26; with pre-norm 0.44 at 0.39.
FIRST_CHANGE = 0.16

_D35 = partial(Finding, "D35", "residual_growth")
_D36 = partial(Finding, "D36", "attention_logits")
_D37 = partial(Finding, "D37", "gain_outliers")
_D38 = partial(Finding, "D38", "post_norm_without_warmup")


def residual_growth(statistics: Statistics) -> Iterator[Finding]:
    """Check D35: the residual stream grows from block to block, or over the training.

    A norm before each branch keeps what a block adds at one size, so that the stream
    grows by less and less.
    """
    for row in streams(statistics.blocks):
        if row[0].end != "sum":
            continue
        last = row[-1]
        if len(row) < MIN_BLOCKS:
            reason = f"{len(row)} blocks in a row are too few for a trend"
            yield _D35(last.name, "not_judged", evidence=reason)
            continue
        rms = [_recent(row[0].before), *(_recent(block.after) for block in row)]
        if not all(0 < value < math.inf for value in rms):
            reason = "the stream is zero or not finite (D28, D34)"
            yield _D35(last.name, "not_judged", evidence=reason)
            continue
        half = len(row) // 2
        growth = (rms[-1] / rms[half]) ** (1 / (len(row) - half))
        severity, threshold = above(growth, warning=GROWTH_WARNING, error=GROWTH_ERROR)
        yield _D35(
            last.name,
            severity,
            growth,
            threshold,
            f"the rms of the residual stream goes from {rms[0]:.3g} before "
            f"{row[0].name} to {rms[-1]:.3g} here, {growth:.2f}-fold per block in the "
            "second half",
            "put a norm before each branch, or start the last layer of each branch "
            f"smaller, by 1/√{2 * len(row)}",
            {"rms": rms, "layers": [block.name for block in row]},
        )
        if statistics.while_training:
            yield from _growth_over_time(last)


def _growth_over_time(block: BlockStatistics) -> Iterator[Finding]:
    values = [v for v in block.after if math.isfinite(v)]
    if len(values) < 4 * WINDOW:
        return
    windows = [
        numbers.median(values[len(values) - (4 - i) * WINDOW :][:WINDOW])
        for i in range(4)
    ]
    start = numbers.median(values[:WINDOW])
    if not start > 0 or 0 in windows:
        return
    least = min(b / a for a, b in itertools.pairwise(windows))
    grown = windows[-1] / start
    if least > DOUBLED and grown > GROWN:
        yield _D35(
            block.name,
            "warning",
            least,
            DOUBLED,
            f"over the training the rms of its output grew from {start:.3g} to "
            f"{windows[-1]:.3g}, and {least:.3g}-fold or more in each of the last "
            f"three windows of {WINDOW} steps",
            "lower the learning rate, clip the gradients, or add weight decay",
        )


def attention_logits(statistics: Statistics) -> Iterator[Finding]:
    """Check D36: logits that pick one key, or a mask that hides all but padding."""
    for found in statistics.attention:
        masked = found.masked[-RECENT:]
        if masked and all(read < SAME * hidden for read, hidden in masked):
            read, hidden = masked[-1]
            yield _D36(
                found.name,
                "error",
                read,
                SAME * hidden,
                "the mask lets queries read only keys that are the same in all "
                "samples, as padding is, and hides those that differ",
                "turn the mask round: key_padding_mask of nn.MultiheadAttention is "
                "True for what is left out, attn_mask of scaled_dot_product_attention "
                "for what is read",
                {"is_origin": True},
            )
            continue
        seen = found.observed[-RECENT:]
        if not seen:
            reason = "no query with two keys or more was measured"
            yield _D36(found.name, "not_judged", evidence=reason)
            continue
        if not all(math.isfinite(largest) for largest, _, _ in seen):
            yield _D36(
                found.name,
                "error",
                math.nan,
                LOGIT_ERROR,
                "the logits of the attention are not finite",
                _LOGITS,
            )
            continue
        largest = max(largest for largest, _, _ in seen)
        entropy = numbers.median(entropy for _, entropy, _ in seen)
        sharp = numbers.median(sharp for _, _, sharp in seen)
        severity, threshold = above(largest, warning=LOGIT_WARNING, error=LOGIT_ERROR)
        if severity == "warning" and sharp < SHARP:
            severity = "clear"
        yield _D36(
            found.name,
            severity,
            largest,
            threshold,
            f"the largest |logit| is {largest:.3g}; {sharp:.0%} of the queries read "
            f"one key alone, and their mean entropy is {entropy:.2f} of the most",
            _LOGITS,
            {"entropy": entropy, "sharp": sharp},
        )


def gain_outliers(statistics: Statistics) -> Iterator[Finding]:
    """Check D37: a norm over channels in which one channel outweighs all others.

    The scale of its output is then that of one channel; in half precision and in int8
    the others are rounded away.
    """
    for layer in statistics.of_role("norm"):
        gains = layer.gains
        if gains is None or layer.norm is not None:
            continue
        if gains.channels < MIN_CHANNELS:
            reason = f"{gains.channels} channels are too few"
            yield _D37(layer.name, "not_judged", evidence=reason)
            continue
        if not 1 / FIT < layer.output_rms / (gains.rms or math.nan) < FIT:
            reason = "its weight is not the scale of its output"
            yield _D37(layer.name, "not_judged", evidence=reason)
            continue
        severity, threshold = above(gains.share, warning=GAIN_SHARE)
        yield _D37(
            layer.name,
            severity,
            gains.share,
            threshold,
            f"channel {gains.channel} has {gains.share:.0%} of all squared gains, "
            f"|gain| {gains.largest:.3g} against a median of {gains.median:.3g}",
            "give gains a group of the optimizer without a larger rate, clip the "
            "gradients, or start again from gains of 1",
            {"channel": gains.channel, "largest": gains.largest},
        )


def post_norm_without_warmup(statistics: Statistics) -> Iterator[Finding]:
    """Check D38: a deep post-norm stack that starts at the full learning rate.

    At the start the gradients near its output are large (Xiong et al., 2020). The
    product is the change of the whole stack in one of the first steps.
    """
    for row in streams(statistics.blocks):
        if len(row) < MIN_BLOCKS or row[0].end != "norm":
            continue
        loop = statistics.training
        inside = [
            max(layer.weight.update_ratio[:RECENT])
            for layer in statistics.of_role("weight")
            if layer.weight is not None
            and layer.weight.update_ratio
            and any(layer.name.startswith(f"{block.name}.") for block in row)
        ]
        reason = ""
        if loop is not None and loop.is_trial:
            reason = NOT_ITS_LOOP
        elif not inside:
            reason = "a warm-up shows in training: watch it with its optimizer"
        if reason:
            yield _D38(row[0].name, "not_judged", evidence=reason)
            continue
        update = numbers.median(inside)
        severity, threshold = above(len(row) * update, warning=FIRST_CHANGE)
        yield _D38(
            row[0].name,
            severity,
            len(row) * update,
            threshold,
            f"{len(row)} blocks end in a norm behind a sum, and one of the first "
            f"{RECENT} steps changes their weights by {update:.1e} of their size",
            "raise the learning rate from near zero over the first hundreds of steps, "
            "or put the norms before the branches (pre-norm)",
            {"update": update, "blocks": len(row), "is_origin": True},
        )


def _recent(values: Sequence[float]) -> float:
    """Return the median of the last values; nan without."""
    kept = [value for value in values[-RECENT:] if not math.isnan(value)]
    return numbers.median(kept) if kept else math.nan


_LOGITS = (
    "divide q·k by √d, normalize queries and keys (QK norm), lower the learning rate, "
    "or decay the weights of the projections"
)

CHECKS = {
    "D35": residual_growth,
    "D36": attention_logits,
    "D37": gain_outliers,
    "D38": post_norm_without_warmup,
}
