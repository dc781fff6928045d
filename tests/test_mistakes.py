"""Messages of common mistakes: what arrived, what is required, what to do.

Each mistake stands with the words that its message must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normkit
import normkit.functional as f
import normkit.nn as n

Mistake = Callable[[], Any]


def net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 36, 4)),
    )


def samples() -> TensorDataset:
    return TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,)))


def _nested(layer: nn.Module) -> None:
    with n.accumulate(layer), n.accumulate(layer):
        pass


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(samples(), batch_size=8)


def file(content: bytes) -> Path:
    path = Path(mkdtemp()) / "model.onnx"
    path.write_bytes(content)
    return path


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


IMAGES, ROWS, STEPS = ones(2, 3, 8, 8), torch.randn(3, 4), torch.randn(3, 4, 5)
LAYERS: dict[str, tuple[Mistake, list[str]]] = {
    "rows for images": (
        lambda: n.BatchNorm2d(4)(ROWS),
        ["expected 4D", "(3, 4)", "use BatchNorm1d"],
    ),
    "other channels": (
        lambda: n.BatchNorm2d(4)(ones(2, 5, 3, 3)),
        ["should contain 5 elements", "4"],
    ),
    "one sample": (
        lambda: n.BatchNorm1d(4)(ones(1, 4)),
        ["more than one value per channel", "(1, 4)", "training=False"],
    ),
    "integers": (
        lambda: n.BatchNorm1d(4)(ROWS.long()),
        ["floating-point", "torch.int64", "x.float()"],
    ),
    "an array": (
        lambda: n.BatchNorm1d(4)(np.zeros((3, 4))),  # type: ignore[arg-type]
        ["takes a tensor", "ndarray", "torch.as_tensor"],
    ),
    "a list": (
        lambda: n.LayerNorm(4)([[1.0, 2.0, 3.0, 4.0]]),  # type: ignore[arg-type]
        ["takes a tensor", "list", "torch.as_tensor"],
    ),
    "nothing": (
        lambda: n.GroupNorm(2, 4)(None),  # type: ignore[arg-type]
        ["takes a tensor", "NoneType"],
    ),
    "a decay for momentum": (
        lambda: n.BatchNorm1d(4, momentum=90)(ROWS),
        ["[0, 1]", "90", "momentum=0.1"],
    ),
    "a negative eps": (
        lambda: n.BatchNorm1d(4, eps=-1)(ROWS),
        ["positive", "-1", "1e-5"],
    ),
    "an eps that is none": (
        lambda: n.LayerNorm(4, eps=float("nan"))(ROWS),
        ["finite", "nan"],
    ),
    "an activation": (
        lambda: n.BatchNorm1d(4, activation="swish"),
        ["'swish'", "'silu'"],
    ),
    "a slope": (
        lambda: n.BatchNorm1d(4, negative_slope=float("inf")),
        ["negative_slope", "inf", "0.01"],
    ),
    "a memory mode": (
        lambda: n.BatchNorm1d(4, memory="fp8"),  # type: ignore[arg-type]
        ["'fp8'", "'recompute'"],
    ),
    "no ghosts": (
        lambda: n.BatchNorm1d(4, ghost_size=0),
        ["at least 1", "0", "None"],
    ),
    "a policy": (
        lambda: n.BatchNorm1d(4, on_small_batch="ignore"),
        ["'ignore'", "'skip'"],
    ),
    "an estimator": (
        lambda: n.BatchNorm1d(4, estimator="mean"),
        ["'mean'", "'unbiased'"],
    ),
    "a mask without channels": (
        lambda: n.BatchNorm1d(4)(STEPS, mask=ones(3, 5).bool()),
        ["(3, 5)", "(3, 4, 5)", "size 1"],
    ),
    "lengths for a mask": (
        lambda: n.BatchNorm1d(4)(STEPS, mask=torch.tensor([5, 2, 3])),
        ["int64", "lengths", "arange"],
    ),
    "an additive mask": (
        lambda: n.LayerNorm(5)(STEPS, mask=torch.full((3, 4, 1), -1e9)),
        ["-1e+09", "mask == 0"],
    ),
    "a mask of samples or of channels": (
        lambda: n.BatchNorm1d(4)(ones(4, 4, 5), mask=ones(4, 5).bool()),
        ["(4, 5)", "(4, 4, 5)", "two ways", "mask[:, None]", "(4, 1, 5)"],
    ),
    "a mask of infinite weights": (
        lambda: n.LayerNorm(5)(STEPS, mask=torch.full((3, 4, 1), float("inf"))),
        ["infinite", "finite"],
    ),
    "a packed sequence": (
        lambda: n.BatchNormLSTM(4, 2, max_steps=3)(
            nn.utils.rnn.pack_padded_sequence(STEPS, torch.tensor([3, 2, 2, 1]))
        ),
        ["PackedSequence", "pad_packed_sequence", "lengths"],
    ),
    "accumulation inside accumulation": (
        lambda: _nested(n.BatchNorm1d(4)),
        ["(model)", "do not nest"],
    ),
    "a residual": (
        lambda: n.BatchNorm1d(4)(ROWS, residual=ones(3, 1)),
        ["(3, 1)", "(3, 4)", "expand()"],
    ),
    "a residual of a row norm": (
        lambda: n.LayerNorm(4)(ROWS, residual=ones(3, 1)),
        ["(3, 1)", "(3, 4)", "expand()"],
    ),
    "another normalized shape": (
        lambda: n.LayerNorm(5)(ROWS),
        ["normalized_shape=[5]", "[3, 4]"],
    ),
    "groups": (lambda: n.GroupNorm(3, 8), ["8", "divisible", "3"]),
    "one position": (
        lambda: n.InstanceNorm2d(3)(ones(2, 3, 1, 1)),
        ["more than one position", "(2, 3, 1, 1)"],
    ),
    "no statistics": (
        lambda: f.batch_norm(ROWS, None, None),
        ["running_mean", "None", "training=True"],
    ),
    "one statistic": (
        lambda: f.batch_norm(ROWS, ones(4), None, training=True),
        ["both be None", "one running statistic"],
    ),
    "a counter of floats": (
        lambda: f.batch_norm(
            *(ROWS, ones(4), ones(4)), training=True, num_batches_tracked=ones(1)
        ),
        ["int64", "float32"],
    ),
    "a backend": (
        lambda: normkit.backend("cuda").__enter__(),  # type: ignore[arg-type]
        ["'cuda'", "'gpu'"],
    ),
    "another checkpoint": (
        lambda: n.BatchNorm1d(4).load_state_dict(n.BatchNorm1d(5).state_dict()),
        ["size mismatch", "running_mean"],
    ),
}
VERBS: dict[str, tuple[Mistake, list[str]]] = {
    "convert: a target": (
        lambda: normkit.convert(net(), to="layernorm"),  # type: ignore[arg-type]
        ["'layernorm'", "'group'"],
    ),
    "convert: a class": (
        lambda: normkit.convert(nn.BatchNorm2d, to="normkit"),  # type: ignore[arg-type]
        ["BatchNorm2d", "Module"],
    ),
    "fold: channels": (
        lambda: normkit.fold(net().eval(), ones(2, 5, 8, 8)),
        ["failed on example_inputs", "got 5 channels", "pass a tensor"],
    ),
    "fold: a loader": (
        lambda: normkit.fold(net().eval(), loader()),
        ["DataLoader", "next(iter(loader))"],
    ),
    "fold: a file": (
        lambda: normkit.fold("model.onnx", IMAGES),  # type: ignore[arg-type]
        ["got str", "fold_onnx"],
    ),
    "fold: norms": (
        lambda: normkit.fold(net().eval(), IMAGES, norms="layer"),  # type: ignore[arg-type]
        ["'layer'", '"all"'],
    ),
    "fold_onnx: no file": (
        lambda: normkit.fold_onnx("none.onnx", "out.onnx"),
        ["no file none.onnx"],
    ),
    "fold_onnx: no model": (
        lambda: normkit.fold_onnx(file(b"hello"), "out.onnx"),
        ["not an ONNX model", "export it again"],
    ),
    "calibrate: swapped": (
        lambda: normkit.calibrate(loader(), net()),  # type: ignore[arg-type]
        ["DataLoader for the model", "swap them"],
    ),
    "calibrate: samples": (
        lambda: normkit.calibrate(net(), samples()),
        ["data set", "DataLoader(dataset, batch_size="],
    ),
    "calibrate: a batch": (
        lambda: normkit.calibrate(net(), IMAGES),
        ["one Tensor", "in a list"],
    ),
    "calibrate: no batch": (
        lambda: normkit.calibrate(net(), []),
        ["no batch", "as it was"],
    ),
    "calibrate: no statistics": (
        lambda: normkit.calibrate(nn.Linear(2, 2), [ones(3, 2)]),
        ["Linear", "nothing to calibrate"],
    ),
    "calibrate: NaN": (
        lambda: normkit.calibrate(net(), [IMAGES * float("nan")]),
        ["none of the 1 batches was finite", "'1'", "as it was"],
    ),
    "diagnose: swapped": (
        lambda: normkit.diagnose(loader(), net()),  # type: ignore[arg-type]
        ["DataLoader for the model", "swap them"],
    ),
    "diagnose: a path": (
        lambda: normkit.diagnose("model.pt", loader()),  # type: ignore[arg-type]
        ["Module", "no state_dict"],
    ),
    "diagnose: a class": (
        lambda: normkit.diagnose(nn.BatchNorm2d, loader()),  # type: ignore[arg-type]
        ["the class BatchNorm2d", "an instance"],
    ),
    "calibrate: statistics that are not kept": (
        lambda: normkit.calibrate(
            nn.BatchNorm2d(3, track_running_stats=False), loader()
        ),
        ["keeps no running statistics", "track_running_stats=True"],
    ),
    "calibrate: scripted": (
        lambda: normkit.calibrate(torch.jit.script(net()), loader()),
        ["scripted", "before torch.jit.script"],
    ),
    "fold: scripted": (
        lambda: normkit.fold(torch.jit.script(net().eval()), IMAGES),
        ["scripted", "before torch.jit.script"],
    ),
    "fold: no values": (
        lambda: normkit.fold(net().eval().to("meta"), IMAGES),
        ["meta device", "'0.weight'", "to_empty"],
    ),
    "verify: no values": (
        lambda: normkit.verify(net().eval(), net().to("meta"), IMAGES),
        ["verify runs b", "meta device", "to_empty"],
    ),
    "initialize: a tensor": (
        lambda: normkit.initialize(IMAGES),  # type: ignore[arg-type]
        ["Tensor", "Module"],
    ),
    "initialize: a scheme": (
        lambda: normkit.initialize(net(), "he"),  # type: ignore[arg-type]
        ["'he'", "kaiming"],
    ),
    "watch: a loader": (
        lambda: normkit.watch(loader()),  # type: ignore[arg-type]
        ["DataLoader", "Module"],
    ),
    "watch: every": (
        lambda: normkit.watch(net(), every=0),
        ["every", "0"],
    ),
}
MISTAKES = {**LAYERS, **VERBS}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_names_the_mistake_and_the_way_out(name: str) -> None:
    mistake, words = MISTAKES[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011  any class: the words count
        mistake()
    text = str(caught.value)
    assert not [word for word in words if word not in text], text
