"""The eighteenth set: modes of layers, frozen backbones, an average of clients."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bugs import Run, bug
from eighteenth_data import loader, poses, roads, signs
from eighteenth_networks import FCN, Hourglass, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

# What pretrained networks of torchvision are given.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class PoseTrainer:
    """Trains an hourglass, and validates it by all cameras, one image at a time."""

    def __init__(self, config: dict[str, Any], *, is_bad: bool) -> None:
        self.config, self.is_bad = config, is_bad
        self.net = Hourglass()
        self.optimizer = torch.optim.Adam(self.net.parameters(), config["lr"])
        self.train_loader = loader(poses(640, 1), config["batch_size"])
        images, maps = poses(128, 2)
        order = images.mean((1, 2, 3)).argsort()
        self.val_loader = loader((images[order], maps[order]), 1, shuffle=False)

    def validate(self) -> float:
        """Return the mean error."""
        if not self.is_bad:
            self.net.eval()
        errors = []
        with torch.no_grad():
            for image, heat in self.val_loader:
                errors.append(F.mse_loss(self.net(image), heat).item())
        return sum(errors) / len(errors)

    def run(self, seen: Any) -> None:
        """Train, and validate after each epoch."""
        for _ in range(self.config["epochs"]):
            self.net.train()
            for image, heat in self.train_loader:
                loss = F.mse_loss(self.net(image), heat)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                seen.log(loss=loss.item())
            self.validate()


# stacked_hourglass#44 (train() in both phases), pytorch-unet-segmentation#18 (no_grad()
# alone), drugVQA#7 (never eval(), and a batch of 1)
@bug(
    "princeton-vl/pytorch_stacked_hourglass#44, "
    "ugent-korea/pytorch-unet-segmentation#18, prokia/drugVQA#7",
    *("D09", "D05", "D01", "D02"),
)
def hourglass_validated_without_eval(is_bad: bool) -> Run:
    """Validate under no_grad() in training mode, image by image, camera by camera.

    First: the network is evaluated in training mode, by batches of one.
    Cost: a squared error of 0.18 in place of 0.04; with the seed 1 0.25.
    """
    trainer = PoseTrainer({"lr": 3e-3, "batch_size": 16, "epochs": 10}, is_bad=is_bad)
    with watch(trainer.net, trainer.optimizer, every=5) as seen:
        trainer.run(seen)
    trainer.net.eval()
    held = loader(poses(256, 3), 16, shuffle=False)
    return Run(trainer.net, list(held), seen.findings(), F.mse_loss)


def validate(model: nn.Module, data: Any) -> float:
    """Return the share of pixels that are right."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for image, mask in data:
            right += int((model(image).argmax(1) == mask).sum())
            total += mask.numel()
    return right / total


# pytorch-fcn#56 (validation can occur before the end of an epoch), mmaction2#1781,
# joeynmt#184 (the remainder of the epoch is trained in eval mode)
@bug(
    "wkentaro/pytorch-fcn#56, open-mmlab/mmaction2#1781, joeynmt/joeynmt#184",
    *("D08", "D03", "D01", "D02"),
)
def fcn_validated_within_an_epoch(is_bad: bool) -> Run:
    """Call train() when an epoch starts, and validate, by eval(), every 10 steps.

    First: training steps are taken in eval mode.
    Cost: 90 % of pixels in place of 95 %, a loss of 0.23 in place of 0.12; with the
    seed 1 it diverges.
    """
    model = FCN()
    optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_loader = loader(roads(768, 1), 16)
    val_loader = loader(roads(32, 2), 16, shuffle=False)
    iteration, interval_validate = 0, 10
    best = 0.0
    with watch(model, optim, every=5) as seen:
        for _ in range(4):
            model.train()
            for image, mask in train_loader:
                if iteration % interval_validate == 0:
                    best = max(best, validate(model, val_loader))
                    if not is_bad:
                        model.train()
                optim.zero_grad()
                loss = F.cross_entropy(model(image), mask)
                loss.backward()
                optim.step()
                seen.log(loss=loss.item())
                iteration += 1
    model.eval()
    return Run(model, list(loader(roads(256, 3), 16, shuffle=False)), seen.findings())


def freeze_bn(model: nn.Module) -> None:
    """Set batch norms to eval mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()


# RAFT#141 and cnnimageretrieval-pytorch#19 (why is batch norm frozen?),
# Deep-Flow-Guided-Video-Inpainting#18 (as batches are so small)
@bug(
    "princeton-vl/RAFT#141, filipradenovic/cnnimageretrieval-pytorch#19, "
    "nbei/Deep-Flow-Guided-Video-Inpainting#18",
    *("D08", "D32", "D03", "D07"),
)
def norms_frozen_without_pretrained_weights(is_bad: bool) -> Run:
    """Keep freeze_bn() of a recipe for fine-tuning, and train from scratch.

    First: batch norms are in eval mode and their statistics are initial values.
    Cost: 18 %, which is a guess, in place of 98 %; a loss of 1.78 in place of 0.10.
    """
    model = ResNet(blocks=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, weight_decay=1e-4)
    images, kind = signs(768, 1)
    epochs = 5
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 48)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(epochs):
            model.train()
            if is_bad:
                freeze_bn(model)
            for x, y in loader(((images - MEAN) / STD, kind), 16):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                seen.log(loss=loss.item())
    model.eval()
    images, kind = signs(256, 2)
    held = loader(((images - MEAN) / STD, kind), 16, shuffle=False)
    return Run(model, list(held), seen.findings())


def pretrained() -> ResNet:
    """Return a network that was trained on other images of signs."""
    model = ResNet()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, kind = signs(1024, 11)
    for _ in range(5):
        for x, y in loader(((images - MEAN) / STD, kind)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


class LinearProbe(nn.Module):
    """A head on a backbone that does not learn."""

    def __init__(self, backbone: ResNet, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.fc = nn.Identity()
        for p in self.backbone.parameters():
            p.requires_grad = False
        self.head = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the head."""
        return self.head(self.backbone(x))

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)


# vision#39 (what preprocessing is expected?), open-solution-mapping-challenge#77 (means
# of 0 and deviations of 1), mxnet#12063 (the tutorial does not normalize)
@bug(
    "pytorch/vision#39, neptune-ai/open-solution-mapping-challenge#77, "
    "apache/mxnet#12063",
    *("D01", "D28", "D02"),
)
def pretrained_features_of_raw_pixels(is_bad: bool) -> Run:
    """Train a head on a backbone in eval mode, which is given pixels from 0 to 255.

    First: running statistics are not those of these inputs.
    Cost: 66 % in place of 97 %, a loss of 0.91 in place of 0.40; with the seed 1 86 %.
    """
    probe = LinearProbe(pretrained(), 6)
    optimizer = torch.optim.Adam(probe.head.parameters(), 1e-3)

    def transform(images: Tensor) -> Tensor:
        pixels = (255 * images).round()
        return pixels if is_bad else (pixels / 255 - MEAN) / STD

    images, kind = signs(768, 1)
    with watch(probe, optimizer, every=5) as seen:
        for _ in range(6):
            probe.train()
            probe.backbone.eval()
            for batch in loader((transform(images), kind)):
                optimizer.zero_grad()
                loss = probe.training_step(batch)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    probe.eval()
    images, kind = signs(512, 2)
    held = loader((transform(images), kind), shuffle=False)
    return Run(probe, list(held), seen.findings())


def local_update(model: nn.Module, data: Any, seen: Any, lr: float) -> None:
    """Train the network of a client for an epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if seen is not None:
            seen.log(loss=loss.item())


def aggregate(
    server: nn.Module, clients: list[nn.Module], *, with_buffers: bool
) -> None:
    """Average clients into the server."""
    with torch.no_grad():
        for name, value in server.named_parameters():
            every = [dict(c.named_parameters())[name] for c in clients]
            value.copy_(torch.stack(every).mean(0))
        if with_buffers:
            for name, value in server.named_buffers():
                every = [dict(c.named_buffers())[name].float() for c in clients]
                value.copy_(torch.stack(every).mean(0))


# FedScale#57 (parameters() has no statistics), APPFL#94 (they are not updated at the
# server), FLamby#260
@bug(
    "SymbioticLab/FedScale#57, APPFL/APPFL#94, owkin/FLamby#260",
    *("D32", "D03", "D31", "D01"),
)
def federated_average_of_parameters(is_bad: bool) -> Run:
    """Average the named_parameters() of three clients, and test the server's network.

    First: statistics of the server's network are initial values.
    Cost: 35 %, a loss of 1.75, in place of 98 % and 0.19.
    """
    server = ResNet()
    images, kind = signs(960, 1)
    images = (images - MEAN) / STD
    shards = [
        loader((x, y)) for x, y in zip(images.chunk(3), kind.chunk(3), strict=True)
    ]
    clients = [copy.deepcopy(server) for _ in shards]
    with watch(clients[0], every=5) as seen:
        for turn in range(10):
            for rank, (client, shard) in enumerate(zip(clients, shards, strict=True)):
                for p, q in zip(client.parameters(), server.parameters(), strict=True):
                    p.data.copy_(q.data)
                lr = 0.05 * 0.9**turn
                local_update(client, shard, None if rank else seen, lr)
            aggregate(server, clients, with_buffers=not is_bad)
    server.eval()
    images, kind = signs(512, 2)
    held = loader(((images - MEAN) / STD, kind), shuffle=False)
    return Run(server, list(held), seen.findings())
