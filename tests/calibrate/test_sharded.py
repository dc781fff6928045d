"""Data sharded over ranks: every rank ends with the bytes of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibrate import on_ranks
from normkit.calibrate import calibrate
from ranks import Ranks


def start() -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    model = on_ranks.Net()
    shards = [
        [torch.randn(n, 3) * 2 + 5 + i for n in sizes]
        for i, sizes in enumerate([(4, 7), (6,), (3, 3, 5)])
    ]
    return model.state_dict(), shards


@pytest.mark.parametrize(
    "options", [{}, {"mode": "average"}, {"order": "eval"}, {"keep": 0.3}]
)
def test_every_rank_ends_with_the_bytes_of_the_whole(
    three_ranks: Ranks, options: dict[str, Any]
) -> None:
    state, shards = start()
    results = three_ranks.run(on_ranks.sharded, state, shards, options)
    assert results[0][0] == results[1][0] == results[2][0]
    whole = on_ranks.Net()
    whole.load_state_dict(state)
    report = calibrate(whole, [x for shard in shards for x in shard], **options)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(results[1][1][name], buffer, rtol=1e-6, atol=1e-6)
    for layer, (count, batches, mean_error, var_error) in zip(
        report.layers, results[2][2], strict=True
    ):
        assert (count, batches) == (28, 6)
        torch.testing.assert_close(mean_error, layer.mean_error, rtol=1e-5, atol=0)
        torch.testing.assert_close(var_error, layer.var_error, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ["train", "eval"])
def test_a_rank_without_data_ends_with_the_same(three_ranks: Ranks, order: str) -> None:
    state, shards = start()
    shards[0] = []
    results = three_ranks.run(on_ranks.sharded, state, shards, {"order": order})
    assert results[0][0] == results[1][0] == results[2][0]
    whole = on_ranks.Net()
    whole.load_state_dict(state)
    calibrate(whole, shards[1] + shards[2], order=order)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(results[0][1][name], buffer, rtol=1e-6, atol=1e-6)


def test_a_failure_on_one_rank_undoes_all(three_ranks: Ranks) -> None:
    state, shards = start()
    results = three_ranks.run(on_ranks.sharded_with_a_failure, state, shards, 2)
    assert [unchanged for _, unchanged in results] == [True] * 3
    assert results[2][0] == "the disk of one rank is gone"
    assert "1 of 3 ranks failed" in results[0][0]
    assert "1 of 3 ranks failed" in results[1][0]


def test_ranks_must_say_whether_they_merge(three_ranks: Ranks) -> None:
    state, _ = start()
    for said in three_ranks.run(on_ranks.without_a_group, state):
        assert "runs on 3 ranks: pass process_group=" in said


def test_one_rank_may_calibrate_alone(three_ranks: Ranks) -> None:
    state, shards = start()
    means = three_ranks.run(on_ranks.alone, state, shards)
    assert torch.equal(means[0], torch.zeros(3))
    torch.testing.assert_close(means[1], torch.cat(shards[1]).mean(0))


def test_a_moving_average_has_no_order_over_ranks(three_ranks: Ranks) -> None:
    state, _ = start()
    for said in three_ranks.run(on_ranks.running_over_ranks, state):
        assert "depends on the order of the batches" in said


def test_a_model_in_ddp_takes_uneven_shards(three_ranks: Ranks) -> None:
    state, shards = start()
    means = three_ranks.run(on_ranks.wrapped_in_ddp, state, shards)
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


@pytest.mark.parametrize(
    "options", [{}, {"max_batches": 2}, {"order": "eval"}], ids=str
)
def test_synchronized_layers_are_measured_by_the_batches_of_all_ranks(
    three_ranks: Ranks, options: dict[str, Any]
) -> None:
    """By the rank's own batch they were 1.6e-2 off; ranks may hold unequal numbers."""
    state, shards = start()
    shards[1] = []
    found = three_ranks.run(on_ranks.in_step, state, shards, options)
    together = [
        torch.cat([own[k] for own in shards if k < len(own)])
        for k in range(max(map(len, shards)))
    ]
    whole = on_ranks.Net()
    whole.load_state_dict(state)
    calibrate(whole, together, **options)
    for buffers in found:
        for name, buffer in whole.named_buffers():
            if "num_batches" in name:
                continue  # of small batches here, of whole ones there
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(buffers[name], found[0][name], rtol=0, atol=0)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6 asks a CPU for streams in FSDP2",
)
def test_fsdp_with_unequal_numbers_of_batches_does_not_wait(three_ranks: Ranks) -> None:
    state, shards = start()
    found = three_ranks.run(on_ranks.under_fsdp, state, shards)
    whole = on_ranks.Net()
    whole.load_state_dict(state)
    calibrate(whole, [x for shard in shards for x in shard])
    for mean in found:
        torch.testing.assert_close(mean, whole.bn2.running_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["train", "eval"])
def test_what_a_distributed_sampler_repeats_counts_once(
    three_ranks: Ranks, order: str
) -> None:
    state, _ = start()
    x = torch.randn(26, 3) * 2 + 5  # 9 for each of three ranks, one of them twice
    found = three_ranks.run(on_ranks.padded, state, x, order)
    exact = x.double().mean(0).float()
    for buffers, count, samples in found:
        assert samples == 9
        assert count == 26
        torch.testing.assert_close(
            buffers["bn1.running_mean"], exact, rtol=1e-6, atol=1e-6
        )


def test_a_failing_loader_of_synchronized_layers_undoes_all(three_ranks: Ranks) -> None:
    state, shards = start()
    *others, culprit = three_ranks.run(on_ranks.failing_in_step, state, shards)
    assert culprit == ("the disk of one rank is gone", True)
    for told, is_kept in others:
        assert "1 of 3 ranks raised an error at a batch" in told
        assert is_kept
