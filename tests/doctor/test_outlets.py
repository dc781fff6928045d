"""Where findings and histories go: JSON with a schema, TensorBoard, histograms."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from doctor.models import batches, build
from normkit.doctor import diagnose, watch
from normkit.doctor.schema import DIAGNOSIS
from normkit.errors import DependencyError

LOSS = nn.CrossEntropyLoss()
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def faults(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Where `value` is not as the schema says; for the words that schema uses."""
    assert set(schema) <= {
        *("$schema", "title", "type", "properties", "required", "items", "enum"),
        *("additionalProperties", "anyOf", "pattern", "minimum"),
    }
    if "anyOf" in schema and all(faults(value, s, where) for s in schema["anyOf"]):
        return [f"{where}: {value!r} fits none"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} not in {schema['enum']}"]
    kind = schema.get("type")
    is_bool = isinstance(value, bool) and kind != "boolean"
    if kind and (is_bool or not isinstance(value, TYPES[kind])):
        return [f"{where}: {value!r} is no {kind}"]
    found = []
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{where}: {value!r} is too small")
    if "properties" in schema:
        found += [f"{where}: no {k}" for k in schema["required"] if k not in value]
        for key, item in value.items():
            if key in schema["properties"]:
                found += faults(item, schema["properties"][key], f"{where}/{key}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{where}: {key} is unknown")
    if "items" in schema:
        for index, item in enumerate(value):
            found += faults(item, schema["items"], f"{where}/{index}")
    return found


@pytest.fixture(scope="module")
def ill() -> Any:
    model = build("mlp", momentum=0.001)
    for x, _ in batches()[:10]:
        model(x)
    model[1].running_var[0] = float("nan")
    return diagnose(model, batches()[:8], LOSS)


def test_a_diagnosis_is_as_its_schema_says(ill: Any) -> None:
    for diagnosis in (ill, ill.confirm(), ill.explain()):
        text = diagnosis.to_json()
        found = json.loads(text, parse_constant=pytest.fail)
        assert faults(found, DIAGNOSIS) == []
        assert found["findings"]
        assert found["clear"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("named"),
        lambda d: d.update(more=1),
        lambda d: d["findings"][0].update(severity="bad"),
        lambda d: d["findings"][0].update(value="much"),
        lambda d: d["findings"][0].update(id="X1"),
        lambda d: d["clear"][0].pop("evidence"),
        lambda d: d.update(samples=-1),
        lambda d: d.update(gap={}),
    ],
)
def test_the_schema_refuses_another_form(ill: Any, change) -> None:
    found = copy.deepcopy(json.loads(ill.to_json()))
    change(found)
    assert faults(found, DIAGNOSIS)


def test_the_schema_is_one() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="another validator")
    jsonschema.Draft202012Validator.check_schema(DIAGNOSIS)


class Written:
    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.flushed = False

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def flush(self) -> None:
        self.flushed = True


def watched() -> Any:
    model = build("mlp", act=nn.Sigmoid, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, every=2) as seen:
        for x, y in batches()[:6]:
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            optimizer.step()
            seen.log(loss=loss.item())
    return seen


def test_tensorboard_gets_every_number_of_the_history() -> None:
    seen, writer = watched(), Written()
    written = seen.to_tensorboard(writer)
    assert writer.flushed
    assert written == sum(map(len, writer.scalars.values()))
    assert [step for step, _ in writer.scalars["normkit/loss"]] == [0, 1, 2, 3, 4, 5]
    layers = seen.history["layers"]
    for name in ("input_std", "saturated", "low"):
        wanted = list(zip([0, 2, 4], layers["2"][name], strict=True))
        assert writer.scalars[f"normkit/{name}/2"] == wanted
    assert "normkit/saturated/0" not in writer.scalars


def test_tensorboard_writes_a_file_or_says_what_is_missing(tmp_path: Path) -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(DependencyError, match="pip install tensorboard"):
            watched().to_tensorboard(tmp_path)
        return
    watched().to_tensorboard(tmp_path)
    assert list(tmp_path.glob("events*"))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_histograms_count_every_value_before_and_after(scale: float) -> None:
    source = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.BatchNorm1d(5))
    data = [scale * (7 + torch.randn(40, 5, generator=source)) for _ in range(3)]
    layer = diagnose(model, data).statistics.layers[0]
    for histogram, values in (
        (layer.before, torch.cat(data)),
        (layer.after, torch.cat([_standardized(x) for x in data])),
    ):
        assert histogram.counts.sum() == 600
        # The middle of the mass is where that of the values is, to a bin's width.
        centres = torch.tensor(histogram.edges).unfold(0, 2, 1).mean(1)
        mean = (centres * histogram.counts).sum() / 600
        width = (histogram.high - histogram.low) / len(histogram.counts)
        assert abs(mean - values.mean()) < width
        inside = (values < centres[24] - width / 2).sum()
        assert abs(histogram.counts[:24].sum() - inside) <= 2


def test_a_histogram_of_a_constant_or_of_nothing_finite_is_none_or_one_bin() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    layer = diagnose(model, [torch.full((8, 4), 3.0)]).statistics.layers[0]
    assert (layer.before.counts > 0).sum() == 1
    layer = diagnose(model, [torch.full((8, 4), torch.nan)]).statistics.layers[0]
    assert layer.before is None


def _standardized(x: torch.Tensor) -> torch.Tensor:
    mean, var = x.double().mean(0), x.double().var(0, unbiased=False)
    return ((x - mean) / (var + 1e-5).sqrt()).float()


def test_the_layers_shown_are_those_in_which_something_is_to_be_seen() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def shown() -> list[str]:
        with watch(model, unit=1) as seen:
            for _ in range(3):
                model(torch.randn(16, 8)).sum().backward()
        return re.findall(r"Input of unit 1 of (\d)", seen.to_html())

    assert set(shown()) == {"1", "5"}
    # The unit of the first layer gets one value, whatever the inputs.
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0.5
    assert set(shown()) == {"3", "5"}
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight[1], layer.bias[1] = 0, 0.5
    assert set(shown()) == {"1", "5"}
