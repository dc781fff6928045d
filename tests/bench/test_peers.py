"""Other libraries compute the same, are named with their version, or as absent."""

import pytest
import torch

from normkit.bench import call_grid
from normkit.bench.call_cases import CallCase
from normkit.bench.call_grid import PEER_CASES, calls
from normkit.bench.call_tables import to_markdown, to_text
from normkit.bench.calls import MODES, CallCell, Calls
from normkit.bench.peers import PEERS, Given, Peer
from normkit.bench.timing import Timing

SERVED = [
    pytest.param(peer, case, mode, id=f"{peer.name}, {case.row}, {mode}")
    for peer in PEERS
    for case in PEER_CASES
    for mode in MODES
    if case.size == "16k"
    and peer.version() is not None
    and peer.serves(case, mode == "training")
]


@pytest.mark.parametrize(("peer", "case", "mode"), SERVED)
def test_a_peer_computes_what_torch_does(peer: Peer, case: CallCase, mode: str) -> None:
    training = mode == "training"
    _, layer = case.layers(training=training)
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.copy_(torch.linspace(0.5, 2.0, len(buffer)))
    inputs = case.inputs()
    x, dy = inputs["x"], inputs["dy"]
    given = Given(case, training, 1, layer, x, dy)
    found = peer.tensors(peer.call(given)())
    own = x.clone().requires_grad_(training)
    wanted = [own, *layer.parameters()]
    y = layer(own)
    expected = list(torch.autograd.grad(y, wanted, dy)) if training else [y.detach()]
    if peer.name == "JAX" and case.layout == "channels_last":
        expected[0] = expected[0].movedim(1, -1)
    for a, b in zip(found, expected, strict=True):
        assert (a.reshape(b.shape) - b).norm() / b.norm() < 1e-5


def test_torch_itself_has_a_peer() -> None:
    assert any("oneDNN" in str(served.id) for served in SERVED)


def test_installed_peers_get_rows_and_absent_ones_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CallCase("layer", "rows", "plain", "16k")

    def call(given: Given):
        assert not given.x.requires_grad
        return given.x.clone

    def serves(of: CallCase, training: bool) -> bool:
        return not training and of.layer == "layer"

    here = Peer("Here", lambda: "1.2", serves, call, list)
    away = Peer("Away", lambda: None, serves, call, list)
    monkeypatch.setattr(call_grid, "PEERS", (here, away))
    monkeypatch.setattr(call_grid, "PEER_CASES", (case,))
    found = calls([case], threads=(1,), budget=0.2, with_peers=True)
    assert [(c.case, c.mode) for c in found.peers] == [(case, "eval")]
    assert set(found.peers[0].passes[0]) == {"ours", "torch", "clone", "Here 1.2"}
    assert found.absent == ("Away",)
    assert Calls.from_json(found.to_json()) == found
    text = to_markdown(found)
    ratio = found.peers[0].time_of("Here 1.2")
    assert f"| layer, eval, 1 thread: Here 1.2 | {ratio:.2f}" in text
    assert "Not installed, so not measured: Away." in text
    assert "Away is not installed" in to_text(found)


def test_a_peer_that_waited_is_unknown_and_a_calm_one_beside_it_is_not() -> None:
    def timing(wall: float, waiting: float) -> Timing:
        return Timing(wall, wall, wall, wall, 9, waiting)

    measured = {"ours": timing(1, 0), "torch": timing(2, 0), "clone": timing(1, 0)}
    measured |= {"Calm 1": timing(3, 0), "Busy 2": timing(60, 0.5)}
    case = CallCase("layer", "rows", "plain", "16k")
    cell = CallCell(case, "eval", 2, (measured,))
    assert not cell.is_disturbed
    assert cell.is_unknown("Busy 2")
    assert cell.time_of("Calm 1") == 3
    text = to_markdown(Calls((cell,), (), {}, (cell,)))
    assert "| layer, eval, 2 threads: Calm 1 | 3.00 |" in text
    assert "| layer, eval, 2 threads: Busy 2 | ~ |" in text


def test_without_the_option_no_peer_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Peer("X", lambda: pytest.fail("asked"), *[lambda *_: None] * 3)
    monkeypatch.setattr(call_grid, "PEERS", (asked,))
    found = calls([CallCase("layer", "rows", "plain", "4k")], threads=(1,), budget=0.05)
    assert found.peers == found.absent == ()
