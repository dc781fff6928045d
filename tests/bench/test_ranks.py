"""The model of many ranks, and the measurement on a few."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from normkit.bench.marks import between, written
from normkit.bench.ranks import measure_ranks
from normkit.bench.ranks_model import RANKS, RESNET50, model
from normkit.errors import ArgumentError

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_page_holds_the_model() -> None:
    kept = between(PAGE.read_text(), "normkit bench ranks --model")
    assert kept == model().to_markdown().strip()


def test_the_page_holds_a_measurement() -> None:
    kept = between(PAGE.read_text(), "normkit bench ranks")
    # The two lines of the head; five rows each, and five of a ResNet-50 for 1 and 2.
    assert kept.count("\n") + 1 == 2 + 5 * (4 + 2)


def test_a_resnet50_has_53_batch_norms() -> None:
    torchvision = pytest.importorskip("torchvision", reason="the model to compare with")
    from torch import nn

    net = torchvision.models.resnet50(weights=None)
    channels = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(channels) == sorted(RESNET50)


def test_our_messages_do_not_grow_with_the_ranks_and_torchs_do() -> None:
    rows = {row.ranks: row for row in model().rows}
    assert list(rows) == list(RANKS)
    assert rows[1].normkit == rows[1].torch == rows[1].received == 0
    # 2 sums each way and a count, float64: 8·(4C + 1) bytes a layer.
    exact = sum(8 * (4 * c + 1) for c in RESNET50) / 1e6
    assert rows[2].received == rows[4096].received == pytest.approx(exact)
    assert rows[4096].torch_received > 1000 * rows[2].torch_received
    assert rows[4096].torch > 10 * rows[4096].normkit
    assert rows[4096].within_nodes == rows[8].within_nodes == rows[8].normkit
    for row in rows.values():
        assert row.siblings <= row.normkit
        assert row.ghosts_at_once <= row.ghosts <= row.normkit
    for small, large in itertools.pairwise(RANKS):
        assert rows[small].normkit <= rows[large].normkit


def test_two_processes_are_measured() -> None:
    found = measure_ranks((2,), seconds=0.2, shape=(4, 8, 5, 5))
    rows = {row.layer: row for row in found.rows}
    assert (rows["plain"].collectives, rows["plain"].sent) == (0, 0)
    assert (rows["sync"].collectives, rows["sync"].sent) == (2, 8 * (4 * 8 + 1))
    assert (rows["torch"].collectives, rows["torch"].sent) == (2, 4 * (4 * 8 + 1))
    whole = rows["sync × 53"]
    assert (whole.collectives, rows["messages × 53"].collectives) == (106, 106)
    assert (
        whole.sent == rows["messages × 53"].sent == 8 * sum(4 * c + 1 for c in RESNET50)
    )
    assert rows["plain × 53"].collectives == 0
    assert rows["messages"].sent == rows["sync"].sent
    assert rows["unsent"].collectives == rows["unsent × 53"].collectives == 0
    assert all(row.cpu > 0 and row.wall > 0 for row in found.rows)
    assert found.to_text().count("\n") == 1 + 2 * 5
    beyond = found.beyond_plain(2, "sync × 53")
    assert beyond == whole.cpu - rows["plain × 53"].cpu
    assert found.beyond_plain(2, "messages") == rows["messages"].cpu


def test_a_page_without_the_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing here\n")
    with pytest.raises(ArgumentError, match="has no line '<!-- begin: x -->'"):
        written(page, "x", "text")
