"""Fine-tune on batches of four: batch norm as it is, and frozen.

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


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, size: int, epochs: int, rate: float
) -> None:
    """Train on shuffled batches of `size`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(y)).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in eval mode."""
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> dict[str, float]:
    """Train on digits 0 to 4, then fine-tune on a few of all ten."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    early = (y < 5).nonzero().flatten()
    pretrained = network()
    train(pretrained, x[early], y[early], size=64, epochs=8, rate=0.05)

    tuned, held_out = slice(0, 200), slice(200, None)
    free, frozen = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    print(normkit.convert(frozen, to="frozen"), "\n")
    found = {}
    for name, model in (("batch statistics", free), ("frozen", frozen)):
        torch.manual_seed(1)
        train(model, x[tuned], y[tuned], size=4, epochs=6, rate=0.003)
        found[name] = accuracy(model, x[held_out], y[held_out])
        print(f"{name}: accuracy {found[name]:.1%} after batches of 4")
    # Or keep batch statistics, and measure those of eval mode once at the end.
    normkit.calibrate(free, x[tuned].split(50))
    found["calibrated"] = accuracy(free, x[held_out], y[held_out])
    print(f"batch statistics, calibrated: accuracy {found['calibrated']:.1%}")
    return found


if __name__ == "__main__":
    main()
