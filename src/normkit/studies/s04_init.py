"""S04: signals and gradients at the start, and which starts train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normkit.studies import verdict as rules
from normkit.studies.figure import band, color
from normkit.studies.initial_signals import DEPTH, DEPTHS, GAINS, RATES, STARTS, measure
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _evaluated_pick(results: list[Result], arm: str, start: str) -> Pick:
    return pick([r["trained"][arm]["validation"][start] for r in results], RATES)


def _evaluated_accuracy(results: list[Result], arm: str, start: str) -> list[float]:
    """Return the test accuracies at the best rate on validation."""
    best = _evaluated_pick(results, arm, start).index
    return [r["trained"][arm]["test"][start][best] for r in results]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def layer(start: str, key: str, index: int) -> list[float]:
        return [r["stack"][start][key][index] for r in results]

    def grown(start: str, key: str = "std") -> list[float]:
        """Return layer 6 over layer 1."""
        rows = [r["stack"][start][key] for r in results]
        return [row[-1] / row[0] for row in rows]

    def vanished(start: str, depth: int) -> list[float]:
        """Return how much of the gradient reaches the input through `depth` layers."""
        rows = [r["deep"][start]["input_grads"] for r in results]
        # The gradient enters above the last layer: the top `depth` ones are passed.
        return [row[-depth] / row[-1] for row in rows]

    def input_part(start: str, depth: int) -> rules.Part:
        return rules.at_most(
            f"std of input gradients, bottom / top of {depth} layers",
            vanished(f"tanh {start}", depth),
            0.1,
            none=0.5,
            about=f"input gradients, {depth} layers",
        )

    def weight_part(start: str) -> rules.Part:
        """Of the weight gradient of layer 1 of six, against Xavier's."""
        ratio = rules.over(
            layer(f"tanh {start}", "weight_grads", 0),
            layer("tanh Xavier", "weight_grads", 0),
        )
        text = "‖dW1‖ of 6 layers, this start / Xavier"
        return rules.at_most(
            text, ratio, 0.1, none=0.5, about="weight gradients, 6 layers"
        )

    def accuracy_part(start: str, depth: int) -> rules.Part:
        picked = _evaluated_pick(results, f"{depth} plain", start)
        part = rules.at_most(
            f"accuracy at {depth} layers, best rate, %",
            _evaluated_accuracy(results, f"{depth} plain", start),
            50,
            none=90,
            about=f"no training, {depth} layers",
        )
        # A net that learns nothing has no best rate.
        learns = part.interval.high > 50
        return part.unless(edges({"plain": picked}) if learns else "")

    def lost(start: str, norm: str = "plain") -> list[float]:
        return rules.minus(
            *(_evaluated_accuracy(results, f"{d} {norm}", start) for d in DEPTHS[:2])
        )

    def deep_reason(start: str) -> str:
        return edges({"plain": _evaluated_pick(results, f"{DEPTHS[0]} plain", start)})

    against = [
        [v for s in r["stack"].values() for v in rules.over(s["rms"], s["theory"])]
        for r in results
    ]
    worst = [max(abs(ratio - 1) for ratio in row) for row in against]
    return [
        rules.verdict(
            "C3",
            rules.at_least(
                "points lost from 6 to 20 layers, n·Var[w] = 0.41",
                lost("0.01"),
                40,
                none=0,
                about="small weights",
                unless=deep_reason("0.01"),
            ),
            rules.at_least(
                "the same, Xavier",
                lost("Xavier"),
                2,
                none=0,
                about="Xavier",
                unless=deep_reason("Xavier"),
            ),
            rules.reported("the same with batch norm, 0.01", lost("0.01", "batch")),
        ),
        rules.verdict(
            "C23",
            rules.at_least(
                "std of layer 6 / layer 1, std 0.05",
                grown("tanh 0.05"),
                0.9,
                about="no shrinking at n·Var[w] = 10",
            ),
            rules.at_least(
                "share of |h| > 0.99 in layer 6, std 0.05",
                layer("tanh 0.05", "saturated", -1),
                0.25,
                none=0.05,
                about="saturation there",
            ),
            rules.at_least(
                "std of layer 6 / layer 1, std 0.01",
                grown("tanh 0.01"),
                0.9,
                about="no shrinking at n·Var[w] = 0.41",
            ),
        ),
        rules.verdict(
            "C38",
            rules.at_most(
                "difference of units after training from constants",
                [r["symmetry"]["apart"] for r in results],
                0,
                about="equal units",
            ),
            rules.at_most(
                "output of a net of zeros",
                [r["symmetry"]["zero_output"] for r in results],
                0,
                about="zeros",
            ),
            rules.reported(
                "test accuracy from constants",
                [r["symmetry"]["constant"] for r in results],
            ),
        ),
        rules.verdict(
            "C39",
            rules.at_most(
                "std of layer 6",
                layer("tanh 0.01", "std", -1),
                0.06,
                none=0.5,
                about="activations",
            ),
            *(input_part("0.01", depth) for depth in DEPTHS),
            weight_part("0.01"),
            *(accuracy_part("0.01", depth) for depth in DEPTHS),
        ),
        rules.verdict(
            "C40",
            rules.at_least(
                "share of |h| > 0.99 in layer 6",
                layer("tanh 0.05", "saturated", -1),
                0.25,
                none=0.05,
                about="a pile at ±1",
            ),
            rules.at_most(
                "mean local gradient 1 − h² in layer 6",
                [r["stack"]["tanh 0.05"]["slope"] for r in results],
                0.1,
                none=0.5,
                about="local gradients",
            ),
            *(input_part("0.05", depth) for depth in DEPTHS),
            weight_part("0.05"),
            *(accuracy_part("0.05", depth) for depth in DEPTHS),
        ),
        rules.verdict(
            "C41",
            rules.within(
                "std of layer 6 / layer 1, linear",
                grown("linear Xavier"),
                0.9,
                1.1,
                about="linear, forward",
            ),
            rules.within(
                "the same, tanh", grown("tanh Xavier"), 0.9, 1.1, about="tanh, forward"
            ),
            rules.within(
                "gradient std of layer 6 / layer 1, linear",
                grown("linear Xavier", "input_grads"),
                0.9,
                1.1,
                about="linear, backward",
            ),
            rules.within(
                "gradient std, the same, tanh",
                grown("tanh Xavier", "input_grads"),
                0.9,
                1.1,
                about="tanh, backward",
            ),
            rules.reported(
                "std of layer 50 / layer 1, tanh",
                [
                    r["deep"]["tanh Xavier"]["std"][-1]
                    / r["deep"]["tanh Xavier"]["std"][0]
                    for r in results
                ],
            ),
        ),
        rules.verdict(
            "C42",
            rules.at_most(
                "largest error of the variance recursion, any layer and start",
                worst,
                0.05,
                none=0.5,
            ),
        ),
        rules.verdict(
            "C43",
            rules.at_most(
                "std of layer 6 / layer 1, ReLU, Xavier",
                grown("relu Xavier"),
                0.25,
                none=0.8,
                about="Xavier vanishes",
            ),
            rules.within(
                "the same, Kaiming",
                grown("relu Kaiming"),
                0.85,
                1.15,
                about="Kaiming is flat",
            ),
        ),
        rules.verdict(
            "C44",
            rules.at_most(
                "|mean| / std of the last layer, ReLU, Kaiming",
                [abs(r["stack"]["relu Kaiming"]["mean_over_std"]) for r in results],
                0.1,
                none=0.4,
                about="zero mean, of the start recommended for ReLU",
            ),
            rules.within(
                "std of layer 6 / layer 1, Kaiming",
                grown("relu Kaiming"),
                0.5,
                2,
                about="moderate variance there",
            ),
        ),
        rules.verdict(
            "C76",
            *(
                rules.at_least(
                    f"std of layer 6 / layer 1, n·Var[w] = 10, {name}",
                    grown(f"{name} 0.05"),
                    10,
                    none=1,
                    about=name,
                )
                for name in ("linear", "relu", "tanh")
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw spread and gradients per layer, and accuracy by depth."""
    axes = figure.subplots(1, 3)
    layers = range(1, DEPTH + 1)
    for i, (name, _, _) in enumerate(STARTS):
        stacks = [r["stack"][name] for r in results]
        band(axes[0], layers, [s["std"] for s in stacks], label=name, index=i)
        if name.startswith("tanh"):
            # rms = std there: the theory's line lies on it.
            axes[0].plot(layers, stacks[0]["theory"], "x", color=color(i), ms=4)
            deep = [r["deep"][name]["input_grads"] for r in results]
            passed = range(1, len(deep[0]) + 1)
            rows = [[row[-k] / row[-1] for k in passed] for row in deep]
            band(axes[1], passed, rows, index=i)
    axes[0].set(title="Std of activations (×: theory)", xlabel="layer", yscale="log")
    axes[1].set(
        title="Share of the gradient left", xlabel="layers passed", yscale="log"
    )
    for i, start in enumerate(GAINS):
        for norm, marker in (("plain", "o"), ("batch", "^")):
            rows = [
                _evaluated_accuracy(results, f"{depth} {norm}", start)
                for depth in (DEPTHS if norm == "plain" else DEPTHS[:-1])
            ]
            places = [
                k + (i - 1) * 0.2 + 0.08 * (norm == "batch") for k in range(len(rows))
            ]
            for place, row in zip(places, rows, strict=True):
                axes[2].plot(
                    place, sorted(row)[len(row) // 2], marker, color=color(i), ms=5
                )
                axes[2].vlines(place, min(row), max(row), color=color(i), lw=1)
    axes[2].plot([], [], "ko", label="plain")
    axes[2].plot([], [], "k^", label="with batch norm")
    axes[2].set(
        title="Test accuracy, best rate",
        xlabel="layers (tanh)",
        ylabel="%",
        ylim=(0, 102),
    )
    axes[2].set_xticks(range(3), [str(d) for d in DEPTHS])
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1)


STUDY = Study(
    id="S04",
    title="initial weights",
    question="What do initial weights do to signals and gradients, and which train?",
    prediction="Small weights let both vanish, larger ones saturate, Xavier keeps the "
    "variance, Kaiming does so for ReLU; bad starts do not train.",
    seen="Left: with small weights (0.01) the activations shrink layer by layer, with "
    "large ones (0.05) they stay near ±1, with Xavier's they fall slowly; crosses are "
    "the theory. Middle: how much of a gradient is left after so many layers. Right: "
    "accuracy at three depths; batch norm was trained to 20 layers.",
    meaning="The product of n·Var[w] over the layers decides. Below 1 signals and "
    "gradients vanish, and the more layers the less is left: six layers still train, "
    "twenty do not. Above 1 units saturate, yet gradients grow on their way back. "
    "Neither start trains at 20 layers without batch norm. With 2048 units, in a "
    "first record, the error of C42 was 0.009 to 0.072 and not surely within 0.05.",
    arms=(
        "std 0.01, 0.05, Xavier, Kaiming",
        "tanh, ReLU, linear",
        "6, 20 and 50 layers",
        "plain and batch norm (to 20 layers)",
    ),
    metric="Std of activations over six layers, against the variance recursion; std of "
    "the gradients of layer inputs through 6, 20 and 50 layers; norm of the first "
    "layer's weight gradient against that of Xavier; test accuracy of tanh nets on the "
    "digits at the best of five rates by validation. All with n·Var[w] as at 4096 "
    "units: 0.41, 10.2 and 1.",
    criterion="C42: the recursion is right to 5 % at every layer of every start. C39, "
    "C40: forward as stated, a tenth of the gradients left, accuracy below 50 %, each "
    "for itself. C41, C43: flat means within 10 % (15 % for Kaiming) over the layers. "
    "C3: depth costs 40 points at small weights, 2 at Xavier. C44: mean below a tenth "
    "of the deviation, and the deviation kept within a factor of two. C76: the "
    "deviation grows tenfold over six layers.",
    claims=("C3", "C23", "C38", "C39", "C40", "C41", "C42", "C43", "C44", "C76"),
    minutes=4,
    scales={
        "quick": Scale(
            2,
            {"units": 512, "deep_units": 128, "batch": 64, "steps": 40, "width": 24},
        ),
        "cpu": Scale(
            10,
            {"units": 4096, "deep_units": 512, "batch": 64, "steps": 160, "width": 24},
        ),
        "gpu": Scale(
            10,
            {
                "units": 4096,
                "deep_units": 4096,
                "batch": 512,
                "steps": 3000,
                "width": 200,
            },
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)
