"""Small inputs are fused, too; otherwise they are normalized at once."""

import pytest


@pytest.fixture(autouse=True)
def small_inputs_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normkit.nn.deferral.MIN_VALUES", 0)
