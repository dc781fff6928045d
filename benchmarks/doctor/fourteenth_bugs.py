"""A fourteenth set of bugs of public threads: twelve about norms, eight about training.

Programs are written as people write them: plain loops, trainers, replicas on several
devices, networks with several inputs, agents, autoencoders. Each docstring says what
the mistake is, what a good doctor would say first, and what the mistake costs in eval
mode on the batches of the run (accuracy or loss of the program, then of its twin);
`expected` has the checks that say it. Both were written, and committed, before the
doctor saw any of these programs, by an author who knew the names of its checks, neither
their code nor their documentation, but had seen its alarms on the thirteenth set.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bugs import Run, bug, digits, endless
from fourteenth_data import (
    DISCOUNT,
    advice,
    communities,
    episodes,
    figures,
    leaves,
    maps,
    minutes,
    moves,
    pictures,
    plumes,
    policy,
    reports,
    sales,
    scans,
    sentences,
    sites,
    spoken,
)
from fourteenth_networks import (
    VAE,
    AdviceNet,
    Compressor,
    Critic,
    Discriminator,
    Generator,
    GraphNet,
    LeafNet,
    OwnNorm,
    PlumeNet,
    Prototypes,
    RatingNet,
    Recogniser,
    ReturnNet,
    Reverser,
    SaleNet,
    ScanNet,
    SiteNet,
    figure_net,
)
from third_bugs import train
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


class Trainer:
    """A loop over batches that adds up the gradients of some of them."""

    def __init__(self, model: nn.Module, loss_fn: Any, accumulate: int = 1) -> None:
        self.model, self.loss_fn, self.accumulate = model, loss_fn, accumulate
        self.optimizer = adam(model)

    def fit(self, loader: Iterator[Any], max_steps: int) -> list[Any]:
        """Train for some updates of the weights."""
        self.model.train()
        with watch(self.model, self.optimizer, every=5) as seen:
            for index, batch in enumerate(loader):
                loss = self.training_step(batch)
                (loss / self.accumulate).backward()
                seen.log(loss=loss.item())
                if (index + 1) % self.accumulate == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if (index + 1) == max_steps * self.accumulate:
                    break
        return seen.findings()

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return self.loss_fn(self.model(x), y)


# OASIS#21 (why statistics are collected for the average), ema-pytorch#29, ignite#2590
@bug(
    "boschresearch/OASIS#21, lucidrains/ema-pytorch#29, pytorch/ignite#2590",
    *("D31", "D32", "D03", "D01"),
)
def averaged_generator_without_its_buffers(is_bad: bool) -> Run:
    """Average the parameters of a conditional GAN's generator, and save the average.

    First: the statistics of the averaged generator are those of a new one.
    Cost: an absolute error of 0.35 in place of 0.024.
    """
    generator, judge = Generator(), Discriminator()
    average = copy.deepcopy(generator).requires_grad_(False)
    step_g, step_d = adam(generator, 3e-3), adam(judge, 1e-3)
    generator.train()
    with watch(generator, step_g, every=5) as seen:
        for x, real in first(maps(), 180):
            made = generator(x)
            score, low = judge(x, real), judge(x, made.detach())
            loss_d = F.relu(1 - score).mean() + F.relu(1 + low).mean()
            step_d.zero_grad()
            loss_d.backward()
            step_d.step()
            loss = 10 * F.l1_loss(made, real) - 0.1 * judge(x, made).mean()
            step_g.zero_grad()
            loss.backward()
            step_g.step()
            seen.log(loss=loss.item())
            pairs = zip(average.parameters(), generator.parameters(), strict=True)
            for old, new in pairs:
                old.lerp_(new.detach(), 0.05)
            if not is_bad:
                for old, new in zip(
                    average.buffers(), generator.buffers(), strict=True
                ):
                    old.copy_(new)
    return Run(average.eval(), first(maps(seed=1)), seen.findings(), F.l1_loss)


# mmcv#1869 (accumulation gives less with batch norms), yolov5#1630, keras#16633
@bug("mmcv#1869, ultralytics/yolov5#1630, keras#16633", "D15", "D05", "D02")
def trainer_that_adds_up_pairs(is_bad: bool) -> Run:
    """Train on two scans at a time, and add up gradients, as memory is short.

    First: gradients are added up, but statistics are those of two scans.
    Cost: a squared error of 0.49 in place of 0.05.
    """
    size, accumulate = (2, 8) if is_bad else (16, 1)
    model = ScanNet()
    trainer = Trainer(model, F.mse_loss, accumulate)
    watched = trainer.fit(scans(size), max_steps=200)
    return Run(model, first(scans(size, seed=1), 48), watched, F.mse_loss)


# skflow#157 (fit_transform on the test set), TKAN#8, XenonPy#243
@bug(
    "tensorflow/skflow#157, remigenet/TKAN#8, yoshida-lab/XenonPy#243",
    *("D01", "D02", "D34"),
)
def scaler_fitted_to_the_store_that_is_served(is_bad: bool) -> Run:
    """Fit a min-max scaler to the training set, and one to each store that is served.

    First: the statistics are not those of the inputs.
    Cost: a squared error of 3.08 in place of 0.05.
    """
    rows = torch.cat([x for x, _ in first(sales(), 60)])
    low, high = rows.amin(0), rows.amax(0)
    model = SaleNet()
    scaled = (((x - low) / (high - low), y) for x, y in sales())
    optimizer = adam(model)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000, 1e-4)
    watched = train(
        model,
        scaled,
        F.mse_loss,
        steps=1000,
        optimizer=optimizer,
        schedule=lambda *_: cosine.step(),
    )
    held = first(sales(seed=1, store=4))
    if is_bad:
        rows = torch.cat([x for x, _ in held])
        low, high = rows.amin(0), rows.amax(0)
    held = [((x - low) / (high - low), y) for x, y in held]
    return Run(model, held, watched, F.mse_loss)


# pytorch/examples#571 (do we need to save the model of each rank?), pytorch#13711,
# pytorch#1051
@bug(
    "pytorch/examples#571, pytorch#13711, pytorch#1051",
    *("D01", "D02", "D30", "D13"),
)
def statistics_of_the_first_rank(is_bad: bool) -> Run:
    """Give each of four ranks the files of one hospital, and save the first's network.

    First: the statistics are those of one part of the data.
    Cost: 45 % in place of 100 %, a loss of 9.89 in place of 0.01.
    """
    ranks = [SiteNet()]
    for _ in range(3):
        replica = copy.deepcopy(ranks[0])
        for ours, theirs in zip(replica.modules(), ranks[0].modules(), strict=True):
            ours._parameters.update(theirs._parameters)
        ranks.append(replica)
    shards = [sites(16, seed=r, site=r if is_bad else None) for r in range(4)]
    model, optimizer = ranks[0], adam(ranks[0])
    for replica in ranks:
        replica.train()
    with watch(model, optimizer, every=5) as seen:
        for _ in range(200):
            losses = [
                F.cross_entropy(replica(x), y)
                for replica, (x, y) in zip(ranks, map(next, shards), strict=True)
            ]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            seen.log(loss=losses[0].item())
    return Run(model.eval(), first(sites(32, seed=9)), seen.findings())


# d2l-en#1591 (moving variances should start at 1), sonnet#174, chainer#879
@bug(
    "d2l-ai/d2l-en#1591, google-deepmind/sonnet#174, chainer#879",
    *("D03", "D01", "D02", "D04"),
)
def own_averages_that_start_at_zero(is_bad: bool) -> Run:
    """Keep a mean and a variance by hand, from zero on, with a decay of 0.99.

    First: the first values are still in the averages.
    Cost: 95 % in place of 99 %, a loss of 0.17 in place of 0.05.
    """

    def norm() -> OwnNorm:
        return OwnNorm(64, 0.99, is_corrected=not is_bad)

    model = nn.Sequential(
        *(nn.Linear(64, 64, bias=False), norm(), nn.ReLU()),
        *(nn.Linear(64, 64, bias=False), norm(), nn.ReLU()),
        *(nn.Linear(64, 64, bias=False), norm(), nn.ReLU()),
        nn.Linear(64, 10),
    )
    watched = train(model, endless(), steps=84, optimizer=adam(model))
    return Run(model, digits(), watched)


# poolformer#11, tf-keras#195 (groups as many as channels: is it a layer norm?)
@bug("sail-sg/poolformer#11, keras-team/tf-keras#195", "D29", "D18", "D34")
def group_of_each_channel_before_the_mean(is_bad: bool) -> Run:
    """Take as many groups as channels for a layer norm, and the mean over places next.

    First: a norm erases what the following mean reads.
    Cost: 16 %, which is a guess, in place of 100 %, a loss of 1.79 in place of 0.003.
    """
    model = LeafNet(is_each_channel=is_bad)
    watched = train(model, leaves(), steps=300, optimizer=adam(model))
    return Run(model, first(leaves(seed=1)), watched)


# transformers#17554 (moving_mean and moving_variance are not loaded),
# gen-efficientnet-pytorch#50
@bug(
    "transformers#17554, rwightman/gen-efficientnet-pytorch#50",
    *("D32", "D03", "D01", "D07"),
)
def port_that_leaves_moving_averages_behind(is_bad: bool) -> Run:
    """Load weights of TensorFlow by strict=False, freeze them, and train a head.

    First: the statistics of frozen norms were never set.
    Cost: 62 % in place of 88 %, a loss of 1.33 in place of 0.40.
    """
    source = SiteNet(kinds=8)
    train(source, pictures(), steps=250, optimizer=adam(source))
    names = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    saved = {}
    for name, value in source.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        saved[f"{layer}.{names.get(leaf, leaf) if is_bad else leaf}"] = value
    model = SiteNet(kinds=8)
    model.load_state_dict(saved, strict=False)
    model.requires_grad_(False)
    model.fc = nn.Linear(32, 5)
    optimizer = adam(model, 1e-2)
    model.eval()
    with watch(model, optimizer, every=5) as seen:
        for x, y in first(pictures(seed=2, look=30, kinds=5), 400):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, first(pictures(seed=3, look=30, kinds=5)), seen.findings())


# darts#2739 (the norm is not blind to scale: its eps), darts#2748
@bug("unit8co/darts#2739, unit8co/darts#2748", "D16", "D22", "D28")
def returns_of_minutes_before_an_instance_norm(is_bad: bool) -> Run:
    """Give returns of minutes as they are to an instance norm with its usual eps.

    First: eps is far larger than the variances.
    Cost: 39 % in place of 86 %, a loss of 1.52 in place of 0.36.
    """
    unit = 1.0 if is_bad else 1e4
    model = ReturnNet()
    watched = train(model, minutes(unit=unit), steps=500, optimizer=adam(model, 1e-3))
    return Run(model, first(minutes(seed=1, unit=unit)), watched)


# sbx#36 (two passes do not work: actions of the memory and of the policy),
# stable-baselines3-contrib#243, pytorch/rl#2033
@bug(
    "araffin/sbx#36, Stable-Baselines-Team/stable-baselines3-contrib#243, "
    "pytorch/rl#2033",
    *("D33", "D01", "D02", "D13"),
)
def critic_called_for_now_and_then(is_bad: bool) -> Run:
    """Call a critic with batch norms for a step, and again for the step after it.

    First: a norm is shared by inputs of different distributions.
    Cost: a squared error of 5.51 in place of 0.02.
    """
    model = Critic()
    optimizer = adam(model)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000, 1e-4)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for now, (reward, after, _) in first(moves(), 1000):
            then = {"s": after, "a": policy(after)}
            if is_bad:
                q, rest = model(**now), model(**then)
            else:
                both = {k: torch.cat([now[k], then[k]]) for k in now}
                q, rest = model(**both).chunk(2)
            loss = F.mse_loss(q, reward + DISCOUNT * rest.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            seen.log(loss=loss.item())
    held = [(now, value) for now, (_, _, value) in first(moves(seed=1))]
    return Run(model.eval(), held, seen.findings(), F.mse_loss)


# easy-few-shot-learning#18 (train or eval mode for prototypes?), learn2learn#207,
# higher#55
@bug(
    "sicara/easy-few-shot-learning#18, learnables/learn2learn#207, "
    "facebookresearch/higher#55",
    *("D09", "D13", "D05"),
)
def few_shots_with_the_statistics_of_each_call(is_bad: bool) -> Run:
    """Keep no running statistics in few-shot learning; ask for one kind at a time.

    First: answers depend on what else is in the batch.
    Cost: 92 % in place of 100 %, a loss of 0.26 in place of 0.01.
    """
    model = Prototypes(is_tracked=not is_bad)
    watched = train(model, episodes(), steps=250, optimizer=adam(model, 1e-3))
    return Run(model, first(episodes(seed=1, is_ordered=True), 48), watched)


# ncsn#2 (in eval mode for ever after the first validation), small-text#40
@bug("ermongroup/ncsn#2, webis-de/small-text#40", "D08", "D03", "D01")
def encoder_left_in_eval_mode(is_bad: bool) -> Run:
    """Set encoder and decoder to eval mode to validate, and the decoder alone back.

    First: the norms of the encoder are in eval mode while it trains.
    Cost: 41 % in place of 93 %, a loss of 1.28 in place of 0.33.
    """
    model = Recogniser()
    optimizer = adam(model, 1e-3)
    held = first(spoken(seed=1))

    def validate() -> float:
        model.encoder.eval()
        model.decoder.eval()
        with torch.no_grad():
            losses = [F.cross_entropy(model(**x), y) for x, y in held[:4]]
        model.decoder.train()
        if not is_bad:
            model.encoder.train()
        return float(torch.stack(losses).mean())

    validate()
    with watch(model, optimizer, every=5) as seen:
        for step, (x, y) in enumerate(first(spoken(), 280)):
            loss = F.cross_entropy(model(**x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
            if step % 100 == 99:
                validate()
    return Run(model.eval(), held, seen.findings())


# HTML-Hierarchical-Transformer-based-Multi-task-Learning-for-Volatility-Prediction#10
# (document vectors beside a price-earnings ratio of 24), tab-transformer-pytorch#1
@bug(
    "YangLinyi/HTML-Hierarchical-Transformer-based-Multi-task-Learning-for-Volatility-"
    "Prediction#10, lucidrains/tab-transformer-pytorch#1",
    *("D37", "D28", "D29"),
)
def revenue_beside_a_vector_of_text(is_bad: bool) -> Run:
    """Join a vector of a report with raw figures of the firm in one layer norm.

    First: one channel outweighs all others in the norm.
    Cost: 39 % in place of 89 %, a loss of 1.33 in place of 0.28.
    """
    model = RatingNet()
    data = reports(is_scaled=not is_bad)
    watched = train(model, data, steps=900, optimizer=adam(model, 1e-3))
    return Run(model, first(reports(seed=1, is_scaled=not is_bad)), watched)


# pytorch/examples#590 (why are returns normalized?), keon/policy-gradient#5,
# Reinforcement-learning-with-tensorflow#2
@bug(
    "pytorch/examples#590, keon/policy-gradient#5, "
    "MorvanZhou/Reinforcement-learning-with-tensorflow#2",
    *("D34", "D25", "D27"),
)
def policy_gradient_of_raw_rewards(is_bad: bool) -> Run:
    """Multiply log probabilities by rewards in cents, of which all are about 600.

    First: the loss has a wrong scale and no baseline; the policy is sure at once.
    Cost: 52 % in place of 89 %, a loss of 3.71 in place of 0.36.
    """
    model = AdviceNet()
    optimizer = adam(model, 1e-2)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, worth in first(advice(), 600):
            chance = torch.distributions.Categorical(logits=model(x))
            action = chance.sample()
            reward = worth.gather(1, action[:, None])[:, 0]
            if not is_bad:
                reward = (reward - reward.mean()) / (reward.std() + 1e-6)
            loss = -(chance.log_prob(action) * reward).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    held = [(x, worth.argmax(1)) for x, worth in first(advice(seed=1))]
    return Run(model, held, seen.findings())


# pytorch#65417 (only a small part of the way up), handson-mlp#28,
# pytorch-lightning#5631
@bug(
    "pytorch#65417, ageron/handson-mlp#28, pytorch-lightning#5631",
    "D27",
)
def one_cycle_stepped_once_an_epoch(is_bad: bool) -> Run:
    """Plan a cycle of the rate in batches, and step it at the end of each epoch.

    First: the rate is far too small.
    Cost: 90 % in place of 99.8 %, a loss of 0.30 in place of 0.01.
    """
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    epochs, each = 8, len(digits())
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, epochs=epochs, steps_per_epoch=each
    )

    def after(_: Any, step: int) -> None:
        if not is_bad or (step + 1) % each == 0:
            cycle.step()

    watched = train(
        model, endless(), steps=epochs * each - 1, optimizer=optimizer, schedule=after
    )
    return Run(model, digits(), watched)


# jaxpi#11 (why coordinates are scaled once more), TheodoreWolf/pinns#3
@bug("PredictiveIntelligenceLab/jaxpi#11, TheodoreWolf/pinns#3", "D28", "D20")
def metres_and_seconds_into_tanh(is_bad: bool) -> Run:
    """Give coordinates in metres and seconds to a physics-informed network of tanh.

    First: inputs are far from zero mean and unit variance, and units saturate.
    Cost: a squared error of 0.29 in place of 0.0004.
    """
    model = PlumeNet(is_scaled=not is_bad)
    optimizer = adam(model, 2e-3)
    speed = 0.3 * 2000 / 3600
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for at, y in first(plumes(), 700):
            x, t = at["x"].requires_grad_(), at["t"].requires_grad_()
            u = model(x, t)
            u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
            residual = 3600 * (u_t + speed * u_x)
            loss = F.mse_loss(u, y) + 0.01 * residual.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return Run(model, first(plumes(seed=1)), seen.findings(), F.mse_loss)


# graph-learn#153 (neighbours are only added up), graph-learn#117, dgl-lifesci#113
@bug(
    "alibaba/graph-learn#153, alibaba/graph-learn#117, awslabs/dgl-lifesci#113",
    *("D23", "D25", "D27"),
)
def neighbours_added_up_without_their_degree(is_bad: bool) -> Run:
    """Add up the neighbours of each node in six graph convolutions.

    First: activations grow with depth.
    Cost: 68 % in place of 97 %, a loss of 2.06 in place of 0.10.
    """
    model = GraphNet(is_divided=not is_bad)
    watched = train(model, communities(), steps=300, optimizer=adam(model, 5e-3))
    return Run(model, first(communities(seed=1)), watched)


# Image-AutoEncoder#1 (why is only the decoder optimized?),
# a-PyTorch-Tutorial-to-Image-Captioning#73, ali-pytorch#5
@bug(
    "jzenn/Image-AutoEncoder#1, 9310gaurav/ali-pytorch#5, "
    "sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning#73",
    "D27",
)
def optimizer_of_the_decoder_alone(is_bad: bool) -> Run:
    """Give the optimizer of an autoencoder the parameters of the decoder.

    First: the encoder is trained by no optimizer.
    Cost: a squared error of 0.37 in place of 0.11.
    """
    model = Compressor()
    part = model.decoder if is_bad else model
    optimizer = torch.optim.Adam(part.parameters(), lr=2e-3)
    pairs = ((x, x) for x, _ in endless())
    watched = train(model, pairs, F.mse_loss, steps=700, optimizer=optimizer)
    return Run(model, [(x, x) for x, _ in digits()], watched, F.mse_loss)


# torchvision#714 (folders 1, 10, 11, 2), ImageNetV2#10, places365#22, deit#130
@bug(
    "torchvision#714, modestyachts/ImageNetV2#10, CSAILVision/places365#22, "
    "facebookresearch/deit#130",
    "D34",
)
def folders_sorted_as_words(is_bad: bool) -> Run:
    """Train on folders that are sorted as words, and test by the numbers on them.

    First: the loss of the test is far above that of the training.
    Cost: 17 % in place of 99 %, a loss of 6.75 in place of 0.04.
    """
    model = figure_net()
    rank = torch.tensor(sorted(range(12), key=str)).argsort()
    data = ((x, rank[y]) for x, y in figures())
    watched = train(model, data, steps=300, optimizer=adam(model, 2e-3))
    held = [(x, y if is_bad else rank[y]) for x, y in first(figures(seed=1))]
    return Run(model, held, watched)


# PyTorch-VAE#12 (why not rsample?), PyTorch-VAE#13, pytorch/examples#592
@bug(
    "AntixK/PyTorch-VAE#12, AntixK/PyTorch-VAE#13, pytorch/examples#592",
    *("D24", "D22", "D34"),
)
def code_drawn_by_sample(is_bad: bool) -> Run:
    """Draw the code of a variational autoencoder by sample(), not by rsample().

    First: no gradient of the error reaches the encoder.
    Cost: a squared error of 0.52 in place of 0.10.
    """
    model = VAE(is_cut=is_bad)
    optimizer = adam(model, 2e-3)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for x, _ in itertools.islice(endless(), 700):
            loss = F.mse_loss(model(x), x) + 0.02 * model.divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    held = [(x, x) for x, _ in digits()]
    return Run(model, held, seen.findings(), F.mse_loss)


# yunjey/pytorch-tutorial#172 (the loss is 0: words are read and said again),
# Pytorch-Simple-Transformer#3
@bug(
    "yunjey/pytorch-tutorial#172, IpsumDominum/Pytorch-Simple-Transformer#3",
    "D34",
)
def decoder_that_is_given_what_it_has_to_say(is_bad: bool) -> Run:
    """Give a decoder the words of the answer, not shifted by one, in training.

    First: the loss of the test is far above that of the training.
    Cost: 15 % of the words in place of 96 %, a loss of 7.85 in place of 0.25.
    """
    model = Reverser()
    optimizer = adam(model)
    model.train()
    with watch(model, optimizer, every=5) as seen:
        for batch, y in first(sentences(), 800):
            given = y if is_bad else F.pad(y[:, :-1], (1, 0))
            loss = F.cross_entropy(model(batch["words"], given), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    held = [({"words": b["words"]}, y) for b, y in first(sentences(seed=1))]
    return Run(model, held, seen.findings())


# The alarms of the doctor, in order, when it saw these programs for the first time: on
# the program, and on its twin.
FIRST_SIGHT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "averaged_generator_without_its_buffers": (("D32", "D03", "D01", "D02"), ()),
    "trainer_that_adds_up_pairs": (("D05", "D15", "D01"), ()),
    "scaler_fitted_to_the_store_that_is_served": ((), ()),
    "statistics_of_the_first_rank": (("D01", "D02"), ()),
    "own_averages_that_start_at_zero": ((), ()),
    "group_of_each_channel_before_the_mean": (("D24", "D34"), ()),
    "port_that_leaves_moving_averages_behind": ((), ()),
    "returns_of_minutes_before_an_instance_norm": (("D21",), ()),
    "critic_called_for_now_and_then": (("D01", "D02"), ()),
    "few_shots_with_the_statistics_of_each_call": (("D13",), ("D13",)),
    "encoder_left_in_eval_mode": (("D08", "D22"), ()),
    "revenue_beside_a_vector_of_text": ((), ()),
    "policy_gradient_of_raw_rewards": ((), ()),
    "one_cycle_stepped_once_an_epoch": ((), ()),
    "metres_and_seconds_into_tanh": (("D28", "D20"), ("D28",)),
    "neighbours_added_up_without_their_degree": (("D23",), ()),
    "optimizer_of_the_decoder_alone": (("D21", "D27"), ()),
    "folders_sorted_as_words": ((), ()),
    "code_drawn_by_sample": (("D21", "D24", "D34"), ()),
    "decoder_that_is_given_what_it_has_to_say": (("D34",), ()),
}
