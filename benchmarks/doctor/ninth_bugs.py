"""A ninth set of bugs of public threads: twelve about norms, eight about training.

Each docstring says what the mistake is, what a good doctor would say first, and what
the mistake costs in eval mode on the batches of the run (accuracy or loss of the
program, then of its twin); `expected` has the checks that say it. Both were written,
and committed, before the doctor saw any of these programs, by an author who knew the
names of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch, Run, bug
from ninth_data import (
    arms,
    beats,
    cameras,
    cells,
    houses,
    jets,
    machines,
    mails,
    ratings,
    recalls,
    signs,
    spots,
    texts,
)
from ninth_networks import (
    Actor,
    BeatNet,
    CentreNet,
    DeepSet,
    FunctionalNet,
    Memory,
    Neighbours,
    ResNet,
    Segmenter,
    TableResNet,
    TextNet,
    TwoCameras,
    TwoPlants,
    encoder1d,
    group_normed,
    inception,
    shape_net,
    spam_filter,
)
from third_bugs import train
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "second_head_on_an_encoder_that_is_not_in_eval_mode": (("D07", "D01", "D02"), ()),
    "images_segmented_one_at_a_time": (("D01", "D02"), ()),
    "residual_table_network_with_the_momentum_of_keras": (("D04", "D02"), ()),
    "functional_norms_that_always_train": (("D34", "D05"), ("D05",)),
    "validated_in_training_mode_kind_by_kind": (("D09", "D01", "D02"), ()),
    "bias_of_the_prior_in_all_norms": (("D21", "D23", "D24", "D16", "D18", "D34"), ()),
    "decay_of_a_tenth_on_all_parameters": (("D16", "D01", "D18", "D14"), ()),
    "dropout_between_convolutions_and_norms": (("D11", "D02"), ()),
    "padded_particles_in_norms_and_mean": (("D12",), ()),
    "weights_copied_layer_by_layer": (("D32", "D03", "D01", "D02"), ()),
    "two_cameras_through_the_norms_of_one": (("D33", "D02"), ()),
    "instance_norms_where_the_height_counts": (("D29",), ()),
    "vectors_of_users_that_are_constant": ((), ()),
    "gain_of_ten_for_units_of_tanh": ((), ()),
    "rate_too_high_for_an_inception": ((), ()),
    "rate_of_fine_tuning_from_scratch": ((), ()),
    "labels_of_minus_one_under_cross_entropy": (("D34",), ()),
    "folders_read_one_after_the_other": (("D13", "D21"), ()),
    "recurrence_with_small_weights": (("D34",), ()),
    "head_replaced_behind_the_optimizer": (
        ("D07", "D08", "D02", "D34"),
        ("D07", "D08"),
    ),
}


def adam(model: nn.Module, lr: float = 3e-3) -> torch.optim.Adam:
    """Return Adam over the parameters that are trained."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """Return SGD with momentum over all parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def first(batches: Iterator[Batch], count: int = 16) -> list[Batch]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


def epochs(batches: list[Batch]) -> Iterator[Batch]:
    """Give the batches again and again, in another order each time."""
    for seed in itertools.count():
        source = torch.Generator().manual_seed(seed)
        for index in torch.randperm(len(batches), generator=source):
            yield batches[int(index)]


# pytorch#86590 (requires_grad=False does not keep running statistics),
# pytorch/tutorials#449 (norms of a feature extractor have to be put in eval mode)
@bug("pytorch#86590, pytorch/tutorials#449", "D07")
def second_head_on_an_encoder_that_is_not_in_eval_mode(is_bad: bool) -> Run:
    """Freeze parameters of an encoder, and train a second head on data of another kind.

    The first head is used afterwards, as the encoder is thought to be as it was.

    First: norms of frozen layers update their statistics.
    Cost: 23 %, which is a guess, in place of 100 %, a loss of 8.2 in place of 0.005.
    """
    encoder, head = encoder1d(), nn.Linear(24, 4)
    trained = nn.Sequential(encoder, head)
    train(trained, machines(), steps=200, optimizer=adam(trained))
    model = TwoPlants(encoder, head)
    optimizer = torch.optim.Adam(model.other.parameters(), 1e-2)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            model.train()
            if not is_bad:
                model.encoder.eval()
            for x, y in itertools.islice(machines(seed=2, is_other_plant=True), 25):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.use_first = True
    return Run(model, first(machines(seed=1)), seen.findings())


# CNTK#905 (a minibatch of one: no useful result), caffe-segnet#109 (bad images in
# inference until the batch size is larger)
@bug("microsoft/CNTK#905, caffe-segnet#109", "D05", "D02")
def images_segmented_one_at_a_time(is_bad: bool) -> Run:
    """Train a segmenter with batch norms on batches of one image.

    Its twin has batches of sixteen.

    First: batches are too small for the statistics, which differ from image to image.
    Cost: an overlap of 45 % with the cells in place of 89 %, a loss of 2.1 in
    place of 0.08.
    """
    model = Segmenter()
    data, steps = (cells(1), 1000) if is_bad else (cells(16), 200)
    watched = train(model, data, steps=steps, optimizer=adam(model))
    return Run(model, first(cells(seed=1)), watched)


# PyTorch-YOLOv3#230 (momentum=0.9 keeps a tenth of the old value),
# fastestimator#1201 (x of TensorFlow is 1 - x), KAIR#132
@bug("PyTorch-YOLOv3#230, fastestimator#1201, KAIR#132", "D04")
def residual_table_network_with_the_momentum_of_keras(is_bad: bool) -> Run:
    """Give momentum=0.99 to norms in residual blocks that learn from batches of twelve.

    First: the momentum is wrong: running statistics are those of the last batch.
    Cost: a squared error of 0.261 in place of 0.059.
    """
    model = TableResNet(0.99 if is_bad else 0.1)
    optimizer = adam(model)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    watched = train(
        model,
        houses(12),
        F.mse_loss,
        steps=1000,
        optimizer=optimizer,
        schedule=lambda *_: cosine.step(),
    )
    return Run(model, first(houses(seed=1)), watched, F.mse_loss)


# GazeML#25 (is_training is True in the test, too), BinaryNet.tf#9 (accuracy changes
# with the size of the batches of the test)
@bug("GazeML#25, BinaryNet.tf#9", "D09", "D05")
def functional_norms_that_always_train(is_bad: bool) -> Run:
    """Call F.batch_norm with training=True in all modes, and serve four rows at a time.

    First: norms use the statistics of the batch, which is small, also in eval mode.
    Cost: a squared error of 0.418 in place of 0.025.
    """
    model = FunctionalNet(is_bad=is_bad)
    watched = train(model, houses(), F.mse_loss, steps=800, optimizer=adam(model))
    return Run(model, first(houses(4, seed=1), 100), watched, F.mse_loss)


# pytorch_stacked_hourglass#44 (train() in the validation affects running statistics),
# DeepForest#477 (train() in the validation to get the loss), pytorch-3dunet#53
@bug("pytorch_stacked_hourglass#44, DeepForest#477, pytorch-3dunet#53", "D01", "D02")
def validated_in_training_mode_kind_by_kind(is_bad: bool) -> Run:
    """Validate without eval() after each epoch, on a set in the order of its kinds.

    First: statistics are those of the last kind, not of all the data.
    Cost: 75 % in place of 98 %, a loss of 0.89 in place of 0.07.
    """
    model = BeatNet()
    optimizer = adam(model)
    x, y = next(beats(640, seed=3, lows=0.75))
    order = y.argsort(stable=True)
    held = [(x[rows], y[rows]) for rows in order.split(8)]

    def validate() -> float:
        model.train(is_bad)
        with torch.no_grad():
            right = [(model(x).argmax(1) == y).float().mean() for x, y in held]
        return float(torch.stack(right).mean())

    data = beats(lows=0.75)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(12):
            model.train()
            for x, y in itertools.islice(data, 25):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            validate()
    return Run(model, first(beats(seed=1, lows=0.75)), seen.findings())


# CenterNet#826 (which layers get the bias of -2.19), CornerNet#13, mmdetection#1825 (it
# is for the last layer, with its focal loss)
@bug("CenterNet#826, CornerNet#13, mmdetection#1825", "D21", "D18")
def bias_of_the_prior_in_all_norms(is_bad: bool) -> Run:
    """Set all biases to the one of rare centres, which is for the last layer only.

    First: units behind the norms are dead.
    Cost: no centre is found, in place of an overlap of 79 %, a loss of 0.251 in
    place of 0.040.
    """
    model, loss_fn = CentreNet(is_bad=is_bad), F.binary_cross_entropy_with_logits
    watched = train(model, spots(), loss_fn, steps=400, optimizer=sgd(model, 0.05))
    return Run(model, first(spots(seed=1)), watched, loss_fn)


# autrainer#166 (no decay of norms and biases), revisiting-at#2 (decay pushes the scales
# of norms to zero)
@bug("autrainer#166, revisiting-at#2", "D14", "D19")
def decay_of_a_tenth_on_all_parameters(is_bad: bool) -> Run:
    """Set weight_decay=0.1 for SGD over all parameters, also those of batch norms.

    Its twin decays weights by 5e-4, and no parameters of norms.

    First: weight decay shrinks the scales of the norms.
    Cost: 44 % in place of 100 %, a loss of 1.7 in place of 0.001.
    """
    model = shape_net()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": 0.1 if is_bad else 5e-4},
        {"params": others, "weight_decay": 0.1 if is_bad else 0.0},
    ]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    watched = train(model, signs(), steps=300, optimizer=optimizer)
    return Run(model, first(signs(seed=1)), watched)


# arXivTimes#608, Swall0w/papers#427 (dropout before batch norm shifts the variance from
# training to test)
@bug("arXivTimes#608, Swall0w/papers#427", "D11", "D02")
def dropout_between_convolutions_and_norms(is_bad: bool) -> Run:
    """Put Dropout(0.6) between each convolution and its batch norm.

    First: variances behind dropout are larger in training than in eval mode.
    Cost: 82 % in place of 98 %, a loss of 0.36 in place of 0.07.
    """
    model = BeatNet(drop=0.6 if is_bad else 0.0)
    data = beats(lows=0.75)
    watched = train(model, data, steps=400, optimizer=adam(model))
    return Run(model, first(beats(seed=1, lows=0.75)), watched)


# BERT-whitening-pytorch#13 (the mean has to leave out padding), text_classification#39,
# CoursIA#15045 (the same sentence changes with those beside it)
@bug("BERT-whitening-pytorch#13, text_classification#39, CoursIA#15045", "D12")
def padded_particles_in_norms_and_mean(is_bad: bool) -> Run:
    """Give padded particles to batch norms and to the mean over a jet; serve 90 places.

    First: padding enters the statistics and the answers.
    Cost: 81 % in place of 95 %, a loss of 0.51 in place of 0.12.
    """
    model = DeepSet(is_bad=is_bad)
    watched = train(model, jets(), steps=600, optimizer=adam(model))
    return Run(model, first(jets(seed=1, length=90)), watched)


# torch/nn#1256 (weights and biases are copied, outputs behind batch norms differ),
# torch/nngraph#141, PARL#25 (mean and variance are hidden parameters)
@bug("torch/nn#1256, torch/nngraph#141, PARL#25", "D32", "D01", "D03")
def weights_copied_layer_by_layer(is_bad: bool) -> Run:
    """Copy the weight and the bias of each layer to another network, which is served.

    First: running statistics were not copied: they are those of a new network.
    Cost: 60 % in place of 100 %, a loss of 1.33 in place of 0.01.
    """
    trained = ResNet()
    watched = train(trained, signs(), steps=250, optimizer=adam(trained))
    model = ResNet()
    for mine, other in zip(model.modules(), trained.modules(), strict=True):
        for name in ("weight", "bias"):
            if isinstance(getattr(other, name, None), Tensor):
                getattr(mine, name).data = getattr(other, name).data.clone()
        if isinstance(mine, nn.BatchNorm2d) and not is_bad:
            mine.load_state_dict(other.state_dict())
    return Run(model.eval(), first(signs(seed=1)), watched)


# self-ensemble-visual-domain-adapt-photo#3 (batches of two domains are normalized by
# statistics of their own), diffusion_policy#151 (one model for several cameras)
@bug(
    "self-ensemble-visual-domain-adapt-photo#3, real-stanford/diffusion_policy#151",
    *("D33", "D02"),
)
def two_cameras_through_the_norms_of_one(is_bad: bool) -> Run:
    """Send visible and thermal images through one encoder, in calls of their own.

    Its twin has norms for each camera.

    First: one norm is shared by inputs that differ, and its average fits neither.
    Cost: 10 %, which is a guess, in place of 100 %, a loss of 9.2 in place of 0.02.
    """
    model = TwoCameras(is_bad=is_bad)
    watched = train(model, cameras(), steps=400, optimizer=adam(model))
    return Run(model, first(cameras(seed=1)), watched)


# StarGANv2-VC#87 (instance norm removes the features of a speaker), panseg#577 (tiles
# differ in exposure: group norm, and batch norm repairs it)
@bug("StarGANv2-VC#87, panseg#577", "D29")
def instance_norms_where_the_height_counts(is_bad: bool) -> Run:
    """Tell low waves from high ones behind instance norms.

    First: the norms erase the scale of each window, which the answer needs.
    Cost: 52 % in place of 100 %, a loss of 0.78 in place of 0.007.
    """
    model = BeatNet(norm=nn.InstanceNorm1d if is_bad else nn.BatchNorm1d)
    watched = train(model, beats(), steps=400, optimizer=adam(model))
    return Run(model, first(beats(seed=1)), watched)


# NaNmnist#2 (units with equal weights get equal gradients), nndl-discussion#14 (a layer
# is then one unit)
@bug("NaNmnist#2, nndl-discussion#14", "D26")
def vectors_of_users_that_are_constant(is_bad: bool) -> Run:
    """Fill the vectors of all users and films with 0.3.

    First: all parts of a vector are equal, and stay so.
    Cost: a squared error of 0.551 in place of 0.013.
    """
    model = Neighbours(is_bad=is_bad)
    watched = train(
        model, ratings(), F.mse_loss, steps=1000, optimizer=adam(model, 1e-2)
    )
    return Run(model, first(ratings(seed=1)), watched, F.mse_loss)


# deep-learning-tutorials#2 (tanh is saturated: look at the initial weights),
# aromanro/MachineLearning#9
@bug("deep-learning-tutorials#2, aromanro/MachineLearning#9", "D20")
def gain_of_ten_for_units_of_tanh(is_bad: bool) -> Run:
    """Draw the weights of an actor with tanh by Xavier's rule, with a gain of 10.

    First: the units are saturated.
    Cost: a squared error of 0.267 in place of 0.030.
    """
    model = Actor(10.0 if is_bad else 5 / 3)
    watched = train(model, arms(), F.mse_loss, steps=1000, optimizer=adam(model, 1e-3))
    return Run(model, first(arms(seed=1)), watched, F.mse_loss)


# DIGITS#629 (accuracy jumps until the rate is small), keras#10666
@bug("NVIDIA/DIGITS#629, keras#10666", "D27")
def rate_too_high_for_an_inception(is_bad: bool) -> Run:
    """Train an Inception with batch norms at a rate of 3.

    First: the learning rate is too high.
    Cost: 52 % in place of 100 %, a loss of 1.24 in place of 0.002.
    """
    model = inception()
    optimizer = sgd(model, 3.0 if is_bad else 0.05)
    watched = train(model, signs(), steps=300, optimizer=optimizer)
    return Run(model, first(signs(seed=1)), watched)


# keras-retinanet#843 (1e-5 is for fine-tuning, and too small from scratch),
# keras_frcnn#76 (days of training at 1e-5)
@bug("keras-retinanet#843, keras_frcnn#76", "D27")
def rate_of_fine_tuning_from_scratch(is_bad: bool) -> Run:
    """Train a new transformer with Adam at 1e-5, which is a rate for fine-tuning.

    First: the learning rate is too low.
    Cost: 78 % in place of 97 %, a loss of 0.79 in place of 0.10.
    """
    model = TextNet()
    watched = train(
        model, texts(), steps=400, optimizer=adam(model, 1e-5 if is_bad else 1e-3)
    )
    return Run(model, first(texts(seed=1)), watched)


# Pytorch-Medical-Segmentation#8 (the loss is negative: labels are not 0 or 1),
# siamfc-pytorch#37 (labels of 1 and -1 are for other losses)
@bug("Pytorch-Medical-Segmentation#8, siamfc-pytorch#37", "D34")
def labels_of_minus_one_under_cross_entropy(is_bad: bool) -> Run:
    """Keep the labels -1 and 1 of a support vector machine for binary cross entropy.

    First: targets are below 0, and the loss falls without an end.
    Cost: 72 % in place of 88 %, a loss of -8779 in place of 0.26.
    """
    model, loss_fn = spam_filter(), F.binary_cross_entropy_with_logits
    low = -1.0 if is_bad else 0.0
    optimizer = adam(model, 2e-3)
    watched = train(model, mails(low=low), loss_fn, steps=800, optimizer=optimizer)
    return Run(model, first(mails(seed=1, low=low)), watched, loss_fn)


# DIGITS#29 (pedestrians and others in folders, and all are called others), disco#288,
# keras#8346 (classes in order)
@bug("NVIDIA/DIGITS#29, disco#288, keras#8346", "D13")
def folders_read_one_after_the_other(is_bad: bool) -> Run:
    """Read images folder by folder, and a folder has the images of one class.

    First: batches are not drawn at random: labels come in order.
    Cost: 52 % in place of 100 %, a loss of 1.28 in place of 0.003.
    """
    x, y = next(signs(960))
    order = y.argsort(stable=True)
    if not is_bad:
        order = torch.randperm(960, generator=torch.Generator().manual_seed(3))
    loader = [(x[rows], y[rows]) for rows in order.split(32)]
    data = itertools.cycle(loader) if is_bad else epochs(loader)
    model = group_normed()
    watched = train(model, data, steps=360, optimizer=sgd(model, 0.02))
    return Run(model, loader, watched)


# Arraymancer#339 (orthogonal weights are key for long dependencies), keras#275
# (identity for the hidden weights), Swall0w/papers#312
@bug("Arraymancer#339, keras#275, Swall0w/papers#312", "D24", "D22")
def recurrence_with_small_weights(is_bad: bool) -> Run:
    """Draw hidden weights of a recurrent network with a spread of 0.02.

    First: no gradient reaches the first steps, where the signal is.
    Cost: 27 %, which is a guess, in place of 100 %, a loss of 1.39 in place of 0.006.
    """
    model = Memory(is_bad=is_bad)
    watched = train(model, recalls(), steps=500, optimizer=adam(model, 1e-3))
    return Run(model, first(recalls(seed=1)), watched)


# HVPNeT#5 (parameters of the head were not given to the optimizer), transfer-nlp#14
# (reset the optimizer once the last layer is replaced), mmf#620
@bug("HVPNeT#5, transfer-nlp#14, mmf#620", "D27", "D24")
def head_replaced_behind_the_optimizer(is_bad: bool) -> Run:
    """Make an optimizer, then replace the head by one for fewer classes.

    The backbone is frozen, so that nothing is trained.

    First: the new head is never updated.
    Cost: 17 % in place of 100 %, a loss of 1.23 in place of 0.01.
    """
    trained = shape_net()
    train(trained, signs(), steps=200, optimizer=adam(trained))
    model = copy.deepcopy(trained).eval()
    model[:-1].requires_grad_(False)
    old: Any = model[-1]
    optimizer = torch.optim.Adam(old.parameters(), 1e-2)
    model[-1] = nn.Linear(old.in_features, 3)
    if not is_bad:
        optimizer = torch.optim.Adam(model[-1].parameters(), 1e-2)

    def grouped(seed: int) -> Iterator[Batch]:
        return ((x, torch.tensor([0, 1, 2, 2, 0, 1])[y]) for x, y in signs(seed=seed))

    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(grouped(2), 150):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, first(grouped(1)), seen.findings())
