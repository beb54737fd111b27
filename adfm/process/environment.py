"""Environment variables of a stage: quiet libraries, MLflow's address and login, a private certificate authority."""

import atexit
import functools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from adfm.errors import AdfmError
from adfm.process import cpus, retries

_QUIET = {
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # of steps that take no time
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizer warns at every fork otherwise
}
_MLFLOW_LOGIN = [f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH")]

CA, CA_FILE = "adfm-ca", "ca.crt"  # optional ConfigMap of a private certificate authority, and its key
CA_FOLDER = "/etc/adfm/ca"  # where every task mounts it

# Variables that name the file of trusted authorities, and who reads each of them.
_CA_VARIABLES = {
    "SSL_CERT_FILE": "urllib, the Hugging Face Hub and Git",  # OpenSSL; httpx2 (httpcore2/_ssl.py); dulwich and pygit2
    "REQUESTS_CA_BUNDLE": "MLflow",  # requests/sessions.py
    "AWS_CA_BUNDLE": "S3",  # botocore/configprovider.py; boto3 and, by aiobotocore, DVC's S3 remotes
}

# Where Linux distributions keep the system's authorities in one file: Debian, Fedora, SUSE.
_SYSTEM_CAS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
)


def set_environment() -> None:
    """Set variables that disable telemetry and noise, and those by which MLflow and private servers are reached.

    Call it before heavy imports, also repeatedly. Child processes inherit the variables; those that are set stay.

    Raises:
        AdfmError: The private certificate authority cannot be used.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    cpus.limit_threads()
    os.environ.pop("HF_MLFLOW_LOG_ARTIFACTS", None)  # transformers would upload every checkpoint
    # peft warns of every checkpoint with an adapter on the input embedding; it is intended.
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
    # By peft's and TRL's own calls.
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
    _set_mlflow()
    _trust_private_ca()


def variable(name: str) -> str:
    """Return the value of an environment variable; "" if it is not set."""
    # Secrets that were made with `echo` end with a line end, which no address, name or password has.
    return os.environ.get(name, "").strip("\r\n")


def home() -> Path:
    """Return the folder of the embedded store and the keys: the current one, or DVC's workspace."""
    # `dvc exp run --temp` and `--queue` run stages in a copy of the workspace below `.dvc/tmp`, which is removed at the
    # end, and name the workspace in `DVC_ROOT` (dvc/repo/experiments/queue/base.py).
    here, root = Path.cwd(), os.environ.get("DVC_ROOT")
    workspace = Path(root).resolve() if root else here
    return workspace if here.is_relative_to(workspace / ".dvc" / "tmp") else here


def _set_mlflow() -> None:
    """Take MLflow's address and login from `ADFM_MLFLOW_TRACKING_*` where `MLFLOW_TRACKING_URI` is not set."""
    # No login goes to another server than that of its address. KFP's MLflow plug-in puts the login of its server into
    # every pod, and the address only with `injectUserEnvVars` (backend/src/apiserver/plugins/mlflow/handler.go,
    # backend/src/v2/common/plugins/mlflow/handler.go).
    ours, given = variable("ADFM_MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_TRACKING_URI", "")
    if not ours:
        return
    if not given:
        os.environ["MLFLOW_TRACKING_URI"] = ours
        for name in _MLFLOW_LOGIN:
            os.environ.pop(name, None)
    elif not same_server(given, ours) or any(map(os.environ.get, _MLFLOW_LOGIN)) or "@" in urlsplit(given).netloc:
        return
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        if value := variable(f"ADFM_{name}"):
            os.environ[name] = value


def mlflow_ui() -> str:
    """Return the public address of MLflow's pages, for links; "" without a server."""
    # ADFM_MLFLOW_UI belongs to ADFM_MLFLOW_TRACKING_URI; runs may go to another server.
    ui, ours = variable("ADFM_MLFLOW_UI"), variable("ADFM_MLFLOW_TRACKING_URI")
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if ui.startswith(("http://", "https://")) and (not ours or not server or same_server(server, ours)):
        return ui.rstrip("/")
    return without_login(server).rstrip("/") if server.startswith(("http://", "https://")) else ""


def version_page(model: str, version: str) -> str:
    """Return the public address of a registered version's page in MLflow; "" without a server."""
    ui = mlflow_ui()
    return ui and f"{ui}/#/models/{quote(model)}/versions/{version}"


def without_login(text: str) -> str:
    """Remove the logins of addresses from a text, and headers that a client refused to send."""
    # A password may hold an `@`; the one in `dvc://REPO@REV:PATH` ends no login.
    text = re.sub(r"(?<!dvc)://[^/?#\s]*@", "://", text)
    # http.client and requests quote a header that they refuse, with the token that it holds.
    return re.sub(r"(header value):? .*", r"\1", text)


def same_server(one: str, other: str) -> bool:
    """Return whether two addresses have the same scheme, host, port and path."""
    return _place(one) == _place(other) is not None


def _place(address: str) -> tuple[str, str, int | None, str] | None:
    try:
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:  # a port that is not a number
        return None
    return (parts.scheme, parts.hostname, port, parts.path.rstrip("/")) if parts.hostname else None


def ca_bundle() -> str | None:
    """Return the file of trusted authorities for clients that read no variable, as KFP's; `None`: their default."""
    file = os.environ.get("SSL_CERT_FILE", "")
    return file if Path(file).is_file() else None


def ca_remedy(error: BaseException) -> str:
    """Return the remedy where a server's certificate was signed by an unknown authority; "" for any other error."""
    # Git's and DVC's errors have the reason in the error that they were raised from.
    reasons = " ".join(map(str, retries.causes(error)))
    if not re.search(r"self[- ]signed certificate|unable to get (local )?issuer certificate", reasons):
        return ""
    return (
        " Its certificate is signed by an authority that is unknown here: name the authority's certificate (PEM) in "
        f"ADFM_CA_BUNDLE, on a cluster in the ConfigMap {CA}, key {CA_FILE}."
    )


def _trust_private_ca() -> None:
    # Each variable names one file, which replaces the library's own, so that the public authorities have to be in it:
    # the hub may be on the internet while MLflow and S3 are not.
    file = _private_ca()
    if file is None:
        return
    private = _certificates(file)
    missing = [name for name in _CA_VARIABLES if not os.environ.get(name)]
    if missing:
        os.environ |= dict.fromkeys(missing, _write_bundle(private))
    for name in _CA_VARIABLES.keys() - missing:
        if not set(private) <= set(_pem_blocks(_content(os.environ[name]))):
            _print_once(
                f"adfm: {name} is set already, to {os.environ[name]}, which does not hold the authority of {file}: "
                f"{_CA_VARIABLES[name]} will not trust it. Unset {name}, or add the authority to that file."
            )


def _private_ca() -> Path | None:
    if name := variable("ADFM_CA_BUNDLE"):
        file = Path(name).expanduser().absolute()
        os.environ["ADFM_CA_BUNDLE"] = str(file)  # for child processes, whose working folder may be another
        return file
    folder = Path(CA_FOLDER)
    keys = sorted(path.name for path in folder.glob("[!.]*"))  # what starts with a dot is Kubernetes' own
    if keys and CA_FILE not in keys:
        raise AdfmError(
            f"the ConfigMap {CA} has no key {CA_FILE}, but {', '.join(keys)}; make it again with "
            f"`kubectl create configmap {CA} --from-file={CA_FILE}=FILE`."
        )
    return folder / CA_FILE if keys else None


def _certificates(file: Path) -> list[bytes]:
    """The certificates of a PEM file, and nothing else of it, such as a private key."""
    import ssl

    try:
        certificates = list(dict.fromkeys(_pem_blocks(file.read_bytes())))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for certificate in certificates:
            context.load_verify_locations(cadata=certificate.decode("ascii"))
    except ssl.SSLError as error:  # an OSError too
        raise AdfmError(f"{file}: a certificate in it is damaged ({error.reason}); get it again.") from error
    except OSError as error:
        raise AdfmError(
            f"{file}: cannot be read ({error.strerror}). It should hold the private certificate authority: see "
            f"ADFM_CA_BUNDLE, or on a cluster the ConfigMap {CA}."
        ) from error
    if not certificates:
        raise AdfmError(
            f"{file}: holds no certificate in PEM format (-----BEGIN CERTIFICATE-----). Convert a binary one (DER) "
            f"with `openssl x509 -inform der -in {file} -out ca.crt`."
        )
    return certificates


def _pem_blocks(content: bytes) -> Iterator[bytes]:
    # Unchecked, with line ends of Unix and lines of 64 characters.
    for block in re.findall(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----", content):
        base64 = b"".join(block.split())
        lines = [base64[start : start + 64] for start in range(0, len(base64), 64)]
        yield b"\n".join([b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""])


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError:  # a distribution has one of `_SYSTEM_CAS`
        return b""


def _write_bundle(private: list[bytes]) -> str:
    """Write the public authorities of certifi and of the system, and the private ones, to a file until exit."""
    import certifi

    public = [certificate for file in (certifi.where(), *_SYSTEM_CAS) for certificate in _pem_blocks(_content(file))]
    try:
        # New and readable by this user alone, so that nobody else can have put it there.
        handle, name = tempfile.mkstemp(prefix="adfm-ca-", suffix=".pem")
        with os.fdopen(handle, "wb") as bundle:
            bundle.writelines(dict.fromkeys([*public, *private]))
    except OSError as error:
        raise AdfmError(
            f"the certificate authorities cannot be written to a temporary file ({error.strerror or error}); free some "
            "space there, or name another folder in TMPDIR."
        ) from error
    atexit.register(_remove, name, os.getpid())
    return name


def _remove(file: str, process: int) -> None:
    if os.getpid() == process:  # a fork inherits the handlers of atexit
        Path(file).unlink(missing_ok=True)


@functools.cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr)
