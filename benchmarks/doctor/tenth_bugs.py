"""A tenth set of bugs of public threads: twelve about norms, eight about training.

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
from functools import partial
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless
from more_bugs import changed
from tenth_data import (
    clicks,
    drawings,
    events,
    genes,
    hands,
    loans,
    molecules,
    movements,
    orders,
    plants,
    prices,
    scenes,
    sentences,
    tissues,
    vessels,
    yields,
)
from tenth_networks import (
    ActivatedNorm,
    Autoencoder,
    Counters,
    GraphNet,
    Keypoints,
    LetterNet,
    LoanNet,
    MovementNet,
    OrderNet,
    PriceNet,
    Recogniser,
    ShortcutNet,
    SiteNet,
    Towers,
    UNet,
    digit_net,
    plain_vgg,
    scene_net,
    vessel_net,
    wide_mlp,
    yield_mlp,
)
from third_bugs import as_image, train
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "recordings_scored_one_at_a_time": ((), ()),
    "fine_tuned_on_pairs_of_images": (("D05",), ()),
    "decay_of_a_long_training_in_a_short_one": (("D04", "D01", "D03", "D02"), ()),
    "scales_of_zero_that_are_frozen": (("D07", "D24", "D27"), ()),
    "crops_in_training_and_whole_images_in_the_test": (("D01", "D02"), ()),
    "batch_norms_whose_forward_only_activates": (("D24", "D22", "D27", "D34"), ()),
    "inverse_deviations_loaded_as_variances": (("D01", "D02"), ()),
    "statistics_reset_with_each_short_epoch": (("D03", "D01", "D02"), ()),
    "flag_of_training_set_by_hand": (("D09", "D01", "D02"), ()),
    "gradients_of_pairs_of_rows_added_up": (("D15",), ()),
    "padded_atoms_in_norms_and_mean": (("D01", "D12", "D02"), ()),
    "deep_reader_without_a_warm_up": (("D24", "D38", "D34"), ()),
    "towers_with_biases_far_below_zero": (("D21", "D22", "D24", "D34", "D27"), ()),
    "prices_and_volumes_as_they_are_for_an_lstm": (("D28", "D34"), ()),
    "rate_of_adam_given_to_sgd": ((), ()),
    "overlap_of_raw_scores": (("D34",), ()),
    "first_rows_learned_by_heart": ((), ()),
    "first_batch_again_and_again": ((), ()),
    "optimizer_loaded_with_a_rate_that_ran_out": (("D27", "D34", "D24"), ()),
    "autoencoder_of_weights_of_a_hundredth": (("D24", "D34", "D27"), ()),
}


def adam(model: nn.Module, lr: float = 3e-3) -> torch.optim.Adam:
    """Return Adam over the parameters that are trained."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


def first(batches: Iterator[Any], count: int = 16) -> list[Any]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


# facenet#278 (a face's code differs with the batch it is in), matconvnet#506 (errors
# change with the number of test images), Person_reID_baseline_pytorch#218
@bug(
    "facenet#278, matconvnet#506, Person_reID_baseline_pytorch#218",
    *("D09", "D02", "D13"),
)
def recordings_scored_one_at_a_time(is_bad: bool) -> Run:
    """Give norms no running statistics, and score the windows of one recording.

    Its twin keeps statistics, and scores windows of all recordings.

    First: norms use the statistics of the batch, which is of one kind, in eval mode.
    Cost: 26 %, which is a guess, in place of 100 %, a loss of 3.07 in place of 0.003.
    """
    model = MovementNet(is_tracked=not is_bad)
    watched = train(model, movements(), steps=300, optimizer=adam(model))
    return Run(model, first(movements(8, seed=1, is_one_each=is_bad), 60), watched)


# faster-rcnn.pytorch#170 (small batches: statistics are not accurate if not frozen),
# pytorch-retinanet#109, EfficientDet.Pytorch#33
@bug(
    "faster-rcnn.pytorch#170, pytorch-retinanet#109, EfficientDet.Pytorch#33",
    *("D05", "D02"),
)
def fine_tuned_on_pairs_of_images(is_bad: bool) -> Run:
    """Fine-tune a network with batch norms on batches of two images.

    Its twin has batches of 32.

    First: batches are too small for the statistics.
    Cost: 66 % in place of 100 %, a loss of 1.04 in place of 0.03.
    """
    model = Recogniser()
    train(model, drawings(), steps=200, optimizer=adam(model))
    model.head = nn.Linear(32, 6)
    size, steps = (2, 800) if is_bad else (32, 250)
    data = drawings(size, seed=2, is_dark=True)
    watched = train(model, data, steps=steps, optimizer=adam(model, 1e-3))
    return Run(model, first(drawings(seed=1, is_dark=True)), watched)


# tensorflow/models#4367 (decay of 0.9997: a very bad result on a small set),
# Chinese-Character-Recognition#5 (too close to one: it warms up very slowly)
@bug("tensorflow/models#4367, Chinese-Character-Recognition#5", "D04", "D03")
def decay_of_a_long_training_in_a_short_one(is_bad: bool) -> Run:
    """Take the decay 0.9997 over as momentum=3e-4, for 300 steps.

    First: momentum is so small that statistics are still those of a new network.
    Cost: 84 % of the pixels in place of 97 %, a loss of 0.357 in place of 0.086.
    """
    model = UNet(3e-4 if is_bad else 0.1)
    watched = train(model, tissues(), steps=300, optimizer=adam(model))
    return Run(model, first(tissues(seed=1)), watched)


# tensorpack#420 (scales of zero: they will be trained), RAFT-Stereo#58 (all batch norms
# are frozen from the beginning), deeplab-pytorch#48
@bug("tensorpack#420, RAFT-Stereo#58, deeplab-pytorch#48", "D19", "D24")
def scales_of_zero_that_are_frozen(is_bad: bool) -> Run:
    """Freeze scales and shifts of all norms, the last of each branch being zero.

    First: scales are zero, and stay so: the branches give nothing.
    Cost: 89 % in place of 100 %, a loss of 1.25 in place of 0.01.
    """
    model = ShortcutNet(is_frozen=is_bad)
    watched = train(model, drawings(), steps=300, optimizer=adam(model))
    return Run(model, first(drawings(seed=1)), watched)


# LIP_SSL#12 (training uses crops, testing whole images), FixRes as in
# Reading-Paper#379, TLC#12 (statistics of crops and of whole images differ)
@bug(
    "LIP_SSL#12, chullhwan-song/Reading-Paper#379, megvii-research/TLC#12",
    *("D01", "D02"),
)
def crops_in_training_and_whole_images_in_the_test(is_bad: bool) -> Run:
    """Train on crops around the figure, and answer for whole images.

    First: statistics are those of crops.
    Cost: 27 % in place of 100 %, a loss of 1.79 in place of 0.03.
    """
    model = scene_net()
    watched = train(model, scenes(is_crop=is_bad), steps=350, optimizer=adam(model))
    return Run(model, first(scenes(seed=1)), watched)


# FANet#5 (a batch norm whose forward has only the activation), pytorch-mask-rcnn#76
@bug("FANet#5, pytorch-mask-rcnn#76", "D29", "D22", "D24")
def batch_norms_whose_forward_only_activates(is_bad: bool) -> Run:
    """Subclass BatchNorm2d, and give the activation of the input in its forward.

    First: the norms do nothing, and the signal vanishes with depth.
    Cost: 17 %, which is a guess, in place of 100 %, a loss of 1.80 in place of 0.03.
    """
    model = plain_vgg(partial(ActivatedNorm, is_bad=is_bad))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    watched = train(model, drawings(), steps=300, optimizer=optimizer)
    return Run(model, first(drawings(seed=1)), watched)


# cudnn.torch#109 (what is called running_var is 1/sqrt(var + eps)), torch/nn#609 (how
# old files are read), torch-toolbox#9 (outputs differ after the change)
@bug(
    "soumith/cudnn.torch#109, torch/nn#609, e-lab/torch-toolbox#9", "D01", "D02", "D32"
)
def inverse_deviations_loaded_as_variances(is_bad: bool) -> Run:
    """Read a file that keeps 1/sqrt(var + eps) where variances are expected.

    First: running variances do not fit the data.
    Cost: 13 % in place of 100 %, a loss of 2.06 in place of 0.002.
    """
    trained = digit_net()
    data = changed(endless(), as_image)
    watched = train(trained, data, steps=200, optimizer=adam(trained))
    saved = copy.deepcopy(trained.state_dict())
    for name, value in saved.items():
        if name.endswith("running_var") and is_bad:
            saved[name] = (value + 1e-5).rsqrt()
    model = digit_net()
    model.load_state_dict(saved)
    return Run(model.eval(), list(changed(digits(), as_image)), watched)


# pytorch#5766 (reset_running_stats, then many batches), once-for-all#15 (what the reset
# is for), schedule_free#60 (20 to 50 batches replace the values)
@bug("pytorch#5766, once-for-all#15, schedule_free#60", "D03", "D01")
def statistics_reset_with_each_short_epoch(is_bad: bool) -> Run:
    """Reset running statistics at the start of each epoch, which has four batches.

    First: statistics have seen too few batches since they were reset.
    Cost: a squared error of 0.612 in place of 0.008.
    """
    model = yield_mlp()
    optimizer = adam(model)
    x, y = (torch.cat(parts) for parts in zip(*first(yields(64), 24), strict=True))
    with watch(model, optimizer, every=5) as seen:
        for epoch in range(150):
            model.train()
            if is_bad:
                for layer in model:
                    if isinstance(layer, nn.BatchNorm1d):
                        layer.reset_running_stats()
            source = torch.Generator().manual_seed(epoch)
            for rows in torch.randperm(len(x), generator=source).split(384):
                loss = F.mse_loss(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    loader = list(zip(x.split(384), y.split(384), strict=True))
    return Run(model.eval(), loader, seen.findings(), F.mse_loss)


# Detectron.pytorch#104 (self.training is set, its children stay in training mode),
# pytorch#5908 (set the flag of each module by hand, or call eval)
@bug("roytseng-tw/Detectron.pytorch#104, pytorch#5908", "D09")
def flag_of_training_set_by_hand(is_bad: bool) -> Run:
    """Set model.training = False to validate, which leaves its layers as they are.

    The plants of the validation are all of one site.

    First: norms are in training mode while the model is in eval mode.
    Cost: 85 % in place of 98 %, a loss of 0.39 in place of 0.04.
    """
    model = SiteNet()
    optimizer = adam(model)
    with watch(model, optimizer, every=5) as seen:
        for epoch in range(12):
            model.train()
            for x, y in itertools.islice(plants(seed=10 + epoch), 25):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            if is_bad:
                model.training = False
            else:
                model.eval()
            with torch.no_grad():
                for x, _ in itertools.islice(plants(seed=3, site=2), 30):
                    model(x)
    return Run(model, first(plants(seed=1)), seen.findings())


# GradientAccumulator#6 (norms are updated for every micro-batch), giotto-deep#75 (not
# compatible with batch norm), Bts-PyTorch#2
@bug("GradientAccumulator#6, giotto-deep#75, Bts-PyTorch#2", "D15", "D05")
def gradients_of_pairs_of_rows_added_up(is_bad: bool) -> Run:
    """Add up the gradients of 16 batches of two rows, in place of one batch of 32.

    First: statistics are those of two rows, however many gradients are added.
    Cost: 64 % in place of 89 %, a loss of 0.84 in place of 0.26.
    """
    model = LoanNet()
    optimizer = adam(model, 5e-3)
    size, count = (2, 16) if is_bad else (32, 1)
    data = loans(size)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for _ in range(350):
            optimizer.zero_grad()
            for x, y in itertools.islice(data, count):
                loss = F.cross_entropy(model(x), y) / count
                loss.backward()
                seen.log(loss=count * loss.item())
            optimizer.step()
    return Run(model, first(loans(seed=1)), seen.findings())


# cnn_graph#17 (bias and relu on padded vertices), pytorch_geometric#881 (what happens
# if the mask is ignored), keras#3228 (zeros distort the statistics)
@bug("mdeff/cnn_graph#17, pytorch_geometric#881, keras#3228", "D12")
def padded_atoms_in_norms_and_mean(is_bad: bool) -> Run:
    """Give padded atoms to batch norms and to the mean; serve 80 places.

    First: padding enters the statistics and the answers.
    Cost: 67 % in place of 92 %, a loss of 0.62 in place of 0.21.
    """
    model = GraphNet(is_bad=is_bad)
    watched = train(model, molecules(), steps=400, optimizer=adam(model))
    return Run(model, first(molecules(seed=1, places=80)), watched)


# pytorch#55270 (post norm does not work in deep transformers), paper_notes#2142,
# vit-pytorch#56 (it was hard to train, and needs a warm-up)
@bug(
    "pytorch#55270, AkihikoWatanabe/paper_notes#2142, lucidrains/vit-pytorch#56",
    *("D38", "D27"),
)
def deep_reader_without_a_warm_up(is_bad: bool) -> Run:
    """Train ten transformer layers with post-norm at a rate of 8e-3 from the start.

    Its twin rises to 1e-3 in sixty steps.

    First: post-norm without a warm-up, at a high rate.
    Cost: 25 %, which is a guess, in place of 96 %, a loss of 1.39 in place of 0.13.
    """
    model = OrderNet()
    optimizer = adam(model, 8e-3 if is_bad else 1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if is_bad else min(1.0, (step + 1) / 60)
    )
    watched = train(
        model,
        orders(),
        steps=280,
        optimizer=optimizer,
        schedule=lambda *_: warm_up.step(),
    )
    return Run(model, first(orders(seed=1)), watched)


# dlrm#358 (biases may be drawn as large negative values: no training behind a relu)
@bug("facebookresearch/dlrm#358", "D21", "D24")
def towers_with_biases_far_below_zero(is_bad: bool) -> Run:
    """Draw weights by Kaiming's rule and set all biases to -4.

    First: units are dead.
    Cost: 49 %, which is a guess, in place of 92 %, a loss of 3.60 in place of 0.19.
    """
    model, loss_fn = Towers(-4.0 if is_bad else 0.0), F.binary_cross_entropy_with_logits
    watched = train(model, clicks(), loss_fn, steps=500, optimizer=adam(model))
    return Run(model, first(clicks(seed=1)), watched, loss_fn)


# keras#1727 (the LSTM always predicts a constant), shubble#353 (columns of different
# scales), brain.js#528
@bug("keras#1727, Shubble-LLC/shubble#353, BrainJS/brain.js#528", "D28", "D20")
def prices_and_volumes_as_they_are_for_an_lstm(is_bad: bool) -> Run:
    """Give prices of 180 and volumes of 5000 to an LSTM.

    First: the inputs are not scaled.
    Cost: a squared error of 0.945, which is that of the mean, in place of 0.003.
    """
    model = PriceNet()
    watched = train(
        model, prices(is_raw=is_bad), F.mse_loss, steps=400, optimizer=adam(model)
    )
    return Run(model, first(prices(seed=1, is_raw=is_bad)), watched, F.mse_loss)


# swats#19 (how to adjust the rate when Adam is replaced by SGD), classifier-builder#6
# (convergence of SGD is very slow at the rate of Adam), segmenter#47
@bug("swats#19, testdotai/classifier-builder#6, rstrudel/segmenter#47", "D27")
def rate_of_adam_given_to_sgd(is_bad: bool) -> Run:
    """Replace Adam by SGD without momentum, and keep its rate of 1e-3.

    First: the learning rate is too low.
    Cost: a squared error of 0.781 in place of 0.014.
    """
    model = Keypoints()
    kind: Any = torch.optim.SGD if is_bad else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=1e-3)
    watched = train(model, hands(), F.mse_loss, steps=500, optimizer=optimizer)
    return Run(model, first(hands(seed=1)), watched, F.mse_loss)


def _dice(scores: Tensor, y: Tensor, *, has_sigmoid: bool) -> Tensor:
    """Return one less the overlap of pixels and their targets."""
    p = scores.sigmoid() if has_sigmoid else scores
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


# tf_unet#15 (dice of logits rather than predictions), villa#1644 (it must be given
# probabilities), nnUNet#108 (negative values)
@bug("tf_unet#15, ScrollPrize/villa#1644, nnUNet#108", "D34")
def overlap_of_raw_scores(is_bad: bool) -> Run:
    """Give logits to a dice loss that takes probabilities.

    First: the loss falls below zero, and has no end.
    Cost: an overlap of 5 % with the vessels in place of 89 %.
    """
    model = vessel_net()
    loss_fn = partial(_dice, has_sigmoid=not is_bad)
    watched = train(model, vessels(), loss_fn, steps=300, optimizer=adam(model))
    return Run(model, first(vessels(seed=1)), watched, loss_fn)


# AlexNet-Experiments-Keras#4 (high accuracy in training, low in validation), DIGITS#44
# (a tiny amount of data for a large network), Facial-Expression-Recognition#3
@bug(
    "AlexNet-Experiments-Keras#4, NVIDIA/DIGITS#44, Facial-Expression-Recognition#3",
    "D34",
)
def first_rows_learned_by_heart(is_bad: bool) -> Run:
    """Train on the first 64 rows, as for a test of the program, and for long.

    First: the network is right on its training data, and not on others.
    Cost: 59 % in place of 86 %, a loss of 1.40 in place of 0.34.
    """
    data = first(genes(), 2 if is_bad else 150)
    model = wide_mlp()
    watched = train(
        model, itertools.cycle(data), steps=600, optimizer=adam(model, 1e-3)
    )
    return Run(model, first(genes(seed=1)), watched)


# Pytorch-IterativeFCN#7 (next(iter(loader)) takes the first batch each time),
# deep-learning-v2-pytorch#309, GM-NAS#4
@bug(
    "Pytorch-IterativeFCN#7, udacity/deep-learning-v2-pytorch#309, GM-NAS#4",
    *("D13", "D34"),
)
def first_batch_again_and_again(is_bad: bool) -> Run:
    """Call next(iter(loader)) in each step, without shuffling.

    First: all batches are the same one.
    Cost: 74 % in place of 99 %, a loss of 0.72 in place of 0.04.
    """
    loader = first(sentences(), 60)
    model = LetterNet()
    batches = iter(itertools.cycle(loader))
    optimizer = adam(model, 5e-3)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for _ in range(480):
            x, y = next(iter(loader)) if is_bad else next(batches)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, loader, seen.findings())


# DPR#99 (zero learning rate when training goes on), robosat#169 (the optimizer's state
# has the rate of the first training)
@bug("facebookresearch/DPR#99, mapbox/robosat#169", "D27")
def optimizer_loaded_with_a_rate_that_ran_out(is_bad: bool) -> Run:
    """Load the state of an optimizer whose schedule is over, to train on a new machine.

    First: the learning rate is next to nothing.
    Cost: 15 % in place of 92 %, a loss of 3.62 in place of 0.31.
    """
    model = Counters()
    before = adam(model, 5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(before, 250, eta_min=1e-7)
    train(
        model,
        events(),
        steps=250,
        optimizer=before,
        schedule=lambda *_: cosine.step(),
    )
    optimizer = adam(model, 3e-3)
    if is_bad:
        optimizer.load_state_dict(before.state_dict())
    watched = train(model, events(seed=2, is_new=True), steps=350, optimizer=optimizer)
    return Run(model, first(events(seed=1, is_new=True)), watched)


def _as_target(x: Tensor, _: Tensor) -> Batch:
    """Take a digit for its own target."""
    return x, x


# handson-ml#176 (weights of 0.01: fifty batches before the loss moves), udlbook#87 (the
# variance is too small, and gradients disappear)
@bug("ageron/handson-ml#176, udlbook#87", "D22", "D24")
def autoencoder_of_weights_of_a_hundredth(is_bad: bool) -> Run:
    """Draw the weights of eight layers of tanh with a spread of 0.01.

    First: activations vanish with depth.
    Cost: a squared error of 0.519, that of the mean, in place of 0.073.
    """
    model = Autoencoder(0.01 if is_bad else None)
    data = changed(endless(), _as_target)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    watched = train(model, data, F.mse_loss, steps=800, optimizer=optimizer)
    return Run(model, list(changed(digits(), _as_target)), watched, F.mse_loss)
