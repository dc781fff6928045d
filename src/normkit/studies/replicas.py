"""Many small networks trained at once: K multilayer perceptrons as batched matmuls.

The weights of a layer of all networks are one tensor `(K, in, out)`, the activations
`(K, batch, out)`, the statistics of batch norm one per network and unit. The networks
share their batches and nothing else: one that diverges to NaN does not affect the
others. A hundred networks cost about as much time as ten trained one by one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import normkit.nn
from normkit.functional import normalize, standardize
from normkit.functional.ema import ema_

__all__ = ["ACTIVATIONS", "Recipe", "Replicas", "stds_for"]

ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda x: x,
}

_MODULES = {
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "identity": torch.nn.Identity,
}


@dataclass(frozen=True)
class Recipe:
    """Settings that all networks of one batch share.

    Attributes:
        widths: Inputs, hidden widths, outputs.
        activation: A key of `ACTIVATIONS`.
        norm: Normalize the hidden layers: `"batch"`, `"layer"` or `""` for none.
        place: Normalize `"before"` or `"after"` the activation.
        affine: Learn a weight and a bias after normalizing.
        momentum: Share of the batch in the running statistics.
        eps: Added to the variance.
        noise: Standard deviation of a random scale and shift after each batch norm,
            drawn anew at every step; 0 for none.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    norm: str = ""
    place: str = "before"
    affine: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    noise: float = 0.0


class Replicas:
    """K networks of one recipe, each with its own weights and learning rate.

    Args:
        recipe: Settings that they share.
        stds: Standard deviation of the normal initial weights: `(K,)`, or one per
            network and layer, `(K, L)`. Biases start at 0.
        generator: Draws the weights. Networks of the same layer are scaled versions of
            the same draw when `paired`, so that arms differ in nothing else.
        paired: Start every network from the same draw.
        device: Device of the computation.

    Attributes:
        training: Use the statistics of the batch, and update the running ones.
        last_losses: The losses of the last step, before it, `(K,)`.
    """

    def __init__(
        self,
        recipe: Recipe,
        stds: Tensor,
        generator: torch.Generator,
        *,
        paired: bool = True,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        sizes = list(zip(recipe.widths[:-1], recipe.widths[1:], strict=True))
        scales = stds if stds.dim() == 2 else stds[:, None].expand(-1, len(sizes))
        self.count = len(scales)
        self.weights, self.biases = [], []
        self.gains, self.offsets = [], []
        self.running: list[tuple[Tensor, Tensor]] = []
        for layer, (before, after) in enumerate(sizes):
            copies = 1 if paired else self.count
            draw = torch.randn(copies, before, after, generator=generator)
            weight = (draw * scales[:, layer, None, None]).to(device)
            self.weights.append(weight.requires_grad_())
            self.biases.append(self._vector(after, 0.0, device))
            if layer < len(sizes) - 1 and recipe.norm:
                self.gains.append(self._vector(after, 1.0, device))
                self.offsets.append(self._vector(after, 0.0, device))
                zeros = torch.zeros(self.count, 1, after, device=device)
                self.running.append((zeros, torch.ones_like(zeros)))
        self.training = True
        self._held: Tensor | None = None
        self.last_losses = torch.full((self.count,), math.nan)
        self._noise = torch.Generator(device).manual_seed(
            int(torch.randint(2**31, (), generator=generator))
        )

    def _vector(self, size: int, value: float, device: str) -> Tensor:
        return torch.full((self.count, 1, size), value, device=device).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """Learned parameters, each `(K, …)`."""
        found = [*self.weights, *self.biases]
        return [*found, *self.gains, *self.offsets] if self.recipe.affine else found

    def __call__(
        self, x: Tensor, taps: list[Tensor] | None = None, *, inputs: bool = False
    ) -> Tensor:
        """Return the logits of all networks on the same inputs, `(K, batch, classes)`.

        Args:
            x: Inputs, `(batch, features)`.
            taps: List that receives the input of each activation, `(K, batch, width)`.
            inputs: `taps` receives the output of each linear map instead.
        """
        if self._held is not None:
            self._noise.set_state(self._held)
        h = x.expand(self.count, *x.shape)
        last = len(self.weights) - 1
        act = ACTIVATIONS[self.recipe.activation]
        for layer, (weight, bias) in enumerate(
            zip(self.weights, self.biases, strict=True)
        ):
            h = torch.baddbmm(bias, h, weight)
            if layer == last:
                break
            if taps is not None and inputs:
                taps.append(h)
            if self.recipe.place == "before":
                h = self._normalize(h, layer)
            if taps is not None and not inputs:
                taps.append(h)
            h = act(h)
            if self.recipe.place == "after":
                h = self._normalize(h, layer)
        return h

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of each network, `(K,)`."""
        logits = self(x)
        flat = F.cross_entropy(
            logits.flatten(0, 1), y.repeat(self.count), reduction="none"
        )
        return flat.view(self.count, -1).mean(1)

    def gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the gradients of each network's loss, in the order of `parameters`."""
        losses = self.losses(x, y)
        self.last_losses = losses.detach()
        # The networks share no parameter: the sum's gradient is each one's own.
        return list(torch.autograd.grad(losses.sum(), self.parameters))

    def step(self, x: Tensor, y: Tensor, rates: Tensor) -> list[Tensor]:
        """Take one step of gradient descent; return its gradients.

        `rates` has shape `(K,)`, or `(K, L)` with one rate per layer.
        """
        grads = self.gradients(x, y)
        layers = len(self.weights)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.parameters, grads, strict=True)):
                # weights, biases: L each; gains, offsets: L − 1 each.
                layer = (
                    i % layers if i < 2 * layers else (i - 2 * layers) % (layers - 1)
                )
                rate = rates if rates.dim() == 1 else rates[:, layer]
                p -= rate.view(-1, *[1] * (p.dim() - 1)) * g
        return grads

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> list[float]:
        """Return the share of right answers of each network in eval mode."""
        was, self.training = self.training, False
        hits = self(x).argmax(-1) == y
        self.training = was
        # NaN logits have argmax 0: a diverged network would answer "class 0".
        return hits.float().mean(1).tolist()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the running statistics to the exact ones of `x`, weights frozen."""
        recipe, was = self.recipe, self.training
        self.recipe, self.training = replace(recipe, momentum=1.0, noise=0.0), True
        self(x)
        self.recipe, self.training = recipe, was

    @contextlib.contextmanager
    def population(self, x: Tensor) -> Iterator[None]:
        """Use the exact running statistics of `x` within the block."""
        kept = [(mean.clone(), var.clone()) for mean, var in self.running]
        self.calibrate(x)
        try:
            yield
        finally:
            for (mean, var), (old_mean, old_var) in zip(
                self.running, kept, strict=True
            ):
                mean.copy_(old_mean)
                var.copy_(old_var)

    @contextlib.contextmanager
    def held_noise(self) -> Iterator[None]:
        """Draw the same noise of the recipe at every call within the block."""
        self._held = self._noise.get_state()
        try:
            yield
        finally:
            self._held = None

    def _normalize(self, h: Tensor, layer: int) -> Tensor:
        recipe = self.recipe
        if not recipe.norm:
            return h
        gain, offset = self.gains[layer], self.offsets[layer]
        if recipe.norm == "layer":
            y, _ = normalize(h, (2,), gain, offset, recipe.eps)
            return y
        mean, var = self.running[layer]
        if not self.training:
            return standardize(h, mean, var, gain, offset, recipe.eps)
        y, batch = normalize(h, (1,), gain, offset, recipe.eps)
        # Per network: one that diverged must not block the others' averages.
        allowed = batch.mean.isfinite() & batch.m2.isfinite()
        ema_(mean, batch.mean, recipe.momentum, allowed)
        ema_(var, batch.unbiased_var, recipe.momentum, allowed)
        if recipe.noise:
            shape = (self.count, 1, h.shape[-1])
            draw = (
                torch.randn(2, *shape, generator=self._noise, device=h.device)
                * recipe.noise
            )
            y = y * (1 + draw[0]) + draw[1]
        return y

    def module(self, index: int) -> torch.nn.Sequential:
        """Return network `index` on its own, made of the layers a user would write."""
        recipe = self.recipe
        layers: list[torch.nn.Module] = []
        last = len(self.weights) - 1
        for layer, weight in enumerate(self.weights):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data = weight[index].detach().T.clone()
            linear.bias.data = self.biases[layer][index, 0].detach().clone()
            layers.append(linear)
            if layer == last:
                break
            act = _MODULES[recipe.activation]()
            norm = self._norm_module(layer, index)
            pair = [norm, act] if recipe.place == "before" else [act, norm]
            layers += [m for m in pair if m is not None]
        return torch.nn.Sequential(*layers)

    def _norm_module(self, layer: int, index: int) -> torch.nn.Module | None:
        recipe = self.recipe
        if not recipe.norm:
            return None
        size = self.weights[layer].shape[2]
        if recipe.norm == "layer":
            norm: torch.nn.Module = normkit.nn.LayerNorm(size, recipe.eps)
        else:
            norm = normkit.nn.BatchNorm1d(size, recipe.eps, recipe.momentum)
            mean, var = self.running[layer]
            norm.running_mean.copy_(mean[index, 0])  # type: ignore[union-attr]
            norm.running_var.copy_(var[index, 0])  # type: ignore[union-attr]
        norm.weight.data = self.gains[layer][index, 0].detach().clone()  # type: ignore[union-attr]
        norm.bias.data = self.offsets[layer][index, 0].detach().clone()  # type: ignore[union-attr]
        return norm


def stds_for(widths: Sequence[int], gain: float) -> Tensor:
    """Return each layer's standard deviation for n·Var[w] = `gain`², `(L,)`."""
    return torch.tensor([gain / math.sqrt(n) for n in widths[:-1]])
