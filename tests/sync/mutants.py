"""Faults that tests/sync must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


@fault(
    caught_by="tests/sync/test_merge_over.py::"
    "test_ranks_of_uneven_size_merge_to_the_moments_of_the_whole"
)
def one_rank_is_ignored(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def all_reduce(real, x, group, action):
        return real(x * 0 if dist.get_rank() == 1 else x, group, action)

    wrap(patch, "normkit.sync.collective._all_reduce", all_reduce)


@fault(
    caught_by="tests/sync/test_merge_over.py::"
    "test_gradients_across_ranks_equal_those_of_the_whole"
)
def the_backward_of_a_merge_stays_on_its_rank(patch: pytest.MonkeyPatch) -> None:
    from normkit.sync import collective

    patch.setattr(
        collective._SumOverRanks,
        "backward",
        staticmethod(lambda ctx, dy: (dy, None, None)),
    )


_ONE_PROCESS = (
    "tests/sync/test_sync_batch_norm.py::test_any_number_of_ranks_equals_one_process"
    "[3-whole-torch.float64]"
)


@fault(caught_by=_ONE_PROCESS)
def the_backward_stays_on_its_rank(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import passes

    def forward_only(real, x, ranks, action="forward"):
        return x if action == "backward" else real(x, ranks, action)

    wrap(patch, "normkit.functional.ranks_call.all_reduce_", forward_only)
    patch.setattr(passes, "sum_over", lambda sums, *_, **__: list(sums))


@fault(caught_by=_ONE_PROCESS)
def ranks_average_their_means_whatever_their_counts(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from normkit.functional import engine
    from normkit.moments import Moments

    patch.setattr(engine, "ranks_call_for", lambda *_: None)

    def broken(merge_over, local, group=None, **_):
        merged = merge_over(local, group)
        alike = Moments(local.count * 0 + 1, local.mean, local.m2)
        mean = merge_over(alike, group).mean
        return (
            merged
            if not dist.is_initialized()
            else Moments(merged.count, mean, merged.m2)
        )

    wrap(patch, "normkit.functional.passes.merge_over", broken)


@fault(
    caught_by="tests/sync/test_sync_batch_norm.py::"
    "test_groups_are_taken_as_objects_names_and_mesh_dimensions"
)
def every_group_is_the_world(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from normkit.nn import batch_norm_layer

    patch.setattr(batch_norm_layer, "ranks_of", lambda _: dist.group.WORLD)


@fault(caught_by=_ONE_PROCESS)
def running_statistics_over_ranks_stay(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.kernels.cpu.parts.NativeParts.update",
        lambda real, parts, running, statistics: None,
    )


_SHORT_WAY = "tests/sync/test_short_way.py::"


@fault(caught_by=_SHORT_WAY + "test_statistics_hold_far_from_zero[1000000.0-cpu]")
def no_mean_of_ranks_is_far(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.kernels.cpu.parts.NativeParts.finish",
        lambda real, *given: (real(*given)[0], False),
    )


@fault(
    caught_by=_SHORT_WAY
    + "test_native_parts_agree_with_the_primitives[relu-alone-whole-rows]"
)
def sums_of_ranks_forget_the_weight(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels.cpu import parts

    patch.setattr(parts, "WEIGHTED", 0)


@fault(caught_by="tests/sync/test_groups.py::test_a_rank_outside_the_group_is_told_so")
def a_rank_outside_runs_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.errors import ArgumentError

    def broken(real, layer):
        try:
            return real(layer)
        except ArgumentError:
            return False

    wrap(patch, "normkit.nn.batch_statistics.is_over_ranks", broken)


@fault(
    caught_by="tests/sync/test_faults.py::"
    "test_uneven_numbers_of_batches_train_as_one_process"
)
def a_rank_that_is_done_repeats_its_last_batch(patch: pytest.MonkeyPatch) -> None:
    import sys

    # The package has the function of that name.
    patch.setattr(sys.modules["normkit.sync.join"], "empty_of", lambda batch: batch)


_GHOSTS = "tests/sync/test_sync_batch_norm.py::test_ghosts_of_a_step_are_merged_in_one_message"


@fault(caught_by=_GHOSTS)
def ghosts_of_a_step_stay_on_their_rank(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.nn.accumulation._Merged.merge_ghosts",
        lambda real, pool, layers: None,
    )


@fault(caught_by=_GHOSTS)
def ghosts_send_a_message_a_layer(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import accumulation

    patch.setattr(accumulation._Merged, "merges_ghosts", False)


@fault(
    caught_by="tests/sync/test_faults.py::"
    "test_a_rank_in_another_mode_or_gone_is_an_error_with_the_layers_name[mode]"
)
def an_error_of_the_backend_names_no_layer(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def plainly(real, x, ranks, action="forward"):
        dist.all_reduce(x, group=ranks.group)
        return x

    wrap(patch, "normkit.functional.ranks_call.all_reduce_", plainly)


@fault(
    caught_by="tests/sync/test_sync_batch_norm.py::test_a_step_holds_no_process_group"
)
def a_call_holds_its_group(patch: pytest.MonkeyPatch) -> None:
    held = []

    def init(real, self, group, name):
        held.append(group)
        real(self, group, name)

    wrap(patch, "normkit.sync.groups.Ranks.__init__", init)
