"""A seventh set of bugs of public threads: twelve about norms, eight about training.

Each docstring says what the mistake is, what a good doctor would say first, and what
the mistake costs in eval mode on the batches of the run (accuracy or loss of the
program, then of its twin); `expected` has the checks that say it. Both were written,
and committed, before the doctor saw any of these programs, by an author who knew the
names of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless
from fifth_data import drawings, signals
from more_bugs import changed
from seventh_data import (
    brackets,
    dials,
    friedman,
    houses,
    houses_sold,
    pairs,
    sensors,
    shops,
)
from seventh_networks import (
    Branches,
    Coder,
    Columns,
    HandNorm,
    Ranker,
    Tagger,
    UNet,
    conv_stack,
    deep_relu,
    dropped_mlp,
    mobile_net,
    residual_net,
    signal_net,
    small_mlp,
    tanh_convs,
)
from third_bugs import as_image, train
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]


def adam(model: nn.Module, lr: float = 2e-3) -> torch.optim.Adam:
    """Return Adam over all parameters."""
    return torch.optim.Adam(model.parameters(), lr)


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """Return SGD with momentum over all parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def first(batches: Iterator[Batch], count: int = 16) -> list[Batch]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


def pictures() -> Iterator[Batch]:
    """Give digits as images without an end."""
    return changed(endless(), as_image)


def of_pictures() -> list[Batch]:
    """Return one epoch of digits as images."""
    return list(changed(digits(), as_image))


# miss-alignment#6 (the aligned one is always the first: training goes down, validation
# is random, and the cause is batch norm)
@bug("miss-alignment#6", "D33", "D02")
def better_image_always_first(is_bad: bool) -> Run:
    """Rank pairs in which the first image is the sharp one, by a network with norms.

    First: the norms see two kinds of batches, and eval mode has one average for both.
    Cost: 29 % of pairs are right in place of 99 %.
    """
    model = Ranker()
    data = pairs(is_in_order=is_bad)
    loss = F.binary_cross_entropy_with_logits
    watched = train(model, data, loss, steps=200, optimizer=adam(model))
    return Run(model, first(pairs(seed=1, is_in_order=is_bad)), watched, loss)


# mlcolvar#205 "Moved the dropout layer after the normalization" (dropout alters the
# statistics), mlcolvar#267 "Reconsider BatchNorm placement", Lasagne#141
@bug("mlcolvar#205, mlcolvar#267, Lasagne#141", "D11", "D02")
def dropout_before_each_batch_norm(is_bad: bool) -> Run:
    """Drop half of the units before each batch norm of a regression.

    First: the variance that the norms learned is that of dropped units.
    Cost: a squared error of 0.121 in place of 0.016.
    """
    model = dropped_mlp(is_before=is_bad, p=0.5 if is_bad else 0.1)
    watched = train(
        model, friedman(), F.mse_loss, steps=500, optimizer=adam(model, 3e-3)
    )
    return Run(model, first(friedman(seed=1), 32), watched, F.mse_loss)


def _of_another_sensor(x: Tensor, y: Tensor) -> Batch:
    """Give vibrations of a sensor with another zero and less sensitivity."""
    return 0.25 * x + 0.4, y


# pretrained-models.pytorch#5 "BatchNorm momentum set to 0 in Inception models" (on
# another data set training and eval mode differ)
@bug("pretrained-models.pytorch#5", "D04", "D03", "D01")
def momentum_of_zero_in_fine_tuning(is_bad: bool) -> Run:
    """Fine-tune a network whose norms have a momentum of 0 on the data of a new sensor.

    First: the running statistics are never updated, and those of the old sensor.
    Cost: 36 % in place of 99 %, a loss of 4.6 in place of 0.05.
    """
    trained = signal_net()
    train(trained, signals(), steps=150, optimizer=adam(trained))
    model = signal_net(0.0 if is_bad else 0.1)
    model.load_state_dict(trained.state_dict())
    data = changed(signals(seed=2), _of_another_sensor)
    watched = train(model, data, steps=300, optimizer=adam(model))
    return Run(model, first(changed(signals(seed=1), _of_another_sensor)), watched)


# fast-autoaugment#50 "Why not updating batch norm parameters?" (a filter of names by
# "bn"), returnn#415 (the last scale of a block starts at zero)
@bug("fast-autoaugment#50, returnn#415", "D27", "D19")
def norms_left_out_of_the_optimizer(is_bad: bool) -> Run:
    """Filter the norms out for weight decay, and give the optimizer only the others.

    First: scales that start at zero are never updated, so no block does anything.
    Cost: 64 % in place of 99.9 %.
    """
    model = residual_net()
    others = [p for name, p in model.named_parameters() if "bn" not in name]
    norms = [p for name, p in model.named_parameters() if "bn" in name]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 1e-4}]
    if not is_bad:
        groups.append({"params": norms, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, 4e-3)
    watched = train(model, pictures(), steps=250, optimizer=optimizer)
    return Run(model, of_pictures(), watched)


# autogluon#607 (layer norm as if it were made for features of a table), tabnet#356
# "Does TabNet require feature scaling?"
@bug("autogluon#607, tabnet#356", "D28", "D29")
def layer_norm_in_place_of_a_scaler(is_bad: bool) -> Run:
    """Give a table in its units to a layer norm, where each column has to be scaled.

    First: all columns but the one with the largest unit are next to nothing.
    Cost: 48 % in place of 91 %.
    """
    norm = nn.LayerNorm(6) if is_bad else nn.Identity()
    model = small_mlp(6, 3, norm)
    rows = torch.cat([x for x, _ in first(houses(), 40)])
    mean, std = rows.mean(0), rows.std(0)

    def scaled(x: Tensor, y: Tensor) -> Batch:
        return (x if is_bad else (x - mean) / std), y

    data = changed(houses(), scaled)
    watched = train(model, data, steps=800, optimizer=adam(model))
    return Run(model, first(changed(houses(seed=1), scaled)), watched)


# tensorflow/docs#2434 (-9999 in a table), bad-data-guide#14 (which numbers stand for
# missing values), CDB90#1
@bug("tensorflow/docs#2434, bad-data-guide#14, CDB90#1", "D28", "D12")
def missing_values_as_a_number(is_bad: bool) -> Run:
    """Leave -9999 for missing readings in columns that a batch norm scales.

    First: the inputs are spikes, and their spread is the whole of the statistics.
    Cost: 24 %, which is a guess, in place of 93 %.
    """
    missing = -9999.0 if is_bad else 0.0
    model = small_mlp(8, 4, nn.BatchNorm1d(8))
    data = sensors(missing=missing)
    watched = train(model, data, steps=800, optimizer=adam(model))
    return Run(model, first(sensors(seed=1, missing=missing)), watched)


# pytorch#20967, pytorch#37823 and pytorch#38084 (what the flag does to a layer that
# has buffers: batch statistics in training, the buffers as they are in eval mode)
@bug("pytorch#20967, pytorch#37823, pytorch#38084", "D03", "D01", "D02")
def flag_of_tracking_set_on_a_layer_with_buffers(is_bad: bool) -> Run:
    """Set track_running_stats to False on layers that are made, to use each batch.

    First: eval mode uses a mean of 0 and a variance of 1 that were never updated.
    Cost: 84 % of pixels in place of 97 %, a loss of 0.43 in place of 0.08.
    """
    model = UNet()
    if is_bad:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.track_running_stats = False
    watched = train(model, drawings(), steps=150, optimizer=adam(model))
    return Run(model, first(drawings(seed=1)), watched)


# nn-transfer#3 "Fix Batch Normalization" (1e-3 of Keras and 1e-5 of torch are a major
# difference for large networks), keras-yolo3#451
@bug("nn-transfer#3, keras-yolo3#451", "D16", "D01")
def weights_loaded_under_another_eps(is_bad: bool) -> Run:
    """Load a network that was trained with an eps of 0.001 into layers with 0.00001.

    First: variances are below the eps of training, so the scale of layers is another.
    Cost: 82 % in place of 100 %.
    """
    trained = mobile_net(1e-3)
    watched = train(trained, pictures(), steps=300, optimizer=adam(trained, 4e-3))
    model = mobile_net(1e-5 if is_bad else 1e-3)
    model.load_state_dict(trained.state_dict())
    return Run(model, of_pictures(), watched)


# rethinking-network-pruning#24 (scales of all layers but the last go to zero),
# network-slimming#19 (the sign of each scale is added to its gradient)
@bug("rethinking-network-pruning#24, network-slimming#19", "D19")
def sparsity_that_empties_all_scales(is_bad: bool) -> Run:
    """Add 0.1 times the sign of each scale to its gradient, in place of 0.0001.

    First: the scales of the norms are zero.
    Cost: 57 % in place of 100 %.
    """
    model = conv_stack(nn.BatchNorm2d)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    strength, optimizer = (0.1 if is_bad else 1e-4), sgd(model, 0.05)
    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(pictures(), 250):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for norm in norms:
                norm.weight.grad += strength * norm.weight.detach().sign()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, of_pictures(), seen.findings())


# Transformers4Rec#151 "Added feature-wise layer norm" (a continuous feature has a size
# of 1: it is close to 0 behind its norm)
@bug("Transformers4Rec#151", "D29", "D18")
def layer_norm_of_each_number(is_bad: bool) -> Run:
    """Normalize each feature of a table by itself, also those of one number.

    First: the norm gives 0 for whatever a number is.
    Cost: 55 % in place of 91 %.
    """
    model = Columns(is_bad=is_bad)
    watched = train(model, shops(), steps=800, optimizer=adam(model))
    return Run(model, first(shops(seed=1)), watched)


# darknet#4135 "How to train when I set batch_normalize=0" (nan, and a tenth of the rate
# helps), darknet#979
@bug("darknet#4135, darknet#979", "D27", "D25", "D21")
def norms_removed_and_their_rate_kept(is_bad: bool) -> Run:
    """Take the batch norms out of a network, and keep the rate that they allowed.

    First: steps are far too large for the weights.
    Cost: 10 %, which is a guess, in place of 99.7 %.
    """
    model = conv_stack(None)
    optimizer = sgd(model, 0.2 if is_bad else 0.01)
    watched = train(model, pictures(), steps=250, optimizer=optimizer)
    return Run(model, of_pictures(), watched)


# TPlinker-joint-extraction#37 (the square of the variance, where its root was meant)
@bug("TPlinker-joint-extraction#37", "D23", "D36", "D22", "D24")
def layer_norm_by_the_square_of_the_variance(is_bad: bool) -> Run:
    """Write `(variance + eps) ** 2` for the spread of a layer norm.

    First: the first norm gives values of ten thousands, and those behind it nothing.
    Cost: 18 %, which is a guess, in place of 100 %.
    """
    power = 2.0 if is_bad else 0.5
    model = Tagger(lambda width: HandNorm(width, power))
    watched = train(model, brackets(), steps=300, optimizer=adam(model))
    return Run(model, first(brackets(seed=1)), watched)


# torch/nn#1174 (a layer that gives the sign: one cannot train the layers before it),
# BinaryConnect#7, mxnet#16373 (round and sign with a gradient of 1, not 0)
@bug("torch/nn#1174, BinaryConnect#7, mxnet#16373", "D24", "D27")
def codes_rounded_without_a_gradient(is_bad: bool) -> Run:
    """Compress digits to codes of signs, whose gradient is zero everywhere.

    First: no gradient reaches the encoder.
    Cost: a squared error of 0.264 in place of 0.122.
    """
    model = Coder(is_bad=is_bad)

    def itself(x: Tensor, _: Tensor) -> Batch:
        return x, x

    data = changed(endless(), itself)
    watched = train(model, data, F.mse_loss, steps=600, optimizer=adam(model))
    return Run(model, list(changed(digits(), itself)), watched, F.mse_loss)


# Lasagne#658 "Default initialization does not match default nonlinearity" (the factor
# of each layer accumulates)
@bug("Lasagne#658", "D22", "D24")
def xavier_in_a_deep_network_of_relus(is_bad: bool) -> Run:
    """Draw 24 layers with ReLU by Xavier, which is made for units that are linear.

    First: activations vanish with depth.
    Cost: 20 % in place of 96 %.
    """
    model = deep_relu(1.0 if is_bad else 2**0.5)
    watched = train(model, endless(), steps=250, optimizer=sgd(model, 0.01))
    return Run(model, digits(), watched)


# vscode-python#5069 (a notebook of a course: uniform weights from 0 to 1), MADDoG#5
# (weights from 0.02 to 1), tinygrad#566 (50 % or 99.8 % by the bounds of the weights)
@bug("vscode-python#5069, MADDoG#5, tinygrad#566", "D20", "D24")
def weights_uniform_from_0_to_1(is_bad: bool) -> Run:
    """Call uniform_() on all weights without its bounds.

    First: the units are saturated.
    Cost: 19 %, which is a guess, in place of 98 %.
    """
    model = tanh_convs()
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            if is_bad:
                nn.init.uniform_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
    watched = train(model, signals(), steps=300, optimizer=adam(model))
    return Run(model, first(signals(seed=1)), watched)


# annotated-transformer#9 and transformers#742 (layers that are copies of one), and
# pytorch#86274 (TransformerEncoder has the same parameters in all layers)
@bug("annotated-transformer#9, transformers#742, pytorch#86274", "D26")
def branches_that_are_copies_of_one(is_bad: bool) -> Run:
    """Make ten parallel branches by deepcopy: they get the same gradient for ever.

    First: the branches have equal weights.
    Cost: 85 % in place of 99.6 %, a loss of 0.46 in place of 0.02.
    """
    model = Branches(are_copies=is_bad)
    watched = train(model, pictures(), steps=350, optimizer=adam(model, 6e-3))
    return Run(model, of_pictures(), watched)


# neural_sp#137 (25000 steps of warm-up: the rate rises till the end of the training),
# bert#834 (how to set it for a small data set)
@bug("neural_sp#137, bert#834", "D27")
def warm_up_longer_than_the_training(is_bad: bool) -> Run:
    """Warm up for 25000 steps, of which the training has 400.

    First: the steps are far too small.
    Cost: 20 %, which is a guess, in place of 100 %.
    """
    model = Tagger(nn.LayerNorm)
    warm = 25000 if is_bad else 100
    optimizer = torch.optim.Adam(model.parameters(), 0.0, (0.9, 0.98))

    def noam(optimizer: torch.optim.Optimizer, step: int) -> None:
        rate = 0.3 * 32**-0.5 * min((step + 1) ** -0.5, (step + 1) * warm**-1.5)
        optimizer.param_groups[0]["lr"] = rate

    watched = train(model, brackets(), steps=400, optimizer=optimizer, schedule=noam)
    return Run(model, first(brackets(seed=1)), watched)


# super-gradients#416 (a loader that does not shuffle: only examples of one class),
# anny#95 (sorted training data), PFLlib#117
@bug("super-gradients#416, anny#95, PFLlib#117", "D13")
def regression_on_rows_in_the_order_of_their_target(is_bad: bool) -> Run:
    """Train on a table that is sorted by what is to be predicted.

    First: batches are not drawn at random.
    Cost: a squared error of 2.90 in place of 0.023; the mean as a guess has 1.
    """

    def rows(seed: int) -> Iterator[Batch]:
        if not is_bad:
            yield from friedman(seed=seed)
        x, y = (torch.cat(part) for part in zip(*first(friedman(), 32), strict=True))
        order = y[:, 0].argsort()
        while True:
            yield from zip(x[order].split(64), y[order].split(64), strict=True)

    model = small_mlp(10, 1)
    watched = train(model, rows(0), F.mse_loss, steps=320, optimizer=sgd(model, 0.03))
    return Run(model, first(rows(1), 32), watched, F.mse_loss)


# matchmaker#18 "typo in KLDivTeacherList?", Self-Supervised-Vision#5, pytorch#5282
@bug("matchmaker#18, Self-Supervised-Vision#5, pytorch#5282", "D34")
def divergence_of_what_is_not_a_logarithm(is_bad: bool) -> Run:
    """Give kl_div probabilities, where it takes their logarithms.

    First: the loss is not that of the distributions: it is negative.
    Cost: a divergence, as it is defined, of 15.6 in place of 0.004.
    """

    def divergence(scores: Tensor, y: Tensor) -> Tensor:
        found = scores.softmax(1) if is_bad else scores.log_softmax(1)
        return F.kl_div(found, y, reduction="batchmean")

    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 16)),
    )
    watched = train(model, dials(), divergence, steps=300, optimizer=adam(model))
    return Run(model, first(dials(seed=1)), watched, divergence)


# wandb/senpai#3075 (outliers dominate the gradient of squared errors and destabilize
# training), elastic/examples#331
@bug("wandb/senpai#3075, elastic/examples#331", "D39", "D34")
def few_targets_in_another_unit(is_bad: bool) -> Run:
    """Fit prices of which one in 100 was entered in another unit, by squared errors.

    First: the loss has spikes, and the targets have outliers.
    Cost: a squared error of 0.372 in place of 0.022, on targets that are right.
    """
    model = small_mlp(10, 1)
    data = houses_sold(has_errors=is_bad)
    watched = train(model, data, F.mse_loss, steps=400, optimizer=adam(model))
    loader = first(houses_sold(seed=1, has_errors=is_bad), 32)
    return Run(model, loader, watched, F.mse_loss)


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "better_image_always_first": (("D02",), ()),
    "dropout_before_each_batch_norm": ((), ()),
    "momentum_of_zero_in_fine_tuning": (("D02",), ()),
    "norms_left_out_of_the_optimizer": (("D24", "D27"), ()),
    "layer_norm_in_place_of_a_scaler": ((), ()),
    "missing_values_as_a_number": (("D21", "D34"), ()),
    "flag_of_tracking_set_on_a_layer_with_buffers": (("D32", "D03", "D01", "D02"), ()),
    "weights_loaded_under_another_eps": (("D02", "D16", "D01"), ("D16",)),
    "sparsity_that_empties_all_scales": (("D02", "D01", "D39"), ()),
    "layer_norm_of_each_number": (("D29", "D21"), ()),
    "norms_removed_and_their_rate_kept": (("D21", "D22", "D24", "D34"), ()),
    "layer_norm_by_the_square_of_the_variance": (
        ("D29", "D36", "D24", "D34", "D27"),
        (),
    ),
    "codes_rounded_without_a_gradient": (("D24", "D27"), ()),
    "xavier_in_a_deep_network_of_relus": ((), ()),
    "weights_uniform_from_0_to_1": (("D20",), ()),
    "branches_that_are_copies_of_one": ((), ()),
    "warm_up_longer_than_the_training": ((), ()),
    "regression_on_rows_in_the_order_of_their_target": (
        ("D13", "D21", "D34", "D39"),
        (),
    ),
    "divergence_of_what_is_not_a_logarithm": ((), ()),
    "few_targets_in_another_unit": ((), ()),
}
