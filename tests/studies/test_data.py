"""The data of the studies: splits, fallbacks, batches."""

from pathlib import Path

import numpy as np
import torch

from normkit.studies.runner import data_folder
from normkit.studies.study import Trial


def test_digits_are_split_anew_for_each_seed_and_alike_for_one() -> None:
    one, same, other = (Trial(seed).images() for seed in (0, 0, 1))
    assert torch.equal(one.x_train, same.x_train)
    assert not torch.equal(one.y_test, other.y_test)
    assert [len(y) for y in (one.y_train, one.y_val, one.y_test)] == [997, 300, 500]
    assert one.x_train.shape[1:] == (1, 8, 8)
    assert one.x_train.min() == 0
    assert one.x_train.max() == 1


def test_digits_stand_in_for_what_is_not_there_and_the_record_says_so() -> None:
    trial = Trial(0, data_root=None)
    assert trial.images("mnist").name == "digits"
    assert set(trial.digests) == {"digits"}
    assert trial.text() is None


def test_a_data_folder_is_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 3
    np.savez(
        tmp_path / "cifar10_12k.npz",
        x_train=pixels,
        y_train=labels,
        x_test=pixels,
        y_test=labels,
    )
    (tmp_path / "sample.txt").write_text("abcab" * 30_000)
    trial = Trial(0, data_root=data_folder(tmp_path))
    images = trial.images("cifar10", train=12)
    assert images.x_train.shape == (12, 3, 4, 4)
    assert images.classes == 3
    text = trial.text()
    assert text is not None
    assert text[:5].tolist() == [0, 1, 2, 0, 1]
    assert set(trial.digests) == {"cifar10", "text"}


def test_an_epoch_visits_each_image_once() -> None:
    images = Trial(0).images()
    batches = images.batches(90, 22, torch.Generator().manual_seed(0))
    assert batches.shape == (22, 90)
    first, second = batches[:11].flatten(), batches[11:].flatten()
    assert len(first.unique()) == len(second.unique()) == 990
    assert not torch.equal(first, second)
