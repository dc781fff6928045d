"""What a calibration found: the buffers of a layer, its row in the report, errors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from normkit.calibrate.estimators import Estimate, Estimator, Running
from normkit.calibrate.layers import Layer
from normkit.calibrate.passes import PassResult
from normkit.calibrate.report import LayerCalibration
from normkit.errors import CalibrationError

__all__ = ["check_data", "described", "written"]


def written(layer: Layer, estimator: Estimator, keep: float) -> dict[str, Tensor | int]:
    """Return the new buffers of a layer, in float64."""
    estimate = estimator.estimate()
    _check_estimate(layer, estimate)
    old = layer.buffers
    mean, var = estimate.mean, estimate.var
    if keep:
        mean = keep * old["running_mean"].reshape(-1).to(mean.dtype) + (1 - keep) * mean
        var = keep * old["running_var"].reshape(-1).to(var.dtype) + (1 - keep) * var
    tracked = estimator.batches
    if isinstance(estimator, Running):
        tracked = estimator.tracked + estimator.calls
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": tracked}


def described(
    layer: Layer, estimator: Estimator, new: Mapping[str, Tensor | int]
) -> LayerCalibration:
    """Return the row of a layer in the report."""
    estimate = estimator.estimate()
    mean, var = new["running_mean"], new["running_var"]
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return LayerCalibration(
        name=layer.name,
        kind=type(layer.module).__name__,
        eps=layer.module.eps,
        count=float(estimate.count.min()),
        batches=estimator.batches,
        old={name: buffer.clone() for name, buffer in layer.buffers.items()},
        mean=mean.clone(),
        var=var.clone(),
        mean_error=estimate.mean_error,
        var_error=estimate.var_error,
    )


def check_data(result: PassResult) -> None:
    """Raise CalibrationError where no batch was used."""
    if result.batches:
        return
    if result.skipped:
        raise CalibrationError(
            f"none of the {len(result.skipped)} batches was finite "
            f"({result.skipped[0]}); look for NaN in the data and the weights; "
            "the model is as it was"
        )
    raise CalibrationError(
        "batches held no batch; pass data (a generator can be used only once); the "
        "model is as it was"
    )


def _check_estimate(layer: Layer, estimate: Estimate) -> None:
    count = float(estimate.count.min())
    if count <= 1 or bool(estimate.var.isnan().any()):
        raise CalibrationError(
            f"layer {layer.name!r} saw {count:g} values in one of its channels, and a "
            "variance needs two (mode='average' two in one batch); pass more data or "
            "leave it out by layers=; the model is as it was"
        )
    if not bool((estimate.mean.isfinite() & estimate.var.isfinite()).all()):
        raise CalibrationError(
            f"the statistics of layer {layer.name!r} are not finite; the model is as "
            "it was"
        )
