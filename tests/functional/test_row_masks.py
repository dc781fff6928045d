"""Layer and RMS norm under masks that hide rows as a whole: padded tokens."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import normkit
from normkit.functional import layer_norm, rms_norm
from normkit.kernels.cpu import call
from normkit.kernels.cpu.loading import library

pytestmark = pytest.mark.skipif(library() is None, reason="no native kernels")

SHAPES = {
    "tokens": ((3, 7, 24), (24,)),
    "long rows": ((4, 40, 4, 300), (4, 300)),
    "many rows": ((70, 50, 16), (16,)),
    "tail": ((5, 9, 19), (19,)),
    "outputs that stream": ((3, 701, 1024), (1024,)),
}
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}
CASES = [(case, torch.float32) for case in SHAPES]
CASES += [(case, d) for case in ("tokens", "tail") for d in DTYPES if d.itemsize != 4]
Norm = Callable[..., Tensor]


def normalize(norm: Norm, x: Tensor, w: Tensor | None, mask: Tensor | None) -> Tensor:
    sizes = x.shape[2:]
    if norm is rms_norm:
        return rms_norm(x, sizes, w, 1e-5, mask=mask)
    return layer_norm(x, sizes, w, None if w is None else w * 0 + 0.25, 1e-5, mask=mask)


def hidden_rows(shape: tuple[int, ...], share: float = 0.4) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.rand(shape[:2], generator=g) > share


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_what_is_shown_is_as_without_a_mask_and_nothing_else_is_read(
    case: str, norm: Norm, dtype: torch.dtype, has_weight: bool, threads: int
) -> None:
    shape, sizes = SHAPES[case]
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    w = torch.rand(sizes, generator=g).to(dtype) + 0.5 if has_weight else None
    shown = hidden_rows(shape)
    mask = shown.view(*shape[:2], *(1 for _ in sizes))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        nan = torch.tensor(math.nan, dtype=dtype)
        some, wanted = x.where(mask, nan), x[shown][:, None]
        some.requires_grad_()
        wanted.requires_grad_()
        found_w, wanted_w = (None if w is None else w.clone() for _ in range(2))
        learned = [v.requires_grad_() for v in (found_w, wanted_w) if v is not None]
        y = normalize(norm, some, found_w, mask)
        (y * dy.where(mask, nan)).where(mask, 0.0).sum().backward()
        z = normalize(norm, wanted, wanted_w, None)
        (z * dy[shown][:, None]).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert some.grad is not None
    assert wanted.grad is not None
    near = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    torch.testing.assert_close(y[shown], z[:, 0], **near)
    assert not y[~shown].any()
    torch.testing.assert_close(some.grad[shown], wanted.grad[:, 0], **near)
    assert not some.grad[~shown].any()
    if learned:
        found, one = (v.grad for v in learned)
        assert found is not None
        assert one is not None
        scale = float(one.abs().max())
        torch.testing.assert_close(found, one, rtol=0, atol=DTYPES[dtype] * scale)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("case", SHAPES)
def test_a_row_has_the_same_bits_whatever_is_hidden(case: str, norm: Norm) -> None:
    shape, sizes = SHAPES[case]
    x, w, shown = torch.randn(shape), torch.rand(sizes), hidden_rows(shape)
    around = shown.view(*shape[:2], *(1 for _ in sizes))
    found = normalize(norm, x, w, around)
    wanted = normalize(norm, x, w, torch.ones_like(around))
    assert torch.equal(found[shown], wanted[shown])


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["none hidden", "all hidden"])
def test_no_row_or_every_row_is_hidden(norm: Norm, share: float) -> None:
    x = torch.randn(4, 6, 8, requires_grad=True)
    mask = hidden_rows((4, 6), share)[..., None]
    y = normalize(norm, x, None, mask)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    if share:
        assert not y.any()
        assert not dx.any()
    else:
        torch.testing.assert_close(y, normalize(norm, x, None, None))


def test_a_row_takes_a_byte_and_no_more() -> None:
    x = torch.randn(4, 6, 64, requires_grad=True)
    mask = hidden_rows((4, 6))[..., None]
    sizes = []

    def keep(t: Tensor) -> Tensor:
        if t.dtype is torch.bool:
            sizes.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer_norm(x, (64,), mask=mask)
    assert sizes == [24]


@pytest.mark.parametrize("shape", [(6, 1), (4, 6, 1), (1, 6, 1), (1, 1, 1)], ids=str)
def test_masks_that_broadcast_over_rows_too(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 6, 64)
    mask = torch.rand(shape) > 0.5
    whole = mask.expand(x.shape)
    found = layer_norm(x, (64,), mask=mask)
    torch.testing.assert_close(found, layer_norm(x, (64,), mask=whole.clone()))


def test_a_mask_along_the_row_is_none_of_these() -> None:
    x = torch.randn(4, 6, 64)
    mask = torch.rand(64) > 0.5
    found = layer_norm(x, (64,), mask=mask)
    wanted = torch.zeros_like(x)
    wanted[..., mask] = torch.nn.functional.layer_norm(x[..., mask], (int(mask.sum()),))
    torch.testing.assert_close(found, wanted)


def test_layouts_and_second_derivatives() -> None:
    x = torch.randn(6, 4, 8, dtype=torch.float64).transpose(0, 1).requires_grad_()
    mask = hidden_rows((4, 6))[..., None]
    w = torch.rand(8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return layer_norm(x, (8,), w, mask=mask)

    torch.autograd.gradcheck(run, (x, w))
    torch.autograd.gradgradcheck(run, (x, w))


def test_a_layer_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    honest = call._hides_rows

    def note(*arguments: object) -> bool:
        asked.append(honest(*arguments))  # type: ignore[arg-type]
        return asked[-1]

    monkeypatch.setattr(call, "_hides_rows", note)
    layer = normkit.nn.LayerNorm(11)
    for _ in range(2):
        layer(torch.randn(3, 5, 11), mask=torch.ones(3, 5, 1, dtype=torch.bool))
    assert asked == [True]
