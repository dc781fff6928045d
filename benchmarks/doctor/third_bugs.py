"""A third set of bugs of public threads, of layers and losses the others do not have.

Recurrent, attention and convolution layers, hand-written and subclassed norms, GANs,
segmentation, regression, mappings as inputs. Each docstring says what the mistake is,
and what a good doctor would say first; `expected` has the checks that say it. Both were
written, and committed, before the doctor saw any of these programs. What it said then
is in `FIRST_SIGHT`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless, mlp
from more_bugs import changed, with_end
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "group_norm_of_one_value": (("D21", "D34"), ()),
    "regression_behind_a_relu": (("D34",), ()),
    "dropout_left_on_in_eval_mode": ((), ()),
    "argmax_between_two_networks": (("D24", "D27"), ()),
    "recurrence_over_the_batch": ((), ()),
    "classes_flattened_as_pixels": ((), ()),
    "layer_norm_over_time": ((), ()),
    "schedule_stepped_with_each_batch": ((), ()),
    "attention_without_its_scale": (("D36",), ()),
    "language_model_without_a_causal_mask": ((), ()),
    "root_of_distances_that_are_zero": (("D34", "D25", "D27"), ()),
    "instance_norm_with_running_statistics": ((), ()),
    "generator_behind_a_detach": (("D24", "D27"), ("D34",)),
    "prices_without_a_scale": (("D21", "D24", "D34"), ()),
    "decay_that_empties_the_weights": (("D27", "D21", "D24", "D34"), ()),
    "steps_lost_in_bfloat16": ((), ()),
    "root_mean_square_of_padding": (("D34", "D25", "D27"), ()),
    "hand_written_batch_norm_that_keeps_nothing": (("D32", "D01", "D02"), ()),
}


def train(
    model: nn.Module,
    data: Iterator[Any],
    loss_fn: Any = F.cross_entropy,
    *,
    steps: int = 150,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Any = None,
) -> list[Any]:
    """Train under `watch`, with the losses logged; inputs may be a mapping.

    `schedule(optimizer, step)` runs after each step.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for step, (x, y) in enumerate(itertools.islice(data, steps)):
            loss = loss_fn(model(**x) if isinstance(x, dict) else model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
            if schedule is not None:
                schedule(optimizer, step)
    return seen.findings()


def as_image(x: Tensor, y: Tensor) -> Batch:
    """Give a digit its rows and columns, and one channel."""
    return x.reshape(-1, 1, 8, 8), y


def as_rows(x: Tensor, y: Tensor) -> Batch:
    """Read a digit as a sequence of eight rows."""
    return x.reshape(-1, 8, 8), y


def ran(
    model: nn.Module, change: Any, loss_fn: Any = F.cross_entropy, **how: Any
) -> Run:
    """Train on changed digits, and return the run."""
    watched = train(model, changed(endless(), change), loss_fn, **how)
    return Run(model, list(changed(digits(), change)), watched, loss_fn)


@bug("pytorch#19250, AdvGAN-tf#2", "D29", "D34", "D18")
def group_norm_of_one_value(is_bad: bool) -> Run:
    """Take 32 groups from a ResNet behind a global pool of 32 channels.

    First: the norm has one value per group, and its output is zero for every input.
    """
    norm, pool = nn.GroupNorm(32, 32), nn.AdaptiveAvgPool2d(1)
    end = [pool, norm, nn.ReLU()] if is_bad else [norm, nn.ReLU(), pool]
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        *end,
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    return ran(model, as_image, optimizer=adam)


@bug("ProteomicsML#203, VoxelNet-tensorflow#10", "D34", "D21")
def regression_behind_a_relu(is_bad: bool) -> Run:
    """End a regression in a ReLU; half of the targets are negative.

    First: the output cannot reach the targets.
    """
    model = with_end(mlp(nn.LayerNorm), nn.Linear(64, 1))
    if is_bad:
        model.append(nn.ReLU())
    sgd = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    return ran(
        model, lambda x, y: (x, (y[:, None] - 4.5) / 3), F.mse_loss, optimizer=sgd
    )


class Dropped(nn.Module):
    """A perceptron with dropout as a function."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.last, self.is_bad = nn.Linear(64, 10), is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Scores; with the bug dropout is on in eval mode as well."""
        h = self.norm(self.first(x)).relu()
        return self.last(F.dropout(h, 0.5, self.is_bad or self.training))


@bug("SimpleNet#2, pytorch#26338", "D09", "D34")
def dropout_left_on_in_eval_mode(is_bad: bool) -> Run:
    """Call F.dropout without training=self.training.

    First: in eval mode the same input has another output with each call.
    """
    return ran(Dropped(is_bad=is_bad), lambda x, y: (x, y))


class Codebook(nn.Module):
    """One network chooses a code, a second reads it."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.choice = with_end(mlp(nn.LayerNorm, depth=2), nn.Linear(64, 32))
        self.codes, self.is_bad = nn.Embedding(32, 64), is_bad
        self.reader = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Scores, by the best code or by the weighted codes."""
        scores = self.choice(x)
        if self.is_bad:
            return self.reader(self.codes(scores.argmax(1)))
        return self.reader(scores.softmax(1) @ self.codes.weight)


@bug("pytorch#1339, Deep_Hierarchical_Classification#6", "D24", "D27")
def argmax_between_two_networks(is_bad: bool) -> Run:
    """Choose a code by argmax, which has no gradient.

    First: the layers before the argmax get no gradient, and do not move.
    """
    return ran(Codebook(is_bad=is_bad), lambda x, y: (x, y))


class Recurrent(nn.Module):
    """A recurrent layer over the rows of a digit."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 64, batch_first=not is_bad)
        self.norm, self.last = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the state at the last row."""
        return self.last(self.norm(self.rnn(x)[0][:, -1]))


@bug("video-classification#3, pytorch-tutorial#151", "D34")
def recurrence_over_the_batch(is_bad: bool) -> Run:
    """Forget batch_first: the layer goes from sample to sample, not row to row.

    First: the answer to a sample depends on the other samples of the batch.
    """
    return ran(Recurrent(is_bad=is_bad), as_rows)


def _ink(x: Tensor, y: Tensor) -> Batch:
    x = x.reshape(-1, 1, 8, 8)
    around = F.avg_pool2d(x, 3, 1, 1)[:, 0]
    return x, (around > -0.5).long() + (around > 0.3).long()


@bug("knowing-when-to-look#6, Speech-Separation#4", "D34")
def classes_flattened_as_pixels(is_bad: bool) -> Run:
    """Flatten (N, C, H, W) to (N H W, C) by view, without a permute.

    First: the scores and the targets of the loss belong to other pixels; it learns
    nothing of the sample.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 3, 3, padding=1),
    )

    def loss(scores: Tensor, mask: Tensor) -> Tensor:
        if not is_bad:
            scores = scores.permute(0, 2, 3, 1)
        return F.cross_entropy(scores.reshape(-1, 3), mask.reshape(-1))

    return ran(model, _ink, loss)


class Channels(nn.Module):
    """A convolution over time whose channels are normalized."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(16, 64, 3, padding=1), nn.Linear(64, 10)
        self.norm, self.is_bad = nn.LayerNorm(16 if is_bad else 64), is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the mean over time."""
        h = self.first(x)
        h = self.norm(h) if self.is_bad else self.norm(h.mT).mT
        return self.last(h.relu().mean(2))


def _levels(x: Tensor, y: Tensor) -> Batch:
    """Turn a digit into 16 noisy channels, each about one level for 16 steps."""
    levels = F.avg_pool2d(x.reshape(-1, 1, 8, 8), 2).reshape(-1, 16, 1)
    source = torch.Generator().manual_seed(int(y.sum()))
    return levels + 0.3 * torch.randn(len(x), 16, 16, generator=source), y


@bug("tensorflow/addons#2142, tf-keras#173", "D29", "D34")
def layer_norm_over_time(is_bad: bool) -> Run:
    """Call LayerNorm on (batch, channels, time): it takes the mean over time away.

    First: the norm erases what its input says, here the level of each channel.
    """
    return ran(Channels(is_bad=is_bad), _levels)


@bug("pytorch/tutorials#640, wtfml#7", "D27")
def schedule_stepped_with_each_batch(is_bad: bool) -> Run:
    """Step a schedule meant for epochs after each batch.

    First: the steps have become far too small for the weights.
    """
    every = 1 if is_bad else 28

    def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
        if step % every == every - 1:
            optimizer.param_groups[0]["lr"] *= 0.7

    return ran(mlp(nn.LayerNorm), lambda x, y: (x, y), schedule=schedule)


class Attention(nn.Module):
    """One head of attention over the rows of a digit."""

    def __init__(self, *, is_bad: bool, width: int = 128) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, width), nn.LayerNorm(width)
        self.place = nn.Parameter(torch.randn(8, width))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.last, self.scale = nn.Linear(width, 10), 1 if is_bad else width**-0.5
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the mean over all rows."""
        x = self.embed(x) + self.place
        h = self.norm(x)
        weights = (self.q(h) @ self.k(h).mT * self.scale).softmax(-1)
        return self.last((x + weights @ self.v(h)).mean(1))


@bug("tiny-transformers#71, solving-ml-papers#1", "D36")
def attention_without_its_scale(is_bad: bool) -> Run:
    """Leave out the division by the root of the width.

    First: the logits of the attention are so large that it takes one key alone.
    """
    return ran(Attention(is_bad=is_bad), as_rows)


class Language(nn.Module):
    """A language model of one block."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.embed, self.is_bad = nn.Embedding(16, 64), is_bad
        self.place = nn.Parameter(0.1 * torch.randn(16, 64))
        self.block = nn.TransformerEncoderLayer(
            64, 4, 128, 0.0, batch_first=True, norm_first=True
        )
        self.last = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next token, in the order of cross_entropy."""
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        h = self.embed(x) + self.place[:length]
        return self.last(self.block(h, None if self.is_bad else mask)).mT


def _text(size: int = 64) -> Iterator[Batch]:
    """Sequences in which one of two tokens follows each."""
    source = torch.Generator().manual_seed(0)
    follows = torch.randint(16, (16, 2), generator=source)
    while True:
        tokens = [torch.randint(16, (size,), generator=source)]
        for _ in range(16):
            which = torch.randint(2, (size,), generator=source)
            tokens.append(follows[tokens[-1], which])
        text = torch.stack(tokens, 1)
        yield text[:, :-1], text[:, 1:]


@bug("causal-transformer-decoder#1, transformers#48745", "D34")
def language_model_without_a_causal_mask(is_bad: bool) -> Run:
    """Predict the next token by a block that sees it.

    First: the output at a place reads the input that is its target.
    """
    model = Language(is_bad=is_bad)
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    watched = train(model, _text(), steps=200, optimizer=adam)
    return Run(model, list(itertools.islice(_text(), 20)), watched)


@bug("pytorch#6394, cmr#11", "D25", "D34", "D17")
def root_of_distances_that_are_zero(is_bad: bool) -> Run:
    """Take the root of all squared distances, those of a sample to itself as well.

    First: the gradient is not finite from the first step on, though the loss is.
    """
    model = with_end(mlp(nn.LayerNorm), nn.Linear(64, 8))

    def loss(e: Tensor, y: Tensor) -> Tensor:
        square = (e[:, None] - e).square().sum(-1)
        apart = (square if is_bad else square + 1e-12).sqrt()
        is_same = y[:, None] == y
        return torch.where(is_same, apart.square(), (2 - apart).relu().square()).mean()

    return ran(model, lambda x, y: (x, y.float()), loss)


def _lit(x: Tensor, y: Tensor) -> Batch:
    """Give each image a brightness and a contrast of its own."""
    source = torch.Generator().manual_seed(int(y.sum()))
    contrast = 0.2 + 3 * torch.rand(len(x), 1, generator=source)
    light = 3 * torch.randn(len(x), 1, generator=source)
    return as_image(x * contrast + light, y)


@bug("pytorch-CycleGAN-and-pix2pix#395, pytorch#58843", "D02", "D01", "D29")
def instance_norm_with_running_statistics(is_bad: bool) -> Run:
    """Set track_running_stats on an instance norm: eval mode normalizes no instance.

    First: eval mode is worse, as running statistics take the place of each image's.
    """
    layers: list[nn.Module] = []
    for width in (1, 32):
        norm = nn.InstanceNorm2d(32, affine=True, track_running_stats=is_bad)
        layers += [nn.Conv2d(width, 32, 3, padding=1), norm, nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    return ran(model, _lit)


@bug("CSA-CDGAN#5", "D24", "D27", "D34")
def generator_behind_a_detach(is_bad: bool) -> Run:
    """Detach the generated images in the step of the generator as well.

    First: no gradient reaches the generator; it never moves.
    """
    model = with_end(mlp(nn.LayerNorm, depth=2), nn.Linear(64, 64))
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    adam = torch.optim.Adam(critic.parameters(), 5e-4, (0.5, 0.99))
    real, decide = endless(), F.binary_cross_entropy_with_logits

    def loss(images: Tensor, ones: Tensor) -> Tensor:
        return decide(critic(images.detach() if is_bad else images), ones)

    def criticize(optimizer: torch.optim.Optimizer, step: int) -> None:
        with torch.no_grad():
            fake = model(torch.randn(64, 64))
        scores = critic(torch.cat([next(real)[0], fake])).view(2, 64)
        adam.zero_grad()
        decide(scores, torch.tensor([[1.0], [0.0]]).expand(2, 64)).backward()
        adam.step()

    def noise() -> Iterator[Batch]:
        while True:
            yield torch.randn(64, 64), torch.ones(64, 1)

    own = torch.optim.Adam(model.parameters(), 5e-4, (0.5, 0.99))
    watched = train(model, noise(), loss, optimizer=own, schedule=criticize, steps=200)
    return Run(model, list(itertools.islice(noise(), 20)), watched, loss)


class Prices(nn.Module):
    """A regression with two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = with_end(mlp(nn.LayerNorm), nn.Linear(64, 1))

    def forward(self, pixels: Tensor, light: Tensor) -> Tensor:
        """One number per sample."""
        return self.body(pixels + light)


@bug("deeprank#16, schnetpack#336", "D34", "D27", "D25")
def prices_without_a_scale(is_bad: bool) -> Run:
    """Fit prices about 300,000 with Adam at 0.001, as they are.

    First: the targets are far outside of what the outputs reach in these steps.
    """

    def price(x: Tensor, y: Tensor) -> Any:
        value = 300_000 + 40_000 * (y[:, None] - 4.5)
        inputs = {"pixels": x, "light": torch.zeros(len(x), 1)}
        return inputs, value if is_bad else (value - 300_000) / 115_000

    model = Prices()
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    return ran(model, price, F.mse_loss, optimizer=adam, steps=200)


@bug("caffe#1396", "D34", "D14", "D22", "D27")
def decay_that_empties_the_weights(is_bad: bool) -> Run:
    """Set weight_decay to 0.3 in place of 0.0003.

    First: the decay takes the weights to zero, and every input has the same output.
    """
    model = mlp(None)
    decay = 0.3 if is_bad else 3e-4
    sgd = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=decay)
    return ran(model, lambda x, y: (x, y), optimizer=sgd, steps=200)


class Cast(nn.Module):
    """A network in another type, for inputs and scores in float32."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        """Scores in float32."""
        return self.body(x.to(self.dtype)).float()


@bug("NeMo Automodel#3444, ml-by-hand#85, apex#1728", "D27", "D16")
def steps_lost_in_bfloat16(is_bad: bool) -> Run:
    """Train weights in bfloat16 with steps below half of their last digit.

    First: the steps are too small for the weights; most of them do not move.
    """
    model = Cast(mlp(nn.LayerNorm), torch.bfloat16 if is_bad else torch.float32)
    adam = torch.optim.Adam(model.parameters(), 1e-4)
    return ran(model, lambda x, y: (x, y), optimizer=adam, steps=300)


class RootMeanSquare(nn.Module):
    """RMS norm written by hand."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide each position by its root mean square."""
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Padded(nn.Module):
    """A network over sequences whose ends are zero."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 64, bias=False), RootMeanSquare(64, eps)
        self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the largest values over time."""
        return self.last(self.second(self.norm(self.first(x))).relu().amax(1))


def _short(x: Tensor, y: Tensor) -> Batch:
    source = torch.Generator().manual_seed(int(y.sum()))
    ends = torch.randint(5, 9, (len(x), 1, 1), generator=source)
    return x.reshape(-1, 8, 8).where(torch.arange(8)[:, None] < ends, 0.0), y


@bug("coremltools#2822, minimind#301", "D34", "D25", "D17")
def root_mean_square_of_padding(is_bad: bool) -> Run:
    """Write an RMS norm without eps: a position of zeros is 0 / 0.

    First: the norm is the first layer whose output is not finite.
    """
    return ran(Padded(0.0 if is_bad else 1e-6), _short)


class BatchNorm(nn.Module):
    """Batch norm written by hand."""

    def __init__(self, width: int, *, is_bad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; with the bug the new averages are local names."""
        running_mean, running_var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            running_mean = 0.9 * running_mean + 0.1 * mean.detach()
            running_var = 0.9 * running_var + 0.1 * var.detach()
            if not self.is_bad:
                self.running_mean, self.running_var = running_mean, running_var
        else:
            mean, var = running_mean, running_var
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


@bug("tf-frrn#2, Odyssey#5532", "D32", "D01", "D03", "D02")
def hand_written_batch_norm_that_keeps_nothing(is_bad: bool) -> Run:
    """Compute new running statistics, and do not assign them to the buffers.

    First: the layer was trained, and its running statistics were never set.
    """
    return ran(mlp(lambda width: BatchNorm(width, is_bad=is_bad)), lambda x, y: (x, y))
