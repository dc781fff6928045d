"""Distance of running statistics from those of the layer's inputs.

    d_mean = mean over channels of |running_mean − mean| / sd
    d_var  = mean over channels of |ln(running_var / var)|

where mean and var are those of the layer's inputs over many batches, with the current
weights. eps is added to both variances and under sd: the change of the layer's output
is judged, and a channel without variance changes nothing.

A mean over channels hides one alone. Its outputs in eval mode have a mean square of

    excess = (var + (running_mean − mean)²) / running_var

which is 1 where the statistics are right, and C for all C channels together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from normkit.doctor.checks.thresholds import above
from normkit.doctor.finding import Severity
from normkit.doctor.measurements import NormStatistics

__all__ = [
    "D_MEAN_WARNING",
    "D_VAR_WARNING",
    "MAX_NOISE",
    "Distance",
    "distance",
    "has_finite_inputs",
]

# Healthy runs stay at or below .12 / .08 (.23 for d_var after 40 steps at batch 128);
# stale statistics give 1.2 to 2.6.
D_MEAN_WARNING, D_MEAN_ERROR = 0.25, 0.5
D_VAR_WARNING, D_VAR_ERROR = 0.35, 1.0
# The largest sampling noise at which a distance is judged, as a share of the warning
# threshold.
MAX_NOISE = 0.4


@dataclass(frozen=True)
class Distance:
    """Distance of running statistics from those of the population.

    Attributes:
        mean: d_mean of the module's formula.
        var: d_var of the module's formula.
        noise: Expected d_mean of right statistics, from sampling alone.
        channels: Number of channels.
        channel: The channel whose outputs are largest in eval mode.
        excess: The mean square of its normalized values there.
    """

    mean: float
    var: float
    noise: float
    channels: int = 1
    channel: int = 0
    excess: float = 1.0

    @property
    def severity(self) -> Severity:
        """The worse of the two severities."""
        severities = {self._of_mean[0], self._of_var[0]}
        if not severities - {"clear"}:
            return "clear"
        return "error" if "error" in severities else "warning"

    @property
    def value_and_threshold(self) -> tuple[float, float]:
        """The distance that is larger relative to its warning threshold."""
        if not self.mean / D_MEAN_WARNING > self.var / D_VAR_WARNING:
            return self.var, self._of_var[1]
        return self.mean, self._of_mean[1]

    @property
    def is_small(self) -> bool:
        """True where both are below half of the warning threshold."""
        return self.mean <= D_MEAN_WARNING / 2 and self.var <= D_VAR_WARNING / 2

    @property
    def outweighs(self) -> bool:
        """True where one channel is larger than all together ought to be."""
        return self.excess > max(self.channels, math.exp(D_VAR_ERROR))

    @property
    def _of_mean(self) -> tuple[Severity, float]:
        return above(self.mean, warning=D_MEAN_WARNING, error=D_MEAN_ERROR)

    @property
    def _of_var(self) -> tuple[Severity, float]:
        return above(self.var, warning=D_VAR_WARNING, error=D_VAR_ERROR)


def distance(norm: NormStatistics) -> Distance | None:
    """Return the distance of the running statistics from those of the inputs.

    Returns:
        None when it cannot be judged: inputs that are not finite, or so few samples
        that sampling alone could look like a fault.
    """
    if norm.in_training is None or norm.in_training.sample_means.count.min() < 2:
        return None
    if not has_finite_inputs(norm):
        return None
    per_sample = norm.in_training.sample_means
    # Each call of a shared layer updates the running statistics separately: they hold
    # the mean of the calls' variances, without the spread between the calls.
    calls = [c.pooled for c in (norm.calls or (norm.in_training,))]
    mean = torch.stack([c.mean for c in calls]).mean(0)
    var = torch.stack([c.unbiased_var for c in calls]).mean(0) + norm.eps
    sd = var.sqrt()
    # Values of one sample are correlated, samples are not: the error of the mean is
    # that of the mean of sample means. E|z| = √(2/π) for a standard normal z.
    error = (per_sample.unbiased_var / per_sample.count).sqrt()
    off = (norm.running_mean - mean).square()
    excess = (var - norm.eps + off) / (norm.running_var + norm.eps)
    channel = int(excess.nan_to_num(nan=0.0).argmax())  # D17 reports a NaN
    found = Distance(
        mean=float(((norm.running_mean - mean).abs() / sd).mean()),
        var=float(((norm.running_var + norm.eps) / var).log().abs().mean()),
        noise=float((error / sd).mean()) * math.sqrt(2 / math.pi),
        channels=len(excess),
        channel=channel,
        excess=float(excess[channel]),
    )
    return None if found.noise > MAX_NOISE * D_MEAN_WARNING else found


def has_finite_inputs(norm: NormStatistics) -> bool:
    """Return True where the inputs are finite; D17 checks the running statistics."""
    pooled = None if norm.in_training is None else norm.in_training.pooled
    return pooled is None or bool((pooled.mean + pooled.m2).isfinite().all())
