"""Which backend runs is a choice with reasons, never a silent fallback."""

import pytest
import torch

import normkit
from normkit.errors import ArgumentError, KernelError
from normkit.kernels import available_backends, choose
from normkit.kernels.choose import _BACKENDS


class Unable:
    """A backend that cannot do anything."""

    name = "unable"

    def reasons_against(self, x, dims):
        return ["it is a test"]


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_BACKENDS, "unable", Unable())


def test_the_reference_is_always_there() -> None:
    assert available_backends()[-1] == "reference"


def test_a_backend_asked_for_by_name_runs() -> None:
    with normkit.backend("reference"):
        assert choose(torch.zeros(2, 3), (0,)).name == "reference"


def test_a_block_restores_what_was_chosen_before(unable: None) -> None:
    with normkit.backend("reference"):
        with pytest.raises(KernelError), normkit.backend("unable"):
            choose(torch.zeros(2, 3), (0,))
        assert choose(torch.zeros(2, 3), (0,)).name == "reference"


def test_a_backend_asked_for_never_falls_back(unable: None) -> None:
    with normkit.backend("unable"), pytest.raises(KernelError, match="it is a test"):
        choose(torch.zeros(2, 3), (0,))


def test_the_refusal_names_who_can(unable: None) -> None:
    with normkit.backend("unable"), pytest.raises(KernelError, match="'reference'"):
        normkit.functional.batch_norm(torch.randn(4, 3), None, None, training=True)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ArgumentError, match="'reference'"), normkit.backend("cuda"):
        pass


def test_explain_says_who_runs_and_why_not_the_others(unable: None) -> None:
    explanation = normkit.explain(torch.zeros(2, 3, 4))
    assert explanation.chosen != "unable"
    assert "unable: it is a test" in explanation.to_text()
    assert explanation.to_json()["view"] == {"kind": "channels", "sizes": [2, 3, 4]}
