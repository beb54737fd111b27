"""Four users on a real MLflow server with its own basic-auth, set up by scripts/set-up-roles.py.

First what MLflow itself lets each role do, by plain requests: docs/server.md has the same table. Then what adfm refuses
although MLflow allows it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

ROOT = Path(__file__).parents[2]
API, API3 = "/api/2.0/mlflow", "/api/3.0/mlflow"
READER, SUBMITTER, REVIEWER, SERVICE = USERS = ("anna", "pipeline", "carla", "approvals")
ROLES = {"reader": READER, "submitter": SUBMITTER, "reviewer": REVIEWER, "service": SERVICE}


def password(user: str) -> str:
    return f"the-password-of-{user}"


@dataclass(frozen=True)
class Server:
    uri: str

    def call(self, user: str, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(method, self.uri + path, auth=(user, password(user)), timeout=60, **options)

    def ok(self, user: str, method: str, path: str, **options: Any) -> Any:
        answer = self.call(user, method, path, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def login(self, user: str) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password(user),
        }

    def set_up(self, model: str) -> None:
        """Makes the four users as an administrator does."""
        users = [part for role, user in ROLES.items() for part in (f"--{role}", user)]
        passwords = {f"ADFM_PASSWORD_{user.upper()}": password(user) for user in USERS}
        command = [sys.executable, ROOT / "scripts/set-up-roles.py", "--model", model, *users]
        environment = os.environ | self.login("admin") | passwords
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def with_login(start_mlflow: Any, empty_database: Path, home: Path) -> Iterator[Server]:
    """A server with the manifest's basic_auth.ini, its users in a SQLite file."""
    manifests = yaml.safe_load_all((ROOT / "deploy/server/mlflow.yaml").read_text())
    (config,) = [each["data"]["basic_auth.ini"] for each in manifests if each["kind"] == "ConfigMap"]
    home.mkdir()
    ini = home / "basic_auth.ini"
    ini.write_text(re.sub("database_uri = .*", f"database_uri = sqlite:///{home}/auth.db", config))
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password("admin"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32,
    }
    with start_mlflow(home / "server", empty_database, "--app-name", "basic-auth", **environment) as uri:
        yield Server(uri)


@pytest.fixture(scope="module")
def server(start_mlflow, empty_database, tmp_path_factory) -> Iterator[Server]:
    """With the models `adfm` and `adfm-history`, the experiment `adfm` and the four users."""
    with with_login(start_mlflow, empty_database, tmp_path_factory.mktemp("roles") / "home") as server:
        server.set_up("adfm")
        yield server


@dataclass
class Things:
    """What there is to read and to break."""

    server: Server
    experiment: str
    run: str
    logged_model: str

    def version(self, model: str) -> str:
        """The number of a new version; a step of the history has no files."""
        files = {"source": f"models:/{self.logged_model}", "run_id": self.run, "model_id": self.logged_model}
        body = {"name": model, **({"source": "adfm:/history"} if model.endswith("-history") else files)}
        return self.server.ok("admin", "POST", f"{API}/model-versions/create", json=body)["model_version"]["version"]


@pytest.fixture(scope="module")
def things(server) -> Things:
    """A run and a logged model with a file, as the submitter makes them."""
    experiment = server.ok("admin", "GET", f"{API}/experiments/get-by-name", params={"experiment_name": "adfm"})
    number = experiment["experiment"]["experiment_id"]
    run = server.ok(SUBMITTER, "POST", f"{API}/runs/create", json={"experiment_id": number})["run"]["info"]["run_id"]
    body = {"experiment_id": number, "name": "adapter", "source_run_id": run}
    model = server.ok(SUBMITTER, "POST", f"{API}/logged-models", json=body)["model"]["info"]["model_id"]
    things = Things(server, number, run, model)
    server.call(SUBMITTER, "PUT", file_of(things), data=b"the file").raise_for_status()
    return things


def file_of(things: Things) -> str:
    place = f"{things.experiment}/models/{things.logged_model}/artifacts/MLmodel"
    return f"/api/2.0/mlflow-artifacts/artifacts/{place}"


def on_version(method: str, path: str, **body: Any) -> Callable[[Things, str], Any]:
    """A request about a version of a model."""

    def request(things: Things, model: str) -> Any:
        return method, API + path, {"json": {"name": model, "version": things.version(model), **body}}

    return request


def on_model(method: str, path: str, **body: str) -> Callable[[Things, str], Any]:
    def request(things: Things, model: str) -> Any:
        return method, API + path, {"json": {"name": model, **body}}

    return request


NOBODY: set[str] = set()
FORGE = {"source": "elsewhere:/forged"}  # MLflow checks sources of its own store only
GRANT = {"username": READER, "resource_type": "registered_model", "permission": "MANAGE"}

# Who may, of the four: on the model, on its history.
ON_MODELS: dict[str, tuple[Callable[[Things, str], Any], set[str], set[str]]] = {
    "set a tag": (
        on_version("POST", "/model-versions/set-tag", key="approval", value="approved"),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "delete a tag": (
        on_version("DELETE", "/model-versions/delete-tag", key="approval"),
        {SERVICE},
        {SERVICE},
    ),
    "describe a version": (
        on_version("PATCH", "/model-versions/update", description="x"),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "move to a stage": (
        on_version("POST", "/model-versions/transition-stage", stage="Production", archive_existing_versions=False),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "make a version": (on_model("POST", "/model-versions/create", **FORGE), {REVIEWER, SERVICE}, {SERVICE}),
    "delete a version": (on_version("DELETE", "/model-versions/delete"), {SERVICE}, {SERVICE}),
    "move an alias": (
        on_version("POST", "/registered-models/alias", alias="production"),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "delete an alias": (
        on_model("DELETE", "/registered-models/alias", alias="production"),
        {SERVICE},
        {SERVICE},
    ),
    "set a tag of the model": (
        on_model("POST", "/registered-models/set-tag", key="policy", value="x"),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "delete a tag of the model": (
        on_model("DELETE", "/registered-models/delete-tag", key="policy"),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "describe the model": (
        on_model("PATCH", "/registered-models/update", description="x"),
        {REVIEWER, SERVICE},
        {SERVICE},
    ),
    "give rights away": (
        lambda things, model: ("POST", f"{API3}/users/permissions/grant", {"json": GRANT | {"resource_id": model}}),
        {SERVICE},
        {SERVICE},
    ),
}


@pytest.mark.parametrize("what", ON_MODELS)
def test_rights_on_the_model_and_its_history(server, things, set_up, what) -> None:
    request, on_the_model, on_the_history = ON_MODELS[what]
    for model, may in (("adfm", on_the_model), ("adfm-history", on_the_history)):
        for user in USERS:
            method, path, options = request(things, model)
            answer = server.call(user, method, path, **options)
            assert answer.status_code == (200 if user in may else 403), (user, model, answer.text)
        if what == "give rights away":
            assert set_up("--reader", READER).status == 0


# Of runs, files and the rest; what a request needs beside is in `things`.
ON_OTHERS: dict[str, tuple[Callable[[Things], Any], set[str]]] = {
    "read a file": (lambda t: ("GET", file_of(t), {}), set(USERS)),
    "overwrite a file of a logged model": (
        lambda t: ("PUT", file_of(t), {"data": b"another"}),
        {SUBMITTER, SERVICE},
    ),
    "delete a file": (lambda t: ("DELETE", file_of(t), {}), NOBODY),
    "write a file of another experiment": (
        lambda t: ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/x", {"data": b"x"}),
        NOBODY,
    ),
    "write a file beside all experiments": (
        lambda t: ("PUT", "/api/2.0/mlflow-artifacts/artifacts/x", {"data": b"x"}),
        NOBODY,
    ),
    "make a run": (
        lambda t: ("POST", f"{API}/runs/create", {"json": {"experiment_id": t.experiment}}),
        {SUBMITTER, SERVICE},
    ),
    "change a run": (
        lambda t: ("POST", f"{API}/runs/set-tag", {"json": {"run_id": t.run, "key": "a", "value": "b"}}),
        {SUBMITTER, SERVICE},
    ),
    "delete a run": (lambda t: ("POST", f"{API}/runs/delete", {"json": {"run_id": t.run}}), NOBODY),
    "make a logged model": (
        lambda t: ("POST", f"{API}/logged-models", {"json": {"experiment_id": t.experiment, "name": "adapter"}}),
        {SUBMITTER, SERVICE},
    ),
    "finish a logged model": (
        lambda t: (
            "PATCH",
            f"{API}/logged-models/{t.logged_model}",
            {"json": {"model_id": t.logged_model, "status": "LOGGED_MODEL_READY"}},
        ),
        {SUBMITTER, SERVICE},
    ),
    "tag a logged model": (
        lambda t: (
            "PATCH",
            f"{API}/logged-models/{t.logged_model}/tags",
            {"json": {"model_id": t.logged_model, "tags": [{"key": "a", "value": "b"}]}},
        ),
        {SUBMITTER, SERVICE},
    ),
    "delete a logged model": (lambda t: ("DELETE", f"{API}/logged-models/{t.logged_model}", {}), NOBODY),
    "delete the experiment": (
        lambda t: ("POST", f"{API}/experiments/delete", {"json": {"experiment_id": t.experiment}}),
        NOBODY,
    ),
    "search logged models": (
        lambda t: ("POST", f"{API}/logged-models/search", {"json": {"experiment_ids": [t.experiment]}}),
        set(USERS),
    ),
    "read a version": (
        lambda t: ("GET", f"{API}/model-versions/get", {"params": {"name": "adfm", "version": t.version("adfm")}}),
        set(USERS),
    ),
    "delete the model": (
        lambda t: ("DELETE", f"{API}/registered-models/delete", {"json": {"name": "adfm"}}),
        {SERVICE},
    ),
    "make a user": (
        lambda t: ("POST", f"{API}/users/create", {"json": {"username": "mallory", "password": "0123456789ab"}}),
        NOBODY,
    ),
    "become administrator": (
        lambda t: ("PATCH", f"{API}/users/update-admin", {"json": {"username": READER, "is_admin": True}}),
        NOBODY,
    ),
    "take a role": (
        lambda t: ("POST", f"{API3}/roles/assign", {"json": {"username": READER, "role_id": 1}}),
        NOBODY,
    ),
    "make a webhook": (
        lambda t: (
            "POST",
            f"{API}/webhooks",
            {
                "json": {
                    "name": "x",
                    "url": "https://example.com",
                    "events": [{"entity": "MODEL_VERSION", "action": "CREATED"}],
                }
            },
        ),
        NOBODY,
    ),
}


@pytest.mark.parametrize("what", ON_OTHERS)
def test_rights_on_runs_files_and_users(server, things, what) -> None:
    request, may = ON_OTHERS[what]
    for user in [READER, SUBMITTER, REVIEWER] if what == "delete the model" else USERS:
        method, path, options = request(things)
        answer = server.call(user, method, path, **options)
        assert answer.status_code == (200 if user in may else 403), (user, answer.text)


def test_the_documentation_has_these_tables() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \|(.*)\|(.*)\|(.*)\|(.*)\|$", (ROOT / "docs/server.md").read_text(), re.MULTILINE)
    documented = {what: [cell.strip() for cell in cells] for what, *cells in rows}
    expected = {
        what: [("yes" + " (yes)" * (user in history)) * (user in model) for user in USERS]
        for what, (_, model, history) in (
            ON_MODELS | {what: (f, may, ()) for what, (f, may) in ON_OTHERS.items()}
        ).items()
    }
    assert {what: cells for what, cells in documented.items() if what in expected} == expected


def test_without_a_login_nothing_is_read(server) -> None:
    answer = requests.get(f"{server.uri}{API}/registered-models/get", params={"name": "adfm"}, timeout=60)
    assert answer.status_code == 401
    assert requests.get(f"{server.uri}/health", timeout=60).status_code == 200  # what the pod's probes ask


@pytest.mark.parametrize("user", USERS)
def test_the_names_of_the_model_and_its_history_are_taken(server, user) -> None:
    """Whoever made them first would own them."""
    for name in ("adfm", "adfm-history"):
        answer = server.call(user, "POST", f"{API}/registered-models/create", json={"name": name})
        assert (answer.status_code, answer.json()["error_code"]) == (400, "RESOURCE_ALREADY_EXISTS")
    own = f"model-of-{user}"
    server.ok(user, "POST", f"{API}/registered-models/create", json={"name": own})
    body = {"name": own, "new_name": "adfm-history"}
    assert server.call(user, "POST", f"{API}/registered-models/rename", json=body).status_code == 400


def test_a_missing_model_looks_forbidden_to_all_but_administrators(server) -> None:
    """What the code must expect: 403 where a version is asked for, "does not exist" where the model is."""
    version = f"{API}/model-versions/get", {"params": {"name": "nothing", "version": "1"}}
    model = f"{API}/registered-models/get", {"params": {"name": "nothing"}}
    search = f"{API}/model-versions/search", {"params": {"filter": "name = 'nothing'"}}
    assert [server.call(SERVICE, "GET", path, **options).status_code for path, options in (version, model, search)] == [
        403,
        404,
        200,
    ]
    assert server.call("admin", "GET", version[0], **version[1]).status_code == 404


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@pytest.fixture
def set_up(server, monkeypatch, capsys) -> Callable[..., Done]:
    """Runs the script in this process, where MLflow's server is imported once only."""
    spec = importlib.util.spec_from_file_location("set_up_roles", ROOT / "scripts/set-up-roles.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def set_up(*arguments: str, **environment: str) -> Done:
        with monkeypatch.context() as patch:
            for key, value in (server.login("admin") | environment).items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", ["set-up-roles.py", *arguments])
            capsys.readouterr()
            status = script.main()
            return Done(status, *capsys.readouterr())

    return set_up


def test_a_new_users_password_is_printed_once_and_a_role_can_change(server, set_up) -> None:
    done = set_up("--model", "press", "--reviewer", "emil")
    generated = re.search(r"^made emil, password (\S{24})$", done.out, re.MULTILINE)
    assert done.status == 0 and generated, done.out + done.err
    tag = {"json": {"name": "press", "key": "policy", "value": "x"}}
    path = f"{server.uri}{API}/registered-models/set-tag"
    assert requests.post(path, auth=("emil", generated[1]), timeout=60, **tag).status_code == 200
    done = set_up("--model", "press", "--reader", "emil", ADFM_PASSWORD_EMIL=password("emil"))
    assert done.status == 0, done.err
    assert "emil                 reader     READ        READ        READ" in done.out
    assert "password " + generated[1] not in done.out and "changed the password of emil" in done.out
    assert server.call("emil", "POST", f"{API}/registered-models/set-tag", **tag).status_code == 403


def test_somebody_who_made_the_history_first_is_reported(server, set_up) -> None:
    server.ok(READER, "POST", f"{API}/registered-models/create", json={"name": "gauge-history"})
    done = set_up("--model", "gauge")
    assert (done.status, f"{READER} has MANAGE on registered_model gauge-history" in done.err) == (1, True)
    done = set_up("--model", "gauge", "--reader", READER)
    assert done.status == 0, done.err
    body = {"name": "gauge-history", "description": "x"}
    assert server.call(READER, "PATCH", f"{API}/registered-models/update", json=body).status_code == 403


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--reader", "admin"], {}, "MLflow checks no permission of an administrator"),
        (["--reader", "emil", "--reviewer", "emil"], {}, "emil is named as reviewer and as reader"),
        (["--reader", "frieda"], {"ADFM_PASSWORD_FRIEDA": "short"}, "at least 12 characters"),
        ([], {"MLFLOW_TRACKING_PASSWORD": "another password"}, "knows no such user and password"),
        ([], {"MLFLOW_TRACKING_USERNAME": REVIEWER, "MLFLOW_TRACKING_PASSWORD": password(REVIEWER)}, "administrator"),
        ([], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, "there are no users without a server"),
        (["--model", "poem"], {}, "the name poem-history is taken by a prompt"),
    ],
)
def test_what_cannot_be_set_up_is_said(server, set_up, arguments, environment, message) -> None:
    if "poem" in arguments:
        prompt = {"name": "poem-history", "tags": [{"key": "mlflow.prompt.is_prompt", "value": "true"}]}
        server.ok(READER, "POST", f"{API}/registered-models/create", json=prompt)
    done = set_up(*arguments, **environment)
    assert done.status == 2
    assert message in done.err and "Traceback" not in done.err


def test_a_server_without_users_is_said(set_up, mlflow_server) -> None:
    done = set_up(MLFLOW_TRACKING_URI=mlflow_server)
    assert (done.status, "start it with --app-name basic-auth" in done.err) == (2, True)
