"""Views, copies, cuts and joins: operations that change no element."""

from __future__ import annotations

import torch

from normkit.fold.graph import Value
from normkit.fold.lowering.call import TorchCall, lowers, values_in
from normkit.fold.nodes import Move, Node

__all__: list[str] = []


@lowers(
    "contiguous clone detach data alias to float double half bfloat16 type type_as "
    "cpu cuda lift_fresh _to_copy real_if_close positive pos identity "
    "_has_compatible_shallow_copy_type"
)
def _same(call: TorchCall) -> Node | None:
    """Every element stays where it is; a cast to integers would round."""
    x = call.value(0, "input")
    if x is None or not call.makes_floats or x.shape != call.outputs[0].shape:
        return None
    return Move(call.label, [x])


@lowers("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
def _dropout(call: TorchCall) -> Node | None:
    """The identity at inference, opaque (and random) in training."""
    default = call.name != "dropout" or call.func is torch.nn.functional.dropout
    if call.get(1, "p") == 0 or call.get(2, "training", default) is False:
        return _same(call)
    return None


@lowers(
    "view reshape flatten unflatten permute transpose t T mT H mH adjoint swapaxes "
    "swapdims movedim moveaxis squeeze unsqueeze view_as reshape_as ravel "
    "expand expand_as broadcast_to repeat tile repeat_interleave "
    "roll flip fliplr flipud rot90 pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle narrow select index_select getitem slice unbind chunk "
    "unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit vsplit "
    "dsplit unfold diagonal"
)
def _first_moved(call: TorchCall) -> Node | None:
    """Only the first argument is moved; the others say where to."""
    x = call.value(0, "input")
    if x is None or not call.makes_floats:
        return None
    if any(isinstance(argument, torch.dtype) for argument in call.args):
        return None  # view(dtype) reads the bits as something else.
    others = values_in((call.args[1:], call.kwargs))
    if not call.name.endswith("_as") and any(v.constant is None for v in others):
        return None
    dim = call.get(_CUT_DIM.get(call.name, 99), "dim", 0)
    acts_on = (dim,) if call.name in _CUT_DIM and isinstance(dim, int) else None
    if call.name in ("channel_shuffle", "native_channel_shuffle"):
        acts_on = (1,)
    return Move(call.label, [x], replay=call.replayed([x]), acts_on=acts_on)


# Cuts along one dimension, and where they name it.
_CUT_DIM = {
    "chunk": 2,
    "unsafe_chunk": 2,
    "split": 2,
    "unsafe_split": 2,
    "split_with_sizes": 2,
    "tensor_split": 2,
    "narrow": 1,
    "index_select": 1,
}


@lowers("cat concat concatenate stack hstack vstack dstack column_stack row_stack")
def _joined(call: TorchCall) -> Node | None:
    parts = values_in(call.get(0, "tensors"))
    if not call.makes_floats:
        return None
    dim = call.get(1, "dim", 0)
    ranks = {len(v.shape) for v in (*parts, *call.outputs)}
    cats = call.name in ("cat", "concat", "concatenate") and isinstance(dim, int)
    acts_on = (dim,) if cats and len(ranks) == 1 else None
    return Move(call.label, parts, replay=call.replayed(parts), acts_on=acts_on)


@lowers("pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d")
def _padded(call: TorchCall) -> Node | None:
    mode = call.get(2, "mode", "constant") if call.name == "pad" else call.name
    amount = {"pad": call.get(3, "value"), "constant_pad_nd": call.get(2, "value")}
    if mode in ("constant", "constant_pad_nd") and amount.get(call.name):
        return None  # Padded with something that is not 0.
    return _first_moved(call)


def is_nearest(call: TorchCall) -> bool:
    """Whether an interpolation only copies elements."""
    return str(call.get(3, "mode", "nearest")).startswith("nearest")


def sums_to_one(value: Value, dim: int) -> bool:
    """Whether `value` is a softmax over `dim`, also when its rows were moved."""
    dim = dim % len(value.shape)
    node = value.producer
    if node is None:
        return False
    if isinstance(node, Move) and len(node.inputs) == 1:
        source = node.inputs[0]
        if node.replay is None:
            return sums_to_one(source, dim)
        # Each row along `dim` must be one whole row of the source along some dim.
        count = torch.Size(source.shape).numel()
        labels = torch.arange(count, dtype=torch.float64).reshape(source.shape)
        rows = node.replay([labels])[0].movedim(dim, -1)
        for source_dim in range(len(source.shape)):
            step = 1
            for size in source.shape[source_dim + 1 :]:
                step *= size
            width = source.shape[source_dim]
            if rows.shape[-1] != width:
                continue
            offsets = torch.arange(width, dtype=torch.float64) * step
            whole = bool((rows == rows[..., :1] + offsets).all())
            starts = (rows[..., 0] // step) % width == 0
            if whole and bool(starts.all()) and sums_to_one(source, source_dim):
                return True
        return False
    softmax_dim = getattr(node, "softmax_dim", None)
    return softmax_dim is not None and softmax_dim % len(value.shape) == dim
