"""Batch norm over ranks is batch norm of the whole batch in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
import oracles
from normkit.errors import ArgumentError
from normkit.nn import BatchNorm1d, BatchNorm2d, SyncBatchNorm
from ranks import Ranks
from sync import layers_on_ranks

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def state_of(channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": torch.randn(channels, dtype=dtype),
        "bias": torch.randn(channels, dtype=dtype),
        "running_mean": torch.randn(channels, dtype=dtype),
        "running_var": torch.rand(channels, dtype=dtype) + 0.5,
        "num_batches_tracked": torch.tensor(3),
    }


def parts_of(sizes: tuple[int, ...], rest: tuple[int, ...], dtype: Any) -> list[Tensor]:
    return [(2 * torch.randn(n, *rest) + 3).to(dtype) for n in sizes]


def assert_close(ours: Tensor, truth: Tensor, bar: float) -> None:
    """Within `bar`, relative to the largest value or 1."""
    error = (ours.double() - truth).abs().max() if truth.numel() else torch.tensor(0)
    assert error <= bar * max(1.0, float(truth.abs().max()) if truth.numel() else 1.0)


def assert_equals_the_whole(
    results: list[dict[str, Tensor]],
    state: dict[str, Tensor],
    parts: list[Tensor],
    masks: list[Tensor] | None,
    cotangents: list[Tensor],
) -> None:
    bar = TOLERANCE[parts[0].dtype]
    x = torch.cat(parts).double().requires_grad_()
    weight, bias = (state[k].double().requires_grad_() for k in ("weight", "bias"))
    mask = None if masks is None else torch.cat(masks)
    y = oracles.batch_norm(x, weight, bias, 1e-5, mask)
    dy = torch.cat(cotangents).double()
    truth = torch.autograd.grad(y, [x, weight, bias], dy)
    assert_close(torch.cat([r["y"] for r in results]), y.detach(), bar)
    assert_close(torch.cat([r["dx"] for r in results]), truth[0], bar)
    # Local sums, as torch's: what DDP averages.
    assert_close(torch.stack([r["dweight"] for r in results]).sum(0), truth[1], bar)
    assert_close(torch.stack([r["dbias"] for r in results]).sum(0), truth[2], bar)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    count, mean, m2 = (s.flatten() for s in oracles.statistics(x.detach(), dims, mask))
    running = state["running_mean"].double() * 0.9 + 0.1 * mean
    spread = state["running_var"].double() * 0.9 + 0.1 * m2 / (count - 1)
    for result in results:
        assert_close(result["running_mean"], running, bar)
        assert_close(result["running_var"], spread, bar)
        assert int(result["batches"]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_equals_one_process(
    four_ranks: Ranks, size: int, is_masked: bool, dtype: torch.dtype
) -> None:
    sizes = (5, 1, 0, 12)[:size]
    parts = parts_of(sizes, (4, 3, 2), dtype)
    cotangents = [torch.randn_like(p) for p in parts]
    masks = [torch.rand(p.shape) < 0.7 for p in parts] if is_masked else None
    state = state_of(4, dtype)
    results = four_ranks.run(
        layers_on_ranks.train_step, size, state, parts + parts, masks, cotangents, {}
    )
    assert results[size:] == [None] * (4 - size)
    assert_equals_the_whole(results[:size], state, parts, masks, cotangents)


@pytest.mark.parametrize("rest", [(4,), (4, 6), (4, 2, 3, 2)], ids=str)
def test_inputs_of_every_rank_are_taken(
    four_ranks: Ranks, rest: tuple[int, ...]
) -> None:
    parts = parts_of((2, 3), rest, torch.float64)
    cotangents = [torch.randn_like(p) for p in parts]
    state = state_of(4, torch.float64)
    results = four_ranks.run(
        layers_on_ranks.train_step, 2, state, parts * 2, None, cotangents, {}
    )
    assert_equals_the_whole(results[:2], state, parts, None, cotangents)


def test_weights_as_a_mask_count_over_ranks(four_ranks: Ranks) -> None:
    parts = parts_of((4, 3), (4, 5), torch.float64)
    masks = [torch.rand(p.shape, dtype=torch.float64) for p in parts]
    cotangents = [torch.randn_like(p) for p in parts]
    state = state_of(4, torch.float64)
    results = four_ranks.run(
        layers_on_ranks.train_step, 2, state, parts * 2, masks, cotangents, {}
    )
    whole = torch.cat(parts).requires_grad_()
    mask = torch.cat(masks)
    y = oracles.batch_norm(whole, state["weight"], state["bias"], 1e-5, mask)
    (dx,) = torch.autograd.grad(y, whole, torch.cat(cotangents))
    assert_close(torch.cat([r["y"] for r in results[:2]]), y.detach(), 1e-12)
    assert_close(torch.cat([r["dx"] for r in results[:2]]), dx, 1e-12)


def test_ghosts_stay_on_their_rank_and_the_population_is_everyones(
    four_ranks: Ranks,
) -> None:
    parts = parts_of((6, 9), (4, 5), torch.float64)
    masks = [torch.rand(p.shape) < 0.8 for p in parts]
    cotangents = [torch.randn_like(p) for p in parts]
    state = state_of(4, torch.float64)
    extras = {"ghost_size": 3}
    results = four_ranks.run(
        layers_on_ranks.train_step, 2, state, parts * 2, masks, cotangents, extras
    )
    ghosts = [
        oracles.batch_norm(x, state["weight"], state["bias"], 1e-5, m)
        for part, mask in zip(parts, masks, strict=True)
        for x, m in zip(part.split(3), mask.split(3), strict=True)
    ]
    assert_close(torch.cat([r["y"] for r in results[:2]]), torch.cat(ghosts), 1e-12)
    _, mean, _ = oracles.statistics(torch.cat(parts), (0, 2), torch.cat(masks))
    for result in results[:2]:
        wanted = 0.9 * state["running_mean"] + 0.1 * mean.flatten()
        assert_close(result["running_mean"], wanted, 1e-12)


def test_ghosts_of_a_step_are_merged_in_one_message(four_ranks: Ranks) -> None:
    """Two here: a mean of 1e6 standard deviations asks for the sums again."""
    parts = parts_of((6, 9), (4, 5), torch.float64)
    state = state_of(4, torch.float64)
    found = four_ranks.run(layers_on_ranks.ghosts_at_once, state, parts * 2)
    for inside, sizes, (usual, far, on_one) in found[:2]:
        assert inside == 0
        assert sizes == [3 * (3 * 4) + 1 + 2 * 3] * 2
        for x, (mean, var, batches, skipped), times, bad in (
            (torch.cat(parts), usual, 1, 0),
            (torch.cat(parts) + 1e6, far, 1, 1),
            (parts[0], on_one, 1, 0),
        ):
            _, of_x, spread = oracles.statistics(x, (0, 2), None)
            n = x.numel() / 4
            wanted = 0.9 * state["running_mean"] + 0.1 * of_x.flatten()
            assert_close(mean, wanted, 1e-12)
            wanted = 0.9 * state["running_var"] + 0.1 * spread.flatten() / (n - 1)
            assert_close(var, wanted, 1e-8)
            assert (int(batches), skipped) == (3 + times, bad)


def test_a_nan_on_one_rank_moves_no_ranks_statistics(four_ranks: Ranks) -> None:
    """pytorch#88474, over ranks: all of them agree that the batch is skipped."""
    parts = parts_of((4, 4), (4,), torch.float64)
    parts[1][0, 2] = torch.nan
    state = state_of(4, torch.float64)
    results = four_ranks.run(
        layers_on_ranks.train_step, 2, state, parts * 2, None, parts, {}
    )
    for result in results[:2]:
        assert result["y"].isnan().any(0).tolist() == [False, False, True, False]
        assert torch.equal(result["running_mean"], state["running_mean"])
        assert int(result["batches"]) == 3


def test_groups_are_taken_as_objects_names_and_mesh_dimensions(
    four_ranks: Ranks,
) -> None:
    parts = parts_of((3, 4, 2, 5), (4,), torch.float64)
    state = state_of(4, torch.float64)
    found = four_ranks.run(layers_on_ranks.named_groups, state, parts)
    for pair in ((0, 1), (2, 3)):
        whole = torch.cat([parts[r] for r in pair])
        y = oracles.batch_norm(whole, state["weight"], state["bias"])
        for k in range(4):
            assert_close(torch.cat([found[r][k] for r in pair]), y, 1e-12)


def test_a_step_holds_no_process_group(four_ranks: Ranks) -> None:
    """One that lives longer than destroy_process_group aborts at the end of gloo."""
    found = four_ranks.run(layers_on_ranks.holders, torch.randn(3, 5, 7))
    assert all(before == after for before, after in found)


def test_it_takes_one_collective_forward_and_one_backward(four_ranks: Ranks) -> None:
    """pytorch#39358: the message does not grow with the number of ranks."""
    parts = parts_of((3, 4, 2, 5), (4, 6), torch.float32)
    state = state_of(4, torch.float32)
    calls = four_ranks.run(layers_on_ranks.collectives, state, parts)
    assert calls[:2] == [[1 + 2 * 4, 2 * 4]] * 2


def test_buffers_of_every_dtype_are_right_or_refused_on_ranks(
    four_ranks: Ranks,
) -> None:
    parts = parts_of((3, 4, 2, 5), (3, 4), torch.float32)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    others = (torch.int64, torch.int32, torch.bool)
    dtypes = [(dtype, torch.int64) for dtype in (*floats, *others)]
    dtypes += [(torch.float32, dtype) for dtype in (torch.int32, torch.uint8, *floats)]
    results = four_ranks.run(layers_on_ranks.with_buffers, dtypes, parts)
    running = torch.ones(3), torch.ones(3)
    wanted = oracles.running_after(*running, [torch.cat(parts)] * 2, 0.1)
    for found in results:
        for (of_statistics, of_counter), (refusal, *memory, counters) in zip(
            dtypes, found, strict=True
        ):
            for buffer, truth in zip(memory, wanted, strict=True):
                assert bool((buffer[:3] == 1).all() and (buffer[6:] == 1).all())
                if refusal:
                    assert bool((buffer == 1).all())
                else:
                    eps = 2 * max(torch.finfo(of_statistics).eps, 1e-6)
                    assert_close(buffer[3:6].double(), truth, eps)
            assert counters[::2].tolist() == [1, 1]
            assert int(counters[1]) == (1 if refusal else 3)
            is_known = of_statistics in floats and of_counter == torch.int64
            assert bool(refusal) != is_known, (of_statistics, of_counter, refusal)


def test_second_derivatives_cross_ranks(four_ranks: Ranks) -> None:
    parts = parts_of((3, 4), (2, 3), torch.float64)
    dy = [torch.randn_like(p) for p in parts]
    state = state_of(2, torch.float64)
    found = four_ranks.run(layers_on_ranks.second_derivative, state, parts, dy)
    x = torch.cat(parts).requires_grad_()
    y = oracles.batch_norm(x, state["weight"], state["bias"])
    (dx,) = torch.autograd.grad(y, x, torch.cat(dy), create_graph=True)
    (truth,) = torch.autograd.grad((dx**2).sum(), x)
    assert_close(torch.cat(found[:2]), truth, 1e-10)


def test_torch_175024_two_forwards_under_ddp(four_ranks: Ranks) -> None:
    """DDP writes the buffers between the forwards; no backward of ours reads them.

    Torch 2.13 fails on a GPU alone, so it is not asked here.
    """
    x = torch.randn(2 * 4 * 3, 4)
    ours = four_ranks.run(layers_on_ranks.two_forwards_frozen, x[:6])
    assert ours == [""] * 4
    found = four_ranks.run(layers_on_ranks.under_ddp, 5, x)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    a, b = x.view(2, 12, 4)
    (model(a).square().mean() + model(b).abs().mean()).backward()
    for grads, running_var in found:
        for ours, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running_var, model[1].running_var)


def test_torch_161302_it_compiles_whole(four_ranks: Ranks) -> None:
    parts = parts_of((3, 4, 2, 5), (4, 6), torch.float32)
    found = four_ranks.run(layers_on_ranks.compiled, state_of(4, torch.float32), parts)
    for eager, compiled in found[:2]:
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_a_copy_finds_its_group_again(four_ranks: Ranks) -> None:
    parts = parts_of((3, 4, 2, 5), (4,), torch.float64)
    found = four_ranks.run(layers_on_ranks.copied, state_of(4, torch.float64), parts)
    for layer, *twins in found[:2]:
        assert all(torch.equal(layer, twin) for twin in twins)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6 asks a CPU for streams in FSDP2",
)
def test_torchtitan_674_buffers_are_float32_under_fsdp2(four_ranks: Ranks) -> None:
    results = four_ranks.run(layers_on_ranks.sharded)
    for y_dtype, running_mean, running_dtype in results:
        assert y_dtype == torch.bfloat16
        assert running_mean.dtype == running_dtype == torch.float32
        assert running_mean.abs().sum() > 0


def test_mmsegmentation_387_it_runs_on_a_cpu(four_ranks: Ranks) -> None:
    """Torch's refuses one, even in a group of one rank."""
    errors = four_ranks.run(layers_on_ranks.torch_refuses_a_cpu, torch.randn(6, 3))
    assert all("on GPU" in error for error in errors)


def test_without_ranks_it_is_plain_batch_norm() -> None:
    x = torch.randn(6, 3, 4, 4)
    alone, plain = SyncBatchNorm(3), BatchNorm2d(3)
    torch.testing.assert_close(alone(x), plain(x), rtol=1e-6, atol=1e-6)
    assert list(alone.state_dict()) == list(nn.SyncBatchNorm(3).state_dict())
    torch.testing.assert_close(
        dict(alone.state_dict()), dict(plain.state_dict()), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(alone.eval()(x), plain.eval()(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(ArgumentError, match="more than one value per channel"):
        SyncBatchNorm(3)(torch.randn(1, 3))
    with pytest.raises(ArgumentError, match="at least 2D"):
        alone(torch.randn(3))


def test_plain_layers_synchronize_when_given_a_group() -> None:
    assert not BatchNorm2d(3).is_synchronized
    assert BatchNorm2d(3, process_group="0").is_synchronized
    assert isinstance(normkit.nn.SyncBatchNorm(3), nn.modules.batchnorm._BatchNorm)


def test_mask_ghosts_ranks_and_accumulation_compose(four_ranks: Ranks) -> None:
    parts = parts_of((8, 5), (4, 3), torch.float64)
    masks = [torch.rand(p.shape) < 0.8 for p in parts]
    state = state_of(4, torch.float64)
    found = four_ranks.run(layers_on_ranks.accumulated, state, parts, masks)
    count, mean, m2 = (
        s.flatten()
        for s in oracles.statistics(torch.cat(parts), (0, 2), torch.cat(masks))
    )
    for running_mean, running_var, batches in found[:2]:
        wanted = 0.9 * state["running_mean"] + 0.1 * mean
        assert_close(running_mean, wanted, 1e-12)
        spread = 0.9 * state["running_var"] + 0.1 * m2 / (count - 1)
        assert_close(running_var, spread, 1e-12)
        assert int(batches) == 4


def test_the_gradients_of_parts_on_ranks_are_those_of_the_whole(
    four_ranks: Ranks,
) -> None:
    parts = parts_of((7, 4), (4,), torch.float64)
    dy = [torch.randn_like(p) for p in parts]
    state = state_of(4, torch.float64)
    found = four_ranks.run(layers_on_ranks.as_whole, state, parts, dy)
    linear = nn.Linear(4, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    layer = BatchNorm1d(4, dtype=torch.float64)
    layer.load_state_dict(state)
    y = layer(linear(torch.cat(parts)).tanh())
    (y * torch.cat(dy)).sum().backward()
    truth = [p.grad for p in (*linear.parameters(), *layer.parameters())]
    # The sum over ranks is what DDP, which averages, divides by their number.
    for k, wanted in enumerate(truth):
        assert isinstance(wanted, Tensor)
        total = found[0][0][k] + found[1][0][k]
        assert_close(total, wanted, 1e-10)
    assert layer.running_var is not None
    for _, running_var in found[:2]:
        assert_close(running_var, layer.running_var, 1e-12)
