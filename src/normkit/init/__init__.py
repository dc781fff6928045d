"""Initialization: variance in, variance out.

    report = normkit.initialize(model, "kaiming")
    print(report.to_text())

`fans` counts the terms that each layer sums, `variance_scaling` draws weights of a
variance, `theory` predicts what they do to signals and gradients, `tracer` runs the
model once, measures mean squares and records its `signal_graph`. `automatic` finds the
scale of each layer from its neighbours (auto), `data_dependent` scales weights by the
variance that a batch shows (lsuv), `run` is the transaction around all of it.
"""

from normkit.init.fans import Fans, LinearMap, linear_maps
from normkit.init.report import InitLine, InitReport
from normkit.init.run import initialize
from normkit.init.theory import (
    Signal,
    gain_of,
    gaussian_mean,
    kept_gradient,
    kept_signal,
    variance_recursion,
)
from normkit.init.variance_scaling import (
    NOT_SO_SMALL_STD,
    SMALL_STD,
    constant_,
    kaiming_normal_,
    kaiming_uniform_,
    normal_,
    orthogonal_,
    variance_scaling_,
    xavier_normal_,
    xavier_uniform_,
)

__all__ = [
    "NOT_SO_SMALL_STD",
    "SMALL_STD",
    "Fans",
    "InitLine",
    "InitReport",
    "LinearMap",
    "Signal",
    "constant_",
    "gain_of",
    "gaussian_mean",
    "initialize",
    "kaiming_normal_",
    "kaiming_uniform_",
    "kept_gradient",
    "kept_signal",
    "linear_maps",
    "normal_",
    "orthogonal_",
    "variance_recursion",
    "variance_scaling_",
    "xavier_normal_",
    "xavier_uniform_",
]
