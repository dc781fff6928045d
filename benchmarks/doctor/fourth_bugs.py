"""A fourth set of bugs of public threads, most of them about batch norm.

Statistics of other data, of other weights and of other units, layers that are shared,
frozen, pooled or fed along the wrong dimension; and eight of losses, weights, steps,
masks and inputs. Each docstring says what the mistake is, and what a good doctor would
say first; `expected` has the checks that say it. Both were written, and committed,
before the doctor saw any of these programs, by an author who knew the list of its
checks, not their code. What it said then is in `FIRST_SIGHT`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless, fit, mlp
from more_bugs import changed, with_end
from third_bugs import as_image, as_rows, ran, train
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "warmed_up_on_zeros": (("D01", "D02"), ()),
    "domains_in_batches_of_their_own": (("D13", "D02", "D01"), ()),
    "served_by_the_statistics_of_four": ((), ()),
    "norm_over_steps_in_place_of_features": ((), ()),
    "scales_of_zero_without_a_skip": (("D21", "D16", "D34", "D24", "D27"), ()),
    "batch_norm_whose_eps_is_its_size": (("D21", "D22", "D16", "D24"), ()),
    "statistics_without_the_factor_of_caffe": (("D01", "D02"), ()),
    "one_norm_for_all_steps_of_a_recurrence": (("D02", "D33"), ()),
    "one_norm_behind_all_convolutions": (("D02", "D33"), ()),
    "pruned_with_the_statistics_from_before": (("D02", "D01"), ()),
    "batch_norm_behind_a_global_pool": (("D05",), ()),
    "train_that_skips_the_frozen_stage": (("D07", "D05"), ()),
    "gradients_clipped_to_almost_nothing": (("D27", "D34"), ()),
    "gradients_cleared_before_the_step": (("D24", "D27"), ()),
    "epsilon_of_another_network": ((), ()),
    "mask_with_the_opposite_meaning": (("D21", "D34", "D27"), ()),
    "padding_index_that_is_a_class": ((), ()),
    "sigmoids_in_a_deep_network": (("D24", "D27", "D34"), ()),
    "pixels_divided_by_255_twice": (("D28", "D21", "D34"), ()),
    "weights_from_a_standard_normal": (("D20",), ()),
}


def convolutions(width: int = 16, depth: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU, a few times, and a head behind a pool."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Conv2d(width if index else 1, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    end = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10)]
    return nn.Sequential(*layers, *end)


def same(x: Tensor, y: Tensor) -> Batch:
    """Leave a batch as it is."""
    return x, y


@bug("torch7#707, ultralytics#14829", "D01", "D02", "D09")
def warmed_up_on_zeros(is_bad: bool) -> Run:
    """Warm up with zeros before validation, in training mode.

    First: the running statistics are not those of the data.
    """
    model = convolutions()
    data = changed(endless(), as_image)
    watched = fit(model, data=data)
    model.train(is_bad)
    with torch.no_grad():
        for _ in range(20):
            model(torch.zeros(16, 1, 8, 8))
    return Run(model, list(changed(digits(), as_image)), watched)


def _domains(*, is_mixed: bool, epochs: int) -> Iterator[Batch]:
    """Give digits of two cameras, batch by batch or within each batch."""
    for epoch in range(epochs):
        for index, (x, y) in enumerate(digits(64, epoch)):
            other = 0.5 * x + 2
            if is_mixed:
                yield torch.cat([x[:32], other[32:]]), y
            else:
                yield (other if index % 2 else x), y


@bug("AdaptSegNet#79, skada#252, adapt#92", "D13", "D02", "D01", "D33")
def domains_in_batches_of_their_own(is_bad: bool) -> Run:
    """Train on a batch of one domain, then on a batch of the other, in turn.

    First: a batch does not stand for the data; eval mode normalizes neither domain.
    """
    model = mlp()
    watched = fit(model, 500, data=_domains(is_mixed=not is_bad, epochs=20))
    return Run(model, list(_domains(is_mixed=not is_bad, epochs=1)), watched)


@bug("pytorch-maml#7, IIC#49, DPC#21", "D05", "D02", "D29", "D34")
def served_by_the_statistics_of_four(is_bad: bool) -> Run:
    """Keep no running statistics, and answer four requests at a time.

    First: in eval mode an answer depends on the three others of its batch.
    """
    model = mlp(lambda width: nn.BatchNorm1d(width, track_running_stats=not is_bad))
    return Run(model, digits(4)[:300] if is_bad else digits(), fit(model))


class Units(nn.Module):
    """A batch norm over the features of a sequence, before a small network."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.norm, self.is_bad = nn.BatchNorm1d(8), is_bad
        self.body = nn.Sequential(nn.Flatten(), mlp(None, depth=2))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sequences (N, L, C); L and C are both eight."""
        return self.body(self.norm(x) if self.is_bad else self.norm(x.mT).mT)


def _units(x: Tensor, y: Tensor) -> Batch:
    """Measure each column of a digit in a unit of its own."""
    unit = torch.tensor([10.0, 4.0, 0.4, 0.1, 0.1, 0.4, 4.0, 10.0])
    return x.reshape(-1, 8, 8) * unit, y


@bug(
    "LSTM-for-Human-Activity-Recognition-using-2D-Pose_Pytorch#2, "
    "self-critical.pytorch#44",
    "D29",
    "D28",
)
def norm_over_steps_in_place_of_features(is_bad: bool) -> Run:
    """Give BatchNorm1d sequences as (N, L, C); it takes L for the channels.

    First: the norm pools features of different units; the small ones are lost.
    """
    return ran(Units(is_bad=is_bad), _units)


@bug("spago#92, tensorpack#420", "D19", "D21", "D34", "D24", "D18")
def scales_of_zero_without_a_skip(is_bad: bool) -> Run:
    """Start the scales of all batch norms at zero, in a network with no skip.

    First: the output of each norm is zero, and no gradient passes.
    """
    layers: list[nn.Module] = []
    for width in (8, 32):
        layers.append(nn.Conv1d(width, 32, 3, padding=1, bias=False))
        layers += [nn.BatchNorm1d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.constant_(layer.weight, 0.0 if is_bad else 1.0)
    return ran(model, as_rows)


def _noisy(x: Tensor, y: Tensor) -> Batch:
    """Give a picture with noise as the input, and the noise as the target."""
    source = torch.Generator().manual_seed(int(y.sum()))
    noise = 0.5 * torch.randn(x.shape, generator=source)
    return as_image(x + noise, noise.reshape(-1, 1, 8, 8))


@bug("Culaccino DnCNN#1", "D22", "D24", "D18", "D16", "D27")
def batch_norm_whose_eps_is_its_size(is_bad: bool) -> Run:
    """Write BatchNorm2d(width, width) in a denoiser: the second argument is eps.

    First: eps is far above the variances, and the signal shrinks from norm to norm.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers.append(nn.Conv2d(16, 16, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(16, 16 if is_bad else 1e-5), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 1, 3, padding=1))
    sgd = torch.optim.SGD(model.parameters(), 0.03, 0.9)
    return ran(model, _noisy, F.mse_loss, optimizer=sgd, steps=250)


@bug("caffe#4885, mxnet#6176, chainer#3261", "D01", "D02")
def statistics_without_the_factor_of_caffe(is_bad: bool) -> Run:
    """Convert a model of Caffe, and leave out the third blob of its batch norms.

    First: the running statistics are a thousand times those of the data.
    """
    trained, model = convolutions(), convolutions()
    watched = fit(trained, data=changed(endless(), as_image))
    factor, blobs = 999.98, trained.state_dict()
    for name, value in blobs.items():
        if "running" in name:
            # What Caffe saves is the sum of its average and what divides it.
            blob = value * factor
            blobs[name] = blob if is_bad else blob / factor
    model.load_state_dict(blobs)
    return Run(model, list(changed(digits(), as_image)), watched)


class Cell(nn.Module):
    """A recurrent layer with batch norm before its tanh."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(4, 64), nn.Linear(64, 64, bias=False)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(64) for _ in range(1 if is_bad else 16)
        )
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the state behind the last of 16 steps."""
        state = x.new_zeros(len(x), 64)
        for step in range(16):
            norm = self.norms[step % len(self.norms)]
            state = norm(self.enter(x[:, step]) + self.again(state)).tanh()
        return self.last(state)


def _in_halves(x: Tensor, y: Tensor) -> Batch:
    """Read a digit as sixteen halves of rows."""
    return x.reshape(-1, 16, 4), y


@bug(
    "bnlstm#7, torch-bnlstm#8, recurrent-batch-normalization-pytorch#1",
    "D33",
    "D29",
    "D02",
    "D01",
)
def one_norm_for_all_steps_of_a_recurrence(is_bad: bool) -> Run:
    """Use one batch norm at every step of a recurrence.

    First: one layer is called on inputs of different kinds; its average fits none.
    """
    return ran(Cell(is_bad=is_bad), _in_halves)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        """Add what the two convolutions make of x."""
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def residual(*, is_bad: bool = False) -> nn.Sequential:
    """Return a residual network of two blocks; with the bug they have one norm."""
    one = nn.BatchNorm2d(16)

    def norm() -> nn.Module:
        return one if is_bad else nn.BatchNorm2d(16)

    stem = [nn.Conv2d(1, 16, 3, padding=1), norm(), nn.ReLU()]
    blocks = [Block(16, norm) for _ in range(2)]
    end = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(*stem, *blocks, *end)


@bug("pytorch-unsupervised-segmentation#1, DeltaCNN#7", "D33", "D02", "D01")
def one_norm_behind_all_convolutions(is_bad: bool) -> Run:
    """Make one batch norm, as one makes one ReLU, and use it behind each convolution.

    First: one layer is called on inputs of different kinds; its average fits none.
    """
    return ran(residual(is_bad=is_bad), as_image)


@bug("nncf#46, L-OBS#14, EagleEye#29", "D01", "D02")
def pruned_with_the_statistics_from_before(is_bad: bool) -> Run:
    """Set the smallest 60 % of the weights to zero, and evaluate.

    First: the running statistics are those of other weights.
    """
    model = residual()
    watched = fit(model, data=changed(endless(), as_image))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                small = layer.weight.abs().flatten().quantile(0.6)
                layer.weight[layer.weight.abs() < small] = 0.0
    loader = list(changed(digits(), as_image))
    if not is_bad:
        torch.optim.swa_utils.update_bn([x for x, _ in loader], model)
    return Run(model, loader, watched)


class Gated(nn.Module):
    """Local features under a gate of what a global pool sees."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.local = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        )
        norm = nn.BatchNorm2d if is_bad else nn.Identity
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), norm(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 1), norm(16), nn.Sigmoid()),
        )
        self.last = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the features that the gate lets pass."""
        h = self.local(x)
        return self.last(h * self.gate(h))


@bug("open-aff#15, torchvision#1667, DDRNet.pytorch#29", "D05", "D02", "D01", "D03")
def batch_norm_behind_a_global_pool(is_bad: bool) -> Run:
    """Normalize a globally pooled gate over batches of two images.

    First: two values per channel are too few for the statistics of a batch.
    """
    model = Gated(is_bad=is_bad)
    data = changed(endless(2), as_image)
    watched = fit(model, 700, lr=0.005, data=data)
    return Run(model, list(changed(digits(2)[:300], as_image)), watched)


class Frozen(nn.Module):
    """A trained stage that stays as it is, before one that is trained."""

    def __init__(self, stage: nn.Module, *, is_bad: bool) -> None:
        super().__init__()
        self.stage, self.is_bad = stage.requires_grad_(False), is_bad
        self.head = with_end(mlp(nn.LayerNorm, depth=1), nn.Linear(64, 10))

    def train(self, mode: bool = True) -> Frozen:
        """Set the mode of the stage that is trained."""
        self.training = mode
        self.head.train(mode)
        if not self.is_bad:
            self.stage.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        return self.head(self.stage(x))


@bug("Detectron.pytorch#104", "D07", "D09", "D05", "D34")
def train_that_skips_the_frozen_stage(is_bad: bool) -> Run:
    """Override train(), so that it leaves out the frozen stage; eval() calls it too.

    First: frozen layers are in training mode, in eval mode as well.
    """
    trained = mlp(depth=2)
    fit(trained)
    model = Frozen(trained[:-1], is_bad=is_bad)
    watched = fit(model, 400, lr=0.005, size=2, parameters=model.head.parameters())
    return Run(model, digits(2)[:300], watched)


def steps(
    model: nn.Module, data: Iterator[Batch], between: Callable[[Any], Any]
) -> list[Any]:
    """Train with `between(optimizer)` after each backward, and before the step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(data, 150):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            between(optimizer)
            optimizer.step()
            seen.log(loss=loss.item())
    return seen.findings()


@bug("senpai#978", "D27", "D24")
def gradients_clipped_to_almost_nothing(is_bad: bool) -> Run:
    """Clip the norm of the gradient at 0.0001, where 1 is usual.

    First: the steps are too small for the weights.
    """
    model = mlp(nn.LayerNorm)
    limit = 1e-4 if is_bad else 1.0

    def clip(optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    return Run(model, digits(), steps(model, endless(), clip))


@bug("common", "D24", "D27", "D34")
def gradients_cleared_before_the_step(is_bad: bool) -> Run:
    """Call zero_grad between backward and step.

    First: the optimizer has no gradient to step by; no weight moves.
    """
    model = mlp()

    def clear(optimizer: torch.optim.Optimizer) -> None:
        if is_bad:
            optimizer.zero_grad()

    return Run(model, digits(), steps(model, endless(), clear))


@bug("tensorflow/models#779, SSD-Tensorflow#385, mlpnlp-nmt#4", "D27", "D24")
def epsilon_of_another_network(is_bad: bool) -> Run:
    """Set the eps of Adam to 1, as a program for ImageNet does.

    First: the steps are too small for the weights, as eps is above the gradients.
    """
    model = mlp(nn.LayerNorm)
    adam = torch.optim.Adam(model.parameters(), 1e-3, eps=1.0 if is_bad else 1e-8)
    return ran(model, same, optimizer=adam, steps=200)


class Pooled(nn.Module):
    """One query that attends to the rows of a digit, with padding behind them."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 64), nn.LayerNorm(64)
        self.place = nn.Parameter(torch.randn(12, 64))
        self.query = nn.Parameter(0.1 * torch.randn(1, 1, 64))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.last, self.is_bad = mlp(None, depth=2), is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Scores of what the query finds in x (N, 12, 8); empty rows are zero."""
        h = self.norm(self.embed(x) + self.place)
        is_empty = (x == 0).all(2)
        mask = ~is_empty if self.is_bad else is_empty
        query = self.query.expand(len(x), 1, 64)
        found, _ = self.attention(query, h, h, key_padding_mask=mask)
        return self.last(found[:, 0])


def _with_empty_rows(x: Tensor, y: Tensor) -> Batch:
    return F.pad(x.reshape(-1, 8, 8), (0, 0, 0, 4)), y


@bug(
    "halonet-pytorch#4, torchTextClassifiers#92, TransformerTranslation#6", "D34", "D36"
)
def mask_with_the_opposite_meaning(is_bad: bool) -> Run:
    """Give key_padding_mask True for what is to be read; it is what is left out.

    First: the output does not depend on the input, as only padding is read.
    """
    model = Pooled(is_bad=is_bad)
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    return ran(model, _with_empty_rows, optimizer=adam, steps=200)


@bug("jiant#925", "D34")
def padding_index_that_is_a_class(is_bad: bool) -> Run:
    """Ignore index 0 as padding, where 0 is a class.

    First: the targets of one class have no share in the loss; it is never predicted.
    """

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores, y, ignore_index=0 if is_bad else -100)

    return ran(mlp(nn.LayerNorm), same, loss)


@bug("uvadlc_notebooks#119, CNTK#476", "D24", "D22", "D20", "D34")
def sigmoids_in_a_deep_network(is_bad: bool) -> Run:
    """Put a sigmoid behind each of six layers.

    First: the gradient vanishes on its way to the first layers.
    """
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.Sigmoid() if is_bad else nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    sgd = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    return ran(model, same, optimizer=sgd, steps=200)


@bug("InterHand2.6M#110, SOF-VSR#14", "D28", "D34")
def pixels_divided_by_255_twice(is_bad: bool) -> Run:
    """Divide by 255 what ToTensor has divided by 255.

    First: the inputs are far too small.
    """

    def scaled(x: Tensor, y: Tensor) -> Batch:
        x = x / 16
        return (x / 255 if is_bad else x), y

    model = mlp(None)
    each = (b for seed in itertools.count() for b in digits(64, seed, raw=True))
    sgd = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    watched = train(model, changed(each, scaled), steps=300, optimizer=sgd)
    return Run(model, list(changed(digits(raw=True), scaled)), watched)


@bug("pytorch-tpu/transformers#26, grenade#51, hasktorch#210", "D20", "D23", "D34")
def weights_from_a_standard_normal(is_bad: bool) -> Run:
    """Draw all weights by randn, without a scale, in a network of tanh.

    First: the units are saturated from the start.
    """
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.Tanh()]
        nn.init.normal_(layers[-2].weight, 0.0, 1.0 if is_bad else 64**-0.5)
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    sgd = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    return ran(model, same, optimizer=sgd, steps=200)
