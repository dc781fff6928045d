"""Two models compared: the verdict, and the words for what cannot be compared."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.errors import ArgumentError, FoldError


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight, 1.0)
            nn.init.normal_(module.bias)
    return model.eval()


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_fold_is_the_same_function_and_says_on_what() -> None:
    model = net()
    folded, _ = normkit.fold(model, X)
    verdict = normkit.verify(model, folded, X)
    assert verdict
    assert verdict.equal
    assert verdict.max_difference < 1e-6  # its weights are rounded to float32
    assert [each.inputs for each in verdict.comparisons] == [
        "the example inputs",
        "random ones",
        "random ones of another batch and spatial size",
    ]
    assert "the same function" in verdict.to_text()
    # What was folded away has no equal; what is left has.
    layers = {layer.name: layer for layer in verdict.layers}
    assert not layers["0"].found_at
    assert layers["1"].found_at
    assert layers["2"].found_at == "2"


@pytest.mark.parametrize(("layer", "place"), [("3", "'3'"), ("8", "'8'"), ("4", "'4'")])
def test_a_changed_parameter_is_found_at_its_layer(layer: str, place: str) -> None:
    model, other = net(), net()
    with torch.no_grad():
        other.get_submodule(layer).bias[0] += 1e-3
    verdict = normkit.verify(model, other, X)
    assert not verdict
    assert verdict.parting.place == place
    assert 1e-7 < verdict.max_difference < 1


def test_models_and_random_state_are_untouched() -> None:
    model, other = net(), net()
    other.train()
    before = [copy.deepcopy(m.state_dict()) for m in (model, other)]
    state = torch.get_rng_state()
    normkit.verify(model, other, X)
    assert torch.equal(state, torch.get_rng_state())
    assert other.training
    for old, new in zip(before, (model, other), strict=True):
        for name, tensor in new.state_dict().items():
            assert torch.equal(old[name], tensor)


def test_a_difference_on_another_size_alone_is_found() -> None:
    class Sized(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) if x.shape[-1] == self.size else torch.tanh(x)

    verdict = normkit.verify(Sized(16), Sized(-1), torch.randn(2, 3, 16, 16))
    assert not verdict
    assert verdict.comparisons[0].difference > 1e-3
    same_there = normkit.verify(nn.ReLU(), Sized(16), torch.randn(2, 3, 16, 16))
    assert same_there.comparisons[0].difference == 0
    assert not same_there
    assert "another" in next(
        c.inputs for c in same_there.comparisons if c.difference > 0
    )


def test_the_place_is_on_the_branch_that_differs() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.left(x)) + torch.tanh(self.right(x)))

    torch.manual_seed(0)
    model = Branches()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.left.weight *= 1.01
    verdict = normkit.verify(model, other, torch.randn(8, 4))
    # 'right' runs later and agrees; it must not hide the earlier place.
    assert verdict.parting.place == "'left'"
    assert "'right'" not in verdict.parting.region_a


def test_another_number_of_outputs_is_no_crash() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu(), x.tanh()

    verdict = normkit.verify(nn.ReLU(), Two(), torch.randn(2, 3))
    assert not verdict
    assert "a returns 1 tensors, b 2" in verdict.to_text()


def test_a_second_model_that_fails_is_a_verdict_and_a_first_is_an_error() -> None:
    fails = nn.Linear(7, 4)
    verdict = normkit.verify(nn.ReLU(), fails, torch.randn(2, 3))
    assert not verdict
    assert "b, the Linear, fails where a runs" in verdict.to_text()
    with pytest.raises(ArgumentError, match="a, the Linear, fails on example_inputs"):
        normkit.verify(fails, nn.ReLU(), torch.randn(2, 3))


def test_what_is_no_model_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no example_inputs"):
        normkit.verify(nn.ReLU(), nn.ReLU())
    with pytest.raises(ArgumentError, match=r"must be a torch\.nn\.Module"):
        normkit.verify(nn.ReLU(), {"weight": X}, X)
    with pytest.raises(FoldError, match="there is no file"):
        normkit.verify(nn.ReLU(), tmp_path / "none.onnx", X)


def test_the_tolerance_decides() -> None:
    model, other = net(), net()
    with torch.no_grad():
        other[8].bias[0] += 1e-4
    assert not normkit.verify(model, other, X)
    assert normkit.verify(model, other, X, tolerance=1e-2)


def test_text_json_rows_and_page_hold_the_parting(tmp_path: Path) -> None:
    model, other = net(), net()
    with torch.no_grad():
        other[3].bias += 1.0
    verdict = normkit.verify(model, other, X)
    assert "they part at '3'" in str(verdict)
    told = json.loads(verdict.to_json())
    assert told["equal"] is False
    assert told["parting"]["pair"]["name"] == "3"
    assert len(verdict.to_rows()) == len(verdict.layers) == 9
    page = verdict.to_html(tmp_path / "page.html")
    assert "Where they part" in page
    assert (tmp_path / "page.html").read_text() == page


def test_an_unfounded_number_is_no_json_error() -> None:
    verdict = normkit.verify(nn.ReLU(), nn.Linear(7, 4), torch.randn(2, 3))
    assert json.loads(verdict.to_json())["max_difference"] == "inf"


def test_an_exported_program_is_a_side() -> None:
    model = net()
    program = torch.export.export(model, (X,))
    assert normkit.verify(model, program, X)
    other = net()
    with torch.no_grad():
        other[3].weight *= 1.001
    assert not normkit.verify(model, torch.export.export(other, (X,)), X)


def test_random_numbers_are_the_same_in_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    assert normkit.verify(model, copy.deepcopy(model), torch.randn(8, 4))


def test_zeros_do_not_pass_for_agreement() -> None:
    # Both relus are dead; the layer before them differs all the same.
    dead = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        dead[0].bias -= 100
        dead[2].bias += 100
    other = copy.deepcopy(dead)
    with torch.no_grad():
        other[2].bias += 1
    verdict = normkit.verify(dead, other, torch.randn(8, 4))
    assert verdict.parting.place == "'2'"
