"""Networks with random statistics, and the one assertion that all fold tests make."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from normkit.fold import FoldLedger, fold
from normkit.modeling.pytree import map_tensors, tensors_in

NORMS = (nn.modules.batchnorm._BatchNorm,)


def randomised(model: nn.Module, *, signs: bool = True) -> nn.Module:
    """`model` in float64 and eval mode, every vector of every batch norm drawn.

    About a third of the weights are negative, or none without `signs`: with the
    statistics of a fresh layer a wrong fold would not show.
    """
    for module in model.modules():
        if isinstance(module, NORMS):
            randomise(module, signs=signs)
    return model.double().eval()


@torch.no_grad()
def randomise(norm: nn.Module, *, signs: bool = True) -> None:
    """Draw statistics and affine of one batch norm."""
    if norm.running_var is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3.0)
    if norm.weight is not None:
        norm.weight.uniform_(0.4, 1.6)
        if signs:
            flip = torch.rand_like(norm.weight) < 0.35
            flip[:1] = True
            norm.weight[flip] *= -1
        if norm.bias is not None:
            norm.bias.normal_()


def answers(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """What a float64 copy of `model` answers, as a flat list."""
    if any(p.dtype != torch.float64 for p in model.parameters()):
        model = copy.deepcopy(model).double()
    inputs = map_tensors(example_inputs, torch.clone)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return list(tensors_in(model(**inputs)))
        return list(
            tensors_in(model(*(inputs if type(inputs) is tuple else (inputs,))))
        )


def assert_same(model: nn.Module, folded: nn.Module, *inputs: Any) -> None:
    """Both answer the same, to 1e-9 of the size of the answer, on each input."""
    for given in inputs:
        for one, other in zip(
            answers(model, given), answers(folded, given), strict=True
        ):
            gap = (one - other).abs().max() / one.abs().max().clamp(min=1.0)
            assert gap <= 1e-9, f"the folded model differs by {gap:.1e}"


def check(
    model: nn.Module,
    example_inputs: Any,
    *,
    gone: set[str] | None = None,
    left: dict[str, str] | None = None,
) -> tuple[nn.Module, FoldLedger]:
    """Fold `model`; it must stay the same function, and the ledger say what is asked.

    Args:
        model: In float64, see `randomised`.
        example_inputs: What it is called with.
        gone: The names that must be folded; all of them if neither is given.
        left: The names that must stay, each with a part of its reason.
    """
    before = copy.deepcopy(model.state_dict())
    folded, ledger = fold(model, example_inputs)
    other = map_tensors(
        example_inputs,
        lambda t: torch.randn_like(t) if t.is_floating_point() else t,
    )
    assert_same(model, folded, example_inputs, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"fold changed {name} of the original"
    assert type(folded) is type(model)
    found = {entry.name for entry in ledger.folded}
    names = {entry.name for entry in ledger.entries}
    left = left or {}
    expected = names - set(left) if gone is None else gone
    assert found == expected, f"\n{ledger}"
    reasons = {entry.name: entry.reason for entry in ledger.left}
    for name, part in left.items():
        assert part in reasons[name], f"\n{ledger}"
    for entry in ledger.entries:
        assert entry.folded != bool(entry.reason)
        assert (entry.difference is None) == (not entry.how)
    modules = dict(folded.named_modules())
    for name in found:
        assert not isinstance(modules[name], NORMS)
    assert ledger.max_difference <= 1e-9
    return folded, ledger
