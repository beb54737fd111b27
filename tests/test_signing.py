from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adfm
from adfm import signing
from adfm.signing import BadKey, Keys, Unverified

FILES = ("MLmodel", "params.yaml", "model/adfm.json", "model/adapter_model.safetensors", "evaluation/metrics.json")
ENCODING = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The key of a laptop, in the current folder."""
    monkeypatch.delenv("ADFM_KEYS", raising=False)
    monkeypatch.chdir(tmp_path)
    return signing.keys()


@pytest.fixture
def folder(keys: Keys, tmp_path: Path) -> Path:
    """A signed version."""
    folder = tmp_path / "version"
    write(folder)
    signing.sign(folder, keys)
    return folder


def write(folder: Path, salt: str = "") -> None:
    for file in (*FILES, "gate.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(f"{salt}content of {file}")


def other_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The key of somebody else."""
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        return signing.keys()


def private(folder: Path, key: Any, password: bytes | None = None) -> None:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    folder.mkdir(exist_ok=True)
    (folder / "private.pem").write_bytes(key.private_bytes(*ENCODING, encryption))
    (folder / "private.pem").chmod(0o600)


def public(file: Path, key: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(key.public_key().public_bytes(ENCODING[0], serialization.PublicFormat.SubjectPublicKeyInfo))


# ------------------------------------------------------------------------------------------------------------- versions


def test_a_signed_version_verifies_wherever_it_lies(folder: Path, keys: Keys, tmp_path: Path) -> None:
    before = signing.manifest(folder)
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(folder, moved)
    assert signing.verify(moved, keys) == keys.id
    assert signing.manifest(moved) == before


def test_what_is_not_of_the_version_may_change(folder: Path, keys: Keys) -> None:
    (folder / "gate.json").write_text("another decision")
    (folder / "registered_model_meta").write_text("model_name: adfm")
    (folder / "empty").mkdir()  # a store of objects has no folders, so they cannot be signed; nothing reads them
    assert signing.verify(folder, keys) == keys.id
    (folder / "gate.json").unlink()
    assert signing.verify(folder, keys) == keys.id


@pytest.mark.parametrize("file", FILES)
def test_a_changed_or_missing_file_is_refused_by_its_name(file: str, folder: Path, keys: Keys) -> None:
    content = bytearray((folder / file).read_bytes())
    content[0] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(Unverified, match=rf"version is not what was signed: changed: {file}\. Do not use it") as error:
        signing.verify(folder, keys)
    assert error.value.exit_code == 2
    (folder / file).unlink()
    with pytest.raises(Unverified, match=rf"signed: missing: {file}\. "):
        signing.verify(folder, keys)


@pytest.mark.parametrize(
    "file",
    [
        *("code.py", ".hidden", ".git/config", ".gitattributes", "model/.gitignore", "model/gate.json"),
        *("model/model.sig", "evaluation/registered_model_meta", "gate.json.py", "deep/er/file"),
    ],
)
def test_a_file_too_many_is_refused_by_its_name(file: str, folder: Path, keys: Keys) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("")
    with pytest.raises(Unverified, match=f"signed: too many: {file}. "):
        signing.verify(folder, keys)


def test_a_renamed_file_and_two_that_were_swapped_are_refused(folder: Path, keys: Keys) -> None:
    one, two, three = (folder / name for name in ("MLmodel", "params.yaml", "aside"))
    one.rename(three)
    with pytest.raises(Unverified, match=r"missing: MLmodel; too many: aside\."):
        signing.verify(folder, keys)
    two.rename(one)
    three.rename(two)
    with pytest.raises(Unverified, match=r"signed: changed: MLmodel, params\.yaml\."):
        signing.verify(folder, keys)


def test_links_and_pipes_are_refused_even_where_a_file_may_change(folder: Path, keys: Keys, tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copy(folder / "MLmodel", same)
    (folder / "MLmodel").unlink()
    (folder / "MLmodel").symlink_to(same)
    (folder / "gate.json").unlink()
    os.mkfifo(folder / "gate.json")
    (folder / "more").symlink_to(folder / "model")
    (folder / "model" / "none").symlink_to("nowhere")
    (folder / "registered_model_meta").mkdir()
    names = "MLmodel, gate.json, model/none, more, registered_model_meta"
    with pytest.raises(Unverified, match=f"not plain files: {names}. "):
        signing.verify(folder, keys)
    with pytest.raises(adfm.errors.AdfmError, match=f"cannot be signed: {names}"):
        signing.sign(folder, keys)


def test_many_files_are_counted_and_odd_names_are_printed_harmlessly(folder: Path, keys: Keys) -> None:
    for number in range(7):
        (folder / f"{number}\n\x1b[2J").write_text("")
    with pytest.raises(Unverified) as error:
        signing.verify(folder, keys)
    assert r"too many: 0\n\x1b[2J, 1\n\x1b[2J" in str(error.value) and "and 2 more." in str(error.value)
    assert str(error.value).isprintable()
    signing.sign(folder, keys)
    assert signing.verify(folder, keys) == keys.id


def test_a_name_that_is_not_text_is_an_error(folder: Path, keys: Keys) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_text("")
    with pytest.raises(Unverified, match="too many"):
        signing.verify(folder, keys)
    with pytest.raises(adfm.errors.AdfmError, match="cannot be signed"):
        signing.sign(folder, keys)


def test_a_big_file_is_read_in_pieces_to_its_last_byte(folder: Path, keys: Keys) -> None:
    big = folder / "model" / "weights.safetensors"
    big.write_bytes(bytes(5_000_001))
    signing.sign(folder, keys)
    with big.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(Unverified, match=r"changed: model/weights\.safetensors"):
        signing.verify(folder, keys)


def test_the_manifest_is_that_of_names_and_contents(folder: Path, keys: Keys, monkeypatch: Any, tmp_path: Path) -> None:
    before = signing.manifest(folder)
    signing.sign(folder, keys)
    assert signing.manifest(folder) == before
    theirs = other_keys(tmp_path / "other", monkeypatch)
    signing.sign(folder, theirs)
    assert signing.manifest(folder) == before
    (folder / "MLmodel").rename(folder / "MLmodel2")
    signing.sign(folder, keys)
    assert signing.manifest(folder) != before


def test_signing_and_verifying_print_nothing(folder: Path, keys: Keys, capfd: Any) -> None:
    capfd.readouterr()
    signing.sign(folder, keys)
    signing.verify(folder, keys)
    (folder / "MLmodel").write_text("")
    with pytest.raises(Unverified):
        signing.verify(folder, keys)
    assert capfd.readouterr() == ("", "")


def test_the_tool_of_openssf_verifies_the_same_file(folder: Path, keys: Keys) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(keys.submitters[keys.id])]
    command += ["--no-ignore-git-paths"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (folder / "MLmodel").write_text("")
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_the_library_is_imported_when_it_is_needed() -> None:
    code = "import sys, adfm.signing, adfm.models.loading; print('model_signing' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(adfm.__file__).parents[1], *sys.path)))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout == "False\n", run.stderr


# ------------------------------------------------------------------------------------------------ signatures of others


def test_a_foreign_and_a_withdrawn_key_do_not_count(
    folder: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = other_keys(tmp_path / "other", monkeypatch)
    signing.sign(folder, theirs)
    with pytest.raises(Unverified, match=r"a key whose versions do not count .*\.adfm/keys/submitters"):
        signing.verify(folder, keys)
    for role in ("service", "service/retired"):  # which do not sign versions
        public_key = keys.folder / role / "them.pem"
        public_key.parent.mkdir(exist_ok=True)
        shutil.copy(theirs.submitters[theirs.id], public_key)
        with pytest.raises(Unverified, match="a key whose versions do not count"):
            signing.verify(folder, signing.keys())
        public_key.unlink()
    shutil.copy(theirs.submitters[theirs.id], keys.folder / "submitters" / "them.pem")
    assert signing.verify(folder, signing.keys()) == theirs.id != keys.id
    (keys.folder / "submitters" / "them.pem").unlink()
    with pytest.raises(Unverified, match="a key whose versions do not count"):
        signing.verify(folder, signing.keys())


def test_the_signature_of_another_version_is_refused(folder: Path, keys: Keys, tmp_path: Path) -> None:
    write(tmp_path / "other", "other ")
    signing.sign(tmp_path / "other", keys)
    shutil.copy(tmp_path / "other" / "model.sig", folder)
    with pytest.raises(Unverified, match="changed: MLmodel, evaluation/metrics.json, model/adapter"):
        signing.verify(folder, keys)


def test_a_version_without_signature_is_told_what_to_do(folder: Path, keys: Keys) -> None:
    (folder / "model.sig").unlink()
    for check in (lambda: signing.verify(folder, keys, "models:/adfm/1"), lambda: signing.manifest(folder)):
        with pytest.raises(Unverified, match=r"has no model\.sig: .*Register the model again with `adfm register`"):
            check()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'"model"', b"\xff\xfe", b"[" * 100_000, b"{" * 9])
def test_garbage_in_place_of_a_signature_is_refused(content: bytes, folder: Path, keys: Keys) -> None:
    (folder / "model.sig").write_bytes(content)
    with pytest.raises(Unverified, match=r"model\.sig is damaged, or not one of adfm"):
        signing.verify(folder, keys)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_signature_with_a_changed_byte_never_covers_other_files(data: Any, folder: Path, keys: Keys) -> None:
    good, before = (folder / "model.sig").read_bytes(), signing.manifest(folder)
    spoilt = bytearray(good)
    place = data.draw(st.integers(0, len(good) - 1))
    spoilt[place] = data.draw(st.integers(0, 255))
    (folder / "model.sig").write_bytes(spoilt)
    try:
        assert signing.verify(folder, keys) == keys.id
    except Unverified as error:
        assert str(error).isprintable()
    else:
        assert signing.manifest(folder) == before
    finally:
        (folder / "model.sig").write_bytes(good)


def craft(folder: Path, keys: Keys, change: Callable[[Any], Any]) -> None:
    """Has the library sign the folder in a way that adfm does not."""
    from model_signing import hashing
    from model_signing import signing as library

    config = library.Config().use_elliptic_key_signer(private_key=keys.folder / "private.pem")
    config.set_hashing_config(change(hashing.Config())).sign(folder, folder / "model.sig")


IGNORED = ["model.sig", "gate.json", "registered_model_meta"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.set_ignored_paths(paths=[*IGNORED, "model"], ignore_git_paths=False),
        lambda config: config.set_ignored_paths(paths=["model.sig"], ignore_git_paths=False),
        lambda config: config.set_ignored_paths(paths=IGNORED),
        lambda config: config.set_allow_symlinks(True).set_ignored_paths(paths=IGNORED, ignore_git_paths=False),
        lambda config: config.use_shard_serialization().set_ignored_paths(paths=IGNORED, ignore_git_paths=False),
        lambda config: config.use_file_serialization(hashing_algorithm="blake2").set_ignored_paths(
            paths=IGNORED, ignore_git_paths=False
        ),
    ],
    ids=["without-model", "with-gate", "without-git", "links", "shards", "blake2"],
)
def test_a_valid_signature_that_covers_less_is_refused(change: Callable[[Any], Any], folder: Path, keys: Keys) -> None:
    craft(folder, keys, lambda config: config.set_ignored_paths(paths=IGNORED, ignore_git_paths=False))
    assert signing.verify(folder, keys) == keys.id  # what is refused below is the change
    craft(folder, keys, change)
    with pytest.raises(Unverified, match="not as adfm writes it"):
        signing.verify(folder, keys)


def test_one_file_cannot_be_two_signatures(folder: Path, keys: Keys) -> None:
    good = json.loads((folder / "model.sig").read_text())
    twofold = good | {"dsse_envelope": good["dsseEnvelope"]}
    (folder / "model.sig").write_text(json.dumps(twofold))
    with pytest.raises(Unverified, match="not as adfm writes it"):
        signing.verify(folder, keys)
    envelope = good["dsseEnvelope"] | {"payload_type": "x"}
    (folder / "model.sig").write_text(json.dumps(good | {"dsseEnvelope": envelope}))
    with pytest.raises(Unverified, match="not as adfm writes it"):
        signing.verify(folder, keys)


def test_a_list_that_was_changed_is_not_believed(folder: Path, keys: Keys) -> None:
    bundle = json.loads((folder / "model.sig").read_text())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    (folder / "MLmodel").write_text("other")
    listed = next(file for file in payload["predicate"]["resources"] if file["name"] == "MLmodel")
    listed["digest"] = hashlib.sha256(b"other").hexdigest()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (folder / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(Unverified, match=r"model\.sig was changed after it was signed"):
        signing.verify(folder, keys)


# ---------------------------------------------------------------------------------------------------------------- texts


@given(text=st.text(), other=st.text())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_signature_of_a_text_is_of_that_text(text: str, other: str, keys: Keys) -> None:
    signature = signing.sign_text(text, keys)
    assert signing.check_text(text, signature, keys.id, keys)
    assert signing.check_text(other, signature, keys.id, keys) == (text == other)
    assert not signing.check_text(text, signature, "0" * 16, keys)


@pytest.mark.parametrize("signature", ["", "!", "AAAA", "é", "=" * 99, base64.b64encode(bytes(72)).decode()])
def test_what_is_no_signature_is_false(signature: str, keys: Keys) -> None:
    assert signing.check_text("text", signature, keys.id, keys) is False


def test_keys_of_submitters_do_not_sign_texts_and_retired_ones_no_more(keys: Keys) -> None:
    signature = signing.sign_text("text", keys)
    own = keys.service[keys.id]
    (own.parent / "retired").mkdir()
    own.rename(own.parent / "retired" / "old.pem")
    later = signing.keys()
    assert later.retired.keys() == {keys.id} and not later.service
    assert not signing.check_text("text", signature, keys.id, later)
    assert signing.check_text("text", signature, keys.id, later, retired=True)
    with pytest.raises(BadKey, match=r"is not in .*/\.adfm/keys/service, so the decisions and steps it signs"):
        signing.sign_text("text", later)


# ----------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_made_once_for_this_user_alone(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delenv("ADFM_KEYS", raising=False)
    monkeypatch.chdir(tmp_path)
    first = signing.keys()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"made a key in {tmp_path / '.adfm' / 'keys'}: it signs your versions and decisions" in err
    assert signing.keys() == first
    assert capsys.readouterr() == ("", "")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (first.folder, first.folder / "private.pem")}
    assert modes == {"keys": 0o700, "private.pem": 0o600}
    assert first.submitters.keys() == first.service.keys() == {first.id} and not first.retired
    der = subprocess.run(
        ["openssl", "pkey", "-in", first.folder / "private.pem", "-pubout", "-outform", "DER"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert first.id == hashlib.sha256(der).hexdigest()[:16]
    subprocess.run(["git", "init", "-q"], check=True)
    status = subprocess.run(["git", "status", "--short", "-uall"], capture_output=True, text=True, check=True)
    assert ".adfm" not in status.stdout


def test_processes_that_make_the_key_at_once_end_with_one(tmp_path: Path) -> None:
    code = "from adfm import signing; print(input() or signing.keys().id)"
    environment = {key: value for key, value in os.environ.items() if key != "ADFM_KEYS"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (Path(adfm.__file__).parents[1], *sys.path)))
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) for _ in range(6)]
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in started]
    assert len({out for out, _ in results}) == 1 and results[0][0].strip(), results
    assert "".join(err for _, err in results).count("made a key") == 1
    assert [path.name for path in (tmp_path / ".adfm").iterdir()] == ["keys"]


def test_a_key_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADFM_KEYS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".adfm").write_text("a file")
    with pytest.raises(BadKey, match=rf"^{tmp_path}/\.adfm: File exists; .*ADFM_KEYS names another folder"):
        signing.keys()


def test_nothing_is_made_where_the_plant_keeps_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plant"
    monkeypatch.setenv("ADFM_KEYS", str(folder))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadKey, match=rf"^ADFM_KEYS: folder {folder} is missing") as error:
        signing.keys()
    assert error.value.exit_code == 2
    folder.mkdir()
    with pytest.raises(BadKey, match="holds no public key"):
        signing.keys()
    assert list(tmp_path.rglob("*")) == [folder]


def test_who_only_verifies_needs_no_private_key(folder: Path, keys: Keys, tmp_path: Path, monkeypatch: Any) -> None:
    signature = signing.sign_text("text", keys)
    shutil.copytree(keys.folder, tmp_path / "public")
    (tmp_path / "public" / "private.pem").unlink()
    monkeypatch.setenv("ADFM_KEYS", str(tmp_path / "public"))
    reader = signing.keys()
    assert reader.id == ""
    assert signing.verify(folder, reader) == keys.id
    assert signing.check_text("text", signature, keys.id, reader)
    for sign in (lambda: signing.sign(folder, reader), lambda: signing.sign_text("text", reader)):
        with pytest.raises(BadKey, match=r"public has no private\.pem, so nothing can be signed here"):
            sign()


def test_a_submitter_signs_no_texts_and_the_service_no_versions(folder: Path, keys: Keys) -> None:
    (keys.folder / "submitters" / "own.pem").unlink()
    (keys.folder / "submitters" / "other.pem").write_bytes(pem_of_another())
    with pytest.raises(BadKey, match=rf"\({keys.id}\) is not in .*/\.adfm/keys/submitters, so the versions it signs"):
        signing.sign(folder, signing.keys())


def pem_of_another() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(ENCODING[0], serialization.PublicFormat.SubjectPublicKeyInfo)


P256 = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "private.pem").write_text(""), r"private\.pem is not a private key .*it is damaged, or not in"),
        (lambda f: (f / "private.pem").write_bytes(os.urandom(99)), r"private\.pem is not a private key .*damaged"),
        (lambda f: private(f, P256, b"secret"), r"private\.pem is encrypted, and adfm asks for no password"),
        (lambda f: private(f, ec.generate_private_key(ec.SECP384R1())), "it is secp384r1, and must be .*P-256"),
        (lambda f: private(f, ed25519.Ed25519PrivateKey.generate()), "it is Ed25519PublicKey, and must be"),
        (lambda f: private(f, rsa.generate_private_key(65537, 2048)), "it is RSAPublicKey, and must be"),
        (
            lambda f: private(f, ec.generate_private_key(ec.SECP256R1())),
            "is neither in .*/submitters nor in .*/service",
        ),
        (lambda f: (f / "submitters" / "b.pem").write_text("b"), r"submitters/b\.pem is not a public key .*damaged"),
        (lambda f: (f / "service" / "b.pem").write_bytes((f / "private.pem").read_bytes()), "it holds a private key"),
        (
            lambda f: public(f / "service" / "retired" / "b.pem", ec.generate_private_key(ec.SECP521R1())),
            r"retired/b\.pem is not a public key .*secp521r1",
        ),
        (lambda f: public(f / "service" / "retired" / "b.pem", P256), r"own\.pem is in retired/ as well \(b\.pem\)"),
        (lambda f: (f / "service" / "d.pem").mkdir(), r"service/d\.pem: Is a directory"),
        (lambda f: (f / "service" / "l.pem").symlink_to("nowhere"), r"service/l\.pem: No such file"),
    ],
)
def test_a_key_that_cannot_be_used_is_an_error(
    spoil: Callable[[Path], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "keys"
    private(folder, P256)
    public(folder / "submitters" / "own.pem", P256)
    public(folder / "service" / "own.pem", P256)
    monkeypatch.setenv("ADFM_KEYS", str(folder))
    assert signing.keys().id
    spoil(folder)
    with pytest.raises(BadKey, match=says) as error:
        signing.keys()
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_a_private_key_that_others_can_read_is_warned_of_once(keys: Keys, capsys: Any) -> None:
    capsys.readouterr()
    (keys.folder / "private.pem").chmod(0o644)
    assert signing.keys() == signing.keys() == keys
    file = keys.folder / "private.pem"
    assert capsys.readouterr().err == f"adfm: warning: {file} can be read by other users; chmod 600 {file}\n"


def test_keys_that_a_cluster_mounts_are_links(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = tmp_path / "mounted"
    shutil.copytree(keys.folder, mounted / "..2026_11_26")
    (mounted / "..data").symlink_to("..2026_11_26")
    for name in ("private.pem", "submitters", "service"):
        (mounted / name).symlink_to(Path("..data", name))
    monkeypatch.setenv("ADFM_KEYS", f"{mounted}\n")  # as `echo … | base64` makes a secret
    assert signing.keys().id == keys.id
