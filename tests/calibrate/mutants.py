"""Faults that tests/calibrate must catch; see `sabotage`."""

from importlib.util import find_spec
from typing import Any

import pytest

from sabotage import fault, wrap


@fault(
    caught_by="tests/calibrate/test_choice.py::"
    "test_sample_weights_count_values_several_times"
)
def sample_weights_are_ignored(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import passes

    real = passes.fit_mask
    patch.setattr(passes, "fit_mask", lambda *args: real(*args) > 0)


@fault(
    caught_by="tests/calibrate/test_exact.py::test_any_split_of_the_data_gives_the_same"
)
def a_short_batch_counts_as_much_as_a_long_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import run
    from normkit.calibrate.estimators import Average

    patch.setattr(run, "Exact", lambda layer: Average(layer, by_weight=False))


@fault(
    caught_by="tests/calibrate/test_exact.py::"
    "test_sorted_data_keep_the_variance_between_batches"
)
def the_variance_of_batch_means_is_dropped(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import run
    from normkit.calibrate.estimators import Average

    patch.setattr(run, "Exact", lambda layer: Average(layer, by_weight=True))


@fault(
    caught_by="tests/calibrate/test_transaction.py::"
    "test_a_failure_of_data_or_model_changes_nothing"
)
def calibration_does_not_restore_the_momentum(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate.transaction import Transaction

    def enter(real: Any, self: Transaction) -> Transaction:
        for layer in self.layers:
            layer.module.momentum = None
        return real(self)

    wrap(patch, "normkit.calibrate.transaction.Transaction.__enter__", enter)


@fault(
    caught_by="tests/calibrate/test_transaction.py::"
    "test_a_failure_of_data_or_model_changes_nothing"
)
def a_failed_calibration_leaves_its_hooks(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate.transaction import Transaction

    def put_back(real: Any, self: Transaction) -> None:
        self.hooks.clear()
        real(self)

    wrap(patch, "normkit.calibrate.transaction.Transaction.put_back", put_back)


@fault(
    caught_by="tests/calibrate/test_exact.py::"
    "test_earlier_layers_normalize_by_their_batch_and_dropout_is_off"
)
def dropout_is_left_on_while_calibrating(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.calibrate.transaction import Transaction

    def run_pass(
        real: Any, loan: Transaction, *args: object, **options: object
    ) -> object:
        for module in loan.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.training = True
        return real(loan, *args, **options)  # type: ignore[arg-type]

    wrap(patch, "normkit.calibrate.run.run_pass", run_pass)


@fault(
    caught_by="tests/calibrate/test_choice.py::"
    "test_a_layer_in_eval_inside_a_training_model_is_frozen"
)
def frozen_layers_are_calibrated(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import run

    real = run.find_layers
    patch.setattr(
        run, "find_layers", lambda model, layers: real(model, layers or ["*"])
    )


@fault(
    caught_by="tests/calibrate/test_order.py::"
    "test_eval_order_fits_what_eval_mode_feeds_each_layer"
)
def eval_order_runs_earlier_layers_on_their_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate.transaction import Transaction

    patch.setattr(Transaction, "try_out", lambda self, values: None)


# Without torchao the tests that catch them are skipped.
if find_spec("torchao") is not None:

    @fault(
        caught_by="tests/calibrate/test_quantization.py::test_observers_hold_still_and_are_on_again_afterwards"
    )
    def observers_that_record_during_a_calibration(patch: pytest.MonkeyPatch) -> None:
        import contextlib

        patch.setattr(
            "normkit.calibrate.fake_quantization._disabled",
            lambda flag: contextlib.nullcontext(),
        )

    @fault(
        caught_by="tests/calibrate/test_quantization.py::test_integer_weights_stay_and_ranges_follow_the_variances"
    )
    def ranges_that_do_not_follow(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            "normkit.calibrate.fake_quantization._scaled_weights",
            lambda graph: iter(()),
        )
