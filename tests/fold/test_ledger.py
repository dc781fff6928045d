"""The ledger: what it counts and how it speaks."""

import json

import torch
from torch import nn

import normkit
from fold.randomised import check, randomised
from fold.test_traps import IMAGE, conv, normal


def ledger():
    net = nn.Sequential(
        conv(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.GELU(), nn.BatchNorm2d(6)
    )
    return check(randomised(net), normal(*IMAGE), gone={"1"})[1]


def test_it_counts_what_the_model_no_longer_holds_and_does():
    # Four vectors of 6 go, a bias of 6 comes; (2, 6, 3, 4) values are not scaled.
    assert ledger().parameters_saved == 3 * 6
    assert ledger().multiplications_saved == 2 * 6 * 3 * 4


def test_its_text_names_each_batch_norm_with_how_or_why():
    text = ledger().to_text()
    assert text.startswith("1 of 2 batch norms folded")
    assert "1  folded  into '0' before it" in text
    assert "3  left    " in text
    assert "gelu in '2'" in text
    assert "largest output difference" in text


def test_its_json_holds_every_field():
    data = json.loads(ledger().to_json())
    assert data["folded"] == data["left"] == 1
    assert data["entries"][0]["where"] == ["0.weight", "0.bias"]
    assert data["entries"][1]["reason"]
    assert data["max_difference"] < 1e-9


def test_a_model_without_batch_norm_has_an_empty_ledger():
    _, empty = normkit.fold(nn.Linear(3, 3), torch.randn(2, 3))
    assert empty.entries == ()
    assert empty.to_text() == "no batch norm in this model"


def test_a_batch_norm_that_stays_is_drawn_with_what_stands_in_its_way():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return torch.relu(self.bn(y)) + torch.sigmoid(y)

    _, ledger = normkit.fold(randomised(Net()), torch.randn(2, 3, 4, 4).double())
    (entry,) = ledger.left
    assert entry.picture.splitlines() == [
        "the model's input",
        "└─ 'conv'".rjust(len("   └─ 'conv'")),
        "      └─ 'bn'   ← stays",
        "         └─ relu in the model's forward   ✗",
        "      └─ sigmoid in the model's forward   ✗",
    ]
    assert entry.picture.splitlines()[2] in ledger.to_text(pictures=True)
    assert "← stays" not in ledger.to_text()


def test_it_shows_itself_in_a_shell_and_in_a_notebook():
    shown = ledger()
    assert repr(shown) == str(shown) == shown.to_text()
    html = shown._repr_html_()
    assert html.count("<tr>") == 1 + 2
    assert "<td>reduced</td>" not in html
    assert "<td>into &#x27;0&#x27; before it</td>" in html
    assert [row["state"] for row in shown.to_rows()] == ["folded", "left"]
