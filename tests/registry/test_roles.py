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
from tempfile import mkdtemp
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from adfm import signing, tracking
from adfm.params import Params
from adfm.registry import history as history_
from adfm.registry.approvals import run_once
from adfm.registry.audit import AuditFailed, audit
from adfm.registry.history import NOBODY, Forbidden
from adfm.registry.promotion import approve, history, rollback
from adfm.registry.reconcile import Refused
from adfm.registry.registration import NotAccepted, register, set_policy
from adfm.serving.verified import fetch
from tests.registry import conftest

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


NO_ONE: set[str] = set()
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
    "delete a file": (lambda t: ("DELETE", file_of(t), {}), NO_ONE),
    "write a file of another experiment": (
        lambda t: ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/x", {"data": b"x"}),
        NO_ONE,
    ),
    "write a file beside all experiments": (
        lambda t: ("PUT", "/api/2.0/mlflow-artifacts/artifacts/x", {"data": b"x"}),
        NO_ONE,
    ),
    "make a run": (
        lambda t: ("POST", f"{API}/runs/create", {"json": {"experiment_id": t.experiment}}),
        {SUBMITTER, SERVICE},
    ),
    "change a run": (
        lambda t: ("POST", f"{API}/runs/set-tag", {"json": {"run_id": t.run, "key": "a", "value": "b"}}),
        {SUBMITTER, SERVICE},
    ),
    "delete a run": (lambda t: ("POST", f"{API}/runs/delete", {"json": {"run_id": t.run}}), NO_ONE),
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
    "delete a logged model": (lambda t: ("DELETE", f"{API}/logged-models/{t.logged_model}", {}), NO_ONE),
    "delete the experiment": (
        lambda t: ("POST", f"{API}/experiments/delete", {"json": {"experiment_id": t.experiment}}),
        NO_ONE,
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
        NO_ONE,
    ),
    "become administrator": (
        lambda t: ("PATCH", f"{API}/users/update-admin", {"json": {"username": READER, "is_admin": True}}),
        NO_ONE,
    ),
    "take a role": (
        lambda t: ("POST", f"{API3}/roles/assign", {"json": {"username": READER, "role_id": 1}}),
        NO_ONE,
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
        NO_ONE,
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
    """What the code must expect: 403 where a version is requested, "does not exist" where the model is."""
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


# Which a few images fulfil; who approves is not who submitted.
POLICY = f"""\
{conftest.POLICY}approvers: [carla, pipeline]
team_of_one: false
"""


class Plant:
    """A registered model whose four users act with adfm, each with the own login and the keys of the role."""

    def __init__(self, server: Server, model: str, home: Path, patch: pytest.MonkeyPatch, make: Any) -> None:
        self.server, self.model, self.home, self._patch = server, model, home, patch
        self.params = Params.model_validate({"mlflow": {"registered_model": model}})
        self._make_model, self._make_evaluation, self.shards = make
        write_keys(home / "keys")

    def log_in(self, user: str) -> None:
        for key, value in self.server.login(user).items():
            self._patch.setenv(key, value)
        self._patch.setenv("ADFM_KEYS", str(self.home / "keys" / user))

    def submit(self, right: int, user: str = SUBMITTER) -> None:
        """Registers a model that judges `right` of 40 images rightly; nobody waits for the service."""
        self.log_in(user)
        folder = self._make_model(self.home / f"model-{right}", float(right), self.shards)
        evaluation = self._make_evaluation(self.home / f"evaluation-{right}", self.shards, right, iou=0.3 + right / 100)
        with pytest.raises(NotAccepted, match="is there, and the service has not made a version"):
            register(folder, self.shards, evaluation, self.home / "registration", self.params, wait=0)

    def poll(self) -> str:
        """What the approvals service does every few seconds; what is wrong."""
        self.log_in(SERVICE)
        return run_once(self.params.mlflow)

    def approve(self, version: str) -> None:
        self.log_in(REVIEWER)
        approve(version, self.params.mlflow.registered_model)

    def in_production(self, right: int, version: str) -> None:
        """Submits, judges, approves and promotes."""
        self.submit(right)
        assert self.poll() == ""
        self.approve(version)
        assert self.poll() == ""
        assert self.production() == (version, version)

    def production(self) -> tuple[str | None, str | None]:
        """The version that the alias names and the one that the history says, as a reader sees them."""
        self.log_in(READER)
        aliases = tracking.client().get_registered_model(self.model).aliases
        recorded = history(self.params.mlflow.registered_model).production
        return str(aliases["production"]) if "production" in aliases else None, None if recorded == NOBODY else recorded

    def tag(self, version: str, key: str) -> str | None:
        self.log_in(READER)
        return tracking.client().get_model_version(self.model, version).tags.get(key)

    def files(self, version: str) -> str:
        """Where the server keeps the version's files."""
        self.log_in(READER)
        client = tracking.client()
        logged = client.get_logged_model(client.get_model_version(self.model, version).source.removeprefix("models:/"))
        return f"/api/2.0/mlflow-artifacts/artifacts/{logged.artifact_location.removeprefix('mlflow-artifacts:/')}"


def write_keys(folder: Path) -> None:
    """A folder of keys a user: the service and the submitter have one of their own, and all have both public ones."""
    public = {}
    for user in USERS:
        (folder / user / "service").mkdir(parents=True)
        (folder / user / "submitters").mkdir()
        if user in (SERVICE, SUBMITTER):
            public[user] = write_key(folder / user)
    for user in USERS:
        (folder / user / "service" / "service.pem").write_bytes(public[SERVICE])
        (folder / user / "submitters" / "pipeline.pem").write_bytes(public[SUBMITTER])


def write_key(folder: Path) -> bytes:
    private = ec.generate_private_key(ec.SECP256R1())
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "private.pem").write_bytes(private.private_bytes(*plain))
    (folder / "private.pem").chmod(0o600)
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.fixture
def bare_plant(server, request, tmp_path, monkeypatch, make_shards, make_model, make_evaluation) -> Plant:
    """A plant whose model nobody has made yet."""
    monkeypatch.chdir(tmp_path)
    model = re.sub(r"\W", "-", request.node.name.removeprefix("test_"))[:50].strip("-_")
    shards = make_shards(tmp_path / "shards")
    return Plant(server, model, tmp_path, monkeypatch, (make_model, make_evaluation, shards))


@pytest.fixture
def plant(bare_plant, set_up) -> Plant:
    """A plant that is set up, with a policy that the reviewer has registered and the service has taken."""
    users = [part for role, user in ROLES.items() for part in (f"--{role}", user)]
    assert set_up("--model", bare_plant.model, *users).status == 0
    register_policy(bare_plant)
    return bare_plant


def register_policy(plant: Plant) -> None:
    (plant.home / "policy.yaml").write_text(POLICY)
    plant.log_in(REVIEWER)
    set_policy(plant.home / "policy.yaml", plant.model)
    assert plant.poll() == ""


def test_a_service_that_is_not_an_administrator_promotes_and_rolls_back(plant) -> None:
    plant.in_production(26, "1")
    plant.in_production(36, "2")
    plant.log_in(SERVICE)
    rollback(plant.params.mlflow.registered_model)
    assert plant.production() == ("1", "1")
    steps = [
        step
        for step in history(plant.params.mlflow.registered_model).counting
        if step.action in ("promote", "rollback")
    ]
    assert [(step.action, step.approval_by, step.submitted_by) for step in steps] == [
        ("promote", REVIEWER, SUBMITTER),
        ("promote", REVIEWER, SUBMITTER),
        ("rollback", "", ""),
    ]
    assert "everything is as the signed history says" in audit(
        plant.params.mlflow.registered_model
    )  # still logged in as the reader


def forged_step(model: str, version: str) -> dict[str, str]:
    """What a step of the history looks like that puts a version into production."""
    return {
        "action": "promote",
        "version": version,
        "production": version,
        "previous": "none",
        "replaced": "none",
        "by": "somebody",
        "why": f"forged for {model}",
        "mark": "0" * 32,
        "finished": "true",
    }


def write_step(plant: Plant, user: str, tags: dict[str, str]) -> None:
    body = {
        "name": f"{plant.model}-history",
        "source": "adfm:/history",
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
    }
    plant.server.ok(user, "POST", f"{API}/model-versions/create", json=body)


def make_history_first(plant: Plant, signed: bool = False) -> None:
    """The reader makes the history before an administrator has set anything up, and writes a step into it."""
    name = {"name": f"{plant.model}-history"}
    plant.server.ok(READER, "POST", f"{API}/registered-models/create", json=name)
    tags = forged_step(plant.model, "1")
    if signed:
        own = plant.home / "own-key"
        own.mkdir()
        (own / "public.pem").write_bytes(write_key(own))
        keys = signing.Keys(own, "0123456789abcdef", {}, {"0123456789abcdef": own / "public.pem"}, {})
        tags |= {"key": keys.id, "signature": signing.sign_text(history_._text(plant.model, tags), keys)}
    write_step(plant, READER, tags)


def test_a_reader_who_makes_the_history_first_moves_nothing(bare_plant, set_up) -> None:
    plant = bare_plant
    make_history_first(plant)
    done = set_up("--model", plant.model, *[part for role, user in ROLES.items() for part in (f"--{role}", user)])
    assert done.status == 0, done.err
    register_policy(plant)
    assert plant.production() == (None, None)
    plant.in_production(26, "1")
    plant.log_in(READER)
    with pytest.raises(AuditFailed, match="history, version 1: it is not signed; it counts for nothing"):
        audit(plant.params.mlflow.registered_model)


def test_a_history_that_a_reader_has_signed_stops_everything(bare_plant, set_up) -> None:
    plant = bare_plant
    make_history_first(plant, signed=True)
    done = set_up("--model", plant.model, *[part for role, user in ROLES.items() for part in (f"--{role}", user)])
    assert done.status == 0, done.err
    assert f"if somebody else has begun {plant.model}-history, an administrator deletes it" in plant.poll()
    plant.log_in(READER)
    assert tracking.client().get_registered_model(plant.model).aliases == {}
    plant.server.ok("admin", "DELETE", f"{API}/registered-models/delete", json={"name": f"{plant.model}-history"})
    assert set_up("--model", plant.model).status == 0
    register_policy(plant)
    plant.in_production(26, "1")


def test_only_the_service_writes_the_history(plant) -> None:
    plant.in_production(26, "1")
    for user in (READER, SUBMITTER, REVIEWER):
        plant.log_in(user)
        with pytest.raises(MlflowException, match="Permission denied"):
            tracking.client().create_model_version(
                f"{plant.model}-history", "adfm:/history", tags=forged_step(plant.model, "2")
            )
    # The service's password alone does not do: a step needs its key.
    write_step(plant, SERVICE, forged_step(plant.model, "2"))
    assert plant.poll() == ""
    assert plant.production() == ("1", "1")


def test_a_forged_version_is_not_promoted(plant) -> None:
    """The reviewer may make versions and set every tag; no decision of the gate on it is in the history."""
    plant.in_production(26, "1")
    plant.log_in(REVIEWER)
    client = tracking.client()
    good = client.get_model_version(plant.model, "1").tags
    forged = client.create_model_version(plant.model, "elsewhere:/forged", tags=good | {"approval": "approved"})
    client.set_registered_model_alias(plant.model, "production", forged.version)
    assert plant.poll() == ""
    assert plant.production() == ("1", "1")
    assert "no decision of the gate on it is in the history" in plant.tag("2", "approval_refused")
    assert [step.action for step in history(plant.params.mlflow.registered_model).counting[-2:]] == [
        "restore",
        "refuse",
    ]


def test_a_forged_verdict_is_not_believed(plant) -> None:
    """Reviewer and submitter together change tags and gate.json of a version whose gate failed."""
    plant.in_production(36, "1")
    plant.submit(10)
    plant.poll()
    assert plant.tag("2", "gate") == "failed"
    passed = {"name": plant.model, "version": "1"}
    good = plant.server.ok(READER, "GET", f"{API}/model-versions/get", params=passed)["model_version"]["tags"]
    gate_json = plant.files("1") + "/gate.json"
    content = plant.server.call(READER, "GET", gate_json).content
    assert plant.server.call(SUBMITTER, "PUT", plant.files("2") + "/gate.json", data=content).status_code == 200
    plant.log_in(REVIEWER)
    for tag in good:
        if tag["key"].startswith(("gate", "approval")):
            tracking.client().set_model_version_tag(plant.model, "2", tag["key"], tag["value"])
    assert plant.poll() == ""
    assert plant.production() == ("1", "1")
    assert "its gate's verdict is 'failed', not 'passed'" in plant.tag("2", "approval_refused")
    with pytest.raises(Refused, match="its gate's verdict is 'failed'"):
        plant.approve("2")


def test_an_exchanged_file_is_neither_promoted_nor_served(plant, tmp_path) -> None:
    """The submitter may write any file of the experiment, also of the version in production."""
    plant.in_production(26, "1")
    plant.submit(36)
    plant.poll()
    for file in ("MLmodel", "model/adapter_model.safetensors", "evaluation/predictions.parquet"):
        plant.approve("2")
        places = [f"{plant.files(version)}/{file}" for version in ("1", "2")]
        contents = [plant.server.call(SUBMITTER, "GET", place).content for place in places]
        for place in places:
            assert plant.server.call(SUBMITTER, "PUT", place, data=b"python_model: evil").status_code == 200
        plant.poll()
        assert plant.production() == ("1", "1")
        assert plant.tag("2", "approval") in ("pending", "approved")
        assert plant.tag("2", "promoted_at") is None
        plant.log_in(READER)
        with pytest.raises(signing.Unverified, match=file):
            fetch(f"models:/{plant.model}@production", Path(mkdtemp(dir=tmp_path)))
        with pytest.raises(AuditFailed, match=file):
            audit(plant.params.mlflow.registered_model)
        for place, content in zip(places, contents, strict=True):
            assert plant.server.call(SUBMITTER, "PUT", place, data=content).status_code == 200
    plant.approve("2")
    assert plant.poll() == ""
    assert plant.production() == ("2", "2")


def test_files_that_the_submitter_signs_again_are_not_served(plant, tmp_path) -> None:
    """The signature is right then. What was judged and promoted is in the history."""
    plant.in_production(26, "1")
    plant.log_in(READER)
    folder, _ = fetch(f"models:/{plant.model}@production", Path(mkdtemp(dir=tmp_path)))
    calibration = folder / "MLmodel"
    calibration.write_text(calibration.read_text() + "\n# another\n")
    plant.log_in(SUBMITTER)
    signing.sign(folder, signing.keys())
    for file in ("MLmodel", "model.sig"):
        where = f"{plant.files('1')}/{file}"
        content = (folder / file).read_bytes()
        assert plant.server.call(SUBMITTER, "PUT", where, data=content).status_code == 200
    plant.log_in(READER)
    with pytest.raises(signing.Unverified, match="signed again, since it came into production"):
        fetch(f"models:/{plant.model}@production", Path(mkdtemp(dir=tmp_path)))
    with pytest.raises(AuditFailed, match="not those with which it came into production"):
        audit(plant.params.mlflow.registered_model)


def test_one_who_is_killed_between_gate_json_and_its_tags_is_finished_by_the_next(plant, monkeypatch) -> None:
    plant.submit(26)
    original = MlflowClient.log_model_artifact

    def killed(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifact", killed)
        with pytest.raises(KeyboardInterrupt):
            plant.poll()
    assert plant.tag("1", "gate") is None
    assert plant.poll() == ""
    assert plant.tag("1", "gate") == "passed"
    plant.approve("1")
    assert plant.poll() == ""
    assert plant.production() == ("1", "1")


def test_who_submitted_does_not_approve(plant) -> None:
    """Neither with the own rights nor with the reviewer's: the name of the submitter is signed with the version."""
    plant.submit(26)
    plant.poll()
    plant.log_in(SUBMITTER)
    with pytest.raises(Forbidden, match="MLflow does not let this account edit version 1"):
        approve("1", plant.params.mlflow.registered_model)
    assert plant.poll() == ""
    assert plant.production() == (None, None)
    plant.log_in(REVIEWER)
    for key, value in (("approval_by", SUBMITTER), ("approval", "approved")):
        tracking.client().set_model_version_tag(plant.model, "1", key, value)
    assert plant.poll() == ""
    assert plant.production() == (None, None)
    assert "submitted it: another person has to approve" in plant.tag("1", "approval_refused")


def test_a_version_that_is_deleted_between_approval_and_move_is_never_in_production(plant, monkeypatch, capsys) -> None:
    plant.in_production(26, "1")
    plant.submit(36)
    plant.poll()
    plant.approve("2")
    append = history_.append

    def deleted_first(store: Any, name: str, keys: Any, seen: Any, action: str, version: str, **content: str) -> Any:
        if action == "promote":
            body = {"name": plant.model, "version": "2"}
            plant.server.ok("admin", "DELETE", f"{API}/model-versions/delete", json=body)
        return append(store, name, keys, seen, action, version, **content)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(history_, "append", deleted_first)
        problem = plant.poll()
    assert "was deleted while it was promoted; it is not in production" in problem
    assert "version 2 of" not in capsys.readouterr().out.replace(f"version 2 of {plant.model} was deleted", "")
    assert plant.poll() == ""
    assert plant.production() == ("1", "1")


def test_only_a_reviewer_sets_the_policy_and_the_history_keeps_it(plant) -> None:
    lax = plant.home / "lax.yaml"
    lax.write_text(POLICY.replace("limit: 0.5", "limit: 0.01"))
    for user in (READER, SUBMITTER):
        plant.log_in(user)
        with pytest.raises(Forbidden, match=f"MLflow does not let this account edit {plant.model}"):
            set_policy(lax, plant.model)
    plant.log_in(REVIEWER)
    set_policy(lax, plant.model)
    assert plant.poll() == ""
    step = history(plant.params.mlflow.registered_model).last("policy")
    assert (step.by, "0.01" in step.policy) == (REVIEWER, True)


def test_markup_in_a_category_stays_text(plant) -> None:
    """A category is a folder's name: whoever brings images chooses it."""
    nasty = "<img src=x onerror=alert(1)>\n\n# [Approve](javascript:alert(1)) ![x](https://example.com/x.png)\x1b[2J"
    for file in plant.shards.glob("*.parquet"):
        table = pq.read_table(file)
        column = table.schema.get_field_index("category")
        names = pa.array([nasty] * len(table), table.schema.field("category").type)
        pq.write_table(table.set_column(column, table.schema.field("category"), names), file)
    plant.in_production(26, "1")
    plant.log_in(READER)
    version = tracking.client().get_model_version(plant.model, "1")
    for text in (version.description, *version.tags.values()):
        assert not re.search(
            r"(?<!\\)<img|(?<![\\!])\[Approve\]\(javascript|(?<!\\)!\[x\]\(|\x1b|^# \[", text, re.MULTILINE
        )


def test_a_reviewer_can_hinder_but_move_nothing(plant) -> None:
    """Rename the model, or make a prompt of it: the service says what is wrong, and an administrator undoes it."""
    plant.in_production(26, "1")
    prompt = {"name": plant.model, "key": "mlflow.prompt.is_prompt", "value": "true"}
    plant.server.ok(REVIEWER, "POST", f"{API}/registered-models/set-tag", json=prompt)
    assert plant.poll() != ""
    plant.server.ok("admin", "DELETE", f"{API}/registered-models/delete-tag", json=prompt)
    away = {"name": plant.model, "new_name": f"{plant.model}-away"}
    plant.server.ok(REVIEWER, "POST", f"{API}/registered-models/rename", json=away)
    assert plant.poll() != ""
    back = {"name": f"{plant.model}-away", "new_name": plant.model}
    plant.server.ok("admin", "POST", f"{API}/registered-models/rename", json=back)
    assert plant.poll() == ""
    assert plant.production() == ("1", "1")
