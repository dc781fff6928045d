"""The fifteenth set: losses, optimizers, schedules, and pairs of networks."""

from __future__ import annotations

import torch
from bugs import Batch, Run, bug
from fifteenth_data import digits, friedman, loader, parts
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch


class ResidualMLP(nn.Module):
    """Blocks with layer norm on rows."""

    def __init__(self, inputs: int, outputs: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.GELU(),
                nn.Linear(width, width),
            )
            for _ in range(3)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is predicted for the rows."""
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


def _columns(data: Batch) -> Batch:
    x, y = data
    return (x - 0.5) / 0.29, (y - 14.4) / 4.9


@bug("StackOverflow: regression predicts the mean, MSELoss with (N, 1) and (N)", "D34")
def yield_of_a_plant(is_bad: bool) -> Run:
    """Predict a value for each row of a table."""
    x, y = _columns(friedman(1200, 1))
    u, v = _columns(friedman(512, 2))
    if not is_bad:
        y, v = y.unsqueeze(1), v.unsqueeze(1)
    model = ResidualMLP(10, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    criterion = nn.MSELoss()
    with watch(model, optimizer, every=5) as seen:
        for _ in range(12):
            for xs, ys in loader((x, y)):
                optimizer.zero_grad()
                criterion(model(xs), ys).backward()
                optimizer.step()
    model.eval()
    return Run(model, parts((u, v)), seen.findings(), criterion)


@bug("forum: scheduler.step() in the loop over batches", "D27")
def digits_with_a_schedule(is_bad: bool) -> Run:
    """Classify digits with a rate that goes down."""
    train, test = digits()
    model = ResidualMLP(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            for x, y in loader(train):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if is_bad:
                    schedule.step()
            if not is_bad:
                schedule.step()
    model.eval()
    return Run(model, parts(test), seen.findings())


def _trained(model: nn.Module, data: Batch, epochs: int, optimizer: object) -> None:
    for _ in range(epochs):
        for x, y in loader(data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


@bug("forum: new fc layer after the optimizer was made does not train", "D34", "D27")
def new_classes_for_an_old_network(is_bad: bool) -> Run:
    """Low digits first; the head is then changed for the high ones."""
    (x, y), (u, v) = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 5),
    )
    first = torch.optim.Adam(model.parameters(), 1e-3)
    _trained(model, (x[y < 5], y[y < 5]), 4, first)

    for p in model[:-1].parameters():
        p.requires_grad = False
    if is_bad:
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], 2e-3
        )
        model[-1] = nn.Linear(32 * 16, 5)
    else:
        model[-1] = nn.Linear(32 * 16, 5)
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], 2e-3
        )
    with watch(model, optimizer, every=5) as seen:
        _trained(model, (x[y > 4], y[y > 4] - 5), 6, optimizer)
    model.eval()
    return Run(model, parts((u[v > 4], v[v > 4] - 5)), seen.findings())


# The generator's samples are judged by the discriminator, which is what it is
# trained on; diagnose sees the generator with that loss.
class Ring(nn.Module):
    """Makes points of a ring from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 2),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return points."""
        return self.layers(z)


def ring(count: int) -> Tensor:
    """Return points (N, 2) near eight places on a circle."""
    angle = torch.randint(8, (count,)) * torch.pi / 4
    places = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return places + 0.1 * torch.randn(count, 2)


@bug("forum: generator and eval mode, samples differ", "D08", "D32")
def ring_of_eight(is_bad: bool) -> Run:
    """Keep samples now and then, to look at them."""
    maker = Ring()
    judge = nn.Sequential(
        nn.Linear(2, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )
    g = torch.optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.9))
    d = torch.optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.9))
    kept = []

    def look() -> None:
        maker.eval()
        with torch.no_grad():
            kept.append(maker(torch.randn(64, 8)))
        if not is_bad:
            maker.train()

    with watch(maker, g, every=5) as seen:
        for step in range(1500):
            if step % 100 == 0:
                look()
            fake = maker(torch.randn(128, 8))
            loss = F.softplus(-judge(ring(128))) + F.softplus(judge(fake.detach()))
            d.zero_grad()
            loss.mean().backward()
            d.step()
            g.zero_grad()
            F.softplus(-judge(fake)).mean().backward()
            g.step()
    maker.eval()
    judge.requires_grad_(False)
    noise = [(torch.randn(128, 8), ring(128)) for _ in range(8)]
    return Run(
        maker, noise, seen.findings(), lambda fake, _: F.softplus(-judge(fake)).mean()
    )
