"""Submitting, against doubles of the KFP API and of Kubernetes' API that the real clients talk to."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp import dsl
from kubernetes.config import kube_config

from adfm.errors import AdfmError
from pipelines import checks, promotion, training
from pipelines.command import main
from pipelines.ir import write
from tests.certificates import self_signed
from tests.pipelines.kfp_api import Server, misshapen, served


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a configuration of kubectl or KFP's client, outside of a cluster."""
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    for name in ("KUBERNETES_SERVICE_HOST", "KF_PIPELINES_UI_ENDPOINT", "ADFM_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):  # set for a private authority
        monkeypatch.setenv(name, "")
    return tmp_path


@cache
def compiled(pipeline: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write(pipeline, Path(folder) / "pipeline.yaml")
        return (Path(folder) / "pipeline.yaml").read_text()


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pipeline is compiled once for all tests, a second each time otherwise."""
    monkeypatch.setattr("pipelines.server.write", lambda pipeline, file: file.write_text(compiled(pipeline)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    double = Server("good")

    def answer(method: str, url: str, body: bytes, headers: Any) -> tuple[int, Any]:
        if headers.get("Authorization") != f"Bearer {double.token}":
            return 401, {"message": "token is expired"}
        return double.answer(method, url, body)

    with served(answer) as address:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", address)
        monkeypatch.setenv("KFP_TOKEN", "good")
        yield double
    assert double.wrong == []


def submit(*argv: str, pipeline: Any = training) -> int:
    return main(pipeline.PIPELINES, pipeline.options, pipeline.arguments, ["submit", *argv])


def nothing_made(server: Server) -> bool:
    return not any(server.things.values()) and not server.uploads


def test_a_run_is_of_a_version_of_the_pipeline_with_the_whole_settings(server: Server) -> None:
    assert submit("--set", "seed=3", "--num-gpus", "2", "--service-account", "trainer", "--experiment", "line") == 0
    (run,) = server.things["runs"]
    assert server.things["experiments"][0]["display_name"] == "line"
    assert run["experiment_id"] == server.things["experiments"][0]["experiment_id"]
    assert run["service_account"] == "trainer"
    reference = {"pipeline_id": "pipelines-0", "pipeline_version_id": "versions-0"}
    assert run["pipeline_version_reference"] == reference
    given = run["runtime_config"]["parameters"]
    assert yaml.safe_load(given["settings"])["seed"] == 3
    assert given["num_gpus"] == 2
    assert given["data_revision"] == "synthetic://?images=200"
    assert given["ui"] == ""
    (version,) = server.things["versions"]
    assert version["display_name"].startswith("training-")
    pipeline, platform = yaml.safe_load_all(server.uploads[0])
    assert len(server.uploads) == 1
    assert pipeline["pipelineInfo"]["name"] == "adfm-training"
    assert "kubernetes" in platform["platforms"]


def test_settings_files_are_laid_over_one_another_before_they_are_sent(server: Server, tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text("seed: 1\ntrain: {steps: 5, beta: 0.5}")
    overlay.write_text("train: {steps: 6, top_k: 50}")
    files = ["--params", str(base), "--params", str(overlay)]
    assert submit(*files, "--set", "seed=2") == 0
    (run,) = server.things["runs"]
    sent = yaml.safe_load(run["runtime_config"]["parameters"]["settings"])
    assert (sent["seed"], sent["train"]["steps"], sent["train"]["beta"], sent["train"]["top_k"]) == (2, 6, 0.5, 50)
    overlay.write_text("train: {stepz: 6}")
    assert submit(*files) == 1
    assert len(server.things["runs"]) == 1


def test_a_cross_validation_that_is_not_done_on_a_cluster_is_reported(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--set", "evaluate.folds=5") == 0
    assert "warning: evaluate.folds is 5 and is not used in a pipeline of Kubeflow" in capsys.readouterr().err


def test_the_same_data_settings_and_images_asked_twice_are_one_run(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert submit() == 0
    assert len(server.things["runs"]) == 1
    assert "the same run is there already" in capsys.readouterr().out
    assert submit("--set", "seed=1") == 0
    assert submit("--data-revision", "another") == 0
    assert len(server.things["runs"]) == 3
    assert len(server.things["versions"]) == 1


def test_a_run_that_failed_is_made_again(server: Server) -> None:
    assert submit() == 0
    server.things["runs"][0]["state"] = "FAILED"
    assert submit() == 0
    assert len(server.things["runs"]) == 2


def test_other_images_are_another_run_of_another_version(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit() == 0

    def with_another_image(pipeline: Any, file: Path) -> None:
        write(pipeline, file)
        file.write_text(file.read_text().replace("localhost/adfm:gpu", "localhost/adfm@sha256:1"))

    monkeypatch.setattr("pipelines.server.write", with_another_image)
    assert submit() == 0
    assert (len(server.things["runs"]), len(server.things["versions"])) == (2, 2)


def test_of_two_that_are_started_at_once_the_later_one_is_ended(server: Server) -> None:
    server.rivals["runs"] = {"state": "PENDING"}
    assert submit() == 0
    assert server.terminated == ["runs-1"]


@pytest.mark.parametrize(("ends", "terminated"), [(True, []), (False, ["runs-1"])])
def test_the_older_of_two_stays_if_the_other_ends_and_else_gives_way(
    ends: bool, terminated: list[str], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP knows the age in seconds, before it stores a run: the younger may have looked too early to see ours."""
    server.rivals["runs"] = {"state": "PENDING", "created_at": "2026-01-02T00:00:00Z"}
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        server.things["runs"][0]["state"] = "CANCELING" if ends else "RUNNING"

    monkeypatch.setattr("pipelines.server.time", SimpleNamespace(sleep=sleep))
    assert submit() == 0
    assert server.terminated == terminated
    assert len(pauses) == (1 if ends else 10)


def test_data_that_may_have_changed_are_asked_for_again(server: Server) -> None:
    for _ in range(2):
        assert submit("--set", "fetch.source=s3://bucket/line") == 0
    assert len(server.things["runs"]) == 2
    assert server.things["runs"][0]["runtime_config"]["parameters"]["data_revision"] == ""


def test_a_schedule_is_made_once(server: Server) -> None:
    for _ in range(2):
        assert submit("--schedule", "0 0 3 * * *") == 0
    (recurring,) = server.things["recurringruns"]
    assert recurring["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert recurring["mode"] == "ENABLE"
    assert server.things["runs"] == []


def test_a_promotion_is_a_run_each_time(server: Server) -> None:
    for _ in range(2):
        assert submit("--version", "3", pipeline=promotion) == 0
    assert [run["runtime_config"]["parameters"]["version"] for run in server.things["runs"]] == ["3", "3"]


def test_a_token_that_has_expired_is_reported(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "old")
    assert submit() == 1
    error = capsys.readouterr().err
    assert "does not accept the token: it is missing or has expired" in error
    assert "KFP_TOKEN" in error
    assert "old" not in error
    assert server.things["experiments"] == []


@pytest.mark.parametrize("token", ["go od", "go\nod", "Bearer good", "göd"])
def test_a_token_that_cannot_be_one_is_refused_without_being_shown(
    token: str, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_TOKEN", token)
    assert submit() == 1
    error = capsys.readouterr().err
    assert "KFP_TOKEN holds blanks or characters that no token has" in error
    assert token not in error


def test_a_line_end_after_a_token_is_left_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_TOKEN", "good\n")
    assert submit() == 0


def test_a_token_is_taken_from_the_service_account(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delenv("KFP_TOKEN")
    (tmp_path / "token").write_text("good\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert submit() == 0


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("http://127.0.0.1:9", "the KFP API at http://127.0.0.1:9 cannot be reached"),
        ("kfp.example.com", "name the KFP API by an http(s):// address"),
        ("http://127.0.0.1:http", "name the KFP API by an http(s):// address"),
        ("http://127.0.0.1:9/a b", "name the KFP API by an http(s):// address"),
        ("http://127.0.0.1:9/pipeline/#/runs", "name the KFP API by an http(s):// address"),
        ("http://:8888", "name the KFP API by an http(s):// address"),
        ("", "--host is missing"),
    ],
)
def test_a_server_that_is_not_there_is_reported_at_once(
    host: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    assert submit("--host", host) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "does not reply as the KFP API does (BadStatusLine)"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"', "does not reply as the KFP API does (IncompleteRead)"),
        (b"", "cannot be reached: Remote end closed connection without response"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}', "answered, but is not the KFP API"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "answered, but is not the KFP API"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "it wants a login, or the address lacks a path"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the address may lack a path, as /pipeline"),
    ],
)
def test_a_server_that_is_not_the_kfp_api_is_reported(
    reply: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        assert submit("--host", f"http://127.0.0.1:{listener.getsockname()[1]}") == 1
        thread.join()
    assert message in capsys.readouterr().err


def test_a_page_for_logins_is_not_sent_the_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "good")
    tokens: list[str | None] = []

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization"))
            self.send_response(200 if self.path == "/login" else 302)
            self.send_header("Location", "/login")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Redirect) as http:
        thread = threading.Thread(target=lambda: [http.handle_request() for _ in range(2)])
        thread.start()
        assert submit("--host", f"http://127.0.0.1:{http.server_port}") == 1
        thread.join()
    assert tokens == ["Bearer good", None]
    assert "it wants a login" in capsys.readouterr().err


def test_the_client_sends_nothing_that_the_double_would_not_notice() -> None:
    assert misshapen({"display_name": 1, "nmae": "line"}, "V2beta1Experiment", "/experiments") == [
        "/experiments: V2beta1Experiment has no nmae",
        "/experiments.display_name: 1 is no str",
    ]


# Links


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_link_is_given_where_the_address_of_the_pages_is_known(
    by_variable: bool, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--set", "seed=1") == 0
    first = capsys.readouterr().out
    assert "run: runs-0" in first
    assert "http" not in first  # the API's address has no pages
    if by_variable:
        monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kfp.example.com/")
    assert submit(*([] if by_variable else ["--ui", "https://kfp.example.com/"])) == 0
    assert "https://kfp.example.com/#/runs/details/runs-1" in capsys.readouterr().out
    given = server.things["runs"][1]["runtime_config"]["parameters"]
    assert given["ui"] == "https://kfp.example.com"


@pytest.mark.parametrize("ui", ["kubeflow.example.com/pipeline", "https://kubeflow.example.com/pipeline/#/runs"])
def test_an_address_that_makes_no_link_is_refused(ui: str, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--ui", ui) == 1
    assert f"--ui {ui}: name KFP's pages by an http(s):// address" in capsys.readouterr().err
    assert nothing_made(server)


# Several users, several at once


def test_several_settings_in_a_namespace_are_runs_of_one_pipeline(server: Server) -> None:
    server.health["multi_user"] = True
    server.things["pipelines"].append({"pipeline_id": "shared", "namespace": "", "name": "adfm-training"})
    for seed in ("1", "2"):
        assert submit("--namespace", "team-a", "--set", f"seed={seed}") == 0
    assert submit("--namespace", "team-b") == 0
    places = [(each["namespace"], each["name"]) for each in server.things["pipelines"]]
    assert places == [("", "adfm-training"), ("team-a", "adfm-training"), ("team-b", "adfm-training")]
    assert [each["namespace"] for each in server.things["experiments"]] == ["team-a", "team-b"]
    assert [each["pipeline_id"] for each in server.things["versions"]] == ["pipelines-1", "pipelines-2"]
    assert len(server.things["runs"]) == 3


@pytest.mark.parametrize("name", ["a+b", "100% line", 'Linie "ä"'])
def test_an_experiment_of_any_name_is_known_again(name: str, server: Server) -> None:
    for _ in range(2):
        assert submit("--experiment", name) == 0
    assert [each["display_name"] for each in server.things["experiments"]] == [name]
    assert len(server.things["runs"]) == 1


def test_an_experiment_is_not_mistaken_for_one_that_differs_in_case(server: Server) -> None:
    for ident, name in enumerate(("LINE", "line")):
        server.things["experiments"].append({"experiment_id": str(ident), "display_name": name, "namespace": ""})
    assert submit("--experiment", "line") == 0
    assert server.things["runs"][0]["experiment_id"] == "1"


@dsl.component(base_image="localhost/adfm:cpu", install_kfp_package=False)
def nothing():
    pass


@dsl.pipeline(name="adfm-training")
def in_one():
    nothing()


@dsl.pipeline(name="adfm-training")
def in_parts():
    nothing()
    nothing()


def test_variants_are_versions_of_one_pipeline_that_can_be_told_apart(server: Server) -> None:
    variants = {"training": in_one, "training-in-parts": in_parts}
    for chosen in variants.values():
        assert main(variants, lambda _: None, lambda *_, chosen=chosen: (chosen, {}), ["submit"]) == 0
    (pipeline,) = server.things["pipelines"]
    assert pipeline["display_name"] == "adfm-training"
    one, parts = (each["display_name"] for each in server.things["versions"])
    assert re.fullmatch(r"training(-[0-9a-f]{12})?-[0-9a-f]{8}", one)
    assert re.fullmatch(r"training-in-parts(-[0-9a-f]{12})?-[0-9a-f]{8}", parts)


def test_each_variant_is_compiled_to_its_file(tmp_path: Path) -> None:
    variants = {"training": in_one, "training-in-parts": in_parts}
    assert main(variants, lambda _: None, lambda *_: (in_one, {}), ["compile", "--out", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["training-in-parts.yaml", "training.yaml"]


def test_a_missing_namespace_is_reported_before_anything_is_created(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.health["multi_user"] = True
    assert submit() == 1
    assert "--namespace is missing" in capsys.readouterr().err
    assert nothing_made(server)


def test_a_namespace_that_a_server_with_one_user_ignores_is_reported(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--namespace", "adfm-promotion") == 0
    assert "serves one user and ignores --namespace adfm-promotion" in capsys.readouterr().err
    assert submit("--namespace", "kubeflow") == 0  # where it is installed
    assert "ignores" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["experiments", "pipelines", "versions"])
def test_of_two_first_submissions_both_end_well(kind: str, server: Server) -> None:
    server.rivals[kind] = {}
    assert submit() == 0
    assert len(server.things[kind]) == 1
    assert server.things[kind][0]["created_at"] == "2025-12-31T23:59:59Z"  # the other one's
    assert len(server.things["runs"]) == 1


def test_a_conflict_with_something_that_cannot_be_seen_is_reported(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.rivals["pipelines"] = {"display_name": "renamed"}
    assert submit() == 1
    assert "answered 409" in capsys.readouterr().err


# Schedules

NIGHTLY = ("--schedule", "0 0 3 * * *")


def crons(server: Server) -> list[str]:
    return [each["trigger"]["cron_schedule"]["cron"] for each in server.things["recurringruns"]]


@pytest.mark.parametrize(
    "changed",
    [
        ("--schedule", "0 0 4 * * *"),
        (*NIGHTLY, "--set", "train.steps=7"),
        (*NIGHTLY, "--num-gpus", "2"),
        (*NIGHTLY, "--service-account", "another"),
        (*NIGHTLY, "--ui", "https://kfp.example.com"),
    ],
)
def test_a_schedule_that_changes_replaces_the_old_one(
    changed: tuple[str, ...], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*NIGHTLY) == 0
    assert submit(*changed) == 0
    assert crons(server) == [changed[1]]
    assert server.things["recurringruns"][0]["recurring_run_id"] != "recurringruns-0"
    assert server.policies == ["ORPHAN"]  # a run of the old one that is under way goes on
    assert "replaced: adfm-training-" in capsys.readouterr().out


def test_other_code_replaces_the_schedule(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit(*NIGHTLY) == 0

    def with_another_image(pipeline: Any, file: Path) -> None:
        write(pipeline, file)
        file.write_text(file.read_text().replace("localhost/adfm:gpu", "localhost/adfm@sha256:1"))

    monkeypatch.setattr("pipelines.server.write", with_another_image)
    assert submit(*NIGHTLY) == 0
    (schedule,) = server.things["recurringruns"]
    assert schedule["pipeline_version_reference"]["pipeline_version_id"] == "versions-1"


def test_a_newer_commit_of_the_same_data_replaces_the_schedule(server: Server) -> None:
    for commit in "ab":
        source = f"dvc://https://git.example.com/images.git@{commit * 40}:data/line-3"
        assert submit(*NIGHTLY, "--set", f"fetch.source={source}") == 0
    assert len(crons(server)) == 1


@pytest.mark.parametrize("line", ["fetch.source=s3://bucket/line-4", "mlflow.registered_model=line-4"])
def test_lines_do_not_replace_the_schedules_of_one_another(
    line: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*NIGHTLY) == 0
    assert submit("--schedule", "0 0 4 * * *", "--set", line) == 0
    assert sorted(crons(server)) == ["0 0 3 * * *", "0 0 4 * * *"]
    assert "another schedule of other data or another model stays: adfm-training-" in capsys.readouterr().out
    assert submit("--schedule", "0 0 5 * * *") == 0
    assert sorted(crons(server)) == ["0 0 4 * * *", "0 0 5 * * *"]


def test_schedules_of_other_pipelines_and_experiments_stay(server: Server) -> None:
    assert submit(*NIGHTLY) == 0
    assert submit("--schedule", "0 */10 * * * *", pipeline=promotion) == 0
    assert submit("--schedule", "0 0 4 * * *", "--experiment", "another") == 0
    assert len(crons(server)) == 3


def test_promotions_are_replaced_whatever_data_the_settings_name(server: Server) -> None:
    assert submit("--schedule", "0 */10 * * * *", pipeline=promotion) == 0
    changed = ("--schedule", "0 */5 * * * *", "--set", "fetch.source=s3://bucket/line-4")
    assert submit(*changed, pipeline=promotion) == 0
    assert crons(server) == ["0 */5 * * * *"]


def test_a_schedule_that_may_not_be_deleted_is_reported_to_run_as_well(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*NIGHTLY) == 0
    server.refused["DELETE"] = 403
    assert submit("--schedule", "0 0 4 * * *") == 0
    assert len(crons(server)) == 2
    assert "two schedules will run" in capsys.readouterr().err


def test_a_schedule_that_was_switched_off_is_switched_on(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(*NIGHTLY) == 0
    server.things["recurringruns"][0]["status"] = "DISABLED"
    assert submit(*NIGHTLY) == 0
    (schedule,) = server.things["recurringruns"]
    assert schedule["status"] == "ENABLED"
    assert "it is on again" in capsys.readouterr().out


def test_of_two_equal_schedules_started_at_once_one_stays(server: Server) -> None:
    server.rivals["recurringruns"] = {"status": "ENABLED"}
    assert submit(*NIGHTLY) == 0
    assert crons(server) == ["0 0 3 * * *"]


def test_a_schedule_that_a_newer_one_should_have_replaced_is_the_newest_again(server: Server) -> None:
    assert submit(*NIGHTLY) == 0
    server.refused["DELETE"] = 403
    assert submit("--schedule", "0 0 4 * * *") == 0
    server.refused.clear()
    assert submit(*NIGHTLY) == 0
    assert crons(server) == ["0 0 3 * * *"]


@pytest.mark.parametrize(("made", "stays"), [("2025-12-31", "recurringruns-1"), ("2026-01-02", "rival")])
def test_of_two_schedules_of_a_line_started_at_once_the_newer_stays(
    made: str, stays: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"display_name": "other", "status": "ENABLED", "created_at": f"{made}T00:00:00Z"}
    server.rivals["recurringruns"] = other
    assert submit(*NIGHTLY) == 0
    (schedule,) = server.things["recurringruns"]
    assert schedule["recurring_run_id"] == stays
    assert f"every 0 0 3 * * *: {stays}" in capsys.readouterr().out


def test_a_schedule_of_the_line_in_another_experiment_is_reported_to_run_as_well(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.health["multi_user"] = True
    for experiment in ("first", "second"):
        assert submit(*NIGHTLY, "--namespace", "team-a", "--experiment", experiment) == 0
    assert "two schedules will run" in capsys.readouterr().err
    other = ["--experiment", "third", "--set", "mlflow.registered_model=other"]
    assert submit(*NIGHTLY, "--namespace", "team-a", *other) == 0
    assert submit(*NIGHTLY, "--namespace", "team-b") == 0
    assert "two schedules will run" not in capsys.readouterr().err


def test_a_schedule_made_by_hand_is_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(*NIGHTLY) == 0
    del server.things["recurringruns"][0]["runtime_config"]
    assert submit(*NIGHTLY, "--set", "seed=1") == 0
    assert len(crons(server)) == 2
    assert "another schedule of other data or another model stays" in capsys.readouterr().out


def test_schedules_on_further_pages_are_seen(server: Server) -> None:
    assert submit(*NIGHTLY) == 0
    (first,) = server.things["recurringruns"]
    others = [first | {"recurring_run_id": f"other-{i}", "pipeline_version_reference": None} for i in range(120)]
    server.things["recurringruns"] = [*others, first]
    assert submit("--schedule", "0 0 4 * * *") == 0
    assert first not in server.things["recurringruns"]


# Names, versions, images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "mlflow.registered_model=line/3"], "mlflow.registered_model"),
        (["--set", "mlflow.registered_model="], "mlflow.registered_model"),
        (["--set", "mlflow.experiment='line '"], "mlflow.experiment"),
        (["--experiment", ""], "--experiment ''"),
        (["--experiment", "x" * 129], "1 to 128 printable characters"),
        (["--namespace", "Team_A"], "--namespace 'Team_A'"),
        (["--namespace", "a" * 64], "1 to 63"),
        (["--namespace", "team.a"], "--namespace 'team.a'"),
        (["--service-account", "adfm pipeline"], "--service-account 'adfm pipeline'"),
        (["--service-account", "adfm-"], "--service-account 'adfm-'"),
        (["--schedule", "0 3 * * *"], "six fields, seconds first"),
        (["--schedule", "0 0 25 * * *"], "'25' for hours (0 to 23)"),
        (["--node-selector", "pool=a 100"], "'a 100' is not the value of a label"),
        (["--node-selector", "a pool=a100"], "'a pool' is not the key of a label"),
        (["--node-selector", "Cloud_x/pool=a100"], "'Cloud_x/pool' is not the key of a label"),
        (["--toleration", "nvidia.com/=present"], "'nvidia.com/' is not the key of a label"),
    ],
)
def test_a_wrong_name_is_reported_before_the_server_is_asked(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--host", "http://127.0.0.1:9", *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "cannot be reached" not in error


def test_all_names_that_are_wrong_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--host", "http://127.0.0.1:9", "--namespace", "A", "--service-account", "B") == 1
    error = capsys.readouterr().err
    assert "--namespace 'A'" in error
    assert "--service-account 'B'" in error


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("60 0 3 * * *", "'60' for seconds (0 to 59)"),
        ("0 0 3 0 * *", "'0' for day of the month (1 to 31)"),
        ("0 0 3 * 13 *", "'13' for month (1 to 12)"),
        ("0 0 3 * * 7", "'7' for day of the week (0 to 6)"),
        ("0 0 5-3 * * *", "'5-3' for hours"),
        ("0 */0 3 * * *", "'*/0' for minutes"),
        ("0 0 3, * * *", "'3,' for hours"),
        ("0 0 3 * * monday", "'monday' for day of the week"),
        ("0 0 3 L * *", "'L' for day of the month"),
        ("0 0 3 30,31 feb *", "a day that its months do not have"),
        ("every day at three o clock", "'every' for seconds"),
        ("@dayly", "should be one of @yearly"),
        ("@every 12", "should be one of @yearly"),
        ("", "six fields"),
    ],
)
def test_a_schedule_that_kfp_could_not_read_is_refused(schedule: str, message: str) -> None:
    with pytest.raises(AdfmError, match=re.escape(message)):
        checks.require_names("adfm", None, None, schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        *("0 0 3 * * *", "0 */10 * * * *", "0 0 3 ? * MON-FRI", "0 0 3 29 2 *", "5/15 0 3,15 1-7/2 jan-Mar,12 Sun"),
        *("0 0 3 31 2 1", "@daily", "@every 1h30m"),  # of day and weekday, one will do
    ],
)
def test_a_schedule_that_kfp_reads_is_taken(schedule: str) -> None:
    checks.require_names("adfm", None, None, schedule)


def test_names_that_no_image_can_have_are_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_an_image_of_the_docs(pipeline: Any, file: Path) -> None:
        file.write_text(compiled(pipeline).replace("localhost/adfm:gpu", "registry.example.com/adfm@sha256:…"))

    monkeypatch.setattr("pipelines.server.write", with_an_image_of_the_docs)
    assert submit() == 1
    assert "'registry.example.com/adfm@sha256:…' cannot be the name of an image" in capsys.readouterr().err
    assert nothing_made(server)
    for name in ("", "adfm cpu", "registry.example.com/Adfm", "https://registry.example.com/adfm", "adfm:", "a//b"):
        with pytest.raises(AdfmError, match="cannot be the name of an image"):
            checks.require_references([name])
    digest = "sha256:" + "0a" * 32
    checks.require_references(["adfm", f"adfm@{digest}", f"r.example.com:5000/team_1/adfm:1.0-gpu_2@{digest}"])
    checks.require_references(["[::1]:5000/adfm", "localhost/adfm:cpu", "Registry.example.com/a__b/c--d:V1"])


def test_names_that_kubernetes_takes_are_taken() -> None:
    checks.require_names("Line 3, nights", "team-a", "runs.team-a", "@daily")
    checks.require_labels({"node_selector": {"cloud.example.com/pool": "A100_80G", "spot": ""}, "tolerations": []})
    checks.require_labels({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]})
    checks.require_labels({})


@pytest.mark.parametrize("tag", ["2.16.1", "2.5.0", "v1.8.5", "2.9"])
def test_a_server_that_is_too_old_is_refused(tag: str, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.health["tag_name"] = tag
    assert submit() == 1
    assert f"is {tag}; adfm needs Kubeflow Pipelines 2.17 or newer" in capsys.readouterr().err
    assert nothing_made(server)


@pytest.mark.parametrize(
    ("tag", "known"), [("2.17.0", True), ("2.18.0-rc.1", True), ("3.0.0", True), ("master", False)]
)
def test_a_server_that_is_new_enough_or_does_not_say_is_used(
    tag: str, known: bool, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.health["tag_name"] = tag
    assert submit() == 0
    assert ("does not say its release" in capsys.readouterr().err) is not known


def test_a_server_that_says_nothing_of_its_release_is_used(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.health = {"multi_user": False}
    assert submit() == 0
    assert "tag_name 'unknown'" in capsys.readouterr().err


def test_through_kfps_pages_the_release_and_the_users_of_the_api_are_known(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {"apiServerReady": True, "frontendTagName": "2.17.0", "apiServerMultiUser": False, "multi_user": False}
    server.health = pages | {"apiServerTagName": "2.16.1"}
    assert submit() == 1
    assert "is 2.16.1; adfm needs Kubeflow Pipelines 2.17 or newer" in capsys.readouterr().err
    server.health = pages | {"apiServerTagName": "2.17.0", "multi_user": True}
    assert submit() == 1
    assert "--namespace is missing" in capsys.readouterr().err
    server.health = {"apiServerReady": False, "frontendTagName": "2.17.0"}
    assert submit() == 1
    assert "do not reach the API behind them" in capsys.readouterr().err
    assert nothing_made(server)
    server.health = pages | {"apiServerTagName": "2.17.0"}
    assert submit() == 0
    assert "does not say its release" not in capsys.readouterr().err


def test_images_are_printed_and_those_of_this_machine_are_a_warning_behind_a_forwarded_port(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    output = capsys.readouterr()
    assert "images: localhost/adfm:cpu, localhost/adfm:gpu" in output.out
    assert "can run only where the nodes have them already" in output.err


@pytest.mark.parametrize(
    "host", ["https://kfp.example.com", "http://10.0.0.7:8888", "http://ml-pipeline.kubeflow:8888"]
)
def test_images_of_this_machine_are_refused_for_a_server_elsewhere(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--host", host) == 1
    output = capsys.readouterr()
    assert "images: localhost/adfm:cpu, localhost/adfm:gpu" in output.out
    assert f"the nodes behind {host} cannot pull localhost/adfm:cpu, localhost/adfm:gpu" in output.err


def test_which_images_are_of_this_machine() -> None:
    local = ["localhost/adfm:cpu", "localhost:5000/adfm", "127.0.0.1:5000/adfm@sha256:1", "[::1]:5000/adfm"]
    others = ["adfm:cpu", "localhost", "registry.example.com/localhost/adfm", "localhost.example.com/adfm", "[/adfm"]
    assert checks.local_images([*local, *others]) == local
    assert checks.require_pullable(others, "https://kfp.example.com") == []
    for host in ("http://localhost:8888", "http://127.0.0.2", "http://[::1]:8888", "http://kfp.localhost"):
        assert len(checks.require_pullable(local, host)) == 1


# The cluster, as kubectl's context shows it

ACCOUNT = "/api/v1/namespaces/kubeflow/serviceaccounts/adfm-pipeline"
SECRET = "/api/v1/namespaces/kubeflow/secrets/adfm-mlflow"
CLAIM = "/api/v1/namespaces/kubeflow/persistentvolumeclaims/adfm-workspace"
NODES = "/api/v1/nodes"
TRAINER = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/trainjobs.trainer.kubeflow.org"
DESCRIPTION = "/openapi/v3/apis/trainer.kubeflow.org/v1alpha1"
RUNTIME = "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/torch-distributed"
READY = {ACCOUNT: {}, SECRET: {"data": {"uri": "aHR0cA=="}}}
ON_NODES = ("--num-nodes", "2", "--num-gpus", "1")


def trainer(*fields: str) -> dict[str, Any]:
    """The definition of the TrainJob, with fields of its spec."""
    spec = {"properties": {"spec": {"properties": {name: {} for name in fields}}}}
    version = {"name": "v1alpha1", "served": True, "schema": {"openAPIV3Schema": spec}}
    return {"spec": {"group": "trainer.kubeflow.org", "versions": [version]}}


SEVERAL = READY | {
    CLAIM: {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Pending"}},
    TRAINER: trainer("runtimeRef", "runtimePatches"),
    RUNTIME: {"metadata": {"name": "torch-distributed"}},
}


@pytest.fixture
def kubernetes(home: Path) -> Iterator[dict[str, Any]]:
    """A cluster that kubectl would talk to: path -> what it has there; a number is a refusal, nothing a 404."""
    there: dict[str, Any] = {}

    def answer(_method: str, url: str, _body: bytes, _headers: Any) -> tuple[int, Any]:
        content = there.get(url, 404)
        return (content, {"kind": "Status"}) if isinstance(content, int) else (200, content)

    with served(answer) as address:
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        content = {
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "users": [{"name": "me", "user": {"token": "any"}}],
            "contexts": [context],
            "current-context": "here",
        }
        (home / "kubeconfig").write_text(yaml.safe_dump(content))
        yield there


@pytest.mark.parametrize("secret", [404, {"metadata": {}}, {"data": {"username": "bWU="}}])
def test_a_secret_that_is_missing_is_reported_before_anything_is_started(
    secret: Any, server: Server, kubernetes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.update({ACCOUNT: {}, SECRET: secret})
    assert submit() == 1
    assert "has no secret adfm-mlflow with the key uri" in capsys.readouterr().err
    assert nothing_made(server)


@pytest.mark.parametrize("there", [READY, {ACCOUNT: {}, SECRET: 403}, {ACCOUNT: 403, SECRET: 404}, {}])
def test_where_the_secret_is_there_or_cannot_be_looked_for_a_run_is_started(
    there: dict[str, Any], server: Server, kubernetes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.update(there)
    assert submit() == 0
    assert len(server.things["runs"]) == 1
    assert ("is taken for another cluster" in capsys.readouterr().err) is (there == {})


@pytest.mark.parametrize("content", ["", "[]", "clusters: [", "current-context: none"])
def test_a_configuration_of_kubectl_that_is_of_no_use_stops_nothing(content: str, server: Server, home: Path) -> None:
    (home / "kubeconfig").write_text(content)
    assert submit() == 0


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (CLAIM, 404, "has no volume claim adfm-workspace"),
        (CLAIM, {"spec": {"accessModes": ["ReadWriteOnce"]}}, "is ReadWriteOnce, and several machines write to it"),
        (CLAIM, {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Lost"}}, "phase Lost"),
        (TRAINER, 404, "there is no Kubeflow Trainer"),
        (TRAINER, trainer("runtimeRef", "podTemplateOverrides"), "Kubeflow Trainer is older than 2.2"),
        (TRAINER, {"spec": {"versions": [{"name": "v1"}]}}, "does not serve trainer.kubeflow.org/v1alpha1"),
        (RUNTIME, 404, "has no ClusterTrainingRuntime torch-distributed"),
    ],
)
def test_what_several_machines_lack_is_reported_before_anything_is_started(
    path: str,
    content: Any,
    message: str,
    server: Server,
    kubernetes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kubernetes.update(SEVERAL | {path: content})
    assert submit(*ON_NODES) == 1
    assert message in capsys.readouterr().err
    assert nothing_made(server)
    assert submit() == 0  # one machine needs none of it


def test_all_that_the_cluster_lacks_is_reported_at_once(
    server: Server, kubernetes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.update({ACCOUNT: {}})
    assert submit(*ON_NODES) == 1
    error = capsys.readouterr().err
    assert "no secret adfm-mlflow" in error
    assert "no volume claim" in error
    assert "no Kubeflow Trainer" in error


@pytest.mark.parametrize("path", [CLAIM, TRAINER, RUNTIME])
def test_where_several_machines_may_not_be_looked_after_a_run_is_started(
    path: str, server: Server, kubernetes: dict[str, Any]
) -> None:
    kubernetes.update(SEVERAL | {path: 403, DESCRIPTION: 403})
    assert submit(*ON_NODES) == 0


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (404, "there is no Kubeflow Trainer"),
        ({"runtimeRef": {}}, "Kubeflow Trainer is older than 2.2"),
        ({"runtimeRef": {}, "runtimePatches": {}}, None),
    ],
)
def test_without_a_right_to_the_definition_the_description_of_the_api_is_read(
    description: Any,
    message: str | None,
    server: Server,
    kubernetes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if isinstance(description, dict):
        job = {"properties": {"spec": {"properties": description}}}
        names = {"org.kubeflow.trainer.v1alpha1.TrainJob": job, "org.kubeflow.trainer.v1alpha1.TrainJobList": {}}
        description = {"components": {"schemas": names}}
    kubernetes.update(SEVERAL | {TRAINER: 403, DESCRIPTION: description})
    assert submit(*ON_NODES) == (1 if message else 0)
    assert (message or "") in capsys.readouterr().err


def node(name: str = "a", taints: Any = (), labels: Any = None, cordoned: bool = False, **room: str) -> dict[str, Any]:
    room = {"cpu": "15890m", "memory": "64Gi"} | {
        key.replace("__", "/").replace("_", "."): n for key, n in room.items()
    }
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": list(taints), "unschedulable": cordoned},
        "status": {"allocatable": room},
    }


GPU = {"nvidia_com__gpu": "2"}
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([node()], [], None),
        (
            [node(memory="30Gi")],
            [],
            "train: no node has cpu 8, memory 32Gi; the most that one has is cpu 15.89, memory 30",
        ),
        ([node(cpu="4"), node(cpu="6")], [], "the most that one has is cpu 6"),
        ([node(cordoned=True)], [], "no node is open to its pod"),
        ([node(taints=[TAINT])], [], "no node is open to its pod"),
        ([node(taints=[TAINT | {"effect": "PreferNoSchedule"}])], [], None),
        (
            [node()],
            ["--num-gpus", "1"],
            "nvidia.com/gpu 1; the most that one has is cpu 15.89, memory 64.0Gi, nvidia.com/gpu 0",
        ),
        ([node(**GPU)], ["--num-gpus", "2"], None),
        ([node(**GPU)], ["--num-gpus", "3"], "the most that one has is cpu 15.89, memory 64.0Gi, nvidia.com/gpu 2"),
        ([node(amd_com__gpu="2")], ["--num-gpus", "2", "--gpu-type", "amd.com/gpu"], None),
        ([node(**GPU)], ["--num-gpus", "2", "--node-selector", "pool=a100"], "(labels pool=a100), which asks for"),
        ([node(**GPU, labels={"pool": "a100"})], ["--num-gpus", "2", "--node-selector", "pool=a100"], None),
        ([node(), node(**GPU, taints=[TAINT])], ["--num-gpus", "2"], "nvidia.com/gpu 0"),
        ([node(), node(**GPU, taints=[TAINT])], ["--num-gpus", "2", "--toleration", "nvidia.com/gpu:NoSchedule"], None),
        ([node(), node(**GPU, taints=[TAINT])], ["--num-gpus", "2", "--toleration", "nvidia.com/gpu=absent"], "gpu 0"),
        ([node(**GPU)] * 2, ["--num-gpus", "2", "--num-nodes", "2"], None),
        ([node(**GPU)], ["--num-gpus", "2", "--num-nodes", "2"], "the nodes have room for 1 of 2 pods"),
        (403, [], None),
    ],
)
def test_resources_beyond_every_node_are_reported(
    nodes: Any,
    options: list[str],
    message: str | None,
    server: Server,
    kubernetes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kubernetes.update(SEVERAL | {NODES: {"items": nodes} if isinstance(nodes, list) else nodes})
    assert submit(*options) == 0  # an autoscaler may add a node
    error = capsys.readouterr().err
    assert (message in error) if message else ("the run waits there" not in error)


@pytest.mark.parametrize("account", [403, 404])
def test_where_only_nodes_may_be_seen_resources_beyond_them_are_reported(
    account: int, server: Server, kubernetes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.update({ACCOUNT: account, NODES: {"items": [node(memory="30Gi")]}})
    assert submit() == 0
    assert re.search(r"if runs go to http://127\S+, which kubectl talks to: train: no node", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("images", "missing"),
    [
        (["localhost/adfm:cpu", "localhost/adfm:gpu"], []),
        (["localhost/adfm:cpu", "registry.k8s.io/pause:3.10"], ["localhost/adfm:gpu"]),
        ([f"registry.example.com/{i}" for i in range(50)], []),  # a node lists no more
        ([], []),
    ],
)
def test_an_image_of_this_machine_that_no_node_has_is_reported(
    images: list[str],
    missing: list[str],
    server: Server,
    kubernetes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = {"allocatable": {"cpu": "64", "memory": "512Gi"}, "images": [{"names": [name]} for name in images]}
    kubernetes.update(READY | {NODES: {"items": [{"metadata": {"name": "a"}, "status": status}]}})
    assert submit() == 0  # it may have been loaded a moment ago
    assert re.findall("no node has the image (.+), and none", capsys.readouterr().err) == missing


# Certificates and proxies


def test_a_proxy_is_that_of_the_probe_and_of_the_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", os.environ["KF_PIPELINES_ENDPOINT"])

    def with_images_of_a_registry(pipeline: Any, file: Path) -> None:
        file.write_text(compiled(pipeline).replace("localhost/", "registry.example.com/"))

    monkeypatch.setattr("pipelines.server.write", with_images_of_a_registry)
    assert submit("--host", "http://kfp.example.com") == 0
    assert len(server.things["runs"]) == 1


def test_a_private_authority_is_that_of_the_probe_and_of_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    double = Server("good")
    monkeypatch.setenv("KFP_TOKEN", "good")
    tls = self_signed(tmp_path)
    with served(lambda method, url, body, _: double.answer(method, url, body), tls) as address:
        assert submit("--host", address) == 1
        error = capsys.readouterr().err
        assert f"the KFP API at {address} cannot be reached" in error
        assert "ADFM_CA_BUNDLE" in error
        assert nothing_made(double)
        monkeypatch.setenv("ADFM_CA_BUNDLE", str(tmp_path / "ca.crt"))
        assert submit("--host", address) == 0
    assert len(double.things["runs"]) == 1
