"""The grid of calls measures the same work twice, and its totals are arithmetic."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

import normkit_cli as cli
from normkit.bench import call_cases
from normkit.bench.call_cases import (
    CALL_CASES,
    FEW_SIZES,
    FORMS,
    KINDS,
    SIZES,
    CallCase,
    ours,
    theirs,
)
from normkit.bench.call_cost import CallCost
from normkit.bench.call_figure import draw
from normkit.bench.call_grid import _Grid, calls, contestants_of, resumed
from normkit.bench.call_tables import sentence, to_markdown, to_text, totals
from normkit.bench.calls import MODES, CallCell, Calls
from normkit.bench.timing import Timing
from normkit.errors import ArgumentError

ROWS = {case.row: case for case in CALL_CASES if case.size == FEW_SIZES[0]}


def timing(micros: float, wall: float | None = None) -> Timing:
    wall = micros if wall is None else wall
    return Timing(*(1e-6 * t for t in (micros / 2, micros, wall / 2, wall)), 9)


def cell(
    ratio: float,
    *,
    size: str = "200k",
    mode: str = "training",
    threads: int = 1,
    form: str = "plain",
) -> CallCell:
    """A made-up cell where ours takes 100 µs and a clone 10."""
    times = {"ours": 100.0, "torch": 100.0 * ratio, "clone": 10.0}
    measured = {name: timing(time) for name, time in times.items()}
    case = CallCase("layer", "rows", form, size)
    return CallCell(case, mode, threads, (measured,))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", ROWS)
def test_both_contestants_compute_the_same(row: str, mode: str) -> None:
    """Values, gradients, and running statistics, which a mask moves, too."""
    case, training = ROWS[row], mode == "training"
    given = case.inputs()
    inputs = [given[name] for name in ("x", "residual") if name in given]
    results = []
    layers = case.layers(training=training)
    for tensor in inputs:
        tensor.requires_grad_(training)
    for layer in layers:
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.copy_(torch.linspace(0.5, 2.0, len(buffer)))
    for layer, call in zip(
        layers,
        (ours(layers[0], given), theirs(case, layers[1], given)),
        strict=True,
    ):
        found = [y := call()]
        if training:
            wanted = [*inputs, *layer.parameters()]
            found += torch.autograd.grad(y, wanted, given["dy"])
        found += [t for n, t in layer.named_buffers() if n.startswith("running")]
        results.append(found)
    # A rounding of a half counts where sums cancel.
    loose = {"bfloat16": 0.05, "float16": 0.01, "float64": 1e-12}.get(case.form, 1e-5)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        distance = (a.double() - b.double()).norm() / b.double().norm()
        assert distance < loose


def test_a_mask_leaves_out_some_positions_of_every_sample_but_not_all() -> None:
    for kind in KINDS:
        given = CallCase(*kind, "mask", "16k").inputs()
        share = given["mask"].expand_as(given["x"]).float().mean()
        assert 0.6 < share < 0.9


def test_sizes_are_what_they_are_called_and_no_layout_degenerates() -> None:
    scale = {"k": 1e3, "M": 1e6}
    for kind in KINDS:
        for size in SIZES:
            shape = CallCase(*kind, "plain", size).shape
            assert prod(shape) == pytest.approx(
                float(size[:-1]) * scale[size[-1]], rel=0.07
            )
            assert min(shape) > 1
    x = CallCase("batch", "channels_last", "plain", "4k").inputs()["x"]
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert not x.is_contiguous()


def test_the_grid_has_every_layer_at_every_size() -> None:
    assert len(set(CALL_CASES)) == len(CALL_CASES)
    plain = {c for c in CALL_CASES if c.form == "plain"}
    assert len(plain) == len(KINDS) * len(SIZES)
    assert {c.form for c in CALL_CASES} == set(FORMS)
    assert {c.size for c in CALL_CASES if c.form != "plain"} == set(FEW_SIZES)


def test_training_wants_every_gradient_and_eval_none() -> None:
    case = CallCase("batch", "NCHW", "add+relu", "4k")
    training, evaluation = (contestants_of(case, mode) for mode in MODES)
    for name in ("ours", "torch"):
        gradients = training[name]()
        assert isinstance(gradients, tuple)
        assert len(gradients) == 4  # input, residual, weight, bias
        evaluation[name]()
    clone = training["clone"]()
    assert isinstance(clone, torch.Tensor)
    assert clone.shape == case.shape
    assert not clone.requires_grad


def test_a_run_leaves_threads_and_generators_and_its_record_survives() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    cases = [CallCase("layer", "rows", "plain", "4k")]
    found = calls(cases, threads=(1, 2), budget=0.2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(c.threads, c.mode) for c in found.cells] == [
        (threads, mode) for threads in (1, 2) for mode in MODES
    ]
    assert all(len(c.passes) >= 3 for c in found.cells)
    text = found.to_json()
    assert Calls.from_json(text) == found
    entry = json.loads(text)["calls"][0]
    assert entry["ratio"] == round(found.cells[0].ratio, 4)
    assert entry["shape"] == [5, 768]


def test_a_ratio_is_of_cpu_time_with_one_thread_and_of_wall_time_with_two() -> None:
    measured = {
        "ours": timing(100, wall=50),
        "torch": timing(80, wall=100),
        "clone": timing(10, wall=10),
    }
    one = replace(cell(1.0), passes=(measured,))
    two = replace(one, threads=2)
    assert one.ratio == pytest.approx(0.8)
    assert two.ratio == pytest.approx(2.0)
    assert one.over("torch") == pytest.approx(20)
    assert two.over("torch") == pytest.approx(-50)
    assert two.over("clone") == pytest.approx(40)


def test_one_wild_pass_of_three_decides_nothing() -> None:
    passes = tuple(cell(ratio).passes[0] for ratio in (0.5, 9.0, 0.6))
    found = replace(cell(1.0), passes=passes)
    assert found.ratio == pytest.approx(0.6)
    assert found.over("torch") == pytest.approx(40)
    assert found.spread == pytest.approx(17)


def test_a_pass_whose_threads_waited_counts_only_without_any_other() -> None:
    calm = cell(0.5, threads=2).passes[0]
    waited = {
        name: replace(timing, waiting=0.5)
        for name, timing in cell(9.0, threads=2).passes[0].items()
    }
    found = replace(cell(1.0, threads=2), passes=(waited, calm, waited))
    assert found.ratios == pytest.approx((0.5,))
    assert found.over("torch") == pytest.approx(50)
    assert not found.is_disturbed
    only = replace(found, passes=(waited, waited))
    assert only.ratio == pytest.approx(9.0)
    assert only.is_disturbed
    record = Calls((found, only), (), {})
    assert totals(record.cells).cells == 1
    told = sentence(record)
    assert told.startswith("1 of 1 cells")
    assert told.endswith("1 more (~) were only measured disturbed.")
    text = to_markdown(replace(record, cells=(only,)))
    assert "| layer, training, 2 threads | ~ |" in text
    assert "9.00" not in text
    assert draw(record).count("<circle") == 1


def test_the_last_budget_goes_where_passes_differ_or_were_disturbed() -> None:
    steady = replace(cell(1.0, threads=2), passes=cell(1.0).passes * 3)
    wild = replace(steady, passes=tuple(cell(r).passes[0] for r in (1.0, 4.0, 1.0)))
    waited = {n: replace(t, waiting=0.5) for n, t in steady.passes[0].items()}
    disturbed = replace(steady, passes=(*steady.passes[:1], waited, waited))
    grid = _Grid([steady, wild, disturbed])
    assert max(range(3), key=grid._need) == 2
    grid.cells[2] = replace(disturbed, passes=(waited,) * 8)  # as often as allowed
    assert max(range(3), key=grid._need) == 1


def test_a_resumed_record_gets_passes_where_they_are_needed_and_keeps_its_own() -> None:
    cases = [CallCase("layer", "rows", "plain", "4k")]
    facts = calls(cases, threads=(1,), budget=0.05).environment
    steady = replace(cell(1.0), passes=cell(1.0).passes * 3)
    waited = {n: replace(t, waiting=0.5) for n, t in steady.passes[0].items()}
    disturbed = replace(cell(9.0, mode="eval"), passes=(waited,) * 3)
    record = Calls((steady, disturbed), (), facts)
    found = resumed(record, budget=0.2)
    assert found.cells[0] == steady
    assert found.cells[1].passes[:3] == disturbed.passes
    assert len(found.cells[1].passes) > 3
    other = replace(record, environment={**facts, "torch": "1.0"})
    with pytest.raises(ArgumentError, match=r"record has torch '1\.0', here it is"):
        resumed(other, budget=0.2)


def test_totals_count_losses_and_average_from_200k_values_up() -> None:
    cells = (
        cell(0.5, size="200k"),
        cell(2.0, size="6.4M", threads=2),
        cell(4.0, size="800k"),
        cell(0.25, size="130k"),
        cell(0.951, mode="eval"),
        cell(0.949, mode="eval", size="4k"),
    )
    found = totals(cells)
    assert (found.cells, found.losses, found.gains) == (6, 3, 2)
    assert found.least is cells[3]
    assert found.training == pytest.approx(4.0 ** (1 / 3))
    assert found.evaluation == pytest.approx(0.951)
    assert totals(cells[3:4]).training is None


def test_tables_mark_losses_and_name_the_least() -> None:
    found = Calls(
        (cell(0.5), cell(1.5, mode="eval"), cell(0.9, form="mask", threads=2)),
        (CallCost("LayerNorm", (8, 32), 50.0, 7.5, 160.0, 40.0),),
        {},
    )
    text = to_markdown(found)
    assert "| layer, training, 1 thread | 0.50▼ |" in text
    assert "| layer, eval, 1 thread | 1.50 |" in text
    assert "| layer, mask, training, 2 threads | 0.90▼ |" in text
    assert "| layer, training, 1 thread | +50 / +90 |" in text
    assert "| LayerNorm 8×32 | 7.5 | +42.5 | 40.0 | +120.0 |" in text
    told = sentence(found)
    assert told.startswith("2 of 3 cells are below 0.95 of torch's speed, 1 are above")
    assert "The least ratio is 0.50: layer, 200k values, training, 1 thread." in told
    assert "0.67 in training, 1.50 in eval" in told
    assert told in to_text(found)
    assert "0.50▼" in to_text(found)


def test_the_figure_draws_the_plain_cells_where_they_are() -> None:
    first, second = cell(0.5, size="4k"), cell(2.0, size="16k")
    alone = cell(1.0, size="6.4M")
    found = Calls((first, second, alone, cell(0.25, form="mask")), (), {})
    svg = draw(found)
    assert svg.count("<circle") == 3
    # That of the legend, and one: sizes between leave a gap.
    assert svg.count("<polyline") == 2
    # One octave is 22 pixels, and the lowest ratio drawn is 1/4.
    line = svg.split('class="line layer" points="')[2].split('"')[0]
    (_, low), (_, high) = (map(float, point.split(",")) for point in line.split())
    assert low - high == pytest.approx(44)
    assert "training, 1 thread" in svg
    assert "prefers-color-scheme: dark" in svg


def test_the_command_writes_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (CallCase("RMS", "rows", "plain", "16k"),)
    monkeypatch.setattr(call_cases, "CALL_CASES", few)
    record = tmp_path / "calls.json"
    command = ["bench", "calls", "--quick", "--budget", "0.01", "--threads", "1"]
    assert cli.main([*command, "--json", str(record)]) == 0
    found = Calls.from_json(record.read_text())
    assert found.threads == (1,)
    told = capsys.readouterr().out
    assert "RMS, 16k values, training, 1 thread" in told
    assert sentence(found) in told
    again = ["bench", "calls", "--resume", str(record), "--budget", "0.01"]
    assert cli.main([*again, "--json", str(record)]) == 0
    more = Calls.from_json(record.read_text())
    for old, new in zip(found.cells, more.cells, strict=True):
        assert new.passes[: len(old.passes)] == old.passes
    assert cli.main([*again, "--quick"]) == 2
    assert "leave out --quick" in capsys.readouterr().err
