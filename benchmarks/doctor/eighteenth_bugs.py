"""An eighteenth set of bugs of public threads: these are about statistics of norms.

Five about modes, frozen backbones and an average are in eighteenth_modes.py, eight
about training in general in eighteenth_training.py. Each docstring says what the
mistake is, what a good doctor would say first, and what the mistake costs in eval mode
on the batches of the run, with the seed 0; `expected` has the checks that say it. Both
were written before the doctor's alarms on any of these programs were seen, by an author
who knew the titles of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

import eighteenth_modes  # noqa: F401 - these enter their programs in BUGS
import eighteenth_training  # noqa: F401
import torch
from bugs import Batch, Run, bug
from eighteenth_data import (
    activities,
    beats,
    claims,
    clouds,
    digit_images,
    exposures,
    graphs,
    loader,
    molecules,
)
from eighteenth_networks import (
    ActivityNet,
    BeatNet,
    ExposureNet,
    GraphNet,
    MaskedGraphNet,
    NormLSTM,
    PointNet,
    TabNet,
)
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]


# ludwig#2100 (0.95 of TabNet is 0.05 here), PyTorch-YOLOv3#230 (momentum=0.9 keeps only
# 10 % of what was), examples#289 (is it another convention?)
@bug(
    "ludwig-ai/ludwig#2100, eriklindernoren/PyTorch-YOLOv3#230, pytorch/examples#289",
    *("D04", "D02", "D01"),
)
def tabnet_with_the_momentum_of_its_paper(is_bad: bool) -> Run:
    """Write momentum=0.98, as the paper of TabNet does, which is 0.02 here.

    First: the momentum is that of the other convention.
    Cost: 85 % in place of 93 %, a loss of 0.36 in place of 0.24.
    """
    model = TabNet(momentum=0.98 if is_bad else 0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.4)
    (category, figures), kind = claims(2048, 1)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            model.train()
            for c, f, y in loader((category, figures, kind)):
                loss = F.cross_entropy(model(c, f), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            scheduler.step()
    model.eval()
    (category, figures), kind = claims(512, 2)
    held = loader((category, figures, kind), shuffle=False)
    return Run(model, [((c, f), y) for c, f, y in held], seen.findings())


# pointnet#37 (low accuracy when the batch size is 1 or 2), O-CNN#95 (if the batch is
# too small, accuracy may decrease), TorchSeg#95
@bug(
    "charlesq34/pointnet#37, microsoft/O-CNN#95, yu-changqian/TorchSeg#95",
    *("D05", "D02"),
)
def pointnet_on_two_clouds(is_bad: bool) -> Run:
    """Train a PointNet on batches of two clouds.

    First: statistics are of too few values, two in the last layers.
    Cost: 48 % in place of 98 %, a loss of 1.37 in place of 0.24.
    """
    model = PointNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = loader(clouds(640, 1), 2 if is_bad else 32)
    epochs = 3 if is_bad else 10
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, epochs // 2, gamma=0.3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(epochs):
            model.train()
            for points, kind in data:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(points), kind)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            scheduler.step()
    model.eval()
    return Run(model, list(loader(clouds(512, 2), shuffle=False)), seen.findings())


# pytorch#25910 (padding affects batch norm), keras#3228 (zeros distort the statistics),
# tensorflow#30161 (a mean biased to 0), cnn_graph#17
@bug(
    "pytorch#25910, keras-team/keras#3228, tensorflow/tensorflow#30161, "
    "mdeff/cnn_graph#17",
    *("D12", "D01", "D02"),
)
def graphs_padded_to_a_fixed_size(is_bad: bool) -> Run:
    """Pad graphs to 64 atoms in training, without a mask, and test each as it is.

    First: padding is in the statistics.
    Cost: a squared error of 1.95 in place of 0.05, where the variance is 0.76.
    """
    train, test = molecules(640, 1), molecules(128, 2)
    model = GraphNet() if is_bad else MaskedGraphNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            model.train()
            for order in torch.randperm(len(train)).split(16):
                batch, value = graphs([train[i] for i in order.tolist()], 64)
                optimizer.zero_grad()
                loss = F.mse_loss(model(*batch), value)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    served = [graphs([graph], len(graph[0])) for graph in test]
    return Run(model, served, seen.findings(), F.mse_loss)


class Accumulator:
    """Takes a step after several batches."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        self.model, self.steps = model, steps
        self.optimizer = torch.optim.Adam(model.parameters(), lr)
        self.count = 0

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, and step when there are enough."""
        (loss / self.steps).backward()
        self.count += 1
        if self.count % self.steps == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


# yolov5#1630 (not identical, as of batch norms), giotto-deep#75 (not compatible),
# runai#14, GradientAccumulator#47
@bug(
    "ultralytics/yolov5#1630, giotto-ai/giotto-deep#75, run-ai/runai#14, "
    "andreped/GradientAccumulator#47",
    *("D15", "D05", "D02"),
)
def heartbeats_one_pair_after_the_other(is_bad: bool) -> Run:
    """Reach a nominal batch of 16 by eight batches of two.

    First: batch norms see batches of two, however many are accumulated.
    Cost: 82 % in place of 96 %, a loss of 0.54 in place of 0.16; with the seed 1 89 %.
    """
    nominal, size = 16, 2 if is_bad else 16
    model = BeatNet()
    accumulator = Accumulator(model, 5e-3, nominal // size)
    data = loader(beats(512, 1), size)
    with watch(model, accumulator.optimizer, every=5) as seen:
        for _ in range(5):
            model.train()
            for x, y in data:
                loss = F.cross_entropy(model(x), y)
                accumulator.backward(loss)
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(beats(512, 2), shuffle=False)), seen.findings())


def recorded(data: Batch) -> Batch:
    """Return windows in the order in which they were recorded: one activity a time."""
    x, y = data
    order = y.argsort(stable=True)
    return x[order], y[order]


# XNOR-Net-PyTorch#38 (why shuffle=False for the train loader?), miss-alignment#6 (batch
# norm leaks the order), tensorflow#7111, Deep-Clustering-Network#2
@bug(
    "jiecaoyu/XNOR-Net-PyTorch#38, warpem/miss-alignment#6, "
    "tensorflow/tensorflow#7111, xuyxu/Deep-Clustering-Network#2",
    *("D13", "D02", "D01"),
)
def activities_in_the_order_of_the_recording(is_bad: bool) -> Run:
    """Keep shuffle=False for the training data, which come activity by activity.

    First: batches differ more than random ones would.
    Cost: 26 % in place of 91 %, a loss of 1.83 in place of 0.26.
    """
    model = ActivityNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    data = loader(recorded(activities(1280, 1)), shuffle=not is_bad)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            model.train()
            for x, y in data:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(activities(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings())


# pytorch-CycleGAN-and-pix2pix#872 (instance norm is invariant to exposure and contrast;
# a bright input should give a bright output)
@bug("junyanz/pytorch-CycleGAN-and-pix2pix#872", "D29")
def exposure_behind_instance_norms(is_bad: bool) -> Run:
    """Take the instance norms of a network for styles to say how dark a photograph is.

    First: the norms erase their input.
    Cost: a squared error of 0.48 in place of 0.05, where the variance is 0.95.
    """
    norm = nn.InstanceNorm2d if is_bad else nn.BatchNorm2d
    model = ExposureNet(norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 8 * 32)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            model.train()
            for x, y in loader(exposures(1024, 1)):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                scheduler.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(exposures(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings(), F.mse_loss)


# recurrent-batch-normalization-pytorch#1 (how is each step kept apart?), bnlstm#7 (it
# is shared; at test time results are terrible), Element-Research/rnn#252
@bug(
    "jihunchoi/recurrent-batch-normalization-pytorch#1, OlavHN/bnlstm#7, "
    "Element-Research/rnn#252",
    *("D33", "D01", "D02"),
)
def lstm_whose_steps_share_batch_norms(is_bad: bool) -> Run:
    """Call the same batch norms at each step of an LSTM that reads digits row by row.

    First: one batch norm is given inputs of different distributions.
    Cost: 88 % in place of 98 %, a loss of 0.40 in place of 0.05.
    """
    train, test = digit_images()
    model = NormLSTM(8, steps=1 if is_bad else 8)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(10):
            model.train()
            for x, y in loader(train):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(loader(test, shuffle=False)), seen.findings())


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
# The diagnosis of the graphs raised an error, of the twin as well.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hourglass_validated_without_eval": (("D09", "D01", "D02"), ()),
    "fcn_validated_within_an_epoch": (("D08", "D01"), ()),
    "norms_frozen_without_pretrained_weights": (("D08", "D27"), ()),
    "pretrained_features_of_raw_pixels": (("D28",), ()),
    "federated_average_of_parameters": (("D32", "D03", "D01", "D02"), ()),
    "encoder_without_batch_first": ((), ()),
    "sentiment_by_sgd_at_a_thousandth": (("D27", "D34"), ()),
    "cifar_network_by_adam_at_the_rate_of_sgd": (("D27", "D22", "D24", "D34"), ()),
    "share_prices_without_a_scaler": (("D28", "D34"), ()),
    "forces_behind_a_last_relu": (("D34",), ()),
    "hidden_layers_in_a_plain_list": (("D34", "D22"), ()),
    "vae_of_a_mean_and_a_sum": (("D24", "D34"), ()),
    "dense_layers_drawn_by_randn": (("D20",), ()),
    "tabnet_with_the_momentum_of_its_paper": (("D04",), ()),
    "pointnet_on_two_clouds": (("D05",), ()),
    "graphs_padded_to_a_fixed_size": ((), ("not run",)),
    "heartbeats_one_pair_after_the_other": (("D15", "D01"), ()),
    "activities_in_the_order_of_the_recording": (("D02",), ()),
    "exposure_behind_instance_norms": ((), ()),
    "lstm_whose_steps_share_batch_norms": (("D33",), ()),
}
