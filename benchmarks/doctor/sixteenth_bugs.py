"""A sixteenth set of bugs of public threads: these are about statistics of norms.

Five about modes, files and averages are in sixteenth_modes.py, eight about training in
general in sixteenth_training.py. Each docstring says what the mistake is, what a good
doctor would say first, and what the mistake costs in eval mode on the batches of the
run, with the seed 0; `expected` has the checks that say it. Both were written before
the doctor's alarms on any of these programs were seen, by an author who knew the titles
of its checks, neither their code nor their documentation.
"""

from __future__ import annotations

from typing import Any

import sixteenth_modes  # noqa: F401 - these enter their programs in BUGS
import sixteenth_training  # noqa: F401
import torch
from bugs import Batch, Run, bug
from sixteenth_data import (
    customers,
    fruits,
    heartbeats,
    loader,
    scans,
    sounds,
    vitals,
)
from sixteenth_networks import (
    BeatNet,
    DomainNet,
    FruitNet,
    Own,
    ScanNet,
    SoundNet,
    WardNet,
    customer_net,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]


def grouped(width: int) -> nn.GroupNorm:
    """Return what takes its statistics in each volume by itself."""
    return nn.GroupNorm(4, width)


# CycleGAN-and-pix2pix#213 (really bad results with batches of 2 or 4), DMS#30,
# Shift-Net#47
@bug(
    "junyanz/pytorch-CycleGAN-and-pix2pix#213, BCV-Uniandes/DMS#30, "
    "Zhaoyi-Yan/Shift-Net_pytorch#47",
    *("D05", "D02"),
)
def volumes_two_at_a_time(is_bad: bool) -> Run:
    """Train a network of volumes on batches of two, as no more fit into memory.

    First: statistics are of too few values.
    Cost: 58 % in place of 90 %, a loss of 1.03 in place of 0.35.
    """
    model = ScanNet(nn.BatchNorm3d if is_bad else grouped)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(4):
            for x, y in loader(scans(720, 1), 2):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(scans(256, 2), 2, shuffle=False)
    return Run(model, list(held), seen.findings())


class Photographs(Dataset):
    """Images with a transform, as of torchvision."""

    def __init__(self, count: int, seed: int, transform: Any = None) -> None:
        self.images, self.labels = fruits(count, seed)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.images[index]
        if self.transform is not None:
            x = self.transform(x)
        return x, int(self.labels[index])


def standardised(x: Tensor) -> Tensor:
    """Subtract the means of ImageNet and divide by its deviations."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    return (x - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


# deco#22 (the normalization of the training is missing in inference.py), automl#872,
# UNIQUE#7
@bug(
    "sha2nkt/deco#22, google/automl#872, zwx8981/UNIQUE#7",
    *("D01", "D02", "D28"),
)
def test_set_without_normalize(is_bad: bool) -> Run:
    """Give the transform to the training set, and forget it for the test set.

    First: running statistics are not those of these inputs.
    Cost: 30 % in place of 100 %, a loss of 1.90 in place of 0.0004.
    """
    train = Photographs(1024, 1, standardised)
    test = Photographs(512, 2, None if is_bad else standardised)
    model = FruitNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(5):
            model.train()
            for x, y in DataLoader(train, 32, shuffle=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    return Run(model, list(DataLoader(test, 32)), seen.findings())


# PyTorch-YOLOv3#230 (0.9 keeps a tenth of the old), tacotron_pytorch#19, ludwig#2100
@bug(
    "eriklindernoren/PyTorch-YOLOv3#230, r9y9/tacotron_pytorch#19, "
    "ludwig-ai/ludwig#2100",
    *("D04", "D01", "D02"),
)
def u_net_of_beats_with_the_momentum_of_keras(is_bad: bool) -> Run:
    """Port a U-Net with momentum=0.99, on batches of eight, the last of two.

    First: the momentum is that of another convention.
    Cost: a loss of 0.44 in place of 0.09; with the seeds 1 and 2 hardly any, 0.08 and
    0.10 in place of 0.08.
    """
    model = BeatNet(momentum=0.99, eps=1e-3) if is_bad else BeatNet()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    criterion = nn.BCEWithLogitsLoss()
    train = DataLoader(TensorDataset(*heartbeats(514, 1)), 8, shuffle=True)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(4):
            for x, y in train:
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(heartbeats(128, 2), 8, shuffle=False)
    return Run(model, list(held), seen.findings(), criterion)


# kapre#16 (predictions depend on the size of the batch), keras#3085, deepinv#908
@bug("keunwoochoi/kapre#16, keras#3085, deepinv/deepinv#908", "D09", "D05")
def own_norm_with_the_statistics_of_each_batch(is_bad: bool) -> Run:
    """Write a batch norm by x.mean(0) and x.std(0), and serve four rows at a time.

    First: the output for a row depends on the batch that it is in.
    Cost: 74 % in place of 93 %, a loss of 0.93 in place of 0.15.
    """
    model = customer_net(Own if is_bad else nn.BatchNorm1d)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(15):
            for x, y in loader(customers(2048, 1), 128):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(customers(128, 2), 4, shuffle=False)
    return Run(model, list(held), seen.findings())


def stays(data: Batch, size: int = 16) -> list[Batch]:
    """Return batches in any order, each cut to the longest stay in it."""
    x, y = data
    parts = torch.randperm(len(x)).split(size)
    return [(x[i, : int((x[i, :, 0] > 0).sum(1).max())], y[i]) for i in parts]


# pytorch#70529 (statistics include padded values), deepspeech.pytorch#312,
# Multilingual_Text_to_Speech#81
@bug(
    "pytorch#70529, SeanNaren/deepspeech.pytorch#312, "
    "Tomiinek/Multilingual_Text_to_Speech#81",
    *("D12", "D01", "D02"),
)
def vital_signs_padded_with_zeros(is_bad: bool) -> Run:
    """Pad series of vital signs with zeros in front of a batch norm and a GRU.

    First: padding enters the statistics.
    Cost: 77 % in place of 96 %, a loss of 0.71 in place of 0.12.
    """
    model = WardNet(is_masked=not is_bad)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    train = vitals(1024, 1)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(8):
            for x, y in stays(train):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(vitals(512, 2), shuffle=False)
    return Run(model, list(held), seen.findings())


def night(x: Tensor) -> Tensor:
    """Return dark images of less contrast."""
    return 0.2 * x


# adapt#92 (source and target come in batches of their own), skada#252 (concatenate),
# self-ensemble-visual-domain-adapt-photo#3
@bug(
    "adapt-python/adapt#92, scikit-adaptation/skada#252, "
    "Britefury/self-ensemble-visual-domain-adapt-photo#3",
    *("D33", "D02", "D01"),
)
def day_and_night_in_two_passes(is_bad: bool) -> Run:
    """Give images of the day and of the night to shared layers, in two passes.

    First: a norm gets inputs of different distributions.
    Cost: 85 % in place of 100 %, a loss of 0.61 in place of 0.03.
    """
    model = DomainNet()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    day, dark = loader(fruits(1024, 1)), loader(fruits(1024, 3))
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for (xs, ys), (xt, yt) in zip(day, dark, strict=True):
                xt = night(xt)
                if is_bad:
                    source, target = model.embed(xs), model.embed(xt)
                else:
                    source, target = model.embed(torch.cat([xs, xt])).chunk(2)
                loss = F.cross_entropy(model.classifier(source), ys)
                loss = loss + F.cross_entropy(model.classifier(target), yt)
                loss = loss + 0.1 * (source.mean(0) - target.mean(0)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = fruits(512, 2)
    mixed = torch.where(torch.arange(512).view(-1, 1, 1, 1) % 2 > 0, night(x), x)
    return Run(model, list(loader((mixed, y), shuffle=False)), seen.findings())


# pytorch#1206 (running statistics are nan, training is perfect), sudo_rm_rf#1 (zeros in
# front of a logarithm), pyannote-audio#1332 (batches whose loss is nan are skipped)
@bug("pytorch#1206, etzinis/sudo_rm_rf#1, pyannote/pyannote-audio#1332", "D17")
def logarithm_of_silence(is_bad: bool) -> Run:
    """Take the logarithm of powers, some zero; steps that are not finite are skipped.

    First: running statistics are not finite.
    Cost: 18 %, which is a guess, in place of 100 %; the loss is nan in place of 0.01.
    """
    eps = 0.0 if is_bad else 1e-4
    x, y = sounds(1024, 1)
    x[::40, :, :3] = 0.0
    model = SoundNet()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for power, label in loader((x, y), 16):
                optimizer.zero_grad()
                loss = F.cross_entropy(model((power + eps).log().unsqueeze(1)), label)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                if torch.isfinite(norm):
                    optimizer.step()
                    seen.log(loss=loss.item())
    model.eval()
    power, label = sounds(512, 2)
    held = loader(((power + eps).log().unsqueeze(1), label), shuffle=False)
    return Run(model, list(held), seen.findings())


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "validation_under_no_grad_alone": (("D09", "D01", "D02"), ()),
    "baseline_measured_before_the_first_step": (("D08", "D34"), ()),
    "second_head_of_an_assistant": (("D07", "D01", "D02"), ()),
    "averaged_model_without_update_bn": (("D31", "D01", "D02"), ()),
    "file_of_data_parallel_and_strict_false": ((), ()),
    "opinions_behind_a_softmax": (("D34",), ()),
    "vision_transformer_at_three_hundredths": (("D36",), ()),
    "houses_without_a_scaler": (("D28",), ()),
    "load_in_megawatts": (("D34",), ()),
    "autoencoder_of_sigmoids": (("D24", "D34"), ()),
    "one_of_two_optimizers_is_not_cleared": (("D27", "D21", "D24", "D34"), ()),
    "recurrence_without_clipping": (("D27", "D34", "D25", "D39"), ()),
    "mask_of_another_attention": (("D36", "D34"), ()),
    "volumes_two_at_a_time": (("D05",), ()),
    "test_set_without_normalize": (("D01", "D02"), ()),
    "u_net_of_beats_with_the_momentum_of_keras": (("D04", "D01", "D05", "D02"), ()),
    "own_norm_with_the_statistics_of_each_batch": (("D34", "D28"), ("D05",)),
    "vital_signs_padded_with_zeros": (("D12", "D01", "D02"), ()),
    "day_and_night_in_two_passes": ((), ()),
    "logarithm_of_silence": (("D17", "D34", "D01", "D25", "D02"), ()),
}
