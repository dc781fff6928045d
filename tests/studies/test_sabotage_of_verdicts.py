"""A broken layer flips the verdict of the study that claims to test it."""

import copy
import functools

import pytest
import torch

import normkit
from normkit.functional import batch_norms, normalize
from normkit.nn import BatchNorm2d, batch_norm_layer
from normkit.studies import find, replicas, s08_fold, s19_figure_two
from normkit.studies.study import Trial
from normkit.studies.verdict import Verdict

SETTINGS = {
    "S01": {"data": "digits", "steps": 240, "batch": 60, "looks": 12, "hidden": 40},
    "S03": {"steps": 40, "hidden": (24, 24, 24), "layer_draws": 4},
    "S07": {
        "data": "digits",
        "train_images": 0,
        "sizes": (32,),
        "steps": 20,
        "width": 4,
        "rate": 0.05,
    },
    "S08": {"steps": 20, "width": 4, "rounds": 3},
    "S12": {"steps": 2, "width": 4},
    "S19": {
        "data": "digits",
        "train_images": 0,
        "steps": 40,
        "width": 8,
        "looks": 8,
    },
    "S20": {"data": "digits", "steps": 60, "hidden": 30, "looks": 3},
}


def verdicts(study_id: str) -> dict[str, Verdict]:
    """The verdicts of one seed at small settings."""
    study = find(study_id)
    torch.manual_seed(trial_seed := 0)
    result = study.measure(Trial(trial_seed), **SETTINGS[study_id])
    return {v.claim: v for v in study.evaluate([result])}


# Of the sound layers, once; a test calls it before it plants its fault.
healthy = functools.cache(verdicts)


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


# The words of an effect that is seen.
THERE = ("supported", "smaller than stated")

FAULTS = pytest.mark.parametrize("fault", [without_rescaling, detached])


@FAULTS
def test_figure_one_is_no_longer_faster(monkeypatch, fault) -> None:
    assert part(healthy("S01")["C18"], "steps to 95 %, both") in THERE
    monkeypatch.setattr(replicas, "normalize", fault)
    assert part(verdicts("S01")["C18"], "steps to 95 %, both") not in THERE


@FAULTS
def test_large_rates_no_longer_work(monkeypatch, fault) -> None:
    assert healthy("S03")["C20"].word in THERE
    monkeypatch.setattr(replicas, "normalize", fault)
    assert verdicts("S03")["C20"].word not in THERE


def test_gradients_of_the_first_layer_are_small_without_rescaling(monkeypatch) -> None:
    assert healthy("S20")["C51"].word == "supported"
    monkeypatch.setattr(replicas, "normalize", without_rescaling)
    assert verdicts("S20")["C51"].word == "refuted"


class WithoutRescaling(BatchNorm2d):
    """Takes out the mean, and leaves the spread."""

    def forward(self, x):
        super().forward(x)  # moves the running statistics
        mean = x.mean((0, 2, 3)) if self.training else self.running_mean
        columns = [v.view(1, -1, 1, 1) for v in (mean, self.weight, self.bias)]
        return (x - columns[0]) * columns[1] + columns[2]


@pytest.mark.slow
def test_figures_two_and_three_need_the_division(monkeypatch) -> None:
    sound = healthy("S19")
    assert part(sound["C33"], "best, BN") == "supported"
    monkeypatch.setattr(s19_figure_two, "BatchNorm2d", WithoutRescaling)
    broken = verdicts("S19")
    assert part(broken["C33"], "best, BN") != "supported"


def test_a_fold_that_forgets_the_mean_is_seen(monkeypatch) -> None:
    honest = s08_fold.fold

    def forgetful(model, x):
        other = copy.deepcopy(model)
        for module in other.modules():
            if isinstance(module, BatchNorm2d):
                module.running_mean.zero_()
        return honest(other, x)

    assert healthy("S08")["C64"].word == "supported"
    monkeypatch.setattr(s08_fold, "fold", forgetful)
    assert verdicts("S08")["C64"].word != "supported"


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
    sound = healthy("S07")
    honest = batch_norms.Running

    def swapped(mean, var, rate=None, *others):
        return honest(mean, var, rate and 1 - rate, *others)

    for module in (batch_norms, batch_norm_layer):
        monkeypatch.setattr(module, "Running", swapped)
    broken = verdicts("S07")
    left = "relative bias after 10 batches"
    assert part(sound["C29"], left) == "refuted"
    assert part(broken["C29"], left) == "supported"
    assert sound["C66"].word == broken["C66"].word == "refuted"


@pytest.mark.parametrize("fault", ["unbiased", "axis"])
def test_definitions_are_told_from_their_neighbours(monkeypatch, fault) -> None:
    from normkit.moments import Moments

    with normkit.backend("reference"):
        assert verdicts("S12")["C13"].word == "supported"
    if fault == "unbiased":
        wrong = property(lambda self: self.m2 / (self.count.to(self.m2.dtype) - 1))
    else:
        wrong = property(
            lambda self: (self.m2 / self.count.to(self.m2.dtype)).mean() + 0 * self.m2
        )
    monkeypatch.setattr(Moments, "var", wrong)
    # The fault is in the reference's arithmetic; the C++ kernels have their own.
    with normkit.backend("reference"):
        assert verdicts("S12")["C13"].word == "refuted"
