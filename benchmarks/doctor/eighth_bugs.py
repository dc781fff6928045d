"""An eighth set of bugs of public threads: twelve about norms, eight about training.

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
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from bugs import Batch, Run, bug, digits, endless
from eighth_data import (
    blobs,
    clips,
    couples,
    fabrics,
    flats,
    movements,
    patches,
    patients,
    scans,
    tags,
)
from eighth_networks import (
    Calls,
    FineTuned,
    HandBatchNorm,
    LeNet,
    Recurrent,
    Screening,
    Siamese,
    SmallUNet,
    Tagger,
    Variational,
    discriminator,
    pre_activated,
    table_mlp,
    texture_net,
    vgg,
)
from more_bugs import changed
from third_bugs import as_image, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from normkit.doctor import watch

__all__ = ["FIRST_SIGHT"]

# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "check_before_training_leaves_eval_mode": (("D34",), ()),
    "frozen_norms_of_a_head_that_is_new": (("D32", "D24", "D34"), ()),
    "norms_set_back_to_training_by_eval": (("D34",), ()),
    "labelled_and_unlabelled_in_calls_of_their_own": (("D01", "D02"), ()),
    "momentum_given_as_eps_to_batch_norms": (("D16", "D22", "D24", "D18", "D34"), ()),
    "hand_written_norm_with_the_momentum_of_another": ((), ()),
    "averaged_weights_and_statistics_of_five_batches": (("D03", "D01", "D02"), ()),
    "scans_scaled_in_training_only": (("D01", "D28", "D02"), ()),
    "folded_without_the_shift_of_the_norms": (("D01", "D02"), ()),
    "first_convolution_averaged_over_its_colours": ((), ()),
    "saturated_units_before_batch_norms": (("D28", "D20", "D18", "D34"), ()),
    "padding_in_the_statistics_of_group_norms": ((), ()),
    "weights_that_are_all_one_number": (("D26",), ()),
    "weights_of_a_vgg_with_a_spread_of_a_hundredth": (("D22", "D24", "D34", "D27"), ()),
    "plateau_of_the_largest_loss": ((), ()),
    "relu_behind_the_scores_of_classes": (("D34",), ()),
    "softmax_between_hidden_layers": (("D24", "D34", "D22", "D27"), ()),
    "sigmoid_for_standardized_images": (("D20",), ()),
    "log_softmax_over_the_words_of_a_sentence": ((), ()),
    "recurrent_relus_that_grow_with_each_step": ((), ()),
}


def adam(model: nn.Module, lr: float = 2e-3) -> torch.optim.Adam:
    """Return Adam over the parameters that are trained."""
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """Return SGD with momentum over the parameters that are trained."""
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr, momentum=0.9
    )


def first(batches: Iterator[Batch], count: int = 16) -> list[Batch]:
    """Return the first batches of an endless stream."""
    return list(itertools.islice(batches, count))


def cloth(seed: int = 0) -> Iterator[Batch]:
    """Give fabrics whose classes differ in contrast."""
    return fabrics(seed=seed, noise=0.7, by_depth=True)


# pytorch-lightning#20216 (a model that is put into eval mode stays in it), clevr-iep#22
# (check_accuracy does not set it back)
@bug("pytorch-lightning#20216, clevr-iep#22", "D08", "D03")
def check_before_training_leaves_eval_mode(is_bad: bool) -> Run:
    """Call train(), then check a validation batch, which sets eval mode and keeps it.

    First: the norms are in eval mode all through the training.
    Cost: 48 % of pairs, which is a guess, in place of 100 %.
    """
    model, loss_fn = Siamese(), F.binary_cross_entropy_with_logits
    optimizer = sgd(model, 0.02)
    model.train()

    def check_accuracy(x: Tensor, y: Tensor) -> float:
        model.eval()
        with torch.no_grad():
            return float(((model(x) > 0) == (y > 0)).float().mean())

    check_accuracy(*next(couples(seed=2)))
    if not is_bad:
        model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, y in itertools.islice(couples(), 300):
            loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, first(couples(seed=1)), seen.findings(), loss_fn)


# GDCAN#5 (all batch norms of the network are frozen, as it starts from pretrained
# weights), SyntheticData#2 (which norms are meant, those of the backbone or the head)
@bug("GDCAN#5, CVMI-Lab/SyntheticData#2", "D08", "D03")
def frozen_norms_of_a_head_that_is_new(is_bad: bool) -> Run:
    """Freeze all batch norms in fine-tuning, also those of a head that is new.

    First: norms whose statistics were never updated are in eval mode in training.
    Cost: 66 % of pixels, which is all background, in place of 98 %.
    """
    trained = texture_net(depth=1)
    train(trained, fabrics(noise=0.5), steps=150, optimizer=adam(trained, 1e-2))
    model = FineTuned(trained[:3], is_bad=is_bad)
    watched = train(model, patches(), steps=300, optimizer=sgd(model, 0.03))
    return Run(model, first(patches(seed=1)), watched)


# COVNet#17 (batch norms are set to train() behind model.eval()), DMS#30 (train mode in
# the evaluation, as the batch is one), HiDDeN#13
@bug("COVNet#17, DMS#30, HiDDeN#13", "D09")
def norms_set_back_to_training_by_eval(is_bad: bool) -> Run:
    """Keep batch norms in training mode when the model is set to eval mode.

    First: norms are in training mode where eval is meant, on batches of eight.
    Cost: 73 % in place of 94 %, a loss of 0.82 in place of 0.18.
    """
    model = Screening(is_bad=is_bad)
    watched = train(model, patients(), steps=1200, optimizer=adam(model, 4e-3))
    return Run(model, first(patients(8, seed=1), 100), watched)


def _weak(x: Tensor) -> Tensor:
    """Turn images by half a turn, which keeps their weave."""
    return x.flip(2, 3)


def _strong(x: Tensor) -> Tensor:
    """Change brightness and contrast of each image by much, and cut a square."""
    x = x * (1.0 + 5.0 * torch.rand(len(x), 1, 1, 1))
    x = x + 8.0 + 4.0 * torch.rand(len(x), 1, 1, 1)
    x[:, :, 4:7, 4:7] = 10.0
    return x


@contextmanager
def _without_tracking(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of a batch, and not keep them."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


# MixMatch-pytorch#20 (calls for each part bias the statistics), mixmatch#5 (they are
# updated in the first call only)
@bug("MixMatch-pytorch#20, google-research/mixmatch#5", "D33", "D02", "D01")
def labelled_and_unlabelled_in_calls_of_their_own(is_bad: bool) -> Run:
    """Give labelled, weakly and strongly changed images to one network in three calls.

    Its twin does not keep the statistics of those that are strongly changed.

    First: one norm sees batches of kinds that differ, and its average fits none.
    Cost: 34 % in place of 100 %, a loss of 3.6 in place of 0.05.
    """
    model = texture_net()
    optimizer = adam(model, 4e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    labelled = itertools.cycle(first(fabrics(), 40))
    model.train()
    with watch(model, optimizer, every=5) as seen:
        steps = zip(labelled, fabrics(seed=2), range(250), strict=False)
        for (x, y), (u, _), _step in steps:
            mine, weak = model(x), model(_weak(u))
            with nullcontext() if is_bad else _without_tracking(model):
                strong = model(_strong(u))
            sure, guess = weak.detach().softmax(1).max(1)
            each = F.cross_entropy(strong, guess, reduction="none")
            loss = F.cross_entropy(mine, y) + (each * (sure > 0.9)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            seen.log(loss=loss.item())
    return Run(model, first(fabrics(seed=1)), seen.findings())


def _as_channels(x: Tensor, y: Tensor) -> Batch:
    """Give movements with their readings as channels (N, 6, L)."""
    return x.transpose(1, 2), y


# PyTorch-GAN#116 (the second argument of BatchNorm2d(128, 0.8) in the blocks of InfoGAN
# is eps, where momentum was meant), pytorch-cifar100#98
@bug("PyTorch-GAN#116, pytorch-cifar100#98", "D16", "D22")
def momentum_given_as_eps_to_batch_norms(is_bad: bool) -> Run:
    """Write BatchNorm1d(24, 0.8) in blocks that are drawn as those of DCGAN are.

    First: eps is far above the variances, so the norms do not normalize.
    Cost: 28 %, which is a guess, in place of 100 %.
    """
    model = discriminator(0.8 if is_bad else 1e-5)
    data = changed(movements(), _as_channels)
    watched = train(model, data, steps=250, optimizer=sgd(model, 0.02))
    return Run(model, first(changed(movements(seed=1), _as_channels)), watched)


# d2l-en#2213 (which of the two the momentum multiplies, and 0.9 or 0.1), cs231n#180,
# pytorch-quantization-demo#17
@bug("d2l-en#2213, cs231n.github.io#180, pytorch-quantization-demo#17", "D04", "D02")
def hand_written_norm_with_the_momentum_of_another(is_bad: bool) -> Run:
    """Multiply the old average by 0.1 in a batch norm that is written by hand.

    First: the momentum is wrong: the running averages are those of one batch.
    Cost: a squared error of 0.138 in place of 0.042.
    """
    model = table_mlp(
        *(8, 1),
        norm=lambda width: HandBatchNorm(width, 0.1, is_bad=is_bad),
        depth=3,
    )
    watched = train(
        model, flats(32), F.mse_loss, steps=1500, optimizer=adam(model, 3e-3)
    )
    return Run(model, first(flats(64, seed=1)), watched, F.mse_loss)


# leela-zero#1090 (too few batches for the norms of averaged weights: an error of 13 %),
# composer#624, keras-swa#2
@bug("leela-zero#1090, composer#624, keras-swa#2", "D31", "D03", "D01")
def averaged_weights_and_statistics_of_five_batches(is_bad: bool) -> Run:
    """Reset the statistics of averaged weights, and run five batches with momentum 0.1.

    First: statistics are cold: more than half of them is a mean of 0, a variance of 1.
    Cost: 49 % in place of 100 %, a loss of 3.6 in place of 0.001.
    """
    model = pre_activated()
    averaged = copy.deepcopy(model)
    count = 0

    def collect(_: torch.optim.Optimizer, step: int) -> None:
        nonlocal count
        if step >= 150 and step % 10 == 0:
            count += 1
            for mean, now in zip(
                averaged.parameters(), model.parameters(), strict=True
            ):
                mean.data.lerp_(now.data, 1 / count)

    watched = train(
        model, cloth(), steps=250, optimizer=sgd(model, 0.05), schedule=collect
    )
    for layer in averaged.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    averaged.train()
    with torch.no_grad():
        for x, _ in itertools.islice(cloth(seed=3), 5 if is_bad else 100):
            averaged(x)
    return Run(averaged.eval(), first(cloth(seed=1)), watched)


def _scaled(x: Tensor, y: Tensor) -> Batch:
    """Give a scan with a mean of 0 and a spread of 1."""
    return (x + 420) / 470, y


# kits19-cnn#22 (scans are standardized in training, not in the prediction), TorchSeg#99
@bug("kits19-cnn#22, TorchSeg#99", "D01", "D28")
def scans_scaled_in_training_only(is_bad: bool) -> Run:
    """Standardize scans for the training, and give those of the test as they are.

    First: the statistics are not those of the data that is evaluated.
    Cost: 25 % of pixels in place of 98 %.
    """
    model = SmallUNet()
    watched = train(
        model, changed(scans(), _scaled), steps=120, optimizer=adam(model, 4e-3)
    )
    held = scans(seed=1)
    return Run(model, first(held if is_bad else changed(held, _scaled)), watched)


# TASO#47 (folding scales the weights, and leaves out the shift of the norm), ncnn#1339
# and yolov3#807 (folding leaves out the bias)
@bug("TASO#47, ncnn#1339, yolov3#807", "D01", "D02")
def folded_without_the_shift_of_the_norms(is_bad: bool) -> Run:
    """Fold the norms behind convolutions into the weights, and keep the old biases.

    First: the statistics of the norms that stay are not of what they get.
    Cost: 72 % in place of 100 %, a loss of 0.72 in place of 0.001.
    """
    model = pre_activated()
    watched = train(model, cloth(), steps=200, optimizer=sgd(model, 0.05))
    model.eval()
    pairs = [(model, "0", "1")]
    pairs += [(model.get_submodule(str(i)), "conv1", "bn2") for i in (3, 4)]
    for part, conv, norm in pairs:
        old: Any = part.get_submodule(conv)
        folded: Any = fuse_conv_bn_eval(old, part.get_submodule(norm))
        if is_bad:
            folded.bias = old.bias
        setattr(part, conv, folded)
        setattr(part, norm, nn.Identity())
    return Run(model, first(cloth(seed=1)), watched)


def _grey(x: Tensor, y: Tensor) -> Batch:
    """Give images of an infrared camera, which has one channel."""
    return x.mean(1, keepdim=True), y


# segmentation_models.pytorch#341 (the sum keeps the scale of the signal, the mean does
# not), Mask_RCNN#2862
@bug("segmentation_models.pytorch#341, Mask_RCNN#2862", "D01", "D02")
def first_convolution_averaged_over_its_colours(is_bad: bool) -> Run:
    """Give a frozen backbone one channel by the mean of its three, not by their sum.

    First: the statistics of frozen norms are three times too large for what they get.
    Cost: 77 % in place of 100 %, a loss of 0.80 in place of 0.13.
    """
    trained = texture_net(depth=4)
    train(trained, cloth(), steps=250, optimizer=adam(trained, 4e-3))
    conv = nn.Conv2d(1, 16, 3, bias=False)
    old = trained[0].weight.detach()
    conv.weight = nn.Parameter(
        old.mean(1, keepdim=True) if is_bad else old.sum(1, keepdim=True)
    )
    backbone = nn.Sequential(conv, *trained[1:-1]).requires_grad_(False)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
            layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign]
    model = nn.Sequential(backbone, nn.Linear(16, 6))
    watched = train(
        model, changed(cloth(seed=2), _grey), steps=120, optimizer=adam(model, 3e-3)
    )
    return Run(model, first(changed(cloth(seed=1), _grey)), watched)


# accord-net/framework#306 (inputs have to be standardized for such units)
@bug("accord-net/framework#306", "D20", "D28")
def saturated_units_before_batch_norms(is_bad: bool) -> Run:
    """Give a table in its units to a layer of tanh, and let a batch norm follow.

    First: the units are saturated, which a norm behind them does not repair.
    Cost: 36 %, which is a guess, in place of 94 %.
    """
    layers: list[nn.Module] = []
    for index in range(2):
        layers += [nn.Linear(48 if index else 8, 48), nn.Tanh(), nn.BatchNorm1d(48)]
    model = nn.Sequential(*layers, nn.Linear(48, 3))
    data = patients(is_scaled=not is_bad)
    watched = train(model, data, steps=800, optimizer=adam(model, 4e-3))
    return Run(model, first(patients(seed=1, is_scaled=not is_bad)), watched)


# pytorch/audio#4205 (group norm takes its statistics over padded steps, so that outputs
# depend on the padding), deepspeech.pytorch#312
@bug("pytorch/audio#4205, deepspeech.pytorch#312", "D12")
def padding_in_the_statistics_of_group_norms(is_bad: bool) -> Run:
    """Train on batches of calls of one length, and serve calls that are padded to 160.

    First: padding enters the statistics of the norms, and by them the answers.
    Cost: 44 % in place of 100 %, a loss of 7.4 in place of 0.01.
    """
    model = Calls()
    watched = train(model, clips(), steps=250, optimizer=adam(model, 4e-3))
    return Run(model, first(clips(seed=1, length=160 if is_bad else None)), watched)


# MyNN#70 "ensure layer init params are not constant", d2l-vi#1030 (what happens if all
# weights of a layer are c), net2net.torch#3
@bug("MyNN#70, d2l-vi#1030, net2net.torch#3", "D26")
def weights_that_are_all_one_number(is_bad: bool) -> Run:
    """Set all weights of a regression to 0.05.

    First: the units of a layer are equal, and stay so.
    Cost: a squared error of 0.557 in place of 0.024; the mean has 1.
    """
    model = table_mlp(8, 1)
    if is_bad:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.constant_(layer.weight, 0.05)
                nn.init.zeros_(layer.bias)
    watched = train(model, flats(), F.mse_loss, steps=1200, optimizer=adam(model, 3e-3))
    return Run(model, first(flats(64, seed=1)), watched, F.mse_loss)


# DIGITS#535 (VGG16 does not converge: its weights are drawn with std 0.01), fbcunn#75
# (weights have to be drawn by Kaiming's rule)
@bug("NVIDIA/DIGITS#535, fbcunn#75", "D22", "D24")
def weights_of_a_vgg_with_a_spread_of_a_hundredth(is_bad: bool) -> Run:
    """Draw eight convolutions with a standard deviation of 0.01.

    First: activations vanish with depth.
    Cost: 13 %, which is a guess, in place of 99.8 %.
    """
    model = vgg()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if is_bad:
                nn.init.normal_(layer.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    watched = train(model, fabrics(noise=0.7), steps=300, optimizer=sgd(model, 0.003))
    return Run(model, first(fabrics(seed=1, noise=0.7)), watched)


# selene#115 (the mode of ReduceLROnPlateau is max, and what it gets is a loss),
# ViS4mer#4
@bug("selene#115, ViS4mer#4", "D27")
def plateau_of_the_largest_loss(is_bad: bool) -> Run:
    """Give the loss to a ReduceLROnPlateau that waits for something to grow.

    First: the learning rate falls to nothing while the loss still falls.
    Cost: 93 % in place of 100 %, a loss of 0.30 in place of 0.0004.
    """
    model = Recurrent("gru")
    optimizer = adam(model, 1e-2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if is_bad else "min", factor=0.2, patience=3
    )
    model.train()
    with watch(model, optimizer, every=5) as seen:
        data = movements()
        for _ in range(50):
            total = 0.0
            for x, y in itertools.islice(data, 8):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
                total += loss.item()
            plateau.step(total)
    return Run(model, first(movements(seed=1)), seen.findings())


# pytorch/tutorials#1654 "Remove final ReLU layer", pytorch/examples#117,
# tensorflow-vgg#13 "ReLU applied to logits", GA3C#17
@bug("pytorch/tutorials#1654, pytorch/examples#117, tensorflow-vgg#13", "D34", "D21")
def relu_behind_the_scores_of_classes(is_bad: bool) -> Run:
    """Apply a ReLU also to the last layer of a classifier.

    First: scores are never negative, and those of some classes are always zero.
    Cost: 40 % in place of 99.8 %.
    """
    model = LeNet(is_bad=is_bad)
    data = changed(endless(), as_image)
    watched = train(model, data, steps=400, optimizer=sgd(model, 0.03))
    return Run(model, list(changed(digits(), as_image)), watched)


# sgmcmc-review-paper#2 (softmax is the activation of the hidden layer)
@bug("sgmcmc-review-paper#2", "D22", "D24", "D18")
def softmax_between_hidden_layers(is_bad: bool) -> Run:
    """Use softmax for the activation of hidden layers.

    First: activations are next to nothing, and vanish with depth.
    Cost: 34 %, which is a guess, in place of 91 %.
    """
    model = table_mlp(8, 3, act=nn.Softmax if is_bad else nn.ReLU, depth=4)
    watched = train(model, patients(), steps=1000, optimizer=sgd(model, 0.05))
    return Run(model, first(patients(seed=1)), watched)


def bound(found: Tensor, y: Tensor) -> Tensor:
    """Squared error of the pixels, and a thousandth of the divergence of the codes."""
    return F.mse_loss(found[:, :-1], y.flatten(1)) + 0.001 * found[:, -1].mean()


# convolutional_autoencoder#9 (standardized images, and a network that cannot answer
# negative values), PyTorch-VAE#48 (tanh for images from 0 to 1)
@bug("convolutional_autoencoder#9, PyTorch-VAE#48", "D34")
def sigmoid_for_standardized_images(is_bad: bool) -> Run:
    """Give the decoder of standardized images a sigmoid at its end.

    First: targets are below 0 and above 1, where the output cannot be.
    Cost: a loss of 0.609 in place of 0.044.
    """
    model = Variational(nn.Sigmoid() if is_bad else nn.Identity())
    watched = train(model, blobs(), bound, steps=500, optimizer=adam(model, 3e-3))
    return Run(model, first(blobs(seed=1)), watched, bound)


def of_words(found: Tensor, y: Tensor) -> Tensor:
    """Mean negative log likelihood of all tags."""
    return F.nll_loss(found.flatten(0, 1), y.flatten())


# pytorchfundamentals#21 (the axis of softmax has to be the last one),
# pytorch-meta-optimizer#10 "Wrong log_softmax dimension in model"
@bug("pytorchfundamentals#21, pytorch-meta-optimizer#10", "D34")
def log_softmax_over_the_words_of_a_sentence(is_bad: bool) -> Run:
    """Take log_softmax over axis 1 of scores (N, L, K), which are the words.

    First: what the loss gets are no log probabilities of classes.
    Cost: 91 % of tags in place of 100 %, a loss of 1.41 in place of 0.001.
    """
    model = Tagger(1 if is_bad else 2)
    watched = train(model, tags(), of_words, steps=400, optimizer=adam(model, 3e-3))
    return Run(model, first(tags(seed=1)), watched, of_words)


# keras#2194 (a recurrent network with ReLU whose loss is nan), pysurvival#11,
# deeplearning_course_sjtu#31 (RNN_RELU: the loss explodes)
@bug("keras#2194, pysurvival#11, deeplearning_course_sjtu#31", "D25", "D23")
def recurrent_relus_that_grow_with_each_step(is_bad: bool) -> Run:
    """Draw the weights of a recurrent network with ReLU too large, and do not clip.

    First: activations and gradients explode over the steps.
    Cost: 30 %, which is a guess, in place of 100 %.
    """
    model = Recurrent("relu")
    hidden: Any = model.cell.weight_hh_l0
    if is_bad:
        nn.init.normal_(hidden, std=0.3)
    else:
        nn.init.orthogonal_(hidden)
    watched = train(model, movements(), steps=500, optimizer=adam(model, 4e-3))
    return Run(model, first(movements(seed=1)), watched)
