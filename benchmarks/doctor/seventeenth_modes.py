"""The seventeenth set: modes of layers, what is frozen, averaged, and given later."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from bugs import Run, bug
from seventeenth_data import cells, fabrics, grids, loader, loans
from seventeenth_networks import VGG, Critic, Generator, QNetwork, TwoHeads
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import watch

# The means and deviations of ImageNet, which pretrained networks are given.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def both_losses(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Return the loss of the standing and that of the limit."""
    loss = F.cross_entropy(output["standing"], target["standing"])
    return loss + F.mse_loss(output["limit"].squeeze(1), target["limit"])


class Engine:
    """Trains a network of two tasks, and looks at customers who were held out."""

    def __init__(self, model: nn.Module, *, is_bad: bool) -> None:
        self.model, self.is_bad = model, is_bad
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    @staticmethod
    def batches(count: int, seed: int, size: int, *, sorts: bool = False) -> list[Any]:
        """Return batches of named inputs and named targets."""
        (branch, figures), standing = loans(count, seed)
        income = figures[:, 0]
        limit = torch.tanh((income - 52000) / 18000) * (figures[:, 3] - 0.045) / 0.012
        order = income.argsort() if sorts else torch.randperm(count)
        return [
            (
                {"branch": branch[i], "figures": figures[i]},
                {"standing": standing[i], "limit": limit[i]},
            )
            for i in order.split(size)
        ]

    def train_one_epoch(self, seen: Any) -> None:
        """Go through the data once."""
        self.model.train()
        for inputs, target in self.batches(4096, 1, 64):
            loss = both_losses(self.model(**inputs), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            seen.log(loss=loss.item())

    @torch.no_grad()
    def evaluate(self, batches: list[Any]) -> float:
        """Return the mean loss of customers who were held out."""
        if self.is_bad:
            self.model.eval  # noqa: B018 - the mistake: it is not called
        else:
            self.model.eval()
        return sum(both_losses(self.model(**x), y).item() for x, y in batches)


# pytorch#5406, HiDDeN#13 (without eval() bit errors seem lower), free_adv_train#4
# (batch norms are not switched off)
@bug(
    "pytorch#5406, ando-khachatryan/HiDDeN#13, ashafahi/free_adv_train#4",
    *("D09", "D01", "D02", "D13"),
)
def eval_without_its_parentheses(is_bad: bool) -> Run:
    """Write model.eval in place of model.eval() in front of each validation, by income.

    First: the network is evaluated in training mode.
    Cost: 73 % in place of 92 %, a loss of 1.05 in place of 0.26.
    """
    engine = Engine(TwoHeads(), is_bad=is_bad)
    held = engine.batches(512, 2, 32, sorts=True)
    with watch(engine.model, engine.optimizer, every=5) as seen:
        for _ in range(12):
            engine.train_one_epoch(seen)
            engine.evaluate(held)
    test = engine.batches(512, 3, 32)
    return Run(engine.model, test, seen.findings(), both_losses)


def infrared(x: Tensor) -> Tensor:
    """Return what another camera sees: no colour, and dark where it is bright."""
    return (0.5 - 0.4 * x.mean(1, keepdim=True)).expand_as(x)


class Catalogue(nn.Module):
    """Finds the nearest of what was enrolled; a second head tells new from worn."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.wear = nn.Linear(32, 2)
        self.register_buffer("enrolled", torch.zeros(6, 32))

    def embed(self, x: Tensor) -> Tensor:
        """Return a vector for each image."""
        return self.backbone(x).mean((2, 3))

    @torch.no_grad()
    def enrol(self, x: Tensor, kind: Tensor) -> None:
        """Keep the mean vector of each kind."""
        vectors = self.embed(x)
        self.enrolled = torch.stack([vectors[kind == k].mean(0) for k in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        """Return how near each kind is."""
        return -10 * torch.cdist(self.embed(x), self.enrolled)


# pytorch#86590 (many do not know that it is not entirely frozen), gt-pyg#112 (eval mode
# does not survive model.train()), pytorch/tutorials#449, pytorch-deeplab-resnet#39
@bug(
    "pytorch#86590, pgniewko/gt-pyg#112, pytorch/tutorials#449, "
    "isht7/pytorch-deeplab-resnet#39",
    *("D07", "D01", "D02"),
)
def catalogue_made_before_a_frozen_backbone_moved(is_bad: bool) -> Run:
    """Enrol vectors of a frozen backbone, then train a head on infrared images.

    First: statistics of frozen layers change.
    Cost: 92 % in place of 99 %, a loss of 0.73 in place of 0.09; with the seed 1 96 %.
    """
    net = VGG(6)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(8):
        for x, y in loader(fabrics(1024, 1, 0.4)):
            optimizer.zero_grad()
            F.cross_entropy(net((x - MEAN) / STD), y).backward()
            optimizer.step()

    model = Catalogue(net.features).eval()
    x, y = fabrics(256, 5, 0.4)
    model.enrol((x - MEAN) / STD, y)
    for p in model.backbone.parameters():
        p.requires_grad = False
    optimizer = torch.optim.SGD(model.wear.parameters(), 0.05, momentum=0.9)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(4):
            model.train()
            if not is_bad:
                for m in model.modules():
                    if isinstance(m, nn.BatchNorm2d):
                        m.eval()
            for x, _ in loader(fabrics(256, 3, 0.4), 8):
                worn = torch.randint(2, (8,))
                x = infrared(x) + 0.3 * worn.view(-1, 1, 1, 1) * torch.rand_like(x)
                optimizer.zero_grad()
                scores = model.wear(model.embed((x - MEAN) / STD))
                loss = F.cross_entropy(scores, worn)
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    model.eval()
    x, y = fabrics(512, 4, 0.4)
    held = loader(((x - MEAN) / STD, y), shuffle=False)
    return Run(model, list(held), seen.findings())


# pytorch/tutorials#1084 (netG.eval(), sample, netG.train()), udacity/deep-learning#130
# (with training=False while it trains, images are not good)
@bug("pytorch/tutorials#1084, udacity/deep-learning#130", "D08", "D32", "D03")
def generator_sampled_and_left_in_eval_mode(is_bad: bool) -> Run:
    """Set a generator to eval mode for samples, now and then, and never back.

    First: batch norms are in eval mode while the generator trains.
    Cost: an absolute error of 0.52 in place of 0.19.
    """
    net_g, net_d = Generator(), Critic()
    optimizer_g = torch.optim.Adam(net_g.parameters(), 2e-3, (0.5, 0.999))
    optimizer_d = torch.optim.Adam(net_d.parameters(), 5e-4, (0.5, 0.999))
    gan = nn.BCEWithLogitsLoss()
    x, mask = cells(768, 1)
    fixed = x[:16]
    samples = []
    step = 0
    with watch(net_g, optimizer_g, every=5) as seen:
        for _ in range(5):
            for given, real in loader((x, 2 * mask - 1), 16):
                fake = net_g(given)
                optimizer_d.zero_grad()
                right, wrong = net_d(given, real), net_d(given, fake.detach())
                loss_d = gan(right, torch.ones_like(right))
                loss_d = loss_d + gan(wrong, torch.zeros_like(wrong))
                loss_d.backward()
                optimizer_d.step()

                optimizer_g.zero_grad()
                score = net_d(given, fake)
                loss_g = 0.01 * gan(score, torch.ones_like(score))
                loss_g = loss_g + F.l1_loss(fake, real)
                loss_g.backward()
                optimizer_g.step()
                seen.log(loss=loss_g.item())

                if step % 100 == 0:
                    net_g.eval()
                    with torch.no_grad():
                        samples.append(net_g(fixed))
                    if not is_bad:
                        net_g.train()
                step += 1
    net_g.eval()
    x, mask = cells(256, 2)
    held = loader((x, 2 * mask - 1), 16, shuffle=False)
    return Run(net_g, list(held), seen.findings(), F.l1_loss)


class Agent:
    """Learns the values of moves from what it remembers."""

    def __init__(self, *, is_bad: bool) -> None:
        self.is_bad = is_bad
        self.q_network = QNetwork()
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), lr=2e-3)
        self.memory: deque[tuple[Tensor, int, float]] = deque(maxlen=2000)

    def act(self, state: Tensor, epsilon: float) -> int:
        """Choose a move for one state."""
        if float(torch.rand(())) < epsilon:
            return int(torch.randint(4, ()))
        if not self.is_bad:
            self.q_network.eval()
        with torch.no_grad():
            values = self.q_network(state.unsqueeze(0))
        self.q_network.train()
        return int(values.argmax(1))

    def learn(self, size: int = 32) -> float:
        """Take a step on what was remembered."""
        chosen = torch.randint(len(self.memory), (size,)).tolist()
        states, moves, rewards = zip(*(self.memory[i] for i in chosen), strict=True)
        values = self.q_network(torch.stack(states))
        value = values.gather(1, torch.tensor(moves).unsqueeze(1)).squeeze(1)
        loss = F.smooth_l1_loss(value, torch.tensor(rewards))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def by_hour(states: Tensor, day: int) -> Tensor:
    """Return the order of the states of a day, from dark to bright."""
    return states[2000 * day : 2000 * (day + 1)].mean((1, 2, 3)).argsort()


# stable-baselines3#537 (eval() in collect_rollouts), tianshou#773 (batch norm of one
# state), HOPE#10 (actor_net.eval() would be necessary)
@bug(
    "DLR-RM/stable-baselines3#537, thu-ml/tianshou#773, jiamiya/HOPE#10",
    *("D05", "D09", "D01", "D02"),
)
def agent_that_acts_in_training_mode(is_bad: bool) -> Run:
    """Let a Q-network with batch norms choose moves in training mode, one by one.

    First: batches of one state go into the statistics.
    Cost: 95.5 % of best moves in place of 99.8 %, a loss of 0.31 in place of 0.20.
    """
    agent = Agent(is_bad=is_bad)
    states, rewards = grids(4000, 1)
    order = torch.cat([by_hour(states, 0), 2000 + by_hour(states, 1)])
    states, rewards = states[order], rewards[order]
    with watch(agent.q_network, agent.optimizer, every=5) as seen:
        for step, (state, brings) in enumerate(zip(states, rewards, strict=True)):
            move = agent.act(state, max(0.1, 1 - step / 1500))
            agent.memory.append((state, move, float(brings[move])))
            if step >= 64 and step % 4 == 0:
                seen.log(loss=agent.learn())
    agent.q_network.eval()
    held = loader(grids(512, 2), shuffle=False)
    return Run(agent.q_network, list(held), seen.findings(), F.mse_loss)


class Predictor:
    """Answers for images as they come from a camera, 0 to 255 and channels last."""

    def __init__(self, model: nn.Module, *, is_bad: bool) -> None:
        self.model, self.is_bad = model.eval(), is_bad

    def prepare(self, frames: Tensor) -> Tensor:
        """Return what the network is given."""
        x = frames.permute(0, 3, 1, 2).float()
        return x if self.is_bad else x / 255.0


# dubai-satellite-imagery-segmentation#3 (I did not normalize the input), SfmLearner#73
# (run_inference has no / 255), automl#872
@bug(
    "ayushdabra/dubai-satellite-imagery-segmentation#3, "
    "ClementPinard/SfmLearner-Pytorch#73, google/automl#872",
    *("D01", "D02", "D28"),
)
def camera_frames_not_divided_by_255(is_bad: bool) -> Run:
    """Train on images from 0 to 1, and predict for frames of a camera as they are.

    First: running statistics are not those of these inputs.
    Cost: 81 % in place of 100 %, a loss of 67 in place of 0.01; with the seed 1 95 %
    and 7.8.
    """
    model = VGG(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=192)
    with watch(model, optimizer, every=5) as seen:
        for _ in range(6):
            for x, y in loader(fabrics(1024, 1)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                seen.log(loss=loss.item())
    predictor = Predictor(model, is_bad=is_bad)
    x, y = fabrics(512, 2)
    frames = (255 * x).round().byte().permute(0, 2, 3, 1)
    held = loader((predictor.prepare(frames), y), shuffle=False)
    return Run(predictor.model, list(held), seen.findings())


def update_ema_variables(
    student: nn.Module, teacher: nn.Module, alpha: float, *, is_bad: bool
) -> None:
    """Move a teacher towards its student."""
    with torch.no_grad():
        for ema, p in zip(teacher.parameters(), student.parameters(), strict=True):
            ema.mul_(alpha).add_(p, alpha=1 - alpha)
        if not is_bad:
            for ema, b in zip(teacher.buffers(), student.buffers(), strict=True):
                ema.copy_(b)


# mean-teacher#9 (only parameters are updated), sesemi#36 (statistics remain unchanged),
# moco#70 (the average has poor performance)
@bug(
    "CuriousAI/mean-teacher#9, FlyreelAI/sesemi#36, facebookresearch/moco#70",
    *("D31", "D32", "D03", "D01"),
)
def mean_teacher_of_parameters_alone(is_bad: bool) -> Run:
    """Average the parameters of a student into a teacher, which is in eval mode.

    First: the teacher's statistics are not those of its weights, but initial values.
    Cost: 46 % in place of 100 %, a loss of 1.78 in place of 0.07.
    """
    student = VGG(6)
    teacher = copy.deepcopy(student).eval()
    for p in teacher.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    labelled, unlabelled = fabrics(512, 1), fabrics(512, 3)
    with watch(student, optimizer, every=5) as seen:
        for epoch in range(8):
            pairs = zip(loader(labelled), loader(unlabelled), strict=True)
            for (x, y), (u, _) in pairs:
                scores = student(torch.cat([x, u + 0.1 * torch.randn_like(u)]))
                with torch.no_grad():
                    wanted = teacher(u).softmax(1)
                weight = 0.5 * min(1.0, epoch / 4)
                loss = F.cross_entropy(scores[:32], y)
                agreement = F.mse_loss(scores[32:].softmax(1), wanted)
                loss = loss + weight * agreement
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                update_ema_variables(student, teacher, 0.97, is_bad=is_bad)
                seen.log(loss=loss.item())
    held = loader(fabrics(512, 2), shuffle=False)
    return Run(teacher, list(held), seen.findings())
