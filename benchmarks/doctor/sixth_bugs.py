"""A sixth set of bugs of public threads: twelve about norms, eight about training.

Kinds of program that the others lack: distillation, clients whose models are averaged,
a pyramid of a detector, a denoiser of a diffusion, adaptation at test time, clouds of
points, graphs, ghost batches, forecasts, recordings of a brain, a model folded for
export, self-supervision, several heads. Each docstring says what the mistake is, and
what a good doctor would say first; `expected` has the one or two checks that say it.
Both were written, and committed, before the doctor saw any of these programs, by an
author who knew the names of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from bugs import Batch, Run, bug, digits, endless
from fifth_data import signals
from more_bugs import changed
from sixth_data import (
    clouds,
    credit,
    graphs,
    marks,
    recordings,
    scenes,
    series,
    textures,
    words,
)
from sixth_networks import (
    Block,
    Detector,
    Distiller,
    FineTuned,
    Forecaster,
    Ghost,
    GraphNet,
    Heads,
    Language,
    PointNet,
    Recall,
    SimSiam,
    Tabular,
    deep_mlp,
    eeg_net,
    style_encoder,
)
from sklearn.datasets import load_diabetes
from third_bugs import as_image, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "momentum_halved_without_an_end": (("D04", "D01", "D03", "D02"), ("D01", "D02")),
    "clients_averaged_but_for_their_statistics": (("D01", "D02"), ()),
    "folded_and_normalized_once_more": (("D01", "D02"), ()),
    "teacher_set_to_train_with_its_student": (("D07", "D21"), ("D21",)),
    "one_head_norm_for_all_levels_of_a_pyramid": (("D33", "D02"), ()),
    "one_noise_level_for_each_batch": ((), ()),
    "adaptation_to_a_stream_in_order": (("D13",), ()),
    "ghost_batches_of_two_rows": (("D05", "D01"), ()),
    "norm_that_is_made_at_each_call": (("D34",), ()),
    "level_that_is_taken_and_not_given_back": ((), ()),
    "style_read_behind_instance_norms": ((), ()),
    "volts_before_batch_norms": (("D28", "D25", "D11", "D02", "D16", "D18", "D34"), ()),
    "gradients_clipped_before_they_are_unscaled": (("D24", "D27"), ()),
    "forget_bias_given_to_another_gate": ((), ()),
    "classes_weighted_by_their_frequency": ((), ()),
    "two_views_without_a_stop": ((), ()),
    "head_tied_to_an_embedding_as_torch_draws_it": ((), ()),
    "one_head_in_thousands": ((), ()),
    "checkpoint_of_which_no_name_fits": ((), ()),
    "dropout_behind_the_answer": ((), ()),
}


def adam(model: nn.Module, lr: float = 2e-3) -> torch.optim.Adam:
    """Return Adam over all parameters."""
    return torch.optim.Adam(model.parameters(), lr)


def first(batches: Iterator[Batch], count: int) -> list[Batch]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


def pictures(size: int = 64) -> list[Batch]:
    """Return the digits as images, in batches."""
    return list(changed(digits(size), as_image))


def convolutions(*, dropout: float = 0.0, width: int = 16) -> nn.Sequential:
    """Return a small residual network for images of digits."""
    stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
    return nn.Sequential(
        *(stem, nn.BatchNorm2d(width), nn.ReLU(), Block(width), Block(width)),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(dropout)),
        nn.Linear(16 * width, 10),
    )


# torch-points3d#524 "On BatchNorm schedulers" (a momentum of 0.98 that is a typo, and a
# clip), Pointnet2_PyTorch#30 "initial value of bn_momentum", Point-BERT#41
@bug("torch-points3d#524, Pointnet2_PyTorch#30, Point-BERT#41", "D01", "D03")
def momentum_halved_without_an_end(is_bad: bool) -> Run:
    """Halve the momentum of batch norms as often as PointNet, and leave out its clip.

    First: the running statistics are those of early weights.
    """
    model = PointNet()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d)]

    def halve(_: torch.optim.Optimizer, step: int) -> None:
        momentum = 0.5 * 0.5 ** (step // 12)
        for norm in norms:
            norm.momentum = momentum if is_bad else max(momentum, 0.05)

    slow = adam(model, 3e-3)
    watched = train(model, clouds(), steps=200, optimizer=slow, schedule=halve)
    return Run(model, first(clouds(seed=1), 20), watched)


def _client(index: int, seed: int) -> Iterator[Batch]:
    """Give the digits of one of four clients; the first one's camera is dark."""
    for x, y in digits(48, 4 * seed + index):
        yield as_image(x if index else 0.4 * x - 0.6, y)


def _of_all_clients() -> list[Batch]:
    """Return batches of which a quarter is from each client."""
    batches = zip(*(_client(index, 0) for index in range(4)), strict=True)
    return [
        (torch.cat([x[:16] for x, _ in four]), torch.cat([y[:16] for _, y in four]))
        for four in batches
    ]


# PFLlib#269 "Fix BatchNorm buffer aggregation in FedAvg" (the buffers are those of the
# first client), FedScale#57 "BatchNorm params not being averaged", FLamby#260
@bug("PFLlib#269, FedScale#57, FLamby#260", "D01", "D31")
def clients_averaged_but_for_their_statistics(is_bad: bool) -> Run:
    """Average the parameters of four clients, in a copy of the first one's model.

    First: the running statistics are those of one client, not of the data.
    """
    model = convolutions(width=12)
    for seed in range(15):
        clients = [copy.deepcopy(model) for _ in range(4)]
        for index, client in enumerate(clients):
            sgd = torch.optim.SGD(client.parameters(), 0.05, 0.9)
            client.train()
            for x, y in itertools.islice(_client(index, seed), 6):
                sgd.zero_grad()
                F.cross_entropy(client(x), y).backward()
                sgd.step()
        model = copy.deepcopy(clients[0])
        with torch.no_grad():
            for mine, *theirs in zip(
                model.parameters(), *(c.parameters() for c in clients), strict=True
            ):
                mine.copy_(torch.stack(theirs).mean(0))
        if not is_bad:
            _pool_statistics(model, clients)
    return Run(model, _of_all_clients())


def _pool_statistics(model: nn.Module, clients: list[nn.Module]) -> None:
    """Give the norms of a model the mean and variance of all clients together."""
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            found = [client.get_submodule(name) for client in clients]
            means = torch.stack([each.running_mean for each in found])
            squares = torch.stack([each.running_var for each in found]) + means**2
            norm.running_mean = means.mean(0)
            norm.running_var = squares.mean(0) - means.mean(0) ** 2


def _from_0_to_1(x: Tensor, y: Tensor) -> Batch:
    """Give a digit as an image whose pixels are from 0 to 1."""
    return as_image(x / 16, y)


# flexible-yolov5#7 "Why do we need to remove batchnorm after fuse?", brevitas#388
# "Accuracy drop when merging Conv with BN", darknet#1560
@bug("flexible-yolov5#7, brevitas#388, darknet#1560", "D01", "D02")
def folded_and_normalized_once_more(is_bad: bool) -> Run:
    """Fold batch norms into their convolutions, and leave the norms where they are.

    First: the running statistics are not those of what the norms get.
    """
    model = convolutions()
    data = changed(itertools.cycle(digits(raw=True)), _from_0_to_1)
    watched = train(model, data, steps=200, optimizer=adam(model))
    model.eval()
    pairs = [(model, "0", "1")]
    for block in model[3:5]:
        pairs += [(block, "conv1", "norm1"), (block, "conv2", "norm2")]
    for part, conv, norm in pairs:
        both = part.get_submodule(conv), part.get_submodule(norm)
        setattr(part, conv, fuse_conv_bn_eval(*both))
        if not is_bad:
            setattr(part, norm, nn.Identity())
    return Run(model, list(changed(digits(raw=True), _from_0_to_1)), watched)


def _transfer(x: Tensor, y: Tensor) -> Batch:
    """Give what a student is shown: digits, and three times as many that are none."""
    x, y = as_image(x, y)
    other = 2 * torch.rand(3 * len(x), 1, 8, 8).round()
    return torch.cat([x, other]), y.repeat(4)


# sparseml#2191 "Fix Distill Teacher Eval Mode", knowlege-distillation#2 "teacher.eval()
# when performing distillation", overhaul-distillation#37 (t_net.train())
@bug("sparseml#2191, knowlege-distillation#2, overhaul-distillation#37", "D07")
def teacher_set_to_train_with_its_student(is_bad: bool) -> Run:
    """Call train() on a module that holds the student, and the teacher as well.

    First: the teacher's weights are frozen, and its running statistics move.
    """
    teacher = convolutions(dropout=0.5)
    data = changed(endless(), as_image)
    train(teacher, data, steps=150, optimizer=adam(teacher))
    student = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU()),
        nn.Linear(48, 10),
    )
    model = Distiller(teacher.eval(), student, is_bad=is_bad)

    def soft(scores: Tensor, _: Tensor) -> Tensor:
        mine, theirs = (scores / 2).unbind(1)
        return 4 * F.kl_div(
            mine.log_softmax(1), theirs.softmax(1), reduction="batchmean"
        )

    data = changed(endless(12), _transfer)
    watched = train(model, data, soft, steps=300, optimizer=adam(student))
    return Run(model, pictures(), watched, soft)


def focal(scores: Tensor, y: Tensor) -> Tensor:
    """Focal loss of each cell, over the number of objects."""
    cross = F.binary_cross_entropy_with_logits(scores, y, reduction="none")
    p = scores.sigmoid()
    missed = torch.where(y > 0, 1 - p, p)
    share = torch.where(y > 0, 0.75, 0.25)
    return (share * missed**2 * cross).sum() / y.sum().clamp(min=1)


# mmdetection#6515 "change gn to bn ... worse result" (the statistics of a head that is
# shared by the levels), Yet-Another-EfficientDet-Pytorch#560, automl#183
@bug("mmdetection#6515, Yet-Another-EfficientDet-Pytorch#560, automl#183", "D33", "D02")
def one_head_norm_for_all_levels_of_a_pyramid(is_bad: bool) -> Run:
    """Share the norms of a detector's head between its levels, as its convolutions.

    First: one layer is called on inputs of three kinds; its average fits none.
    """
    model = Detector(is_bad=is_bad)
    watched = train(model, scenes(), focal, steps=150, optimizer=adam(model, 5e-3))
    return Run(model, first(scenes(seed=1), 16), watched, focal)


def _noised(*, is_one_level: bool, seed: int) -> Iterator[Batch]:
    """Give digits in noise beside its level (N, 2, 8, 8), and the noise."""
    source = torch.Generator().manual_seed(seed)
    for x, _ in changed(endless(32), as_image):
        t = torch.rand(1 if is_one_level else len(x), 1, 1, 1, generator=source)
        t = t.expand(len(x), 1, 8, 8)
        noise = torch.randn(x.shape, generator=source)
        mixed = (1.57 * t).cos() * x + (1.57 * t).sin() * noise
        yield torch.cat([mixed, t], 1), noise


# StableCascade#142 "Why is noise scheduler timestep the constant batch-size rather than
# batch size amount of randoms", DispLoss#5 "Timesteps are normally different"
@bug("StableCascade#142, DispLoss#5", "D13", "D02")
def one_noise_level_for_each_batch(is_bad: bool) -> Run:
    """Draw one time for a batch of a diffusion, whose denoiser has batch norm.

    First: a batch does not stand for the data; eval mode fits no level.
    """
    layers: list[nn.Module] = [nn.Conv2d(2, 24, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(24, 1, 3, padding=1))
    data = _noised(is_one_level=is_bad, seed=0)
    watched = train(model, data, F.mse_loss, steps=300, optimizer=adam(model))
    loader = first(_noised(is_one_level=False, seed=1), 20)
    return Run(model, loader, watched, F.mse_loss)


def _stream(*, is_in_order: bool) -> list[Batch]:
    """Return digits in fog, in batches of 32 that follow the classes or do not."""
    x, y = (torch.cat(part) for part in zip(*digits(64), strict=True))
    fog = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x, y = as_image(0.5 * x + 1.0 + 0.2 * fog, y)
    if is_in_order:
        order = y.argsort(stable=True)
        x, y = x[order], y[order]
    return list(zip(x.split(32), y.split(32), strict=True))


# tent#7 "Performance on CIFAR-10-C deteriorates with more epochs",
# self-domain-adapted-network#5 (adaptation to a single subject), VPTTA#5
@bug("tent#7, self-domain-adapted-network#5, VPTTA#5", "D13", "D05")
def adaptation_to_a_stream_in_order(is_bad: bool) -> Run:
    """Adapt batch norms to a stream that comes class by class, by the least entropy.

    First: the batches, whose statistics are used, are not mixed.
    """
    model = convolutions()
    data = changed(endless(), as_image)
    train(model, data, steps=200, optimizer=adam(model))
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(True)
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None
    stream = _stream(is_in_order=is_bad)

    def entropy(scores: Tensor, _: Tensor) -> Tensor:
        return -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()

    affine = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(affine, 1e-3)
    watched = train(model, iter(stream), entropy, steps=60, optimizer=optimizer)
    return Run(model, stream, watched)


# tabnet#384 "Question on Ghost Batch Norm" (into how many parts chunk cuts),
# pointnet#37 "low accuracy when batch_size = 1 or 2", ludwig#3119
@bug("tabnet#384, pointnet#37, ludwig#3119", "D05")
def ghost_batches_of_two_rows(is_bad: bool) -> Run:
    """Give chunk() the rows of a ghost batch, where it takes the number of them.

    First: statistics are those of two rows.
    """
    model = Tabular(lambda width: Ghost(width, 32, is_bad=is_bad))
    weight = torch.tensor([0.2, 1.8])

    def weighted(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores, y, weight)

    watched = train(model, credit(), weighted, steps=300, optimizer=adam(model))
    return Run(model, first(credit(seed=1), 30), watched, weighted)


# diffpool#20 "batch normalization" (a layer is made whenever one is called), dgl#10
# "How to support graph batch-norm?", pytorch_geometric#1066
@bug("diffpool#20, pytorch_geometric#1066, dgl#10", "D09", "D05")
def norm_that_is_made_at_each_call(is_bad: bool) -> Run:
    """Make a batch norm within forward: it keeps nothing, and is always in training.

    First: in eval mode a graph's scores depend on the others of its batch.
    """
    model = GraphNet(is_bad=is_bad)
    watched = train(model, graphs(), steps=250, optimizer=adam(model, 5e-3))
    return Run(model, first(graphs(seed=1), 10), watched)


# timesfm#522 "Asymmetric scale guard in revin", granite-tsfm#83 "Problem of
# Denormalization of Predicted Values", iTransformer#6 "RevIN"
@bug("timesfm#522, granite-tsfm#83, iTransformer#6", "D29", "D34")
def level_that_is_taken_and_not_given_back(is_bad: bool) -> Run:
    """Normalize each window of a forecast, and leave out the way back.

    First: the norm takes away what the target asks for, the level of each series.
    """
    model = Forecaster(is_bad=is_bad)
    watched = train(model, series(), F.mse_loss, steps=300, optimizer=adam(model))
    return Run(model, first(series(seed=1), 20), watched, F.mse_loss)


# MUNIT#10 "why you use layer_norm?" (instance norm removes what captures the style),
# AdaAttN#8 "Mean-variance-norm and Instance Norm", tunit#14
@bug("MUNIT#10, AdaAttN#8", "D29", "D34")
def style_read_behind_instance_norms(is_bad: bool) -> Run:
    """Read brightness and contrast of an image behind instance norms.

    First: the norms take away mean and spread of each image, which are the target.
    """
    model = style_encoder(nn.InstanceNorm2d if is_bad else nn.BatchNorm2d)
    watched = train(
        model, textures(), F.mse_loss, steps=300, optimizer=adam(model, 5e-3)
    )
    return Run(model, first(textures(seed=1), 20), watched, F.mse_loss)


# TNTLFreiburg/braindecode#34 "only predicts one class for all trials" (recorded in mV,
# as it is), braindecode#354 (outputs of EEGNet, and how the input is scaled)
@bug("TNTLFreiburg/braindecode#34, braindecode#354", "D28", "D18")
def volts_before_batch_norms(is_bad: bool) -> Run:
    """Give EEGNet volts, as files have them: their squares are far below its eps.

    First: the inputs are a hundred-thousandth in size.
    """
    unit = 1e-6 if is_bad else 0.1
    model = eeg_net()
    watched = train(model, recordings(unit=unit), steps=120, optimizer=adam(model))
    return Run(model, first(recordings(seed=1, unit=unit), 12), watched)


# Pytorch-UNet#468 "Gradients are clipped before the unscaling", pytorch-lightning#9606,
# pytorch/examples#1196
@bug("Pytorch-UNet#468, pytorch-lightning#9606, pytorch/examples#1196", "D27")
def gradients_clipped_before_they_are_unscaled(is_bad: bool) -> Run:
    """Clip gradients that still have the factor of mixed precision, then take it off.

    First: the steps are far too small for the weights.
    """
    layers: list[nn.Module] = []
    for fan_in in (3, 24, 24):
        layers.append(nn.Conv1d(fan_in, 24, 5, padding=2))
        layers += [nn.BatchNorm1d(24), nn.ReLU(), nn.MaxPool1d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    parameters, scale = list(model.parameters()), 2.0**16
    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(signals(), 200):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss * scale).backward()
            if is_bad:
                nn.utils.clip_grad_norm_(parameters, 1.0)
            for p in parameters:
                p.grad /= scale
            if not is_bad:
                nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, first(signals(seed=1), 20), seen.findings())


# pytorch#20102 "LSTM forget bias must be initialized properly", char-rnn#60 "LSTM
# forget gate bias" (which part of the one bias it is), blocks#792
@bug("pytorch#20102, char-rnn#60, blocks#792", "D24")
def forget_bias_given_to_another_gate(is_bad: bool) -> Run:
    """Open the forget gate of an LSTM by its first quarter, which is another gate.

    First: the gradient vanishes on its way to the first step.
    """
    model = Recall(is_bad=is_bad)
    watched = train(model, marks(), steps=400, optimizer=adam(model, 5e-3))
    return Run(model, first(marks(seed=1), 20), watched)


# pytorch-deeplab-xception#109 "why not just set class_weight = frequency",
# lidar-bonnetal#48 (larger weights for classes with more points), DeepFRI#11
@bug("pytorch-deeplab-xception#109, lidar-bonnetal#48, DeepFRI#11", "D34")
def classes_weighted_by_their_frequency(is_bad: bool) -> Run:
    """Weight each class by how frequent it is, where the inverse was meant.

    First: the network answers one class whatever it is asked.
    """
    share = torch.tensor([0.9, 0.1])
    weight = share if is_bad else 0.5 / share

    def weighted(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores, y, weight)

    model = Tabular(nn.LayerNorm)
    watched = train(model, credit(), weighted, steps=300, optimizer=adam(model))
    return Run(model, first(credit(seed=1), 30), watched, weighted)


def _views(x: Tensor, y: Tensor) -> Batch:
    """Give two views of each digit (N, 2, 8, 8): shifted, scaled and noisy."""
    x, y = as_image(x, y)
    found = []
    for _ in range(2):
        moved = torch.stack(
            [
                each.roll((int(dy), int(dx)), (1, 2))
                for each, dy, dx in zip(
                    x, *torch.randint(-1, 2, (2, len(x))), strict=True
                )
            ]
        )
        scale = 0.7 + 0.6 * torch.rand(len(x), 1, 1, 1)
        found.append(scale * moved + 0.3 * torch.randn(x.shape))
    return torch.cat(found, 1), y


def _agreement(found: Tensor, _: Tensor) -> Tensor:
    """Give the negative cosine of each prediction and the other view's code."""
    p1, p2, z1, z2 = found.unbind(1)
    return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean() / 2


# SimSiam#39 "There should be a stop gradient", SimSiam#50 "Loss collapse" (-1 at once),
# lightly#559 "The gradient of projection haven't been detached"
@bug("SimSiam#39, SimSiam#50, lightly#559", "D34")
def two_views_without_a_stop(is_bad: bool) -> Run:
    """Let the gradient pass into the target of a SimSiam.

    First: the codes of all images are the same.
    """
    model = SimSiam(is_bad=is_bad)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    data = changed(endless(), _views)
    watched = train(model, data, _agreement, steps=300, optimizer=optimizer)
    return Run(model, list(changed(digits(), _views)), watched, _agreement)


def of_each_step(scores: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of the scores (N, L, K) of each step."""
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


# pytorch#3121 "Better initialization in Embedding class" (N(0, 1) is too high),
# fastai#2090 (a decoder that is tied to an embedding), build-nanogpt#18
@bug("pytorch#3121, fastai#2090, build-nanogpt#18", "D34")
def head_tied_to_an_embedding_as_torch_draws_it(is_bad: bool) -> Run:
    """Tie the head of a language model to an embedding drawn from N(0, 1).

    First: the first loss is far above that of one guess for all words.
    """
    model = Language(1.0 if is_bad else 0.02)
    watched = train(
        model, words(), of_each_step, steps=150, optimizer=adam(model, 1e-3)
    )
    return Run(model, first(words(seed=1), 12), watched, of_each_step)


def _with_strength(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Give signals, and which of five they are beside their strength in mV (N, 2)."""
    for x, y in batches:
        strength = 1000 * x.pow(2).mean((1, 2)).sqrt()
        yield x, torch.stack([y.float(), strength], 1)


# landmark-detection#2 "why not normalize the loss of regression?" (above 100 beside one
# below 1), spikingjelly#637 "one of the heads does not learn anything"
@bug("landmark-detection#2, spikingjelly#637", "D34")
def one_head_in_thousands(is_bad: bool) -> Run:
    """Add the squared error of a head in millivolts to the loss of another head.

    First: one head does not learn: its part of the loss is that of a guess.
    """
    unit = 1.0 if is_bad else 1e-3

    def both(found: Tensor, y: Tensor) -> Tensor:
        error = F.mse_loss(found[:, 5], unit * y[:, 1])
        return error + F.cross_entropy(found[:, :5], y[:, 0].long())

    model = Heads()
    data = _with_strength(signals())
    watched = train(model, data, both, steps=300, optimizer=adam(model))
    return Run(model, first(_with_strength(signals(seed=1)), 20), watched, both)


# pytorch/examples#1029 "strict=False can silently load a corrupted model" (a prefix
# before every name), pytorch#141256, simple-HRNet#79
@bug("pytorch/examples#1029, pytorch#141256, simple-HRNet#79", "D32")
def checkpoint_of_which_no_name_fits(is_bad: bool) -> Run:
    """Load a backbone whose names begin with "module." by strict=False, and freeze it.

    First: the buffers of the frozen norms are those of a new model.
    """

    def up_or_down(x: Tensor, y: Tensor) -> Batch:
        return as_image(x, (y > 4).long())

    trained = convolutions()
    data = changed(endless(), up_or_down)
    train(trained, data, steps=150, optimizer=adam(trained))
    saved = nn.DataParallel(trained).state_dict()
    if not is_bad:
        saved = {name.removeprefix("module."): value for name, value in saved.items()}
    backbone = convolutions()
    backbone.load_state_dict(saved, strict=False)
    backbone = backbone[:-1].requires_grad_(False).eval()
    model = FineTuned(backbone, nn.Linear(256, 10))
    data = changed(endless(), as_image)
    watched = train(model, data, steps=100, optimizer=adam(model.head))
    return Run(model, pictures(), watched)


# darch#12 "Dropout method" (it is applied to the last output layer), lstms.pth#2 (no
# dropout on the last layer), commonsense-rc#4 "Dropout on output?"
@bug("darch#12, lstms.pth#2, commonsense-rc#4", "D11", "D02")
def dropout_behind_the_answer(is_bad: bool) -> Run:
    """Drop four of ten answers of a regression: it learns six tenths of each target.

    First: dropout changes what the outputs are between training and eval mode.
    """
    x, y = load_diabetes(return_X_y=True)
    rows = torch.tensor(x, dtype=torch.float32)
    rows = (rows - rows.mean(0)) / rows.std(0)
    target = torch.tensor(y, dtype=torch.float32)[:, None] / 100

    def rounds(seed: int, size: int = 40) -> Iterator[Batch]:
        for epoch in itertools.count(seed):
            source = torch.Generator().manual_seed(epoch)
            for part in torch.randperm(440, generator=source).split(size):
                yield rows[part], target[part]

    model = deep_mlp(has_dropout_at_end=is_bad)
    watched = train(model, rounds(0), F.mse_loss, steps=300, optimizer=adam(model))
    return Run(model, first(rounds(0), 11), watched, F.mse_loss)
