"""Bugs of kinds that bugs.py and more_bugs.py lack: loss, labels, types, parameters.

As there, `expected` was written down before the doctor saw the program, and no
threshold was chosen to suit. What the doctor said of them at first sight stands in
`FIRST_SIGHT`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless, fit, mlp
from more_bugs import changed, with_end
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time. The
# overflow was another program then: sums beyond 65504, with a twin that alarmed (D24).
FIRST_SIGHT: dict[str, tuple[str, ...]] = {
    "labels_shuffled_apart_from_their_images": ("D34",),
    "loss_summed_over_the_batch": ("D21", "D24", "D34"),
    "overflow_in_half_precision": ("D25", "D34"),
    "decay_on_the_scales_of_norms": ("D14",),
    "deep_post_norm_without_a_warm_up": ("D38",),
    "constants_for_255_on_pixels_from_0_to_1": ("D21", "D28", "D34"),
    "loss_of_a_detached_output": ("D24", "D27"),
    "share_to_keep_given_as_share_to_drop": ("D11", "D21", "D34"),
    "answers_and_targets_of_two_shapes": ("D34",),
    "layers_in_a_plain_list": (),
    "softmax_over_the_batch": (),
    "missing_values_in_the_data": ("D17", "D28", "D25", "D34", "D27"),
    "batch_norm_behind_the_last_layer": (),
}


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[Batch],
    loss_fn: Any = F.cross_entropy,
    steps: int = 150,
) -> list[Any]:
    """Train with an optimizer of the program's own, watched, its losses logged."""
    from normkit.doctor import watch

    model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(data, steps):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            seen.log(loss=float(loss))
    return seen.findings()


@bug("VMT#1", "D34")
def labels_shuffled_apart_from_their_images(is_bad: bool) -> Run:
    """Shuffle images and labels by two calls: each epoch pairs them anew."""

    def pairs() -> Iterator[Batch]:
        for epoch in itertools.count():
            others = digits(64, 1000 + epoch)
            for (x, y), (_, other) in zip(digits(64, epoch), others, strict=True):
                yield x, other if is_bad else y

    model = mlp()
    watched = fit(model, data=pairs())
    return Run(model, list(itertools.islice(pairs(), 28)), watched)


@bug("jax#3113, facenet: sum in place of mean", "D27", "D25", "D34")
def loss_summed_over_the_batch(is_bad: bool) -> Run:
    """Sum the loss, at the rate that was chosen for its mean."""
    model = mlp(None)

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y, target, reduction="sum" if is_bad else "mean")

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    watched = trained(model, optimizer, endless(), loss)
    return Run(model, digits(), watched, loss)


@bug("transformers#5651, transformers#4586", "D25", "D34", "D17")
def overflow_in_half_precision(is_bad: bool) -> Run:
    """Train in float16 with a loss scale of 2**20; the twin has one of 2**7."""
    model = mlp(None).half()
    scale = 2.0**20 if is_bad else 2.0**7

    def half(x: Tensor, y: Tensor) -> Batch:
        return x.half(), y

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.float(), target) * scale

    optimizer = torch.optim.SGD(model.parameters(), 0.05 / scale)
    watched = trained(model, optimizer, changed(endless(), half), loss)
    return Run(model, list(changed(digits(), half)), watched, loss)


@bug("torch7#846, CurricularFace#15", "D14")
def decay_on_the_scales_of_norms(is_bad: bool) -> Run:
    """Give all parameters one weight decay, of 0.05."""
    model = mlp()
    norms = [p for m in model if isinstance(m, nn.BatchNorm1d) for p in m.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in norms)]
    groups: Any = [{"params": others}, {"params": norms}]
    groups[1]["weight_decay"] = 0.05 if is_bad else 0.0
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=0.05)
    return Run(model, digits(), trained(model, optimizer, endless()))


class PostNorm(nn.Module):
    """An encoder over the rows of a digit, with norms behind its sums."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.places = nn.Parameter(0.5 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the mean over the rows."""
        return self.last(self.layers(self.first(x) + self.places).mean(1))


@bug("Transformer-Clinic#16, predict_pv_yield#43", "D38")
def deep_post_norm_without_a_warm_up(is_bad: bool) -> Run:
    """Begin at the full rate; the twin reaches it after 100 steps."""
    from normkit.doctor import watch

    def rows(x: Tensor, y: Tensor) -> Batch:
        return x.view(-1, 8, 8), y

    model = PostNorm()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with watch(model, optimizer, every=5) as seen:
        data = itertools.islice(changed(endless(), rows), 150)
        for step, (x, y) in enumerate(data):
            rate = 3e-3 if is_bad else 1e-3 * min(1.0, (step + 1) / 100)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return Run(model, list(changed(digits(), rows)), seen.findings())


@bug("facenet-pytorch#89, SynergyNet#19", "D28")
def constants_for_255_on_pixels_from_0_to_1(is_bad: bool) -> Run:
    """Subtract 127.5 and divide by 128 where pixels already are 0 to 1."""

    def scaled(x: Tensor, y: Tensor) -> Batch:
        x = x / 16 if is_bad else x * 255 / 16
        return (x - 127.5) / 128, y

    def data() -> Iterator[Batch]:
        each = (b for seed in itertools.count() for b in digits(64, seed, raw=True))
        return changed(each, scaled)

    model = mlp(None)
    watched = fit(model, data=data())
    return Run(model, list(changed(digits(raw=True), scaled)), watched)


@bug("ReLeaSE#39, PyTorch-DAGMM#4", "D24", "D27", "D34")
def loss_of_a_detached_output(is_bad: bool) -> Run:
    """Wrap the output in a new tensor, to make backward() run."""
    model = mlp()

    def loss(y: Tensor, target: Tensor) -> Tensor:
        y = y.detach().requires_grad_() if is_bad else y
        return F.cross_entropy(y, target)

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    watched = trained(model, optimizer, endless(), loss)
    return Run(model, digits(), watched, loss)


@bug("pytorch-i3d#58, kinetics_i3d_pytorch#6", "D11")
def share_to_keep_given_as_share_to_drop(is_bad: bool) -> Run:
    """Pass keep_prob=0.9 of another framework as p, before batch norms."""
    layers: list[nn.Module] = [nn.Dropout(0.9 if is_bad else 0.1)]
    for module in mlp():
        layers.append(module)
        if isinstance(module, nn.ReLU):
            layers.append(nn.Dropout(0.9 if is_bad else 0.1))
    model = nn.Sequential(*layers)
    return Run(model, digits(), fit(model, 300))


@bug("pytorch#16045, pytorch#19699", "D34")
def answers_and_targets_of_two_shapes(is_bad: bool) -> Run:
    """Compare answers (N, 1) with targets (N,): each with all the others."""
    model = with_end(mlp(), nn.Linear(64, 1))

    def number(x: Tensor, y: Tensor) -> Batch:
        y = (y.float() - 4.5) / 2.9
        return x, y if is_bad else y[:, None]

    watched = fit(model, lr=0.01, data=changed(endless(), number), loss_fn=F.mse_loss)
    return Run(model, list(changed(digits(), number)), watched, F.mse_loss)


class Listed(nn.Module):
    """Hidden layers in a list of Python, or in a ModuleList."""

    def __init__(self, is_bad: bool) -> None:
        super().__init__()
        layers = [nn.Linear(64, 64) for _ in range(3)]
        self.layers = layers if is_bad else nn.ModuleList(layers)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(x)


@bug("pytorch#59925, SLIIF#13, pytorch#1053", "D34")
def layers_in_a_plain_list(is_bad: bool) -> Run:
    """Keep layers where parameters() does not see them."""
    model = Listed(is_bad)
    return Run(model, digits(), fit(model))


@bug("world-models#10, euclidesdb#2", "D34")
def softmax_over_the_batch(is_bad: bool) -> Run:
    """Take the softmax over dimension 0."""
    model = mlp()
    model.append(nn.LogSoftmax(0 if is_bad else 1))
    watched = fit(model, loss_fn=F.nll_loss)
    return Run(model, digits(), watched, F.nll_loss)


@bug("neuralforecast#186, clinicadl#106", "D28")
def missing_values_in_the_data(is_bad: bool) -> Run:
    """Read a table with empty cells: NaN in one sample of a hundred."""
    source = torch.Generator().manual_seed(0)

    def holes(x: Tensor, y: Tensor) -> Batch:
        x = x.clone()
        if is_bad:
            x[torch.rand(len(x), generator=source) < 0.01, 5] = float("nan")
        return x, y

    model = mlp()
    watched = fit(model, data=changed(endless(), holes))
    return Run(model, list(changed(digits(), holes)), watched)


@bug("DAN#14, and regression behind a batch norm", "D34", "D05", "D02", "D29")
def batch_norm_behind_the_last_layer(is_bad: bool) -> Run:
    """Normalize the answers of a regression over batches of eight."""
    model = with_end(mlp(), nn.Linear(64, 1))
    if is_bad:
        model.append(nn.BatchNorm1d(1, affine=False))

    def number(x: Tensor, y: Tensor) -> Batch:
        return x, 3 + y.float()[:, None]

    watched = fit(
        model, lr=0.01, size=16, data=changed(endless(16), number), loss_fn=F.mse_loss
    )
    return Run(model, list(changed(digits(16), number))[:40], watched, F.mse_loss)
