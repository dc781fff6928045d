"""The bench measures what it says, and says what it measured."""

import itertools
import json

import pytest
import torch

from normkit.bench.speed import CASES, QUICK, SpeedCase, _inputs, _ours, _theirs, speed
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
    inputs = _inputs(case)
    dy = torch.randn_like(inputs[0])
    results = []
    for run in (_ours(case), _theirs(case)):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, dy)])
    # A rounding of bfloat16 before relu opens another gate; float32 hides nothing.
    loose = 0.1 if case.dtype == "bfloat16" else 1e-4
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert distance < loose


def test_contestants_take_turns_and_fast_ones_many_calls_each() -> None:
    order: list[str] = []
    timings = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.02
    )
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert changes >= 9
    assert len(order) > 100 * changes
    assert all(0 < t.wall <= t.wall_median for t in timings.values())
    assert timings["a"].turns >= 5


def test_the_result_names_machine_case_and_ratios() -> None:
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    found = speed((SpeedCase("batch", (8, 16), "rows"),), seconds=0.02)
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
    assert len(set(CASES)) == len(CASES)
