"""Real data for the studies: handwritten digits always, larger sets by path.

The digits come with scikit-learn. MNIST, CIFAR-10 and a text are read from a folder
(`--data`, or the environment variable NORMKIT_DATA) that holds `mnist.npz`,
`cifar10*.npz` with `x_train, y_train, x_test, y_test`, and a `.txt` file.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normkit.errors import DependencyError

__all__ = ["Images", "Text", "load_images", "load_text"]

# Of the 1,797 digits; a fixed number keeps accuracies of all studies comparable.
_TEST_DIGITS = 500


@dataclass(frozen=True)
class Images:
    """Labelled images in [0, 1], split into training and test.

    Attributes:
        name: Name of the data set.
        digest: SHA-256 of the raw pixels and labels, before splitting.
        x_train: `(N, C, H, W)`, float32.
        y_train: `(N,)`, int64.
        x_test: As `x_train`.
        y_test: As `y_train`.
    """

    name: str
    digest: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: str) -> Images:
        """Return the same images on `device`."""
        names = ("x_train", "y_train", "x_test", "y_test")
        return replace(self, **{n: getattr(self, n).to(device) for n in names})

    def flat(self) -> Images:
        """Return the same images as vectors, `(N, C·H·W)`."""
        return replace(
            self, x_train=self.x_train.flatten(1), x_test=self.x_test.flatten(1)
        )

    def standardized(self) -> Images:
        """Shift and scale by one mean and one standard deviation for all pixels."""
        mean, std = self.x_train.mean(), self.x_train.std()
        return replace(
            self, x_train=(self.x_train - mean) / std, x_test=(self.x_test - mean) / std
        )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y_train.max()) + 1

    def batches(self, size: int, steps: int, generator: torch.Generator) -> Tensor:
        """Return indices of `steps` training batches, `(steps, size)`, by epoch.

        Every epoch visits the images in a new order; the incomplete last batch is left
        out of that epoch.
        """
        count = len(self.y_train)
        size = min(size, count)
        per_epoch = count // size
        epochs = -(-steps // per_epoch)
        rows = [
            torch.randperm(count, generator=generator)[: per_epoch * size]
            for _ in range(epochs)
        ]
        return torch.cat(rows).view(-1, size)[:steps].to(self.y_train.device)


def load_images(
    name: str, root: Path | None, generator: torch.Generator, *, train: int = 0
) -> Images:
    """Load the images called `name`, or the digits when `root` does not have them."""
    found = None
    if name != "digits" and root is not None:
        found = next(iter(sorted(Path(root).glob(f"{name}*.npz"))), None)
    images = _read_npz(name, found) if found else _split_digits(generator)
    if train and train < len(images.y_train):
        keep = torch.randperm(len(images.y_train), generator=generator)[:train]
        images = replace(
            images, x_train=images.x_train[keep], y_train=images.y_train[keep]
        )
    return images


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise DependencyError(
            "the studies use scikit-learn's digits, which is not installed; "
            "pip install 'normkit[demo]'"
        ) from missing
    x, y = load_digits(return_X_y=True)
    return x, y, _digest(x, y)


def _split_digits(generator: torch.Generator) -> Images:
    x, y, digest = _digits()
    order = torch.randperm(len(y), generator=generator)
    pixels = torch.from_numpy(x).float().div(16).view(-1, 1, 8, 8)[order]
    labels = torch.from_numpy(y).long()[order]
    cut = len(y) - _TEST_DIGITS
    return Images(
        *("digits", digest, pixels[:cut], labels[:cut], pixels[cut:], labels[cut:])
    )


@functools.lru_cache(maxsize=2)
def _read_npz(name: str, path: Path) -> Images:
    with np.load(path) as stored:
        arrays = [stored[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    tensors = []
    for array in arrays:
        if array.ndim == 1:
            tensors.append(torch.from_numpy(array.astype(np.int64)))
        else:
            pixels = torch.from_numpy(array).float().div(255)
            stacked = pixels[:, None] if array.ndim == 3 else pixels.movedim(-1, 1)
            tensors.append(stacked.contiguous())
    return Images(name, _digest(*arrays), *tensors)


@dataclass(frozen=True)
class Text:
    """Characters of a text as indices into its alphabet."""

    indices: Tensor
    digest: str


def load_text(root: Path | None) -> Text | None:
    """Load the data folder's first `.txt` file of more than 100,000 letters."""
    for path in sorted(Path(root).glob("*.txt")) if root is not None else ():
        raw = path.read_bytes()
        if len(raw) > 100_000:
            letters = np.frombuffer(raw, dtype=np.uint8)
            _, indices = np.unique(letters, return_inverse=True)
            return Text(
                torch.from_numpy(indices.astype(np.int64)),
                hashlib.sha256(raw).hexdigest(),
            )
    return None


def _digest(*arrays: np.ndarray) -> str:
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()
