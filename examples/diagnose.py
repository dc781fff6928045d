"""A network that is right in training and wrong in eval: find the cause and fix it.

python examples/diagnose.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit


def batches(images: torch.Tensor, labels: torch.Tensor) -> list:
    """Cut digits into batches of 64, shuffled."""
    order = torch.randperm(len(labels))
    return [(images[i], labels[i]) for i in order.split(64)]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of digits that are recognized in eval mode."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main() -> dict[str, object]:
    """Train with a momentum from Keras, diagnose, repair."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32) / 16
    labels = torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)

    # Keras counts a momentum of 0.999 for the old value; torch's is for the new one,
    # and 0.001 moves too slowly for so short a training.
    momentum = 0.001
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.BatchNorm1d(128, momentum=momentum),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.BatchNorm1d(128, momentum=momentum),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for _ in range(5):
        for x, y in batches(images[train], labels[train]):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    broken = accuracy(model, images[test], labels[test])
    print(f"training loss {loss.item():.3f}, accuracy in eval {broken:.1%}\n")

    loader = batches(images[train], labels[train])
    diagnosis = normkit.diagnose(model, loader, F.cross_entropy)
    print(diagnosis.verdict(), "\n")
    repaired = diagnosis.repair()
    print(repaired, "\n")

    fixed = accuracy(model, images[test], labels[test])
    print(f"accuracy in eval {fixed:.1%}")
    return {"broken": broken, "fixed": fixed, "repaired": list(repaired)}


if __name__ == "__main__":
    main()
