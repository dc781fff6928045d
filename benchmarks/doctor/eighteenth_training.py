"""The eighteenth set: training in general, whether there are norms or not."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from bugs import Run, bug
from eighteenth_data import arms, digit_images, forces, loader, prices, reviews, signs
from eighteenth_networks import VAE
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of the place."""

    def __init__(self, width: int, most: int = 64) -> None:
        super().__init__()
        place = torch.arange(float(most)).unsqueeze(1)
        pace = torch.exp(torch.arange(0.0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(most, width)
        table[:, 0::2], table[:, 1::2] = (place * pace).sin(), (place * pace).cos()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, places, width) with its places."""
        return x + self.table[: x.shape[1]]


class ReviewReader(nn.Module):
    """A transformer encoder of PyTorch over words."""

    def __init__(self, width: int = 32, **layer: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, width)
        self.places = PositionalEncoding(width)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, **layer)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, 1)

    def forward(self, words: Tensor) -> Tensor:
        """Return a logit for each review (N, words)."""
        h = self.encoder(self.places(self.embedding(words)))
        return self.decoder(h.mean(1)).squeeze(1)


# TorchLeet#5 (the default gives a high loss), TabFormer#14 and pytorch#59159 (the batch
# is the second dimension)
@bug(
    "Exorust/TorchLeet#5, IBM/TabFormer#14, pytorch#59159",
    *("D09", "D36"),
)
def encoder_without_batch_first(is_bad: bool) -> Run:
    """Give (N, words, width) to an encoder, and leave batch_first at its default.

    First: an output depends on the other samples of its batch.
    Cost: 80 % in place of 93 %, a loss of 0.40 in place of 0.17.
    """
    model = ReviewReader() if is_bad else ReviewReader(batch_first=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.BCEWithLogitsLoss()
    words, good = reviews(3072, 1)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            model.train()
            for x, y in loader((words, good.float())):
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    words, good = reviews(512, 2)
    held = loader((words, good.float()), shuffle=False)
    return Run(model, list(held), seen.findings(), criterion)


class SentimentLSTM(nn.Module):
    """Two LSTMs in two directions, and a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.lstm = nn.LSTM(16, width, 1, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(2 * width, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return the scores of bad and good."""
        _, (h, _) = self.lstm(self.embedding(words))
        return self.fc(self.dropout(torch.cat([h[0], h[1]], 1)))


# snorkel#870 (the loss remains about 0.69 by a bi-LSTM), caffe#826,
# classifier-builder#6 (is this rate too small, SGD was very slow)
@bug(
    "snorkel-team/snorkel#870, BVLC/caffe#826, testdotai/classifier-builder#6",
    "D27",
)
def sentiment_by_sgd_at_a_thousandth(is_bad: bool) -> Run:
    """Train a bidirectional LSTM by SGD at 0.001, a rate for Adam.

    First: steps are far too small.
    Cost: 46 %, which is a guess, in place of 98 %; a loss of 0.70 in place of 0.05.
    """
    model = SentimentLSTM()
    choice = torch.optim.SGD if is_bad else torch.optim.Adam
    optimizer = choice(model.parameters(), lr=0.001)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            model.train()
            for x, y in loader(reviews(1536, 1)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(reviews(512, 2), shuffle=False)), seen.findings())


class CifarCNN(nn.Module):
    """Convolutions without norms, and two linear layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc1 = nn.Linear(2 * width * 16, 64)
        self.drop = nn.Dropout(0.25)
        self.fc2 = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))


# OpenNMT-py#805 (the rate of SGD for Adam), keras#4066 (one class, an accuracy of 0.1),
# language-modeling#3, sequence_tagging#47
@bug(
    "OpenNMT/OpenNMT-py#805, keras-team/keras#4066, "
    "rajveermalviya/language-modeling#3, guillaumegenthial/sequence_tagging#47",
    *("D27", "D21"),
)
def cifar_network_by_adam_at_the_rate_of_sgd(is_bad: bool) -> Run:
    """Change SGD to Adam, and keep its rate of 0.05.

    First: steps are far too large.
    Cost: 14 %, which is a guess, in place of 95 %; a loss of 1.80 in place of 0.12.
    """
    model = CifarCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05 if is_bad else 0.002)
    images, kind = signs(1024, 1)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            model.train()
            for x, y in loader((3 * images - 1.3, kind)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    images, kind = signs(512, 2)
    held = loader((3 * images - 1.3, kind), shuffle=False)
    return Run(model, list(held), seen.findings())


class PriceLSTM(nn.Module):
    """Two LSTMs and a linear layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, 2, batch_first=True)
        self.linear = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next price (N, 1)."""
        h, _ = self.lstm(x)
        return self.linear(h[:, -1])


# keras#1727 (an LSTM always predicts a constant), lstm_stock_prediction#3 (divide by
# 1000), brain.js#528
@bug(
    "keras-team/keras#1727, etai83/lstm_stock_prediction#3, BrainJS/brain.js#528",
    *("D28", "D34", "D20", "D27"),
)
def share_prices_without_a_scaler(is_bad: bool) -> Run:
    """Give closing prices of about 250 to an LSTM, as inputs and as targets.

    First: inputs and targets are far from zero mean and unit variance.
    Cost: a squared error of five times the variance of prices, not 0.007 of it.
    """
    x, y = prices(2048, 1)
    low, wide = (0.0, 1.0) if is_bad else (x.mean(), x.std())
    model = PriceLSTM()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    loss_fn = nn.MSELoss()
    train = loader(((x - low) / wide, (y - low) / wide))
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            for xs, ys in train:
                optimizer.zero_grad()
                loss = loss_fn(model(xs), ys)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = prices(512, 2)
    held = loader(((x - low) / wide, (y - low) / wide), shuffle=False)
    return Run(model, list(held), seen.findings(), loss_fn)


class Regressor(nn.Module):
    """Blocks of linear layer, batch norm and rectifier."""

    def __init__(self, sizes: list[int], *, ends_in_block: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        layers.append(nn.Linear(sizes[-2], sizes[-1]))
        if ends_in_block:
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return a force."""
        return self.layers(x)


# ProteomicsML#203 (zero for all, by a ReLU behind the last layer), jcjohnson#30 (it
# cannot predict negative values), VoxelNet-tensorflow#10, population_estimation#68
@bug(
    "ProteomicsML/ProteomicsML#203, jcjohnson/pytorch-examples#30, "
    "tsinghua-rll/VoxelNet-tensorflow#10, jvargasmu/population_estimation#68",
    *("D34", "D21"),
)
def forces_behind_a_last_relu(is_bad: bool) -> Run:
    """End a regression in a rectifier, where half of the targets are negative.

    First: the output cannot be negative, as targets are.
    Cost: a squared error of 0.81 in place of 0.11.
    """
    model = Regressor([6, 64, 64, 1], ends_in_block=is_bad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(12):
            model.train()
            for x, y in loader(forces(2048, 1), 64):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(forces(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)


class DigitNet(nn.Module):
    """Hidden layers in a list, as many as are asked for."""

    def __init__(self, width: int = 24, depth: int = 4, *, plain: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        hidden = [nn.Linear(width, width) for _ in range(depth)]
        self.hidden = hidden if plain else nn.ModuleList(hidden)
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of digits."""
        x = torch.relu(self.first(x.flatten(1)))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.last(x)


# pytorch#715 (parameters in a list are not included), pytorch#59925 (optimizers may
# silently fail to update them), pytorch-meta-optimizer#11
@bug(
    "pytorch#715, pytorch#59925, ikostrikov/pytorch-meta-optimizer#11",
    *("D27", "D24"),
)
def hidden_layers_in_a_plain_list(is_bad: bool) -> Run:
    """Keep hidden layers in a list of Python, which registers none of them.

    First: layers are left out of the optimizer.
    Cost: 71 % in place of 94 %, a loss of 1.04 in place of 0.19.
    """
    train, test = digit_images()
    model = DigitNet(plain=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(15):
            for x, y in loader(train):
                optimizer.zero_grad()
                loss = F.cross_entropy(model((x - 0.3) / 0.37), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = test
    held = loader(((x - 0.3) / 0.37, y), shuffle=False)
    return Run(model, list(held), seen.findings())


def reconstruction(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Return the squared error of images."""
    return F.mse_loss(output[0], x)


# podgorskiy/VAE#1 (mean or sum: all images are the same blur), PyTorch-VAE#56 (with a
# weight of 1 it could not learn), WorldModels#12 (the posterior collapses)
@bug(
    "podgorskiy/VAE#1, AntixK/PyTorch-VAE#56, "
    "AppliedDataSciencePartners/WorldModels#12",
    "D34",
)
def vae_of_a_mean_and_a_sum(is_bad: bool) -> Run:
    """Add up the divergence over the batch, and take the mean of the squared error.

    First: one part of the loss outweighs the other, outputs are the same for all.
    Cost: a squared error of 0.075, of one image for all, in place of 0.016.
    """
    (train, _), (test, _) = digit_images()
    train, test = train.flatten(1), test.flatten(1)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    reduction = "mean" if is_bad else "sum"
    with watch(model, optimizer, every=5) as seen:
        for _ in range(25):
            model.train()
            for x, _ in loader((train, train)):
                optimizer.zero_grad()
                again, mu, logvar = model(x)
                loss = F.mse_loss(again, x, reduction=reduction)
                kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
                loss = loss + kld if is_bad else loss + 0.05 * kld
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader((test, test), shuffle=False)
    return Run(model, list(held), seen.findings(), reconstruction)


class Dense(nn.Module):
    """A linear layer of one's own."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of x."""
        return x @ self.weight + self.bias


# pytorch-tpu/transformers#26 (randn makes parameters too large), keras#1597 (it worked
# without RandomNormal), spark-ffm#12
@bug(
    "pytorch-tpu/transformers#26, keras-team/keras#1597, VinceShieh/spark-ffm#12",
    *("D20", "D23"),
)
def dense_layers_drawn_by_randn(is_bad: bool) -> Run:
    """Write linear layers by hand, with weights of torch.randn(), in front of tanh.

    First: units are saturated.
    Cost: 87 % in place of 93 %, a loss of 0.52 in place of 0.19.
    """
    sizes = [4, 128, 128, 128, 4]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        scale = 1.0 if is_bad else 1 / math.sqrt(inputs)
        layers += [Dense(inputs, outputs, scale), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(25):
            for x, y in loader(arms(2048, 1), 64):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(arms(512, 2), shuffle=False)), seen.findings())
