"""A TARGET on the command line: `file.py:factory` or `package.module:factory`.

The factory is called without arguments; a module-level model or dict is taken as it is.
It returns:

    def digits():
        return {
            "model": model,            # a torch.nn.Module; always required
            "loader": loader,          # batches, as in training
            "loss_fn": loss_fn,        # loss_fn(output, targets)
        }

a mapping or an object with these names as attributes, a tuple in this order, or the
model alone. Names that only some commands use: `optimizer`, `forward`, `targets`,
`metric`, `example_inputs`, `train`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from normkit.errors import NormkitError, TargetError
from normkit.modeling.batch import Forward, Targets
from normkit_cli.checkpoint import Checkpoint

__all__ = ["Target", "read_target"]


@dataclass(frozen=True)
class Target:
    """Result of a factory.

    Attributes:
        model: The model.
        loader: Batches as in training, or None.
        loss_fn: `loss_fn(output, targets)`, one number.
        optimizer: The optimizer that trains the model.
        forward: `forward(model, batch)`, for batches that are not `(inputs, targets)`.
        targets: `targets(batch)`, for the same.
        metric: `metric(output, targets)`, higher is better.
        example_inputs: Arguments of the model.
        train: `train(steps)` trains the model for about so many steps, in the
            program's own loop.
    """

    model: nn.Module
    loader: Iterable[Any] | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    optimizer: Any = None
    forward: Forward | None = None
    targets: Targets | None = None
    metric: Callable[[Any, Any], float] | None = None
    example_inputs: Any = None
    train: Callable[[int], Any] | None = None

    def needs(self, *names: str) -> None:
        """Require that the target has all of `names`.

        Raises:
            TargetError: One of them is None.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise TargetError(
                f"the target gave no {' and no '.join(missing)}, which this command "
                f"needs; let the factory return a dict with {', '.join(names)}"
            )

    def first_batch(self) -> Any:
        """Return the loader's first batch; None where there is none."""
        return None if self.loader is None else next(iter(self.loader), None)


def read_target(text: str, checkpoint: Path | None = None) -> Target:
    """Call the factory that `text` names, and load a checkpoint into its model.

    Args:
        text: `file.py:factory` or `package.module:factory`. As with `python file.py`,
            the file's folder (for a module: the working folder) stays first in
            `sys.path`.
        checkpoint: A file of `torch.save` with the weights of the model; only tensors
            and plain data are read from it.

    Raises:
        TargetError: There is no such file, module or factory, the factory failed or
            returned no model, or the checkpoint does not fit the model.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(
            f"{text!r} names no factory; write file.py:factory or "
            "package.module:factory"
        )
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    with _own_arguments(place):
        return _read(place, name, text, checkpoint, is_file=is_file)


@contextmanager
def _own_arguments(place: str) -> Iterator[None]:
    """Let the program read a command line of its own, without arguments.

    A program that parses its arguments, or exits, does so as under `python file.py`.
    """
    given = sys.argv
    sys.argv = [place]
    try:
        yield
    except SystemExit as error:
        raise TargetError(
            f"{place} exited with {error.code!r} while it was read; it is run without "
            "arguments: give each a default, and let nothing exit on import or in the "
            "factory"
        ) from error
    finally:
        sys.argv = given


def _read(
    place: str, name: str, text: str, checkpoint: Path | None, *, is_file: bool
) -> Target:
    module = _from_file(Path(place)) if is_file else _from_name(place)
    factory = getattr(module, name, None)
    is_made = isinstance(factory, nn.Module | Mapping | Target)
    if not is_made and not callable(factory):
        what = f"no function {name!r}"
        if factory is not None:
            kind = type(factory).__name__
            what = f"a {kind} named {name!r}, no model and no function"
        raise TargetError(f"{place} has {what}; its functions: {_functions(module)}")
    try:
        # A model, or a dict, that the file made as it was imported.
        made: Any = factory if is_made else factory()  # type: ignore[operator]
    except NormkitError:
        raise
    except Exception as error:
        raise TargetError(
            f"{name}() of {place} raised {type(error).__name__}: {error}; it is called "
            "without arguments; --traceback shows where"
        ) from error
    target = _target(made, text)
    if checkpoint is not None:
        Checkpoint.read(checkpoint).load_into(target.model)
    return target


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}; give the path of a Python file")
    path = path.resolve()
    _put_first(path.parent)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None or importlib.util.find_spec(name) is not None:
        found = known or importlib.util.find_spec(name)
        origin = getattr(found, "__file__", None) or getattr(found, "origin", None)
        if origin != str(path):
            name = f"normkit_target_{name}"  # a file called like an installed package
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses and pickle look up their module by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    return module


def _from_name(name: str) -> ModuleType:
    _put_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        raise TargetError(
            f"there is no module {name}; give one that Python finds from here, or a "
            "path that ends in .py"
        ) from error
    except Exception as error:
        raise _failed(name, error) from error


def _put_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _failed(place: str, error: Exception) -> TargetError:
    return TargetError(
        f"importing {place} raised {type(error).__name__}: {error}; --traceback shows "
        "where"
    )


def _functions(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    return ", ".join(own) or "none"


def _target(made: Any, text: str) -> Target:
    names = [each.name for each in fields(Target)]
    if isinstance(made, Target):
        return made
    if isinstance(made, nn.Module):
        return Target(made)
    if isinstance(made, Mapping):
        unknown = [str(key) for key in made if key not in names]
        if unknown:
            raise TargetError(
                f"{text} returned {', '.join(unknown)}, which no command knows; the "
                f"names are {', '.join(names)}"
            )
        found: dict[str, Any] = dict(made)
    elif isinstance(made, tuple | list):
        found = dict(zip(names[:3], made, strict=False))
        if len(made) > 3:
            raise TargetError(
                f"{text} returned {len(made)} values; return (model, loader, loss_fn), "
                "or a dict for more"
            )
    else:
        found = {name: getattr(made, name, None) for name in names}
    if not isinstance(found.get("model"), nn.Module):
        raise TargetError(
            f"{text} returned {type(made).__name__}, which holds no torch.nn.Module as "
            "its model; return a dict with model, loader and loss_fn"
        )
    return Target(**found)
