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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import certifi
import pytest
import requests
import yaml

from adfm import tracking
from adfm.registry.audit import audit
from adfm.registry.history import MOVES
from adfm.registry.promotion import history, promote, rollback
from tests.servers import free_port, running

pytestmark = pytest.mark.timeout(900)  # each container imports MLflow

ROOT = Path(__file__).parents[2]
DATABASE_PASSWORD = "p@ss/w:rd %20#?"  # none of which could stand in an address
PASSWORDS = {"admin": "the-admins-password", "service": "the-services-password"}


@dataclass(frozen=True)
class Postgres:
    """A running cluster: where its programs are, and where it listens, on loopback only."""

    programs: Path
    port: int
    certificate: str

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


def make_certificate(folder: Path) -> None:
    """A key and a certificate of 127.0.0.1 that signs itself."""
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.crt")]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    (folder / "key.pem").chmod(0o600)


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
        make_certificate(folder)
        if account:
            for path in (folder, *folder.iterdir()):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        data = folder / "data"
        command = [programs / "initdb", "--pgdata", data, "--username", "mlflow", "--pwfile", folder / "password"]
        options = ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
        quiet: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"}
        done = subprocess.run([*command, *options], **quiet, **account, check=False)
        assert done.returncode == 0, done.stdout
        port = free_port()
        command = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        tls = ["-c", "ssl=on", "-c", f"ssl_cert_file={folder}/ca.crt", "-c", f"ssl_key_file={folder}/key.pem"]
        with (folder / "log").open("w") as log:
            started = subprocess.Popen(
                [*command, *tls, "-c", "fsync=off"], cwd="/", stdout=log, stderr=log, start_new_session=True, **account
            )
        try:
            ready = [programs / "pg_isready", "--host", "127.0.0.1", "--port", str(port)]
            deadline = time.monotonic() + 60
            while subprocess.run(ready, capture_output=True, check=False).returncode:
                assert started.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            yield Postgres(programs, port, (folder / "ca.crt").read_text())
        finally:
            started.send_signal(signal.SIGINT)  # a fast shutdown, which does not wait for clients
            started.wait(60)
    finally:
        shutil.rmtree(folder)


SERVER = ROOT / "deploy/server"
PROGRAMS = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # python, mlflow, alembic


def manifest(file: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [
        each
        for each in yaml.safe_load_all((SERVER / file).read_text())
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


@dataclass(frozen=True)
class Cluster:
    """Runs the containers of the manifests as a kubelet does, each as a process: with their commands and environment.

    Args:
        postgres: Where the programs of Postgres' image are.
        home: Stands in for the pods' folders.
        secret: The keys of the secret adfm-server.
    """

    postgres: Postgres
    home: Path
    secret: dict[str, str]

    def local(self, text: str) -> str:
        for folder in ("/backup", "/etc/adfm/ca", "/etc/schema", "/etc/mlflow"):
            text = re.sub(rf"(?<![\w/]){folder}\b", f"{self.home}{folder}", text)
        return text

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """As kubelet_pods.go makes it: `env` outweighs `envFrom`, an optional key that is missing sets nothing."""
        values = {}
        for source in container["envFrom"]:
            values |= manifest("database.yaml", "ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container["env"]:
            if "value" in variable:
                values[variable["name"]] = variable["value"]
                continue
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == "adfm-server"
            if reference["key"] in self.secret or not reference.get("optional"):
                values[variable["name"]] = self.secret[reference["key"]]
        inherited = {key: os.environ[key] for key in ("PYTHONPATH", "LANG") if key in os.environ}
        inherited["PATH"] = os.pathsep.join((str(self.postgres.programs), PROGRAMS))
        values = {name: self.local(value) for name, value in values.items()}
        values |= {"HOME": str(self.home), "MLFLOW_DISABLE_TELEMETRY": "true", "NO_PROXY": "127.0.0.1"}
        return inherited | values

    def run(self, container: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
        for folder in ("backup", "etc/adfm/ca", "etc/schema", "etc/mlflow"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        ini = manifest("database.yaml", "ConfigMap", "schema")["data"]["alembic.ini"]
        (self.home / "etc/schema/alembic.ini").write_text(ini)
        command = [self.local(part) for part in (*container["command"], *container.get("args", ()))]
        return subprocess.run(
            command,
            cwd=self.home,
            env=self.environment(container) | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def job(self, pod: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the containers of a Job's pod, one after the other, to the first that fails; the last one's result."""
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            done = self.run(container, **environment)
            if done.returncode:
                break
        return done

    def upgrade(self) -> subprocess.CompletedProcess[str]:
        return self.job(manifest("upgrade/job.yaml", "Job", "upgrade")["spec"]["template"]["spec"])

    def back_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        job = manifest("backup.yaml", "CronJob", "backup")["spec"]["jobTemplate"]
        return self.job(job["spec"]["template"]["spec"], **environment)

    def restore(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.job(manifest("restore/job.yaml", "Job", "restore")["spec"]["template"]["spec"], **environment)

    def dumps(self) -> list[str]:
        return sorted(each.name for each in (self.home / "backup").iterdir())

    @contextmanager
    def mlflow(self) -> Iterator[str]:
        """Runs the pod of MLflow; the server's address.

        Raises:
            AssertionError: A container failed; the message is what it wrote.
        """
        pod = manifest("mlflow.yaml", "Deployment", "mlflow")["spec"]["template"]["spec"]
        for container in pod["initContainers"]:
            done = self.run(container)
            if done.returncode:  # an assert would add the container's whole script to the message
                raise AssertionError(done.stdout + done.stderr)
        (server,) = pod["containers"]
        config = manifest("mlflow.yaml", "ConfigMap", "mlflow")["data"]["basic_auth.ini"]
        (self.home / "etc/mlflow/basic_auth.ini").write_text(config)
        command = [self.local(part) for part in (*server["command"], *server["args"])]
        with serve(command, self.environment(server), self.home) as uri:
            yield uri


def cluster(postgres: Postgres, database: str, home: Path, **secret: str) -> Cluster:
    """With a secret that names the database as it would a managed one."""
    home.mkdir(exist_ok=True)
    address = {"postgres-host": "127.0.0.1", "postgres-port": str(postgres.port), "postgres-database": database}
    others = {
        "postgres-password": DATABASE_PASSWORD,
        "admin-password": PASSWORDS["admin"],
        "flask-secret-key": "x" * 32,
    }
    return Cluster(postgres, home, address | others | {"artifacts": str(home / "files")} | secret)


@contextmanager
def serve(command: list[str], environment: dict[str, str], home: Path) -> Iterator[str]:
    port = str(free_port())
    command = [{"0.0.0.0": "127.0.0.1", "5000": port}.get(part, part) for part in command]
    host = f"127.0.0.1:{port}"
    environment["MLFLOW_SERVER_ALLOWED_HOSTS"] += f",{host}"
    with running(command, f"http://{host}/health", home / "log", environment):
        yield f"http://{host}"


@pytest.fixture
def database(postgres: Postgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an empty database."""
    name = request.node.name
    postgres.run("createdb", name)
    yield name
    postgres.run("dropdb", "--if-exists", "--force", name)


@pytest.fixture(scope="module")
def first_upgrade(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A cluster whose Job upgrade has made the tables, as a template for databases of others."""
    postgres.run("createdb", "first_upgrade")
    server = cluster(postgres, "first_upgrade", tmp_path_factory.mktemp("first-upgrade"))
    done = server.upgrade()
    assert done.returncode == 0, done.stderr
    return server


@pytest.fixture
def upgraded(first_upgrade: Cluster, postgres: Postgres, database: str, tmp_path: Path) -> Cluster:
    """A cluster as it is after its first upgrade: the tables, and the dump of before."""
    postgres.run("dropdb", database)
    postgres.run("createdb", "--template", "first_upgrade", database)
    shutil.copytree(first_upgrade.home / "backup", tmp_path / "home" / "backup")
    return cluster(postgres, database, tmp_path / "home")


def log_in(monkeypatch: pytest.MonkeyPatch, uri: str, user: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[user])


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is the test's; before `add`, which writes a policy there."""
    monkeypatch.chdir(tmp_path)


def test_the_whole_path_and_a_restored_backup(postgres, upgraded, database, own_folder, add, tmp_path, monkeypatch):
    """Register, approve, promote, roll back, back up, lose all, restore: history, production, files and users."""
    server = upgraded
    with server.mlflow() as uri:
        log_in(monkeypatch, uri, "admin")
        monkeypatch.setenv("ADFM_PASSWORD_SERVICE", PASSWORDS["service"])
        subprocess.run([sys.executable, ROOT / "scripts/set-up-roles.py", "--service", "service"], check=True)
        log_in(monkeypatch, uri, "service")
        for right in (26, 36):
            promote(add(right), "adfm")
        rollback("adfm")
        before = history("adfm")
        moves = [(step.action, step.production) for step in before.counting if step.action in MOVES]
        assert moves == [("promote", "1"), ("promote", "2"), ("rollback", "1")]
        # The database first: every file that it names is in the later copy of the files.
        done = server.back_up()  # beside a server that runs
        assert done.returncode == 0, done.stderr
        tracking.client().set_registered_model_tag("adfm", "after", "the backup")
    shutil.copytree(server.home / "files", tmp_path / "copy")

    postgres.run("dropdb", database)
    postgres.run("createdb", database)
    shutil.rmtree(server.home / "files")

    done = server.restore()
    assert done.returncode == 0, done.stderr
    assert f"restored {server.home}/backup/{server.dumps()[-1]}" in done.stdout
    shutil.copytree(tmp_path / "copy", server.home / "files")
    with server.mlflow() as uri:
        log_in(monkeypatch, uri, "service")
        assert history("adfm").steps == before.steps
        assert "everything is as the signed history says" in audit("adfm")
        client = tracking.client()
        model = client.get_registered_model("adfm")
        assert (model.aliases["production"], "after" in model.tags) == ("1", False)
        promote(add(38), "adfm")
        assert client.get_registered_model("adfm").aliases["production"] == "3"
        log_in(monkeypatch, uri, "admin")
        assert client.get_registered_model("adfm").name == "adfm"


def test_by_hand_a_dump_is_restored_as_the_documentation_says(postgres, upgraded, database, tmp_path) -> None:
    """The commands of docs/server.md for a copy outside the cluster, without `kubectl exec` around them."""
    text = (ROOT / "docs/server.md").read_text()
    postgres.sql(database, "INSERT INTO registered_models (name, creation_time, last_updated_time) VALUES ('a', 1, 1)")
    tables = postgres.sql(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
    lines = re.findall(
        r"exec (?:-i )?statefulset/postgres -- (?:\\\n +)?(\w+) --username mlflow (.*)$", text, re.MULTILINE
    )
    assert [program for program, _ in lines] == ["pg_dump", "dropdb", "createdb", "pg_restore"]
    for program, rest in lines:
        command = re.sub(r"\bmlflow\b(?!\.)", database, rest)
        command, redirection, file = re.sub(r"mlflow\.dump", str(tmp_path / "dump"), command).partition(
            ">" if program == "pg_dump" else "<"
        )
        arguments = command.split()
        if program == "pg_dump":
            arguments += ["--file", file.strip()]
        elif redirection:
            arguments.append(file.strip())
        postgres.run(program, *arguments)
    assert postgres.sql(database, "SELECT name FROM registered_models") == "a"
    assert postgres.sql(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == tables


def assert_that_only_known_addresses_are_let_in(uri: str) -> None:
    """What a browser sends: Host, and with a form Origin, behind a proxy with TLS."""

    def status(method: str, path: str, **headers: str) -> int:
        url, admin = f"{uri}/{path}", ("admin", PASSWORDS["admin"])
        return requests.request(method, url, headers=headers, json={}, auth=admin, timeout=60).status_code

    search = "ajax-api/2.0/mlflow/experiments/search?max_results=1"
    for host in ("mlflow.example.com", "mlflow.adfm:5000", "mlflow.adfm.svc:5000", "mlflow:5000", "localhost:5001"):
        assert status("GET", search, Host=host) == 200, host
    for host in ("evil.example.com", "localhost.example.com:5000"):
        assert status("GET", search, Host=host) == 403, host
    created = "ajax-api/2.0/mlflow/registered-models/create"  # 400: it is let in, and lacks a name
    host = "mlflow.example.com"
    assert status("POST", created, Host=host, Origin="https://mlflow.example.com") == 400
    assert status("POST", created, Host=host, Origin="http://mlflow.example.com") == 403
    assert status("POST", created, Host=host, Origin="https://evil.example.com") == 403
    assert status("GET", "health", Host="10.0.0.7:5000") == 200  # as the probes ask


def test_postgres_and_the_public_address_are_those_of_the_secret(postgres, database, tmp_path, monkeypatch) -> None:
    """Another user than the default one, who is not a superuser but owns the database; TLS with a private CA."""
    postgres.sql("postgres", "CREATE ROLE plant LOGIN PASSWORD 'another'")
    postgres.sql("postgres", f'ALTER DATABASE "{database}" OWNER TO plant')
    postgres.sql(database, "CREATE SCHEMA provider; CREATE TABLE provider.hidden (id int)")  # as an operator makes them
    named = {"postgres-user": "plant", "postgres-password": "another", "postgres-sslmode": "verify-full"}
    server = cluster(postgres, database, tmp_path / "home", ui="https://mlflow.example.com/", **named)
    done = server.upgrade()
    assert done.returncode != 0
    assert "etc/adfm/ca/ca.crt" in done.stderr and "does not exist" in done.stderr
    (server.home / "etc/adfm/ca/ca.crt").write_text(postgres.certificate)
    assert server.upgrade().returncode == 0
    with server.mlflow() as uri:
        log_in(monkeypatch, uri, "admin")
        tracking.client().create_registered_model("adfm")
        connections = f"FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = '{database}'"
        assert postgres.sql(database, f"SELECT bool_and(ssl), min(usename) {connections} AND usename != 'mlflow'") == (
            "t|plant"
        )
        assert_that_only_known_addresses_are_let_in(uri)
    for _ in range(2):  # a restored database can be backed up and restored again
        done = server.back_up()
        assert done.returncode == 0, done.stderr
        time.sleep(1)  # a dump is named by the second
        postgres.sql(database, "DELETE FROM registered_models; CREATE TABLE of_a_newer_release (id int)")
        done = server.restore()
        assert done.returncode == 0, done.stderr
        assert postgres.sql(database, "SELECT name FROM registered_models") == "adfm"
        assert postgres.sql(database, "SELECT to_regclass('of_a_newer_release')") == ""
        assert postgres.sql(database, "SELECT to_regclass('provider.hidden')") == "provider.hidden"
    make_certificate(tmp_path)  # of somebody else
    shutil.copy(tmp_path / "ca.crt", server.home / "etc/adfm/ca/ca.crt")
    done = server.back_up()
    assert done.returncode != 0 and "certificate verify failed" in done.stderr
    postgres.run("dropdb", database)
    postgres.sql("postgres", "DROP ROLE plant")


def test_the_defaults_are_those_of_the_postgres_beside_it() -> None:
    """Without keys postgres-* in the secret, all containers ask postgres.yaml's server."""
    defaults = manifest("database.yaml", "ConfigMap", "database")["data"]
    service = manifest("postgres.yaml", "Service", "postgres")
    (container,) = manifest("postgres.yaml", "StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"]
    made = {each["name"]: each.get("value") for each in container["env"]}
    assert defaults["PGHOST"] == service["metadata"]["name"]
    assert int(defaults["PGPORT"]) == service["spec"]["ports"][0]["port"]
    assert (defaults["PGUSER"], defaults["PGDATABASE"]) == (made["POSTGRES_USER"], made["POSTGRES_DB"])


def test_s3_is_checked_against_the_private_ca_beside_the_public_ones(tmp_path) -> None:
    """A Postgres with a CA of its own, and Amazon's S3."""
    (container,) = manifest("mlflow.yaml", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    file = tmp_path / "ca.crt"
    folders = {"PATH": PROGRAMS, "HOME": str(tmp_path), "PGSSLROOTCERT": str(file)}
    environment = folders | {"MLFLOW_SERVER_ALLOWED_HOSTS": ""}
    command = [*container["command"], "sh", "-c", 'cat "${AWS_CA_BUNDLE:-/dev/null}"']

    def authorities() -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert authorities() == ""
    file.write_text("the private one\n")
    assert authorities() == Path(certifi.where()).read_text() + "the private one\n"


def test_a_server_waits_for_the_upgrade(postgres, database, tmp_path) -> None:
    server = cluster(postgres, database, tmp_path)
    with pytest.raises(AssertionError, match="run the Job upgrade"), server.mlflow():
        pytest.fail("the server was started")
    assert postgres.sql(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"
    unreachable = cluster(postgres, database, tmp_path, **{"postgres-port": "1"})
    with pytest.raises(AssertionError, match="Connection refused") as raised, unreachable.mlflow():
        pytest.fail("the server was started")
    assert "run the Job upgrade" not in str(raised.value)


def test_a_backup_that_fails_removes_nothing_and_leaves_no_dump(postgres, upgraded) -> None:
    server, backups = upgraded, upgraded.home / "backup"
    (first,) = server.dumps()
    old = backups / "mlflow-2020-01-01T00-00-00Z.dump"
    for file in (old, backups / "mlflow-2020-01-02T00-00-00Z.dump.part"):
        file.touch()
        os.utime(file, (0, 0))
    kept = backups / "keep" / old.name  # put aside by somebody
    kept.parent.mkdir()
    shutil.copy2(old, kept)
    assert cluster(postgres, "nothing", server.home).back_up().returncode != 0
    assert old.exists() and first in server.dumps()
    assert not [each for each in server.dumps() if each.endswith(".dump") and each not in (first, old.name)]
    time.sleep(1)
    done = server.back_up()
    assert done.returncode == 0 and re.search(r"mlflow-.*\.dump: \d{4,} bytes", done.stdout)
    assert [each for each in server.dumps() if "2020" in each] == [] and kept.exists()
    assert first in server.dumps() and len([each for each in server.dumps() if each.endswith(".dump")]) == 2


def test_a_restore_that_fails_changes_nothing(postgres, upgraded, database) -> None:
    server, backups = upgraded, upgraded.home / "backup"
    (name,) = server.dumps()
    tables = postgres.sql(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
    assert int(tables) > 50
    time.sleep(1)
    assert server.back_up().returncode == 0
    whole = server.dumps()[-1]
    content = (backups / whole).read_bytes()
    (backups / "mlflow-cut.dump").write_bytes(content[: len(content) // 2])
    for dump in ("mlflow-cut.dump", "mlflow-none.dump"):
        assert server.restore(DUMP=dump).returncode != 0
        assert postgres.sql(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == tables
    assert server.restore(DUMP=name).returncode == 0  # of the empty database, before the upgrade
    assert postgres.sql(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"


def revisions() -> list[str]:
    """MLflow's migrations, newest first."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    script = ScriptDirectory.from_config(_get_alembic_config(""))
    return [revision.revision for revision in script.walk_revisions()]


def test_a_database_of_an_older_release_is_migrated_by_the_job_alone(postgres, database, tmp_path, monkeypatch) -> None:
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
    server = cluster(postgres, database, tmp_path / "home")
    version = "SELECT version_num FROM alembic_version"
    with pytest.raises(AssertionError, match="run the Job upgrade"), server.mlflow():
        pytest.fail("the server was started")
    assert postgres.sql(database, version) == "6953534de441"
    done = server.upgrade()
    assert done.returncode == 0, done.stderr
    with server.mlflow() as uri:
        log_in(monkeypatch, uri, "admin")
        client = tracking.client()
        assert client.get_model_version_by_alias("adfm", "production").tags == {"approval": "approved"}
    assert postgres.sql(database, version) == revisions()[0]
    assert server.upgrade().returncode == 0  # again: nothing to do
    assert server.restore(DUMP=server.dumps()[0]).returncode == 0  # the way back
    assert postgres.sql(database, version) == "6953534de441"


def test_a_database_of_a_newer_release_is_refused_and_left_alone(postgres, upgraded, database) -> None:
    server = upgraded
    postgres.sql(database, "UPDATE alembic_version SET version_num = 'fffffffffff1'")
    with pytest.raises(AssertionError, match="or name the image that was there before"), server.mlflow():
        pytest.fail("the server was started")
    done = server.upgrade()
    assert done.returncode != 0 and "Can't locate revision identified by 'fffffffffff1'" in done.stderr
    assert postgres.sql(database, "SELECT version_num FROM alembic_version") == "fffffffffff1"


def test_probes_take_a_server_that_recovers_for_alive_and_one_that_is_gone_for_dead(postgres) -> None:
    """Status 0 accepts, 1 refuses at the moment (it recovers), 2 does not answer."""
    (container,) = manifest("postgres.yaml", "StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"]

    def alive(probe: str, port: int) -> bool:
        environment = os.environ | {"PATH": f"{postgres.programs}:{os.environ['PATH']}", "PGPORT": str(port)}
        return subprocess.run(container[probe]["exec"]["command"], env=environment, check=False).returncode == 0

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert alive(probe, postgres.port)
            assert not alive(probe, closed.getsockname()[1])

    def refuse(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            while connection.recv(1024)[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):  # may it be TLS, or GSS?
                connection.sendall(b"N")
            error = b"SFATAL\0C57P03\0Mthe database system is starting up\0\0"
            connection.sendall(b"E" + (len(error) + 4).to_bytes(4, "big") + error)

    for probe, expected in (("livenessProbe", True), ("readinessProbe", False)):
        with socket.create_server(("127.0.0.1", 0)) as recovering:
            thread = threading.Thread(target=refuse, args=(recovering,))
            thread.start()
            assert alive(probe, recovering.getsockname()[1]) == expected
            thread.join()


def test_the_driver_must_be_named(monkeypatch) -> None:
    """Why the manifest says postgresql+psycopg2; when this fails, it need not any more."""
    import sqlalchemy

    assert sqlalchemy.make_url("postgresql://mlflow@postgres/mlflow").get_dialect().driver == "psycopg"
    with pytest.raises(ModuleNotFoundError, match="psycopg"):
        sqlalchemy.create_engine("postgresql://mlflow@postgres/mlflow")
    for file in SERVER.rglob("*.yaml"):
        assert "postgresql://" not in re.sub(r"#.*", "", file.read_text())
