"""More bugs of public threads: targets, order, optimizers, freezing, averages.

As in bugs.py, `expected` was written down before the doctor saw the program, and no
threshold was chosen to suit.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless, fit, mlp
from torch import Tensor, nn
from torch.nn import functional as F

__all__: list[str] = []


def changed(batches: Any, change: Any) -> Iterator[Batch]:
    """Return the batches with `change(x, y)` in their place."""
    return (change(x, y) for x, y in batches)


def with_end(model: nn.Sequential, *end: nn.Module) -> nn.Sequential:
    """Return the model with another end in place of its last layer."""
    return nn.Sequential(*model[:-1], *end)


def is_even(x: Tensor, y: Tensor) -> Batch:
    """Ask whether a digit is even, one unit."""
    return x, (y % 2 == 0).float()[:, None]


@bug("GeneralDyG#6, kaggle-imet-2019#3, daisyRec#15", "D34")
def sigmoid_before_a_loss_with_logits(is_bad: bool) -> Run:
    """End in a sigmoid, before binary_cross_entropy_with_logits."""
    model = with_end(mlp(), nn.Linear(64, 1))
    if is_bad:
        model.append(nn.Sigmoid())
    loss = F.binary_cross_entropy_with_logits
    watched = fit(model, data=changed(endless(), is_even), loss_fn=loss)
    return Run(model, list(changed(digits(), is_even)), watched, loss)


@bug("DeepFD table, wrong activation of the output", "D34")
def softmax_over_one_unit(is_bad: bool) -> Run:
    """End in a softmax over one unit: it answers 1 to every input."""
    end = nn.Softmax(1) if is_bad else nn.Sigmoid()
    model = with_end(mlp(), nn.Linear(64, 1), end)
    loss = F.binary_cross_entropy
    watched = fit(model, data=changed(endless(), is_even), loss_fn=loss)
    return Run(model, list(changed(digits(), is_even)), watched, loss)


@bug("Pytorch-UNet#291, mmsegmentation#3609", "D34")
def grey_values_as_classes(is_bad: bool) -> Run:
    """Read labels as the values of a picture, 28 apart, not as classes."""
    model = mlp()
    watched = fit(model)
    apart = 28 if is_bad else 1
    return Run(model, list(changed(digits(), lambda x, y: (x, y * apart))), watched)


@bug("happy-transformer#248", "D34")
def classes_from_minus_one(is_bad: bool) -> Run:
    """Take class numbers from -1 on."""
    model = mlp()
    watched = fit(model)
    first = -1 if is_bad else 0
    return Run(model, list(changed(digits(), lambda x, y: (x, y + first))), watched)


def _factors(x: Tensor, y: Tensor) -> Batch:
    """Give a digit several labels: which of 2 to 5 divide it."""
    return x, torch.stack([(y % n == 0).float() for n in range(2, 6)], 1)


@bug("simpletransformers#101, mmpretrain#783", "D34")
def several_labels_under_a_softmax(is_bad: bool) -> Run:
    """Give cross_entropy zeros and ones for each class."""
    model = with_end(mlp(), nn.Linear(64, 4))
    loss = F.cross_entropy if is_bad else F.binary_cross_entropy_with_logits
    watched = fit(model, data=changed(endless(), _factors), loss_fn=loss)
    return Run(model, list(changed(digits(), _factors)), watched, loss)


def _by_class(size: int = 64) -> list[Batch]:
    x, y = (torch.cat(parts) for parts in zip(*digits(size), strict=True))
    order = y.argsort(stable=True)
    parts = [part for part in order.split(size) if len(part) == size]
    return [(x[part], y[part]) for part in parts]


@bug("fastText#74, keras#6955", "D13")
def clustered_labels_without_a_norm(is_bad: bool) -> Run:
    """Read the data class by class, in a network without batch norm."""
    model = mlp(None)
    data = _by_class() if is_bad else digits()
    watched = fit(model, data=itertools.cycle(data))
    return Run(model, data, watched)


@bug("Deep-Clustering-Network#2", "D13")
def clustered_labels_with_batch_norm(is_bad: bool) -> Run:
    """Read the training data with shuffle=False, through batch norm."""
    model = mlp()
    data = _by_class() if is_bad else digits()
    watched = fit(model, data=itertools.cycle(data))
    return Run(model, data, watched)


@bug("codestudyblog: loss is negative in training", "D34")
def nll_of_raw_scores(is_bad: bool) -> Run:
    """Give nll_loss what the last layer gives: negative, and without an end."""
    model = mlp()
    if not is_bad:
        model.append(nn.LogSoftmax(1))
    watched = fit(model, 60, lr=0.01, loss_fn=F.nll_loss)
    return Run(model, digits(), watched, F.nll_loss)


@bug("codestudyblog: loss is negative in training, reason 1", "D28")
def pixels_from_0_to_255(is_bad: bool) -> Run:
    """Take inputs as they are stored."""
    model = mlp()

    def scaled(x: Tensor, y: Tensor) -> Batch:
        return (x * 255 / 16 if is_bad else (x - 4.9) / 6), y

    data = changed(
        (b for seed in itertools.count() for b in digits(64, seed, raw=True)), scaled
    )
    watched = fit(model, data=data, lr=0.02)
    return Run(model, list(changed(digits(raw=True), scaled)), watched)


class Backbone(nn.Module):
    """A trained body whose features a new head reads."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores; the body gets no gradient."""
        with torch.no_grad():
            features = self.body(x)
        return self.head(features)


def _brighter(x: Tensor, y: Tensor) -> Batch:
    return 1.5 * x + 1, y


@bug("lightly#1438, unbiased-teacher#47", "D07")
def backbone_under_no_grad_in_training_mode(is_bad: bool) -> Run:
    """Trust torch.no_grad() to freeze running statistics."""
    body = mlp()
    fit(body)
    model = Backbone(body[:-1])
    if not is_bad:
        for norm in model.body:
            if isinstance(norm, nn.BatchNorm1d):
                norm.eval()
                norm.train = lambda mode=True, norm=norm: norm
    data = changed(endless(), _brighter)
    watched = fit(model, 60, data=data, parameters=model.head.parameters())
    return Run(model, list(changed(digits(), _brighter)), watched)


@bug("gt-pyg#112", "D07")
def freeze_undone_by_train(is_bad: bool) -> Run:
    """Call eval() on the norms once; each epoch's train() undoes it."""
    model = mlp()
    fit(model)
    norms = [module for module in model if isinstance(module, nn.BatchNorm1d)]
    for module in model[:-1]:
        module.requires_grad_(False)

    def frozen(step: int) -> None:
        for norm in norms if not is_bad else ():
            norm.eval()

    frozen(0)
    if not is_bad:
        for norm in norms:
            norm.train = lambda mode=True, norm=norm: norm
    data = changed(endless(), _brighter)
    watched = fit(model, 60, data=data, parameters=model[-1].parameters())
    return Run(model, list(changed(digits(), _brighter)), watched)


@bug("pytorch_ema#13", "D31", "D01", "D02")
def averaged_parameters_beside_other_statistics(is_bad: bool) -> Run:
    """Copy averaged parameters into the model; its statistics stay as they were."""
    model = mlp()
    averages = [p.detach().clone() for p in model.parameters()]

    def average(step: int) -> None:
        for old, new in zip(averages, model.parameters(), strict=True):
            old.lerp_(new.detach(), 0.01)

    watched = fit(model, 300, after=average, lr=0.1)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), averages, strict=True):
            parameter.copy_(value)
    if not is_bad:
        torch.optim.swa_utils.update_bn([x for x, _ in digits()], model)
    return Run(model, digits(), watched)


@bug("mmpretrain#870", "D31", "D34", "D01", "D03")
def average_that_has_not_moved(is_bad: bool) -> Run:
    """Average at a rate of 0.0001 for 300 steps: the average is still the start."""
    model = mlp()
    teacher = copy.deepcopy(model)
    rate = 1e-4 if is_bad else 0.05

    def follow(step: int) -> None:
        with torch.no_grad():
            pairs = zip(
                teacher.state_dict().values(), model.state_dict().values(), strict=True
            )
            for old, new in pairs:
                old.copy_(old + rate * (new - old) if old.is_floating_point() else new)

    watched = fit(model, 300, after=follow, lr=0.02)
    return Run(teacher, digits(), watched)


@bug("practical-pytorch#9", "D24", "D27")
def optimizer_of_another_model(is_bad: bool) -> Run:
    """Build the model twice; the optimizer has the parameters of the first."""
    first, model = mlp(), mlp()
    parameters = first.parameters() if is_bad else model.parameters()
    return Run(model, digits(), fit(model, parameters=list(parameters)))


@bug("hedwig#30", "D24", "D27")
def schedule_that_ends_before_it_starts(is_bad: bool) -> Run:
    """Compute the number of steps as 0, and so the learning rate."""
    model = mlp()
    return Run(model, digits(), fit(model, lr=0.0 if is_bad else 0.05))


@bug("TennisCourtDetector#7, aihwkit#446", "D25", "D27", "D34")
def gradients_that_are_never_cleared(is_bad: bool) -> Run:
    """Leave out zero_grad: each step follows the sum of all gradients so far."""
    model = mlp(None)
    return Run(model, digits(), fit(model, 150, lr=0.02, clears=not is_bad))


@bug("visual_prompting#7", "D27", "D25", "D23", "D34")
def rate_that_grows_with_each_step(is_bad: bool) -> Run:
    """Count a warm-up in batches where epochs were meant: the rate never stops."""
    model = mlp(None)
    grows = (lambda step: 0.04 * (step + 1)) if is_bad else None
    return Run(model, digits(), fit(model, 150, lr=0.04, schedule=grows))


@bug("openillumi 113698: huge negative loss", "D34")
def prices_under_binary_cross_entropy(is_bad: bool) -> Run:
    """Fit prices with the loss of a tutorial on classification."""
    model = with_end(mlp(), nn.Linear(64, 1))

    def price(x: Tensor, y: Tensor) -> Batch:
        return x, 10 + 5 * y.float()[:, None]

    loss = F.binary_cross_entropy_with_logits if is_bad else F.mse_loss
    watched = fit(model, lr=1e-3, data=changed(endless(), price), loss_fn=loss)
    return Run(model, list(changed(digits(), price)), watched, loss)


@bug("DeepFD table, wrong activation of the output", "D34")
def sigmoid_before_targets_above_one(is_bad: bool) -> Run:
    """Fit numbers from 0 to 9 with a network that ends in a sigmoid."""
    model = with_end(mlp(), nn.Linear(64, 1))

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        y = model(batch[0])
        return torch.sigmoid(y) if is_bad else y

    def number(x: Tensor, y: Tensor) -> Batch:
        return x, y.float()[:, None]

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return (y - target).square().mean()

    watched = fit(
        model,
        lr=0.01,
        data=changed(endless(), number),
        loss_fn=lambda y, t: loss(torch.sigmoid(y) if is_bad else y, t),
    )
    return Run(model, list(changed(digits(), number)), watched, loss, forward)


@bug("taourl 1959901: the same value for the whole batch", "D26")
def weights_that_start_at_zero(is_bad: bool) -> Run:
    """Set every weight of a layer to one value."""
    model = mlp(None)
    if is_bad:
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.constant_(layer.weight, 0.01)
                nn.init.zeros_(layer.bias)
    return Run(model, digits(), fit(model))


class Flattened(nn.Module):
    """Batch norm over the positions of all sequences, in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows of a digit."""
        h = self.first(x)
        h = self.norm(h.flatten(0, 1)).relu().view_as(h)
        return self.last(h.amax(1))


@bug("pytorch#70529", "D12")
def padding_behind_a_flatten(is_bad: bool) -> Run:
    """Normalize sequences with zeros at their ends, batch and time as one."""
    source = torch.Generator().manual_seed(0)

    def padded(x: Tensor, y: Tensor) -> Batch:
        x = 2 + x.reshape(-1, 8, 8)
        ends = torch.randint(2, 9, (len(x), 1, 1), generator=source)
        return x.where(torch.arange(8)[:, None] < ends, 0.0) if is_bad else x, y

    model = Flattened()
    watched = fit(model, 200, data=changed(endless(), padded))
    return Run(model, list(changed(digits(), padded))[:25], watched)


@bug("Pytorch-Deeplab#17", "D05")
def batches_of_two(is_bad: bool) -> Run:
    """Train on two samples per batch."""
    size = 2 if is_bad else 64
    model = mlp()
    watched = fit(model, 600 if is_bad else 150, size=size, lr=0.01)
    return Run(model, digits(size), watched)
