"""Records and pages in W&B, offline, and in MLflow, in a local file."""

import contextlib
import json
import struct
import time

import pytest
import torch
from torch.nn import functional as F

import normkit
from integrations.networks import library, network, samples
from normkit.doctor.scalars import scalars, scalars_by_step
from normkit.errors import ArgumentError

pytest.importorskip("matplotlib", reason="pages need normkit[report]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def seen():
    model, (x, y) = network(), samples()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with normkit.watch(model, optimizer, every=2) as watch:
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            watch.log(loss=float(loss))
    return watch


def test_scalars_have_one_tag_for_a_quantity_of_a_layer(seen) -> None:
    found = list(scalars(seen.history))
    tags = {tag for tag, _, _ in found}
    assert {"normkit/loss", "normkit/weight_norm/0", "normkit/input_mean/1"} <= tags
    by_step = scalars_by_step(seen.history)
    assert list(by_step) == [0, 1, 2, 3, 4, 5]
    assert set(by_step[1]) == {"normkit/loss"}
    assert sum(map(len, by_step.values())) == len(found)


def test_wandb_gets_the_record_with_its_own_steps_and_the_page(
    seen, tmp_path, monkeypatch
) -> None:
    library("wandb")
    from normkit.integrations import wandb as ours

    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ArgumentError, match=r"call wandb\.init"):
        ours.log(seen)
    run = ours.wandb.init(mode="offline", dir=str(tmp_path), project="normkit")
    # A run that is further than the record begins.
    run.log({"loss": 1.0}, step=100)
    written = ours.log(seen)
    run.finish()
    rows = list(_history(tmp_path))
    assert written == len(list(scalars(seen.history)))
    steps = [row["normkit/step"] for row in rows if "normkit/loss" in row]
    assert steps == [0, 1, 2, 3, 4, 5]
    values = [
        row["normkit/weight_norm/0"] for row in rows if "normkit/weight_norm/0" in row
    ]
    expected = seen.history["layers"]["0"]["weight_norm"]
    assert values == pytest.approx(expected)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) == 1
    assert "Watched training" in pages[0].read_text()


def _history(folder):
    """The rows of the one offline run in a folder, from its file."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    # A process of W&B writes the file, and may end after `finish` returned.
    deadline, kinds = time.monotonic() + 60, []
    while "exit" not in kinds and time.monotonic() < deadline:
        time.sleep(0.1)
        found = [
            wandb_internal_pb2.Record.FromString(data)
            for data in _records(path.read_bytes())
        ]
        kinds = [record.WhichOneof("record_type") for record in found]
    for record, kind in zip(found, kinds, strict=True):
        if kind == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def _records(content: bytes):
    """The records of a log of LevelDB, after the 7 bytes that W&B begins it with."""
    block, whole = 32768, b""
    place = 7
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + length > len(content):
            return  # it is being written
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the record is whole, or this is its last part
            yield whole
            whole = b""


@pytest.fixture
def mlflow(monkeypatch):
    # Since MLflow 3 a folder of files is to be asked for.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return library("mlflow")


@pytest.mark.usefixtures("mlflow")
def test_mlflow_gets_the_record_and_the_page(seen, tmp_path, monkeypatch) -> None:
    from normkit.integrations import mlflow as ours

    # Several requests, the last one not full.
    monkeypatch.setattr(ours, "MAX_METRICS", 100)
    with contextlib.suppress(Exception):
        ours.mlflow.end_run()
    ours.mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with pytest.raises(ArgumentError, match=r"mlflow\.start_run"):
        ours.log(seen)
    with ours.mlflow.start_run() as run:
        written = ours.log(seen)
    client = ours.mlflow.MlflowClient()
    assert written == len(list(scalars(seen.history)))
    history = client.get_metric_history(run.info.run_id, "normkit/weight_norm/0")
    found = sorted((metric.step, metric.value) for metric in history)
    expected = seen.history["layers"]["0"]["weight_norm"]
    assert [step for step, _ in found] == [0, 2, 4]
    assert [value for _, value in found] == pytest.approx(expected)
    # Of the last request, too.
    assert len(client.get_metric_history(run.info.run_id, "normkit/loss")) == 6
    (page,) = tmp_path.rglob("watch.html")
    assert "Watched training" in page.read_text()


@pytest.mark.usefixtures("mlflow")
def test_a_diagnosis_is_a_page(tmp_path) -> None:
    from normkit.integrations import mlflow as ours

    batches = [samples()] * 2
    diagnosis = normkit.diagnose(network(), batches, F.cross_entropy)
    ours.mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with ours.mlflow.start_run():
        assert ours.log(diagnosis) == 0
    (page,) = tmp_path.rglob("diagnosis.html")
    assert "Diagnosis" in page.read_text()
