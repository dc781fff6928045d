"""Mistakes for the hunts to find: one of each kind that a hunt is there for.

Each takes a `pytest.MonkeyPatch`, as the faults of `sabotage` do.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sabotage import wrap

MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}


def mistake(hunt: str) -> Callable[[Any], Any]:
    """Register the decorated function as one that `hunt` must find."""

    def register(plant: Any) -> Any:
        MISTAKES[plant.__name__] = (hunt, plant)
        return plant

    return register


_CALL = "normkit.kernels.cpu.call.NativeCall"
_LAYER = "normkit.nn.batch_norm_layer.batch_norm"


@mistake("layers")
def a_gradient_is_read_in_the_order_of_another_layout(patch: Any) -> None:
    """As torch does where sizes of 1 make two layouts look alike."""

    def change(honest: Any, like: Tensor | None, x: Tensor) -> Any:
        right = honest(like, x)
        if like is None or like.dim() < 3 or 1 not in like.shape or like is right:
            return right
        return torch.as_strided(like.contiguous(), x.shape, x.stride())

    wrap(patch, "normkit.kernels.cpu.call.laid_like", change)


@mistake("layers")
def a_half_is_rounded_before_its_residual(patch: Any) -> None:
    from normkit.kernels.epilogue import activate

    def change(honest: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        residual = kwargs.get("residual")
        if residual is None or x.dtype.itemsize > 2 or kwargs.get("mask") is not None:
            return honest(x, *args, **kwargs)
        after = kwargs | {"residual": None, "activation": "none"}
        y = honest(x, *args, **after) + residual
        return activate(kwargs["activation"], y, kwargs["negative_slope"])

    wrap(patch, _LAYER, change)


@mistake("layers")
def a_mask_is_forgotten_in_the_backward(patch: Any) -> None:
    def change(honest: Any, self: Any, dy: Any, x: Any, w: Any, b: Any, *rest: Any):
        residual, mask, *others = rest
        ones = None if mask is None else torch.ones_like(mask)
        return honest(self, dy, x, w, b, residual, ones, *others)

    wrap(patch, f"{_CALL}.backward", change)


@mistake("layers")
def eval_moves_the_averages(patch: Any) -> None:
    def change(honest: Any, x: Tensor, mean: Any, var: Any, *args: Any, **kw: Any):
        y = honest(x, mean, var, *args, **kw)
        if mean is not None and not args[2]:
            mean.mul_(0.999)
        return y

    wrap(patch, _LAYER, change)


@mistake("layers")
def a_repeated_forward_counts_again(patch: Any) -> None:
    patch.setattr("normkit.nn.batch_norm_layer.is_in_backward", lambda: False)


@mistake("layers")
def an_output_is_recomputed_without_its_activation(patch: Any) -> None:
    def change(honest: Any, self: Any, *args: Any) -> Any:
        return honest(type(self)(self.spec.without_activation()), *args)

    wrap(patch, "normkit.functional.passes.Passes.again", change)


@mistake("layers")
def a_sample_depends_on_the_size_of_its_batch(patch: Any) -> None:
    def change(honest: Any, self: Any, x: Tensor, *args: Any) -> Any:
        y, kept = honest(self, x, *args)
        if len(x) > 2 and not x.requires_grad and y.dtype == torch.float32:
            y.mul_(1 + 2e-7)  # one or two roundings
        return y, kept

    wrap(patch, f"{_CALL}.forward", change)


@mistake("layers")
def a_residual_is_added_after_the_activation(patch: Any) -> None:
    def change(honest: Any, *args: Any, **kwargs: Any) -> Any:
        residual = kwargs.get("residual")
        if residual is None or kwargs.get("mask") is not None:
            return honest(*args, **kwargs)
        return honest(*args, **(kwargs | {"residual": None})) + residual

    wrap(patch, _LAYER, change)


@mistake("layers")
def gelu_is_that_of_tanh(patch: Any) -> None:
    def change(honest: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("activation") != "gelu" or kwargs.get("residual") is not None:
            return honest(*args, **kwargs)
        y = honest(*args, **(kwargs | {"activation": "none"}))
        return nn.functional.gelu(y, approximate="tanh")

    wrap(patch, _LAYER, change)


@mistake("layers")
def a_tangent_forgets_the_mean(patch: Any) -> None:
    def change(honest: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        measured = honest(x, *args, **kwargs)
        return type(measured)(
            *(measured.count, measured.hi.detach(), measured.lo.detach(), measured.m2)
        )

    wrap(patch, "normkit.functional.differentiable.deviations", change)


@mistake("others")
def renorm_clips_one_way_only(patch: Any) -> None:
    def change(honest: Any, self: Any, *args: Any) -> Any:
        r, d = honest(self, *args)
        return r, d.clamp(min=0)

    wrap(patch, "normkit.nn.batch_renorm.BatchRenormLayer._correction", change)


@mistake("others")
def a_masked_recurrence_loses_a_share_of_its_gradient(patch: Any) -> None:
    """Found where a step has no values left, too: there the truth was once NaN."""

    def change(honest: Any, x: Tensor, *args: Any, mask: Any, **kwargs: Any) -> Any:
        y, measured = honest(x, *args, mask=mask, **kwargs)
        if mask is None or bool(mask.any(1).all()):
            return y, measured
        return 0.01 * y.detach() + 0.99 * y, measured

    wrap(patch, "normkit.nn.recurrent.normalize", change)


@mistake("others")
def whitening_forgets_a_step(patch: Any) -> None:
    def change(honest: Any, sigma: Tensor, eps: float, steps: int) -> Any:
        return honest(sigma, eps, steps - 1)

    wrap(patch, "normkit.nn.whitening.newton_inverse_sqrt", change)


@mistake("convert")
def the_plan_of_fusing_reads_eval_alone(patch: Any) -> None:
    """The activation moves into the layer, and out of every other place."""

    def change(honest: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        report = honest(model, *args, **kwargs)
        for path, took in report.fused.items():
            if took != "relu":
                continue
            norm: Any = model.get_submodule(path)
            norm.activation, norm.defers = "relu", False
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.ReLU):
                        setattr(parent, name, nn.Identity())
        return report

    wrap(patch, "normkit.convert.run.fuse", change)


@mistake("convert")
def a_converted_layer_forgets_its_eps(patch: Any) -> None:
    def change(honest: Any, module: Any, *args: Any) -> Any:
        result = honest(module, *args)
        module.eps = 1e-3
        return result

    wrap(patch, "normkit.convert.run.swap_class", change)


@mistake("onnx")
def a_damaged_graph_is_believed(patch: Any) -> None:
    import onnx

    patch.setattr(onnx.checker, "check_model", lambda *args, **kwargs: None)


@mistake("checkpoints")
def a_checkpoint_takes_the_dtypes_of_the_model(patch: Any) -> None:
    def change(honest: Any, self: Any, model: nn.Module, path: Any) -> Any:
        for name, value in model.state_dict().items():
            if self.prefix + name in self.weights:
                self.weights[self.prefix + name] = value
        return honest(self, model, path)

    wrap(patch, "normkit_cli.checkpoint.Checkpoint.save", change)


@mistake("checkpoints")
def shapes_are_compared_by_torch(patch: Any) -> None:
    """`load_state_dict` loads what fits before it raises."""

    def change(honest: Any, self: Any, model: nn.Module) -> Any:
        model.load_state_dict(dict(self.weights))

    wrap(patch, "normkit_cli.checkpoint.Checkpoint.load_into", change)
