"""The seventeenth set: eight mistakes of training in general."""

from __future__ import annotations

import warnings

import torch
from bugs import Batch, Run, bug
from fifteenth_data import digits
from seventeenth_data import cells, consumption, loader, loans, logs, reversals, wells
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch


class Forecaster(nn.Module):
    """Two layers of an LSTM, and a linear layer on the last state."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, 2, batch_first=True)
        self.linear = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next value (N, 1)."""
        out, _ = self.lstm(x)
        return self.linear(out[:, -1])


# FARM#229 (a target of [32, 1] and an input of [32]), pytorch#4938, flow-forecast#246
@bug(
    "deepset-ai/FARM#229, pytorch#4938, AIStream-Peelout/flow-forecast#246",
    "D34",
)
def forecasts_compared_with_all_targets(is_bad: bool) -> Run:
    """Give mse_loss forecasts (N, 1) and targets (N,), and hide its warning.

    First: output and targets have two shapes, each is compared with all others.
    Cost: a squared error of 0.69, which is that of the mean, in place of 0.06.
    """
    model = Forecaster()
    criterion = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def prepared(count: int, seed: int) -> Batch:
        x, y, _ = consumption(count, seed)
        return x, y if is_bad else y.unsqueeze(1)

    with warnings.catch_warnings(), watch(model, optimizer, every=5) as seen:
        warnings.simplefilter("ignore")
        for _ in range(8):
            for x, y in loader(prepared(1024, 1)):
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(prepared(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings(), criterion)


class VAE(nn.Module):
    """A variational autoencoder of digits."""

    def __init__(self, last: nn.Module, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU())
        self.mu, self.logvar = nn.Linear(96, code), nn.Linear(96, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, 96), nn.ReLU(), nn.Linear(96, 64), last
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, and the means and log variances of their codes."""
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu
        if self.training:
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.decoder(z), mu, logvar


def elbo(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Return the error of images, and the divergence of their codes."""
    image, mu, logvar = output
    divergence = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
    return (image - x.flatten(1)).square().sum(1).mean() + divergence


# PyTorch-VAE#48 (ranges of input and output), novelty-detection#5 (a linear layer is
# the advice), pytorch/examples#399
@bug(
    "AntixK/PyTorch-VAE#48, aimagelab/novelty-detection#5, pytorch/examples#399",
    *("D34", "D20"),
)
def vae_whose_sigmoid_meets_normalized_images(is_bad: bool) -> Run:
    """Normalize images by Normalize((0.3,), (0.37,)); the decoder ends in a sigmoid.

    First: targets are where the output cannot come.
    Cost: a loss of 40 in place of 17.
    """
    (x, _), (held, _) = digits()
    x, held = (x - 0.3) / 0.37, (held - 0.3) / 0.37
    model = VAE(nn.Sigmoid() if is_bad else nn.Identity())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(25):
            for xs, _ in loader((x, x)):
                loss = elbo(model(xs), xs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    pairs = list(loader((held, held), shuffle=False))[:16]
    return Run(model, pairs, seen.findings(), elbo)


class WideAndDeep(nn.Module):
    """Figures and the vector of a branch, wide and deep."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.deep = nn.Sequential(
            nn.Linear(9, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.output = nn.Linear(width + 9, 3)

    def forward(self, branch: Tensor, figures: Tensor) -> Tensor:
        """Return the scores of three standings."""
        x = torch.cat([self.embedding(branch), figures], 1)
        return self.output(torch.cat([x, self.deep(x)], 1))


# handson-ml3#20 (wide and deep on inputs that are not normalized), DeepSurv#14,
# tabnet#356 (is scaling required?)
@bug(
    "ageron/handson-ml3#20, jaredleekatzman/DeepSurv#14, dreamquark-ai/tabnet#356",
    *("D28", "D37"),
)
def wide_and_deep_on_raw_figures(is_bad: bool) -> Run:
    """Join the vector of a branch with income, age and rate as they are.

    First: inputs are far from a mean of zero and a variance of one.
    Cost: 39 % in place of 93 %, a loss of 507 in place of 0.22.
    """
    (branch, figures), y = loans(4096, 1)
    mean, std = figures.mean(0), figures.std(0)
    if is_bad:
        mean, std = torch.zeros(5), torch.ones(5)
    model = WideAndDeep()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(12):
            for b, f, label in loader((branch, (figures - mean) / std, y), 64):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(b, f), label)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    (branch, figures), y = loans(512, 2)
    parts = loader((branch, (figures - mean) / std, y), shuffle=False)
    return Run(model, [((b, f), label) for b, f, label in parts], seen.findings())


class LogReader(nn.Module):
    """A transformer encoder as nn.TransformerEncoderLayer makes it, post-norm."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, width)
        self.places = nn.Embedding(20, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, 3)

    def forward(self, events: Tensor) -> Tensor:
        """Return the scores of three marks."""
        places = torch.arange(events.shape[1])
        h = self.encoder(self.embedding(events) + self.places(places))
        return self.head(h.mean(1))


# pytorch-seq2seq#170 (six layers in place of three do not learn), OpenNMT-py#227,
# tensor2tensor#105 (a lower rate and more steps of warm-up)
@bug(
    "bentrevett/pytorch-seq2seq#170, OpenNMT/OpenNMT-py#227, "
    "tensorflow/tensor2tensor#105",
    *("D38", "D27"),
)
def six_encoder_layers_at_a_constant_rate(is_bad: bool) -> Run:
    """Train six post-norm layers by Adam at 0.005 from the first step on.

    First: a deep post-norm network has no warm-up, its steps are too large.
    Cost: 34 %, which is a guess, in place of 98 %; a loss of 1.14 in place of 0.10.
    """
    x, y = logs(2048, 1)
    model = LogReader()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3 if is_bad else 1e-3)
    epochs = 5
    steps = epochs * 64
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: 1.0 if is_bad else min((step + 1) / 50, 1.0) * (1 - step / steps),
    )
    with watch(model, optimizer, every=5) as seen:
        for _ in range(epochs):
            for events, label in loader((x, y)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(events), label)
                loss.backward()
                optimizer.step()
                schedule.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(logs(512, 2), shuffle=False)), seen.findings())


class Seq2Seq(nn.Module):
    """An encoder and a decoder, both GRUs."""

    def __init__(self, width: int = 64, *, detaches: bool) -> None:
        super().__init__()
        self.detaches = detaches
        self.source = nn.Embedding(9, 16)
        self.target = nn.Embedding(9, 16)
        self.encoder = nn.GRU(16, width, batch_first=True)
        self.decoder = nn.GRU(16, width, batch_first=True)
        self.out = nn.Linear(width, 9)

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        """Return the scores (N, letters, places) of what comes next."""
        _, hidden = self.encoder(self.source(x))
        if self.detaches:
            hidden = hidden.detach()
        h, _ = self.decoder(self.target(said), hidden)
        return self.out(h).mT


# solo-learn#135 (will it not prevent the encoder to learn?), keras#2995,
# rsarxiv/seq2seq-attention#7 (why is the gradient of the context not passed on?)
@bug(
    "vturrisi/solo-learn#135, rsarxiv/seq2seq-attention#7, keras#2995",
    *("D24", "D27"),
)
def hidden_state_detached_for_the_decoder(is_bad: bool) -> Run:
    """Detach the state that an encoder gives to its decoder, to save memory.

    First: no gradient reaches the encoder.
    Cost: 78 % of letters in place of 94 %, a loss of 0.62 in place of 0.19.
    """
    x, y = reversals(4096, 1)
    model = Seq2Seq(detaches=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            for xs, ys in loader((x, y), 64):
                scores = model(xs, ys[:, :-1])
                loss = F.cross_entropy(scores, ys[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = reversals(512, 2)
    held = loader((x, y[:, :-1], y[:, 1:]), shuffle=False)
    return Run(model, [((a, b), c) for a, b, c in held], seen.findings())


def weights_init(m: nn.Module) -> None:
    """Draw weights as the tutorial of DCGAN does."""
    if isinstance(m, nn.Conv2d | nn.Linear):
        nn.init.normal_(m.weight, 0.0, 0.02)
        nn.init.zeros_(m.bias)


class Siamese(nn.Module):
    """Tells by their distance whether two images show the same."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 16),
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return distances."""
        return F.pairwise_distance(self.net(a), self.net(b))


def contrastive(distance: Tensor, differs: Tensor, margin: float = 1.0) -> Tensor:
    """Return the contrastive loss of pairs."""
    near = (1 - differs) * distance.square()
    return (near + differs * F.relu(margin - distance).square()).mean()


def pairs_of(data: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pairs, half of them of the same digit."""
    x, y = data
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=source)
    other = torch.randperm(len(x), generator=source)
    for i in range(0, len(x), 2):
        same = (y == y[order[i]]).nonzero().flatten()
        other[i] = same[torch.randint(len(same), (1,), generator=source)]
    return x[order], x[other], (y[order] != y[other]).float()


# triplet-reid#30 (all vectors are at one point, the loss is the margin),
# omoindrot/tensorflow-triplet-loss#37, caffe-video_triplet#8
@bug(
    "VisualComputingInstitute/triplet-reid#30, omoindrot/tensorflow-triplet-loss#37, "
    "xiaolonw/caffe-video_triplet#8",
    *("D22", "D24"),
)
def siamese_with_the_weights_of_a_dcgan(is_bad: bool) -> Run:
    """Apply weights_init() of DCGAN, normal_(0, 0.02), to a network without norms.

    First: outputs shrink from layer to layer.
    Cost: a loss of 0.46, with all images at one point, in place of 0.09.
    """
    train, test = digits()
    model = Siamese()
    if is_bad:
        model.apply(weights_init)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for epoch in range(10):
            for a, b, differs in loader(pairs_of(train, epoch)):
                optimizer.zero_grad()
                loss = contrastive(model(a, b), differs)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = list(loader(pairs_of(test, 99), shuffle=False))[:16]
    return Run(model, [((a, b), d) for a, b, d in held], seen.findings(), contrastive)


# keras#7057 (a high rate pushes neurons into the zone where they are off), keras#3425
@bug("keras#7057, keras#3425", "D21", "D27", "D34")
def yields_in_barrels_at_a_high_rate(is_bad: bool) -> Run:
    """Fit targets about 70 by SGD at 0.01 with momentum; the twin scales its targets.

    First: rectifiers are off for all inputs.
    Cost: a squared error of the variance of the targets, not 0.02 of it.
    """
    x, y = wells(2048, 1)
    level, spread = (0.0, 1.0) if is_bad else (y.mean(), y.std())
    model = nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(30):
            for xs, ys in loader((x, (y - level) / spread), 64):
                optimizer.zero_grad()
                loss = F.mse_loss(model(xs), ys)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = wells(512, 2)
    held = loader((x, (y - level) / spread), shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)


class SuperResolution(nn.Module):
    """Doubles the size of an image."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, width, 5, 1, 2), nn.PReLU())
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.BatchNorm2d(width),
        )
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4, 3, 1, 1),
            nn.PixelShuffle(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return images of twice the size."""
        h = self.head(x)
        return self.tail(h + self.body(h))


# SRGAN-PyTorch#1 (the schedulers are called at each step: it does not seem to train),
# ivadomed#55, pytorch/tutorials#640
@bug(
    "Lornatang/SRGAN-PyTorch#1, ivadomed/ivadomed#55, pytorch/tutorials#640",
    "D27",
)
def super_resolution_stepped_with_each_batch(is_bad: bool) -> Run:
    """Plan StepLR(epochs // 2) in epochs, and step it with each batch.

    First: the rate has run out, steps are far too small.
    Cost: a squared error of 0.22 in place of 0.03.
    """
    epochs = 10
    x, _ = cells(768, 1)
    x = x / 2
    model = SuperResolution()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, epochs // 2, gamma=0.1)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(epochs):
            model.train()
            for low, high in loader((F.avg_pool2d(x, 2), x), 16):
                optimizer.zero_grad()
                loss = F.mse_loss(model(low), high)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
                if is_bad:
                    scheduler.step()
            if not is_bad:
                scheduler.step()
    model.eval()
    x, _ = cells(256, 2)
    held = loader((F.avg_pool2d(x / 2, 2), x / 2), 16, shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)
