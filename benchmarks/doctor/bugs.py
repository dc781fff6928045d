"""Bugs of real programs, as public threads describe them, each beside its clean twin.

They are kept apart from the tests: no threshold is chosen to suit them. `expected`
was written down before the doctor saw the program.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """A program after it ran: what a diagnosis gets, and what was watched."""

    model: nn.Module
    loader: list[Batch]
    watched: list[Any] = field(default_factory=list)
    loss_fn: Any = cross_entropy
    forward: Any = None


@dataclass(frozen=True)
class Bug:
    """One bug: where it was reported, which check should name it, how to run it."""

    name: str
    threads: str
    expected: tuple[str, ...]
    program: Callable[[bool], Run]


BUGS: list[Bug] = []


def bug(threads: str, *expected: str) -> Callable[..., Any]:
    """Enter a program; called with True it has the bug, with False it does not."""

    def enter(program: Callable[[bool], Run]) -> Callable[[bool], Run]:
        BUGS.append(Bug(program.__name__, threads, expected, program))
        return program

    return enter


def digits(size: int = 64, seed: int = 0, *, raw: bool = False) -> list[Batch]:
    """Shuffled digits in batches; the last, short one is left out."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    if not raw:
        x = (x - x.mean()) / x.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(size) if len(part) == size]
    return [(x[i], torch.tensor(y)[i]) for i in parts]


def mlp(norm: Any = nn.BatchNorm1d, width: int = 64, depth: int = 3) -> nn.Sequential:
    """Linear, norm, ReLU, a few times; norm None leaves it out."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Linear(width if index else 64, width))
        if norm is not None:
            layers.append(norm(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, 10))


def endless(size: int = 64) -> Iterator[Batch]:
    """Epoch after epoch, each in another order."""
    return (b for seed in itertools.count() for b in digits(size, seed))


def fit(
    model: nn.Module,
    steps: int = 150,
    *,
    lr: float = 0.05,
    size: int = 64,
    after: Callable[[int], None] | None = None,
    data: Iterator[Batch] | None = None,
    accumulate: int = 1,
    parameters: Any = None,
    loss_fn: Any = cross_entropy,
    clears: bool = True,
    schedule: Callable[[int], float] | None = None,
) -> list[Any]:
    """Train under `watch`; `after(step)` runs after each step.

    `clears` tells whether gradients are set to zero, `schedule(step)` gives the rate.
    """
    from normkit.doctor import watch

    chosen = list(model.parameters() if parameters is None else parameters)
    optimizer = torch.optim.SGD(chosen, lr, momentum=0.9)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for step, (x, y) in enumerate(itertools.islice(data or endless(size), steps)):
            (loss_fn(model(x), y) / accumulate).backward()
            if (step + 1) % accumulate == 0:
                if schedule is not None:
                    optimizer.param_groups[0]["lr"] = schedule(step)
                optimizer.step()
                if clears:
                    optimizer.zero_grad()
            if after is not None:
                after(step)
    return seen.findings()


@bug("pytorch#4741, pytorch#5406", "D03", "D04")
def evaluated_after_a_few_slow_steps(is_bad: bool) -> Run:
    """momentum=0.01 and 60 steps: eval mode gives far worse numbers."""
    model = mlp(lambda width: nn.BatchNorm1d(width, momentum=0.01 if is_bad else 0.1))
    return Run(model, digits(), fit(model, 60))


@bug("torchvision#8250, deeplab#79, tacotron#19", "D04")
def momentum_of_another_framework(is_bad: bool) -> Run:
    """0.997 copied from a program where it is the weight of the old value."""
    model = mlp(lambda width: nn.BatchNorm1d(width, momentum=0.997 if is_bad else 0.1))
    return Run(model, digits(8), fit(model, 300, size=8, lr=0.01))


@bug("ludwig#2100", "D04")
def default_momentum_of_another_framework(is_bad: bool) -> Run:
    """Take over a default of 0.001."""
    model = mlp(lambda width: nn.BatchNorm1d(width, momentum=1e-3 if is_bad else 0.1))
    return Run(model, digits(), fit(model))


@bug("pytorch-fcn#57, vsepp#4", "D08")
def training_goes_on_in_eval_mode(is_bad: bool) -> Run:
    """Validate in eval(), and never call train() again."""
    model = mlp()
    held = digits()[:2]

    def validate(step: int) -> None:
        if step % 40 == 39:
            model.eval()
            with torch.no_grad():
                for x, _ in held:
                    model(x)
            if not is_bad:
                model.train()

    return Run(model, digits(), fit(model, after=validate))


@bug("robustdg#30", "D09")
def validation_in_training_mode(is_bad: bool) -> Run:
    """Validate without eval(): its batches enter the running statistics."""
    model = mlp()
    held = [(x + 2, y) for x, y in digits()[:6]]

    def validate(step: int) -> None:
        if step % 50 == 49:
            model.train(is_bad)
            with torch.no_grad():
                for x, _ in held:
                    model(x)
            model.train()

    return Run(model, digits(), fit(model, after=validate))


@bug("virtex#16, ultralytics#8753, chemprop#952", "D07")
def frozen_backbone_drifts(is_bad: bool) -> Run:
    """requires_grad=False, but train() lets the running statistics move."""
    model = mlp()
    fit(model)
    body, model[-1] = model[:-1], nn.Linear(64, 10)
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    shifted = ((1.5 * x + 1, y) for x, y in endless())
    if not is_bad:
        # What a careful program does: these layers ignore train().
        for module in body:
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
                module.train = lambda mode=True, module=module: module
    watched = fit(model, 60, data=shifted, parameters=model[-1].parameters())
    return Run(model, [(1.5 * x + 1, y) for x, y in digits()], watched)


@bug("pytorch#7716, fastai#1352", "D06")
def last_batch_of_one(is_bad: bool) -> Run:
    """1 + a multiple of the batch size, and no drop_last."""
    model = mlp()
    watched = fit(model)
    x, y = (torch.cat(parts) for parts in zip(*digits(), strict=True))
    count = 20 * 64 + is_bad
    data = torch.utils.data.TensorDataset(x[:count], y[:count])
    loader: Any = torch.utils.data.DataLoader(data, 64, shuffle=True)
    return Run(model, loader, watched)


@bug("torch/nn#1165, tf-frrn#2", "D32")
def only_parameters_were_saved(is_bad: bool) -> Run:
    """Load a checkpoint of named_parameters(): the buffers are a new model's."""
    model = mlp()
    watched = fit(model)
    saved = dict(model.named_parameters()) if is_bad else model.state_dict()
    loaded = mlp()
    loaded.load_state_dict(saved, strict=not is_bad)
    return Run(loaded, digits(), watched)


@bug("stable-baselines3#1004, mean-teacher#9", "D32", "D31", "D01", "D03")
def averaged_teacher_without_buffers(is_bad: bool) -> Run:
    """Average the student's parameters into a teacher, but not its buffers."""
    model = mlp()
    teacher = copy.deepcopy(model)

    def follow(step: int) -> None:
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.05)
            if not is_bad:
                for old, new in zip(teacher.buffers(), model.buffers(), strict=True):
                    old.copy_(new)

    watched = fit(model, 300, after=follow, lr=0.02)
    return Run(teacher, digits(), watched)


@bug("ignite#2590, ema-pytorch#29, pytorch#84053", "D31", "D01", "D32")
def averaged_weights_with_old_statistics(is_bad: bool) -> Run:
    """Buffers are copied when the average is made, and never again.

    AveragedModel did so when the threads were written, and others still do. Today's
    brings them along, so that this program would have no bug with it.
    """
    model = mlp()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    old = [buffer.clone() for buffer in averaged.module.buffers()]

    def average(step: int) -> None:
        if step >= 20:
            averaged.update_parameters(model)
            for buffer, then in zip(averaged.module.buffers(), old, strict=True):
                buffer.copy_(then)

    watched = fit(model, 200, after=average)
    if not is_bad:
        torch.optim.swa_utils.update_bn(digits(), averaged)
    return Run(averaged, digits(), watched)


@bug("pytorch#88474, pytorch#115500", "D17")
def one_infinite_batch(is_bad: bool) -> Run:
    """Mixed precision overflows once; the running statistics never recover."""
    model = mlp()
    watched = fit(model)
    if is_bad:
        x = digits()[0][0].clone()
        x[0, 0] = torch.inf
        with torch.no_grad():
            model.train()(x)
    return Run(model, digits(), watched)


@bug("spconv#513", "D16")
def statistics_in_half_precision(is_bad: bool) -> Run:
    """Convert a model to half precision with its batch norms."""
    model = mlp()
    data = endless()
    if is_bad:
        model = model.bfloat16()
        data = ((x.bfloat16(), y) for x, y in data)
    watched = fit(model, data=data)
    kind = torch.bfloat16 if is_bad else torch.float32
    return Run(model, [(x.to(kind), y) for x, y in digits()], watched)


@bug("mmcv#1869, pytorch#46516", "D15", "D05")
def accumulation_over_tiny_batches(is_bad: bool) -> Run:
    """16 batches of 4 for one of 64: gradients add up, statistics do not."""
    model = mlp()
    size = 4 if is_bad else 64
    watched = fit(model, 400 if is_bad else 150, size=size, accumulate=64 // size)
    return Run(model, digits(size), watched)


@bug("pytorch#70529, Multilingual_Text_to_Speech#81", "D12")
def padding_in_the_statistics(is_bad: bool) -> Run:
    """Sequences of different lengths, zeros at their ends, one batch norm."""

    def padded() -> Iterator[Batch]:
        source = torch.Generator().manual_seed(0)
        for x, y in endless():
            x = x.reshape(-1, 8, 8).clone()
            if is_bad:
                ends = torch.randint(2, 9, (len(x), 1, 1), generator=source)
                x = x.where(torch.arange(8) < ends, 0.0)
            yield x, y

    model = nn.Sequential(
        *(nn.Conv1d(8, 32, 1), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.Conv1d(32, 32, 1), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    watched = fit(model, 200, data=padded())
    return Run(model, list(itertools.islice(padded(), 25)), watched)


class Critic(nn.Module):
    """Real and generated samples through one batch norm, in calls of their own."""

    def __init__(self, is_bad: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, 48)
        self.real = nn.BatchNorm1d(48)
        self.made = self.real if is_bad else nn.BatchNorm1d(48)
        self.last = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of samples and of what is made of them."""
        real = self.last(self.real(self.first(x)).relu())
        made = self.last(self.made(self.first(0.3 * x + 1.5)).relu())
        return real + 0.1 * made


@bug("ganhacks#52", "D33")
def one_norm_for_real_and_generated(is_bad: bool) -> Run:
    """Mix two kinds of samples: the running average fits neither."""
    model = Critic(is_bad)
    return Run(model, digits(), fit(model))


@bug("keras#7057", "D21")
def dead_units(is_bad: bool) -> Run:
    """Train with a rate that kills the units in the first steps."""
    torch.manual_seed(1)
    model = mlp(None)
    watched = fit(model, 200, lr=1.5 if is_bad else 0.02, size=64)
    return Run(model, digits(), watched)


@bug("DeepFD table (25 of 58 faults are of this kind)", "D34")
def no_activation(is_bad: bool) -> Run:
    """Linear after linear after linear."""
    between = nn.Identity if is_bad else nn.ReLU
    layers = (nn.Linear(64, 64), between(), nn.Linear(64, 64), between())
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return Run(model, digits(), fit(model))


@bug("UMLAUT, DeepFD", "D34")
def softmax_twice(is_bad: bool) -> Run:
    """End in a softmax, before a cross_entropy that applies another."""
    model = mlp()
    if is_bad:
        model.append(nn.Softmax(1))
    return Run(model, digits(), fit(model))
