"""A watch measures training steps; other calls go on as without it."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

from normkit.doctor import watch
from normkit.errors import ArgumentError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    )


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def loss_of(model: nn.Module, held: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(functional_call(model, held, (x,)), y)


def per_sample(model: nn.Module) -> Any:
    one = grad(lambda held, x, y: loss_of(model, held, x[None], y[None]))
    return vmap(one, (None, 0, 0))(dict(model.named_parameters()), X, Y)


def traced(model: nn.Module) -> Any:
    made: Any = torch.jit.trace(model, X)
    return made(X)


TRANSFORMED: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda m: grad(lambda held: loss_of(m, held, X, Y))(
        dict(m.named_parameters())
    ),
    "per sample": per_sample,
    "vmap": lambda m: vmap(m)(X.view(4, 8, 8)),
    "jvp": lambda m: jvp(m, (X,), (X,)),
    "jacrev": lambda m: jacrev(m)(X[0]),
    "hessian": lambda m: hessian(lambda x: m(x).sum())(X[0]),
    "batched gradients": lambda m: torch.autograd.functional.jacobian(
        m, X[:2], vectorize=True
    ),
    "jit.trace": traced,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("every", [1, 2])
def test_transforms_and_tracers_go_on_as_without_a_watch(name: str, every: int) -> None:
    call = TRANSFORMED[name]
    made = []
    for is_watched in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def loop(
            model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer
        ) -> list[Any]:
            found = []
            for _ in range(3):
                found.append(call(model))
                step(model, optimizer)
            return [*found, call(model), *model.parameters()]

        if not is_watched:
            made.append(loop())
            continue
        with watch(model, optimizer, every=every) as seen:
            made.append(loop())
        layer = seen.history["layers"]["0"]
        assert all(v is None or v == v for v in layer["weight_gradient_norm"])
        seen.to_json()
    plain, watched = (tree_leaves(each) for each in made)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    if name not in ("batched gradients", "jit.trace"):  # these call it for plain ones
        assert seen.steps == 3


def test_steps_of_meta_learning_are_those_of_the_outer_loop() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch(model, optimizer, every=1) as seen:
        for _ in range(4):
            held = dict(model.named_parameters())
            inner = grad(lambda held: loss_of(model, held, X, Y))(held)
            fast = {name: held[name] - 0.01 * inner[name] for name in held}
            optimizer.zero_grad()
            loss_of(model, fast, X, Y).backward()
            optimizer.step()
    assert seen.history["steps"] == [0, 1, 2, 3]
    assert all(seen.history["layers"]["0"]["weight_gradient_norm"])


def test_a_model_that_is_called_in_transforms_alone_is_not_judged() -> None:
    model = network()
    with watch(model) as seen:
        per_sample(model)
    (reading,) = seen.readings()
    assert reading.severity == "not_judged"
    assert "torch.func" in reading.evidence
    assert "torch.func" in seen.to_text()


def test_a_compiled_model_is_not_passed_over_in_silence() -> None:
    compiled: Any = torch.compile(network(), backend="eager")
    with watch(compiled) as seen:
        F.cross_entropy(compiled(X), Y).backward()
    assert "the model is compiled" in seen.to_text()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) as seen:
        inside: Any = torch.compile(model, backend="eager")
        step(inside, optimizer)
    assert "no module of the watched Sequential" in seen.to_text()
    with pytest.raises(ArgumentError, match=r"before torch\.compile"):
        seen.findings()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_in_backward_is_no_step(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)]
    model = nn.Sequential(*parts, nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, every=1) as seen:
        for _ in range(6):
            x = X.clone().requires_grad_()
            y = checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant)
            optimizer.zero_grad()
            F.cross_entropy(y, Y).backward()
            optimizer.step()
    assert seen.history["steps"] == [0, 1, 2, 3, 4, 5]
    layers = seen.history["layers"]
    assert {"0.0", "4"} <= set(layers)
    assert all(layers["0.0"]["weight_gradient_norm"])


def test_a_model_saved_in_a_watch_is_read_without_normkit() -> None:
    model = network()
    with watch(model) as seen:
        F.cross_entropy(model(X), Y).backward()
        stream = io.BytesIO()
        torch.save(model, stream)
        made = pickle.dumps(model)
    assert b"normkit" not in stream.getvalue() + made
    twin = pickle.loads(made)
    assert torch.equal(twin(X), model(X))
    assert seen.steps == 1
