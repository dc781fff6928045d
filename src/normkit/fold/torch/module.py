"""Fold every norm of a torch module that can go, prove it, and keep a ledger.

A copy of the model is traced in float64 (`capture`), the search finds a change of gauge
that removes each batch norm (`search`), the edited copy is run again and compared
(`harness`, `equivalence`). The same in the model's own dtype. Only then is the model
edited that the caller gets.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from normkit.errors import ArgumentError, FoldError
from normkit.fold.ledger import FoldEntry, FoldLedger
from normkit.fold.torch.copying import copied
from normkit.fold.torch.folding import Folding
from normkit.fold.torch.harness import Harness
from normkit.fold.torch.materialized import computed_weights
from normkit.fold.torch.materialized import materialize as store_computed
from normkit.modeling.batch import check_has_values
from normkit.progress import progress_bar

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["fold"]


def fold(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    inplace: bool = False,
    norms: Literal["batch", "all"] = "batch",
    layer_to_rms: bool = False,
    materialize: bool = False,
    equalize: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, FoldLedger]:
    """Remove each norm of `model` that can go, exactly, and say why others stay.

    At inference a batch norm is y = scale·x + shift per channel. It is moved into the
    weights before it, or after it, or partly into each, through operations between
    that commute with it. The model keeps its class, its attributes and its call; a
    batch norm becomes an `Identity` (or the rest of its class, such as an
    activation), and a bias is created where there was none.

    Layer, RMS, group and instance norms measure their input and stay. With
    `norms="all"` their weight γ and bias β move into what reads them,
    W·(γ·n + β) + b = (W·γ)·n + (b + W·β): linear maps, convolutions, all experts of a
    mixture, a head that shares its weight with an embedding (it gets one of its own).
    Classes of torch.nn and their subclasses then have no weight and bias, others a
    weight of 1 (0 where they multiply by 1 + weight) and a bias of 0. Modules that
    only multiply by a vector (LayerScale) are folded like batch norms.

    Args:
        model: A module in eval mode. Any that runs, since it is traced by running it.
            An exported program is folded as the module it stands for.
        example_inputs: Its arguments: a tuple of positional ones, a dict of named
            ones, or anything else as the single argument. The shapes do not limit the
            folded model; the branches of its code that they select do.
        inplace: Edit `model` itself instead of a copy.
        norms: "batch" for batch norms; "all" for the weights of the others, too.
        layer_to_rms: Turn a layer norm without weight and bias into an RMS norm of the
            same eps where what it reads can be written with mean 0: every writer of
            the residual stream is a linear map, an embedding or a parameter, every
            reader a layer norm. Needs `norms="all"`.
        materialize: Store weights that modules compute anew in each forward (weight
            norm, spectral norm and other parametrizations, pruning masks) as they are
            now, so that norms can go into them; the folded model has no
            parametrization left.
        equalize: After the folds, make the ranges of the channels of each weight alike
            by positive scales that neighbours take back, for a quantizer with one
            scale per weight (cross-layer equalization). The ledger has a line for each
            linear map, with the bits that its channel of the least range loses, before
            and after, or why no scale passes.
        progress: Show a progress bar.

    Returns:
        The folded model, and the `FoldLedger` with an entry for each batch norm.

    Raises:
        FoldError: the model cannot be copied, or fails on `example_inputs`. It is
            unchanged.

    Numerics:
        The algebra is in float64 and rounded once, to the dtype of each weight. Before
        anything is returned, the original and the folded model are compared: in
        float64 on `example_inputs`, on random inputs of the same shapes, and on random
        inputs of another batch and spatial size if the model takes them; and as the
        model is called, in its own dtype, on `example_inputs`. A fold that differs is
        undone, and its entry gives the difference. Nothing else changes: no gradient,
        no random state, no hook, no training flag. The proof covers the branches of the
        code that these runs take: other arguments, a run with gradients, or another
        memory layout may take another one.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8),
        ... ).eval()
        >>> folded, ledger = fold(net, torch.randn(2, 3, 8, 8))
        >>> folded
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
        >>> [(entry.name, entry.how) for entry in ledger.folded]
        [('1', "into '0' before it")]
    """
    if type(model).__name__ == "ExportedProgram":
        # Imported here: torch.export takes long to load, and few need it.
        from normkit.fold.torch.exported import as_module

        model = as_module(cast("ExportedProgram", model))
    if not isinstance(model, nn.Module):
        raise FoldError(
            f"fold needs a torch.nn.Module, got {type(model).__name__}; "
            "for a file in ONNX format use fold_onnx"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise FoldError(
            "a scripted model shows no operations to fold; fold the module before "
            "torch.jit.script"
        )
    check_has_values(
        model,
        "the folded model is compared with it: load the weights first (to_empty, "
        "load_state_dict)",
        may_fetch=True,
    )
    if norms not in ("batch", "all"):
        raise ArgumentError(f'norms must be "batch" or "all", got {norms!r}')
    if layer_to_rms and norms != "all":
        raise ArgumentError('layer_to_rms=True needs norms="all"')
    args, kwargs = _arguments(example_inputs)
    # Tensors of inference mode have no version counter, which the trace reads, and the
    # folded model could not be changed outside.
    with torch.inference_mode(mode=False):
        return _folded(
            *(model, args, kwargs, norms),
            inplace=inplace,
            layer_to_rms=layer_to_rms,
            materialize=materialize,
            equalize=equalize,
            progress=progress,
        )


def _folded(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    norms: str,
    *,
    inplace: bool,
    layer_to_rms: bool,
    materialize: bool,
    equalize: bool,
    progress: bool,
) -> tuple[nn.Module, FoldLedger]:
    source, kept = model, computed_weights(model)
    if materialize and kept:
        source = copied(model)
        store_computed(source)
    with progress_bar("trace", 2, shown=progress) as advance:
        try:
            exact = Harness(copied(source), args, kwargs, in_float64=True, norms=norms)
        except FoldError:
            raise
        except Exception as error:
            return model, _nothing_provable(model, args, kwargs, error)
        advance()
        own = _as_called(source, args, kwargs, norms)
        advance()
    folding = Folding(
        *(source, exact, own, norms),
        layer_to_rms=layer_to_rms,
        equalize=equalize,
        progress=progress,
    )
    plan = folding.proven_plan()
    ledger = folding.ledger(plan)
    del exact, own, folding.own
    if kept and not materialize and ledger.left:
        ledger = replace(ledger, notice=_computed(kept))
    if inplace and source is not model:
        store_computed(model)
    result = model if inplace else source if source is not model else copied(model)
    with torch.no_grad():
        for rewrite in folding.rewrites(plan):
            rewrite.apply(result)
    return result, ledger


def _computed(paths: list[str]) -> str:
    is_one = len(paths) == 1
    who = "1 module computes" if is_one else f"{len(paths)} modules compute"
    return (
        f"{who} a weight in each forward (weight norm, spectral norm, pruning), "
        f"{'' if is_one else 'such as '}'{paths[0]}', and nothing goes into that "
        "weight; to store such weights as they are now, pass materialize=True "
        "(--materialize)"
    )


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, DataLoader | Dataset):
        raise FoldError(
            f"fold needs example_inputs to be the arguments of one call, got a "
            f"{type(example_inputs).__name__}; take one batch: next(iter(loader))[0]"
        )
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def _as_called(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], norms: str
) -> Harness | None:
    """Return a copy of `model` that runs as it is; None if it fails.

    A model in float64 has one, too: what makes code compute in float64 also keeps torch
    from its fused operators. Example inputs in float64 for a model in float32 fail.
    """
    work = copied(model)
    with contextlib.suppress(Exception):
        return Harness(work, args, kwargs, in_float64=False, norms=norms)
    return None


def _nothing_provable(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> FoldLedger:
    """Return the ledger of a model that runs, but not in float64."""
    try:
        with torch.no_grad():
            copied(model)(*args, **kwargs)
    except Exception as own:
        raise FoldError(
            f"{type(model).__name__} failed on example_inputs: {own}; pass a tensor, a "
            "tuple of positional or a dict of named arguments that it accepts"
        ) from own
    why = f"the model does not run in float64, so nothing can be proven ({error})"
    return FoldLedger(
        tuple(
            FoldEntry(path, type(module).__name__, folded=False, reason=why)
            for path, module in model.named_modules()
            if isinstance(module, _BatchNorm)
        ),
        max_difference=0.0,
    )
