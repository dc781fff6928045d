"""The table of small layers names its cases and survives its file."""

import json

import torch
from torch import nn

import normkit
from normkit.bench.small import MODES, SMALL_CASES, Small, SmallCase, small


def test_every_layer_and_size_is_measured() -> None:
    kinds = {"BatchNorm1d", "BatchNorm2d", "LayerNorm", "RMSNorm", "GroupNorm"}
    assert {case.layer for case in SMALL_CASES} == kinds | {"InstanceNorm2d"}
    sizes = {case.shape for case in SMALL_CASES}
    assert sizes == {(8, 32), (64, 128), (256, 512), (8, 16, 8, 8)}


def test_both_layers_take_the_same_input_and_learn_the_same() -> None:
    for case in SMALL_CASES:
        ours, theirs = case.made_by(normkit.nn), case.made_by(nn)
        x = torch.randn(case.shape)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_record_says_what_ours_takes_more() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    found = small((SmallCase("LayerNorm", (8, 16)),), budget=0.05)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [cell.mode for cell in found.cells] == list(MODES)
    again = Small.from_json(found.to_json())
    assert again == found
    first = found.cells[0]
    more = 1e6 * (first.ours.cpu - first.torch.cpu)
    assert json.loads(found.to_json())["small"][0]["difference_us"] == more
    assert f"{more:+,.1f} (" in again.to_markdown()
    assert f"{more:+,.1f} " in again.to_text()
    near = sum(cell.difference <= 2 for cell in found.cells)
    assert f"{near} of 3 are within 2 µs" in found.summary()
