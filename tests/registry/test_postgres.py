"""MLflow on a real Postgres, started as the manifest starts it: the project's whole path, upgrade, backup, restore."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from adfm import tracking
from adfm.params import Params
from adfm.registry.audit import audit
from adfm.registry.history import MOVES
from adfm.registry.promotion import history, promote, rollback

ROOT = Path(__file__).parents[2]
DATABASE_PASSWORD = "p@ss/w:rd %20#?"  # none of which could stand in an address
PASSWORDS = {"admin": "the-admins-password", "service": "the-services-password"}


@dataclass(frozen=True)
class Postgres:
    """A running cluster: where its programs are, and where it listens, on loopback only."""

    programs: Path
    port: int

    def uri(self, database: str) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/{database}"

    def run(self, program: str, *arguments: str) -> str:
        """Runs one of Postgres' programs as the user of the database; its output."""
        environment = os.environ | {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "mlflow",
            "PGPASSWORD": DATABASE_PASSWORD,
        }
        command = [self.programs / program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sql(self, database: str, statement: str) -> str:
        return self.run("psql", "--dbname", database, "--tuples-only", "--no-align", "-c", statement).strip()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A cluster of its own with the password-protected user `mlflow`, who may make databases."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = installed[-1] if installed else shutil.which("initdb")
    if not initdb:
        missing = "NOT TESTED: there is no Postgres; install it with scripts/install-test-packages.sh"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    programs = Path(initdb).parent
    # Postgres refuses to run as root, and nobody else may enter the folders that pytest makes for root.
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
    folder = Path(tempfile.mkdtemp(prefix="adfm-postgres-"))
    try:
        (folder / "password").write_text(DATABASE_PASSWORD)
        if account:
            for path in (folder, folder / "password"):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        data = folder / "data"
        command = [programs / "initdb", "--pgdata", data, "--username", "mlflow", "--pwfile", folder / "password"]
        options = ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"}
        done = subprocess.run([*command, *options], **quiet, **account, check=False)
        assert done.returncode == 0, done.stdout
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        with (folder / "log").open("w") as log:
            started = subprocess.Popen(
                [*command, "-c", "fsync=off"], cwd="/", stdout=log, stderr=log, start_new_session=True, **account
            )
        try:
            ready = [programs / "pg_isready", "--host", "127.0.0.1", "--port", str(port)]
            deadline = time.monotonic() + 60
            while subprocess.run(ready, capture_output=True, check=False).returncode:
                assert started.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield Postgres(programs, port)
        finally:
            started.send_signal(signal.SIGINT)  # a fast shutdown, which does not wait for clients
            started.wait(60)
    finally:
        shutil.rmtree(folder)


@contextmanager
def mlflow_of_manifest(postgres: Postgres, database: str, home: Path) -> Iterator[str]:
    """Runs what the manifest's pod runs: its init container, then its server; the server's address.

    Secrets, addresses and folders are those of the test.

    Raises:
        AssertionError: One of them failed; the message is what it said.
    """
    home.mkdir(exist_ok=True)
    manifests = list(yaml.safe_load_all((ROOT / "deploy/server/mlflow.yaml").read_text()))
    (pod,) = [each["spec"]["template"]["spec"] for each in manifests if each["kind"] == "Deployment"]
    (config,) = [each["data"] for each in manifests if each["kind"] == "ConfigMap"]

    def local(text: str) -> str:
        return text.replace("postgres:5432/mlflow", f"127.0.0.1:{postgres.port}/{database}")

    (home / "basic_auth.ini").write_text(local(config["basic_auth.ini"]))
    secrets = {
        "postgres-password": DATABASE_PASSWORD,
        "admin-password": PASSWORDS["admin"],
        "flask-secret-key": "x" * 32,
        "artifacts": str(home / "files"),
    }

    def environment(container: dict[str, Any]) -> dict[str, str]:
        values = {}
        for variable in container["env"]:
            if "value" in variable:
                values[variable["name"]] = local(variable["value"])
            elif variable["valueFrom"]["secretKeyRef"]["key"] in secrets:
                values[variable["name"]] = secrets[variable["valueFrom"]["secretKeyRef"]["key"]]
        values |= {"MLFLOW_AUTH_CONFIG_PATH": str(home / "basic_auth.ini"), "HOME": str(home)}
        inherited = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
        return inherited | {"MLFLOW_DISABLE_TELEMETRY": "true", "NO_PROXY": "127.0.0.1"} | values

    for container in pod["initContainers"]:
        values = environment(container)
        command = [values.get(part[2:-1], part) if part.startswith("$(") else part for part in container["command"]]
        command = [sys.executable, "-m", *command]
        done = subprocess.run(command, cwd=home, env=values, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    with serve(pod["containers"][0]["command"], environment(pod["containers"][0]), home) as uri:
        yield uri


@contextmanager
def serve(command: list[str], environment: dict[str, str], home: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [{"0.0.0.0": "127.0.0.1", "5000": port}.get(part, part) for part in command]
    hosts = f"127.0.0.1:{port}"
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=home,
            env=environment | {"MLFLOW_SERVER_ALLOWED_HOSTS": hosts},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://{hosts}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
                time.sleep(0.1)
        yield f"http://{hosts}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


@pytest.fixture
def database(postgres: Postgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an empty database."""
    name = request.node.name
    postgres.run("createdb", name)
    yield name
    postgres.run("dropdb", "--if-exists", "--force", name)


def log_in(monkeypatch: pytest.MonkeyPatch, uri: str, user: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[user])


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is the test's; before `add`, which writes a policy there."""
    monkeypatch.chdir(tmp_path)


def test_the_whole_path_and_a_restored_backup(postgres, database, own_folder, add, tmp_path, monkeypatch) -> None:
    """Register, approve, promote, roll back; dump, lose everything, restore: history, production, files and users."""
    home = tmp_path / "home"
    with mlflow_of_manifest(postgres, database, home) as uri:
        log_in(monkeypatch, uri, "admin")
        monkeypatch.setenv("ADFM_PASSWORD_SERVICE", PASSWORDS["service"])
        subprocess.run([sys.executable, ROOT / "scripts/set-up-roles.py", "--service", "service"], check=True)
        log_in(monkeypatch, uri, "service")
        for right in (26, 36):
            promote(add(right), Params())
        rollback(Params())
        before = history(Params())
        moves = [(step.action, step.production) for step in before.counting if step.action in MOVES]
        assert moves == [("promote", "1"), ("promote", "2"), ("rollback", "1")]
    # The database first: every file that it names is in the later copy of the files.
    postgres.run("pg_dump", "--format", "custom", "--file", str(tmp_path / "mlflow.dump"), database)
    shutil.copytree(home / "files", tmp_path / "copy")

    postgres.run("dropdb", database)
    shutil.rmtree(home)

    postgres.run("createdb", database)
    restore = ["--exit-on-error", "--single-transaction", "--dbname", database, str(tmp_path / "mlflow.dump")]
    postgres.run("pg_restore", *restore)
    shutil.copytree(tmp_path / "copy", home / "files")
    with mlflow_of_manifest(postgres, database, home) as uri:
        log_in(monkeypatch, uri, "service")
        assert history(Params()).steps == before.steps
        assert "everything is as the signed history says" in audit(Params())
        client = tracking.client()
        assert client.get_registered_model("adfm").aliases["production"] == "1"
        promote(add(38), Params())
        assert client.get_registered_model("adfm").aliases["production"] == "3"
        log_in(monkeypatch, uri, "admin")
        assert client.get_registered_model("adfm").name == "adfm"


def revisions() -> list[str]:
    """MLflow's migrations, newest first."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    script = ScriptDirectory.from_config(_get_alembic_config(""))
    return [revision.revision for revision in script.walk_revisions()]


def test_a_database_of_an_older_release_is_migrated(postgres, database, tmp_path, monkeypatch) -> None:
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    monkeypatch.setenv("PGPASSWORD", DATABASE_PASSWORD)
    engine = sqlalchemy.create_engine(postgres.uri(database))
    Base.metadata.create_all(engine)
    config = _get_alembic_config(postgres.uri(database))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "6953534de441")  # of MLflow 3.0, with logged models
    engine.dispose()
    for statement in (
        "INSERT INTO registered_models (name, creation_time, last_updated_time) VALUES ('adfm', 1, 1)",
        "INSERT INTO model_versions (name, version, creation_time, last_updated_time, source, status, current_stage) "
        "VALUES ('adfm', 1, 1, 1, 'adfm:/1', 'READY', 'None')",
        "INSERT INTO model_version_tags (name, version, key, value) VALUES ('adfm', 1, 'approval', 'approved')",
        "INSERT INTO registered_model_aliases (name, alias, version) VALUES ('adfm', 'production', 1)",
    ):
        postgres.sql(database, statement)
    with mlflow_of_manifest(postgres, database, tmp_path / "home") as uri:
        log_in(monkeypatch, uri, "admin")
        client = tracking.client()
        assert client.get_model_version_by_alias("adfm", "production").tags == {"approval": "approved"}
    assert postgres.sql(database, "SELECT version_num FROM alembic_version") == revisions()[0]


def test_a_database_of_a_newer_release_is_refused_and_left_alone(postgres, database, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PGPASSWORD", DATABASE_PASSWORD)
    upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", postgres.uri(database)]
    subprocess.run(upgrade, check=True, capture_output=True)
    postgres.sql(database, "UPDATE alembic_version SET version_num = 'fffffffffff1'")
    with (
        pytest.raises(AssertionError, match="Can't locate revision identified by 'fffffffffff1'"),
        mlflow_of_manifest(postgres, database, tmp_path / "home"),
    ):
        pytest.fail("the server was started")
    assert postgres.sql(database, "SELECT version_num FROM alembic_version") == "fffffffffff1"


def test_the_driver_must_be_named(monkeypatch) -> None:
    """Why the manifest says postgresql+psycopg2; when this fails, it need not any more."""
    import sqlalchemy

    assert sqlalchemy.make_url("postgresql://mlflow@postgres/mlflow").get_dialect().driver == "psycopg"
    with pytest.raises(ModuleNotFoundError, match="psycopg"):
        sqlalchemy.create_engine("postgresql://mlflow@postgres/mlflow")
    for name in ("deploy/server/mlflow.yaml",):
        assert "postgresql://" not in re.sub(r"#.*", "", (ROOT / name).read_text())
