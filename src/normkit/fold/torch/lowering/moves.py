"""Views, copies, cuts and joins: operations that change no element."""

from __future__ import annotations

import torch

from normkit.fold.ir.graph import Node, Value
from normkit.fold.ir.nodes import Move, Opaque, Rows
from normkit.fold.torch.lowering.call import TorchCall, lowers, values_in

__all__ = ["first_moved", "is_nearest"]


@lowers(
    "contiguous clone detach data alias to float double half bfloat16 type type_as "
    "cpu cuda lift_fresh _to_copy real_if_close positive pos identity "
    "_has_compatible_shallow_copy_type"
)
def _same(call: TorchCall) -> Node | None:
    """Lower what leaves each element in place; a cast to integers would round."""
    x = call.value(0, "input")
    if x is None or not call.makes_floats or x.shape != call.outputs[0].shape:
        return None
    return Move(call.label, [x])


@lowers("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
def _dropout(call: TorchCall) -> Node | None:
    """Lower to the identity at inference; opaque (and random) in training."""
    default = call.name != "dropout" or call.func is torch.nn.functional.dropout
    if call.get(1, "p") == 0 or call.get(2, "training", default) is False:
        return _same(call)
    return None


@lowers(
    "view _unsafe_view reshape flatten unflatten permute transpose t T mT H mH "
    "adjoint swapaxes swapdims movedim moveaxis squeeze unsqueeze view_as "
    "reshape_as ravel expand expand_as broadcast_to repeat tile repeat_interleave "
    "roll flip fliplr flipud rot90 pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle narrow select index_select getitem slice unbind chunk "
    "unsafe_chunk split unsafe_split split_with_sizes tensor_split hsplit vsplit "
    "dsplit unfold diagonal"
)
def first_moved(call: TorchCall) -> Node | None:
    """Lower what moves its first argument alone; the others say where to."""
    x = call.value(0, "input")
    if x is None or not call.makes_floats:
        return None
    if any(isinstance(argument, torch.dtype) for argument in call.args):
        return None  # view(dtype) reads the bits as something else.
    others = values_in((call.args[1:], call.kwargs))
    if call.name in ("getitem", "index_select"):
        picked = _picked(call, x)
        if picked is not None:
            return picked
    if not call.name.endswith("_as") and any(v.constant is None for v in others):
        return None
    dim = call.get(_CUT_DIM.get(call.name, 99), "dim", 0)
    acts_on = (dim,) if call.name in _CUT_DIM and isinstance(dim, int) else None
    if call.name in ("channel_shuffle", "native_channel_shuffle"):
        acts_on = (1,)
    return Move(call.label, [x], replay=call.replayed([x]), acts_on=acts_on)


def _picked(call: TorchCall, x: Value) -> Node | None:
    """Lower rows that a tensor of numbers or of truth values picks, else None."""
    index = call.get(1, "indices")
    if call.name == "index_select":
        index = call.get(2, "index") if call.get(1, "dim") == 0 else None
    if not isinstance(index, Value) or index.is_fixed:
        return None
    y = call.outputs[0]
    taken = len(x.shape) - (len(y.shape) - len(index.shape))
    if y.shape != index.shape + x.shape[taken:] or taken != 1:
        # One number per true value of a mask.
        taken = len(index.shape)
        if index.shape != x.shape[:taken] or y.shape[1:] != x.shape[taken:]:
            return None
    if not x.is_fixed:
        return Rows(call.label, [x, index], taken=taken)
    if x.roots and taken == 1:
        y.picked_from = x
        return Opaque(call.label, [index])
    return None


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
    return first_moved(call)


def is_nearest(call: TorchCall) -> bool:
    """Return True if an interpolation only copies elements."""
    return str(call.get(3, "mode", "nearest")).startswith("nearest")
