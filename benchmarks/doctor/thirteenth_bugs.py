"""A thirteenth set of bugs of public threads: twelve about norms, eight about training.

Programs are those of projects of one's own: ports from other frameworks, notebooks,
fine tuning, value networks, metric learning. Each docstring says what the mistake is,
what a good doctor would say first, and what the mistake costs in eval mode on the
batches of the run (accuracy or loss of the program, then of its twin); `expected` has
the checks that say it. Both were written, and committed, before the doctor saw any of
these programs, by an author who knew the names of its checks, neither their code nor
their documentation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bugs import Run, bug, digits
from third_bugs import train
from thirteenth_data import (
    GAMMA,
    brains,
    clips,
    customers,
    demand,
    faces,
    fields,
    flowers,
    genes,
    houses,
    recordings,
    shapes,
    streams,
    tokens,
    transitions,
    values,
    written,
)
from thirteenth_networks import (
    ClipNet,
    CosineHead,
    DeepCrossing,
    EEGNet,
    Forecaster,
    HouseNet,
    IdNet,
    PhotoNet,
    Reader,
    RecordingNet,
    ShapeNet,
    SplitNorm,
    StreamNet,
    UNet,
    VectorNet,
    deep_mlp,
    level_mlp,
    value_net,
)
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]


def adam(model: nn.Module, lr: float = 3e-3) -> torch.optim.Adam:
    """Return Adam over all parameters that are trained."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


def first(batches: Iterator[Any], count: int = 16) -> list[Any]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


# stable-baselines3#996 (are running_mean and running_var copied to the target?),
# stable-baselines3-contrib#99, cares_reinforcement_learning#242
@bug(
    "DLR-RM/stable-baselines3#996, Stable-Baselines-Team/stable-baselines3-contrib#99, "
    "UoA-CARES/cares_reinforcement_learning#242",
    *("D01", "D03", "D32", "D31"),
)
def target_network_without_statistics(is_bad: bool) -> Run:
    """Move the parameters of a target network, and not the statistics of its norms.

    First: the statistics of the target network are those of a new one.
    Cost: a squared error of 0.93 in place of 0.010.
    """
    online = value_net()
    target = copy.deepcopy(online).eval()
    optimizer = adam(online)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500, 1e-4)
    online.train()
    with watch(online, optimizer, every=5) as seen:
        for s, rewards, after in first(values(), 1500):
            with torch.no_grad():
                y = rewards + GAMMA * target(after).amax(1, keepdim=True)
            loss = F.mse_loss(online(s), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            seen.log(loss=loss.item())
            with torch.no_grad():
                pairs = zip(target.parameters(), online.parameters(), strict=True)
                for old, new in pairs:
                    old.lerp_(new, 0.2)
                if not is_bad:
                    for old, new in zip(
                        target.buffers(), online.buffers(), strict=True
                    ):
                        old.copy_(new)
    rest = (
        GAMMA
        / (1 - GAMMA)
        * torch.cat([r.amax(1) for _, r, _ in first(values(seed=5), 40)]).mean()
    )
    held = [(s, r + rest) for s, r, _ in first(values(seed=1))]
    return Run(target, held, seen.findings(), F.mse_loss)


# pytorch#4741 (all windows of a batch are of one continuous recording)
@bug("pytorch#4741", "D13", "D02")
def windows_of_one_recording_in_a_batch(is_bad: bool) -> Run:
    """Cut each recording into windows, and give those of one as a batch.

    First: batches are not drawn at random; their statistics are those of a patient.
    Cost: 77 % in place of 99.9 %, a loss of 1.10 in place of 0.003.
    """
    model = RecordingNet()
    data = recordings(is_one_each=is_bad)
    watched = train(model, data, steps=500, optimizer=adam(model))
    held = first(recordings(seed=1, is_one_each=is_bad), 40)
    return Run(model, held, watched)


# arl-eegmodels#39 (the frameworks differ), EfficientNet-PyTorch#3, pytorch2keras#120
@bug(
    "vlawhern/arl-eegmodels#39, lukemelas/EfficientNet-PyTorch#3, "
    "gmalivenko/pytorch2keras#120",
    "D04",
)
def eeg_network_with_the_momentum_of_keras(is_bad: bool) -> Run:
    """Port a network of Keras with momentum=0.99, and give it eight trials at once.

    First: the momentum is that of another convention.
    Cost: a squared error of 0.056 in place of 0.010.
    """
    model = EEGNet(0.99 if is_bad else 0.01)
    optimizer = adam(model)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900, 1e-4)
    watched = train(
        model,
        brains(),
        F.mse_loss,
        steps=900,
        optimizer=optimizer,
        schedule=lambda *_: cosine.step(),
    )
    return Run(model, first(brains(32, seed=1)), watched, F.mse_loss)


# BASNet#42 (one image: a performance that is too low), ToothGroupNetwork#23
@bug("xuebinqin/BASNet#42, limhoyeon/ToothGroupNetwork#23", "D05", "D02")
def leaves_segmented_from_batches_of_one(is_bad: bool) -> Run:
    """Train a U-Net with batch norms on one photograph at a time.

    First: batches are too small for the statistics.
    Cost: 10 % of the pixels in place of 99 %, a loss of 3.57 in place of 0.03.
    """
    model, size = UNet(), 1 if is_bad else 16
    watched = train(model, fields(size), steps=350, optimizer=adam(model))
    return Run(model, first(fields(size, seed=1), 48 if is_bad else 12), watched)


# MxNet2Caffe-mobilefacenet#4 (fix_gamma: the scale should be 1), mxnet#15717
@bug("Laulian/MxNet2Caffe-mobilefacenet#4, mxnet#15717", "D19", "D01", "D32")
def scales_that_were_fixed_at_one(is_bad: bool) -> Run:
    """Load a file of MXNet whose scales, which fix_gamma ignores, have decayed.

    First: scales of norms are close to zero.
    Cost: 13 % in place of 100 %, a loss of 2.09 in place of 0.005.
    """
    trained = ShapeNet()
    watched = train(trained, shapes(), steps=300, optimizer=adam(trained))
    saved = copy.deepcopy(trained.state_dict())
    for name, value in saved.items():
        if is_bad and name.endswith("bn.weight"):
            value.mul_(0.03)
    model = ShapeNet()
    model.load_state_dict(saved)
    return Run(model.eval(), first(shapes(seed=1)), watched)


# deep-speaker#63 (each frame is normalized by its own mean and deviation)
@bug("philipperemy/deep-speaker#63", "D29", "D34")
def distance_behind_norms_of_each_frame(is_bad: bool) -> Run:
    """Normalize each frame of a spectrum, and ask how far away the speaker is.

    First: a norm erases the level, which the answer needs.
    Cost: a squared error of 0.36 in place of 0.005.
    """
    model = ClipNet(is_each_frame=is_bad)
    watched = train(model, clips(), F.mse_loss, steps=400, optimizer=adam(model))
    return Run(model, first(clips(seed=1)), watched, F.mse_loss)


# TMO-Net#12 (dropout is in front of the batch norm), mlcolvar#268
@bug("FengAoWang/TMO-Net#12, luigibonati/mlcolvar#268", "D11", "D02")
def prices_of_houses_behind_dropout_and_norms(is_bad: bool) -> Run:
    """Write linear, dropout, batch norm and rectifier, for a regression of prices.

    First: dropout before batch norms shifts the variance.
    Cost: a squared error of 0.137 in place of 0.011.
    """
    model = HouseNet(0.5 if is_bad else 0.0)
    watched = train(model, houses(), F.mse_loss, steps=900, optimizer=adam(model))
    return Run(model, first(houses(seed=1)), watched, F.mse_loss)


# xiaochus/YOLOv3#22 (OpenCV gives BGR), detectree2#197, sdc-issue-reports#623
@bug(
    "xiaochus/YOLOv3#22, PatBall1/detectree2#197, udacity/sdc-issue-reports#623",
    *("D01", "D02"),
)
def served_by_opencv(is_bad: bool) -> Run:
    """Train on RGB, and serve images that OpenCV reads as BGR.

    First: the statistics are not those of the data.
    Cost: 17 % in place of 100 %, a loss of 118 in place of 0.002.
    """
    model = PhotoNet(6, colours=3)
    watched = train(model, flowers(), steps=300, optimizer=adam(model))
    return Run(model, first(flowers(seed=1, is_bgr=is_bad)), watched)


# pytorch-classification-advprop#8, pytorch-image-models#118, pytorch-image-models#68
@bug(
    "tingxueronghua/pytorch-classification-advprop#8, pytorch-image-models#118, "
    "pytorch-image-models#68",
    *("D33", "D01", "D02"),
)
def attacked_images_through_the_norms_of_clean_ones(is_bad: bool) -> Run:
    """Train on clean and on attacked images, in calls of their own.

    First: norms are shared by inputs of different distributions.
    Cost: 87 % in place of 99 %, a loss of 1.04 in place of 0.07.
    """
    model = PhotoNet(8, norm=partial(SplitNorm, is_shared=is_bad))
    optimizer = adam(model)
    splits = [m for m in model.modules() if isinstance(m, SplitNorm)]

    def attack(is_on: bool) -> None:
        for norm in splits:
            norm.is_attack = is_on

    model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in first(shapes(), 300):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            attack(True)
            moved = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
            loss = loss + F.cross_entropy(model(x + 1.0 * slope.sign()), y)
            attack(False)
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model.eval(), first(shapes(seed=1)), seen.findings())


# keras#9965 (frozen norms should take the moving mean), yolov3-tf2#188, pytorch#38084
@bug(
    "keras#9965, zzh8829/yolov3-tf2#188, pytorch#38084",
    *("D07", "D01"),
)
def port_of_a_frozen_network(is_bad: bool) -> Run:
    """Port trainable=False as requires_grad=False, and train a head on near voices.

    First: norms of a frozen part are in training mode, and their statistics change.
    Cost: a squared error of the old answers of 1.51 in place of 0.005, a loss of 1.67
    in place of 0.15.
    """
    model = ClipNet(is_each_frame=False)
    train(model, clips(), F.mse_loss, steps=400, optimizer=adam(model))
    model.requires_grad_(False)
    model.is_high = nn.Linear(32, 1)
    optimizer = adam(model)

    def loss_fn(answers: Tensor, y: Tensor) -> Tensor:
        old, is_high = answers.split([2, 1], 1)
        voice = (y[:, 1:] > 0).float()
        return F.mse_loss(old, y) + F.binary_cross_entropy_with_logits(is_high, voice)

    model.train()
    if not is_bad:
        model.eval()
        model.is_high.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in first(clips(16, seed=2, farthest=0.3), 400):
            loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model.eval(), first(clips(seed=1)), seen.findings(), loss_fn)


# ERNIE#481 (from_pretrained gives a model in eval mode), PoolNet#30 (only with the
# first running mean and var?), QAConv#16
@bug(
    "PaddlePaddle/ERNIE#481, backseason/PoolNet#30, ShengcaiLiao/QAConv#16",
    *("D08", "D03", "D22"),
)
def model_that_comes_in_eval_mode(is_bad: bool) -> Run:
    """Take a new model of a library, which is in eval mode, and never call train().

    First: norms are in eval mode while the network trains.
    Cost: 58 % in place of 99 %, a loss of 1.02 in place of 0.05.
    """
    model = StreamNet().eval()
    optimizer = adam(model, 1e-3)
    if not is_bad:
        model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in first(streams(), 500):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model.eval(), first(streams(seed=1)), seen.findings())


# keras#3949 (the history is too long, weights have drifted away), mlpack#1275 (steps of
# the entire training set)
@bug("keras#3949, mlpack#1275", "D03", "D04")
def one_batch_of_all_rows_in_each_epoch(is_bad: bool) -> Run:
    """Train for eight epochs on all rows at once, which is eight updates.

    First: statistics have seen too few batches.
    Cost: 84 % in place of 99 %, a loss of 0.64 in place of 0.04.
    """
    model = deep_mlp()
    data = list(written(epochs=8))
    if is_bad:
        data = [tuple(torch.cat(p) for p in zip(*digits(), strict=True))] * 8
    watched = train(model, iter(data), steps=len(data), optimizer=adam(model, 2e-2))
    return Run(model, digits(), watched)


# tensorflow-triplet-loss#6 (the loss is stuck at the margin: one point),
# pytorch-metric-learning#20, triplet-reid#30
@bug(
    "omoindrot/tensorflow-triplet-loss#6, KevinMusgrave/pytorch-metric-learning#20, "
    "VisualComputingInstitute/triplet-reid#30",
    *("D34", "D18"),
)
def faces_that_fall_on_one_point(is_bad: bool) -> Run:
    """Train vectors by the hardest triplets from the start; the twin takes all.

    First: the loss is stuck at the margin: all inputs have one answer.
    Cost: a loss of 0.29 in place of 0.005, where one point has 0.3 (the margin).
    """
    model = VectorNet()

    def triplets(vectors: Tensor, y: Tensor) -> Tensor:
        away = torch.cdist(vectors, vectors)
        same = y[:, None] == y
        if is_bad:
            near = away.masked_fill(same, 9.0).amin(1)
            return F.relu(away.masked_fill(~same, 0.0).amax(1) - near + 0.3).mean()
        parts = F.relu(away[:, :, None] - away[:, None] + 0.3)
        return parts[same[:, :, None] & ~same[:, None]].mean()

    optimizer = adam(model, 1e-3)
    data = faces(people=12)
    watched = train(model, data, triplets, steps=400, optimizer=optimizer)
    return Run(model, first(faces(seed=1, people=12)), watched, triplets)


# pytorch/examples#250 (tanh behind the output: add a linear layer),
# LSTM-Neural-Network-for-Time-Series-Prediction#56 (always between -1 and 1),
# seq2seq#260
@bug(
    "pytorch/examples#250, "
    "jaungiers/LSTM-Neural-Network-for-Time-Series-Prediction#56, "
    "farizrahman4u/seq2seq#260",
    *("D34", "D20"),
)
def demand_of_which_an_lstm_is_the_last_layer(is_bad: bool) -> Run:
    """Take the state of an LSTM as the answer, where targets go beyond one.

    First: answers cannot reach the targets.
    Cost: a squared error of 0.25 in place of 0.016.
    """
    model = Forecaster(is_bounded=is_bad)
    optimizer = adam(model, 5e-3)
    watched = train(model, demand(), F.mse_loss, steps=500, optimizer=optimizer)
    return Run(model, first(demand(seed=1)), watched, F.mse_loss)


# synaptic#221 (how to normalize ids), brain.js#565,
# Collaborative-Denoising-Auto-Encoder#1
@bug(
    "cazala/synaptic#221, BrainJS/brain.js#565, "
    "gtshs2/Collaborative-Denoising-Auto-Encoder#1",
    "D28",
)
def customers_by_their_numbers(is_bad: bool) -> Run:
    """Give the numbers of a customer and of a product to a perceptron.

    First: inputs are badly scaled.
    Cost: a squared error of 1.08 in place of 0.03.
    """
    model = IdNet(is_raw=is_bad)
    data = customers()
    watched = train(model, data, F.mse_loss, steps=1500, optimizer=adam(model, 5e-3))
    return Run(model, first(customers(seed=1)), watched, F.mse_loss)


# transformers#735 (one output for all: 0.01 to 5e-5 worked), nlp-tutorial#77,
# transformers#297
@bug("transformers#735, graykode/nlp-tutorial#77, transformers#297", "D27", "D34")
def reader_fine_tuned_at_a_high_rate(is_bad: bool) -> Run:
    """Fine-tune a transformer, which was trained for another question, at 0.03.

    First: the rate is too high.
    Cost: 33 % in place of 100 %, a loss of 1.56 in place of 0.009.
    """
    model = Reader()
    train(model, tokens(), steps=300, optimizer=adam(model, 1e-3))
    model.classifier = nn.Linear(32, 5)
    optimizer = adam(model, 3e-2 if is_bad else 1e-3)
    watched = train(model, tokens(seed=2, is_new=True), steps=400, optimizer=optimizer)
    return Run(model, first(tokens(seed=1, is_new=True)), watched)


# deep-rules#28 (over-fitting is the danger), M-LOOP#80
@bug("Benjamin-Lee/deep-rules#28, michaelhush/M-LOOP#80", "D34")
def patients_learned_by_heart(is_bad: bool) -> Run:
    """Train on 64 patients with 300 genes, for 150 epochs; the twin has more patients.

    First: the network is right on its training data, and not on others.
    Cost: 65 % in place of 93 %, a loss of 0.87 in place of 0.21.
    """
    model = level_mlp(300, 3)
    data: Any = itertools.cycle(first(genes(), 2)) if is_bad else genes()
    watched = train(model, data, steps=300, optimizer=adam(model, 1e-3))
    return Run(model, first(genes(seed=1)), watched)


# sphereface#43 (a scale is needed to converge), insightface#1966 (why not s=1?),
# FaceVerification#48
@bug(
    "wy1iu/sphereface#43, deepinsight/insightface#1966, happynear/FaceVerification#48",
    "D34",
)
def cosines_without_a_scale(is_bad: bool) -> Run:
    """Give cosines to cross entropy as scores, with a scale of one.

    First: scores are bounded, so that the loss cannot fall.
    Cost: a loss of 3.28 in place of 0.13: no answer is sure, though 97 % are right, in
    place of 98 %.
    """
    model = CosineHead(1.0 if is_bad else 16.0, 60)
    optimizer = adam(model, 2e-3)
    data = faces(people=60, noise=0.4)
    watched = train(model, data, steps=900, optimizer=optimizer)
    return Run(model, first(faces(seed=1, people=60, noise=0.4)), watched)


# dennybritz/reinforcement-learning#2 (correlated samples), Youtube-Code-Repository#2
@bug("dennybritz/reinforcement-learning#2, philtabor/Youtube-Code-Repository#2", "D13")
def moves_learned_level_by_level(is_bad: bool) -> Run:
    """Learn from states in the order in which a game gives them, without a memory.

    First: batches are not drawn at random.
    Cost: 58 % in place of 88 %, a loss of 1.50 in place of 0.28.
    """
    model, data = level_mlp(10, 4), 3 * transitions()
    if not is_bad:
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        data = [(x[i], y[i]) for i in order.split(32)]
    steps = iter(data)
    watched = train(model, steps, steps=len(data), optimizer=adam(model, 2e-3))
    return Run(model, data[-600::10], watched)


# RecLearn#57 (residual units without a shortcut are a perceptron), neural-enhance#103
@bug("ZiyaoGeng/RecLearn#57, alexjc/neural-enhance#103", "D22", "D24")
def residual_units_without_their_shortcut(is_bad: bool) -> Run:
    """Stack residual units, and forget to add what comes in.

    First: activations vanish with depth.
    Cost: 10 %, which is a guess, in place of 100 %, a loss of 2.30 in place of 0.002.
    """
    model = DeepCrossing(has_shortcut=not is_bad)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    watched = train(model, written(epochs=20), steps=500, optimizer=optimizer)
    return Run(model, digits(), watched)


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "target_network_without_statistics": (("D32", "D03", "D01"), ()),
    "windows_of_one_recording_in_a_batch": (("D13", "D01", "D02"), ()),
    "eeg_network_with_the_momentum_of_keras": (("D04", "D02"), ()),
    "leaves_segmented_from_batches_of_one": (("D05", "D01"), ()),
    "scales_that_were_fixed_at_one": (("D24", "D18", "D34"), ()),
    "distance_behind_norms_of_each_frame": (("D29",), ()),
    "prices_of_houses_behind_dropout_and_norms": (("D11",), ()),
    "served_by_opencv": (("D01", "D02"), ()),
    "attacked_images_through_the_norms_of_clean_ones": (("D01", "D02"), ()),
    "port_of_a_frozen_network": (("D07", "D34", "D01", "D02"), ("D34",)),
    "model_that_comes_in_eval_mode": (("D08", "D34"), ()),
    "one_batch_of_all_rows_in_each_epoch": (("D03", "D01", "D02"), ()),
    "faces_that_fall_on_one_point": ((), ()),
    "demand_of_which_an_lstm_is_the_last_layer": ((), ()),
    "customers_by_their_numbers": (("D28", "D21"), ("D28",)),
    "reader_fine_tuned_at_a_high_rate": (("D24", "D34", "D39"), ()),
    "patients_learned_by_heart": (("D34",), ()),
    "cosines_without_a_scale": ((), ()),
    "moves_learned_level_by_level": (("D39",), ()),
    "residual_units_without_their_shortcut": (("D21", "D24", "D22", "D27", "D34"), ()),
}
