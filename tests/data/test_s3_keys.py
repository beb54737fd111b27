"""The data's keys: by names of our own, apart from those that other parts of a pod have."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from adfm.data import s3 as access
from adfm.data import sources
from adfm.errors import AdfmError, Unreachable


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "ADFM_S3_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials


def _set(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


OURS = {"ADFM_S3_ACCESS_KEY_ID": "owner", "ADFM_S3_SECRET_ACCESS_KEY": "owner-secret"}
OF_THE_PIPELINE_ROOT = {
    "AWS_ACCESS_KEY_ID": "stranger",
    "AWS_SECRET_ACCESS_KEY": "stranger-secret",
    "AWS_SESSION_TOKEN": "token",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
}


@pytest.fixture
def of_others(s3: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The data's keys by our names, beside those of another server; the bucket `data` has an image below `line`."""
    s3.put_object(Bucket="data", Key="line/1.png", Body=b"image")
    _set(monkeypatch, **OURS, **OF_THE_PIPELINE_ROOT, ADFM_S3_ENDPOINT_URL=f"{s3_server}\n", ADFM_S3_REGION="any")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return _access()


def _access() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "ADFM_"))}


def test_data_come_by_our_keys_and_nothing_is_exported(of_others: dict[str, str], tmp_path: Path) -> None:
    assert sources.fetch("s3://data/line", tmp_path / "out")[0] == 1
    assert (tmp_path / "out" / "1.png").read_bytes() == b"image"
    assert _access() == of_others


def test_what_goes_wrong_names_our_variables(
    of_others: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFM_S3_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AdfmError, match="check ADFM_S3_ACCESS_KEY_ID and ADFM_S3_SECRET_ACCESS_KEY"):
        sources.fetch("s3://data/line", tmp_path / "out")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("ADFM_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(AdfmError, match="http://127.0.0.1:9 cannot be reached; check ADFM_S3_ENDPOINT_URL"):
        sources.fetch("s3://data/line", tmp_path / "out")
    monkeypatch.setenv("ADFM_S3_ENDPOINT_URL", "no address")
    with pytest.raises(AdfmError, match="check ADFM_S3_ENDPOINT_URL"):
        sources.fetch("s3://data/line", tmp_path / "out")


@pytest.mark.usefixtures("bare")
def test_keys_without_an_endpoint_are_amazons(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **OURS, **OF_THE_PIPELINE_ROOT)
    client = access.client()
    assert client.meta.endpoint_url == "https://s3.amazonaws.com"
    assert access.endpoint() == "Amazon S3"
    client.close()


@pytest.mark.usefixtures("bare")
def test_remotes_send_keys_without_an_endpoint_to_amazon_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, **OURS, ADFM_S3_REGION="eu-central-1")
    remotes = [{"url": "s3://data"}, {"url": "s3://data"}, {"url": "s3://data", "endpointurl": "there"}]
    access.configure_remotes({"storage": remotes[0]})
    assert "endpointurl" not in remotes[0]  # boto3 finds the region of a bucket where it may choose the address
    _set(monkeypatch, **OF_THE_PIPELINE_ROOT)
    access.configure_remotes({"storage": remotes[1], "elsewhere": remotes[2]})
    assert remotes[1]["endpointurl"] == "https://s3.eu-central-1.amazonaws.com"
    assert remotes[2]["endpointurl"] == "there"


@pytest.mark.usefixtures("bare")
def test_without_keys_of_ours_the_usual_chain_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert access.settings() == {}
    assert not access.has_credentials()
    _set(monkeypatch, ADFM_S3_ENDPOINT_URL="http://127.0.0.1:9000", ADFM_S3_ACCESS_KEY_ID="")
    assert not access.has_credentials()  # an account of the service may have some, a secret without keys has none
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    assert not access.has_credentials()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    assert access.has_credentials()
    client = access.client()
    assert client.meta.endpoint_url == "http://127.0.0.1:9000"
    client.close()


@pytest.mark.usefixtures("bare")
def test_keys_that_are_refused_are_named_by_where_they_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ClientError({"Error": {"Code": "InvalidAccessKeyId"}}, "ListObjectsV2")
    _set(monkeypatch, **OF_THE_PIPELINE_ROOT, ADFM_S3_ENDPOINT_URL="http://127.0.0.1:9000")
    assert "check AWS_ACCESS_KEY_ID" in sources._remedy(refused)
    _set(monkeypatch, **OURS)
    assert "check ADFM_S3_ACCESS_KEY_ID" in sources._remedy(refused)


def test_a_role_that_is_refused_is_not_taken_for_a_right_of_the_bucket() -> None:
    refused = ClientError({"Error": {"Code": "AccessDenied"}}, "AssumeRoleWithWebIdentity")
    assert "the role cannot be assumed" in sources._remedy(refused)


@pytest.mark.usefixtures("bare")
def test_a_remote_without_credentials_says_what_to_set() -> None:
    with (
        pytest.raises(AdfmError, match=r"no credentials; set AWS_ACCESS_KEY_ID .* the secret adfm-s3"),
        sources._translated("listing"),
    ):
        raise OSError("listing failed") from NoCredentialsError()


def test_the_token_in_the_address_of_a_repository_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="dvc://https://127.0.0.1:9/x.git@v1:line: the repository") as error:
        sources.fetch("dvc://https://someone:hidden@127.0.0.1:9/x.git@v1:line", tmp_path / "out")
    assert "hidden" not in str(error.value)
    with pytest.raises(AdfmError, match=r"dvc://no-folder@v1:line: the folder"):
        sources.fetch("dvc://no-folder@v1:line", tmp_path / "out")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["ACCESS_KEY_ID"], "ADFM_S3_ACCESS_KEY_ID is set without ADFM_S3_SECRET_ACCESS_KEY"),
        (["SECRET_ACCESS_KEY"], "ADFM_S3_SECRET_ACCESS_KEY is set without ADFM_S3_ACCESS_KEY_ID"),
        (["SESSION_TOKEN"], "SESSION_TOKEN is set without ADFM_S3_ACCESS_KEY_ID and ADFM_S3_SECRET_ACCESS_KEY"),
    ],
)
def test_half_a_pair_of_keys_is_refused(
    given: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _set(monkeypatch, **OF_THE_PIPELINE_ROOT, **{f"ADFM_S3_{name}": "any" for name in given})
    for use in (access.has_credentials, access.client, lambda: sources.fetch("s3://data/line", tmp_path / "out")):
        with pytest.raises(AdfmError, match=f"{missing}; set both keys or neither"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("remote", "after"),
    [
        ({"url": "s3://data"}, {"access_key_id": "owner", "secret_access_key": "owner-secret", "endpointurl": "here"}),
        (
            {"url": "s3://data", "endpointurl": "there", "allow_anonymous_login": False},
            {"access_key_id": "owner", "secret_access_key": "owner-secret", "endpointurl": "there"},
        ),
        ({"url": "s3://data", "access_key_id": "own", "secret_access_key": "own"}, {}),
        ({"url": "s3://data", "profile": "own"}, {}),
        ({"url": "s3://data", "credentialpath": "own"}, {}),
        ({"url": "s3://data", "allow_anonymous_login": True}, {}),
        ({"url": "https://data"}, {}),
        ({"url": "remote://storage/below"}, {}),  # has the login of `storage`
    ],
)
def test_remotes_that_are_given_keys(
    remote: dict[str, Any], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, **OURS, ADFM_S3_ENDPOINT_URL="here")
    before = dict(remote)
    access.configure_remotes({"storage": remote})
    assert remote == before | after


@pytest.mark.timeout(300)
def test_dvc_fetches_by_our_keys(of_others: dict[str, str], s3_server: str, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "line").mkdir(parents=True)
    (repo / "line" / "1.png").write_bytes(b"image")
    owner = {"AWS_ACCESS_KEY_ID": "owner", "AWS_SECRET_ACCESS_KEY": "owner-secret", "AWS_ENDPOINT_URL": s3_server}
    environment = {name: value for name, value in os.environ.items() if name != "AWS_SESSION_TOKEN"} | owner

    def run(*command: str) -> None:
        subprocess.run(command, cwd=repo, env=environment, check=True, capture_output=True)

    dvc = (sys.executable, "-m", "dvc")
    run("git", "init", "-q")
    run(*dvc, "init", "-q")
    run(*dvc, "remote", "add", "-d", "storage", "s3://data/dvc")
    run(*dvc, "add", "line")
    run(*dvc, "push")
    run("git", "add", "-A")
    run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "start")
    run("git", "tag", "v1")
    shutil.rmtree(repo / ".dvc" / "cache")
    for number, place in enumerate((str(repo), repo.as_uri())):
        out = tmp_path / f"out{number}"
        sources.fetch(f"dvc://{place}@v1:line", out)
        assert (out / "1.png").read_bytes() == b"image"
        assert [file["path"] for file in json.loads((out / "manifest.json").read_text())["files"]] == ["1.png"]
    assert _access() == of_others
