"""S14: layer norm against batch norm, in a transformer and on mixed features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.nn import BatchNorm1d, LayerNorm
from normkit.studies import verdict as rules
from normkit.studies.figure import bars_by_group, points
from normkit.studies.selection import Pick, edges, pick
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, frozen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
_MIXED_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_NORMS = ("layer norm", "batch norm", "none")


def _norm(kind: str, size: int) -> nn.Module:
    """Build a norm of `(batch, token, feature)`; batch norm: over batch and tokens."""
    if kind == "none":
        return nn.Identity()
    if kind == "layer norm":
        return LayerNorm(size)
    return BatchNorm1d(size, channel_dim=-1)


class _Block(nn.Module):
    """Attention to earlier tokens, then a feed-forward net; norms come first."""

    def __init__(self, size: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = _norm(kind, size), _norm(kind, size)
        self.project, self.merge = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.feed = nn.Sequential(
            nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        parts = self.project(self.first(x)).chunk(3, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.feed(self.second(x))


class _Transformer(nn.Module):
    """A small language model of the usual form."""

    def __init__(self, letters: int, context: int, size: int, kind: str) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, size)
        self.places = nn.Embedding(context, size)
        self.blocks = nn.Sequential(*[_Block(size, 4, kind) for _ in range(2)])
        self.last, self.answer = _norm(kind, size), nn.Linear(size, letters)

    def forward(self, x: Tensor) -> Tensor:
        h = self.letters(x) + self.places.weight[: x.shape[1]]
        return self.answer(self.last(self.blocks(h)))


def measure(
    trial: Trial, *, steps: int, batch: int, context: int, size: int, rows: int
) -> Result:
    """Train the language model with each norm; classify rows of mixed features."""
    text = trial.text()
    if text is None:
        # Without a text: the digits' pixels, 17 grey levels, as one long line.
        pixels = trial.images("digits").x_train.flatten(1).mul(16).round().long()
        text = pixels.flatten()
    # Training, validation, test: 80, 10 and 10 %, in the order of the text.
    cuts = len(text) * 8 // 10, len(text) * 9 // 10
    parts = {"validation": text[cuts[0] : cuts[1]], "test": text[cuts[1] :]}
    losses: dict[str, dict[str, list[float]]] = {part: {} for part in parts}
    for kind in _NORMS:
        for part in parts:
            losses[part][kind] = []
        for rate in _RATES:
            torch.manual_seed(trial.seed)
            model = _Transformer(int(text.max()) + 1, context, size, kind)
            _train(trial, model, text[: cuts[0]], steps, batch, context, rate)
            for part, letters in parts.items():
                losses[part][kind].append(_loss(trial, model, letters, batch, context))
    return {
        "losses": losses,
        "alone_error": {kind: _alone(trial, kind) for kind in _NORMS[:2]},
        "mixed": _mixed(trial, rows),
    }


def _draw(
    text: Tensor, batch: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - context - 1, (batch, 1), generator=generator)
    window = text[starts + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]


def _train(
    trial: Trial,
    model: nn.Module,
    text: Tensor,
    steps: int,
    batch: int,
    context: int,
    rate: float,
) -> None:
    """Train by AdamW, with a short warm-up and a linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = trial.generator(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20, 1.02 - step / steps)
        x, y = _draw(text, batch, context, generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _loss(
    trial: Trial, model: nn.Module, text: Tensor, batch: int, context: int
) -> float:
    generator = trial.generator(2)
    with frozen(model):
        found = []
        for _ in range(16):
            x, y = _draw(text, batch, context, generator)
            found.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    return torch.stack(found).mean().item()


@torch.no_grad()
def _alone(trial: Trial, kind: str) -> float:
    """Compare one sample's training-mode output in a batch of eight and of two."""
    x = torch.randn(8, 5, 16, generator=trial.generator(3))
    layer = _norm(kind, 16).train()
    return (layer(x)[0] - layer(x[:2])[0]).abs().max().item()


def _mixed(trial: Trial, rows: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Measure accuracy on rows whose label is in small columns next to large ones.

    Ten columns of scale 1 carry the label, ten of scale 1000 are noise. Returns
    `[scale][split][norm][rate]`.
    """
    generator = trial.generator(4)
    label = torch.randint(2, (3 * rows,), generator=generator)
    small = torch.randn(3 * rows, 10, generator=generator)
    small[:, :5] += (2 * label[:, None] - 1) * 0.7
    alike = torch.randn(3 * rows, 10, generator=generator)
    held = {"validation": slice(rows, 2 * rows), "test": slice(2 * rows, None)}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for scale in (1.0, 1000.0):
        x = torch.cat([small, scale * alike], 1)
        here = found[f"{scale:g}"] = {s: {k: [] for k in _NORMS[:2]} for s in held}
        for kind in _NORMS[:2]:
            for rate in _MIXED_RATES:
                torch.manual_seed(trial.seed)
                first = BatchNorm1d(20) if kind == "batch norm" else LayerNorm(20)
                model = nn.Sequential(
                    first, nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)
                )
                optimizer = torch.optim.Adam(model.parameters(), rate)
                order = trial.generator(5)
                for _ in range(100):
                    pick = torch.randint(rows, (64,), generator=order)
                    loss = F.cross_entropy(model(x[pick]), label[pick])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                for split, part in held.items():
                    hits = 100 * accuracy(model, x[part], label[part])
                    here[split][kind].append(hits)
    return found


def _evaluated_loss(results: list[Result], kind: str) -> tuple[Pick, list[float]]:
    """Return the best rate on validation, and the test losses there."""
    rows = [[-v for v in r["losses"]["validation"][kind]] for r in results]
    best = pick(rows, _RATES)
    return best, [_finite(r["losses"]["test"][kind][best.index]) for r in results]


def _evaluated_mixed(
    results: list[Result], scale: str, kind: str
) -> tuple[Pick, list[float]]:
    best = pick([r["mixed"][scale]["validation"][kind] for r in results], _MIXED_RATES)
    return best, [r["mixed"][scale]["test"][kind][best.index] for r in results]


def evaluate(results: list[Result]) -> list[rules.Verdict]:
    """Apply the rule to the results of all seeds."""
    losses = {kind: _evaluated_loss(results, kind) for kind in _NORMS}
    layer, batch = "layer norm", "batch norm"

    def lower(kind: str) -> list[float]:
        return rules.minus(losses[kind][1], losses[layer][1])

    def lost(scale: str) -> list[float]:
        return rules.minus(
            *(_evaluated_mixed(results, scale, kind)[1] for kind in (batch, layer))
        )

    mixed = {k: _evaluated_mixed(results, "1000", k)[0] for k in (batch, layer)}
    return [
        rules.verdict(
            "C53",
            rules.at_most(
                "change of a layer-norm output with the rest of the batch",
                [r["alone_error"][layer] for r in results],
                1e-6,
                about="independent of the batch",
            ),
            rules.at_least(
                "test loss in a transformer, batch norm − layer norm, best rates",
                lower(batch),
                0.01,
                none=0,
                about="better in a transformer",
                unless=edges({arm: losses[arm][0] for arm in (batch, layer)}),
            ),
            rules.reported(
                "the same change, batch norm",
                [r["alone_error"][batch] for r in results],
            ),
            rules.reported("test loss, no norm − layer norm", lower("none")),
        ),
        rules.verdict(
            "C55",
            rules.at_least(
                "points that layer norm loses to batch norm, scales 1 and 1000",
                lost("1000"),
                5,
                none=0,
                unless=edges({arm: mixed[arm] for arm in (batch, layer)}),
            ),
            rules.reported("the same, all scales 1", lost("1")),
            note="The statistics are shared by the features; weight and bias are not.",
        ),
    ]


def _finite(loss: float) -> float:
    """Bound a diverged loss from below by that of guessing among 65 letters."""
    return loss if math.isfinite(loss) else 10.0


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw test losses, and accuracy on mixed features."""
    left, right = figure.subplots(1, 2)
    rows = [_evaluated_loss(results, kind)[1] for kind in _NORMS]
    points(left, list(_NORMS), rows, indices=(1, 0, 7))
    left.set(title="Test loss of a small transformer", ylabel="nats per letter")
    groups = {
        kind: [_evaluated_mixed(results, s, kind)[1] for s in ("1", "1000")]
        for kind in ("batch norm", "layer norm")
    }
    bars_by_group(right, ("all of scale 1", "half of scale 1000"), groups)
    right.set(title="Features of mixed scale", ylabel="test accuracy, %")
    right.legend(loc="lower left")


STUDY = Study(
    id="S14",
    title="layer norm",
    question="Where does layer norm beat batch norm, and where does it lose?",
    prediction="It ignores the batch and wins in a transformer; it loses on features "
    "of mixed scale.",
    seen="Left: test loss of a small language model by norm, each at its best rate. "
    "Right: when half of the columns are a thousand times larger than those that "
    "matter, layer norm loses them; batch norm scales each column.",
    meaning="Layer norm's output does not depend on the rest of the batch; on letters "
    "without padding, where batches resemble one another, batch norm is not behind. "
    "Features of different units should be scaled one by one.",
    arms=("layer norm", "batch norm over batch and tokens", "no norm"),
    metric="Test loss of a two-block transformer on letters, best of four rates by "
    "validation; accuracy on twenty features of which ten are noise of scale 1000, "
    "best of six.",
    criterion="C53: outputs equal to 1e-6 in other batches, test loss lower by "
    "0.01. C55: five points lost to batch norm.",
    claims=("C53", "C55"),
    minutes=4,
    scales={
        "quick": Scale(
            2, {"steps": 30, "batch": 8, "context": 16, "size": 16, "rows": 400}
        ),
        "cpu": Scale(
            10, {"steps": 300, "batch": 12, "context": 24, "size": 32, "rows": 1000}
        ),
        "gpu": Scale(
            5, {"steps": 5000, "batch": 64, "context": 128, "size": 256, "rows": 5000}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)
