"""Study: a question, a prediction made beforehand, a measurement, a rule.

Each file `sNN_….py` of this package holds one, as the value `STUDY`. A trial is one
seed of it with all its arms, so that the arms are paired: same data split, same order
of batches, same starting weights where the arms allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normkit.studies.data import Images, load_images, load_text
from normkit.studies.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCALES", "Scale", "Study", "Trial"]

SCALES = ("quick", "cpu", "gpu")

# Results of one trial: JSON values only.
Result = dict[str, Any]


@dataclass
class Trial:
    """One seed of a study, with its data folder and device.

    Attributes:
        seed: Random seed of the trial.
        data_root: Folder with the larger data sets; None: only the digits.
        device: Device of the computation.
        digests: SHA-256 of each data set that was loaded.
    """

    seed: int
    data_root: Path | None = None
    device: str = "cpu"
    digests: dict[str, str] = field(default_factory=dict)

    def generator(self, stream: int = 0) -> torch.Generator:
        """Return a fresh CPU generator, distinct for each `stream` of a seed."""
        return torch.Generator().manual_seed(7919 * (self.seed + 1) + stream)

    def images(
        self, name: str = "digits", *, train: int = 0, val: int = 0, test: int = 0
    ) -> Images:
        """Return the images called `name`, split for this seed, on the trial's device.

        Args:
            name: `"digits"`, `"mnist"` or `"cifar10"`. Digits replace a data set that
                the data folder does not have; the record says which was used.
            train: Keep this many training images; 0 keeps all.
            val: Keep this many validation images.
            test: Keep this many test images.
        """
        images = load_images(
            name,
            self.data_root,
            self.generator(101),
            train=train,
            val=val,
            test=test,
        )
        self.digests[images.name] = images.digest
        return images.to(self.device)

    def text(self) -> torch.Tensor | None:
        """Return the sample text's characters as indices; None without data folder."""
        found = load_text(self.data_root)
        if found is None:
            return None
        self.digests["text"] = found.digest
        return found.indices


@dataclass(frozen=True)
class Scale:
    """Size of a run: paired seeds, and the settings that `measure` takes."""

    seeds: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Definition of a study.

    Attributes:
        id: `S01`, `S02`, …
        title: Name in tables and figures.
        question: The question, one sentence.
        prediction: Prediction of the claims, written before the first run.
        seen: What the figure shows, in plain words.
        meaning: What follows from it, and what does not.
        arms: The arms that are compared.
        metric: The measurement in each arm.
        criterion: The rule from the metric to the verdicts, in words.
        claims: Ids of its claims, e.g. `("C11", "C49")`.
        minutes: Cost of all seeds at the cpu scale, on one core.
        scales: `quick`, `cpu` and `gpu`.
        measure: Runs one trial; a pure function of the trial and the settings.
        evaluate: Returns the verdicts of the results of all seeds.
        draw: Draws the results on an empty figure.
    """

    id: str
    title: str
    question: str
    prediction: str
    seen: str
    meaning: str
    arms: tuple[str, ...]
    metric: str
    criterion: str
    claims: tuple[str, ...]
    minutes: float
    scales: Mapping[str, Scale]
    measure: Callable[..., Result]
    evaluate: Callable[[list[Result]], list[Verdict]]
    draw: Callable[[Figure, list[Result]], None]
