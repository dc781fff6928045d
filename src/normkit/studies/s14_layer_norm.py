"""S14: layer norm against batch norm, in a transformer and on mixed features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.nn import BatchNorm1d, LayerNorm
from normkit.studies.figure import band, points
from normkit.studies.study import Result, Scale, Study, Trial
from normkit.studies.training import accuracy, frozen
from normkit.studies.verdict import Verdict, at_least, at_most, reported, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATES = (1e-3, 3e-3)
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
    cut = len(text) * 9 // 10
    losses: dict[str, list[float]] = {}
    gap: dict[str, float] = {}
    for kind in _NORMS:
        found = []
        for rate in _RATES:
            torch.manual_seed(trial.seed)
            model = _Transformer(int(text.max()) + 1, context, size, kind)
            trained = _train(trial, model, text[:cut], steps, batch, context, rate)
            found.append(_loss(trial, model, text[cut:], batch, context))
            gap[kind] = found[-1] - trained
        losses[kind] = found
    return {
        "losses": losses,
        "gap": gap,
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
) -> float:
    """Train by AdamW; the training loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = trial.generator(1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20)
        x, y = _draw(text, batch, context, generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


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


def _mixed(trial: Trial, rows: int) -> dict[str, dict[str, float]]:
    """Measure accuracy on rows whose label is in small columns next to large ones.

    Ten columns of scale 1 carry the label, ten of scale 1000 are noise.
    """
    generator = trial.generator(4)
    label = torch.randint(2, (2 * rows,), generator=generator)
    small = torch.randn(2 * rows, 10, generator=generator)
    small[:, :5] += (2 * label[:, None] - 1) * 0.7
    alike = torch.randn(2 * rows, 10, generator=generator)
    found: dict[str, dict[str, float]] = {}
    for scale in (1.0, 1000.0):
        x = torch.cat([small, scale * alike], 1)
        found[f"{scale:g}"] = {}
        for kind in ("batch norm", "layer norm"):
            torch.manual_seed(trial.seed)
            first = BatchNorm1d(20) if kind == "batch norm" else LayerNorm(20)
            model = nn.Sequential(first, nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
            optimizer = torch.optim.Adam(model.parameters(), 0.01)
            order = trial.generator(5)
            for _ in range(200):
                pick = torch.randint(rows, (64,), generator=order)
                loss = F.cross_entropy(model(x[pick]), label[pick])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            found[f"{scale:g}"][kind] = 100 * accuracy(model, x[rows:], label[rows:])
    return found


def evaluate(results: list[Result]) -> list[Verdict]:
    """Apply the rule to the results of all seeds."""

    def lower(kind: str) -> list[float]:
        """Return the validation loss of `kind` minus that of layer norm, best rates."""
        return [
            min(_finite(r["losses"][kind])) - min(_finite(r["losses"]["layer norm"]))
            for r in results
        ]

    def mixed(scale: str) -> list[float]:
        return [
            r["mixed"][scale]["batch norm"] - r["mixed"][scale]["layer norm"]
            for r in results
        ]

    return [
        verdict(
            "C53",
            at_most(
                "change of a layer-norm output with the rest of the batch",
                [r["alone_error"]["layer norm"] for r in results],
                1e-6,
            ),
            at_least(
                "validation loss in a transformer, batch norm − layer norm",
                lower("batch norm"),
                0.01,
                none=0,
            ),
            reported(
                "the same change, batch norm",
                [r["alone_error"]["batch norm"] for r in results],
            ),
            reported("validation loss, no norm − layer norm", lower("none")),
        ),
        verdict(
            "C55",
            at_least(
                "points that layer norm loses to batch norm, scales 1 and 1000",
                mixed("1000"),
                5,
                none=0,
            ),
            reported("the same, all scales 1", mixed("1")),
            note="The statistics are shared by the features; weight and bias are not.",
        ),
    ]


def _finite(losses: list[float]) -> list[float]:
    """Bound a diverged loss from below by that of guessing among 65 letters."""
    return [v if math.isfinite(v) else 10.0 for v in losses]


def draw(figure: Figure, results: list[Result]) -> None:
    """Draw validation losses, and accuracy on mixed features."""
    left, right = figure.subplots(1, 2)
    rows = [[min(_finite(r["losses"][kind])) for r in results] for kind in _NORMS]
    points(left, list(_NORMS), rows, indices=(1, 0, 7))
    left.set(title="Validation loss of a small transformer", ylabel="nats per letter")
    for i, kind in enumerate(("batch norm", "layer norm")):
        curves = [[r["mixed"][s][kind] for s in ("1", "1000")] for r in results]
        band(right, (0, 1), curves, label=kind, index=i)
    right.set_xticks((0, 1), ["all of scale 1", "half of scale 1000"])
    right.set(
        title="Features of mixed scale", ylabel="test accuracy, %", xlim=(-0.2, 1.2)
    )
    right.legend()


STUDY = Study(
    id="S14",
    title="layer norm",
    question="Where does layer norm beat batch norm, and where does it lose?",
    prediction="It ignores the batch and wins in a transformer; it loses on features "
    "of mixed scale.",
    arms=("layer norm", "batch norm over batch and tokens", "no norm"),
    metric="Validation loss of a two-block transformer on letters, best of two rates; "
    "accuracy on twenty features of which ten are noise of scale 1000.",
    criterion="C53: outputs equal to 1e-6 in other batches, validation loss lower "
    "by 0.01. C55: five points lost to batch norm.",
    claims=("C53", "C55"),
    minutes=4,
    scales={
        "quick": Scale(
            2, {"steps": 30, "batch": 8, "context": 16, "size": 16, "rows": 400}
        ),
        "cpu": Scale(
            5, {"steps": 250, "batch": 16, "context": 32, "size": 48, "rows": 1000}
        ),
        "gpu": Scale(
            5, {"steps": 5000, "batch": 64, "context": 128, "size": 256, "rows": 5000}
        ),
    },
    measure=measure,
    evaluate=evaluate,
    draw=draw,
)
