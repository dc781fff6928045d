"""Planted faults: broken kernels and layers that the suite must catch.

Each `Fault` breaks one thing the way a tired author would (ddof 1 for 0, the last
column dropped, the momentum swapped) and names the test that has to fail for it.
`tests/test_sabotage.py` runs `pytest --sabotage NAME TEST` for every fault and is
green only when that test is red. A fault that survives is a hole in the suite.

To add one, write a function that patches normkit through a `pytest.MonkeyPatch`, and
register it with `@fault(caught_by="tests/…::test_…")`; the registry's key is the
function's name. Import normkit inside the function, not at the top.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Fault:
    """One planted fault and the test that catches it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: str


FAULTS: dict[str, Fault] = {}


def fault(
    *, caught_by: str
) -> Callable[
    [Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]
]:
    """Register the decorated function as a fault that `caught_by` must catch."""

    def register(
        plant: Callable[[pytest.MonkeyPatch], None],
    ) -> Callable[[pytest.MonkeyPatch], None]:
        FAULTS[plant.__name__] = Fault(plant, caught_by)
        return plant

    return register


# --- kernels and functions -------------------------------------------------------


def _reference():
    from normkit.kernels.reference import ReferenceBackend

    return ReferenceBackend


@fault(caught_by="tests/kernels/test_agree.py::test_moments")
def the_last_column_is_dropped(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().moments

    def broken(self, x, dims, mask=None):
        if mask is None and x.shape[-1] > 1 and x.dim() - 1 in dims:
            x = x[..., :-1]
        return honest(self, x, dims, mask)

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/kernels/test_agree.py::test_moments")
def the_variance_is_a_difference_of_squares(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels.primitives import vector_dtype
    from normkit.moments import Moments, statistics_dtype

    def broken(self, x, dims, mask=None):
        import torch

        wide = x.to(statistics_dtype(x.dtype))
        count = torch.tensor(x.numel() // max(1, wide.sum(dims).numel()))
        mean = wide.mean(dims, keepdim=True)
        m2 = (wide.square().mean(dims, keepdim=True) - mean.square()) * count
        return Moments(count, mean, m2.clamp(min=0)).to(dtype=vector_dtype(x.device))

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/functional/test_contract.py")
def the_centre_is_rounded_to_float32(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels import reference

    patch.setattr(reference, "split", lambda center, dtype: (center.to(dtype), None))


@fault(caught_by="tests/kernels/test_agree.py::test_masked_moments")
def a_mask_divides_by_the_padded_length(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().moments

    def broken(self, x, dims, mask=None):
        return honest(self, x if mask is None else x.nan_to_num() * mask, dims)

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/laws/test_moments.py::test_merge_of_any_split_equals_whole")
def a_merge_forgets_what_lies_between_the_means(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    honest = Moments.merge

    def broken(self, other):
        merged = honest(self, other)
        return Moments(merged.count, merged.mean, self.m2 + other.m2)

    patch.setattr(Moments, "merge", broken)


@fault(
    caught_by="tests/laws/test_moments.py::test_derived_values_follow_their_definitions"
)
def the_population_variance_divides_by_n_minus_1(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    patch.setattr(
        Moments, "var", property(lambda self: self.m2 / (self.count.to(self.m2) - 1))
    )


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_forgets_the_weight(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().apply_grads

    def broken(self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b, c)

    patch.setattr(_reference(), "apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_takes_the_mean_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().apply_grads

    def broken(self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b, c * 0, weight=weight)

    patch.setattr(_reference(), "apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_takes_the_variance_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().apply_grads

    def broken(self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b * 0, c, weight=weight)

    patch.setattr(_reference(), "apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_weight_gradient_is_not_standardized(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().reduce_grads

    def broken(self, dy, x, center, dims, *, weight=None, scale=None):
        return honest(self, dy, x, center, dims, weight=weight)

    patch.setattr(_reference(), "reduce_grads", broken)


@fault(
    caught_by="tests/functional/test_gradients.py::test_derivatives_of_every_kind_pass_gradcheck"
)
def a_double_backward_stops_at_the_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import engine

    honest = engine.deviations

    def broken(x, dims, mask=None):
        return honest(x.detach(), dims, mask)

    patch.setattr(engine, "deviations", broken)


@fault(
    caught_by="tests/functional/test_contract.py::test_a_non_finite_batch_stays_out_of_the_running_statistics"
)
def a_nan_enters_the_running_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import batch

    honest = batch.update_running

    def broken(*args, **kwargs):
        return honest(*args, **{**kwargs, "on_nonfinite": "update"})

    patch.setattr(batch, "update_running", broken)


@fault(
    caught_by="tests/functional/test_gradients.py::test_masked_gradients_equal_those_of_the_values_alone"
)
def padding_leaks_into_the_gradient(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels.composed import Composed

    honest = Composed._grads

    def broken(self, dy, x, *rest):
        import torch

        leak = torch.zeros_like(dy).masked_fill(dy == 0, 0.1)
        return honest(self, dy + leak, x, *rest)

    patch.setattr(Composed, "_grads", broken)
