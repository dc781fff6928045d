"""Fine-tune on batches of two: batch norm as it is, and frozen.

python examples/fine_tune.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import normkit


def network() -> nn.Sequential:
    """Return a CNN for 8 by 8 digits with three batch norms."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def train(model: nn.Module, batches: list, *, epochs: int, rate: float) -> None:
    """Train on the batches in a random order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(batches)).tolist():
            x, y = batches[index]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in eval mode."""
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> dict[str, float]:
    """Train on clean digits, then fine-tune on noisy ones, two in a batch."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    mixed = torch.randperm(1000).split(50)
    pretrained = network()
    train(pretrained, [(x[i], y[i]) for i in mixed], epochs=8, rate=3e-3)

    x = x + 0.3 * torch.randn_like(x)
    # What fits into memory with large pictures; a mean of two is mostly chance.
    batches = [(x[i], y[i]) for i in torch.arange(1000, 1400).split(2)]
    found = {"before": accuracy(pretrained, x[1400:], y[1400:])}
    free, frozen = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    normkit.convert(frozen, to="normkit")  # whose layers stay frozen under train()
    for layer in frozen.modules():
        if isinstance(layer, normkit.nn.BatchNorm2d):
            layer.freeze()
    for name, model in (("batch statistics", free), ("frozen", frozen)):
        torch.manual_seed(1)
        train(model, batches, epochs=4, rate=5e-4)
        found[name] = accuracy(model, x[1400:], y[1400:])
    for name, value in found.items():
        print(f"{name}: accuracy {value:.1%}")
    return found


if __name__ == "__main__":
    main()
