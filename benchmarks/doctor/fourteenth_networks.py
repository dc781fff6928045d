"""Networks of the fourteenth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

__all__ = [
    "VAE",
    "AdviceNet",
    "Compressor",
    "Critic",
    "Discriminator",
    "Generator",
    "GraphNet",
    "LeafNet",
    "OwnNorm",
    "PlumeNet",
    "Prototypes",
    "RatingNet",
    "Recogniser",
    "ReturnNet",
    "Reverser",
    "SaleNet",
    "ScanNet",
    "SiteNet",
    "figure_net",
]


def block(
    fan_in: int, fan_out: int, stride: int = 1, norm: Any = nn.BatchNorm2d
) -> Any:
    """Return a convolution, a norm and a rectifier."""
    conv = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
    return nn.Sequential(conv, norm(fan_out), nn.ReLU())


class Generator(nn.Module):
    """One step down, one step up, with a skip: photographs from plans."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = block(3, width)
        self.down = block(width, 2 * width, 2)
        self.mid = block(2 * width, 2 * width)
        self.up = block(3 * width, width)
        self.leave = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Photographs (N, 2, H, W) of plans (N, 3, H, W)."""
        a = self.enter(x)
        b = F.interpolate(self.mid(self.down(a)), scale_factor=2)
        return self.leave(self.up(torch.cat([a, b], 1))).tanh()


class Discriminator(nn.Module):
    """Scores of patches of a photograph beside its plan."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(5, width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """Scores (N, 1, h, w)."""
        return self.net(torch.cat([x, image], 1))


class ScanNet(nn.Module):
    """Convolutions in three dimensions, and a head with batch norms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 8, 3, 2, 1, bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(128, 32, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 32, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Linear(32, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Size and brightness (N, 2) of the lesion in scans (N, 1, D, H, W)."""
        return self.head(self.features(x))


class SaleNet(nn.Module):
    """A perceptron with batch norms for the demand."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(6, width, bias=False), nn.BatchNorm1d(width)
        self.fc2, self.bn2 = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Demand (N, 1) of weeks (N, 6)."""
        x = F.relu(self.bn1(self.fc1(x)))
        return self.out(F.relu(self.bn2(self.fc2(x))))


class SiteNet(nn.Module):
    """Convolutions with batch norms, and a linear head."""

    def __init__(self, kinds: int = 6, width: int = 16) -> None:
        super().__init__()
        self.stem = block(1, width)
        self.layer1 = block(width, 2 * width, 2)
        self.layer2 = block(2 * width, 2 * width)
        self.layer3 = block(2 * width, 2 * width)
        self.fc = nn.Linear(2 * width, kinds)

    def features(self, x: Tensor) -> Tensor:
        """Vectors (N, C) of images."""
        return self.layer3(self.layer2(self.layer1(self.stem(x)))).amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, H, W)."""
        return self.fc(self.features(x))


class OwnNorm(nn.Module):
    """A batch norm that is written by hand; its averages start at zero.

    With `is_corrected` they are divided by the share of them that has been seen.
    """

    def __init__(self, width: int, decay: float, *, is_corrected: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.decay, self.is_corrected = decay, is_corrected
        self.register_buffer("moving_mean", torch.zeros(width))
        self.register_buffer("moving_var", torch.zeros(width))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C)."""
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.moving_mean.lerp_(mean, 1 - self.decay)
                self.moving_var.lerp_(var, 1 - self.decay)
                self.seen += 1
        else:
            share = 1 - self.decay**self.seen if self.is_corrected else 1.0
            mean, var = self.moving_mean / share, self.moving_var / share
        return (x - mean) / (var + 1e-5).sqrt() * self.gamma + self.beta


class LeafNet(nn.Module):
    """Convolutions with group norms; the last one is in front of the mean."""

    def __init__(self, *, is_each_channel: bool, width: int = 24) -> None:
        super().__init__()
        groups = width if is_each_channel else 1
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, 2, 1)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm3 = nn.GroupNorm(groups, width)
        self.fc = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of photographs (N, 3, H, W)."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(self.norm3(self.conv3(x)).mean((2, 3)))


class ReturnNet(nn.Module):
    """An instance norm of the window, two convolutions, and a maximum over time."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, affine=True)
        self.conv1 = nn.Conv1d(1, width, 9, padding=4)
        self.conv2 = nn.Conv1d(width, width, 5, padding=2)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of patterns in returns (N, 1, L)."""
        x = F.relu(self.conv1(self.norm(x)))
        return self.fc(F.relu(self.conv2(x)).amax(2))


class Critic(nn.Module):
    """The value of an action in a state, by a perceptron with batch norms."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(6),
            nn.Linear(6, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        """Values (N, 1) of states (N, 4) and actions (N, 2)."""
        return self.net(torch.cat([s, a], 1))


class Prototypes(nn.Module):
    """Vectors of images; an image belongs to the kind with the nearest mean."""

    def __init__(self, *, is_tracked: bool, kinds: int = 4, width: int = 24) -> None:
        super().__init__()
        self.kinds = kinds

        def norm(width: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(width, track_running_stats=is_tracked)

        self.encoder = nn.Sequential(
            block(1, width, norm=norm),
            nn.MaxPool2d(2),
            block(width, width, norm=norm),
            nn.MaxPool2d(2),
            block(width, width, norm=norm),
            nn.Flatten(),
        )

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores (Q, K) of images that are asked about."""
        known = self.encoder(support)
        means = known.reshape(self.kinds, -1, known.shape[1]).mean(1)
        asked = self.encoder(query)
        return -(asked[:, None] - means).square().mean(2) * 10


class Encoder(nn.Module):
    """Convolutions over time with batch norms, and a recurrent layer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            layers.append(
                nn.Conv1d(width if index else 8, width, 3, padding=1, bias=False)
            )
            layers += [nn.BatchNorm1d(width), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.rnn = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """States (N, L, C) of spectra (N, B, L)."""
        return self.rnn(self.conv(x).mT)[0]


class Decoder(nn.Module):
    """A recurrent layer that attends to the states of an encoder."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words + 1, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(2 * width, words)

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        """Scores (N, K, L) of words; `before` has the words in front of them."""
        x, _ = self.rnn(self.embed(before), states[:, -1][None].contiguous())
        read = F.scaled_dot_product_attention(x, states, states)
        return self.out(self.dropout(torch.cat([x, read], 2))).mT


class Recogniser(nn.Module):
    """An encoder of spectra and a decoder of words."""

    def __init__(self, width: int = 32, depth: int = 6, words: int = 6) -> None:
        super().__init__()
        self.words = words
        self.encoder, self.decoder = Encoder(width, depth), Decoder(width, words)

    def forward(self, spectra: Tensor, said: Tensor) -> Tensor:
        """Scores (N, K, 4) of what is said, each from the words before it."""
        before = F.pad(said[:, :-1], (1, 0), value=self.words)
        return self.decoder(self.encoder(spectra), before)


class RatingNet(nn.Module):
    """A report and figures of a firm, side by side, in one layer norm."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(20)
        self.fc1, self.fc2 = nn.Linear(20, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 4)

    def forward(self, text: Tensor, figures: Tensor) -> Tensor:
        """Scores (N, 4) of ratings."""
        x = self.norm(torch.cat([text, figures], 1))
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


class AdviceNet(nn.Module):
    """The policy of an agent that makes one of five offers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.affine1, self.affine2 = nn.Linear(8, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 5) of the offers."""
        return self.affine2(F.relu(self.affine1(x)))


class PlumeNet(nn.Module):
    """Four layers of tanh from a place and a time to a density."""

    def __init__(self, *, is_scaled: bool, width: int = 48) -> None:
        super().__init__()
        self.is_scaled = is_scaled
        layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Densities (N, 1) at places in metres and times in seconds."""
        if self.is_scaled:
            x, t = x / 1000 - 1, t / 1800 - 1
        return self.net(torch.cat([x, t], 1))


class GraphNet(nn.Module):
    """Graph convolutions over links; with or without a division by the degrees."""

    def __init__(self, *, is_divided: bool, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.is_divided = is_divided
        sizes = [6] + depth * [width]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in itertools.pairwise(sizes)
        )
        self.out = nn.Linear(width + 6, 4)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        """Scores (N, 4, nodes) of the groups of nodes (N, nodes, 6)."""
        if self.is_divided:
            root = links.sum(2).rsqrt()
            links = root[:, :, None] * links * root[:, None]
        h = x
        for layer in self.layers:
            h = F.relu(links @ layer(h))
        return self.out(torch.cat([h, x], 2)).mT


class Compressor(nn.Module):
    """An autoencoder: an encoder to six numbers, and a decoder."""

    def __init__(self, width: int = 96, code: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, code),
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 64),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 64) again."""
        return self.decoder(self.encoder(x))


class VAE(nn.Module):
    """A variational autoencoder; the draw of the code may cut the gradient off."""

    def __init__(self, *, is_cut: bool, width: int = 96, code: int = 8) -> None:
        super().__init__()
        self.is_cut, self.divergence = is_cut, torch.zeros(())
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.mu, self.logvar = nn.Linear(width, code), nn.Linear(width, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 64)
        )

    def encode(self, x: Tensor) -> Normal:
        """Distribution of the codes of images (N, 64)."""
        h = self.hidden(self.encoder(x))
        return Normal(self.mu(h), (self.logvar(h) / 2).exp())

    def forward(self, x: Tensor) -> Tensor:
        """Images again: from a draw in training, from the mean otherwise."""
        code = self.encode(x)
        prior = Normal(torch.zeros_like(code.mean), torch.ones_like(code.mean))
        self.divergence = kl_divergence(code, prior).mean()
        if not self.training:
            return self.decoder(code.mean)
        return self.decoder(code.sample() if self.is_cut else code.rsample())


class Reverser(nn.Module):
    """An encoder and a decoder that says a sentence from its end to its start."""

    def __init__(self, words: int = 8, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, words)

    def forward(self, words: Tensor, given: Tensor | None = None) -> Tensor:
        """Scores (N, K, L) of the answer; without `given` by its own words."""
        _, state = self.encoder(self.embed(words))
        if given is not None:
            return self.out(self.decoder(self.embed(given), state)[0]).mT
        word, said = torch.zeros_like(words[:, :1]), []
        for _ in range(words.shape[1]):
            x, state = self.decoder(self.embed(word), state)
            said.append(self.out(x))
            word = said[-1].argmax(2)
        return torch.cat(said, 1).mT


def figure_net(kinds: int = 12, width: int = 64) -> nn.Sequential:
    """Return a perceptron with layer norms for vectors of twenty figures."""
    return nn.Sequential(
        nn.Linear(20, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, kinds),
    )
