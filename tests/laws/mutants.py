"""Faults that tests/laws must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


@fault(caught_by="tests/laws/test_moments.py::test_merge_of_any_split_equals_whole")
def a_merge_forgets_what_lies_between_the_means(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    def broken(honest, self, other):
        merged = honest(self, other)
        return Moments(merged.count, merged.mean, self.m2 + other.m2)

    wrap(patch, "normkit.moments.Moments.merge", broken)


@fault(
    caught_by="tests/laws/test_moments.py::test_derived_values_follow_their_definitions"
)
def the_population_variance_divides_by_n_minus_1(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    patch.setattr(
        Moments, "var", property(lambda self: self.m2 / (self.count.to(self.m2) - 1))
    )
