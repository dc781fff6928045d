"""The two canonical views are found without a copy, and only where they are true."""

import pytest
import torch

from kernels.cases import CASES, EMPTY, Case
from normkit.views import view_of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_canonical_view_reduces_to_the_same_numbers(case: Case) -> None:
    x = case.draw(torch.float64)
    view = view_of(x, case.dims)
    if view.kind == "strided":
        pytest.skip("this layout has no canonical view")
    flat = view.canonical(x)
    assert flat.data_ptr() == x.data_ptr()
    expected = x.sum(case.dims).flatten()
    dims = (0, 2) if view.kind == "channels" else 1
    torch.testing.assert_close(flat.sum(dims), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nchw", "channels"),
        ("channels-last", "channels"),
        ("ndhwc", "channels"),
        ("matrix", "channels"),
        ("rows", "rows"),
        ("one-long-row", "rows"),
        ("groups", "rows"),
        ("gaps", "strided"),
        ("expanded", "strided"),
        ("rows-with-gaps", "strided"),
        ("transposed", "rows"),
    ],
)
def test_the_common_layouts_are_recognised(name: str, kind: str) -> None:
    case = next(c for c in CASES if c.name == name)
    assert view_of(case.draw(torch.float32), case.dims).kind == kind


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_an_empty_tensor_has_no_canonical_view(case: Case) -> None:
    assert view_of(case.draw(torch.float32), case.dims).kind == "strided"


def test_kept_dimensions_out_of_order_are_not_canonical() -> None:
    """Flattened statistics would be permuted against the flattened input."""
    x = torch.empty(3, 4, 5).transpose(0, 1)
    assert view_of(x, (2,)).kind == "strided"
