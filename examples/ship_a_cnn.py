"""Train a small CNN, measure its statistics on the data, fold them away, export.

python examples/ship_a_cnn.py [folded.pt2]
"""

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import normkit


def conv(inputs: int, outputs: int) -> nn.Sequential:
    """Return a convolution with its batch norm and activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def main(path: Path) -> dict[str, float]:
    """Train, calibrate, fold, export; compare the file with the model."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    model = nn.Sequential(
        conv(1, 16), conv(16, 32), nn.MaxPool2d(2), conv(32, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip

    # The same weights and names; norm and activation in one kernel while training.
    normkit.convert(model, to="normkit", example_inputs=images[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for i in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[train][i]), labels[train][i]).backward()
            optimizer.step()

    # Statistics of all training data under the last weights, not a moving average.
    report = normkit.calibrate(model, images[train].split(64))
    print(report, "\n")

    folded, ledger = normkit.fold(model.eval(), images[:2])
    print(ledger, "\n")
    torch.export.save(torch.export.export(folded, (images[test],)), path)

    shipped = torch.export.load(path).module()
    with torch.no_grad():
        off = float((shipped(images[test]) - model(images[test])).abs().max())
        right = shipped(images[test]).argmax(1) == labels[test]
    accuracy = float(right.float().mean())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    print(f"{path}: accuracy {accuracy:.1%}, {off:.1e} off the model, {norms} norms")
    return {"accuracy": accuracy, "off": off, "norms": norms}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "folded.pt2")
