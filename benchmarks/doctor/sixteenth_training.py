"""The sixteenth set: eight mistakes of training in general."""

from __future__ import annotations

import itertools

import torch
from bugs import Batch, Run, bug
from fifteenth_data import digits
from sixteenth_data import houses, load_curves, loader, reviews
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch


class OpinionLSTM(nn.Module):
    """Embedding, LSTM, maximum over time, and two linear layers."""

    def __init__(self, last: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * width, 3)
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what is said of three opinions."""
        h, _ = self.lstm(self.embedding(tokens))
        h = h.masked_fill(tokens.unsqueeze(2) == 0, -1.0)
        return self.last(self.fc(h.amax(1)))


# human_activity_recognition_LRCN#4 (it converges faster without), pytorch-DANN#7
@bug(
    "doronharitan/human_activity_recognition_LRCN#4, NaJaeMin92/pytorch-DANN#7",
    "D34",
)
def opinions_behind_a_softmax(is_bad: bool) -> Run:
    """End an LSTM with a softmax, and train it by CrossEntropyLoss.

    First: the loss takes scores, and gets shares that sum to one.
    Cost: 91 % in place of 98 %, a loss of 0.88 in place of 0.14.
    """
    model = OpinionLSTM(nn.Softmax(dim=1) if is_bad else nn.Identity())
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            for tokens, label in loader(reviews(1024, 1)):
                optimizer.zero_grad()
                loss = criterion(model(tokens), label)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(reviews(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings(), criterion)


class ViT(nn.Module):
    """A vision transformer on digits, with patches of 2 x 2."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of ten digits."""
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.places
        return self.head(self.blocks(h)[:, 0])


# vit-pytorch#16 (the loss does not descend with Adam at 5e-3, nor 1e-1 and 3e-2)
@bug("lucidrains/vit-pytorch#16, #43", "D27")
def vision_transformer_at_three_hundredths(is_bad: bool) -> Run:
    """Train a vision transformer by Adam at 0.03.

    First: steps are far too large.
    Cost: 41 % in place of 94 %, a loss of 1.68 in place of 0.23.
    """
    (x, y), test = digits()
    model = ViT()
    optimizer = torch.optim.Adam(model.parameters(), 3e-2 if is_bad else 1e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            for xs, ys in loader((x, y)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(xs), ys)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(test, shuffle=False))[:16], seen.findings())


class Regressor(nn.Module):
    """A perceptron for a table."""

    def __init__(self, columns: int, width: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(columns, width)
        self.fc2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one value for each row."""
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


# keras#508 (95 % once features were scaled), DeepSurv#14
@bug("keras#508, jaredleekatzman/DeepSurv#14", "D28")
def houses_without_a_scaler(is_bad: bool) -> Run:
    """Give columns in their units to a perceptron; the population is in thousands.

    First: inputs are far from a mean of zero and a variance of one.
    Cost: a squared error of 1.53 in place of 0.05, where the mean has 1.
    """
    x, y = houses(2048, 1)
    mean, std = x.mean(0), x.std(0)
    level, spread = y.mean(), y.std()

    def prepared(data: Batch) -> Batch:
        x, y = data
        return x if is_bad else (x - mean) / std, (y - level) / spread

    model = Regressor(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(25):
            for xs, ys in loader(prepared((x, y)), 64):
                optimizer.zero_grad()
                loss = F.mse_loss(model(xs), ys)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(prepared(houses(512, 2)), shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)


class Forecaster(nn.Module):
    """An LSTM and a linear layer on its last state."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)
        self.linear = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value of the next hour."""
        return self.linear(self.lstm(x)[0][:, -1])


# keras#4563 (the values to predict are very high: has rescaling been tried?),
# deeprank#16 (normalize_targets=False gives the same value for all)
@bug("keras#4563, DeepRank/deeprank#16", "D34", "D27")
def load_in_megawatts(is_bad: bool) -> Run:
    """Scale the inputs of an LSTM, and leave its targets in megawatts.

    First: targets are far from what the output can reach.
    Cost: a squared error of 2.7e7 in place of 1.6e4, in square megawatts.
    """

    def prepared(data: Batch) -> Batch:
        x, y = data
        return (x - 5200) / 600, y if is_bad else (y - 5200) / 600

    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            for x, y in loader(prepared(load_curves(1024, 1))):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(prepared(load_curves(512, 2)), shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)


def autoencoder(activation: type[nn.Module]) -> nn.Sequential:
    """Return an autoencoder of digits with six hidden layers."""
    widths = [64, 96, 64, 32, 16, 32, 64, 96]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, width in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, width), activation()]
    return nn.Sequential(*layers, nn.Linear(96, 64))


# Multi-task-TCGA-learning#15 (leaky ReLU converges faster than a sigmoid and is not
# stuck at 0), vae_tutorial#5
@bug(
    "MollyZhang/Multi-task-TCGA-learning#15, cdoersch/vae_tutorial#5",
    *("D24", "D22", "D20"),
)
def autoencoder_of_sigmoids(is_bad: bool) -> Run:
    """Put a sigmoid behind each layer of a deep autoencoder.

    First: gradients do not reach the first layers.
    Cost: a squared error of 0.074, which is that of a mean image, not 0.025.
    """
    (x, _), (held, _) = digits()
    model = autoencoder(nn.Sigmoid if is_bad else nn.LeakyReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss_fn(answer: Tensor, image: Tensor) -> Tensor:
        return F.mse_loss(answer, image.flatten(1))

    with watch(model, optimizer, every=5) as seen:
        for _ in range(25):
            for xs, _ in loader((x, x)):
                loss = loss_fn(model(xs), xs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    pairs = list(loader((held, held), shuffle=False))[:16]
    return Run(model, pairs, seen.findings(), loss_fn)


class TwoParts(nn.Module):
    """An encoder and a decoder, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU()
        )
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of ten digits."""
        return self.decoder(self.encoder(x))


# idinvert#1 (optimizer_D.zero_grad() is missing), DN-DETR#19, transformers#340
@bug(
    "Hsintien-Ng/idinvert_pytorch-reproduced#1, IDEA-Research/DN-DETR#19, "
    "huggingface/transformers#340",
    *("D27", "D25"),
)
def one_of_two_optimizers_is_not_cleared(is_bad: bool) -> Run:
    """Call zero_grad() of the decoder's optimizer alone.

    First: gradients of the encoder add up, so that its steps are far too large.
    Cost: 7 %, which is a guess, in place of 97 %; a loss of 2.31 in place of 0.14.
    """
    train, test = digits()
    model = TwoParts()
    first = torch.optim.SGD(model.encoder.parameters(), 0.05, momentum=0.9)
    second = torch.optim.SGD(model.decoder.parameters(), 0.05, momentum=0.9)
    with watch(model, first, every=5) as seen:
        for _ in range(15):
            for x, y in loader(train):
                second.zero_grad()
                if not is_bad:
                    first.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                first.step()
                second.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(test, shuffle=False))[:16], seen.findings())


class Recurrent(nn.Module):
    """A recurrent network of rectifiers that begins as the identity."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, width, nonlinearity="relu", batch_first=True)
        nn.init.eye_(self.rnn.weight_hh_l0)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value of the next hour."""
        return self.out(self.rnn(x)[0][:, -1])


# keras#5127 (nan without clipnorm), pytorch#2623 (clipping as in the forum's answer)
@bug("keras#5127, pytorch#2623", "D25", "D39", "D27", "D23")
def recurrence_without_clipping(is_bad: bool) -> Run:
    """Train a recurrent network over 36 steps, and do not clip its gradients.

    First: gradients explode.
    Cost: a squared error that is nan in place of 0.06.
    """
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9)
    x, y = load_curves(1024, 1)
    data = (x - 5200) / 600, (y - 5200) / 600
    with watch(model, optimizer, every=5) as seen:
        for _ in range(12):
            for xs, ys in loader(data):
                optimizer.zero_grad()
                loss = F.mse_loss(model(xs), ys)
                loss.backward()
                if not is_bad:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = load_curves(512, 2)
    held = loader(((x - 5200) / 600, (y - 5200) / 600), shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)


class Block(nn.Module):
    """Attention by F.scaled_dot_product_attention, and a perceptron."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the words, each with what it read of the others."""
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(read.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norm2(x))


class Reader(nn.Module):
    """A transformer that answers by its first token."""

    def __init__(self, width: int = 32, *, is_bad: bool) -> None:
        super().__init__()
        self.is_bad = is_bad
        self.embedding = nn.Embedding(61, width, padding_idx=0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of three opinions."""
        tokens = F.pad(tokens, (1, 0), value=60)
        is_padding = tokens == 0
        mask = is_padding if self.is_bad else ~is_padding
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h, mask[:, None, None, :])
        return self.head(self.norm(h)[:, 0])


# pytorch#170404 (True is padding for one, and what is read for the other), LLMs#1061
@bug("pytorch#170404, rasbt/LLMs-from-scratch#1061", "D36")
def mask_of_another_attention(is_bad: bool) -> Run:
    """Give scaled_dot_product_attention a mask that is True at padding.

    First: attention reads nothing but padding.
    Cost: 32 %, which is a guess, in place of 100 %; a loss of 1.10 in place of 0.002.
    """
    model = Reader(is_bad=is_bad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for tokens, label in loader(reviews(1024, 1)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(tokens), label)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(reviews(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings())
