"""The checks as functions: statistics made by hand, on both sides of each threshold."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from doctor.models import moments_of
from normkit.doctor import Finding, Statistics, checks
from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.checks.distance import distance
from normkit.doctor.checks.thresholds import above, below
from normkit.doctor.finding import by_cause, plain
from normkit.doctor.measurements import (
    Evaluation,
    LayerStatistics,
    NormStatistics,
    TrainingStatistics,
    WeightStatistics,
)
from normkit.moments import moments

NAN = math.nan


def stream(
    mean: float = 0.0, var: float = 1.0, batches: int = 20, size: int = 50
) -> ChannelStatistics:
    """A stream of two channels whose mean and unbiased variance are as given."""
    x = torch.randn(batches, size, 2, dtype=torch.float64)
    flat = x.flatten(0, 1)
    flat -= flat.mean(0)
    flat *= math.sqrt(var) / flat.std(0)
    flat += mean
    parts = [moments(part, 0) for part in x]
    seen = ChannelStatistics.of_batch(parts[0], parts[0])
    for part in parts[1:]:
        seen = seen.merge(ChannelStatistics.of_batch(part, part))
    return seen


def norm(**changes: Any) -> NormStatistics:
    healthy = NormStatistics(
        momentum=0.1,
        eps=0.0,
        tracked=1000,
        frozen=False,
        running_mean=torch.zeros(2, dtype=torch.float64),
        running_var=torch.ones(2, dtype=torch.float64),
        in_training=stream(),
    )
    return replace(healthy, **changes)


def of_norm(**changes: Any) -> Statistics:
    layer = LayerStatistics("bn", "BatchNorm1d", "norm", norm=norm(**changes))
    return Statistics((layer,))


def reading(statistics: Statistics, id_: str) -> Finding:
    (found,) = checks.run(statistics, [id_])
    return found


def severity(statistics: Statistics, id_: str) -> str:
    return reading(statistics, id_).severity


@pytest.mark.parametrize(
    ("mean", "expected"), [(0.24, "clear"), (0.26, "warning"), (0.51, "error")]
)
def test_d01_holds_the_mean_to_its_thresholds(mean: float, expected: str) -> None:
    found = reading(of_norm(in_training=stream(mean)), "D01")
    assert found.severity == expected
    assert found.details["d_mean"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("mean", "log_ratio", "expected"),
    [
        (0.09, 0.0, "clear"),
        (0.11, 0.0, "warning"),
        (0.0, 0.14, "clear"),
        (0.0, 0.16, "warning"),
        (0.0, -0.16, "warning"),
    ],
)
def test_d31_holds_averaged_weights_to_thresholds_of_their_own(
    mean: float, log_ratio: float, expected: str
) -> None:
    seen = stream(mean, math.exp(log_ratio), batches=40)
    averaged = replace(of_norm(in_training=seen), is_averaged=True)
    assert severity(averaged, "D31") == expected
    assert severity(averaged, "D01") == "clear"


@pytest.mark.parametrize(
    ("log_ratio", "expected"),
    [(0.34, "clear"), (0.36, "warning"), (1.01, "error"), (-1.01, "error")],
)
def test_d01_holds_the_variance_to_its_thresholds(
    log_ratio: float, expected: str
) -> None:
    found = reading(of_norm(in_training=stream(var=math.exp(log_ratio))), "D01")
    assert found.severity == expected
    assert found.details["d_var"] == pytest.approx(abs(log_ratio))


def test_d01_opposite_errors_of_two_channels_do_not_cancel() -> None:
    running = torch.tensor([math.e**2, math.e**-2], dtype=torch.float64)
    assert reading(of_norm(running_var=running), "D01").value == pytest.approx(2)


def test_d01_a_channel_without_variance_is_measured_against_eps() -> None:
    x = torch.ones(100, 2, dtype=torch.float64)
    still = ChannelStatistics.of_batch(moments(x, 0), moments(x, 0))
    ones = torch.ones(2, dtype=torch.float64)
    exact = of_norm(
        in_training=still, eps=1e-5, running_mean=ones, running_var=0 * ones
    )
    assert reading(exact, "D01").details["d_var"] == pytest.approx(0)
    assert severity(exact, "D01") == "clear"


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_d01_what_is_not_finite_is_never_clear(bad: float) -> None:
    running = torch.full((2,), bad, dtype=torch.float64)
    assert severity(of_norm(running_mean=running), "D01") == "error"
    assert severity(of_norm(running_var=running), "D01") == "error"


def test_d01_few_samples_are_not_judged_however_far_off() -> None:
    few = stream(mean=5.0, batches=2, size=8)
    assert severity(of_norm(in_training=few), "D01") == "not_judged"
    assert severity(of_norm(in_training=None), "D01") == "not_judged"
    assert distance(norm(in_training=few)) is None


@pytest.mark.parametrize("id_", ["D01", "D03", "D04"])
def test_frozen_layers_are_left_alone(id_: str) -> None:
    off = of_norm(frozen=True, momentum=0.001, tracked=3, in_training=stream(9.0))
    assert checks.run(off, [id_]) == []


def evaluation(**changes: Any) -> Statistics:
    healthy = Evaluation(
        samples=(50,) * 10,
        batch_loss=(0.4, 0.5) * 5,
        running_loss=(0.4, 0.5) * 5,
        batch_metric=(0.95, 0.97) * 5,
        running_metric=(0.95, 0.97) * 5,
    )
    return replace(of_norm(), evaluation=replace(healthy, **changes))


@pytest.mark.parametrize(
    ("metric", "loss", "expected"),
    [
        ((0.952, 0.952), (0.9, 0.9), "clear"),  # not a point
        ((0.93, 0.94), (0.5, 0.5), "clear"),  # the loss does not tell
        # The statistics are those of the inputs: it passes as the steps shrink.
        ((0.93, 0.94), (0.9, 0.9), "info"),
        ((0.89, 0.91), (0.5, 0.5), "info"),
        ((0.80, 0.82), (0.5, 0.5), "warning"),
        ((NAN, NAN), (0.5, 0.5), "error"),
    ],
)
def test_d02_by_metric_and_loss(metric: tuple, loss: tuple, expected: str) -> None:
    found = evaluation(running_metric=metric * 5, running_loss=loss * 5)
    assert severity(found, "D02") == expected


def test_d02_a_difference_within_the_noise_is_clear() -> None:
    noisy = (0.60, 1.32, 0.97, 0.97, 0.87) * 2
    lower = tuple(m - 0.015 for m in (0.96,) * 10)
    assert sum(noisy) < sum(m for m in (0.96,) * 10)
    shaky = evaluation(running_metric=noisy, running_loss=(0.9,) * 10)
    steady = evaluation(running_metric=lower, running_loss=(0.9,) * 10)
    assert severity(shaky, "D02") == "clear"
    assert severity(steady, "D02") == "info"


@pytest.mark.parametrize("momentum", [0.1, 0.999])
def test_d02_at_a_high_momentum_does_not_pass(momentum: float) -> None:
    """Statistics of the last batch are recent, and as bad after the training."""
    worse = evaluation(running_metric=(0.93, 0.94) * 5, running_loss=(0.9,) * 10)
    layers = of_norm(momentum=momentum).layers
    found = by_cause(checks.run(replace(worse, layers=layers), ["D02", "D04"]))
    gap = next(f for f in found if f.id == "D02")
    is_high = momentum > 0.5
    assert gap.follows == ("D04" if is_high else "")
    assert gap.severity == ("warning" if is_high else "info")
    assert ("it passes" in gap.evidence) != is_high


@pytest.mark.parametrize(("common", "expected"), [(2.0, "info"), (0.6, "warning")])
def test_d01_statistics_fit_where_answers_are_good(
    common: float, expected: str
) -> None:
    """The loss is .45 in eval mode, .55 under batch statistics."""
    found = evaluation(batch_loss=(0.5, 0.6) * 5, common_loss=(common,) * 10)
    layers = of_norm(in_training=stream(0.6)).layers
    assert severity(replace(found, layers=layers), "D01") == expected


@pytest.mark.parametrize(
    ("shuffled", "metric", "expected"),
    [(5.0, 0.90, "warning"), (5.0, 0.80, "error"), (0.5, 0.90, "error")],
)
def test_d01_is_no_graver_than_its_cost(
    shuffled: float, metric: float, expected: str
) -> None:
    """A network that has learned nothing has nothing to lose."""
    found = evaluation(
        running_metric=(metric,) * 10,
        running_loss=(0.9,) * 10,
        shuffled_loss=(shuffled,) * 10,
    )
    layers = of_norm(in_training=stream(0.6)).layers
    assert severity(replace(found, layers=layers), "D01") == expected


def test_d02_without_a_metric_goes_by_the_loss() -> None:
    none = {"batch_metric": (), "running_metric": ()}
    worse = evaluation(running_loss=(0.7, 0.8) * 5, **none)
    assert severity(worse, "D02") == "warning"
    assert severity(evaluation(**none), "D02") == "clear"
    negative = evaluation(batch_loss=(-1.0,) * 10, **none)
    assert severity(negative, "D02") == "not_judged"
    assert severity(evaluation(samples=(9,) * 10), "D02") == "not_judged"


@pytest.mark.parametrize(
    ("momentum", "tracked", "expected"),
    [(0.1, 28, "warning"), (0.1, 29, "clear"), (0.01, 298, "warning"),
     (0.01, 299, "clear"), (1.0, 2, "clear"), (0.1, None, "not_judged"),
     (1.5, 10, "not_judged")],
)  # fmt: skip
def test_d03_counts_the_weight_of_the_start(
    momentum: float, tracked: int, expected: str
) -> None:
    statistics = of_norm(momentum=momentum, tracked=tracked, in_training=None)
    assert severity(statistics, "D03") == expected


def test_d03_statistics_that_are_right_are_no_warning() -> None:
    """Those that agree with the inputs were set by a calibration."""
    assert severity(of_norm(tracked=5), "D03") == "clear"
    assert severity(of_norm(tracked=5, in_training=stream(0.2)), "D03") == "warning"
    assert severity(of_norm(tracked=5, in_training=stream(2.0)), "D03") == "error"
    assert checks.run(of_norm(momentum=None, tracked=5), ["D03"]) == []


@pytest.mark.parametrize(
    ("momentum", "mean", "expected"),
    [
        (0.1, 0.0, "clear"),
        (0.006, 2.0, "clear"),
        (0.49, 2.0, "clear"),
        (0.005, 0.0, "info"),
        (0.005, 0.2, "warning"),
        (0.005, 2.0, "error"),
        (0.5, 0.0, "warning"),
        (0.99, 2.0, "error"),
    ],
)
def test_d04_asks_whether_it_did_harm(
    momentum: float, mean: float, expected: str
) -> None:
    found = reading(of_norm(momentum=momentum, in_training=stream(mean)), "D04")
    assert found.severity == expected


def activation(*shares: float, **changes: Any) -> Statistics:
    layer = LayerStatistics(
        "act", "Tanh", "activation", input=moments_of(2000, 0, 9), saturated=shares
    )
    training = changes.pop("while_training", False)
    return Statistics((replace(layer, **changes),), while_training=training)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0.39, 0.39), "clear"), ((0.1, 0.72), "warning"), ((0.71,), "error"),
     ((NAN,), "error")],
)  # fmt: skip
def test_d20_judges_the_mean_share(shares: tuple, expected: str) -> None:
    assert severity(activation(*shares), "D20") == expected


def test_d20_while_training_only_what_lasts_counts() -> None:
    def found(*shares: float) -> str:
        return severity(activation(*shares, while_training=True), "D20")

    assert found(0.9, 0.9) == "not_judged"
    assert found(0.9, 0.9, 0.1) == "clear"
    assert found(0.1, 0.45, 0.9, 0.5) == "warning"


def test_d20_asks_whether_the_network_has_learned_with_the_rest() -> None:
    def learned(share: float, shuffled: float) -> str:
        seen = Evaluation((64, 64), *[(1.0, 1.1)] * 2, shuffled_loss=(shuffled,) * 2)
        return severity(replace(activation(share), evaluation=seen), "D20")

    assert learned(0.45, 4.0) == "info"
    assert learned(0.45, 1.2) == "warning"
    # Of so many it is not clear what the rest could do.
    assert learned(0.71, 4.0) == "warning"
    assert learned(0.71, 1.2) == "error"


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (2.3, 0.5, "info"),
        (2.3, 1.5, "warning"),
        # That of a density can fall below zero.
        (0.9, -1.3, "info"),
        (-0.9, -1.3, "warning"),
        (-1.3, -1.3, "warning"),
    ],
)
def test_d20_in_a_watch_asks_whether_the_loss_fell(
    first: float, last: float, expected: str
) -> None:
    values = [first] * 5 + [0.0] * 20 + [last] * 5
    loop = TrainingStatistics(losses=tuple(enumerate(values)))
    seen = activation(*[0.45] * 5, while_training=True)
    assert severity(replace(seen, training=loop), "D20") == expected


def test_d20_an_output_may_be_sure_of_itself() -> None:
    assert severity(activation(0.9, is_output=True), "D20") == "not_judged"
    few = moments_of(499, 0, 9)
    assert severity(activation(0.9, input=few), "D20") == "not_judged"


def stack(*rms: float, role: str = "activation", kind: str = "Tanh") -> Statistics:
    return Statistics(
        tuple(
            LayerStatistics(
                f"{kind}{i}",
                kind,
                role,
                output=moments_of(100, 0, value**2),
                gradient_norm=(1.0,),
            )
            for i, value in enumerate(rms)
        )
    )


@pytest.mark.parametrize(
    ("rms", "expected"),
    [((1, 1, 0.5, 0.21), "clear"), ((1, 1, 0.5, 0.19), "warning"),
     ((1, 1, 0.1, 0.019), "error"), ((1, 1, 0.1), "not_judged"),
     ((0, 0, 0, 0), "error")],
)  # fmt: skip
def test_d22_compares_last_and_first(rms: tuple, expected: str) -> None:
    assert severity(stack(*rms), "D22") == expected


def test_d22_compares_layers_of_one_kind_only() -> None:
    mixed = Statistics(
        stack(1, 1, 1, 1).layers + stack(1e-3, 1e-3, 1e-3, 1e-3, kind="ReLU").layers
    )
    assert {f.severity for f in checks.run(mixed, ["D22"])} == {"clear"}


def gradients(*norms: float, rms: tuple = (), **weight: Any) -> Statistics:
    rms = rms or (1.0,) * len(norms)
    return Statistics(
        tuple(
            LayerStatistics(
                f"fc{i}",
                "Linear",
                "weight",
                output=moments_of(100, 0, r**2),
                gradient_norm=(norm,),
                weight=WeightStatistics(1.0, **weight) if weight else None,
            )
            for i, (norm, r) in enumerate(zip(norms, rms, strict=True))
        )
    )


@pytest.mark.parametrize(
    ("norms", "expected"),
    [((0.021, 1, 1, 1), "clear"), ((0.019, 1, 1, 1), "warning"),
     ((9e-5, 1, 1, 1), "error"), ((0, 1, 1, 1), "error"),
     ((1, 1, 1, 0), "not_judged"), ((1, 1, 1), "not_judged")],
)  # fmt: skip
def test_d24_compares_first_and_last(norms: tuple, expected: str) -> None:
    assert severity(gradients(*norms), "D24") == expected


def test_d24_does_not_depend_on_the_units_of_the_outputs() -> None:
    scaled = gradients(1e-3, 1e-3, 1, 1, rms=(1e3, 1e3, 1, 1))
    assert severity(scaled, "D24") == "clear"


def test_d24_layers_that_stand_still_are_named() -> None:
    still = gradients(1, 1, 1, 1, update_ratio=(1e-7, 1e-7, 1e-2))
    found = checks.run(still, ["D24"])
    assert [f.severity for f in found] == ["clear", "warning"]
    moving = gradients(1, 1, 1, 1, update_ratio=(1e-7, 1e-2, 1e-2))
    assert [f.severity for f in checks.run(moving, ["D24"])] == ["clear"]


def test_a_value_that_is_no_number_crosses_every_threshold() -> None:
    assert above(NAN, warning=1.0, error=2.0) == ("error", 2.0)
    assert above(NAN, warning=1.0)[0] == "warning"
    assert below(NAN, warning=1.0, error=0.5) == ("error", 0.5)
    assert below(NAN, warning=1.0)[0] == "warning"


def test_no_check_says_anything_about_nothing() -> None:
    assert checks.run(Statistics()) == []


def test_findings_become_plain_data() -> None:
    found = Finding("D01", "x", "bn", "error", NAN, math.inf, details={"t": (1, None)})
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["value"] == "nan"
    assert json.loads(text)["threshold"] == "inf"
    assert plain({"a": torch.tensor([1.0, NAN])}) == {"a": [1.0, "nan"]}


@pytest.mark.parametrize(
    ("size", "ranks", "kind", "expected"),
    [
        (4, 2, "BatchNorm1d", ["warning"]),
        (50, 2, "BatchNorm1d", ["clear"]),
        (4, 1, "BatchNorm1d", []),
        (4, 2, "SyncBatchNorm", []),
    ],
)
def test_d30_ranks_that_normalize_few_samples_apart(
    size: int, ranks: int, kind: str, expected: list[str]
) -> None:
    layer = LayerStatistics(
        "bn", kind, "norm", norm=norm(in_training=stream(size=size))
    )
    found = checks.run(Statistics((layer,), world_size=ranks), ["D30"])
    assert [f.severity for f in found] == expected


def test_d01_holds_a_shared_layer_to_its_calls_one_by_one() -> None:
    """Their distance from each other is in no running variance: that is D33."""
    torch.manual_seed(0)
    calls = []
    for shift in (0.0, 8.0):
        seen = moments(shift + torch.randn(1000, 2, dtype=torch.float64), 0)
        calls.append(ChannelStatistics.of_batch(seen, seen))
    shared = NormStatistics(
        momentum=0.1,
        eps=1e-5,
        tracked=1000,
        frozen=False,
        running_mean=torch.full((2,), 4.0, dtype=torch.float64),
        running_var=torch.ones(2, dtype=torch.float64),
        in_training=calls[0].merge(calls[1]),
        calls=tuple(calls),
    )
    layer = LayerStatistics("bn", "BatchNorm1d", "norm", norm=shared)
    statistics = Statistics((layer,))
    assert [f.severity for f in checks.run(statistics, ["D01"])] == ["clear"]
    assert [f.severity for f in checks.run(statistics, ["D33"])] == ["warning"]
    alone = replace(layer, norm=replace(shared, calls=()))
    assert [f.severity for f in checks.run(Statistics((alone,)), ["D01"])] == ["error"]


def test_what_a_clear_reading_says_is_so() -> None:
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    mean = torch.ones(2, dtype=torch.float64)
    frozen = of_norm(weight=scale, is_trainable=False, running_mean=mean)
    found = reading(frozen, "D07")
    assert found.severity == "clear"
    assert found.evidence == "no parameter of the model is trained"
    found = reading(frozen, "D32")
    assert found.severity == "clear"
    assert "not mean 0 and variance 1" in found.evidence
    assert "learned" not in found.evidence
    fits = evaluation(batch_loss=(0.9,) * 10).evaluation
    for tracked, severity_ in ((0, "info"), (200, "warning")):
        layers = of_norm(weight=scale, tracked=tracked).layers
        trained = Statistics(layers, evaluation=fits, has_moved=True)
        assert severity(trained, "D32") == severity_
    lost = reading(of_norm(weight=scale), "D32")
    assert "statistics are mean 0 and variance 1" in lost.evidence
    assert lost.evidence.endswith("yet scale and shift are learned")
