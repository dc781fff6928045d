"""The fifteenth set: what is saved and loaded, and the mode that layers are in."""

from __future__ import annotations

import copy
import io

import torch
from bugs import Run, bug
from fifteenth_data import digits, glyphs, loader, parts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from normkit.doctor import watch


def _conv(inputs: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


def _glyph_net() -> nn.Sequential:
    return nn.Sequential(
        _conv(1, 16),
        _conv(16, 32, 2),
        _conv(32, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 8),
    )


@bug("forum: accuracy drops after load_state_dict, strict=False", "D32", "D02", "D01")
def weights_in_a_file(is_bad: bool) -> Run:
    """Save after training, and load into a fresh network for the tests."""
    train = loader(glyphs(1500, 1))
    model = _glyph_net()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            for x, y in train:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    file = io.BytesIO()
    if is_bad:
        torch.save({name: p.data for name, p in model.named_parameters()}, file)
    else:
        torch.save(model.state_dict(), file)
    file.seek(0)

    fresh = _glyph_net()
    fresh.load_state_dict(torch.load(file), strict=False)
    fresh.eval()
    return Run(fresh, parts(glyphs(512, 2)), seen.findings())


class DigitTrainer:
    """Trains for some epochs, and looks at the held-out digits after each."""

    def __init__(self, model: nn.Module, *, is_bad: bool) -> None:
        self.model, self.is_bad = model, is_bad
        self.optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        self.history: list[float] = []

    def fit(self, train: DataLoader, held_out: DataLoader, epochs: int) -> None:
        """Train, and keep the accuracies."""
        for _ in range(epochs):
            self.model.train()
            for x, y in train:
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
            self.history.append(self.validate(held_out))

    @torch.no_grad()
    def validate(self, held_out: DataLoader) -> float:
        """Return the accuracy on the held-out digits."""
        if not self.is_bad:
            self.model.eval()
        right = [int((self.model(x).argmax(1) == y).sum()) for x, y in held_out]
        return sum(right) / len(held_out.dataset)


@bug("StackOverflow: validation loop and batch norm", "D09", "D01", "D13")
def folder_of_validation_images(is_bad: bool) -> Run:
    """Look at the held-out images one at a time, folder by folder."""
    (x, y), test = digits()
    order = y[900:].argsort()
    held_out = loader((x[900:][order], y[900:][order]), 1, shuffle=False)
    model = nn.Sequential(
        _conv(1, 16),
        _conv(16, 32, 2),
        _conv(32, 48),
        _conv(48, 48, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    trainer = DigitTrainer(model, is_bad=is_bad)
    with watch(model, trainer.optimizer, every=5) as seen:
        trainer.fit(loader((x[:900], y[:900])), held_out, 5)
    return Run(model, parts(test), seen.findings())


class TwoTasks(nn.Module):
    """One trunk, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(1, 16), _conv(16, 32, 2), nn.Flatten(), nn.Linear(512, 48), nn.ReLU()
        )
        self.heads = nn.ModuleList([nn.Linear(48, 10)])
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the task at hand."""
        return self.heads[self.task](self.trunk(x))


def _epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader
) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@bug("forum: outputs of frozen layers change while the new head is trained", "D07")
def second_head_on_a_frozen_trunk(is_bad: bool) -> Run:
    """Add a head for photographs in negative; digits should be read as before."""
    (x, y), test = digits()
    model = TwoTasks()
    first = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(5):
        _epoch(model, first, loader((x, y)))

    for p in model.trunk.parameters():
        p.requires_grad = False
    model.heads.append(nn.Linear(48, 2))
    model.task = 1
    second = torch.optim.Adam(model.heads[1].parameters(), 2e-3)
    negative = loader((2 - 3 * x, (y > 4).long()))
    with watch(model, second, every=5) as seen:
        for _ in range(4):
            model.train()
            if not is_bad:
                model.trunk.eval()
            _epoch(model, second, negative)
    model.task = 0
    return Run(model, parts(test), seen.findings())


@bug(
    "lucidrains/ema-pytorch#29, boschresearch/OASIS#21",
    "D31",
    "D32",
    "D01",
)
def average_for_the_release(is_bad: bool) -> Run:
    """Release a moving average of the weights."""
    train = loader(glyphs(1500, 5))
    model = _glyph_net()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for x, y in train:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                with torch.no_grad():
                    pairs = zip(average.parameters(), model.parameters(), strict=True)
                    for mine, new in pairs:
                        mine.lerp_(new, 0.03)
                    if not is_bad:
                        held = zip(average.buffers(), model.buffers(), strict=True)
                        for mine, new in held:
                            mine.copy_(new)
    average.eval()
    return Run(average, parts(glyphs(512, 6)), seen.findings())
