"""The sixteenth set: the mode of layers, what is frozen, averaged, saved and loaded."""

from __future__ import annotations

import io
from typing import Any

import torch
from bugs import Run, bug
from sixteenth_data import fruits, loader, molecules, patients, spectra
from sixteenth_networks import GraphNet, PatientNet, ResNet, SoundNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from normkit.doctor import watch


class Trainer:
    """Trains on batches of named inputs, and validates after each epoch."""

    def __init__(self, model: nn.Module, *, is_bad: bool) -> None:
        self.model, self.is_bad = model, is_bad
        self.optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def train_epoch(self, batches: list[Any], seen: Any) -> None:
        """Go through the data once."""
        self.model.train()
        for inputs, target in batches:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(**inputs), target)
            loss.backward()
            self.optimizer.step()
            seen.log(loss=loss.item())

    def validate(self, batches: list[Any]) -> float:
        """Return the accuracy on data that were held out."""
        if not self.is_bad:
            self.model.eval()
        right = total = 0
        with torch.no_grad():
            for inputs, target in batches:
                right += int((self.model(**inputs).argmax(1) == target).sum())
                total += len(target)
        return right / total


def named(data: Any, order: Tensor, size: int = 32) -> list[Any]:
    """Return batches of a mapping and its labels in an order."""
    inputs, labels = data
    return [
        ({k: v[i] for k, v in inputs.items()}, labels[i]) for i in order.split(size)
    ]


# pytorch-unet-segmentation#18 (validation has no_grad alone), stacked_hourglass#44,
# Pytorch-UNet#31, forum 19615 (eval() or no_grad()?)
@bug(
    "ugent-korea/pytorch-unet-segmentation#18, milesial/Pytorch-UNet#31, "
    "princeton-vl/pytorch_stacked_hourglass#44",
    *("D09", "D01", "D02", "D13"),
)
def validation_under_no_grad_alone(is_bad: bool) -> Run:
    """Validate under no_grad(), and take it for eval mode; folders are in order.

    First: the model is validated in training mode.
    Cost: 87 % in place of 100 %, a loss of 0.41 in place of 0.10.
    """
    train, held = patients(1024, 1), patients(512, 2)
    by_folder = named(held, held[1].argsort(), 4)
    trainer = Trainer(PatientNet(), is_bad=is_bad)
    with watch(trainer.model, trainer.optimizer, every=5) as seen:
        for _ in range(5):
            trainer.train_epoch(named(train, torch.randperm(1024)), seen)
            trainer.validate(by_folder)
    test = named(patients(512, 3), torch.arange(512))
    return Run(trainer.model, test, seen.findings())


def accuracy(model: nn.Module, batches: Any) -> float:
    """Return the accuracy in eval mode, as a helper of many programs does."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in batches:
            right += int((model(x).argmax(1) == y).sum())
            total += len(y)
    return right / total


# tutorials#1624 (in the second epoch layers are still in eval mode), metal#70
@bug("pytorch/tutorials#1624, HazyResearch/metal#70", "D08", "D32", "D03")
def baseline_measured_before_the_first_step(is_bad: bool) -> Run:
    """Call train() once; the helper that measures accuracy calls eval().

    First: batch norms are in eval mode while the network trains.
    Cost: 14 %, which is a guess, in place of 100 %; a loss of 1.80 in place of 0.003.
    """
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    train, test = loader(fruits(1024, 1)), list(loader(fruits(512, 2), shuffle=False))
    model.train()
    history = [accuracy(model, test)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            if not is_bad:
                model.train()
            for x, y in train:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            schedule.step()
            history.append(accuracy(model, test))
    return Run(model, test, seen.findings())


class Assistant(nn.Module):
    """A network of words, and a second head that says who is far away."""

    def __init__(self, words: SoundNet) -> None:
        super().__init__()
        self.words = words
        self.distance = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the words."""
        return self.words(x)


# lightly#1438 (deactivate_requires_grad does not fix the model), pytorch#86590 (feature
# extractors that are not entirely frozen), chemprop#952
@bug("lightly-ai/lightly#1438, pytorch#86590, chemprop#952", "D07", "D01", "D02")
def second_head_of_an_assistant(is_bad: bool) -> Run:
    """Freeze a network by requires_grad, and train a second head in training mode.

    First: statistics of frozen layers change.
    Cost: 79 % of the words in place of 100 %, a loss of 0.52 in place of 0.02.
    """
    words = SoundNet()
    first = torch.optim.Adam(words.parameters(), 2e-3)
    for _ in range(6):
        for x, y in loader(spectra(1024, 1)):
            first.zero_grad()
            F.cross_entropy(words(x), y).backward()
            first.step()

    model = Assistant(words)
    for p in model.words.parameters():
        p.requires_grad = False
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 3e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(4):
            model.train()
            if not is_bad:
                model.words.eval()
            for x, _ in loader(spectra(512, 3), 16):
                far = torch.randint(2, (16,))
                x = 0.6 * x - 0.5 - far.view(-1, 1, 1, 1)
                optimizer.zero_grad()
                scores = model.distance(model.words.backbone(x))
                loss = F.cross_entropy(scores, far)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    held = loader(spectra(512, 4), shuffle=False)
    return Run(model, list(held), seen.findings())


# composer#624 (statistics of the average are not updated: very poor), swa#7
@bug("mosaicml/composer#624, timgaripov/swa#7", "D31", "D01", "D02")
def averaged_model_without_update_bn(is_bad: bool) -> Run:
    """Average weights by AveragedModel, and leave out update_bn().

    First: averaged weights have statistics that are not theirs.
    Cost: 19 % in place of 99 %, a loss of 8.95 in place of 0.03; with the seeds 1
    and 2 95 % and 65 %.
    """
    train = loader(fruits(1024, 1, 0.25))
    model = ResNet()
    swa_model = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for epoch in range(6):
            for x, y in train:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
            if epoch >= 2:
                swa_model.update_parameters(model)
    if not is_bad:
        update_bn(train, swa_model)
    swa_model.eval()
    held = loader(fruits(512, 2, 0.25), shuffle=False)
    return Run(swa_model, list(held), seen.findings())


# pytorch#3805 (names begin with module.), PyTorch-Encoding#100 (use strict=False; does
# it solve the issue or just hide it?)
@bug(
    "pytorch#3805, zhanghang1989/PyTorch-Encoding#100",
    *("D32", "D03", "D01"),
)
def file_of_data_parallel_and_strict_false(is_bad: bool) -> Run:
    """Load a file of DataParallel, whose names begin with module., by strict=False.

    First: statistics, as all else, are those of a new network.
    Cost: 22 % in place of 94 %, a loss of 1.39 in place of 0.21.
    """
    (atoms, bonds), y = molecules(2048, 1)
    model = GraphNet()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(15):
            for a, b, label in loader((atoms, bonds, y), 64):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(a, b), label)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())

    file = io.BytesIO()
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, file)
    file.seek(0)

    served = GraphNet()
    weights = torch.load(file)
    if not is_bad:
        weights = {k.removeprefix("module."): v for k, v in weights.items()}
    served.load_state_dict(weights, strict=False)
    served.eval()
    (atoms, bonds), y = molecules(512, 2)
    parts = loader((atoms, bonds, y), shuffle=False)
    return Run(served, [((a, b), label) for a, b, label in parts], seen.findings())
