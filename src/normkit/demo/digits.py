"""1,797 real handwritten digits, 8×8, from scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.errors import DependencyError

__all__ = ["Batches", "Digits", "load_digits"]

NUM_TEST = 500


@dataclass(frozen=True)
class Digits:
    """Images `(N, 1, 8, 8)` with mean 0 and variance 1 over the training half.

    Attributes:
        train_images: Images to train on.
        train_labels: The digit of each image, int64.
        test_images: 500 images that no network is trained on.
        test_labels: The digit of each image.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, size: int, *, seed: int) -> Batches:
        """Return the training images in batches, shuffled in every pass."""
        return Batches(self.train_images, self.train_labels, size, seed)


class Batches:
    """Shuffled batches of one size, the same in every run with the same seed.

    The incomplete last batch of a pass is dropped. The order comes from its own
    generator, so the global random state does not change.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int) -> None:
        self.images, self.labels, self.size = images, labels, size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self._generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            yield self.images[chosen], self.labels[chosen]


def load_digits(seed: int) -> Digits:
    """Split the digits by `seed` into 1,297 to train on and 500 to test on.

    Raises:
        DependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise DependencyError(
            "the demo trains on scikit-learn's handwritten digits and scikit-learn is "
            "not installed; pip install 'normkit[demo]'"
        ) from None
    pixels, names = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(names, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    var, mean = torch.var_mean(images[train])
    images = (images - mean) / var.sqrt()
    return Digits(images[train], labels[train], images[test], labels[test])
