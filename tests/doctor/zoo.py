"""Healthy programs: what many people train, done as it should be.

Each gives what a diagnosis needs. The doctor must find nothing to alarm in them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import Residual, batches, build
from normkit.doctor import Finding, diagnose, watch

Batch = Any
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@dataclass
class Program:
    """A model, how it trains, and how it is examined."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor] | None = F.cross_entropy
    data: Callable[[int], list[Batch]] = field(default=lambda seed: batches(seed=seed))
    optimizer: Callable[[Any], torch.optim.Optimizer] = SGD
    forward: Callable[[nn.Module, Batch], Any] | None = None
    step: Callable[[nn.Module, Batch], Tensor] | None = None
    epochs: int = 5


PROGRAMS: dict[str, Callable[[], Program]] = {}
# Those that read MNIST and CIFAR-10 from the folder that NORMKIT_DATA names.
ON_FILES: dict[str, Callable[[], Program]] = {}


def program(make: Callable[[], Program]) -> Callable[[], Program]:
    PROGRAMS[make.__name__] = make
    return make


def program_on_files(make: Callable[[], Program]) -> Callable[[], Program]:
    ON_FILES[make.__name__] = make
    return make


def run(name: str, seed: int) -> tuple[list[Finding], list[Finding], float]:
    """Train a program; the readings of diagnosis and watch, and the last loss."""
    torch.manual_seed(seed)
    it = (PROGRAMS | ON_FILES)[name]()
    forward = it.forward or (lambda model, batch: model(batch[0]))

    def step(model: nn.Module, batch: Batch) -> Tensor:
        if it.step is not None:
            return it.step(model, batch)
        return it.loss_fn(forward(model, batch), batch[1])

    wanted = [p for p in it.model.parameters() if p.requires_grad]
    optimizer = it.optimizer(wanted)
    steps = it.epochs * len(it.data(0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.tensor(math.nan)
    with watch(it.model, optimizer, every=10) as seen:
        for epoch in range(it.epochs):
            it.model.train()
            for batch in it.data(100 * seed + epoch):
                loss = step(it.model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                seen.log(loss=loss.item())
            it.model.eval()
            with torch.no_grad():
                for batch in it.data(99)[:2]:
                    forward(it.model, batch)
    found = diagnose(it.model, it.data(7), it.loss_fn, forward=it.forward)
    return found.readings, seen.readings(), loss.item()


def _init(model: nn.Module, kind: str = "relu") -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity=kind)
            nn.init.zeros_(module.bias)
    return model


def seeded(make: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    return make(*args, seed=int(torch.randint(1 << 30, ())), **options)


@program
def mlp_bn() -> Program:
    return Program(seeded(build, "mlp"))


@program
def mlp_bn_adam() -> Program:
    adam = functools.partial(torch.optim.Adam, lr=2e-3)
    return Program(seeded(build, "mlp"), optimizer=adam)


@program
def mlp_bn_sigmoid() -> Program:
    return Program(seeded(build, "mlp", act=nn.Sigmoid, depth=3))


@program
def mlp_bn_tanh_deep() -> Program:
    return Program(seeded(build, "mlp", act=nn.Tanh, depth=8))


@program
def mlp_plain_kaiming() -> Program:
    return Program(_init(seeded(build, "mlp", normalized=False)))


@program
def mlp_plain_torch_init() -> Program:
    return Program(seeded(build, "mlp", normalized=False, depth=2))


@program
def mlp_plain_tanh_xavier() -> Program:
    model = seeded(build, "mlp", act=nn.Tanh, normalized=False, depth=3)
    return Program(_init(model, "tanh"))


@program
def mlp_layer_norm() -> Program:
    layers: list[nn.Module] = []
    for index in range(3):
        width = 48 if index else 64
        layers += [nn.Linear(width, 48), nn.LayerNorm(48), nn.GELU()]
    return Program(nn.Sequential(*layers, nn.Linear(48, 10)))


@program
def mlp_dropout_after() -> Program:
    model = seeded(build, "mlp", depth=3)
    return Program(nn.Sequential(model[:-1], nn.Dropout(0.5), model[-1]))


@program
def cnn_bn() -> Program:
    return Program(seeded(build, "cnn"))


@program
def cnn_bn_adamw() -> Program:
    adamw = functools.partial(torch.optim.AdamW, lr=3e-3)
    return Program(seeded(build, "cnn"), optimizer=adamw)


@program
def cnn_bn_decay() -> Program:
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    return Program(seeded(build, "cnn"), optimizer=sgd)


@program
def cnn_small_momentum_long() -> Program:
    return Program(seeded(build, "cnn", depth=2, momentum=0.02), epochs=8)


@program
def cnn_plain_kaiming() -> Program:
    return Program(_init(seeded(build, "cnn", normalized=False, depth=3)))


@program
def cnn_group_norm() -> Program:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(3):
        layers += [nn.Conv2d(16 if index else 1, 16, 3, padding=1)]
        layers += [nn.GroupNorm(4, 16), nn.ReLU(inplace=True)]
    return Program(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    )


@program
def cnn_wide_pooled() -> Program:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before, after in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return Program(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10)))


@program
def cnn_depthwise() -> Program:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3)]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)]
        layers += [nn.BatchNorm2d(16), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return Program(nn.Sequential(*layers, *end))


@program
def residual_bn() -> Program:
    return Program(seeded(build, "residual"))


@program
def residual_zero_gamma() -> Program:
    model = seeded(build, "residual")
    for module in model.modules():
        if isinstance(module, Residual):
            nn.init.zeros_(module.norm2.weight)
    return Program(model)


@program
def residual_small_batch() -> Program:
    return Program(
        seeded(build, "residual"), data=lambda seed: batches(16, seed)[:70], epochs=3
    )


class Functional(nn.Module):
    """Activations and pooling as functions, as in most tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x.view(-1, 1, 8, 8)))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.dropout(F.relu(self.fc1(x.flatten(1))), 0.2, self.training)
        return self.fc2(x)


@program
def functional_cnn() -> Program:
    return Program(Functional())


class Transformer(nn.Module):
    """A small vision transformer on the rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.1, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.embed(x.view(-1, 8, 8)) + self.position)
        return self.head(self.norm(x).mean(1))


@program
def vision_transformer() -> Program:
    adamw = functools.partial(torch.optim.AdamW, lr=2e-3)
    return Program(Transformer(), optimizer=adamw)


class Recurrent(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.rnn = kind(8, 32, batch_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x.view(-1, 8, 8))[0][:, -1]))


@program
def gru() -> Program:
    return Program(
        Recurrent(nn.GRU), optimizer=functools.partial(torch.optim.Adam, lr=5e-3)
    )


@program
def lstm() -> Program:
    return Program(
        Recurrent(nn.LSTM), optimizer=functools.partial(torch.optim.Adam, lr=5e-3)
    )


class Siamese(nn.Module):
    """Two views through one network, one loss."""

    def __init__(self) -> None:
        super().__init__()
        body = seeded(build, "mlp", depth=2)
        self.body = nn.Sequential(*body[:-1], nn.Linear(48, 16))

    def forward(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(pair[:, 0]), self.body(pair[:, 1])


@program
def siamese() -> Program:
    def pairs(seed: int) -> list[Batch]:
        g = torch.Generator().manual_seed(seed)
        out = []
        for x, y in batches(seed=seed):
            other = torch.randperm(len(x), generator=g)
            same = (y == y[other]).float()
            out.append((torch.stack([x, x[other]], 1), same))
        return out

    def loss(output: tuple[Tensor, Tensor], same: Tensor) -> Tensor:
        away = (output[0] - output[1]).square().mean(1)
        return (same * away + (1 - same) * F.relu(1 - away)).mean()

    return Program(Siamese(), loss, pairs)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 16)
        )
        self.decoder = nn.Sequential(
            nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 64)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decoder(z), mean, log_var


@program
def variational_autoencoder() -> Program:
    def loss(output: tuple[Tensor, ...], targets: Batch) -> Tensor:
        y, mean, log_var = output
        x = targets[0] if isinstance(targets, list | tuple) else targets
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return (y - x).square().sum(1).mean() + 0.1 * kl

    def data(seed: int) -> list[Batch]:
        return [(x, x) for x, _ in batches(seed=seed)]

    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    return Program(Autoencoder(), loss, data, optimizer=adam)


@program
def regression_bn() -> Program:
    model = seeded(build, "mlp", depth=2)
    model[-1] = nn.Linear(48, 1)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(output.squeeze(1), targets.float())

    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    return Program(model, loss, optimizer=adam)


@program
def binary_sigmoid_output() -> Program:
    model = seeded(build, "mlp", depth=2)
    model[-1] = nn.Linear(48, 1)
    model.append(nn.Sigmoid())

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy(output.squeeze(1), (targets > 4).float())

    return Program(model, loss)


class FineTuned(nn.Module):
    """A trained body with frozen batch norms, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        body = seeded(build, "cnn", depth=3)
        from doctor.models import train

        train(body, 100)
        self.body = nn.Sequential(*body[:-1])
        self.head = nn.Linear(32, 2)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@program
def fine_tuned_frozen_norms() -> Program:
    def data(seed: int) -> list[Batch]:
        return [(x.flip(1), y % 2) for x, y in batches(seed=seed)]

    return Program(FineTuned(), data=data)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


@program
def squeeze_excitation() -> Program:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(3):
        layers += [nn.Conv2d(16 if index else 1, 16, 3, padding=1)]
        layers += [nn.BatchNorm2d(16), nn.SiLU(), Gate(16)]
    end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)]
    return Program(nn.Sequential(*layers, *end))


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LayerNorm(48),
            nn.LeakyReLU(0.2), nn.Linear(48, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@program
def gan_generator() -> Program:
    """A generator with batch norm; its critic learns inside the step."""
    model = nn.Sequential(
        nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 64), nn.Tanh(),
    )  # fmt: skip
    critic = Critic()
    other = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.99))

    def data(seed: int) -> list[Batch]:
        g = torch.Generator().manual_seed(seed)
        return [(torch.randn(64, 8, generator=g), x) for x, _ in batches(seed=seed)]

    def step(model: nn.Module, batch: Batch) -> Tensor:
        z, x = batch
        with torch.no_grad():
            fake = model(z)
        other.zero_grad()
        (F.softplus(-critic(x)) + F.softplus(critic(fake))).mean().backward()
        other.step()
        return F.softplus(-critic(model(z))).mean()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.softplus(-critic(output)).mean()

    adam = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.99))
    return Program(model, loss, data, optimizer=adam, step=step)


@program
def sequence_bn() -> Program:
    """Convolutions over the rows of a digit, all of one length."""
    model = nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 24, 3, padding=1), nn.BatchNorm1d(24),
        nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1), nn.BatchNorm1d(24), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    return Program(model)


@program
def instance_norm() -> Program:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for index in range(2):
        layers += [nn.Conv2d(16 if index else 1, 16, 3, padding=1)]
        layers += [nn.InstanceNorm2d(16, affine=True), nn.ReLU()]
    end = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)]
    return Program(nn.Sequential(*layers, *end))


@functools.cache
def images(file: str, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Images `(N, C, H, W)` of mean 0 and variance 1, and their classes."""
    with np.load(Path(os.environ["NORMKIT_DATA"]) / file) as held:
        x, y = held["x_train"][:count], held["y_train"][:count]
    x = torch.from_numpy(x).float()
    x = x[:, None] if x.dim() == 3 else x.movedim(-1, 1)
    return (x - x.mean()) / x.std(), torch.from_numpy(y).long().flatten()


def of_images(file: str) -> Callable[[int], list[Batch]]:
    def data(seed: int) -> list[Batch]:
        x, y = images(file)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = order[:2048].split(64)
        return [(x[part], y[part]) for part in parts]

    return data


MNIST, CIFAR = of_images("mnist.npz"), of_images("cifar10_12k.npz")


def convolutions(channels: int, *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((channels, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return nn.Sequential(*layers, *end)


@program_on_files
def mnist_mlp_bn() -> Program:
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(3):
        layers += [nn.Linear(96 if index else 784, 96), nn.BatchNorm1d(96), nn.ReLU()]
    return Program(nn.Sequential(*layers, nn.Linear(96, 10)), data=MNIST)


@program_on_files
def mnist_cnn_bn() -> Program:
    return Program(convolutions(1, 8, 16, 32), data=MNIST)


@program_on_files
def mnist_gru() -> Program:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(28, 48, batch_first=True), nn.Linear(48, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.squeeze(1))[0][:, -1])

    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    return Program(Rows(), data=MNIST, optimizer=adam, epochs=3)


@program_on_files
def cifar_cnn_bn() -> Program:
    return Program(convolutions(3, 16, 32, 32), data=CIFAR)


@program_on_files
def cifar_residual_bn() -> Program:
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Residual(16, nn.BatchNorm2d, nn.ReLU) for _ in range(2)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )
    return Program(model, data=CIFAR, epochs=3)


@program_on_files
def cifar_vision_transformer() -> Program:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 32, 8, 8)
            self.position = nn.Parameter(0.02 * torch.randn(16, 32))
            layer = nn.TransformerEncoderLayer(
                32, 4, 64, dropout=0.1, batch_first=True, norm_first=True
            )
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).mT + self.position
            return self.head(self.norm(self.body(x)).mean(1))

    adamw = functools.partial(torch.optim.AdamW, lr=2e-3)
    return Program(Patches(), data=CIFAR, optimizer=adamw)
