"""MLflow's address and login, and a private certificate authority with the real clients against a TLS server."""

import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import certifi
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from adfm import tracking
from adfm.data import s3, sources
from adfm.errors import AdfmError
from adfm.process import environment
from adfm.process.environment import set_environment
from adfm.registry import alerts

OURS, OTHER = "http://mlflow.adfm:5000", "http://mlflow.kubeflow:5000"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable that these tests are about, and none left afterwards."""
    for name in {*os.environ, *environment._CA_VARIABLES, "MLFLOW_TRACKING_URI", *environment._MLFLOW_LOGIN}:
        if name.startswith(("ADFM_", "AWS_", "MLFLOW_", "SSL_CERT_", "CURL_CA")) or name in environment._CA_VARIABLES:
            monkeypatch.setenv(name, "")  # so that what the test leaves is undone
            monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "CA_FOLDER", str(tmp_path / "not-mounted"))
    environment._print_once.cache_clear()


def _login() -> dict[str, str]:
    return {
        name.removeprefix("MLFLOW_TRACKING_").lower(): os.environ[name]
        for name in environment._MLFLOW_LOGIN
        if name in os.environ
    }


@pytest.mark.parametrize(
    ("others", "address", "login"),
    [
        ({}, OURS, {"username": "adfm", "password": "ours"}),
        # What KFP's plug-in sets without `injectUserEnvVars`: its server's login, for the launcher.
        ({"USERNAME": "kfp", "PASSWORD": "theirs"}, OURS, {"username": "adfm", "password": "ours"}),
        ({"TOKEN": "theirs"}, OURS, {"username": "adfm", "password": "ours"}),
        # And with it: every kind of login.
        ({"URI": OTHER}, OTHER, {}),
        ({"URI": OTHER, "USERNAME": "kfp", "PASSWORD": "theirs"}, OTHER, {"username": "kfp", "password": "theirs"}),
        ({"URI": OTHER, "TOKEN": "theirs"}, OTHER, {"token": "theirs"}),
        ({"URI": OTHER, "AUTH": "kubernetes-namespaced"}, OTHER, {"auth": "kubernetes-namespaced"}),
        # Our own server as the plug-in's.
        ({"URI": f"{OURS}/"}, f"{OURS}/", {"username": "adfm", "password": "ours"}),
        ({"URI": OURS, "USERNAME": "kfp", "PASSWORD": "x"}, OURS, {"username": "kfp", "password": "x"}),
        ({"URI": OURS, "TOKEN": "theirs"}, OURS, {"token": "theirs"}),
        ({"URI": "http://kfp:x@mlflow.adfm:5000"}, "http://kfp:x@mlflow.adfm:5000", {}),
        # Nearly our server.
        ({"URI": "http://mlflow.adfm:5001"}, "http://mlflow.adfm:5001", {}),
        ({"URI": "https://mlflow.adfm:5000"}, "https://mlflow.adfm:5000", {}),
        ({"URI": f"{OURS}/other"}, f"{OURS}/other", {}),
        ({"URI": "http://mlflow.adfm.example.com:5000"}, "http://mlflow.adfm.example.com:5000", {}),
        ({"URI": "http://mlflow.adfm:port"}, "http://mlflow.adfm:port", {}),
        ({"URI": "sqlite:///mlflow.db"}, "sqlite:///mlflow.db", {}),
    ],
)
def test_address_and_login_of_mlflow_come_from_one_place(
    others: dict[str, str], address: str, login: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFM_MLFLOW_TRACKING_URI", f"{OURS}\n")  # as `echo … | base64` makes a secret
    monkeypatch.setenv("ADFM_MLFLOW_TRACKING_USERNAME", "adfm")
    monkeypatch.setenv("ADFM_MLFLOW_TRACKING_PASSWORD", "ours")
    for name, value in others.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    for _ in range(2):  # as a child process does
        set_environment()
        assert os.environ["MLFLOW_TRACKING_URI"] == address
        assert _login() == login


def test_without_an_address_of_our_own_nothing_of_mlflow_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFM_MLFLOW_TRACKING_USERNAME", "adfm")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "theirs")
    set_environment()
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert _login() == {"token": "theirs"}


@pytest.mark.parametrize(
    ("variables", "pages"),
    [
        ({}, ""),
        ({"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, ""),
        ({"MLFLOW_TRACKING_URI": "https://someone:secret@mlflow.example.com/"}, "https://mlflow.example.com"),
        ({"ADFM_MLFLOW_UI": "https://mlflow.example.com/", "MLFLOW_TRACKING_URI": OURS}, "https://mlflow.example.com"),
        ({"ADFM_MLFLOW_UI": "https://pages", "ADFM_MLFLOW_TRACKING_URI": OURS}, "https://pages"),
        ({"ADFM_MLFLOW_UI": "https://pages", "MLFLOW_TRACKING_URI": "postgresql://db/mlflow"}, "https://pages"),
        ({"ADFM_MLFLOW_UI": "mlflow.example.com", "MLFLOW_TRACKING_URI": OURS}, OURS),  # would be a relative link
        (
            {"ADFM_MLFLOW_UI": "https://pages", "ADFM_MLFLOW_TRACKING_URI": OURS, "MLFLOW_TRACKING_URI": OTHER},
            OTHER,
        ),
    ],
)
def test_pages_of_mlflow(variables: dict[str, str], pages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_environment()
    assert environment.mlflow_ui() == pages


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("http://someone:an@hidden@host:1/a@b", "http://host:1/a@b"),
        ("cloning https://hidden@host/x.git to /tmp/x", "cloning https://host/x.git to /tmp/x"),
        ("dvc://https://someone:hidden@host/x.git@v1:line", "dvc://https://host/x.git@v1:line"),
        (
            "dvc://folder@v1:line and dvc://git@host:x.git@v1:line",
            "dvc://folder@v1:line and dvc://git@host:x.git@v1:line",
        ),
        ("s3://bucket/line//1@2x.png, line//1@2x.png", "s3://bucket/line//1@2x.png, line//1@2x.png"),
        ("Invalid header value b'Bearer hidden\\n'", "Invalid header value"),  # http.client
        ("return character(s) in header value: 'Bearer hidden'", "return character(s) in header value"),  # requests
    ],
)
def test_logins_are_left_out_of_texts(text: str, after: str) -> None:
    assert environment.without_login(text) == after


# ------------------------------------------------------------------------------------------------ certificate authority


class Authority:
    """A certificate authority, its certificate as a file, and a server's certificate for loopback that it signed."""

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        folder.mkdir(exist_ok=True)
        key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(*[False] * 5, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            self._builder(subject, subject, key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        signed = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), subject, server_key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.private_key = key.private_bytes(serialization.Encoding.PEM, *plain)
        self.der = certificate.public_bytes(serialization.Encoding.DER)
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.file = folder / "ca.crt"
        self.file.write_bytes(self.pem)
        server = folder / "server.pem"
        server.write_bytes(
            server_key.private_bytes(serialization.Encoding.PEM, *plain)
            + signed.public_bytes(serialization.Encoding.PEM)
        )
        self.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server_context.load_cert_chain(server)

    @staticmethod
    def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=12))
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


ANSWERS = {
    "/api/2.0/mlflow/experiments/search": json.dumps({"experiments": []}),
    "/apis/v2beta1/healthz": json.dumps({"multi_user": False}),
    "/api/models/someone/model": json.dumps({"id": "someone/model", "sha": "0" * 40, "siblings": []}),
    "/data": (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>data</Name>'
        "<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated><Contents><Key>line/1.png</Key><Size>3</Size>"
        '<ETag>"0"</ETag><LastModified>2026-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>'
    ),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = ANSWERS.get(self.path.partition("?")[0].rstrip("/"), "").encode()
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "application/xml" if body.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:  # a client that does not trust the certificate hangs up
        pass


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[str]:
    """A server with MLflow's, KFP's, S3's and the hub's answers, whose certificate the authority signed."""
    with Server(("127.0.0.1", 0), Handler) as https:
        https.socket = authority.server_context.wrap_socket(https.socket, server_side=True)
        thread = threading.Thread(target=https.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"https://localhost:{https.server_port}"
        https.shutdown()
        thread.join()


def use_mlflow(server: str, environ: pytest.MonkeyPatch) -> None:
    environ.setenv("MLFLOW_TRACKING_URI", server)
    tracking.configure()


def use_s3(server: str, environ: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
        environ.setenv(f"ADFM_S3_{name}", "any")
    environ.setenv("ADFM_S3_ENDPOINT_URL", server)
    environ.setenv("AWS_MAX_ATTEMPTS", "1")
    client = s3.client()
    assert client.list_objects_v2(Bucket="data")["KeyCount"] == 1
    client.close()


def use_dvc_s3(server: str, _: pytest.MonkeyPatch) -> None:
    from dvc_s3 import S3FileSystem

    login = {"access_key_id": "owner", "secret_access_key": "secret", "region": "any"}
    files = S3FileSystem(endpointurl=server, cache_regions=False, skip_instance_cache=True, **login)
    assert list(files.find("data/line")) == ["data/line/1.png"]


def use_urllib(server: str, _: pytest.MonkeyPatch) -> None:
    import urllib.request

    with urllib.request.urlopen(f"{server}/apis/v2beta1/healthz", timeout=10) as answer:
        assert json.load(answer) == {"multi_user": False}


def use_hub(server: str, _: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    huggingface_hub.close_session()  # it is kept, with the authorities that it was made with
    try:
        assert huggingface_hub.HfApi(endpoint=server, token=False).model_info("someone/model").sha == "0" * 40
    finally:
        huggingface_hub.close_session()


def use_kfp(server: str, _: pytest.MonkeyPatch) -> None:
    import kfp

    kfp.Client(host=server, namespace="kubeflow", existing_token="any", ssl_ca_cert=environment.ca_bundle())


CLIENTS = [use_mlflow, use_s3, use_dvc_s3, use_urllib, use_hub]
Use = Callable[[str, pytest.MonkeyPatch], None]


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.usefixtures("no_aws")
@pytest.mark.filterwarnings("ignore:This client only works:FutureWarning")
@pytest.mark.parametrize("use", [*CLIENTS, use_kfp])
def test_each_client_trusts_a_private_authority_where_it_is_named(
    use: Use, server: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(authority.file))
    set_environment()
    use(server, monkeypatch)


@pytest.mark.usefixtures("no_aws")
@pytest.mark.parametrize("use", CLIENTS)
def test_without_it_no_client_does(use: Use, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment()
    with pytest.raises(Exception, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed") as error:
        use(server, monkeypatch)
    if use is use_mlflow:
        assert "name the authority's certificate (PEM) in ADFM_CA_BUNDLE" in str(error.value)


@pytest.mark.usefixtures("no_aws")
def test_a_source_whose_authority_is_unknown_says_what_to_set(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
        monkeypatch.setenv(f"ADFM_S3_{name}", "any")
    monkeypatch.setenv("ADFM_S3_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(AdfmError, match=r"name the authority's certificate \(PEM\) in ADFM_CA_BUNDLE"):
        sources.fetch("s3://data/line", tmp_path / "out")


def test_alerts_trust_it_and_say_what_to_set(
    server: str, authority: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alerts, "_PAUSE", 0)
    monkeypatch.setenv("ADFM_ALERT_WEBHOOK", f"{server}/apis/v2beta1/healthz")
    set_environment()
    alerts.alert("a message")
    assert "name the authority's certificate (PEM) in ADFM_CA_BUNDLE" in capsys.readouterr().err
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(authority.file))
    set_environment()
    alerts.alert("a message")
    assert capsys.readouterr().err == ""


def test_a_relative_name_holds_for_processes_in_other_folders(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(authority.file.parent)
    monkeypatch.setenv("ADFM_CA_BUNDLE", authority.file.name)
    set_environment()
    monkeypatch.chdir(tmp_path)
    set_environment()
    assert os.environ["ADFM_CA_BUNDLE"] == str(authority.file)


def test_git_trusts_it_for_dvc(authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dulwich import porcelain
    from dulwich.server import DictBackend
    from dulwich.web import make_wsgi_chain
    from scmrepo.git import Git

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    class QuietServer(WSGIServer):
        def handle_error(self, *_: object) -> None:
            pass

    repo = porcelain.init(tmp_path / "repo", symlinks=False)
    (tmp_path / "repo" / "file").write_text("content")
    porcelain.add(repo, [str(tmp_path / "repo" / "file")])
    porcelain.commit(repo, b"start", author=b"a <a@b>", committer=b"a <a@b>")
    with QuietServer(("127.0.0.1", 0), Quiet) as git:
        git.set_app(make_wsgi_chain(DictBackend({"/": repo})))
        git.socket = authority.server_context.wrap_socket(git.socket, server_side=True)
        thread = threading.Thread(target=git.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            with pytest.raises(AdfmError, match="Failed to clone.* is signed by an authority that is unknown here"):
                sources.fetch(f"dvc://https://localhost:{git.server_port}/@v1:file", tmp_path / "refused")
            monkeypatch.setenv("ADFM_CA_BUNDLE", str(authority.file))
            set_environment()
            clone = Git.clone(f"https://localhost:{git.server_port}/", tmp_path / "clone")
            clone.close()
        finally:
            git.shutdown()
            thread.join()
            repo.close()
    assert (tmp_path / "clone" / "file").read_text() == "content"


def _certificates(file: str | Path) -> set[bytes]:
    return set(environment._pem_blocks(Path(file).read_bytes()))


def test_public_authorities_stay_trusted_and_private_keys_stay_out(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As people put files together: a byte order mark, words, a key, ends of lines of Windows.
    given = tmp_path / "all.pem"
    given.write_bytes(b"\xef\xbb\xbfCompany root\r\n" + authority.pem.replace(b"\n", b"\r\n") + authority.private_key)
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(given))
    set_environment()
    [bundle] = {os.environ[name] for name in environment._CA_VARIABLES}
    assert environment.ca_bundle() == bundle
    assert Path(bundle).stat().st_mode & 0o077 == 0
    assert b"PRIVATE KEY" not in Path(bundle).read_bytes()
    assert _certificates(bundle) >= _certificates(certifi.where()) | _certificates(authority.file)
    assert len(_certificates(certifi.where())) > 100
    assert len(ssl.create_default_context(cafile=bundle).get_ca_certs()) == len(_certificates(bundle))
    set_environment()
    assert {os.environ[name] for name in environment._CA_VARIABLES} == {bundle}


def test_child_processes_share_the_file_and_it_goes_with_the_first(authority: Authority, tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys; from adfm.process.environment import set_environment; set_environment()\n"
        "print(os.environ['SSL_CERT_FILE'], os.path.exists(os.environ['SSL_CERT_FILE']), flush=True)\n"
        "if len(sys.argv) < 3:\n"
        "    if os.fork() == 0: sys.exit()\n"  # which must not remove it
        "    os.wait()\n"
        "    subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[1], 'child'], check=True)"
    )
    variables = {"ADFM_CA_BUNDLE": str(authority.file), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, code], env=os.environ | variables, check=True, capture_output=True, text=True
    )
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith(str(tmp_path)) and first.endswith(" True")
    assert list(tmp_path.iterdir()) == []
    assert done.stderr == ""


def test_variables_that_are_set_win_and_one_that_lacks_the_authority_is_named(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(authority.file))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certifi.where())
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
    for _ in range(2):
        set_environment()
    assert os.environ["REQUESTS_CA_BUNDLE"] == certifi.where()
    assert os.environ["AWS_CA_BUNDLE"] == str(authority.file)
    assert _certificates(os.environ["SSL_CERT_FILE"]) >= _certificates(authority.file)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "REQUESTS_CA_BUNDLE is set already" in message and "MLflow will not trust it" in message


def test_the_authority_of_a_cluster_is_taken_from_where_it_is_mounted(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mounted"
    monkeypatch.setattr(environment, "CA_FOLDER", str(folder))
    folder.mkdir()  # an optional ConfigMap that is not there
    set_environment()
    assert environment.ca_bundle() is None
    (folder / "..data").mkdir()  # as Kubernetes mounts one
    (folder / "..data" / "company.pem").write_bytes(authority.pem)
    (folder / "company.pem").symlink_to("..data/company.pem")
    with pytest.raises(AdfmError, match=r"ConfigMap adfm-ca has no key ca\.crt, but company\.pem"):
        set_environment()
    (folder / "..data" / "ca.crt").write_bytes(authority.pem)
    (folder / "ca.crt").symlink_to("..data/ca.crt")
    set_environment()
    bundle = environment.ca_bundle()
    assert bundle and _certificates(bundle) >= _certificates(authority.file)


def test_an_authority_that_cannot_be_used_is_reported_at_the_start(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adfm.cli import main

    lines = authority.pem.splitlines()
    for name, content, says in (
        ("missing.crt", None, "cannot be read (No such file or directory)"),
        ("binary.crt", authority.der, "holds no certificate in PEM format"),
        ("key.pem", authority.private_key, "holds no certificate in PEM format"),
        ("empty.crt", b"", "holds no certificate in PEM format"),
        ("cut.crt", b"\n".join([*lines[:3], lines[-1]]), "a certificate in it is damaged"),
        ("cut-off.crt", b"\n".join(lines[:-1]), "holds no certificate in PEM format"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setenv("ADFM_CA_BUNDLE", str(tmp_path / name))
        assert main(["params"]) == 1
        message = capsys.readouterr().err
        assert f"{tmp_path / name}: {says}" in message
        assert "Traceback" not in message
    monkeypatch.setenv("ADFM_CA_BUNDLE", str(tmp_path))
    with pytest.raises(AdfmError, match="cannot be read .Is a directory."):
        set_environment()
    assert not set(environment._CA_VARIABLES) & os.environ.keys()


def test_another_failure_of_tls_is_not_taken_for_an_unknown_authority() -> None:
    assert environment.ca_remedy(OSError("certificate verify failed: self-signed certificate in certificate chain"))
    assert environment.ca_remedy(OSError("certificate verify failed: unable to get local issuer certificate"))
    assert not environment.ca_remedy(OSError("certificate verify failed: Hostname mismatch"))
    assert not environment.ca_remedy(OSError("certificate verify failed: certificate has expired"))
