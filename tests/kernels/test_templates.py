"""Cached calls hold no tensors of their own."""

import gc

import torch
from torch import Tensor

from normkit.functional import batch_norm, layer_norm
from normkit.kernels.cpu.packing import MAX_TEMPLATES


def number_of_tensors() -> int:
    gc.collect()
    return sum(type(each) is Tensor for each in gc.get_objects())


def test_many_batch_sizes_leave_no_tensor_each() -> None:
    """Small tensors among activations hold the heap: 970 MB after 1,000 sizes."""
    before = number_of_tensors()
    for n in range(1001, 1201):
        x = torch.randn(n, 3, requires_grad=True)
        batch_norm(x, None, None, training=True).sum().backward()
        layer_norm(x, (3,)).sum().backward()
    del x
    assert number_of_tensors() - before <= MAX_TEMPLATES


def test_a_call_without_a_template_gives_the_same() -> None:
    x = torch.randn(3001, 8)  # of more rows than a template has
    y = layer_norm(x, (8,))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
    for _ in range(2):
        grad = torch.randn_like(x)
        given = x.clone().requires_grad_()
        layer_norm(given, (8,)).backward(grad)
        wanted = x.clone().requires_grad_()
        torch.nn.functional.layer_norm(wanted, (8,)).backward(grad)
        torch.testing.assert_close(given.grad, wanted.grad, rtol=1e-3, atol=1e-3)
