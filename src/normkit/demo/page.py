"""The report page of a demo run: the checks first, then each step with its charts."""

from __future__ import annotations

from collections.abc import Iterable

from normkit import report
from normkit.demo.check import Check, percent
from normkit.demo.folding import FoldStep
from normkit.demo.repair import BROKEN_MOMENTUM, RepairStep
from normkit.demo.training import CHANCE, TrainStep
from normkit.demo.watching import WatchStep
from normkit.demo.watching_page import watching
from normkit.doctor.pages import finding_cards
from normkit.environment import Environment

__all__ = ["demo_page"]


def demo_page(
    train: TrainStep,
    watch: WatchStep,
    repair: RepairStep,
    fold: FoldStep,
    *,
    summary: str,
    environment: Environment,
    seed: int,
    foot: str,
) -> report.Page:
    """Return the report of the four steps; every number in it was measured.

    Args:
        train: The trained networks.
        watch: Their records.
        repair: The planted fault and its repair.
        fold: The folded network.
        summary: The outcome in one sentence.
        environment: The machine and the versions.
        seed: Random seed of the run.
        foot: How the page was made, one line.
    """
    return report.Page(
        title="The life of a normalized network",
        lead="Small networks learn 8×8 handwritten digits without and with batch norm. "
        "One is broken on purpose, diagnosed and repaired; one loses its batch norms "
        f"and nothing else. {summary}",
        blocks=[
            _headline(train, watch, repair, fold),
            report.Heading("What had to hold"),
            _check_table(train, watch, repair, fold),
            *_training(train),
            *watching(watch),
            *_repair(repair),
            *_folding(fold),
            *_environment(environment, seed),
        ],
        foot=foot,
    )


def _headline(
    train: TrainStep, watch: WatchStep, repair: RepairStep, fold: FoldStep
) -> report.Numbers:
    return report.Numbers(
        [
            report.Number(
                "Deep sigmoid network",
                f"{percent(train.plain.accuracy)} → "
                f"{percent(train.normalized.accuracy)}",
                "test accuracy without and with batch norm",
                _sign(train.checks),
            ),
            report.Number(
                "Gradient at the first layer",
                f"{watch.gradient_ratio:,.0f} ×",
                "with batch norm, relative to without",
                _sign(watch.checks),
            ),
            report.Number(
                "Broken, then calibrated",
                f"{percent(repair.before)} → {percent(repair.after)}",
                f"test accuracy; the doctor named {repair.diagnosis.named[0]} first"
                if repair.diagnosis.named
                else "test accuracy; the doctor named nothing",
                _sign(repair.checks),
            ),
            report.Number(
                "Folded",
                f"{fold.speed:.2f} × as fast",
                f"largest difference of a score {report.format_value(fold.difference)}",
                _sign(fold.checks),
            ),
        ]
    )


def _check_table(*steps: TrainStep | WatchStep | RepairStep | FoldStep) -> report.Table:
    return report.Table(
        ["", "check", "measured", "required"],
        [
            [
                report.Mark("ok", "held")
                if check.held
                else report.Mark("error", "failed"),
                f"{number}. {check.what}",
                check.shown,
                check.required,
            ]
            for number, step in enumerate(steps, start=1)
            for check in step.checks
        ],
        "The run fails if one check does not hold",
    )


def _sign(checks: Iterable[Check]) -> report.Severity:
    return "ok" if all(check.held for check in checks) else "error"


def _training(step: TrainStep) -> Iterable[report.Block]:
    yield report.Heading(f"1. {step.title}")
    yield report.Text(
        "The two sigmoid networks have six hidden layers, start from the same Xavier "
        "weights and see the same images in the same order at the same learning rate; "
        "batch norm before each sigmoid is all that differs. The third "
        "is a CNN with residual connections."
    )
    yield report.Code(
        'initialize(model, "xavier")\n'
        "with normkit.watch(model, optimizer, every=10) as watch:\n"
        "    train(model)"
    )
    yield report.Figure(
        "Test accuracy while learning",
        report.Lines(
            {
                network.name: (
                    [at for at, _ in network.curve],
                    [100 * share for _, share in network.curve],
                )
                for network in step.networks
            },
            y_label="test accuracy, %",
            y_range=(0, 100),
            marks={"chance": 100 * CHANCE},
        ),
        alt="; ".join(
            f"{network.name} ends at {percent(network.accuracy)}"
            for network in step.networks
        ),
        caption="In eval mode, on 500 images that no network was trained on.",
    )
    yield report.Table(
        ["network", "parameters", "steps", "learning rate", "test accuracy"],
        [
            [
                network.name,
                network.num_parameters,
                network.recipe.steps,
                network.recipe.lr,
                percent(network.accuracy),
            ]
            for network in step.networks
        ],
        f"The three networks, trained in {step.seconds:.0f} seconds",
    )


def _repair(step: RepairStep) -> Iterable[report.Block]:
    yield report.Heading(f"3. {step.title}")
    weights = (
        "Its weights are bitwise those of the healthy one: only what eval mode uses "
        "differs."
        if step.has_healthy_weights
        else "Its weights differ from those of the healthy one."
    )
    yield report.Text(
        f"The same CNN is trained again with `momentum={BROKEN_MOMENTUM}` in its batch "
        "norms: 0.999 in the convention new = 0.999·old + 0.001·batch. " + weights
    )
    yield report.Numbers(
        [
            report.Number("After training", percent(step.before), "in eval mode"),
            report.Number(
                "By batch statistics", percent(step.target), "as in training"
            ),
            report.Number("Calibrated", percent(step.after), "in eval mode"),
        ]
    )
    yield report.Code("diagnosis = normkit.diagnose(model, loader, loss_fn)")
    yield report.Text(step.diagnosis.summary())
    yield finding_cards(step.diagnosis.findings)
    yield report.Code("report = normkit.calibrate(model, loader)")
    yield report.Bars(
        [report.Bar(layer.name, layer.d_mean) for layer in step.calibration.layers],
        "How far calibrating moved the running mean of each layer, in standard "
        "deviations",
        "distance",
    )
    yield report.Text(f"Diagnosed again: {step.diagnosis_after.summary()}")
    yield report.Details(
        "Every layer that was calibrated",
        [
            report.Table(
                ["layer", "values per channel", "moved mean", "moved variance"],
                [
                    [layer.name, layer.count, layer.d_mean, layer.d_var]
                    for layer in step.calibration.layers
                ],
                "Mean in standard deviations, variance as |ln| of the ratio",
            )
        ],
    )


def _folding(step: FoldStep) -> Iterable[report.Block]:
    ledger = step.ledger
    lower, upper = step.speed_quartiles
    yield report.Heading(f"4. {step.title}")
    yield report.Text(
        f"The {step.name} in eval mode: each batch norm is an affine map of constants "
        "by now, and goes into the convolution before it."
    )
    yield report.Code("folded, ledger = normkit.fold(model, images)")
    yield report.Numbers(
        [
            report.Number(
                "Batch norms folded",
                f"{len(ledger.folded)} of {len(ledger.entries)}",
                f"{ledger.parameters_saved:,} stored numbers fewer",
            ),
            report.Number(
                "Largest difference",
                step.difference,
                "of any score of any test image, folded in float64; "
                f"{report.format_value(step.difference_float32)} in float32",
            ),
            report.Number(
                "Test accuracy",
                f"{percent(step.accuracy_before)} → {percent(step.accuracy_after)}",
                f"{step.num_changed} of 500 images classified differently",
            ),
            report.Number(
                "Speed",
                f"{step.speed:.2f} ×",
                f"median over rounds; the middle half {lower:.2f} to {upper:.2f}",
            ),
        ]
    )
    yield report.Table(
        ["batch norm", "folded", "target or reason", "difference"],
        [
            [entry.name, entry.folded, entry.how or entry.reason, entry.difference]
            for entry in ledger.entries
        ],
        "The ledger",
    )


def _environment(here: Environment, seed: int) -> Iterable[report.Block]:
    rows = [
        ["processor", f"{here.cpu}, cores: {here.cores}, threads: {here.threads}"],
        ["system", here.system],
        ["accelerators", ", ".join(here.devices) or "none"],
        ["python", here.python],
        ["torch", here.torch],
        ["normkit", here.normkit],
        ["seed", str(seed)],
    ]
    yield report.Heading("Where this was measured")
    yield report.Table(["", ""], rows, "The machine and the versions")
