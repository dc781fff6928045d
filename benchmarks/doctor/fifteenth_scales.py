"""The fifteenth set: scales of inputs, of norms, and of what is trained."""

from __future__ import annotations

import itertools

import torch
from bugs import Run, bug
from fifteenth_data import digits, glyphs, loader, parts
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch


def _stages(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(inputs, width, 3, 1 if inputs == width else 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 8)
    )


@bug("forum: weights_init of DCGAN in a network of one's own", "D19", "D22", "D21")
def weights_as_in_the_tutorial(is_bad: bool) -> Run:
    """Initialise as the tutorial does."""
    model = _stages(1, 16, 24, 24, 32, 32)

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.0 if is_bad else 1.0, 0.02)
            nn.init.zeros_(module.bias)

    model.apply(init)
    train = loader(glyphs(1200, 1), 64)
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.5, 0.999))
    with watch(model, optimizer, every=5) as seen:
        for _ in range(20):
            for x, y in train:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(glyphs(512, 2)), seen.findings())


@bug("forum: weight decay on batch norm parameters", "D14", "D19")
def decay_of_a_recipe(is_bad: bool) -> Run:
    """Take the decay of a recipe."""
    model = _stages(1, 16, 32, 32, 32)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    free = [p for m in norms for p in m.parameters()]
    held = {id(p) for p in free}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in held]},
        {"params": free, "weight_decay": 0.05 if is_bad else 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    train = loader(glyphs(1200, 5, 0.8))
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            for x, y in train:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            schedule.step()
    model.eval()
    return Run(model, parts(glyphs(512, 6, 0.8)), seen.findings())


class RowTransformer(nn.Module):
    """A transformer on the rows of digits."""

    def __init__(
        self, layers: int, *, width: int = 32, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for p in self.encoder.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of digits (N, 1, 8, 8)."""
        h = self.embed(x.squeeze(1).to(self.place.dtype)) + self.place
        return self.head(self.encoder(h).mean(1))


def _scores(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.float(), y)


@bug("issue: training with model.to(bfloat16) stalls", "D16", "D27")
def transformer_in_bfloat16(is_bad: bool) -> Run:
    """Reduced precision, for memory."""
    train, test = digits()
    model = RowTransformer(2)
    if is_bad:
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(16):
            for x, y in loader(train):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=not is_bad):
                    scores = model(x)
                _scores(scores, y).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts(test), seen.findings(), _scores)
