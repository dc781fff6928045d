"""Networks of the fifth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ActNorm",
    "Attentive",
    "Branch",
    "Encoder",
    "Flow",
    "FrozenBatchNorm2d",
    "OffsetNorm",
    "RMSNorm",
    "Reader",
    "Siamese",
    "Slim",
    "Stochastic",
    "UNet",
    "Uncertain",
    "Variational",
]


class UNet(nn.Module):
    """Two levels down, two levels up, and skips between them."""

    def __init__(self, momentum: float | None, width: int = 6) -> None:
        super().__init__()

        def double(fan_in: int, fan_out: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (fan_in, fan_out):
                layers.append(nn.Conv2d(channels, fan_out, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(fan_out, momentum=momentum), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down1, self.down2 = double(1, width), double(width, 2 * width)
        self.middle = double(2 * width, 4 * width)
        self.up2 = double(6 * width, 2 * width)
        self.up1 = double(3 * width, width)
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of two classes (N, 2, H, W) for each pixel."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.middle(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([F.interpolate(low, scale_factor=2), two], 1))
        one = self.up1(torch.cat([F.interpolate(two, scale_factor=2), one], 1))
        return self.last(one)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and scales come from a checkpoint."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the constant map of each channel."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Branch(nn.Module):
    """A residual block with norms that can be left out, drawn as He et al. do."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), norm(width)),
        )
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Add what the branch makes of x."""
        return x + self.body(x)


class Stochastic(nn.Module):
    """A block over time whose branch is left out for some samples in training."""

    def __init__(self, width: int, *, is_scaled: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1)),
            *(nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1)),
        )
        self.is_scaled = is_scaled

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch, for three samples of ten in training."""
        h = self.body(x)
        if self.training:
            h = h * (torch.rand(len(x), 1, 1) < 0.3)
            if self.is_scaled:
                h = h / 0.3
        return x + h


class Uncertain(nn.Module):
    """A classifier that answers with the mean of ten passes under dropout."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in in (30, 48, 48):
            layers.append(nn.Linear(fan_in, 48))
            layers += [nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3)]
        self.body = nn.Sequential(*layers, nn.Linear(48, 2))
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Scores; in eval mode the logarithm of a mean probability."""
        if self.training:
            return self.body(x)
        for layer in self.body:
            if self.is_bad or isinstance(layer, nn.Dropout):
                layer.train()
        mean = torch.stack([self.body(x).softmax(1) for _ in range(10)]).mean(0)
        self.body.eval()
        return mean.log()


class ActNorm(nn.Module):
    """A scale and a shift per feature, chosen by the first batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; its log-determinant is the sum of `log_scale`."""
        if not self.is_set:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.log_scale.copy_(-(x.std(0) + 1e-3).log())
                self.is_set.fill_(True)
        return (x + self.shift) * self.log_scale.exp()


class Flow(nn.Module):
    """A normalizing flow of four affine couplings over the rows of a table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, self.kept = width - width // 2, width // 2
        self.norms = nn.ModuleList(ActNorm(width) for _ in range(4))
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(self.kept, 32), nn.ReLU(), nn.Linear(32, 2 * half))
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Log-density of each row, without its constant."""
        total = x.new_zeros(len(x))
        for norm, net in zip(self.norms, self.nets, strict=True):
            x = norm(x)
            kept, other = x[:, : self.kept], x[:, self.kept :]
            log_scale, shift = net(kept).chunk(2, 1)
            log_scale = log_scale.tanh()
            x = torch.cat([other * log_scale.exp() + shift, kept], 1)
            total = total + norm.log_scale.sum() + log_scale.sum(1)
        return total - x.pow(2).sum(1) / 2


class RMSNorm(nn.Module):
    """Root mean square norm, in the type it is told to compute in."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = nn.Parameter(torch.ones(width)), dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        h = x.to(self.dtype)
        mean_square = h.pow(2).sum(-1, keepdim=True) / h.shape[-1]
        return (h * (mean_square + 1e-5).rsqrt()).to(x.dtype) * self.weight


class Encoder(nn.Module):
    """A transformer of two pre-norm blocks over tokens, and a mean over them."""

    def __init__(self, width: int, norm: Any, *, scale: float = 1.0) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(30, width), scale
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(5))
        self.last = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of two classes; token 0 is padding."""
        is_empty = tokens == 0
        x = self.embed(tokens) * self.scale
        for index in range(2):
            h = self.norms[2 * index](x)
            found, _ = self.attention[index](h, h, h, key_padding_mask=is_empty)
            x = x + found
            x = x + self.mlps[index](self.norms[2 * index + 1](x))
        x = self.norms[4](x).masked_fill(is_empty[..., None], 0.0)
        return self.last(x.sum(1) / (~is_empty).sum(1, keepdim=True))


class Slim(nn.Module):
    """Convolutions of which a part of the channels can run alone."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(1 if i == 0 else 24, 24, 3, padding=1, bias=False)
            for i in range(3)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(c) for c in ([24] if is_bad else [24, 6]))
            for _ in range(3)
        )
        self.last, self.channels = nn.Linear(24 * 4, 10), 24

    def forward(self, x: Tensor) -> Tensor:
        """Scores by the first `channels` channels."""
        c = self.channels
        for conv, norms in zip(self.convs, self.norms, strict=True):
            x = F.conv2d(x, conv.weight[:c, : x.shape[1]], padding=1)
            norm = norms[-1 if c < 24 else 0]
            missing = norm.num_features - c
            x = norm(F.pad(x, (0, 0, 0, 0, 0, missing)))[:, :c].relu()
        return F.linear(
            F.adaptive_avg_pool2d(x, 2).flatten(1),
            self.last.weight[:, : 4 * c],
            self.last.bias,
        )


class OffsetNorm(nn.RMSNorm):
    """Root mean square norm that keeps its scales less one, as Gemma does."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class Reader(nn.Module):
    """An LSTM over tokens whose state at the end is classified."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.last, self.is_bad = nn.Linear(32, 2), is_bad

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of sequences (N, L) with zeros at their ends."""
        states, _ = self.lstm(self.embed(tokens))
        if self.is_bad:
            return self.last(states[:, -1])
        end = (tokens != 0).sum(1) - 1
        return self.last(states[torch.arange(len(tokens)), end])


class Variational(nn.Module):
    """A variational autoencoder of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(128, 16)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(8, 128), nn.ReLU(), nn.Unflatten(1, (32, 2, 2))),
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU()),
            nn.ConvTranspose2d(16, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the picture, and mean and log-variance of its code."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        code = mean
        if self.training:
            code = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_var


class Attentive(nn.Module):
    """One block of hand-written attention over tokens."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(30, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.last, self.is_bad = nn.Linear(width, 2), is_bad

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores; token 0 is padding, and a sentence may have no other."""
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        is_empty = tokens == 0
        if not self.is_bad:
            # A sentence of nothing reads its first place.
            is_empty = is_empty & ~(is_empty.all(1, keepdim=True))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        weights = logits.masked_fill(is_empty[:, None], float("-inf")).softmax(-1)
        x = x + self.out(weights @ v)
        kept = (tokens != 0).float()[..., None]
        return self.last((x * kept).sum(1) / kept.sum(1).clamp(min=1))


class Siamese(nn.Module):
    """The distance of two digits, by one convolutional embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 16)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Distances of the pairs in x (N, 2, 8, 8)."""
        one, other = self.embed(x[:, :1]), self.embed(x[:, 1:])
        return ((one - other).pow(2).sum(1) + 1e-6).sqrt()
