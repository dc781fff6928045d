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
    """Return a classifier of 64 pixels with two batch norms."""
    layers: list[nn.Module] = []
    for inputs in (64, 128):
        layers += [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


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


def compared(seed: int) -> dict[str, float]:
    """Train on clean digits, then fine-tune on noisy ones, two in a batch."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    clean = [(x[i], y[i]) for i in torch.randperm(1000).split(50)]
    pretrained = network()
    train(pretrained, clean, epochs=8, rate=3e-3)

    x = x + 0.5 * torch.randn_like(x)
    # As little as fits with large models: of two values only their order remains.
    batches = [(x[i], y[i]) for i in torch.arange(1000, 1400).split(2)]
    free, frozen = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    normkit.convert(frozen, to="normkit")  # whose layers stay frozen under train()
    for layer in frozen.modules():
        if isinstance(layer, normkit.nn.BatchNorm1d):
            layer.freeze()
    train(free, batches, epochs=4, rate=1e-3)
    train(frozen, batches, epochs=4, rate=1e-3)
    models = {"before": pretrained, "batch statistics": free, "frozen": frozen}
    return {name: accuracy(m, x[1400:], y[1400:]) for name, m in models.items()}


def main(seeds: int = 5) -> dict[str, float]:
    """Average the accuracies over some seeds."""
    runs = [compared(seed) for seed in range(seeds)]
    found = {name: sum(run[name] for run in runs) / seeds for name in runs[0]}
    for name, value in found.items():
        print(f"{name}: accuracy {value:.1%}, mean of {seeds} seeds")
    return found


if __name__ == "__main__":
    main()
