"""Real data for the studies: handwritten digits always, larger sets by path.

The digits come with scikit-learn. MNIST, CIFAR-10 and a text are read from a folder
(`--data`, or the environment variable NORMKIT_DATA) that holds `mnist.npz`,
`cifar10*.npz` with `x_train, y_train, x_test, y_test`, and a `.txt` file.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from normkit.errors import DependencyError

__all__ = ["Images", "Text", "load_images", "load_text"]

# Of the 1,797 digits; fixed numbers keep accuracies of all studies comparable.
_TEST_DIGITS, _VALIDATION_DIGITS = 500, 300


@dataclass(frozen=True)
class Images:
    """Labelled images in [0, 1], split into training, validation and test.

    Attributes:
        name: Name of the data set.
        digest: SHA-256 of the raw pixels and labels, before splitting.
        x_train: `(N, C, H, W)`, float32.
        y_train: `(N,)`, int64.
        x_val: As `x_train`; rates are chosen on these.
        y_val: As `y_train`.
        x_test: As `x_train`.
        y_test: As `y_train`.
    """

    name: str
    digest: str
    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: str) -> Images:
        """Return the same images on `device`."""
        names = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test")
        return replace(self, **{n: getattr(self, n).to(device) for n in names})

    def map(self, convert: Callable[[Tensor], Tensor]) -> Images:
        """Return the images with their pixels converted, the labels kept."""
        names = ("x_train", "x_val", "x_test")
        return replace(self, **{n: convert(getattr(self, n)) for n in names})

    def flat(self) -> Images:
        """Return the same images as vectors, `(N, C·H·W)`."""
        return self.map(lambda x: x.flatten(1))

    def standardized(self) -> Images:
        """Shift and scale by one mean and one standard deviation for all pixels."""
        mean, std = self.x_train.mean(), self.x_train.std()
        return self.map(lambda x: (x - mean) / std)

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
    name: str,
    root: Path | None,
    generator: torch.Generator,
    *,
    train: int = 0,
    val: int = 0,
    test: int = 0,
) -> Images:
    """Load the images called `name`, or the digits when `root` does not have them.

    `generator` draws the split of training and validation images, and which test
    images of a set with more than `test` are used; 0 keeps all of a part.
    """
    found = None
    if name != "digits" and root is not None:
        found = next(iter(sorted(Path(root).glob(f"{name}*.npz"))), None)
    if found:
        digest, x, y, x_test, y_test = _read_npz(found)
        shown = _drawn(len(y_test), test, generator)
        x_test, y_test, top = x_test[shown], y_test[shown], 255
        order = torch.randperm(len(y), generator=generator)
        cut = len(y) // 10
    else:
        name = "digits"
        pixels, y, digest = _digits()
        order = torch.randperm(len(y), generator=generator)
        last, order = order[-_TEST_DIGITS:], order[:-_TEST_DIGITS]
        x, x_test, y_test = pixels, pixels[last], y[last]
        cut, top = _VALIDATION_DIGITS, 16
    held, kept = order[:cut], order[cut:]
    held, kept = held[: val or None], kept[: train or None]
    parts = ((x[kept], y[kept]), (x[held], y[held]), (x_test, y_test))
    tensors = [t for pixels, labels in parts for t in (_pixels(pixels, top), labels)]
    return Images(name, digest, *tensors)


def _drawn(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(count, generator=generator)
    return order[:wanted] if 0 < wanted < count else torch.arange(count)


def _pixels(x: Tensor, top: int) -> Tensor:
    """Return `(N, C, H, W)` in [0, 1] of `(N, H, W)` or `(N, H, W, C)` in [0, top]."""
    stacked = x[:, None] if x.dim() == 3 else x.movedim(-1, 1)
    return stacked.float().div(top).contiguous()


@functools.cache
def _digits() -> tuple[Tensor, Tensor, str]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise DependencyError(
            "the studies use scikit-learn's digits, which is not installed; "
            "pip install 'normkit[demo]'"
        ) from missing
    x, y = load_digits(return_X_y=True)
    pixels = torch.from_numpy(x).float().view(-1, 8, 8)
    return pixels, torch.from_numpy(y).long(), _digest(x, y)


@functools.lru_cache(maxsize=2)
def _read_npz(path: Path) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    """Read digest, bytes and labels for training, and both for the test."""
    with np.load(path) as stored:
        arrays = [stored[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    x, y, x_test, y_test = map(torch.from_numpy, arrays)
    return _digest(*arrays), x, y.long(), x_test, y_test.long()


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
