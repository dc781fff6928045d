"""Running statistics that are wrong: D01 to D04, D16, D17, D31, D32."""

import torch
from torch.optim.swa_utils import AveragedModel, update_bn

from doctor.faults.planting import (
    OFF,
    RATE,
    Program,
    data,
    fault,
    first_norm,
    names_of,
    usual,
)
from doctor.models import build, norms, train, trained

__all__ = []

COLD = {"D03": "so slow an average still holds its initial values"}


@fault("D01", brings=OFF)
def stale(net: str, is_bad: bool) -> Program:
    """The statistics of weights that are long gone."""
    model, old = usual(net), trained(net, 4, lr=RATE[net])
    for name, norm in norms(model).items() if is_bad else ():
        norm.running_mean.copy_(norms(old)[name].running_mean)
        norm.running_var.copy_(norms(old)[name].running_var)
    return Program(model, data(), at=frozenset(norms(model)))


@fault("D02", brings=OFF)
def another_scale_in_eval_mode(net: str, is_bad: bool) -> Program:
    """Statistics of inputs that were scaled in another way."""
    model = usual(net)
    for norm in norms(model).values() if is_bad else ():
        norm.running_mean += 3 * norm.running_var.sqrt()
        norm.running_var *= 16
    return Program(model, data())


@fault("D03", brings=OFF)
def short(net: str, is_bad: bool) -> Program:
    """Trained weights with the average of twelve batches."""
    model = usual(net)
    if is_bad:
        for norm in norms(model).values():
            norm.reset_running_stats()
        model.train()
        with torch.no_grad():
            for x, _ in data()[:12]:
                model(x)
    return Program(model, data(), at=frozenset(norms(model)))


@fault("D04", brings={**OFF, **COLD})
def other_momentum(net: str, is_bad: bool) -> Program:
    """The decay of another framework."""
    model = usual(net, momentum=0.001 if is_bad else 0.1)
    return Program(model, data(), at=frozenset(norms(model)))


@fault("D16", is_info=True)
def eps_above_the_variances(net: str, is_bad: bool) -> Program:
    """An eps in the first layer that decides the scale, from the start."""
    model = build(net)
    norm = first_norm(model)
    norm.eps = 1.0 if is_bad else 1e-5
    train(model, 200, lr=RATE[net])
    return Program(model, data(), at=names_of(model, [norm]))


@fault("D17", brings=OFF)
def not_a_number(net: str, is_bad: bool) -> Program:
    """One NaN in the running variance of every layer."""
    model = usual(net)
    for norm in norms(model).values() if is_bad else ():
        norm.running_var[3] = float("nan")
    return Program(model, data(), at=frozenset(norms(model)))


@fault("D31", brings=OFF)
def averaged(net: str, is_bad: bool) -> Program:
    """Averaged weights with the statistics of their first."""
    model = trained(net, 20, lr=0.1)
    mean = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        train(model, 30, optimizer=optimizer)
        mean.update_parameters(model)
    if is_bad:
        for norm in norms(mean).values():
            norm.running_mean += 2 * norm.running_var.sqrt()
    else:
        update_bn([x for x, _ in data()], mean)
    # Layers have the names of the model that is averaged.
    return Program(mean, data(), at=frozenset(norms(model)))


@fault("D32", brings={**OFF, "D03": "the count of batches is a buffer as well"})
def without_buffers(net: str, is_bad: bool) -> Program:
    """A checkpoint of the parameters alone."""
    source, model = usual(net), build(net)
    at = frozenset(norms(model))
    if not is_bad:
        return Program(source, data(), at=at)
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        mine.data.copy_(theirs)
    return Program(model, data(), at=at)
