"""Faults that tests/nn/test_batch_norm.py must catch; see `sabotage`."""

from collections.abc import Callable
from typing import Any

import pytest

from sabotage import fault, wrap


def _without_native_calls(patch: pytest.MonkeyPatch) -> None:
    """Run layers as passes, and the moving average in Python."""
    from normkit.functional import ema, engine

    patch.setattr(engine, "call_for", lambda *_: None)
    patch.setattr(ema, "CpuBackend", type(None))


def _batch_norm_called(
    patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]
) -> None:
    """Let the layers call batch_norm with arguments that `change` has spoilt."""
    import inspect

    from normkit.nn import batch_norm_layer as room

    honest = room.batch_norm
    signature = inspect.signature(honest)

    def broken(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        change(given.arguments)
        return honest(*given.args, **given.kwargs)

    patch.setattr(room, "batch_norm", broken)


BATCH_NORM = "tests/nn/test_batch_norm.py::"


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def the_momentum_is_swapped(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import ema

    honest = ema.ema_
    _without_native_calls(patch)
    patch.setattr(
        ema, "ema_", lambda old, new, rate, ok: honest(old, new, 1 - rate, ok)
    )


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def the_running_variance_is_the_population_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    _without_native_calls(patch)
    patch.setattr(Moments, "unbiased_var", Moments.var)


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def the_fused_move_takes_the_share_of_the_old(patch: pytest.MonkeyPatch) -> None:
    """In the C++ call where there is a library, and in Python elsewhere."""
    from normkit.functional import ema
    from normkit.kernels.cpu.call import NativeCall

    honest, honest_ema = NativeCall.forward, ema.ema_

    def swapped(self: Any, *given: Any) -> Any:
        *tensors, running, keeps = given
        if running is not None and running.rate:
            running = running._replace(rate=1 - running.rate)
        return honest(self, *tensors, running, keeps)

    patch.setattr(NativeCall, "forward", swapped)
    patch.setattr(
        ema, "ema_", lambda old, new, rate, ok: honest_ema(old, new, 1 - rate, ok)
    )


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def batches_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["num_batches_tracked"] = None

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_eval_uses_the_running_statistics_alone")
def eval_uses_the_statistics_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["training"] = True

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_in_eval_a_sample_does_not_depend_on_its_batch")
def eval_moves_the_running_statistics(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, x, mean, var, *rest, **kwargs):
        y = honest(x, mean, var, *rest, **kwargs)
        if mean is not None:
            mean.mul_(0.99)
        return y

    wrap(patch, "normkit.nn.batch_norm_layer.batch_norm", broken)


@fault(caught_by=BATCH_NORM + "test_without_momentum_every_batch_has_the_same_share")
def no_momentum_is_taken_for_a_tenth(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["momentum"] = 0.1 if given["momentum"] is None else given["momentum"]

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_without_momentum_a_bad_batch_takes_no_share")
def a_batch_that_did_not_enter_is_counted(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, *args, num_batches_tracked=None, **kwargs):
        before = None if num_batches_tracked is None else num_batches_tracked.clone()
        y = honest(*args, num_batches_tracked=num_batches_tracked, **kwargs)
        if before is not None:
            num_batches_tracked.copy_(before + 1)
        return y

    wrap(patch, "normkit.nn.batch_norm_layer.batch_norm", broken)


@fault(caught_by=BATCH_NORM + "test_a_non_finite_batch_leaves_the_state_alone")
def the_layers_let_a_nan_in(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["on_nonfinite"] = "update"

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_masked_positions_do_not_exist")
def batch_norm_ignores_the_mask(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["mask"] = None

    _batch_norm_called(patch, change)
