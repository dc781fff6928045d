"""Every layer with statistics of the batch takes those of all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ranks import Ranks
from sync import other_layers_on_ranks as on_ranks

SIZES = (5, 1, 6)


def _parts(name: str) -> tuple[list[Tensor], int]:
    """This many samples on each rank, and the dimension of the samples."""
    if name == "recurrent":
        return [torch.randn(4, n, 4, dtype=torch.float64) * 2 + 3 for n in SIZES], 1
    return [torch.randn(n, 4, 3, dtype=torch.float64) * 2 + 3 for n in SIZES], 0


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", list(on_ranks.LAYERS))
def test_ranks_equal_one_process(
    three_ranks: Ranks, name: str, is_masked: bool
) -> None:
    parts, dim = _parts(name)
    cotangents = [torch.randn_like(p) for p in parts]
    masks = None
    if is_masked:
        one = (lambda p: p[..., :1]) if name == "recurrent" else (lambda p: p[:, :1])
        masks = [torch.rand_like(one(p)) < 0.8 for p in parts]
    found = three_ranks.run(on_ranks.step, name, parts, masks, cotangents)
    layer = on_ranks.built(name)
    x = torch.cat(parts, dim).requires_grad_()
    options = {} if masks is None else {"mask": torch.cat(masks, dim)}
    y = layer(x, **options)
    y.backward(torch.cat(cotangents, dim))
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(torch.cat([f[0] for f in found], dim), y, **close)
    torch.testing.assert_close(torch.cat([f[1] for f in found], dim), x.grad, **close)
    for k, parameter in enumerate(layer.parameters()):
        if parameter.grad is not None:
            total = torch.stack([f[2][k] for f in found]).sum(0)
            torch.testing.assert_close(total, parameter.grad, **close)
    for _, _, _, statistics in found:
        torch.testing.assert_close(statistics, on_ranks.statistics_of(layer), **close)
