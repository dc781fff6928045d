"""A fifth set of bugs of public threads: twelve about norms, eight about training.

Networks and data are more varied than before: a U-Net, convolutions over signals, a
critic, a flow, transformers, an LSTM, a siamese network, an autoencoder and tables.
Each docstring says what the mistake is, and what a good doctor would say first;
`expected` has the one or two checks that say it. Both were written, and committed,
before the doctor saw any of these programs, by an author who knew the titles of its
checks, neither their code nor their documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from bugs import Batch, Run, bug, digits, endless, fit, mlp
from fifth_data import drawings, rounds, sentences, signals, table
from fifth_networks import (
    Attentive,
    Branch,
    Encoder,
    Flow,
    FrozenBatchNorm2d,
    OffsetNorm,
    Reader,
    RMSNorm,
    Siamese,
    Slim,
    Stochastic,
    Uncertain,
    UNet,
    Variational,
)
from fourth_bugs import residual
from more_bugs import changed, with_end
from third_bugs import as_image, train
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin. The twin of `one_norm_for_two_widths` was mistaken then:
# its narrow norms had 24 channels, 18 of them always zero; D16 was right about them.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "average_of_all_steps_since_the_start": (("D13", "D01", "D02"), ("D13",)),
    "pretrained_network_given_other_pixels": (("D01", "D02"), ()),
    "frozen_batch_norms_without_a_checkpoint": (("D22", "D24"), ()),
    "residual_blocks_without_their_norms": (("D23",), ()),
    "paths_dropped_without_rescaling": (("D02",), ("D11",)),
    "monte_carlo_dropout_by_train": (("D34", "D05"), ("D34", "D05")),
    "act_norms_set_by_a_dummy_batch": (("D23", "D25", "D24", "D27", "D34"), ("D34",)),
    "column_that_was_constant_in_training": (("D02", "D01"), ()),
    "batch_norms_drawn_as_if_convolutions": (("D16",), ()),
    "squares_summed_in_half_precision": (("D29", "D24", "D34"), ()),
    "one_norm_for_two_widths": (("D02", "D01"), ("D16",)),
    "scales_less_one_loaded_as_scales": ((), ()),
    "last_step_of_padded_sentences": (("D34",), ()),
    "error_averaged_over_pixels_and_divergence_summed": (
        ("D21", "D24", "D34"),
        ("D21",),
    ),
    "sentence_of_nothing_but_padding": (("D34", "D25", "D27"), ()),
    "pairs_labelled_the_other_way_round": ((), ()),
    "optimizer_without_the_unfrozen_layers": (("D24", "D27"), ()),
    "table_of_wines_as_it_is": (("D28", "D34", "D21"), ()),
    "cross_entropy_written_by_hand": (("D34", "D25", "D27", "D39"), ()),
    "adam_at_the_rate_of_sgd": (("D36", "D37"), ()),
}


def adam(model: nn.Module, lr: float = 2e-3) -> torch.optim.Adam:
    """Return Adam over all parameters of a model."""
    return torch.optim.Adam(model.parameters(), lr)


def first(batches: Iterator[Batch], count: int) -> list[Batch]:
    """Return the first batches."""
    return list(itertools.islice(batches, count))


# pytorch#5766 "Enable resetting of batchnorm running stats and cumulative moving
# average", Camera-based-Person-ReID#3 "Why momentum is set to None?"
@bug("pytorch#5766, Camera-based-Person-ReID#3", "D01", "D02")
def average_of_all_steps_since_the_start(is_bad: bool) -> Run:
    """Set momentum=None, and never reset the statistics of early weights.

    First: the running statistics are not those of the data under these weights.
    """
    model = UNet(None if is_bad else 0.1)
    watched = train(model, drawings(), steps=100, optimizer=adam(model, 0.01))
    return Run(model, first(drawings(seed=1), 20), watched)


# XNOR-Net-PyTorch#17 "Pre-trained model cannot reproduce the expected accuracy" (pixels
# of another range), mmdetection#1586 "About caffe pretrained model", onnx/models#86
@bug("XNOR-Net-PyTorch#17, mmdetection#1586, onnx/models#86", "D01", "D28")
def pretrained_network_given_other_pixels(is_bad: bool) -> Run:
    """Evaluate a network that was trained on standardized pixels on pixels from 0 to 1.

    First: the running statistics are not those of these inputs.
    """

    def pixels(x: Tensor, y: Tensor) -> Batch:
        return as_image(x / 16 if is_bad else (x - 4.884) / 6.017, y)

    model = residual()
    watched = fit(model, data=changed(endless(), as_image))
    return Run(model, list(changed(digits(raw=True), pixels)), watched)


# torchvision#5443 "Use frozen BN only if pre-trained backbone"; deeplab-pytorch#48,
# RAFT-Stereo#58 "query about freeze BN from beginning"
@bug("torchvision#5443, deeplab-pytorch#48, RAFT-Stereo#58", "D32", "D08")
def frozen_batch_norms_without_a_checkpoint(is_bad: bool) -> Run:
    """Train a detector's backbone from nothing, with its FrozenBatchNorm2d.

    First: the statistics are still 0 and 1, and training never changes them.
    """
    norm = FrozenBatchNorm2d if is_bad else nn.BatchNorm2d
    layers: list[nn.Module] = []
    for index in range(8):
        fan_in, stride = (16 if index else 1), (2 if index == 4 else 1)
        layers.append(nn.Conv2d(fan_in, 16, 3, stride, padding=1, bias=False))
        layers += [norm(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    sgd = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    data = changed(endless(), as_image)
    watched = train(model, data, steps=150, optimizer=sgd)
    return Run(model, list(changed(digits(), as_image)), watched)


# ONI#1 "Loss on Cifar10 with ResNet18 goes to NaN" (without batch norm),
# pynetbuilder#8 "Should ResNet work without Batch Norm layer?", udlbook#138
@bug("ONI#1, pynetbuilder#8, udlbook#138", "D35", "D23")
def residual_blocks_without_their_norms(is_bad: bool) -> Run:
    """Take the batch norms out of a residual network of twelve blocks.

    First: the signal grows with each sum.
    """
    norm = (lambda width: nn.Identity()) if is_bad else nn.BatchNorm2d
    blocks = [Branch(12, norm) for _ in range(12)]
    end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)]
    model = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), *blocks, *end)
    data = changed(endless(), as_image)
    watched = train(model, data, steps=100, optimizer=adam(model))
    return Run(model, list(changed(digits(), as_image)), watched)


# composer#372 "Bug in StochasticDepth not multiplying by keep_probability in eval",
# pytorch-image-models#887, img_classification_pk_pytorch#9
@bug("composer#372, pytorch-image-models#887", "D11", "D02")
def paths_dropped_without_rescaling(is_bad: bool) -> Run:
    """Drop most branches in training, and rescale neither then nor in eval mode.

    First: sums in eval mode are larger than what the batch norms saw in training.
    """
    blocks = [Stochastic(24, is_scaled=not is_bad) for _ in range(6)]
    end = [nn.BatchNorm1d(24), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    stem = nn.Conv1d(3, 24, 7, padding=3)
    model = nn.Sequential(stem, *blocks, *end, nn.Linear(24, 5))
    watched = train(model, signals(), steps=300, optimizer=adam(model))
    return Run(model, first(signals(seed=1), 20), watched)


# neon#266 "Add option to dropout during inference" (it affects BatchNorm as well),
# lightning-uq-box#173 "mc-dropout train mode", nnUNet#170
@bug("neon#266, lightning-uq-box#173, nnUNet#170", "D09")
def monte_carlo_dropout_by_train(is_bad: bool) -> Run:
    """Switch dropout on for a prediction by train(), batch norms with it.

    First: in eval mode the norms take the statistics of a batch, here of four.
    """
    x, y = table("cancer")
    model = Uncertain(is_bad=is_bad)
    data = rounds(x[:400], y[:400])
    watched = train(model, data, steps=150, optimizer=adam(model))
    return Run(model, first(rounds(x[400:], y[400:], 4), 40), watched)


def surprise(log_density: Tensor, _: Tensor) -> Tensor:
    """Return the mean of the negative log-density."""
    return -log_density.mean()


# FrEIA#121 "ActNorm returns NaN" (a first batch without spread), torch7#707 "Training
# mode by default?" (dummy data to learn sizes), glow-pytorch#46
@bug("FrEIA#121, torch7#707, glow-pytorch#46", "D23")
def act_norms_set_by_a_dummy_batch(is_bad: bool) -> Run:
    """Print the sizes of a flow by a pass over zeros: its norms take them for data.

    First: the signal grows by the factor of each norm.
    """
    x, y = table("cancer")
    x = x[:, :10] + 0.1 * torch.randn(len(x), 10)
    model = Flow(10)
    if is_bad:
        model(torch.zeros(2, 10))
    data = rounds(x, y, 64)
    watched = train(model, data, surprise, steps=250, optimizer=adam(model))
    return Run(model, first(rounds(x, y, 64), 8), watched, surprise)


# keras#20011 "Zero encountered in variance in NormalizationLayer", fastai#889 (a column
# constant in one set and not in the other), torch/nn#770
@bug("keras#20011, fastai#889, torch/nn#770", "D18", "D01")
def column_that_was_constant_in_training(is_bad: bool) -> Run:
    """Train on the records of one clinic, whose number is a column, and serve two.

    First: a channel had no variance in training; eval mode divides by the root of eps.
    """
    x, y = table("cancer")
    clinic = (torch.arange(len(x)) * 7 % 10 < 4).float()[:, None]
    x = torch.cat([x, 1 + clinic], 1)
    seen = (clinic[:, 0] == 0) if is_bad else torch.ones(len(x), dtype=torch.bool)
    model = nn.Sequential(
        *(nn.BatchNorm1d(31), nn.Linear(31, 32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)),
    )
    watched = train(model, rounds(x[seen], y[seen]), steps=150, optimizer=adam(model))
    return Run(model, first(rounds(x, y), 17), watched)


def _critic_batches(seed: int = 0) -> Iterator[Batch]:
    """Give digits, and as many images of two digits in one; both with noise."""
    source = torch.Generator().manual_seed(seed)
    for x, _ in changed(endless(32), as_image):
        fake = (x + x.roll(1, 0)) / 1.3 + 0.2 * torch.randn(x.shape, generator=source)
        x = x + 0.2 * torch.randn(x.shape, generator=source)
        y = torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)])
        yield torch.cat([x, fake]), y


# pytorch/examples#516 "DCGAN Batch Norm initialization", Machine-Learning-
# Collection#149 "Weight Init Update DCGANs PyTorch"
@bug("pytorch/examples#516, Machine-Learning-Collection#149", "D19", "D22")
def batch_norms_drawn_as_if_convolutions(is_bad: bool) -> Run:
    """Draw every weight of a critic from N(0, 0.02), the scales of batch norms too.

    First: the scales are near zero, and the signal shrinks to it.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(0.2)]
    for _ in range(5):
        layers.append(nn.Conv2d(16, 16, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(16), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 1))
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 0.0 if is_bad else 1.0, 0.02)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
    loss = F.binary_cross_entropy_with_logits
    # The rate and the first average of the paper.
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.5, 0.999))
    watched = train(model, _critic_batches(), loss, steps=120, optimizer=optimizer)
    return Run(model, first(_critic_batches(1), 20), watched, loss)


# nntrainer#3935 "FP16 Overflow in rms_norm" (a sum of squares in half precision),
# pytorch#133085 "Fixing Pytorch RMS norm implementation", LeetCUDA#335
@bug("nntrainer#3935, pytorch#133085, LeetCUDA#335", "D16", "D17")
def squares_summed_in_half_precision(is_bad: bool) -> Run:
    """Compute an RMS norm in half precision, behind embeddings times their root width.

    First: sums of squares are above 65504, and what is divided by them is zero.
    """
    dtype = torch.float16 if is_bad else torch.float32
    model = Encoder(272, lambda width: RMSNorm(width, dtype), scale=272**0.5)
    data = sentences(length=12)
    watched = train(model, data, steps=80, optimizer=adam(model, 1e-3))
    return Run(model, first(sentences(seed=1, length=12), 20), watched)


# slimmable_networks#22 "US-Net BatchNorm", #9 (statistics of each width are measured
# afterwards), mmrazor#75
@bug("slimmable_networks#22, slimmable_networks#9, mmrazor#75", "D33", "D01")
def one_norm_for_two_widths(is_bad: bool) -> Run:
    """Train a network at full and at a quarter of its width, through the same norms.

    First: one layer is called on inputs of two kinds; its average fits neither.
    """
    model = Slim(is_bad=is_bad)
    optimizer = adam(model)
    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(changed(endless(), as_image), 120):
            optimizer.zero_grad()
            total = 0.0
            for model.channels in (24, 6):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                total += loss.item()
            optimizer.step()
            seen.log(loss=total)
    model.channels = 24
    return Run(model, list(changed(digits(), as_image)), seen.findings())


# Liger-Kernel#74 "Gemma needs RMSNorm with 1.0 offset", executorch#19901 "Fix Gemma
# RMSNorm +1 offset missing on --checkpoint path", llmman#151
@bug("Liger-Kernel#74, executorch#19901, llmman#151", "D19", "D22")
def scales_less_one_loaded_as_scales(is_bad: bool) -> Run:
    """Load a transformer whose norms store scale - 1 into norms that store the scale.

    First: the scales are near zero, and so is all that passes a norm.
    """
    trained = Encoder(48, OffsetNorm)
    watched = train(trained, sentences(length=12), steps=200, optimizer=adam(trained))
    model = Encoder(48, nn.RMSNorm)
    state = trained.state_dict()
    for name, value in state.items():
        if name.startswith("norms") and not is_bad:
            state[name] = 1 + value
    model.load_state_dict(state)
    return Run(model, first(sentences(seed=1, length=12), 20), watched)


# qclass_dl#1 "A question about lstm.py" (outputs[-1] is that of <PAD>),
# practical-torchtext#5, pytorch-sentiment-analysis#86
@bug("qclass_dl#1, practical-torchtext#5, pytorch-sentiment-analysis#86", "D12", "D34")
def last_step_of_padded_sentences(is_bad: bool) -> Run:
    """Classify the last state of an LSTM, which is that of the padding.

    First: most steps are padding, and the answer is read behind them.
    """
    model = Reader(is_bad=is_bad)
    data = sentences(length=90)
    watched = train(model, data, steps=250, optimizer=adam(model, 5e-3))
    return Run(model, first(sentences(seed=1, length=90), 20), watched)


# WorldModels#12 "VAE performance is bad", #2 "VAE reconstruction loss" (sum or mean),
# vae-celebA#4 "Reproduce the plain VAE result"
@bug("WorldModels#12, WorldModels#2, vae-celebA#4", "D34")
def error_averaged_over_pixels_and_divergence_summed(is_bad: bool) -> Run:
    """Add a KL divergence, summed, to an error that is averaged over all pixels.

    First: the output does not depend on the input; the code has collapsed.
    """
    model = Variational()

    def loss(found: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        picture, mean, log_var = found
        divergence = (mean**2 + log_var.exp() - log_var - 1).sum(1).mean() / 2
        error = F.mse_loss(picture, x)
        return divergence + (error if is_bad else 64 * error / 2)

    def twice(x: Tensor, _: Tensor) -> Batch:
        x, _ = as_image(x, x)
        return x, x

    data = changed(endless(), twice)
    watched = train(model, data, loss, steps=250, optimizer=adam(model))
    return Run(model, list(changed(digits(), twice)), watched, loss)


def _some_empty(seed: int) -> Iterator[Batch]:
    """Give sentences, every tenth batch with one that has no tokens."""
    for index, (x, y) in enumerate(sentences(seed=seed, length=12)):
        if index % 10 == 9:
            x[0], y[0] = 0, 0
        yield x, y


# pytorch#40932 "MultiheadAttention set(-inf) cause 'Nan' in loss computing" (a sentence
# full of padding), pytorch#41508, pytorch#26098
@bug("pytorch#40932, pytorch#41508, pytorch#26098", "D34", "D25")
def sentence_of_nothing_but_padding(is_bad: bool) -> Run:
    """Mask all keys of an empty sentence by minus infinity: its softmax is NaN.

    First: loss and weights are NaN from one batch on, and it was an empty sentence.
    """
    model = Attentive(is_bad=is_bad)
    watched = train(model, _some_empty(0), steps=200, optimizer=adam(model))
    return Run(model, first(_some_empty(1), 20), watched)


def _contrast(distance: Tensor, y: Tensor) -> Tensor:
    """Contrastive loss; y is 1 where the two differ, 0 where they are the same."""
    apart = (2 - distance).clamp(min=0).pow(2)
    return ((1 - y) * distance.pow(2) + y * apart).mean()


# keras#16935 "Inaccurate Contrastive Loss in the example?", keras#7119, siamese_net#7
@bug("keras#16935, keras#7119, siamese_net#7", "D34")
def pairs_labelled_the_other_way_round(is_bad: bool) -> Run:
    """Give a contrastive loss 1 for the same; it reads 1 as different.

    First: training does not get below the loss of one answer for all pairs.
    """

    def pairs(x: Tensor, y: Tensor) -> Batch:
        order = y.argsort(stable=True)
        # Half of the pairs are neighbours in the order of their class.
        partner = torch.arange(len(y)).roll(1)
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
        partner[: len(y) // 2] = torch.arange(len(y) // 2).roll(1)
        both = torch.stack([x, x[partner]], 1).reshape(-1, 2, 8, 8)
        is_same = (y == y[partner]).float()
        return both, is_same if is_bad else 1 - is_same

    model = Siamese()
    data = changed(endless(), pairs)
    watched = train(model, data, _contrast, steps=250, optimizer=adam(model))
    return Run(model, list(changed(digits(), pairs)), watched, _contrast)


# skorch#261 "Document how to freeze layers" (requires_grad is read once), fastai#2133
# "the optimizer needs to be created again", pytorch#1266
@bug("skorch#261, fastai#2133, pytorch#1266", "D27", "D34")
def optimizer_without_the_unfrozen_layers(is_bad: bool) -> Run:
    """Unfreeze a backbone after the optimizer has been given what was trainable.

    First: gradients reach the backbone, and its weights never move.
    """

    def up_or_down(x: Tensor, y: Tensor) -> Batch:
        return x, (y > 4).long()

    trained = with_end(mlp(nn.LayerNorm, width=32), nn.Linear(32, 2))
    fit(trained, 100, lr=0.02, data=changed(endless(), up_or_down))
    model = with_end(trained, nn.Linear(32, 10))
    backbone = model[:-1].requires_grad_(False)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, 0.03, momentum=0.9)
    train(model, endless(), steps=30, optimizer=optimizer)
    backbone.requires_grad_(True)
    if not is_bad:
        optimizer.add_param_group({"params": list(backbone.parameters())})
    watched = train(model, endless(), steps=150, optimizer=optimizer)
    return Run(model, digits(), watched)


# "Do Neural Networks Need Feature Scaling Or Normalization?" (forecastegy.com, on a
# table of wines); "PyTorch Performance Drop? Missing Standardization" (openillumi.com)
@bug("forecastegy.com, openillumi.com", "D28")
def table_of_wines_as_it_is(is_bad: bool) -> Run:
    """Read a table whose columns run from 0.1 to 1680, without scaling.

    First: the scales of the inputs differ by thousands.
    """
    x, y = table("wine", is_scaled=not is_bad)
    model = nn.Sequential(
        *(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 3),
    )
    sgd = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    watched = train(model, rounds(x, y), steps=200, optimizer=sgd)
    return Run(model, first(rounds(x, y), 10), watched)


# tiny-dnn#410 "cross entropy gives nan" (an output of exactly 1), candle#2561,
# TensorFlow-Examples#383 "Loss may become NAN during training", gorgonia#536
@bug("tiny-dnn#410, candle#2561, TensorFlow-Examples#383", "D34", "D25")
def cross_entropy_written_by_hand(is_bad: bool) -> Run:
    """Write y log p + (1 - y) log (1 - p), where p is a sigmoid that rounds to 1.

    First: a loss of NaN, from 0 times the logarithm of 0, and all weights after it.
    """

    def by_hand(scores: Tensor, y: Tensor) -> Tensor:
        p = scores.sigmoid()
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    loss = by_hand if is_bad else F.binary_cross_entropy_with_logits
    x, y = table("cancer")
    y = y.float()[:, None]
    model = nn.Sequential(
        *(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        nn.Linear(64, 1),
    )
    optimizer = adam(model, 5e-3)
    watched = train(model, rounds(x, y), loss, steps=200, optimizer=optimizer)
    return Run(model, first(rounds(x, y), 17), watched, loss)


# OpenNMT-py#805 "Adam seems to be broken" (at the rate of SGD), language-modeling#3
# "Adam's learning rate", transformers#752
@bug("OpenNMT-py#805, language-modeling#3, transformers#752", "D27", "D39")
def adam_at_the_rate_of_sgd(is_bad: bool) -> Run:
    """Change SGD for Adam in a transformer, and leave the rate at 0.1.

    First: the steps are far too large for the weights.
    """
    model = Encoder(32, nn.LayerNorm)
    data = sentences(length=12)
    optimizer = adam(model, 0.1 if is_bad else 1e-3)
    watched = train(model, data, steps=200, optimizer=optimizer)
    return Run(model, first(sentences(seed=1, length=12), 20), watched)
