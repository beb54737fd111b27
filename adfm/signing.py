"""Keys and signatures of versions and of the steps of their history; docs/signatures.md has the roles.

A version's folder is signed by OpenSSF model signing (`model-signing`, key method), texts by ECDSA directly. Keys lie
in the folder that `ADFM_KEYS` names, or else in `.adfm/keys` in the working folder, made at first use:

    private.pem           own key (EC P-256, not encrypted); only those who sign have it
    submitters/*.pem      public keys whose versions count
    service/*.pem         public keys whose steps and decisions count
    service/retired/*.pem public keys of the service that were replaced
"""

import base64
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from adfm.errors import AdfmError, Unusable
from adfm.process import environment
from adfm.text import printable

if TYPE_CHECKING:
    from model_signing import hashing

SIGNATURE = "model.sig"  # in the folder of a version: the SHA-256 of every file, and the signature of this list
VARIABLE = "ADFM_KEYS"
FOLDER = Path(".adfm", "keys")
PRIVATE = "private.pem"

# Not of the version: the first can be replaced by a later decision (the history binds it), MLflow adds the second.
_IGNORED = ("gate.json", "registered_model_meta")
_LISTED = 5  # files of a kind in a message
_ECDSA = ec.ECDSA(hashes.SHA256())


class BadKey(Unusable):
    """A key is missing, or cannot be used."""


class Unverified(Unusable):
    """A version's files are not those that somebody whose key counts has signed."""


@dataclass(frozen=True)
class Keys:
    """The keys in a folder."""

    folder: Path
    id: str  # of the own key: first 16 hex digits of the SHA-256 of its public key (DER); empty without one
    submitters: dict[str, Path]  # public keys whose versions count, by id
    service: dict[str, Path]  # public keys whose texts count
    retired: dict[str, Path]  # public keys whose texts counted once


def key_folder() -> Path:
    """Return the folder of the keys of this process; it need not exist yet."""
    given = environment.variable(VARIABLE)
    return Path(given).absolute() if given else environment.home() / FOLDER


def keys() -> Keys:
    """Read the keys of this process. Without `ADFM_KEYS`, make a key for all roles at first use.

    Raises:
        BadKey: The folder of keys is missing, a key cannot be used, or nobody would believe the own one.
    """
    folder = key_folder()
    try:
        if not environment.variable(VARIABLE):
            _make(folder)
        elif not folder.is_dir():
            raise BadKey(f"{VARIABLE}: folder {folder} is missing; name the folder that holds the keys")
        return _read(folder)
    except OSError as error:
        raise BadKey(
            f"{error.filename or folder}: {error.strerror}; keys can neither be read nor made there. {VARIABLE} names "
            "another folder of keys"
        ) from error


def sign(folder: Path, keys: Keys) -> None:
    """Sign every file in a version's folder, except `gate.json` and what MLflow adds; write `model.sig` there.

    Raises:
        BadKey: The private key is missing, or is not one of `submitters`.
        AdfmError: The folder holds something other than files and folders.
    """
    from model_signing import signing

    _require(keys, keys.submitters, "submitters", "versions")
    if irregular := _irregular(folder):
        raise AdfmError(f"{folder} cannot be signed: {_names(irregular)}: put a plain file in the place of each")
    config = signing.Config().use_elliptic_key_signer(private_key=keys.folder / PRIVATE)
    try:
        config.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)
    except ValueError as error:
        raise AdfmError(f"{folder} cannot be signed: {printable(str(error))}; give its files other names") from error


def verify(folder: Path, keys: Keys, name: str | None = None) -> str:
    """Check that a version's folder holds exactly the files that were signed by a key of `submitters`.

    Args:
        folder: The folder, which nobody else can write to: what is read later must be what was verified.
        keys: The keys that count.
        name: What messages call it; the folder's path by default.

    Returns:
        The id of the key that signed.

    Raises:
        Unverified: The signature is missing, damaged or of a key that does not count, or files differ: all are named.
    """
    from model_signing import verifying

    name = name or str(folder)
    hint, payload = _signed(folder, name)
    key, file = _signer(hint, keys, name)
    if irregular := _irregular(folder):
        raise Unverified(_changed(name, f"not plain files: {_names(irregular)}"))
    config = verifying.Config().use_elliptic_key_verifier(public_key=file).set_hashing_config(_hashing())
    try:
        config.verify(folder, folder / SIGNATURE)
    except InvalidSignature as error:
        raise Unverified(_changed(name, f"{SIGNATURE} was changed after it was signed")) from error
    except Exception as error:  # a file that others made can raise anything in the library
        raise Unverified(_changed(name, _differences(folder, payload) or printable(str(error)))) from error
    return key


def manifest(folder: Path) -> str:
    """Return the SHA-256, hex, of the names and digests of the files that a folder's signature lists.

    It binds a decision to the files, whoever signed them; call `verify` first.

    Raises:
        Unverified: The folder has no signature, or a damaged one.
    """
    return hashlib.sha256(json.dumps(sorted(_files(_signed(folder, str(folder))[1]).items())).encode()).hexdigest()


def sign_text(text: str, keys: Keys) -> str:
    """Sign a text with the own key: ECDSA with SHA-256, base64.

    Raises:
        BadKey: The private key is missing, or is not one of `service`.
    """
    _require(keys, keys.service, "service", "decisions and steps")
    return base64.b64encode(_private(keys.folder / PRIVATE).sign(text.encode(), _ECDSA)).decode()


def check_text(text: str, signature: str, key_id: str, keys: Keys, retired: bool = False) -> bool:
    """Whether a text was signed by the key `key_id`, and that is one of `service`, or of `retired` if these count."""
    file = keys.service.get(key_id) or (keys.retired.get(key_id) if retired else None)
    if file is None:
        return False
    try:
        _public(file).verify(base64.b64decode(signature, validate=True), text.encode(), _ECDSA)
    except (InvalidSignature, ValueError):
        return False
    return True


def _make(folder: Path) -> None:
    # A key for all roles, unless the folder holds something; of several processes, one makes it.
    if folder.is_dir() and any(folder.iterdir()):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))  # mode 0700
    try:
        key = ec.generate_private_key(ec.SECP256R1())
        encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        _new(partial / PRIVATE, key.private_bytes(*encoding))
        for role in ("submitters", "service"):
            (partial / role).mkdir()
            _new(partial / role / "own.pem", _pem(key.public_key()))
        (partial / ".gitignore").write_text("*\n")  # in any repository, not only in one that lists .adfm
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return  # another process was faster, and its key is as good
        print(
            f"adfm: made a key in {folder}: it signs your versions and decisions, and shows later that they "
            "are unchanged. Keep private.pem to yourself. docs/signatures.md tells how to bring your own.",
            file=sys.stderr,
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _new(file: Path, content: bytes) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())  # wait until the disk has it


def _read(folder: Path) -> Keys:
    submitters, service = _public_keys(folder / "submitters"), _public_keys(folder / "service")
    retired = _public_keys(folder / "service" / "retired")
    if not (submitters or service):
        raise BadKey(
            f"{folder} holds no public key in submitters/ or service/ (*.pem), so no signature would count; put there "
            "the keys of those you trust"
        )
    for key in service.keys() & retired.keys():
        raise BadKey(f"{service[key]} is in retired/ as well ({retired[key].name}); remove one of the two files")
    file, own = folder / PRIVATE, ""
    if file.exists():
        about = file.stat()
        if about.st_uid == os.getuid() and about.st_mode & 0o077:  # a secret that a cluster mounts is root's, and 0644
            _warn(f"{file} can be read by other users; chmod 600 {file}")
        own = _id(_private(file).public_key())
        if own not in submitters.keys() | service.keys():
            raise BadKey(
                f"{file}: its public key ({own}) is neither in {folder}/submitters nor in {folder}/service, so nobody "
                "would believe what it signs; put it there: "
                f"openssl pkey -in {PRIVATE} -pubout -out submitters/NAME.pem"
            )
    return Keys(folder, own, submitters, service, retired)


def _public_keys(folder: Path) -> dict[str, Path]:
    return {_id(_public(file)): file for file in sorted(folder.glob("*.pem"))}  # none if the folder is missing


def _public(file: Path) -> ec.EllipticCurvePublicKey:
    content = file.read_bytes()
    try:
        if b"PRIVATE KEY" in content:
            raise ValueError("it holds a private key, and only public keys belong here")
        return _of_curve(serialization.load_pem_public_key(content))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadKey(
            f"{file} is not a public key that can be used: {_reason(error)}. Make it from the private one: "
            f"openssl pkey -in {PRIVATE} -pubout -out {file.name}"
        ) from error


def _private(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), None)
        _of_curve(key.public_key())
    except TypeError as error:
        raise BadKey(
            f"{file} is encrypted, and adfm asks for no password; decrypt it where only this user can read it: "
            f"openssl pkey -in FILE -out {PRIVATE}"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadKey(
            f"{file} is not a private key that can be used: {_reason(error)}. Put the right file there, or make a new "
            f"key: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {PRIVATE}"
        ) from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # its public key is on the curve
    return key


def _of_curve(key: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__.lstrip("_")
        raise ValueError(f"it is {kind}, and must be of the elliptic curve P-256")
    return key


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.startswith("it ") else "it is damaged, or not in PEM"


@functools.cache  # once a process: the approvals service reads its keys every few seconds
def _warn(message: str) -> None:
    print(f"adfm: warning: {message}", file=sys.stderr)


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _id(key: ec.EllipticCurvePublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:16]


def _require(keys: Keys, believed: dict[str, Path], role: str, what: str) -> None:
    if not keys.id:
        raise BadKey(
            f"{keys.folder} has no {PRIVATE}, so nothing can be signed here; sign where the key is, or put it there"
        )
    if keys.id not in believed:
        raise BadKey(
            f"{keys.folder / PRIVATE}: its public key ({keys.id}) is not in {keys.folder / role}, so the {what} it "
            "signs would not count; let one sign whose key is there, or put this one there"
        )


def _hashing() -> "hashing.Config":
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE, *_IGNORED], ignore_git_paths=False)


def _signed(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    """Read `model.sig`, not yet verified: the fingerprint of the key, and the payload."""
    try:
        bundle = json.loads((folder / SIGNATURE).read_bytes())
        material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
        payload = json.loads(base64.b64decode(envelope["payload"], validate=True))
        form = payload["predicate"]["serialization"]
        # Nothing but what adfm writes is accepted. The library would read further spellings of the same keys, and would
        # leave out of its comparison whatever paths the payload names.
        if not (
            bundle.keys() == {"mediaType", "verificationMaterial", "dsseEnvelope"}
            and envelope.keys() == {"payload", "payloadType", "signatures"}
            and payload["predicateType"] == "https://model_signing/signature/v1.0"
            and form["method"] == "files"
            and form["hash_type"] == "sha256"
            and form["allow_symlinks"] is False
            and sorted(form["ignore_paths"]) == sorted([SIGNATURE, *_IGNORED])
        ):
            raise ValueError("it is not as adfm writes it")
        _files(payload)
        return str(material["publicKey"]["hint"]), payload
    except FileNotFoundError as error:
        raise Unverified(
            f"{name} has no {SIGNATURE}: it was never signed, or the signature was removed. Register the model again "
            "with `adfm register`; a version of an adfm without signatures has none"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unverified(_changed(name, f"{SIGNATURE} is damaged, or not one of adfm ({error!r})")) from error


def _signer(hint: str, keys: Keys, name: str) -> tuple[str, Path]:
    """Find the key among `submitters` that a signature names by the SHA-256 of its PEM."""
    for key, file in keys.submitters.items():
        if hashlib.sha256(_pem(_public(file))).hexdigest() == hint:
            return key, file
    raise Unverified(
        f"{name} was signed with a key whose versions do not count (the SHA-256 of its PEM is {printable(hint[:64])})"
        f". If you trust it, put its public key into {keys.folder / 'submitters'}; if not, find out who registered it"
    )


def _files(payload: dict[str, Any]) -> dict[str, str]:
    return {str(file["name"]): str(file["digest"]) for file in payload["predicate"]["resources"]}


def _irregular(folder: Path) -> list[str]:
    """List what is neither a file nor a folder, such as a link, or is a folder in the place of a file left out."""
    irregular = [name for name in (SIGNATURE, *_IGNORED) if (folder / name).is_dir()]

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        for path in (Path(place, name) for name in (*folders, *names)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                irregular.append(path.relative_to(folder).as_posix())
    return sorted(set(irregular))


def _differences(folder: Path, payload: dict[str, Any]) -> str:
    signed = _files(payload)
    present = {file.identifier: file.digest.digest_hex for file in _hashing().hash(folder).resource_descriptors()}
    kinds = {
        "changed": [name for name in present.keys() & signed.keys() if present[name] != signed[name]],
        "missing": list(signed.keys() - present.keys()),
        "too many": list(present.keys() - signed.keys()),
    }
    return "; ".join(f"{kind}: {_names(names)}" for kind, names in kinds.items() if names)


def _names(files: list[str]) -> str:
    more = f" and {len(files) - _LISTED} more" * (len(files) > _LISTED)
    return ", ".join(printable(name) for name in sorted(files)[:_LISTED]) + more


def _changed(name: str, what: str) -> str:
    return (
        f"{name} is not what was signed: {what}. Do not use it: find out who changed the files in the artifact "
        "store, and register the model again with `adfm register`"
    )
