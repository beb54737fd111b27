"""The signed chain of steps, on MLflow's own store."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from adfm import signing, tracking
from adfm.registry import history as history_
from adfm.registry.history import BrokenHistory, History, Step, _Chain, append, read, table
from adfm.signing import Keys

MODEL = "adfm-history"


@pytest.fixture
def client(store: Path) -> MlflowClient:
    return tracking.client()


@pytest.fixture
def keys(store: Path) -> Keys:
    return signing.keys()


@pytest.fixture
def write(client: MlflowClient, keys: Keys) -> Callable[..., Step]:
    def write(action: str, version: str, **content: str) -> Step:
        return append(client, "adfm", keys, read(client, "adfm", keys), action, version, **content)

    return write


def moved(write: Callable[..., Step], version: str, replaced: str = "none") -> Step:
    return write("promote", version, production=version, previous=replaced, replaced=replaced, by="Ada")


def new_key(folder: Path) -> Keys:
    """Another folder of keys, whose own key counts there."""
    before = os.environ.get(signing.VARIABLE)
    for role in ("service", "submitters"):
        (folder / role).mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "private.pem").touch(0o600)
    plain = serialization.NoEncryption()
    (folder / "private.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for role in ("service", "submitters"):
        (folder / role / "own.pem").write_bytes(public)
    os.environ[signing.VARIABLE] = str(folder)
    try:
        return signing.keys()
    finally:
        os.environ.pop(signing.VARIABLE)
        if before is not None:
            os.environ[signing.VARIABLE] = before


def retire(keys: Keys, old: Keys) -> Keys:
    """The keys of `keys`, which know that of `old` as retired."""
    (keys.folder / "service" / "retired").mkdir(exist_ok=True)
    shutil.copy(old.folder / "service" / "own.pem", keys.folder / "service" / "retired" / "old.pem")
    return signing._read(keys.folder)


def test_steps_are_signed_and_chained(client, keys, write):
    assert read(client, "adfm", keys) == History([], "", {})
    first, second = moved(write, "1"), moved(write, "2", "1")
    history = read(client, "adfm", keys)
    assert history.steps == [first, second] and not history.ignored
    assert (first.before, second.before) == ("", history_._digest("adfm", first))
    assert history.head == history_._digest("adfm", second)
    assert history.production == "2" and history.move_to("1") == first and history.move_to("3") is None
    tags = client.get_model_version(MODEL, "1").tags
    assert tags["key"] == keys.id and tags["action"] == "promote" and tags["by"] == "Ada"
    assert client.get_registered_model(MODEL).tags["head"] == f"2 {history.head}"


@pytest.mark.parametrize(
    ("key", "value"), [("production", "3"), ("why", "because"), ("by", "Eve"), ("before", "0" * 64), ("mark", "x")]
)
def test_a_field_that_was_changed_or_added_breaks_the_chain(client, keys, write, key, value):
    moved(write, "1")
    moved(write, "2", "1")
    client.set_model_version_tag(MODEL, "1", key, value)
    with pytest.raises(BrokenHistory, match=r"has a gap: step 2 follows one that is not there") as broken:
        read(client, "adfm", keys)
    assert broken.value.exit_code == 2


def test_a_changed_or_deleted_last_step_is_noticed(client, keys, write):
    moved(write, "1")
    moved(write, "2", "1")
    client.set_model_version_tag(MODEL, "2", "production", "1")
    with pytest.raises(BrokenHistory, match="ended with step 2, which is not there"):
        read(client, "adfm", keys)
    client.delete_model_version(MODEL, "2")
    with pytest.raises(BrokenHistory, match="ended with step 2, which is not there"):
        read(client, "adfm", keys)


def test_a_deleted_step_in_between_is_a_gap(client, keys, write):
    for version in ("1", "2", "3"):
        moved(write, version)
    client.delete_model_version(MODEL, "2")
    with pytest.raises(BrokenHistory, match="step 3 follows one"):
        read(client, "adfm", keys)


def test_what_is_not_signed_is_passed_over(client, keys, write, tmp_path):
    moved(write, "1")
    forged = {"action": "promote", "version": "9", "production": "9", "before": read(client, "adfm", keys).head}
    client.create_model_version(MODEL, "s3://x/y")
    client.create_model_version(MODEL, "s3://x/y", tags=forged)
    client.create_model_version(MODEL, "s3://x/y", tags=forged | {"key": keys.id, "signature": "QUJD"})
    stranger = new_key(tmp_path / "stranger")
    signature = signing.sign_text(history_._text("adfm", forged), stranger)
    client.create_model_version(MODEL, "s3://x/y", tags=forged | {"key": stranger.id, "signature": signature})
    history = read(client, "adfm", keys)
    assert history.production == "1"
    assert list(history.ignored) == [2, 3, 4, 5]
    assert history.ignored[3] == "it is not signed" and history.ignored[4] == "its fields are not what was signed"
    assert "not of the service" in history.ignored[5]
    moved(write, "2", "1")
    assert [step.number for step in read(client, "adfm", keys).steps] == [1, 6]


def test_a_signed_step_cannot_be_used_twice_or_for_another_model(client, keys, write):
    moved(write, "1")
    moved(write, "2", "1")
    tags = client.get_model_version(MODEL, "1").tags
    client.create_model_version(MODEL, "s3://x/y", tags=tags)
    history = read(client, "adfm", keys)
    assert history.production == "2" and history.steps[2].void
    client.create_registered_model("other-history")
    client.create_model_version("other-history", "s3://x/y", tags=tags)
    assert read(client, "other", keys).counting == []


def test_a_history_of_strangers_is_refused(client, keys, tmp_path):
    """As in another working folder, whose key signed nothing here: it must not look like a history without steps."""
    stranger = new_key(tmp_path / "stranger")
    append(client, "adfm", stranger, read(client, "adfm", stranger), "promote", "1", production="1")
    with pytest.raises(BrokenHistory, match=r"signed, and not with a key in .*ADFM_KEYS"):
        read(client, "adfm", keys)


def test_of_two_that_follow_the_same_step_the_second_is_void(client, keys, write):
    moved(write, "1")
    seen = read(client, "adfm", keys)
    first = append(client, "adfm", keys, seen, "promote", "2", production="2")
    second = append(client, "adfm", keys, seen, "promote", "3", production="3")
    assert not first.void and second.void
    assert read(client, "adfm", keys).production == "2"
    assert "promote (void)" in table(read(client, "adfm", keys))


def test_notes_are_written_again_and_moves_too_after_notes(client, keys, write):
    moved(write, "1")
    seen = read(client, "adfm", keys)
    assert not append(client, "adfm", keys, seen, "refuse", "7", why="one").void
    assert not append(client, "adfm", keys, seen, "refuse", "8", why="two").void
    move = append(client, "adfm", keys, seen, "promote", "2", production="2")
    assert not move.void and move.number == 6
    history = read(client, "adfm", keys)
    assert [(step.action, step.void) for step in history.steps] == [
        ("promote", False),
        ("refuse", False),
        ("refuse", True),
        ("refuse", False),
        ("promote", True),
        ("promote", False),
    ]
    assert table(history).count("refuse") == 2  # one that was written again is not shown twice


def test_many_who_write_at_once_leave_one_chain(client, keys, write):
    moved(write, "1")
    seen, steps = read(client, "adfm", keys), []
    threads = [
        threading.Thread(target=lambda n=n: steps.append(append(client, "adfm", keys, seen, "promote", n)))
        for n in map(str, range(2, 8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(not step.void for step in steps) == 1
    history = read(client, "adfm", keys)
    assert [step.number for step in history.steps] == list(range(1, 8)) and len(history.counting) == 2


def test_a_retired_key_counts_where_another_follows(client, keys, write, tmp_path):
    moved(write, "1")
    new = new_key(tmp_path / "new")
    after = retire(new, keys)
    with pytest.raises(BrokenHistory, match="confirm them with `adfm keys rotate`"):
        read(client, "adfm", after)
    trusting = replace(after, service=after.service | after.retired, retired={})
    confirmed = append(client, "adfm", after, read(client, "adfm", trusting), "keys", "none")
    history = read(client, "adfm", after)
    assert [step.number for step in history.counting] == [1, confirmed.number] and history.production == "1"

    # What the old key signs from now on counts for nothing, and does not stop the new one.
    forged = {"action": "promote", "version": "6", "production": "6", "before": history.head, "mark": "forged"}
    signature = signing.sign_text(history_._text("adfm", forged), keys)
    client.create_model_version(MODEL, "s3://x/y", tags=forged | {"key": keys.id, "signature": signature})
    history = read(client, "adfm", after)
    assert history.production == "1" and "retired" in history.ignored[3]
    assert not append(client, "adfm", after, history, "promote", "2", production="2").void
    assert read(client, "adfm", after).production == "2"


def step(number: int, **tags: str) -> ModelVersion:
    from mlflow.entities.model_registry import ModelVersionTag

    return ModelVersion(MODEL, str(number), 0, tags=[ModelVersionTag(key, value) for key, value in tags.items()])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_subset_of_a_chain_is_whole_or_refused(keys, data):
    """Whatever is deleted, reordered or changed: a reader gets the chain as it was, a beginning of it, or an error."""
    length = data.draw(st.integers(1, 6))
    texts, before = [], ""
    for number in range(length):
        fields = {"action": "promote", "version": str(number), "production": str(number), "mark": str(number)}
        fields |= {"before": before} if before else {}
        text = history_._text("adfm", fields)
        before = hashlib.sha256(text.encode()).hexdigest()
        texts.append(fields | {"key": keys.id, "signature": signing.sign_text(text, keys)})
    order = data.draw(st.permutations(range(length)))
    kept = data.draw(st.lists(st.sampled_from(order), unique=True, max_size=length)) if order else []
    for index in kept:
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            texts[index] = texts[index] | {data.draw(st.sampled_from(["production", "by", "before"])): "9"}
    chain = _Chain("adfm", keys)
    try:
        for number, index in enumerate(kept, 1):
            chain.add(step(number, **texts[index]))
        history = chain.whole("")
    except BrokenHistory:
        return
    assert [each.version for each in history.counting] == [str(n) for n in range(len(history.counting))]


def test_the_table_shows_what_is_deleted_or_ignored_and_prints_no_control_characters(client, keys, write):
    write("refuse", "1", why="too many\nfalse alarms\x1b[31m", by="Eve\x1b]0;x\x07")
    client.create_model_version(MODEL, "s3://x/y")
    write("refuse", "2")
    client.create_model_version(MODEL, "s3://x/y")
    client.delete_model_version(MODEL, "2")
    lines = table(read(client, "adfm", keys)).splitlines()
    assert lines[0].split() == ["step", "at", "(UTC)", "what", "version", "in", "place", "of", "by", "why"]
    assert r"too many\nfalse alarms\x1b[31m" in lines[1] and "\x1b" not in lines[1]
    assert lines[2].split()[:2] == ["2", "deleted"]
    assert lines[4].split()[:2] == ["4", "ignored"]


def test_long_reasons_are_cut_and_policies_are_not(client, keys, write):
    assert len(write("refuse", "1", why="x" * 5000).why) == 2000
    assert len(write("policy", "none", policy="x" * 5000).policy) == 5000
