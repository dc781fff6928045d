"""Averaged weights need statistics of their own: stochastic weight averaging.

python examples/average_weights.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normkit


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in eval mode."""
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> dict[str, float]:
    """Train with an average beside the model, and calibrate the average."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    layers: list[nn.Module] = []
    for width in (64, 128, 128):
        layers += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))

    # Weights are averaged, buffers are those of the model as it was copied.
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(6):
        model.train()
        for i in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[train][i]), y[train][i]).backward()
            optimizer.step()
            averaged.update_parameters(model)

    found = {
        "last weights": accuracy(model, x[test], y[test]),
        "average, old statistics": accuracy(averaged, x[test], y[test]),
    }
    report = normkit.calibrate(averaged, x[train].split(64))
    print(report, "\n")
    found["average, calibrated"] = accuracy(averaged, x[test], y[test])
    for name, value in found.items():
        print(f"{name}: accuracy {value:.1%}")
    return found


if __name__ == "__main__":
    main()
