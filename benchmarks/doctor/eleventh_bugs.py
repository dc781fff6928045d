"""An eleventh set of bugs of public threads: twelve about norms, eight about training.

Programs are those of courses: plain modules, own loops, norms written by hand. Each
docstring says what the mistake is, what a good doctor would say first, and what the
mistake costs in eval mode on the batches of the run (accuracy or loss of the program,
then of its twin); `expected` has the checks that say it. Both were written, and
committed, before the doctor saw any of these programs, by an author who knew the names
of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bugs import Batch, Run, bug
from eleventh_data import (
    blocks,
    chirps,
    concretes,
    deliveries,
    engines,
    flats,
    glyphs,
    leaves,
    loads,
    memories,
    names,
    objects,
    pulses,
    reviews,
    rooms,
    steps,
    strokes,
    wards,
)
from eleventh_networks import (
    BirdNet,
    Detector,
    EngineNet,
    FirstLetter,
    FlatNet,
    GlyphNet,
    LeafNet,
    LeNet,
    LoadNet,
    NextLetter,
    PopulationNorm,
    PulseNet,
    Replicas,
    ReviewNet,
    SegNet,
    StepNet,
    StrokeNet,
    TourNet,
    mixture_mlp,
    patient_mlp,
    room_mlp,
)
from third_bugs import train
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "population_estimated_after_the_first_epoch": (("D02",), ()),
    "inference_that_divides_by_the_variance": (("D02",), ()),
    "devices_that_have_one_ward_each": (("D01",), ()),
    "buckets_from_short_to_long": (("D01", "D02", "D39"), ()),
    "encoder_without_a_padding_mask": ((), ()),
    "whitening_of_more_columns_than_rows": ((), ()),
    "wear_behind_instance_norms": (("D29", "D34"), ()),
    "strength_behind_dropout_and_norms": (("D11",), ()),
    "one_mean_for_all_columns": (("D28", "D21"), ("D28",)),
    "checkpoints_averaged_with_their_statistics": (("D02",), ()),
    "zeros_for_all_that_is_not_a_matrix": (
        ("D19", "D24", "D16", "D34", "D18", "D27"),
        (),
    ),
    "moving_average_without_its_second_factor": (("D02",), ()),
    "network_of_sigmoids_without_norms": (("D24", "D27", "D34"), ()),
    "filters_that_are_copies_of_one": ((), ()),
    "letters_with_weights_of_a_plain_randn": (("D20",), ("D20",)),
    "rate_too_high_for_a_forecast": (("D27", "D21", "D22", "D24", "D34", "D39"), ()),
    "boxes_in_pixels": ((), ()),
    "few_images_without_augmentation": ((), ()),
    "state_detached_at_each_step": ((), ()),
    "seconds_since_1970_among_the_columns": (("D28", "D21", "D34"), ()),
}


def adam(model: nn.Module, lr: float = 3e-3) -> torch.optim.Adam:
    """Return Adam over all parameters."""
    return torch.optim.Adam(model.parameters(), lr)


def sgd(model: nn.Module, lr: float, momentum: float = 0.9) -> torch.optim.SGD:
    """Return SGD over all parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum)


def first(batches: Iterator[Any], count: int = 16) -> list[Any]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


# keras#81 (measure statistics when training is over, as they change), keras#82,
# blocks#513
@bug("keras#81, keras#82, mila-iqia/blocks#513", "D01", "D02")
def population_estimated_after_the_first_epoch(is_bad: bool) -> Run:
    """Estimate the statistics of the population once, and go on with the training.

    First: the statistics are not those of the weights.
    Cost: 76 % in place of 99 %, a loss of 0.94 in place of 0.04.
    """
    model = StrokeNet(PopulationNorm)
    optimizer, data = adam(model), first(strokes(), 60)
    norms = [layer for layer in model.modules() if isinstance(layer, PopulationNorm)]
    epochs = 8
    with watch(model, optimizer, every=5) as seen:
        for epoch in range(epochs):
            model.train()
            for x, y in data:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            if epoch == (0 if is_bad else epochs - 1):
                for norm in norms:
                    norm.seen = []
                with torch.no_grad():
                    for x, _ in data:
                        model(x)
                for norm in norms:
                    norm.estimate()
    return Run(model.eval(), first(strokes(seed=1)), seen.findings())


# tensorflow#46522 and tensorflow#48039 (the formula of inference has no root),
# Flux.jl#314
@bug("tensorflow#46522, tensorflow#48039, FluxML/Flux.jl#314", "D02")
def inference_that_divides_by_the_variance(is_bad: bool) -> Run:
    """Write inference as an affine map a * x + b, and forget the root in a.

    First: the answers of eval mode are not those of training mode.
    Cost: 87 % in place of 99.6 %, a loss of 0.31 in place of 0.07.
    """
    model = StepNet(is_bad=is_bad)
    watched = train(model, steps(), steps=300, optimizer=adam(model))
    return Run(model, first(steps(seed=1)), watched)


# pytorch#1051 (running statistics are those of the first device), burn#1167,
# tensorflow#7439
@bug("pytorch#1051, tracel-ai/burn#1167, tensorflow#7439", "D01", "D02", "D13")
def devices_that_have_one_ward_each(is_bad: bool) -> Run:
    """Sort a batch by ward before it is split over four devices.

    First: the statistics, which are those of the first device, do not fit the data.
    Cost: 89 % in place of 99.8 %, a loss of 0.73 in place of 0.01.
    """
    model = Replicas(patient_mlp())
    data = wards(64, by_ward=is_bad)
    watched = train(model, data, steps=400, optimizer=adam(model))
    return Run(model, first(wards(64, seed=1)), watched)


# allennlp#3985 (batches were not shuffled: shortest first), xnmt#70 (batches of one
# length)
@bug("allenai/allennlp#3985, neulab/xnmt#70", "D13", "D02", "D01")
def buckets_from_short_to_long(is_bad: bool) -> Run:
    """Put tours of one length into a batch, the shortest first in each epoch.

    First: batches are not drawn at random.
    Cost: a squared error of 1.14 in place of 0.04.
    """
    model = TourNet()
    data = first(deliveries(is_sorted=is_bad), 100)
    watched = train(
        model, itertools.cycle(data), F.mse_loss, steps=500, optimizer=adam(model)
    )
    return Run(model, first(deliveries(seed=1)), watched, F.mse_loss)


# pytorch#90534 (answers differ with padding), OpenNMT-py#1398 (padding in the mean),
# pytorch-seq2seq#76 (what the mask is for)
@bug("pytorch#90534, OpenNMT-py#1398, bentrevett/pytorch-seq2seq#76", "D12")
def encoder_without_a_padding_mask(is_bad: bool) -> Run:
    """Let words attend to padding, and take the mean of all places; serve 64 of them.

    First: answers depend on padding.
    Cost: a squared error of 0.075 in place of 0.015.
    """
    model = ReviewNet(is_masked=not is_bad)
    watched = train(
        model, reviews(), F.mse_loss, steps=350, optimizer=adam(model, 2e-3)
    )
    return Run(model, first(reviews(seed=1, places=64)), watched, F.mse_loss)


# VkD#4 (whitening is inaccurate at small batches: close to singular), chainer#7905
@bug("roymiles/VkD#4, chainer#7905", "D05", "D02")
def whitening_of_more_columns_than_rows(is_bad: bool) -> Run:
    """Whiten 24 columns by the covariance of 16 rows.

    First: batches are too small for the statistics.
    Cost: 79 % in place of 89 %, a loss of 0.58 in place of 0.33.
    """
    model = BirdNet()
    size = 16 if is_bad else 256
    watched = train(model, chirps(size), steps=400, optimizer=adam(model))
    return Run(model, first(chirps(size, seed=1)), watched)


# dain#7 (bad results with a norm of each window, good ones with a z-score), TSB-AD#48
@bug("passalis/dain#7, thedatumorg/TSB-AD#48", "D29")
def wear_behind_instance_norms(is_bad: bool) -> Run:
    """Normalize each window of vibration by itself, where its strength is the answer.

    First: a norm takes away what the network needs.
    Cost: 23 %, which is a guess, in place of 94 %, a loss of 1.39 in place
    of 0.25.
    """
    norm: Any = nn.InstanceNorm1d if is_bad else nn.BatchNorm1d
    model = EngineNet(partial(norm, affine=True))
    watched = train(model, engines(), steps=350, optimizer=adam(model))
    return Run(model, first(engines(seed=1)), watched)


# Swall0w/papers#427 (variance shift), mlcolvar#205 (dropout alters the statistics)
@bug("Swall0w/papers#427, mlcolvar#205", "D11", "D02")
def strength_behind_dropout_and_norms(is_bad: bool) -> Run:
    """Put dropout of a half before each batch norm of a regression.

    First: dropout before batch norms shifts the variance.
    Cost: a squared error of 0.21 in place of 0.03.
    """
    model = mixture_mlp(0.5 if is_bad else 0.0)
    watched = train(model, concretes(), F.mse_loss, steps=600, optimizer=adam(model))
    return Run(model, first(concretes(seed=1)), watched, F.mse_loss)


# deepnet#11 (mean and variance of a batch, not of each channel), NumPyNet#7,
# brain.js#528
@bug("parasdahal/deepnet#11, NumPyNet#7, BrainJS/brain.js#528", "D28", "D29")
def one_mean_for_all_columns(is_bad: bool) -> Run:
    """Write a norm with x.mean() and x.std(), for columns in units of their own.

    First: inputs of the first layer are badly scaled.
    Cost: a squared error of 0.88, about that of the mean, in place of 0.01.
    """
    model = FlatNet(is_bad=is_bad)
    watched = train(model, flats(), F.mse_loss, steps=600, optimizer=adam(model))
    return Run(model, first(flats(seed=1)), watched, F.mse_loss)


# pytorch-image-models#224 (should batch norms be updated behind an average of
# checkpoints?), pytorch-image-models#106, leela-zero#1064
@bug(
    "pytorch-image-models#224, pytorch-image-models#106, leela-zero#1064",
    *("D31", "D01", "D02"),
)
def checkpoints_averaged_with_their_statistics(is_bad: bool) -> Run:
    """Average the checkpoints of all epochs, buffers as all else.

    First: the statistics are not those of the averaged weights.
    Cost: 70 % in place of 88 %, a loss of 0.75 in place of 0.44.
    """
    model = GlyphNet()
    kept: list[dict[str, Tensor]] = []

    def keep(_: Any, step: int) -> None:
        if step % 40 == 39:
            kept.append({k: v.clone() for k, v in model.state_dict().items()})

    watched = train(
        model, glyphs(), steps=400, optimizer=sgd(model, 0.05), schedule=keep
    )
    mean = {k: torch.stack([one[k].float() for one in kept]).mean(0) for k in kept[0]}
    averaged: Any = GlyphNet()
    averaged.load_state_dict(mean)
    if not is_bad:
        torch.optim.swa_utils.update_bn(first(glyphs(), 60), averaged)
    return Run(averaged.eval(), first(glyphs(seed=1)), watched)


# objax#94 (scales of a norm started as zeros), Non-local_pytorch#22 (scale and shift
# of zero)
@bug("google/objax#94, AlexHex7/Non-local_pytorch#22", "D19", "D24", "D21")
def zeros_for_all_that_is_not_a_matrix(is_bad: bool) -> Run:
    """Give matrices Xavier's weights and all other parameters zeros, scales as well.

    First: scales of norms are zero.
    Cost: no pixel of a block is found, in place of an overlap of 94 %; a loss of
    0.36 in place of 0.02.
    """
    model = SegNet()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
        elif is_bad or name.endswith("bias"):
            nn.init.zeros_(parameter)
    watched = train(model, blocks(), steps=250, optimizer=adam(model, 5e-3))
    return Run(model, first(blocks(seed=1)), watched)


# byol-a#13 (a mistake in the formula of a running mean), pytorch#15298 (which formula?)
@bug("nttcslab/byol-a#13, pytorch#15298", "D01", "D02")
def moving_average_without_its_second_factor(is_bad: bool) -> Run:
    """Write moving = momentum * moving + batch, so that it becomes ten times as large.

    First: moving statistics are not those of the data.
    Cost: 36 % in place of 86 %, a loss of 1.58 in place of 0.44.
    """
    model = LeafNet(is_bad=is_bad)
    watched = train(model, leaves(), steps=300, optimizer=adam(model))
    return Run(model, first(leaves(seed=1)), watched)


# LargeMargin_Softmax_Loss#22 (LeNet at 0.1, another activation at 0.98), CNN-Numpy#5
# (LeNet at 10 %), caffe#3229 (sigmoids with batch norm)
@bug(
    "wy1iu/LargeMargin_Softmax_Loss#22, CNN-Numpy#5, BVLC/caffe#3229",
    *("D24", "D22"),
)
def network_of_sigmoids_without_norms(is_bad: bool) -> Run:
    """Train LeNet with sigmoids by SGD; the twin has batch norms before them.

    First: gradients vanish towards the first layers.
    Cost: 16 %, which is a guess, in place of 97 %, a loss of 1.79 in place
    of 0.15.
    """
    model = LeNet(is_normed=not is_bad)
    optimizer = sgd(model, 0.05)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600, 1e-4)
    watched = train(
        model,
        strokes(),
        steps=600,
        optimizer=optimizer,
        schedule=lambda *_: cosine.step(),
    )
    return Run(model, first(strokes(seed=1)), watched)


# DS502#27 (all weights the same: all units the same), MorvanZhou/tutorials#23 (what
# keeps filters from being the same pattern?)
@bug("BitTiger-MP/DS502-AI-Engineer#27, MorvanZhou/tutorials#23", "D26")
def filters_that_are_copies_of_one(is_bad: bool) -> Run:
    """Set all weights of a network of series to 0.05.

    First: the units of a layer are equal.
    Cost: 68 % in place of 98 %, a loss of 0.76 in place of 0.05.
    """
    model = PulseNet(0.05 if is_bad else None)
    watched = train(model, pulses(), steps=500, optimizer=adam(model, 5e-3))
    return Run(model, first(pulses(seed=1)), watched)


# nn-zero-to-hero#66 (how many units of tanh may be saturated), speechbrain#104 (tanh
# saturates with more units)
@bug("karpathy/nn-zero-to-hero#66, speechbrain#104", "D20", "D34")
def letters_with_weights_of_a_plain_randn(is_bad: bool) -> Run:
    """Draw weights by torch.randn and do not divide by the root of their number.

    First: units are saturated.
    Cost: 37 % in place of 89 %, a loss of 2.29 in place of 0.82.
    """
    model = NextLetter(is_scaled=not is_bad)
    watched = train(model, names(), steps=2000, optimizer=sgd(model, 0.1))
    return Run(model, first(names(seed=1), 30), watched)


# caffe#6047 (the loss goes up and does not come down), optimize-net#26 (a network
# without norms diverges)
@bug("BVLC/caffe#6047, fmassa/optimize-net#26", "D27", "D21", "D34")
def rate_too_high_for_a_forecast(is_bad: bool) -> Run:
    """Train convolutions over time without norms at a rate of 0.5.

    First: the rate is too high.
    Cost: a squared error of 1.11 in place of 0.005.
    """
    model = LoadNet()
    optimizer = sgd(model, 0.5 if is_bad else 0.05)
    watched = train(model, loads(), F.mse_loss, steps=500, optimizer=optimizer)
    return Run(model, first(loads(seed=1)), watched, F.mse_loss)


def _boxed(answers: Tensor, y: Tensor) -> Tensor:
    """Return the loss of the class and that of the box."""
    kind = F.cross_entropy(answers[:, :4], y[:, 0].long())
    return kind + F.mse_loss(answers[:, 4:], y[:, 1:])


def _in_pixels(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Give boxes in pixels of the photographs, which have 640 on a side."""
    for x, y in batches:
        yield x, torch.cat([y[:, :1], 640 * y[:, 1:]], 1)


# torchcv#30 (boxes as they are: they should be normalized), DIoU-SSD-pytorch#5 (large
# numbers are not good for training)
@bug("kuangliu/torchcv#30, Zzh-tju/DIoU-SSD-pytorch#5", "D34", "D25")
def boxes_in_pixels(is_bad: bool) -> Run:
    """Add the squared error of boxes in pixels to the cross entropy of classes.

    First: targets are far larger than answers.
    Cost: 24 % of the classes, which is a guess, in place of 100 %; boxes are as good.
    """
    model, data, held = Detector(), objects(), objects(seed=1)
    if is_bad:
        data, held = _in_pixels(data), _in_pixels(held)
    watched = train(model, data, _boxed, steps=400, optimizer=adam(model))
    return Run(model, first(held), watched, _boxed)


def _moved(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Roll images by a number of pixels, and add noise."""
    source = torch.Generator().manual_seed(9)
    for x, y in batches:
        v, h = torch.randint(12, (2,), generator=source).tolist()
        noise = 0.3 * torch.randn(x.shape, generator=source)
        yield x.roll((v, h), (2, 3)) + noise, y


# keras#4325 (90 % in training and 30 % in validation), resnet-protofiles#14 (no crops
# or flips?), MAE#6 (a small data set without augmentation)
@bug(
    "keras#4325, antingshen/resnet-protofiles#14, IcarusWizard/MAE#6",
    "D34",
)
def few_images_without_augmentation(is_bad: bool) -> Run:
    """Train on 128 images for 225 epochs; the twin moves them and adds noise.

    First: the network is right on its training data, and not on others.
    Cost: 56 % in place of 98 %, a loss of 1.53 in place of 0.08.
    """
    model = StrokeNet(nn.BatchNorm2d)
    data: Any = itertools.cycle(first(strokes(), 4))
    if not is_bad:
        data = _moved(data)
    watched = train(model, data, steps=900, optimizer=adam(model, 2e-3))
    return Run(model, first(strokes(seed=1)), watched)


# dliss-tutorial#1 (why detach?), pytorch-tutorial#90 (what does detach do?), MTIL#1
@bug("dpressel/dliss-tutorial#1, yunjey/pytorch-tutorial#90, MTIL#1", "D24")
def state_detached_at_each_step(is_bad: bool) -> Run:
    """Detach the state of a GRU in its loop, where the first letter is the answer.

    First: no gradient reaches the first steps.
    Cost: 24 % in place of 100 %, a loss of 1.74 in place of 0.001.
    """
    model = FirstLetter(is_detached=is_bad)
    watched = train(model, memories(), steps=500, optimizer=adam(model, 1e-2))
    return Run(model, first(memories(seed=1)), watched)


# RecBole#1062 (timestamps above 1e8 cover all other columns, the loss does not move),
# brain.js#278 (inputs are not normalized)
@bug("RUCAIBox/RecBole#1062, BrainJS/brain.js#278", "D28")
def seconds_since_1970_among_the_columns(is_bad: bool) -> Run:
    """Give a time in seconds to a perceptron, beside columns that are scaled.

    First: an input is far larger than the others.
    Cost: a squared error of 15.4 in place of 0.012.
    """
    model = room_mlp()
    watched = train(
        model, rooms(is_raw=is_bad), F.mse_loss, steps=500, optimizer=adam(model)
    )
    return Run(model, first(rooms(seed=1, is_raw=is_bad)), watched, F.mse_loss)
