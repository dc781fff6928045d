"""S13: batch norm in a recurrent net, with sequences of many lengths."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.batches import LengthBucketSampler
from normkit.nn import LayerNorm, RecurrentBatchNorm
from normkit.studies import verdict as rules
from normkit.studies.data import Images
from normkit.studies.figure import band, points
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import frozen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ARMS = {
    # Name: norm, one per step, masked, bucketed.
    "no norm": ("", False, False, False),
    "shared": ("batch", False, False, False),
    "per step": ("batch", True, False, False),
    "shared, bucketed": ("batch", False, False, True),
    "per step, masked": ("batch", True, True, False),
    "layer norm": ("layer", False, False, False),
}
_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
_SHORTEST = 3
# Small, so that tanh keeps its slope through time (Cooijmans et al.).
_FIRST_WEIGHT = 0.3


class _Cell(nn.Module):
    """A recurrent net that reads an image row by row: h' = tanh(norm(Wx + Uh))."""

    def __init__(
        self,
        inputs: int,
        size: int,
        classes: int,
        steps: int,
        norm: str,
        per_step: bool,
    ) -> None:
        super().__init__()
        self.read = nn.Linear(inputs, size)
        self.keep = nn.Linear(size, size, bias=False)
        self.answer = nn.Linear(size, classes)
        nn.init.orthogonal_(self.keep.weight)
        # Steps beyond the last share its statistics: of one step, all do.
        self.batch_norm = RecurrentBatchNorm(
            size, steps if per_step else 1, first_weight=_FIRST_WEIGHT
        )
        self.layer_norm = LayerNorm(size)
        nn.init.constant_(self.layer_norm.weight, _FIRST_WEIGHT)
        self.norm = norm

    def forward(self, x: Tensor, lengths: Tensor, *, masked: bool) -> Tensor:
        h = x.new_zeros(len(x), self.keep.in_features)
        last = h
        for t in range(int(lengths.max())):
            going = (lengths > t)[:, None]
            z = self.read(x[:, t]) + self.keep(h)
            if self.norm == "batch":
                z = self.batch_norm(z, t, mask=going if masked else None)
            elif self.norm == "layer":
                z = self.layer_norm(z)
            h = torch.tanh(z)
            last = torch.where(going, h, last)
        return self.answer(last)


def measure(trial: Trial, *, steps: int, batch: int, size: int) -> Result:
    """Measure test accuracy at two rates, and the statistics' error by position."""
    images = trial.images("digits").standardized()
    rows = images.x_train.shape[2]
    lengths = {
        key: torch.randint(_SHORTEST, rows + 1, (len(y),), generator=trial.generator(i))
        for i, (key, y) in enumerate(
            (
                ("train", images.y_train),
                ("test", images.y_test),
                ("validation", images.y_val),
            ),
            11,
        )
    }
    shown = {
        "test": (images.x_test, images.y_test),
        "validation": (images.x_val, images.y_val),
    }
    result: Result = {split: {arm: [] for arm in _ARMS} for split in shown}
    for arm, (norm, per_step, masked, bucketed) in _ARMS.items():
        batches = _batches(images, lengths["train"], batch, steps, trial, bucketed)
        for rate in _RATES:
            torch.manual_seed(trial.seed)
            model = _Cell(images.x_train.shape[3], size, 10, rows, norm, per_step)
            _train(model, images, lengths["train"], batches, rate, masked)
            for split, (x, y) in shown.items():
                result[split][arm].append(
                    _accuracy(model, x, y, lengths[split], masked)
                )
    return {
        **result,
        "error": _error_by_step(trial, images, lengths["train"], batch),
    }


def _batches(
    images: Images,
    lengths: Tensor,
    batch: int,
    steps: int,
    trial: Trial,
    bucketed: bool,
) -> Tensor:
    if not bucketed:
        return images.batches(batch, steps, trial.generator(1))
    sampler = LengthBucketSampler(
        lengths, batch, window=8, drop_last=True, seed=trial.seed
    )
    epochs = itertools.chain.from_iterable(itertools.repeat(sampler))
    return torch.tensor(list(itertools.islice(epochs, steps)))


def _padded(x: Tensor, lengths: Tensor) -> Tensor:
    """Return rows of the image as steps, zero after the end, as padding is."""
    steps = torch.arange(x.shape[2])
    return x[:, 0] * (steps[None, :, None] < lengths[:, None, None])


def _train(
    model: _Cell,
    images: Images,
    lengths: Tensor,
    batches: Tensor,
    rate: float,
    masked: bool,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for rows in batches:
        x = _padded(images.x_train[rows], lengths[rows])
        loss = F.cross_entropy(
            model(x, lengths[rows], masked=masked), images.y_train[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()


@torch.no_grad()
def _accuracy(
    model: _Cell, x: Tensor, y: Tensor, lengths: Tensor, masked: bool
) -> float:
    with frozen(model):
        answer = model(_padded(x, lengths), lengths, masked=masked)
    return 100 * (answer.argmax(1) == y).float().mean().item()


@torch.no_grad()
def _error_by_step(
    trial: Trial, images: Images, lengths: Tensor, batch: int
) -> list[float]:
    """Return the standard error of the batch mean of a row's valid pixels, by position.

    In units of that row's own spread, over the sequences that reach it.
    """
    draws = images.batches(batch, 60, trial.generator(3))
    spread = images.x_train[:, 0].std(0).clamp(min=0.1)
    errors = []
    for t in range(images.x_train.shape[2]):
        present = [rows[lengths[rows] > t] for rows in draws]
        # Some batches have no sequence that long, and no mean.
        means = [images.x_train[rows, 0, t].mean(0) for rows in present if len(rows)]
        errors.append((torch.stack(means).std(0) / spread[t]).mean().item())
    return errors


def _evaluated_pick(results: list[Result], arm: str) -> Pick:
    return pick([r["validation"][arm] for r in results], _RATES)


def _evaluated_best(results: list[Result], arm: str) -> list[float]:
    best = _evaluated_pick(results, arm).index
    return [r["test"][arm][best] for r in results]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""

    def lead(a: str, b: str) -> list[float]:
        return rules.minus(_evaluated_best(results, a), _evaluated_best(results, b))

    def edge(*arms: str) -> str:
        return edges({arm: _evaluated_pick(results, arm) for arm in arms})

    growth = [(r["error"][-1] / r["error"][_SHORTEST - 1]) ** 2 for r in results]
    return [
        rules.verdict(
            "C52",
            rules.at_least(
                "test accuracy, layer norm − shared batch norm, points",
                lead("layer norm", "shared"),
                1,
                none=0,
                about="batch norm suits them badly",
                unless=edge("layer norm", "shared"),
            ),
            rules.at_least(
                "variance of the batch mean, last step / third",
                growth,
                2,
                none=1,
                about="few samples at late steps",
            ),
            rules.at_least(
                "bucketed − mixed, shared batch norm, points",
                lead("shared, bucketed", "shared"),
                1,
                none=0,
                about="bucketing helps",
                unless=edge("shared, bucketed", "shared"),
            ),
            rules.reported(
                "no norm − layer norm, points", lead("no norm", "layer norm")
            ),
            rules.reported("per step − shared, points", lead("per step", "shared")),
            rules.reported(
                "per step with a mask − without, points",
                lead("per step, masked", "per step"),
            ),
            rules.reported(
                "layer norm − per step with a mask, points",
                lead("layer norm", "per step, masked"),
            ),
        ),
    ]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw the accuracy of each arm, and the statistics' uncertainty at late steps."""
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
    names = [arm.replace(", ", ",\n") for arm in _ARMS]
    rows = [_evaluated_best(results, arm) for arm in _ARMS]
    points(left, names, rows, indices=(7, 0, 5, 0, 5, 1))
    left.set(title="Test accuracy, best rate", ylabel="%")
    left.tick_params(axis="x", labelsize=6.5)
    steps = range(1, len(results[0]["error"]) + 1)
    band(right, steps, [r["error"] for r in results])
    right.set(
        title="Error of the batch mean", xlabel="step", ylabel="in standard deviations"
    )


STUDY = Study(
    id="S13",
    title="sequences",
    question="How does batch norm fare in a recurrent net on varying lengths?",
    prediction="Worse than layer norm; late steps have few samples; bucketing helps.",
    seen="A small recurrent net reads images row by row; sequences are 3 to 8 rows "
    "long. Right: the later a row, the fewer sequences reach it, and the less certain "
    "the mean of a batch.",
    meaning="The uncertainty of late steps is real. In a run this short every norm is "
    "behind none, layer norm most of all, and seeds differ by many points: it does not "
    "settle which norm suits recurrent nets.",
    arms=tuple(_ARMS),
    metric="Test accuracy on digits read row by row, cut to 3 to 8 rows and padded, at "
    "the best of five rates by validation; error of the batch mean at each step.",
    criterion="C52: layer norm a point ahead of shared batch norm, twice the variance "
    "of the mean at the last step, and a point from bucketing.",
    claims=("C52",),
    minutes=3,
    scales={
        "quick": Scale(2, {"steps": 24, "batch": 32, "size": 32}),
        "cpu": Scale(10, {"steps": 80, "batch": 32, "size": 32}),
        "gpu": Scale(10, {"steps": 5000, "batch": 32, "size": 256}),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)
