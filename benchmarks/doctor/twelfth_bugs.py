"""A twelfth set of bugs of public threads: twelve about norms, eight about training.

Programs are those that people report about: plain modules and own loops, fine tuning,
adapters, averages of models. Each docstring says what the mistake is, what a good
doctor would say first, and what the mistake costs in eval mode on the batches of the
run (accuracy or loss of the program, then of its twin); `expected` has the checks that
say it. Both were written, and committed, before the doctor saw any of these programs,
by an author who knew the names of its checks, neither their code nor their
documentation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bugs import Run, bug
from third_bugs import train
from torch import Tensor, nn
from torch.nn import functional as F
from twelfth_data import (
    blurred,
    clouds,
    curves,
    flagged,
    frames,
    grey,
    hearts,
    marks,
    ratings,
    rows,
    sensors,
    signals,
    volumes,
    written,
)
from twelfth_networks import (
    Adapted,
    CloudNet,
    DeepNet,
    FrameNet,
    HeartNet,
    MarkNet,
    PlainNet,
    Restorer,
    RowNet,
    ScanNet,
    SignalNet,
    TasteNet,
    TokenNet,
    curve_mlp,
    machine_mlp,
)

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "scans_in_pairs": (("D05",), ()),
    "all_parameters_uniform": (("D29", "D19", "D34"), ()),
    "norms_that_keep_no_statistics": (("D13", "D05"), ()),
    "soup_of_fine_tuned_networks": (("D01", "D02"), ()),
    "frozen_judge_in_training_mode": (("D01", "D34", "D02"), ("D34",)),
    "batches_skipped_behind_the_norms": (("D34", "D17", "D01", "D02"), ()),
    "train_called_before_the_epochs": (("D08", "D28"), ("D28", "D02")),
    "noise_in_training_only": (("D01", "D02"), ()),
    "clouds_with_a_momentum_of_keras": (("D04", "D01", "D02"), ()),
    "one_norm_for_all_steps_of_an_lstm": (("D33", "D02"), ()),
    "heart_rate_behind_dropout_and_norms": (("D11",), ()),
    "frozen_features_of_other_levels": (("D28",), ()),
    "adam_at_a_tenth": (("D21", "D24", "D34"), ()),
    "images_in_the_order_of_their_class": (("D13", "D21", "D24"), ()),
    "sixteen_layers_as_torch_draws_them": (("D21", "D24", "D22", "D27", "D34"), ()),
    "powers_without_a_scaler": (("D28", "D20"), ()),
    "adadelta_at_the_rate_of_adam": (("D27", "D34"), ()),
    "adapters_of_which_both_parts_are_zero": (("D26", "D27"), ()),
    "weights_with_a_spread_of_one": (("D34",), ()),
    "nll_of_shares": (("D34",), ()),
}


def adam(model: nn.Module, lr: float = 3e-3) -> torch.optim.Adam:
    """Return Adam over all parameters that are trained."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


def sgd(model: nn.Module, lr: float, momentum: float = 0.9) -> torch.optim.SGD:
    """Return SGD over all parameters that are trained."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(chosen, lr, momentum)


def first(batches: Iterator[Any], count: int = 16) -> list[Any]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


# pytorch#19916 (small batches and small maps: answers of eval mode are wrong), UFold#18
@bug("pytorch#19916, uci-cbcl/UFold#18", "D05", "D02")
def scans_in_pairs(is_bad: bool) -> Run:
    """Train on two scans at a time; the last norms see one place of each.

    First: batches are too small for the statistics.
    Cost: 39 % in place of 99 %, a loss of 1.26 in place of 0.06.
    """
    model, size = ScanNet(), 2 if is_bad else 24
    watched = train(model, volumes(size), steps=500, optimizer=adam(model, 2e-3))
    return Run(model, first(volumes(size, seed=1), 40), watched)


# transformers#171 (scales of layer norms should start as ones), sequence_labeling_tf#71
@bug("transformers#171, stevezheng23/sequence_labeling_tf#71", "D19", "D22")
def all_parameters_uniform(is_bad: bool) -> Run:
    """Draw all parameters from -0.08 to 0.08, those of layer norms among them.

    First: scales of norms are close to zero.
    Cost: 16 %, which is a guess, in place of 100 %, a loss of 1.79 in place
    of 0.009.
    """
    model = TokenNet()
    for name, parameter in model.named_parameters():
        if is_bad or "ln_" not in name:
            nn.init.uniform_(parameter, -0.08, 0.08)
    watched = train(model, flagged(), steps=350, optimizer=adam(model, 2e-3))
    return Run(model, first(flagged(seed=1)), watched)


# keras#3078 (answers depend on the other rows of a batch), IIC#10 (statistics are those
# of the evaluated data), License_Plate_Detection_Pytorch#22 (95 %, but 80 % one by one:
# a mean over the batch)
@bug(
    "keras#3078, xu-ji/IIC#10, xuexingyu24/License_Plate_Detection_Pytorch#22",
    *("D13", "D05", "D09"),
)
def norms_that_keep_no_statistics(is_bad: bool) -> Run:
    """Switch running statistics off; serve eight frames of one place at a time.

    First: eval mode takes the statistics of batches that are not drawn at random.
    Cost: 22 %, which is a guess, in place of 100 %, a loss of 1.95 in place
    of 0.03; the twin has 99.7 % on batches of one place.
    """
    model = FrameNet(partial(nn.BatchNorm2d, track_running_stats=not is_bad))
    watched = train(model, frames(32), steps=250, optimizer=adam(model))
    return Run(model.eval(), first(frames(8, seed=1, in_order=is_bad), 40), watched)


# model-soups#13 (94 % and 93 %, and 2 % as an average), HandyRL#299, swa#10
@bug(
    "mlfoundations/model-soups#13, DeNA/HandyRL#299, timgaripov/swa#10",
    *("D31", "D01", "D02"),
)
def soup_of_fine_tuned_networks(is_bad: bool) -> Run:
    """Average the parameters of three networks that were fine tuned from one.

    First: the statistics, which are those of the one, do not fit the average.
    Cost: 76 % in place of 99.6 %, a loss of 60 in place of 0.02.
    """
    model = MarkNet()
    train(model, marks(), steps=100, optimizer=adam(model))
    tuned, watched = [], []
    for seed in (2, 3, 4):
        other = copy.deepcopy(model)
        watched = train(other, marks(seed=seed), steps=120, optimizer=sgd(other, 0.07))
        tuned.append(other)
    with torch.no_grad():
        for old, *new in zip(
            model.parameters(), *(m.parameters() for m in tuned), strict=True
        ):
            old.copy_(torch.stack(new).mean(0))
    if not is_bad:
        torch.optim.swa_utils.update_bn(first(marks(seed=5), 60), model)
    return Run(model.eval(), first(marks(seed=1)), watched)


# pytorch-deeplab-xception#140 (norms that are frozen are set to training by train()),
# pytorch-deeplab-resnet#39
@bug(
    "jfzhang95/pytorch-deeplab-xception#140, isht7/pytorch-deeplab-resnet#39",
    *("D07",),
)
def frozen_judge_in_training_mode(is_bad: bool) -> Run:
    """Compare images by frozen features whose batch norms train() sets to training.

    First: frozen norms are in training mode, and their statistics change.
    Cost: a squared error of images of 1.15 in place of 0.03, of features of 1.82
    in place of 0.04.
    """
    base = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.LeakyReLU(0.2),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.BatchNorm2d(12),
    )
    for _, y in first(blurred(seed=3), 100):
        base(y)
    model = Restorer(base)
    optimizer = adam(model)

    def loss_fn(answers: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(answers, model.features(y))

    with watch(model, optimizer, every=5) as seen:
        model.train()
        if not is_bad:
            model.features.eval()
        for x, y in first(blurred(), 400):
            loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, first(blurred(seed=1)), seen.findings(), loss_fn)


# pytorch#1206 (training is perfect, running statistics are nan),
# pytorch-multi-label-classifier#7 (the norm gives nan in validation)
@bug("pytorch#1206, pangwong/pytorch-multi-label-classifier#7", "D17")
def batches_skipped_behind_the_norms(is_bad: bool) -> Run:
    """Skip a batch when its loss is nan, which the norms have seen by then.

    First: running statistics are not finite.
    Cost: 15 %, which is a guess, in place of 96 %; the loss is nan in place of 0.12.
    """
    model = machine_mlp()
    optimizer = adam(model)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in first(sensors(with_gaps=True), 400):
            if not is_bad and not x.isfinite().all():
                continue
            loss = F.cross_entropy(model(x), y)
            if not torch.isfinite(loss):
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model.eval(), first(sensors(seed=1)), seen.findings())


# joeynmt#184 (eval mode until the next epoch), tutorials#1624, mcan-vqa#26 (train() is
# called in front of the loop over epochs)
@bug("joeynmt#184, pytorch/tutorials#1624, MILVLG/mcan-vqa#26", "D08", "D03")
def train_called_before_the_epochs(is_bad: bool) -> Run:
    """Call train() once, and eval() at the first validation, after a few batches.

    First: norms are in eval mode while the network trains.
    Cost: 18 %, which is a guess, in place of 98 %, a loss of 1.79 in place of 0.06.
    """
    model = MarkNet(6)
    optimizer = sgd(model, 0.05)
    held = first(grey(seed=9), 4)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for step, (x, y) in enumerate(first(grey(), 400)):
            if not is_bad:
                model.train()
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
            if step % 20 == 2:
                model.eval()
                with torch.no_grad():
                    for some, _ in held:
                        model(some)
    return Run(model.eval(), first(grey(seed=1)), seen.findings())


# UniMatch#94 (strong augmentations affect the statistics of batch norms)
@bug("LiheYoung/UniMatch#94", "D01", "D02")
def noise_in_training_only(is_bad: bool) -> Run:
    """Add strong noise to all images of the training, and to none that are served.

    First: the statistics are not those of the data.
    Cost: 36 % in place of 100 %, a loss of 1.43 in place of 0.001.
    """
    model = MarkNet()
    data = marks(noise=0.1, added=1.0 if is_bad else 0.1)
    watched = train(model, data, steps=400, optimizer=adam(model))
    return Run(model, first(marks(seed=1, noise=0.1)), watched)


# examples#289 (which convention?), pix2pix-tensorflow#126, pretrained-models.pytorch#44
@bug(
    "pytorch/examples#289, affinelayer/pix2pix-tensorflow#126, "
    "Cadene/pretrained-models.pytorch#44",
    "D04",
)
def clouds_with_a_momentum_of_keras(is_bad: bool) -> Run:
    """Set the momentum of all norms to 0.99; the last batch of an epoch is short.

    First: the momentum is that of another convention.
    Cost: a squared error of 0.24 in place of 0.013.
    """
    model = CloudNet(0.99 if is_bad else 0.1)
    optimizer = adam(model, 5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 440, 1e-4)
    watched = train(
        model,
        clouds(),
        F.mse_loss,
        steps=440,
        optimizer=optimizer,
        schedule=lambda *_: cosine.step(),
    )
    return Run(model, first(clouds(seed=1), 22), watched, F.mse_loss)


# bnlstm#7 (one population for all steps? the test is terrible), torch-bnlstm#8,
# recurrent-batch-normalization-pytorch#1
@bug(
    "OlavHN/bnlstm#7, iassael/torch-bnlstm#8, "
    "jihunchoi/recurrent-batch-normalization-pytorch#1",
    *("D33", "D02", "D01"),
)
def one_norm_for_all_steps_of_an_lstm(is_bad: bool) -> Run:
    """Call the batch norms of an LSTM at all steps, which are not distributed alike.

    First: a norm is shared by inputs of different distributions.
    Cost: 52 % in place of 99 %, a loss of 1.42 in place of 0.07.
    """
    model = RowNet(is_shared=is_bad)
    watched = train(model, rows(), steps=300, optimizer=adam(model))
    return Run(model, first(rows(seed=9)), watched)


# arXivTimes#608 (variance shift), matconvnet#263 (noise of dropout and of batch norm)
@bug("arXivTimes#608, vlfeat/matconvnet#263", "D11", "D02")
def heart_rate_behind_dropout_and_norms(is_bad: bool) -> Run:
    """Put dropout in front of each batch norm of a regression of traces.

    First: dropout before batch norms shifts the variance.
    Cost: a squared error of 0.11 in place of 0.012.
    """
    model = HeartNet(0.5 if is_bad else 0.0)
    watched = train(model, hearts(), F.mse_loss, steps=500, optimizer=adam(model))
    return Run(model, first(hearts(seed=1)), watched, F.mse_loss)


# open-solution-mapping-challenge#77 (mean 0 and spread 1 in place of ImageNet's),
# dr_cvpr20#1, inception_v1.pytorch#5 (26 % or 39 % by the constants)
@bug(
    "neptune-ai/open-solution-mapping-challenge#77, erbloo/dr_cvpr20#1, "
    "antspy/inception_v1.pytorch#5",
    *("D01", "D28"),
)
def frozen_features_of_other_levels(is_bad: bool) -> Run:
    """Train a head on frozen features, whose images are not normalized as before.

    First: the frozen statistics are not those of the data.
    Cost: 25 % in place of 95 %, a loss of 1.82 in place of 0.16.
    """

    def scaled(batches: Iterator[Any], *, is_raw: bool = False) -> Iterator[Any]:
        return ((x if is_raw else (x - 0.55) / 0.12, y) for x, y in batches)

    model = MarkNet(12)
    train(model, scaled(grey(kinds=12, look=4)), steps=500, optimizer=adam(model))
    model.features.requires_grad_(False)
    model.head = nn.Linear(96, 6)
    optimizer = adam(model, 1e-2)
    model.train()
    model.features.eval()
    with watch(model, optimizer, every=5) as seen:
        for x, y in first(scaled(grey(), is_raw=is_bad), 300):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    held = first(scaled(grey(seed=1), is_raw=is_bad))
    return Run(model.eval(), held, seen.findings())


# mcfly#43 (models that do not learn have a rate above 0.03), tensorflow-wavenet#143
@bug("NLeSC/mcfly#43, ibab/tensorflow-wavenet#143", "D27", "D21")
def adam_at_a_tenth(is_bad: bool) -> Run:
    """Train convolutions without norms by Adam at a rate of 0.1.

    First: the rate is too high.
    Cost: 10 %, which is a guess, in place of 93 %, a loss of 2.09 in place of 0.20.
    """
    model = PlainNet()
    optimizer = adam(model, 0.1 if is_bad else 2e-3)
    watched = train(model, marks(), steps=500, optimizer=optimizer)
    return Run(model, first(marks(seed=1)), watched)


# cleverhans#232 (training data are not shuffled), openpi#113
@bug("cleverhans-lab/cleverhans#232, Physical-Intelligence/openpi#113", "D13")
def images_in_the_order_of_their_class(is_bad: bool) -> Run:
    """Read images class by class in each epoch.

    First: batches are not drawn at random.
    Cost: 12 %, which is a guess, in place of 99 %, a loss of 2.08 in place of 0.07.
    """
    model = PlainNet()
    x, y = (torch.cat(parts) for parts in zip(*first(marks(), 60), strict=True))
    data = []
    for epoch in range(8):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        if is_bad:
            order = y.argsort(stable=True)
        data += [(x[i], y[i]) for i in order.split(32)]
    watched = train(model, iter(data), steps=len(data), optimizer=adam(model, 2e-3))
    return Run(model, data[-60:], watched)


# mxnet#2310 (10 % for 200 iterations: the default weights were too small),
# dnns-from-scratch-in-zig#7 (He's weights allow 30 layers)
@bug("mxnet#2310, SilasMarvin/dnns-from-scratch-in-zig#7", "D22", "D24")
def sixteen_layers_as_torch_draws_them(is_bad: bool) -> Run:
    """Stack sixteen linear layers and rectifiers with the weights of nn.Linear.

    First: activations vanish with depth.
    Cost: 10 %, which is a guess, in place of 94 %, a loss of 2.30 in place of 0.18.
    """
    model = DeepNet()
    if not is_bad:
        for layer in model.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    watched = train(model, written(), steps=400, optimizer=sgd(model, 0.01))
    return Run(model, first(written(seed=99)), watched)


# scikit-learn#17654 (powers of large numbers need a scaler)
@bug("scikit-learn#17654", "D28")
def powers_without_a_scaler(is_bad: bool) -> Run:
    """Give a number and its powers up to the fifth to a perceptron.

    First: inputs are badly scaled.
    Cost: a squared error of 0.107 in place of 0.004.
    """
    model, is_scaled = curve_mlp(), not is_bad
    data = curves(is_scaled=is_scaled)
    watched = train(model, data, F.mse_loss, steps=1200, optimizer=adam(model))
    held = first(curves(seed=1, is_scaled=is_scaled))
    return Run(model, held, watched, F.mse_loss)


# DIGITS#893 (which rate for AdaDelta?), keras#3889 (why 1.0?), MORAN_v2#46 (0.001?)
@bug("NVIDIA/DIGITS#893, keras#3889, Canjie-Luo/MORAN_v2#46", "D27")
def adadelta_at_the_rate_of_adam(is_bad: bool) -> Run:
    """Train by Adadelta at a rate of 0.001.

    First: updates are far too small.
    Cost: 9 %, which is a guess, in place of 91 %, a loss of 2.36 in place of 0.31.
    """
    model = SignalNet(nn.Identity())
    optimizer = torch.optim.Adadelta(model.parameters(), 1e-3 if is_bad else 1.0)
    watched = train(model, signals(), steps=500, optimizer=optimizer)
    return Run(model, first(signals(seed=1)), watched)


# relora#18 (both are zero: no gradient), litgpt#1229, cosmos-predict2.5#15
@bug(
    "Guitaricet/relora#18, Lightning-AI/litgpt#1229, "
    "nvidia-cosmos/cosmos-predict2.5#15",
    *("D24", "D27", "D26"),
)
def adapters_of_which_both_parts_are_zero(is_bad: bool) -> Run:
    """Adapt a network by products of two matrices that both start as zeros.

    First: no gradient reaches what is trained.
    Cost: 12 % in place of 98 %, a loss of 10.3 in place of 0.06.
    """
    net = nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)
    )
    train(net, written(), steps=300, optimizer=adam(net))
    model = Adapted(net)
    if is_bad:
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.zeros_(parameter)
    data = written(turned=True)
    watched = train(model, data, steps=500, optimizer=adam(model))
    return Run(model, first(written(seed=99, turned=True)), watched)


# spark-ffm#12 (weights are too large for their number), pyAIUtils#25
@bug("VinceShieh/spark-ffm#12, aiUIUC/pyAIUtils#25", "D23", "D25", "D34")
def weights_with_a_spread_of_one(is_bad: bool) -> Run:
    """Draw all weights by normal_(0, 1), those of linear layers as well.

    First: activations grow with depth.
    Cost: a squared error of 2661 in place of 0.075, where a mean has 1.
    """
    model = TasteNet()
    if is_bad:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
    watched = train(model, ratings(), F.mse_loss, steps=700, optimizer=adam(model))
    return Run(model, first(ratings(seed=1)), watched, F.mse_loss)


# ACGAN-PyTorch#4, Text-Classification-Models-Pytorch#9 (softmax, and a loss that is
# negative), man-sf-emnlp#2
@bug(
    "clvrai/ACGAN-PyTorch#4, AnubhavGupta3377/Text-Classification-Models-Pytorch#9, "
    "midas-research/man-sf-emnlp#2",
    "D34",
)
def nll_of_shares(is_bad: bool) -> Run:
    """Give the softmax to NLLLoss in place of its logarithm.

    First: the loss is negative, and expects logarithms.
    Cost: 73 % in place of 94 %.
    """
    model = SignalNet(nn.Softmax(1) if is_bad else nn.LogSoftmax(1))
    optimizer = sgd(model, 0.05)
    watched = train(model, signals(), F.nll_loss, steps=500, optimizer=optimizer)
    return Run(model, first(signals(seed=1)), watched, F.nll_loss)


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
