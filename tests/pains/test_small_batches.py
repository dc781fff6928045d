"""Threads about batches too small to normalize by."""

import pytest
import torch
from torch import nn

import normkit.nn


def test_pytorch_7716_batchnorm1d_cannot_work_with_batch_size_1() -> None:
    """The last batch of one kills a training; a policy is chosen here instead."""
    sample, last = torch.randn(8, 3), torch.randn(1, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(last)
    with pytest.raises(ValueError, match="on_small_batch"):
        normkit.nn.BatchNorm1d(3, ghost_size=4)(last)
    layer = normkit.nn.BatchNorm1d(3, on_small_batch="running")
    layer(sample)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    torch.testing.assert_close(layer(last), (last - mean) / (var + layer.eps).sqrt())
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, var)


def test_torch_em_499_batch_renorm_beyond_one_dimension() -> None:
    """Small batches train the network that eval uses, in every rank."""
    for rank, shape in ((1, (2, 3)), (2, (2, 3, 4, 4)), (3, (2, 3, 2, 4, 4))):
        build = getattr(normkit.nn, f"BatchRenorm{rank}d")
        layer = build(
            3, renorm_from=0, d_max_at=0, r_max_at=0, r_max=100.0, d_max=100.0
        )
        x = torch.randn(shape)
        wanted = layer.eval()(x)
        torch.testing.assert_close(layer.train()(x), wanted, rtol=1e-5, atol=1e-5)


def test_decorrelated_bn_1_whitening_gives_nan() -> None:
    """Dead channels have equal eigenvalues, between which eigh's gradient divides."""
    x = torch.randn(64, 16)
    x[:, 8:] = 0
    x.requires_grad_()
    dy = torch.randn(64, 16)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / 64 + 1e-5 * torch.eye(16))
    naive = centred @ (vectors * values.rsqrt()) @ vectors.T
    (lost,) = torch.autograd.grad(naive, x, dy)
    assert lost.isnan().any()
    y = normkit.nn.WhiteningBatchNorm(16)(x)
    (found,) = torch.autograd.grad(y, x, dy)
    assert y.isfinite().all()
    assert found.isfinite().all()
