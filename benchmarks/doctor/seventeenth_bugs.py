"""A seventeenth set of bugs of public threads: these are about statistics of norms.

Six about modes, freezing and averages are in seventeenth_modes.py, eight about training
in general in seventeenth_training.py. Each docstring says what the mistake is, what a
good doctor would say first, and what the mistake costs in eval mode on the batches of
the run, with the seed 0; `expected` has the checks that say it. Both were written
before the doctor's alarms on any of these programs were seen, by an author who knew the
titles of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

from collections.abc import Iterator

import seventeenth_modes  # noqa: F401 - these enter their programs in BUGS
import seventeenth_training  # noqa: F401
import torch
from bugs import Batch, Run, bug
from seventeenth_data import (
    bearings,
    cells,
    consumption,
    fabrics,
    joined,
    loader,
    rooms,
    utterances,
)
from seventeenth_networks import (
    BearingNet,
    DeepLab,
    DepthNet,
    LoadReader,
    MobileNet,
    WordNet,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]


# DeepLabV3Plus-Pytorch#27 and vision#1667 (more than 1 value per channel: a batch
# larger than 1 is the advice), deep-learning-for-image-processing#608
@bug(
    "VainF/DeepLabV3Plus-Pytorch#27, pytorch/vision#1667, "
    "WZMIAOMIAO/deep-learning-for-image-processing#608",
    *("D05", "D02"),
)
def deeplab_with_batches_of_two(is_bad: bool) -> Run:
    """Train a DeepLab on two images at a time, so that its pooled branch can run.

    First: statistics are of too few values, two in the branch of the whole image.
    Cost: a loss of 1.53 in place of 0.24; with the seed 1 0.73.
    """
    size = 2 if is_bad else 16
    net = DeepLab()
    criterion = nn.BCEWithLogitsLoss()
    base_lr, epochs = 0.02, 4
    optimizer = torch.optim.SGD(net.parameters(), base_lr, 0.9, weight_decay=1e-4)
    train = loader(cells(400, 1), size)
    schedule = torch.optim.lr_scheduler.PolynomialLR(
        optimizer, epochs * len(train), power=0.9
    )
    with watch(net, optimizer, every=5) as seen:
        for _ in range(epochs):
            net.train()
            for image, mask in train:
                optimizer.zero_grad()
                loss = criterion(net(image), mask)
                loss.backward()
                optimizer.step()
                schedule.step()
                seen.log(loss=loss.item())
    net.eval()
    held = loader(cells(128, 2), size, shuffle=False)
    return Run(net, list(held), seen.findings(), criterion)


# EfficientNet-PyTorch#3 and #229 (which is the right value?), keras#6839 (0.9997 gives
# bad results), soloice/Chinese-Character-Recognition#5 (poor at first)
@bug(
    "lukemelas/EfficientNet-PyTorch#229, keras-team/keras#6839, "
    "soloice/Chinese-Character-Recognition#5",
    *("D04", "D03", "D02", "D01"),
)
def efficientnet_with_the_decay_of_a_long_training(is_bad: bool) -> Run:
    """Write momentum=1 - 0.999 as the paper does, and train for 160 steps.

    First: the momentum is too small, initial values are still in the statistics.
    Cost: 89 % in place of 99 %, a loss of 0.74 in place of 0.08; 60 % with the seed 1.
    """
    model = MobileNet(momentum=1 - 0.999, eps=1e-3) if is_bad else MobileNet(eps=1e-3)
    optimizer = torch.optim.RMSprop(model.parameters(), 2e-3, alpha=0.9, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            for x, y in loader(fabrics(1024, 1)):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model((x - 0.5) / 0.25), y, label_smoothing=0.1)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = fabrics(512, 2)
    held = loader(((x - 0.5) / 0.25, y), shuffle=False)
    return Run(model, list(held), seen.findings())


class Shards(IterableDataset):
    """Reads one file after the other; each file has the windows of one fault."""

    def __init__(self, data: Batch, *, shuffles: bool) -> None:
        x, y = data
        order = torch.randperm(len(y)) if shuffles else y.argsort(stable=True)
        self.x, self.y = x[order], y[order]

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from zip(self.x, self.y.tolist(), strict=True)


# webdataset#62 (the order is kind of preserved), openpifpaf#308 (the distribution in a
# batch is different), data#302 (2 % in place of 47 %)
@bug(
    "webdataset/webdataset#62, openpifpaf/openpifpaf#308, meta-pytorch/data#302",
    *("D13", "D02", "D01"),
)
def iterable_dataset_without_a_shuffle(is_bad: bool) -> Run:
    """Read files by an IterableDataset, which shuffle=True cannot shuffle.

    First: batches differ more than random ones would.
    Cost: 87 % in place of 100 %, a loss of 1.04 in place of 0.02.
    """
    data = bearings(1280, 1)
    model = BearingNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for x, y in DataLoader(Shards(data, shuffles=not is_bad), batch_size=32):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(bearings(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings())


# deepspeech.pytorch#312 (repeat the utterance in place of zeros), audio#4205 (how much
# padding there is varies), speechbrain#1374 (padded samples have other embeddings)
@bug(
    "SeanNaren/deepspeech.pytorch#312, pytorch/audio#4205, "
    "speechbrain/speechbrain#1374",
    *("D12", "D01", "D02"),
)
def words_padded_to_the_longest_of_a_batch(is_bad: bool) -> Run:
    """Pad log powers with zeros in training; serve each word by itself, unpadded.

    First: padding is in the statistics.
    Cost: 74 % in place of 97 %, a loss of 1.03 in place of 0.13.
    """
    train, test = utterances(1024, 1), utterances(96, 2)
    model = WordNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            for part in DataLoader(
                train,
                16,
                shuffle=True,
                collate_fn=lambda p: joined(p, wraps=not is_bad),
            ):
                features, label = part
                loss = F.cross_entropy(model(features), label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    served = [(x.unsqueeze(0), torch.tensor([y])) for x, y in test]
    return Run(model, served, seen.findings())


# pytorch#108956 (zeros for a batch of one column), Transformers4Rec#151 (we discovered
# that continuous features get a value close to 0)
@bug("pytorch#108956, NVIDIA-Merlin/Transformers4Rec#151", "D29", "D18")
def layer_norm_of_a_series_of_one_variable(is_bad: bool) -> Run:
    """Put LayerNorm(1) in front of a transformer, as the series has one variable.

    First: the norm erases its input.
    Cost: 26 %, which is a guess, in place of 100 %; a loss of 1.39 in place of 0.001.
    """
    model = LoadReader(norms_input=is_bad)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, _, kind = consumption(1024, 1)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for xs, ys in loader((x, kind)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(xs), ys)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, _, kind = consumption(512, 2)
    return Run(model, list(loader((x, kind), shuffle=False)), seen.findings())


class TrainingArguments:
    """Arguments of a trainer."""

    def __init__(self, size: int, accumulation: int, epochs: int = 4) -> None:
        self.per_device_train_batch_size = size
        self.gradient_accumulation_steps = accumulation
        self.num_train_epochs = epochs
        self.learning_rate = 3e-3


# Bts-PyTorch#2 (accumulation in place of a batch of 4), GradientAccumulator#22 (batches
# of 2, 8 steps: no convergence, by batch norms), mmcv#1869 (8 % worse)
@bug(
    "ErenBalatkan/Bts-PyTorch#2, andreped/GradientAccumulator#22, open-mmlab/mmcv#1869",
    *("D15", "D05", "D02"),
)
def depths_by_accumulation_over_pairs(is_bad: bool) -> Run:
    """Accumulate eight batches of two images for one of sixteen.

    First: batch norms see batches of two, however many are accumulated.
    Cost: an absolute error of 0.23 in place of 0.08; with the seed 1 0.33.
    """
    args = TrainingArguments(2, 8) if is_bad else TrainingArguments(16, 1)
    model = DepthNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    train = loader(rooms(400, 1), args.per_device_train_batch_size)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(args.num_train_epochs):
            for step, (image, depth) in enumerate(train):
                loss = F.l1_loss(model(image), depth)
                loss = loss / args.gradient_accumulation_steps
                loss.backward()
                if (step + 1) % args.gradient_accumulation_steps == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                seen.log(loss=loss.item() * args.gradient_accumulation_steps)
    model.eval()
    held = loader(rooms(256, 2), 16, shuffle=False)
    return Run(model, list(held), seen.findings(), F.l1_loss)


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eval_without_its_parentheses": (
        (
            "D09",
            "D01",
            "D02",
        ),
        (),
    ),
    "catalogue_made_before_a_frozen_backbone_moved": (
        (
            "D07",
            "D01",
            "D27",
            "D02",
        ),
        (),
    ),
    "generator_sampled_and_left_in_eval_mode": (
        (
            "D08",
            "D01",
        ),
        (),
    ),
    "agent_that_acts_in_training_mode": (
        (
            "D09",
            "D01",
            "D02",
        ),
        (),
    ),
    "camera_frames_not_divided_by_255": (
        (
            "D28",
            "D01",
            "D02",
        ),
        (),
    ),
    "mean_teacher_of_parameters_alone": (
        (
            "D32",
            "D03",
            "D01",
            "D02",
        ),
        (),
    ),
    "forecasts_compared_with_all_targets": (("D34",), ()),
    "vae_whose_sigmoid_meets_normalized_images": (("D34",), ()),
    "wide_and_deep_on_raw_figures": (("D28",), ()),
    "six_encoder_layers_at_a_constant_rate": (
        (
            "D38",
            "D24",
            "D34",
        ),
        (),
    ),
    "hidden_state_detached_for_the_decoder": ((), ()),
    "siamese_with_the_weights_of_a_dcgan": (
        (
            "D22",
            "D24",
            "D27",
            "D34",
        ),
        (),
    ),
    "yields_in_barrels_at_a_high_rate": (
        (
            "D34",
            "D27",
            "D21",
            "D39",
        ),
        (),
    ),
    "super_resolution_stepped_with_each_batch": (("D27",), ()),
    "deeplab_with_batches_of_two": (
        (
            "D05",
            "D01",
            "D02",
        ),
        (),
    ),
    "efficientnet_with_the_decay_of_a_long_training": (
        (
            "D04",
            "D01",
            "D03",
            "D02",
        ),
        (),
    ),
    "iterable_dataset_without_a_shuffle": ((), ()),
    "words_padded_to_the_longest_of_a_batch": (
        (
            "D05",
            "D01",
            "D29",
        ),
        (
            "D05",
            "D29",
        ),
    ),
    "layer_norm_of_a_series_of_one_variable": (
        (
            "D29",
            "D34",
        ),
        (),
    ),
    "depths_by_accumulation_over_pairs": (
        (
            "D15",
            "D01",
        ),
        (),
    ),
}
