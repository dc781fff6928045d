"""The bench measures what it says, and says what it measured."""

import itertools
import json

import pytest
import torch

from normkit.bench.cases import (
    CASES,
    COMPILED,
    QUICK,
    SpeedCase,
    inputs_of,
    ours,
    theirs,
)
from normkit.bench.speed import Speed, speed
from normkit.bench.steps import StepCase, Steps, resnet, steps
from normkit.bench.timing import in_turns

SMALL = tuple(
    SpeedCase(case.layer, shape, case.layout, case.dtype, case.follows)
    for case in dict.fromkeys(
        SpeedCase(c.layer, (), c.layout, c.dtype, c.follows) for c in CASES
    )
    for shape in [(16, 64) if case.layout == "rows" else (2, 64, 3, 3)]
)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_both_contestants_compute_the_same(case: SpeedCase) -> None:
    inputs = inputs_of(case)
    dy = torch.randn_like(inputs[0])
    results = []
    for run in (ours(case), theirs(case)):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    # A rounding of bfloat16 before relu opens another gate; float32 hides nothing.
    loose = 0.1 if case.dtype == "bfloat16" else 1e-4
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        distance = (a.double() - b.double()).norm() / b.double().norm()
        assert distance < loose


def test_contestants_take_turns_and_fast_ones_many_calls_each() -> None:
    order: list[str] = []
    timings = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.02
    )
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert changes >= 5
    assert len(order) > 100 * changes
    assert all(0 < t.wall <= t.wall_median for t in timings.values())
    assert timings["a"].turns >= 3


def test_the_result_names_machine_case_and_ratios() -> None:
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    found = speed((SpeedCase("batch", (8, 16), "rows"),), budget=0.05)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    data = json.loads(found.to_json())
    assert data["environment"]["torch"] == torch.__version__
    assert [c["direction"] for c in data["cells"]] == ["forward", "backward"]
    first = found.cells[0]
    ratio = first.timings["torch"].cpu / first.timings["normkit"].cpu
    assert data["cells"][0]["speedup"] == first.speedup() == ratio
    assert "small inputs, forward" in data["speedup_over_torch"]
    assert "batch 8×16 rows float32" in found.to_markdown()
    is_loss = ratio < 0.995
    assert ("slower" in found.to_text().splitlines()[1]) == is_loss


def test_the_quick_grid_has_every_layer() -> None:
    assert {c.layer for c in QUICK} == {c.layer for c in CASES}
    assert set(COMPILED) <= {*QUICK, *CASES}
    assert len(set(CASES)) == len(CASES)


def test_a_record_survives_the_file() -> None:
    found = speed((SpeedCase("layer", (8, 16), "rows"),), budget=0.05)
    again = Speed.from_json(found.to_json())
    assert again == found
    assert again.to_markdown() == found.to_markdown()


@pytest.mark.parametrize(("name", "millions"), [("resnet18", 11.7), ("resnet50", 25.6)])
def test_the_networks_are_the_known_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = resnet(name)
    total = sum(p.numel() for p in model.parameters())
    assert round(total / 1e6, 1) == millions


@pytest.mark.slow
def test_a_training_step_keeps_less_and_says_so() -> None:
    case = StepCase("resnet18", 4, 160, "nhwc")
    found = steps([case], threads=[1], budget=1.0)
    again = Steps.from_json(found.to_json())
    assert again == found
    kept = {step.contestant: step.kept / step.torch_kept for step in found.steps}
    assert kept["normkit"] < 1.01
    assert kept["not fused"] < 1.01
    assert kept["recompute"] < 0.85
    assert kept["int8"] < 0.65
    assert "resnet18 4×3×160×160 nhwc" in found.to_markdown()
