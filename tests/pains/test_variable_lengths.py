"""Threads about sequences of several lengths, and padding that is no data."""

import math

import pytest
import torch
from torch import nn

import normkit.nn

LENGTHS = [9, 2, 5]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    x = 3 + torch.randn(3, 4, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(LENGTHS).view(3, 1, 1)
    return x.masked_fill(~mask, 0.0), mask


def test_pytorch_70529_batchnorm_on_variable_length_sequences() -> None:
    x, mask = padded()
    values = torch.cat([row[:, :n].T for row, n in zip(x, LENGTHS, strict=True)])
    wanted = nn.BatchNorm1d(4).double()(values)
    theirs, ours = nn.BatchNorm1d(4).double(), normkit.nn.BatchNorm1d(4).double()
    found = theirs(x).movedim(1, -1)[mask[:, 0]]
    assert (found - wanted).abs().max() > 0.5  # zeros of the padding are data to it
    y = ours(x.masked_fill(~mask, math.nan), mask=mask)
    torch.testing.assert_close(y.movedim(1, -1)[mask[:, 0]], wanted)
    torch.testing.assert_close(ours.running_mean, 0.1 * values.mean(0))
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * values.var(0))


def test_pytorch_30414_statistics_do_not_depend_on_how_much_is_padded() -> None:
    x, mask = padded()
    layer = normkit.nn.BatchNorm1d(4).double()
    longer = nn.functional.pad(x, (0, 20), value=7.0)
    much = nn.functional.pad(mask, (0, 20))
    torch.testing.assert_close(layer(longer, mask=much)[..., :9], layer(x, mask=mask))


@pytest.mark.parametrize("name", ["instance", "group", "layer", "rms"])
def test_pytorch_81985_instance_and_group_norm_with_a_mask(name: str) -> None:
    """Every sample is as if it had come alone, without padding."""
    x, mask = padded()
    layer: nn.Module = {
        "instance": normkit.nn.InstanceNorm1d(4, affine=True),
        "group": normkit.nn.GroupNorm(2, 4),
        "layer": normkit.nn.LayerNorm(4, channel_dim=1),
        "rms": normkit.nn.RMSNorm(9, elementwise_affine=False),
    }[name].double()
    y = layer(x.masked_fill(~mask, math.inf), mask=mask)
    for k, n in enumerate(LENGTHS):
        alone = x[k : k + 1, :, :n]
        if name == "rms":
            wanted = nn.functional.rms_norm(alone, (n,), None, layer.eps)
        else:
            wanted = layer(alone)
        torch.testing.assert_close(y[k : k + 1, :, :n], wanted)
        assert not y[k, :, n:].any()


def test_recurrent_steps_with_few_sequences_keep_statistics_of_their_own() -> None:
    """Claim 003: batch norm suffers in recurrent networks. Per step it does not."""
    x = torch.randn(6, 5, 4, dtype=torch.float64) + 10.0 * torch.arange(6).view(6, 1, 1)
    lengths = torch.tensor([6, 6, 2, 3, 6])
    mask = torch.arange(6).view(6, 1, 1) < lengths.view(1, 5, 1)
    layer = normkit.nn.RecurrentBatchNorm(4, 6, momentum=1.0, affine=False).double()
    y = layer(x, mask=mask)
    assert (y.sum(1) / mask.sum(1)).abs().max() < 1e-9
    torch.testing.assert_close(layer.running_mean[5], x[5, [0, 1, 4]].mean(0))
