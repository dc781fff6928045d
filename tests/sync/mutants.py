"""Faults that tests/sync must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


@fault(
    caught_by="tests/sync/test_merge_over.py::"
    "test_ranks_of_uneven_size_merge_to_the_moments_of_the_whole"
)
def one_rank_is_ignored(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def all_reduce(real, x, group):
        return real(x * 0 if dist.get_rank() == 1 else x, group)

    wrap(patch, "normkit.sync._all_reduce", all_reduce)


@fault(
    caught_by="tests/sync/test_merge_over.py::"
    "test_gradients_across_ranks_equal_those_of_the_whole"
)
def the_backward_of_a_merge_stays_on_its_rank(patch: pytest.MonkeyPatch) -> None:
    from normkit import sync

    patch.setattr(
        sync._SumOverRanks, "backward", staticmethod(lambda ctx, dy: (dy, None))
    )


_ONE_PROCESS = (
    "tests/sync/test_sync_batch_norm.py::test_any_number_of_ranks_equals_one_process"
    "[3-whole-torch.float64]"
)


@fault(caught_by=_ONE_PROCESS)
def the_backward_stays_on_its_rank(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import passes

    patch.setattr(passes, "sum_over", lambda sums, group=None: list(sums))


@fault(caught_by=_ONE_PROCESS)
def ranks_average_their_means_whatever_their_counts(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from normkit.functional import passes
    from normkit.moments import Moments
    from normkit.sync import merge_over

    def broken(local, group=None):
        merged = merge_over(local, group)
        alike = Moments(local.count * 0 + 1, local.mean, local.m2)
        mean = merge_over(alike, group).mean
        return (
            merged
            if not dist.is_initialized()
            else Moments(merged.count, mean, merged.m2)
        )

    patch.setattr(passes, "merge_over", broken)


@fault(
    caught_by="tests/sync/test_sync_batch_norm.py::"
    "test_groups_are_taken_as_objects_names_and_mesh_dimensions"
)
def every_group_is_the_world(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import passes
    from normkit.sync import merge_over

    patch.setattr(passes, "merge_over", lambda local, group=None: merge_over(local))
