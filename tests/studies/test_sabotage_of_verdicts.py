"""A broken layer flips the verdict of the study that claims to test it."""

import pytest
import torch

import normkit
from normkit.functional import batch, normalize
from normkit.studies import find, replicas
from normkit.studies.study import Trial
from normkit.studies.verdict import Verdict


def verdicts(study_id: str, **settings) -> dict[str, Verdict]:
    """The verdicts of one seed at small settings."""
    study = find(study_id)
    torch.manual_seed(trial_seed := 0)
    result = study.measure(Trial(trial_seed), **settings)
    return {v.claim: v for v in study.judge([result])}


FIGURE_ONE = {"data": "digits", "steps": 120, "batch": 60, "looks": 8, "hidden": 40}


def part(verdict: Verdict, start: str) -> str:
    (word,) = [p.word for p in verdict.parts if p.text.startswith(start) and p.word]
    return word


def without_rescaling(x, dims, weight=None, bias=None, eps=1e-5):
    _, measured = normalize(x, dims, weight, bias, eps)
    return (x - x.mean(dims, keepdim=True)) * weight + bias, measured


def detached(x, dims, weight=None, bias=None, eps=1e-5):
    _, measured = normalize(x, dims, weight, bias, eps)
    with torch.no_grad():
        mean = x.mean(dims, keepdim=True)
        inv_std = (x.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    return (x - mean) * inv_std * weight + bias, measured


def test_figure_one_needs_the_division_by_the_standard_deviation(monkeypatch) -> None:
    healthy = verdicts("S01", **FIGURE_ONE)
    monkeypatch.setattr(replicas, "normalize", without_rescaling)
    broken = verdicts("S01", **FIGURE_ONE)
    faster = "steps to 95%"
    assert part(healthy["C18"], faster) in ("supported", "partly")
    assert part(broken["C18"], faster) not in ("supported", "partly")


def test_a_detached_mean_is_seen_as_a_bias_that_runs_away(monkeypatch) -> None:
    def farthest_bias(steps: int = 60) -> float:
        """How far training moves the biases that batch norm takes out again."""
        recipe = replicas.Recipe((20, 30, 30, 4), "sigmoid", "batch")
        draw = torch.Generator().manual_seed(1)
        nets = replicas.Replicas(recipe, torch.tensor([0.3]), draw)
        for _ in range(steps):
            x = torch.randn(32, 20, generator=draw)
            nets.step(x, x[:, :4].argmax(1), torch.tensor([0.5]))
        return max(b.abs().max().item() for b in nets.biases[:-1])

    assert farthest_bias() < 1e-4
    monkeypatch.setattr(replicas, "normalize", detached)
    assert farthest_bias() > 0.05


def test_population_statistics_need_the_right_momentum(monkeypatch) -> None:
    settings = {"sizes": (32,), "epochs": 1, "width": 4, "rate": 0.05}
    healthy = verdicts("S07", **settings)
    honest = batch.update_running

    def swapped(mean, var, moments, rate, **options):
        rate = None if rate is None else 1 - rate
        return honest(mean, var, moments, rate, **options)

    monkeypatch.setattr(batch, "update_running", swapped)
    broken = verdicts("S07", **settings)
    left = "share of the start left"
    assert part(healthy["C29"], left) == "refuted"
    assert part(broken["C29"], left) == "supported"
    assert healthy["C66"].word == broken["C66"].word == "refuted"


@pytest.mark.parametrize("fault", ["unbiased", "axis"])
def test_definitions_are_told_from_their_neighbours(monkeypatch, fault) -> None:
    from normkit.moments import Moments

    settings = {"steps": 2, "width": 4}
    with normkit.backend("reference"):
        assert verdicts("S12", **settings)["C13"].word == "supported"
    if fault == "unbiased":
        wrong = property(lambda self: self.m2 / (self.count.to(self.m2.dtype) - 1))
    else:
        wrong = property(
            lambda self: (self.m2 / self.count.to(self.m2.dtype)).mean() + 0 * self.m2
        )
    monkeypatch.setattr(Moments, "var", wrong)
    # The fault is in the reference's arithmetic; the C++ kernels have their own.
    with normkit.backend("reference"):
        assert verdicts("S12", **settings)["C13"].word == "refuted"
