"""Healthy generative, contrastive and taught models, episodes and reinforcement."""

from __future__ import annotations

import copy
import math
from collections import deque

import torch
from quiet_base import Subject, Training, digits, program, shuffled, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Data = tuple[Tensor, Tensor]


def _moons(n: int) -> Tensor:
    from sklearn.datasets import make_moons

    x, _ = make_moons(n, noise=0.05, random_state=5)
    x = torch.tensor(x).float()
    return (x - x.mean(0)) / x.std(0)


class _VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(64, 96), nn.BatchNorm1d(96), nn.LeakyReLU(0.1), nn.Linear(96, 16)
        )
        self.decode = nn.Sequential(
            nn.Linear(8, 96), nn.BatchNorm1d(96), nn.LeakyReLU(0.1), nn.Linear(96, 64)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decode(z), mean, log_var


@program
def vae() -> Training:
    """VAE with batch norm, 8 latents, Bernoulli digits, Adam, batch 100.

    Negative ELBO of 23 nats, where independent pixels have 27.
    """
    train, test = digits()
    train, test = ((d[0].flatten(1), d[0].flatten(1)) for d in (train, test))
    model = _VAE()

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        logits, mean, log_var = out
        fit = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        divergence = (mean.square() + log_var.exp() - 1 - log_var).sum() / 2
        return (fit + divergence) / len(x)

    def gained(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            return -float(loss_fn(net(data[0]), data[1]))

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=100, steps=350,
        goal=-25.0, loss_fn=loss_fn, score=gained,
    )  # fmt: skip


class _Denoiser(nn.Module):
    """Noise of a point at time t in [0, 1]; sines of t shift each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, 64), nn.Linear(64, 2)
        self.time = nn.Sequential(nn.Linear(16, 64), nn.SiLU())
        self.norms = nn.ModuleList(
            nn.LayerNorm(64, elementwise_affine=False) for _ in range(3)
        )
        self.shifts = nn.ModuleList(nn.Linear(64, 128) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        for shift in self.shifts:
            assert isinstance(shift, nn.Linear)
            nn.init.zeros_(shift.weight)
            nn.init.zeros_(shift.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * 2 ** torch.arange(8.0) * math.pi
        time = self.time(torch.cat((angle.sin(), angle.cos()), 1))
        y = self.enter(x)
        for norm, shift, layer in zip(
            self.norms, self.shifts, self.layers, strict=True
        ):
            gain, bias = shift(time).chunk(2, 1)
            y = y + layer(F.silu(norm(y) * (1 + gain) + bias))
        return self.leave(y)


@program
def diffusion() -> Training:
    """DDPM of two moons, adaptive layer norm that starts at 0 (DiT), Adam.

    Batch 128: noise predicted to MSE 0.42, where 0 has 1.
    """
    data = _moons(4000)

    def noisy(x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        kept = torch.cos(t * math.pi / 2)[:, None] * 0.998 + 0.001
        return (kept * x + (1 - kept**2).sqrt() * noise, t), noise

    model = _Denoiser()

    def close(net: nn.Module, test: tuple[tuple[Tensor, Tensor], Tensor]) -> float:
        with torch.no_grad():
            return -float(F.mse_loss(net(*test[0]), test[1]))

    inputs = (data[:3500], torch.zeros(3500))
    return supervised(
        model, (inputs, inputs[0]), noisy(data[3500:]),
        optim.Adam(model.parameters(), 2e-3), size=128, steps=600,
        goal=-0.5, loss_fn=F.mse_loss, score=close,
        change=lambda batch: noisy(batch[0][0]),
    )  # fmt: skip


def _ring(n: int) -> Tensor:
    angle = torch.randint(8, (n,)) * math.pi / 4
    centres = 2 * torch.stack((angle.cos(), angle.sin()), 1)
    return centres + 0.15 * torch.randn(n, 2)


@program
def gan_spectral_norm() -> Training:
    """Hinge GAN on a ring of 8 Gaussians, spectral norm in D, batch norm in G.

    Adam(0.5, 0.9), batch 128: 68 % of the samples within 0.6 of one of at least 6
    centres.
    """
    spectral = nn.utils.parametrizations.spectral_norm
    critic = nn.Sequential(
        spectral(nn.Linear(2, 64)), nn.LeakyReLU(0.2),
        spectral(nn.Linear(64, 64)), nn.LeakyReLU(0.2), spectral(nn.Linear(64, 1)),
    )  # fmt: skip
    maker = nn.Sequential(
        nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip
    critic_adam = optim.Adam(critic.parameters(), 2e-3, betas=(0.5, 0.9))
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.9))

    def hinge(scores: Tensor, sign: Tensor) -> Tensor:
        return F.relu(1 - sign * scores).mean()

    def step(_: int) -> float:
        critic.train()
        maker.train()
        for _ in range(2):
            with torch.no_grad():
                fake = maker(torch.randn(128, 8))
            critic_adam.zero_grad()
            loss = (
                F.relu(1 - critic(_ring(128))).mean() + F.relu(1 + critic(fake)).mean()
            )
            loss.backward()
            critic_adam.step()
        maker_adam.zero_grad()
        loss = -critic(maker(torch.randn(128, 8))).mean()
        loss.backward()
        maker_adam.step()
        return float(loss.detach())

    def critic_batches() -> list[Data]:
        sign = torch.cat((torch.ones(128, 1), -torch.ones(128, 1)))
        with torch.no_grad():
            fakes = [
                copy.deepcopy(maker).train()(torch.randn(128, 8)) for _ in range(10)
            ]
        return [(torch.cat((_ring(128), fake)), sign) for fake in fakes]

    def judge(fake: Tensor, _: Tensor) -> Tensor:
        return -critic(fake).mean()

    def score() -> float:
        with torch.no_grad():
            x = maker.eval()(torch.randn(2000, 8))
        angle = torch.arange(8) * math.pi / 4
        away = torch.cdist(x, 2 * torch.stack((angle.cos(), angle.sin()), 1))
        near, which = away.min(1)
        counts = torch.bincount(which[near < 0.6], minlength=8)
        return float((near < 0.6).float().mean()) if (counts > 40).sum() >= 6 else 0.0

    noise = lambda: [(torch.randn(128, 8), torch.zeros(128)) for _ in range(10)]  # noqa: E731
    return Training(
        [
            Subject(critic, critic_batches, hinge, critic_adam, name="critic"),
            Subject(maker, noise, judge, maker_adam, name="generator"),
        ],
        step, 450, score, 0.5,
    )  # fmt: skip


class _Flow(nn.Module):
    """RealNVP of six couplings; returns log-densities under a standard normal."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(1, 48),
                nn.ReLU(),
                nn.Linear(48, 48),
                nn.ReLU(),
                nn.Linear(48, 2),
            )
            for _ in range(6)
        )
        for net in self.nets:
            assert isinstance(net, nn.Sequential)
            last = net[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :1], x[:, 1:]
        total = torch.zeros(len(x))
        for net in self.nets:
            scale, shift = net(a).chunk(2, 1)
            scale = 2 * torch.tanh(scale / 2)
            a, b = b * scale.exp() + shift, a
            total = total + scale[:, 0]
        z = torch.cat((a, b), 1)
        return total - z.square().sum(1) / 2 - math.log(2 * math.pi)


@program
def normalizing_flow() -> Training:
    """RealNVP on two moons, couplings that start as the identity, Adam, clipped.

    Batch 200: 1.3 nats a point, where a Gaussian has 2.6.
    """
    data = _moons(4000)
    train, test = (data[:3500], data[:3500]), (data[3500:], data[3500:])
    model = _Flow()

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        return -out.mean()

    def gained(net: nn.Module, test: Data) -> float:
        with torch.no_grad():
            return float(net.eval()(test[0]).mean())

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 2e-3), size=200, steps=500,
        goal=-1.9, loss_fn=loss_fn, score=gained, clip=5.0,
    )  # fmt: skip


def _views(x: Tensor) -> Tensor:
    """Return images shifted by up to a pixel, scaled in brightness, with noise."""
    padded = F.pad(x, (1, 1, 1, 1))
    n = len(x)
    row, column = torch.randint(3, (n, 1)), torch.randint(3, (n, 1))
    rows, columns = row + torch.arange(8), column + torch.arange(8)
    index = torch.arange(n)[:, None, None]
    moved = padded[index, 0, rows[:, :, None], columns[:, None, :]][:, None]
    return moved * (0.7 + 0.6 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn_like(x)


def _nearest(body: nn.Module) -> float:
    """Return the accuracy of the nearest of 5 neighbours among the training digits."""
    (x, y), (a, b) = digits()
    body.eval()
    with torch.no_grad():
        known, new = F.normalize(body(x), dim=1), F.normalize(body(a), dim=1)
    votes = y[(new @ known.T).topk(5, 1).indices]
    return float((votes.mode(1).values == b).float().mean())


def _body(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    def part(i: int, o: int, stride: int) -> list[nn.Module]:
        layer = norm(8, o) if norm is nn.GroupNorm else norm(o)
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), layer, nn.ReLU()]

    return nn.Sequential(
        *part(1, 24, 1), *part(24, 48, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


@program
def simclr() -> Training:
    """SimCLR (NT-Xent, temperature 0.2), batch norm in body and head, AdamW.

    128 pairs: nearest neighbours 97 %.
    """
    (x, _), _ = digits()
    body = _body()
    head = nn.Sequential(
        nn.Linear(192, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 32)
    )
    model = nn.Sequential(body, head)

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        z, n = F.normalize(out, dim=1), len(out) // 2
        near = z @ z.T / 0.2
        near = near.masked_fill(torch.eye(2 * n).bool(), -math.inf)
        return F.cross_entropy(near, (torch.arange(2 * n) + n) % (2 * n))

    def pairs(batch: Data) -> Data:
        return torch.cat((_views(batch[0]), _views(batch[0]))), batch[1].repeat(2)

    data = (x, torch.zeros(len(x)))
    return supervised(
        model, data, data, optim.AdamW(model.parameters(), 2e-3), size=128, steps=110,
        goal=0.92, loss_fn=loss_fn, score=lambda *_: _nearest(body), change=pairs,
    )  # fmt: skip


@program
def momentum_contrast() -> Training:
    """MoCo: InfoNCE against a queue of 512 keys of an EMA encoder.

    Group norm, so that nothing leaks in a batch, SGD, batch 64: nearest neighbours
    93 %.
    """
    (x, y), _ = digits()
    encoder = nn.Sequential(_body(nn.GroupNorm), nn.Linear(192, 64))
    keys_of = copy.deepcopy(encoder).requires_grad_(False)
    queue = F.normalize(torch.randn(512, 64), dim=1)
    optimizer = optim.SGD(encoder.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def loss_fn(out: Tensor, key: Tensor) -> Tensor:
        q = F.normalize(out, dim=1)
        near = torch.cat(((q * key).sum(1, keepdim=True), q @ queue.T), 1)
        return F.cross_entropy(near / 0.15, torch.zeros(len(q), dtype=torch.long))

    def batches() -> list[Data]:
        epoch = [b[0] for b in shuffled((x, y), 64)]
        with torch.no_grad():
            return [(_views(b), F.normalize(keys_of(_views(b)), dim=1)) for b in epoch]

    waiting: deque[Tensor] = deque()

    def step(_: int) -> float:
        nonlocal queue
        if not waiting:
            waiting.extend(b[0] for b in shuffled((x, y), 64))
        image = waiting.popleft()
        with torch.no_grad():
            for mine, its in zip(
                keys_of.parameters(), encoder.parameters(), strict=True
            ):
                mine.lerp_(its, 0.01)
            key = F.normalize(keys_of(_views(image)), dim=1)
        encoder.train()
        optimizer.zero_grad()
        loss = loss_fn(encoder(_views(image)), key)
        loss.backward()
        optimizer.step()
        queue = torch.cat((key, queue))[:512]
        return float(loss.detach())

    return Training(
        [Subject(encoder, batches, loss_fn, optimizer)],
        step, 300, lambda: _nearest(encoder[0]), 0.88,
    )  # fmt: skip


@program
def distillation() -> Training:
    """Distillation of a trained teacher into a small BN student (KL, T = 4).

    Labels too, Adam, batch 64, 98 %.
    """
    train, test = digits()
    teacher = nn.Sequential(_body(), nn.Linear(192, 10))
    adam = optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(6):
        for x, y in shuffled(train, 64):
            adam.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            adam.step()
    teacher.eval().requires_grad_(False)
    student = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip

    def loss_fn(out: Tensor, targets: Tensor) -> Tensor:
        logits, y = targets[:, :-1], targets[:, -1].long()
        soft = F.kl_div(
            (out / 4).log_softmax(1), (logits / 4).softmax(1), reduction="batchmean"
        )
        return 0.7 * 16 * soft + 0.3 * F.cross_entropy(out, y)

    def taught(data: Data) -> Data:
        with torch.no_grad():
            return data[0], torch.cat((teacher(data[0]), data[1][:, None].float()), 1)

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0]).argmax(1)
        return float((said == data[1]).float().mean())

    return supervised(
        student, taught(train), test, optim.Adam(student.parameters(), 5e-3), size=64,
        steps=350, goal=0.93, loss_fn=loss_fn, score=right,
    )  # fmt: skip


@program
def triplets() -> Training:
    """Siamese triplets on the unit sphere, margin 0.3, layer norm, Adam.

    64 triplets: nearest neighbours 98 %.
    """
    (x, y), (a, b) = digits()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(),
        nn.Linear(128, 32),
    )  # fmt: skip
    groups = [(y == k).nonzero()[:, 0] for k in range(10)]

    def mined(batch: Data) -> Data:
        anchor, label = batch
        own = [groups[k][torch.randint(len(groups[k]), ())] for k in label.tolist()]
        other = (label + torch.randint(1, 10, label.shape)) % 10
        far = [groups[k][torch.randint(len(groups[k]), ())] for k in other.tolist()]
        return torch.cat((anchor, x[torch.stack(own)], x[torch.stack(far)])), label

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        anchor, near, far = F.normalize(out, dim=1).chunk(3)
        return F.triplet_margin_loss(anchor, near, far, margin=0.3)

    return supervised(
        model, (x, y), (a, b), optim.Adam(model.parameters(), 1e-3), size=64, steps=400,
        goal=0.94, loss_fn=loss_fn, score=lambda net, _: _nearest(net), change=mined,
    )  # fmt: skip


@program
def prototypes() -> Training:
    """Prototypical networks: 4 classes, 5 shots, 10 queries of digits 0–6.

    BN body, Adam: 90 % on episodes of the unseen digits 7–9 (chance 33 %).
    """
    (x, y), _ = digits()
    groups = [x[y == k] for k in range(10)]
    model = _body()
    optimizer = optim.Adam(model.parameters(), 2e-3)

    def episode(classes: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for k in classes.tolist():
            order = torch.randperm(len(groups[k]))[:15]
            parts.append(groups[k][order])
        return torch.cat(parts), torch.arange(len(parts)).repeat_interleave(10)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(distances(out), y)

    def distances(out: Tensor) -> Tensor:
        points = F.layer_norm(out, (192,)).view(-1, 15, 192)
        centres, queries = points[:, :5].mean(1), points[:, 5:].flatten(0, 1)
        return -torch.cdist(queries, centres).square() / 20

    def step(_: int) -> float:
        model.train()
        images, target = episode(torch.randperm(7)[:4])
        optimizer.zero_grad()
        loss = loss_fn(model(images), target)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def unseen() -> float:
        model.eval()
        right = []
        for _ in range(30):
            images, target = episode(torch.arange(7, 10))
            with torch.no_grad():
                said = distances(model(images)).argmax(1)
            right.append(float((said == target).float().mean()))
        return sum(right) / len(right)

    def batches() -> list[Data]:
        return [episode(torch.randperm(7)[:4]) for _ in range(20)]

    return Training(
        [Subject(model, batches, loss_fn, optimizer)], step, 200, unseen, 0.8
    )


@program
def mean_teacher() -> Training:
    """Mean teacher: 100 labels, 1300 images without.

    The EMA teacher averages its buffers too; BN, dropout, Adam, batch 20 + 60 in
    one pass: the teacher has 90 %.
    """
    (x, y), (a, b) = digits()
    student = nn.Sequential(_body(), nn.Dropout(0.1), nn.Linear(192, 10))
    teacher = AveragedModel(
        student, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True
    )
    optimizer = optim.Adam(student.parameters(), 3e-3)
    few = (x[:100], y[:100])
    taken = 0

    def mixed() -> Data:
        part = torch.randint(100, (20,))
        more = x[torch.randint(100, 1400, (60,))]
        with torch.no_grad():
            soft = teacher.eval()(_views(more)).softmax(1)
        first = F.one_hot(few[1][part], 10).float()
        return torch.cat((_views(few[0][part]), _views(more))), torch.cat((first, soft))

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        own = F.cross_entropy(out[:20], target[:20])
        same = (out[20:].softmax(1) - target[20:]).square().sum(1).mean()
        return own + min(1.0, taken / 100) * same

    def step(_: int) -> float:
        nonlocal taken
        taken += 1
        images, target = mixed()
        student.train()
        optimizer.zero_grad()
        loss = loss_fn(student(images), target)
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)
        return float(loss.detach())

    def score() -> float:
        with torch.no_grad():
            return float((teacher.eval()(a).argmax(1) == b).float().mean())

    return Training(
        [
            Subject(student, lambda: [mixed() for _ in range(20)], loss_fn, optimizer),
            Subject(
                teacher, lambda: shuffled((_views(x), y), 80), F.cross_entropy,
                name="teacher", only_at_the_end=True,
            ),
        ],
        step, 450, score, 0.86,
    )  # fmt: skip


def _walked(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step on a 5 × 5 grid; return places, rewards, and who has arrived."""
    moves = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])
    place = (place + moves[action]).clamp(0, 4)
    done = (place == 4).all(1)
    return place, torch.where(done, 1.0, -0.02), done


def _mean_return(choose: nn.Module, see: object) -> float:
    """Return the mean return of greedy walks from every cell, 20 steps at most."""
    place = torch.cartesian_prod(torch.arange(5), torch.arange(5))[:-1]
    total, live = torch.zeros(len(place)), torch.ones(len(place)).bool()
    choose.eval()
    for _ in range(20):
        with torch.no_grad():
            action = choose(see(place)).argmax(1)  # type: ignore[operator]
        place, reward, done = _walked(place, action)
        total += reward * live
        live &= ~done
    return float(total.mean())


@program
def policy_gradient() -> Training:
    """REINFORCE with a mean baseline and an entropy bonus on a 5 × 5 grid.

    One-hot cells, Adam, 24 walks a step: return 0.93 of 0.94.
    """
    model = nn.Sequential(nn.Linear(25, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = optim.Adam(model.parameters(), 5e-3)

    def see(place: Tensor) -> Tensor:
        return F.one_hot(place[:, 0] * 5 + place[:, 1], 25).float()

    def walks() -> Data:
        place = torch.randint(5, (24, 2))
        place[(place == 4).all(1)] = 0
        live = torch.ones(24).bool()
        seen, taken, rewards, lived = [], [], [], []
        for _ in range(16):
            with torch.no_grad():
                action = torch.multinomial(model(see(place)).softmax(1), 1)[:, 0]
            seen.append(see(place))
            taken.append(action)
            lived.append(live)
            place, reward, done = _walked(place, action)
            rewards.append(reward * live)
            live = live & ~done
        gain = torch.stack(rewards)
        for t in range(14, -1, -1):
            gain[t] += 0.97 * gain[t + 1]
        keep = torch.stack(lived).flatten()
        gain = gain.flatten()[keep]
        gain = (gain - gain.mean()) / (gain.std() + 1e-6)
        action = torch.stack(taken).flatten()[keep]
        return torch.cat(seen)[keep], torch.stack((action.float(), gain), 1)

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        log_p = out.log_softmax(1)
        chosen = log_p.gather(1, target[:, :1].long())[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        return -(chosen * target[:, 1]).mean() - 0.01 * entropy

    def step(_: int) -> float:
        states, target = walks()
        model.train()
        optimizer.zero_grad()
        loss = loss_fn(model(states), target)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    subject = Subject(model, lambda: [walks() for _ in range(10)], loss_fn, optimizer)
    return Training([subject], step, 300, lambda: _mean_return(model, see), 0.75)


@program
def deep_q() -> Training:
    """Double DQN on the grid, two inputs (row, column), replay.

    Target network copied every 50 steps, Huber loss, RMSprop, batch 64: return 0.93
    of 0.94.
    """
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = optim.RMSprop(model.parameters(), 1e-3, alpha=0.95)

    def see(place: Tensor) -> Tensor:
        return place.float() / 2 - 1

    memory: deque[tuple[Tensor, ...]] = deque(maxlen=200)
    place = torch.randint(4, (16, 2))
    steps_left = torch.full((16,), 20)

    def act(greed: float) -> None:
        nonlocal place, steps_left
        with torch.no_grad():
            best = model(see(place)).argmax(1)
        action = torch.where(torch.rand(16) < greed, best, torch.randint(4, (16,)))
        new, reward, done = _walked(place, action)
        memory.append((place, action, reward, new, done))
        steps_left = steps_left - 1
        again = done | (steps_left == 0)
        place = torch.where(again[:, None], torch.randint(4, (16, 2)), new)
        steps_left = torch.where(again, 20, steps_left)

    for _ in range(30):
        act(0.0)

    def drawn() -> Data:
        old, action, reward, new, done = (
            torch.cat([m[k] for m in memory]) for k in range(5)
        )
        part = torch.randint(len(old), (64,))
        with torch.no_grad():
            best = model(see(new[part])).argmax(1, keepdim=True)
            later = target(see(new[part])).gather(1, best)[:, 0]
        value = reward[part] + 0.95 * later * ~done[part]
        return see(old[part]), torch.stack((action[part].float(), value), 1)

    def loss_fn(out: Tensor, wanted: Tensor) -> Tensor:
        chosen = out.gather(1, wanted[:, :1].long())[:, 0]
        return F.smooth_l1_loss(chosen, wanted[:, 1])

    def step(i: int) -> float:
        model.train()
        act(min(0.9, i / 400))
        states, wanted = drawn()
        optimizer.zero_grad()
        loss = loss_fn(model(states), wanted)
        loss.backward()
        optimizer.step()
        if i % 50 == 49:
            target.load_state_dict(model.state_dict())
        return float(loss.detach())

    subject = Subject(model, lambda: [drawn() for _ in range(20)], loss_fn, optimizer)
    return Training([subject], step, 1200, lambda: _mean_return(model, see), 0.75)
