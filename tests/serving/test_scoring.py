from __future__ import annotations

import base64
import http.server
import io
import json
import os
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

import adfm
from adfm import signing, tracking
from adfm.cli import main
from adfm.data import shards as shards_
from adfm.data import synthetic
from adfm.errors import AdfmError
from adfm.evaluation import calibration, metrics
from adfm.evaluation import guard as guard_
from adfm.evaluation.evaluate import evaluate
from adfm.files import file_digest, write_json
from adfm.models.predictor import Prediction
from adfm.params import Params
from adfm.registry import history, pyfunc
from adfm.registry.registration import register
from adfm.serving import scoring
from tests.servers import free_port, running

BASE = "embedded://tiny-base"
COLUMNS = ["label", "probability", "threshold", "boxes", "reasoning", "reason"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    synthetic.generate(folder / "raw", images=20)
    files = sorted((folder / "raw").glob("*/test/*/*.png"))[:4]
    with Image.open(files[0]) as upright:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn it by 90 degrees to the right
        upright.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    return [*files, folder / "turned.png"]


@pytest.fixture(scope="module")
def adapter(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training writes it, with an adapter that changes nothing yet."""
    from peft import LoraConfig, get_peft_model

    from adfm.models import loading
    from adfm.training.sft import save

    folder, params = tmp_path_factory.mktemp("adapter"), Params()
    loaded = loading.load(BASE, params.model)
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    save(folder, adapted, loaded, small_shards, params, "train", "0" * 32)
    return folder


@pytest.fixture(scope="module")
def version(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a version, as far as a served model needs them."""
    folder = tmp_path_factory.mktemp("version") / "version"
    pyfunc.write(folder)
    shutil.copytree(adapter, folder / "model")
    (folder / "params.yaml").write_text(tracking.settings(Params()))
    return folder


@pytest.fixture(scope="module")
def served(version: Path) -> Any:
    return mlflow.pyfunc.load_model(str(version))


def b64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def test_the_version_says_what_goes_in_and_out(version: Path, served: Any) -> None:
    assert served.metadata.signature.inputs.input_names() == ["image"]
    assert served.metadata.signature.outputs.input_names() == COLUMNS
    example = served.input_example
    assert isinstance(example, pd.DataFrame)
    assert scoring.content(example["image"][0]).startswith(b"\x89PNG")
    assert list(served.predict(example).columns) == COLUMNS
    assert not [path for path in version.rglob("*") if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".py")]
    requirements = (version / "requirements.txt").read_text()
    assert "adfm itself" in requirements and "--env-manager local" in requirements
    assert not any(line.startswith("adfm") for line in requirements.splitlines())
    # The base is named, not merged.
    assert json.loads((version / "model" / "adfm.json").read_text())["base"]["name"] == BASE
    assert not (version / "model" / "model.safetensors").exists()


def test_answers_are_those_of_the_command_line(
    served: Any, adapter: Path, photographs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *map(str, photographs), "--model", str(adapter), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = served.predict(pd.DataFrame({"image": [b64(file) for file in photographs]})).to_dict("records")
    assert [[row[key] for key in ("label", "boxes", "reasoning")] for row in rows] == [
        [line[key] for key in ("label", "boxes", "reasoning")] for line in printed
    ]
    assert [row["probability"] for row in rows] == pytest.approx([line["probability"] for line in printed], abs=1e-4)
    assert rows[-1]["boxes"] == rows[0]["boxes"]  # turned upright, it is the first one


def test_every_image_that_cannot_be_read_is_told(served: Any, photographs: list[Path]) -> None:
    images = [b64(photographs[0]), "no base64!", "", base64.b64encode(b"no image").decode(), "/etc/passwd"]
    with pytest.raises(MlflowException) as error:
        served.predict(pd.DataFrame({"image": images}))
    assert error.value.get_http_status_code() == 400
    message = str(error.value)
    assert message.startswith("4 of 5 images cannot be read, and none was answered.")
    for part in (
        "Image 2: it is neither base64 nor a URI.",
        "Image 3: it is empty.",
        "Image 4: it is not an image.",
        "Image 5: this server may not read there; ADFM_SERVE_URIS names the places that it may read.",
    ):
        assert part in message


def test_an_unclear_answer_cannot_pass_as_normal(
    version: Path, monkeypatch: pytest.MonkeyPatch, photographs: list[Path]
) -> None:
    from adfm.method import response

    model = scoring._load_pyfunc(str(version))
    words = "<think>I do not know"
    unclear = Prediction(None, None, [], response.parse(words), words)
    monkeypatch.setattr(model._model.predictor, "answers", lambda sizes, image: [unclear for _ in sizes])
    answered = model.predict(pd.DataFrame({"image": [b64(photographs[0])]}))
    row = {
        "label": "cannot judge",
        "probability": None,
        "threshold": None,
        "boxes": [],
        "reasoning": words,
        "reason": "the model gave no clear answer",
    }
    assert answered.to_dict("records") == [row]
    json.dumps(answered.to_dict("records"), allow_nan=False)


def test_a_request_is_bounded(served: Any, photographs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = photographs[0].stat().st_size
    monkeypatch.setattr(scoring, "_MOST_BYTES", size + 10)
    images = [b64(photographs[0])] * 2
    assert len(served.predict(pd.DataFrame({"image": images[:1]}))) == 1
    with pytest.raises(
        MlflowException, match=f"1 of 2 images .* Image 2: .* more than {size + 10} bytes; send several"
    ):
        served.predict(pd.DataFrame({"image": images}))


def test_predict_serving_and_the_gate_decide_alike(
    adapter: Path, small_shards: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"batch_size": 40, "max_new_tokens": 96, "bootstrap": 20}
    params = Params.model_validate({"evaluate": settings})
    evaluate({"trained": adapter}, small_shards, tmp_path / "evaluation", params)
    decision = register(adapter, small_shards, tmp_path / "evaluation", tmp_path / "out", params)
    fitted = calibration.read(tmp_path / "evaluation" / "calibration.json")
    assert fitted.threshold is not None
    table = pd.read_parquet(tmp_path / "evaluation" / "predictions.parquet")
    assert (table["decision"] != table["predicted"]).any()  # or the threshold would be of no consequence here
    judged = metrics.as_decided(table)
    right = (table["decision"] == table["label"]).mean()
    values = {row.metric: row.candidate for row in decision.rows if row.of == "whole"}
    assert values["accuracy"] == pytest.approx(right)
    assert values["iou"] == pytest.approx(judged["iou"].mean())

    tags = tracking.client().get_model_version("adfm", "1").tags
    assert tags["threshold"] == f"{fitted.threshold:.6g}" and tags["threshold_limit"] == "overkill <= 0.05"
    assert fitted.summary in tracking.client().get_model_version("adfm", "1").description

    answered = table["predicted"].notna()
    flipped = table["decision"] != table["predicted"]
    rows = pd.concat([judged[answered & flipped][:3], judged[answered & ~flipped][:3]])
    assert len(rows) > 3
    images = {record.id: record for record in shards_.read(small_shards, "test")}
    for key in rows["id"]:
        (tmp_path / f"{key}.png").write_bytes(images[key].image)
    files = [tmp_path / f"{key}.png" for key in rows["id"]]
    capsys.readouterr()
    assert main(["predict", *map(str, files), "--model", "models:/adfm/1", "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = mlflow.pyfunc.load_model("models:/adfm/1").predict(pd.DataFrame({"image": [b64(file) for file in files]}))
    for answered_rows in (printed, answers.to_dict("records")):
        assert [row["label"] for row in answered_rows] == rows["predicted"].tolist()
        assert [row["probability"] for row in answered_rows] == pytest.approx(rows["probability"].tolist(), abs=1e-4)
        assert {row["threshold"] for row in answered_rows} == {fitted.threshold}
        assert [len(row["boxes"]) for row in answered_rows] == [len(boxes) for boxes in rows["predicted_boxes"]]

    for artifact in (store / "mlartifacts").rglob("evaluation/calibration.json"):
        artifact.write_text(fitted.model_copy(update={"threshold": 0.0}).model_dump_json())
    assert main(["predict", str(files[0]), "--model", "models:/adfm/1"]) == 2
    assert "changed: evaluation/calibration.json" in capsys.readouterr().err


@pytest.fixture
def guarded(version: Path, small_shards: Path, tmp_path: Path) -> Path:
    """The version with a guard, as it is downloaded."""
    folder = tmp_path / "guarded"
    shutil.copytree(version, folder)
    (folder / "evaluation").mkdir()
    write_json(guard_.fit(small_shards, "test").model_dump(), folder / "evaluation" / guard_.FILE)
    (folder / "registered_model_meta").write_text("model_name: adfm\nmodel_version: '7'\n")
    return folder


def test_images_that_cannot_be_judged_are_refused_counted_and_not_put_to_the_model(
    guarded: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = guarded.parent / "log"
    monkeypatch.setenv("ADFM_SERVE_LOG", str(log))
    model = scoring._load_pyfunc(str(guarded))
    assert "No image is refused" not in capsys.readouterr().err
    batches = []
    answers = model._model.predictor.answers
    monkeypatch.setattr(
        model._model.predictor, "answers", lambda sizes, image: batches.append(len(sizes)) or answers(sizes, image)
    )
    black, large = guarded.parent / "black.png", guarded.parent / "large.png"
    Image.new("RGB", (128, 128)).save(black)
    with Image.open(photographs[0]) as image:
        image.resize((640, 640)).save(large)
    files = [photographs[0], black, large, photographs[-1]]  # the last is stored turned, with EXIF
    rows = model.predict(pd.DataFrame({"image": [b64(file) for file in files]})).to_dict("records")
    alone = model.predict(pd.DataFrame({"image": [b64(photographs[0])]})).to_dict("records")
    assert batches == [2, 1]
    assert [row["label"] == "cannot judge" for row in rows] == [False, True, True, False]
    assert [row["reason"] for row in rows] == [
        None,
        "it is black, the same everywhere",
        "its size of 640 x 640 is not like the training images (longer side 128)",
        None,
    ]
    for row in rows[1:3]:
        assert (row["probability"], row["boxes"], row["reasoning"]) == (None, [], "")
    assert [rows[0][key] for key in COLUMNS if key != "probability"] == [
        alone[0][key] for key in COLUMNS if key != "probability"
    ]
    json.dumps(rows, allow_nan=False)

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {entry["version"] for entry in entries} == {"adfm/7"}
    assert [entry["event"] for entry in entries] == ["answered", "cannot judge", "cannot judge", "answered"]
    assert entries[0]["labels"]["cannot judge"] == 2 and sum(entries[0]["labels"].values()) == 4
    assert [(entry["kind"], entry["image"]) for entry in entries[1:3]] == [
        ("uniform", file_digest(black)),
        ("size", file_digest(large)),
    ]
    assert entries[1]["reason"] == rows[1]["reason"]
    assert main(["served", str(log)]) == 0
    counts = capsys.readouterr().out
    assert re.search(r"images answered +5\n", counts) and re.search(r"cannot judge +2 +40.00%\n", counts)
    assert re.search(r"uniform +1 +20.00%\n +size +1 +20.00%", counts)


def test_a_request_with_unreadable_images_is_not_counted(
    guarded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = guarded.parent / "log"
    monkeypatch.setenv("ADFM_SERVE_LOG", str(log))
    model = scoring._load_pyfunc(str(guarded))
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128)).save(buffer, "PNG")
    black = base64.b64encode(buffer.getvalue()).decode()
    with pytest.raises(MlflowException, match="1 of 2 images cannot be read"):
        model.predict(pd.DataFrame({"image": [black, "no base64!"]}))
    assert log.read_text() == ""


def test_a_version_without_a_guard_is_served_and_says_so_once(
    version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scoring._load_pyfunc(str(version))
    warning = "version: No image is refused: there is no guard.json, so a black one is answered as any other."
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128)).save(buffer, "PNG")
    data = pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode()]})
    assert model.predict(data)["label"][0] in ("normal", "anomalous")
    assert capsys.readouterr().err == ""


def test_a_guard_that_cannot_be_read_is_not_left_out(guarded: Path) -> None:
    (guarded / "evaluation" / guard_.FILE).write_text("{}x")
    with pytest.raises(guard_.BadGuard, match=r"guard\.json is not a guard"):
        scoring._load_pyfunc(str(guarded))


def test_a_log_that_cannot_be_written_is_refused_at_the_start(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFM_SERVE_LOG", str(version / "nowhere" / "log"))
    with pytest.raises(AdfmError, match="ADFM_SERVE_LOG: .* cannot be written"):
        scoring._load_pyfunc(str(version))


# -------------------------------------------------------------------------------------------------------------- shadow


def test_a_candidate_answers_in_the_shadow_of_production(
    guarded: Path, version: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = guarded.parent / "log"
    monkeypatch.setenv("ADFM_SERVE_LOG", str(log))
    data = pd.DataFrame({"image": [b64(file) for file in photographs]})
    expected = scoring._load_pyfunc(str(guarded)).predict(data)
    log.unlink()
    monkeypatch.setenv("ADFM_SHADOW", str(version))  # the same model without a guard
    model = scoring._load_pyfunc(str(guarded))
    black = guarded.parent / "black.png"
    Image.new("RGB", (128, 128)).save(black)
    pd.testing.assert_frame_equal(model.predict(data), expected)
    assert model.predict(pd.DataFrame({"image": [b64(black)]}))["label"][0] == "cannot judge"
    model.shadow.wait()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    compared = [entry for entry in entries if entry["event"] == "compared"]
    assert sum(entry["images"] for entry in compared) == len(photographs) + 1
    assert sum(entry["differ"] for entry in compared) == 1
    [differs] = [entry for entry in entries if entry["event"] == "differs"]
    assert (differs["version"], differs["candidate"], differs["in"]) == ("adfm/7", "version", "label")
    assert differs["image"] == file_digest(black)
    assert differs["production"]["label"] == "cannot judge" and differs["production"]["reason"]
    assert differs["shadow"]["label"] in ("normal", "anomalous") and differs["shadow"]["probability"] is not None


def test_a_shadow_that_cannot_be_loaded_stops_nothing(
    version: Path, photographs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ADFM_SERVE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("ADFM_SHADOW", str(tmp_path / "nowhere"))
    model = scoring._load_pyfunc(str(version))
    assert model.shadow is None
    assert "ADFM_SHADOW: the shadow cannot be loaded, only production answers: " in capsys.readouterr().err
    assert json.loads((tmp_path / "log").read_text())["event"] == "failed"
    assert model.predict(pd.DataFrame({"image": [b64(photographs[0])]}))["label"][0] in ("normal", "anomalous")


def test_files_that_the_shadow_cannot_read_are_refused_by_it(version: Path, photographs: list[Path]) -> None:
    model = scoring._load_pyfunc(str(version))
    rows = model.answers([b"no image", photographs[0].read_bytes()])
    assert [row["label"] == "cannot judge" for row in rows] == [True, False]
    assert rows[0]["reason"] == "it is not an image"


def test_a_calibration_of_another_model_is_not_served(version: Path, tmp_path: Path) -> None:
    shutil.copytree(version, tmp_path / "version")
    (tmp_path / "version" / "evaluation").mkdir()
    other = calibration.Calibration(threshold=0.5, limit={"overkill": 0.1}, model="another")
    (tmp_path / "version" / "evaluation" / "calibration.json").write_text(other.model_dump_json())
    with pytest.raises(AdfmError, match="made for another model"):
        scoring._load_pyfunc(str(tmp_path / "version"))


# ---------------------------------------------------------------------------------------------------------------- URIs


def test_base64_and_data_uris() -> None:
    assert scoring.content("aGVs\nbG8=") == b"hello"
    assert scoring.content("data:image/png;base64,aGVsbG8=") == b"hello"
    assert scoring.content("DATA:,a%20b") == b"a b"
    for odd in ("aGVsbG8", "a b c", "data:image/png;base64,!", "picture.png", "\N{SNOWMAN}"):
        with pytest.raises(AdfmError, match="neither base64 nor a URI"):
            scoring.content(odd)


def test_files_are_read_in_named_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "line 3").mkdir()
    inside, outside = tmp_path / "line 3" / "a.png", tmp_path / "secret.png"
    inside.write_bytes(b"inside")
    outside.write_bytes(b"outside")
    (tmp_path / "line 3" / "link.png").symlink_to(outside)
    os.mkfifo(tmp_path / "line 3" / "pipe.png")
    refused = "this server may not read there"
    with pytest.raises(AdfmError, match=refused):
        scoring.content(inside.as_uri())
    monkeypatch.setenv(scoring.URIS, f"s3://bucket/x {(tmp_path / 'line 3').as_uri()}")
    assert scoring.content(inside.as_uri()) == scoring.content(str(inside)) == b"inside"
    folder = (tmp_path / "line 3").as_uri()
    for elsewhere in (
        outside.as_uri(),
        str(outside),
        f"{folder}/../secret.png",
        f"{folder}/%2e%2e/secret.png",
        f"{folder}/link.png",
        f"{folder}3/a.png",
        f"file://host{inside}",
        "file:///etc/passwd",
        "ftp://host/a.png",
        "file://[broken",
    ):
        with pytest.raises(AdfmError, match=refused):
            scoring.content(elsewhere)
    for unreadable in ("pipe.png", "none.png"):
        with pytest.raises(AdfmError, match="cannot be read"):
            scoring.content(f"{folder}/{unreadable}")
    monkeypatch.setattr(scoring, "_MOST_BYTES", 3)
    with pytest.raises(AdfmError, match="more than 3 bytes"):
        scoring.content(str(inside))


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server with an image, a redirection, and what nobody is to reach."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if "moved" in self.path else 404 if "none" in self.path else 200)
            self.send_header("Location", "/secret")
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_web_addresses_are_read_where_they_are_named(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scoring.URIS, f"{web}/camera/ /data")
    assert scoring.content(f"{web}/camera/1.png?at=3") == b"/camera/1.png?at=3"
    for elsewhere in (
        f"{web}/secret",
        f"{web}/camera/../secret",
        f"{web}/camera/%2E%2E/secret",
        f"{web}/camera/..\\secret",
        f"{web}/cameras",
        web.replace("http", "https") + "/camera/1.png",
        web.replace("http://", "http://user@") + "/camera/1.png",
        "http://169.254.169.254/camera/1.png",
        "http:///camera/1.png",
    ):
        with pytest.raises(AdfmError, match="this server may not read there"):
            scoring.content(elsewhere)
    for unreadable in ("moved", "none", "a b"):
        with pytest.raises(AdfmError, match="it cannot be read"):
            scoring.content(f"{web}/camera/{unreadable}")


def test_objects_are_read_in_named_buckets(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put_object(Bucket="data", Key="line 3/a.png", Body=b"inside")
    with pytest.raises(AdfmError, match="this server may not read there"):
        scoring.content("s3://data/line%203/a.png")
    monkeypatch.setenv(scoring.URIS, "s3://data/line%203")
    assert scoring.content("s3://data/line%203/a.png") == b"inside"
    with pytest.raises(AdfmError, match="this server may not read there"):
        scoring.content("s3://other/line%203/a.png")
    with pytest.raises(AdfmError, match=r"it cannot be read .*NoSuchKey"):
        scoring.content("s3://data/line%203/b.png")


# ----------------------------------------------------------------------------------------------------- the real server


def post(address: str, images: list[str]) -> tuple[int, Any]:
    body = json.dumps({"dataframe_records": [{"image": image} for image in images]}).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture
def address(store: Path, make_shards: Any, make_evaluation: Any, adapter: Path, tmp_path: Path) -> Iterator[str]:
    """`mlflow models serve` of a version that was registered and is in production."""
    shards = make_shards(tmp_path / "shards")
    params = Params()
    register(adapter, shards, make_evaluation(tmp_path / "evaluation", shards, 36), tmp_path / "out", params)
    client, keys = tracking.client(), signing.keys()
    seen = history.read(client, "adfm", keys)
    moved = {"production": "1", "previous": "none", "replaced": "none", "manifest": seen.last("judge").manifest}
    history.append(client, "adfm", keys, seen, "promote", "1", **moved)
    client.set_registered_model_alias("adfm", "production", "1")
    port = free_port()
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(adfm.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/adfm@production"]
    command += ["--env-manager", "local", "--port", str(port)]
    with running(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log", environment):
        yield f"http://127.0.0.1:{port}"


def test_mlflow_serves_the_version_in_production(
    address: str, photographs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["predict", *map(str, photographs), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["model"] for line in printed} == {"models:/adfm/1"}

    images = [b64(file) for file in photographs]
    spoilt = [images[0], "no base64!"]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda sent: post(address, sent), [images, spoilt, images[:1], images[1:2]]))
    (status, whole), (refused, why), *single = results
    assert status == 200 and refused == 400
    assert why["error_code"] == "INVALID_PARAMETER_VALUE"
    assert "1 of 2 images cannot be read" in why["message"] and "Image 2" in why["message"]
    answered = [(whole["predictions"], printed)]
    answered += [(body["predictions"], [line]) for (_, body), line in zip(single, printed, strict=False)]
    for rows, lines in answered:
        assert [[row[key] for key in ("label", "boxes", "reasoning")] for row in rows] == [
            [line[key] for key in ("label", "boxes", "reasoning")] for line in lines
        ]
        assert [row["probability"] for row in rows] == pytest.approx([r["probability"] for r in lines], abs=1e-4)
    assert post(address, [photographs[0].as_uri()])[0] == 400
