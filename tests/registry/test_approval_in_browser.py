"""The whole approval, as a reviewer does it: by clicking in MLflow's own pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import requests
from mlflow import MlflowClient

from adfm import tracking
from adfm.params import Params
from adfm.registry.promotion import history

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 60_000  # milliseconds
# MLflow's own settings; passwords, which are slow to check, are remembered.
AUTH = """
[mlflow]
default_permission = READ
database_uri = sqlite:///basic_auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 600
"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def edit(page: Page, key: str, value: str) -> None:
    """Edits a tag with the pencil beside it."""
    row = page.locator(f"tr[data-row-key={key}]")
    row.get_by_test_id("editable-table-button-edit").click()
    row.get_by_role("textbox").fill(value)
    row.get_by_test_id("editable-table-button-save").click()
    row.get_by_text(value, exact=True).wait_for()


def decide(page: Page, version: str, value: str, by: str = "Rita") -> None:
    """Opens a version's page and edits its tags `approval` and `approval_by`, as the description says."""
    page.goto(version)
    page.locator("tr[data-row-key=gate]").get_by_text("passed").wait_for()
    edit(page, "approval", value)
    edit(page, "approval_by", by)


def tag(model: str, version: str, key: str) -> str | None:
    return MlflowClient().get_model_version(model, version).tags.get(key)


def production(model: str) -> str | None:
    version = MlflowClient().get_registered_model(model).aliases.get("production")
    return None if version is None else str(version)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_a_reviewer_approves_and_rejects_by_clicking(server, add, service, page):
    params = Params.model_validate({"mlflow": {"registered_model": "line"}})
    for right in (26, 30, 36):
        add(right, approve=False, model="line")
    service("line")
    address = f"{server}/#/models/line/versions"

    decide(page, f"{address}/1", "rejected")
    wait_for(lambda: history(params.mlflow.registered_model).last("reject") is not None)
    assert production("line") is None

    decide(page, f"{address}/2", "approved")
    wait_for(lambda: production("line") == "2")
    wait_for(lambda: bool(tag("line", "2", "promoted_at")))
    page.reload()
    page.locator("tr[data-row-key=promoted_by]").get_by_text("adfm approvals on").wait_for()
    page.get_by_text("@ production").first.wait_for()

    # Its gate did not see version 2.
    decide(page, f"{address}/3", "approved")
    wait_for(lambda: tag("line", "3", "approval") == "pending")
    assert production("line") == "2"
    page.reload()
    page.locator("tr[data-row-key=approval_refused]").get_by_text("which is 2 now").wait_for()
    steps = history(params.mlflow.registered_model).counting
    assert [(step.action, step.version) for step in steps if step.action == "promote"] == [("promote", "2")]
    assert history(params.mlflow.registered_model).move.approval_by == "Rita"
    assert (steps[-1].action, steps[-1].version, steps[-1].production) == ("judge", "3", "2")


def test_only_a_reviewer_may_approve(
    start_mlflow, empty_database, tmp_path, tmp_path_factory, add, service, browser, monkeypatch
):
    pytest.importorskip("flask_wtf", reason="MLflow wants Flask-WTF for its basic-auth")
    home = tmp_path_factory.mktemp("basic-auth") / "home"
    (tmp_path / "auth.ini").write_text(AUTH)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": "the-admins-password", "MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32}
    config = {"MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini")}
    with start_mlflow(home, empty_database, "--app-name", "basic-auth", **secrets, **config) as uri:
        monkeypatch.chdir(tmp_path)
        for key, value in (("URI", uri), ("USERNAME", "admin"), ("PASSWORD", secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{key}", value)
        add(26, approve=False, model="press")
        admin = requests.Session()
        admin.auth = ("admin", secrets["MLFLOW_AUTH_ADMIN_PASSWORD"])
        for user in ("reviewer", "operator"):
            login = {"username": user, "password": f"the-{user}s-password"}
            admin.post(f"{uri}/api/2.0/mlflow/users/create", json=login).raise_for_status()
        may = {
            "username": "reviewer",
            "resource_type": "registered_model",
            "resource_id": "press",
            "permission": "EDIT",
        }
        admin.post(f"{uri}/api/3.0/mlflow/users/permissions/grant", json=may).raise_for_status()
        service("press")

        def page_of(user: str) -> Page:
            login = {"username": user, "password": f"the-{user}s-password"}
            page = browser.new_context(http_credentials=login).new_page()
            page.set_default_timeout(PATIENCE)
            return page

        address = f"{uri}/#/models/press/versions/1"
        page = page_of("operator")
        with page.expect_response(lambda response: "set-tag" in response.url) as refused:
            page.goto(address)
            row = page.locator("tr[data-row-key=approval]")
            row.get_by_test_id("editable-table-button-edit").click()
            row.get_by_role("textbox").fill("approved")
            row.get_by_test_id("editable-table-button-save").click()
        assert refused.value.status == 403
        assert tag("press", "1", "approval") == "pending"
        assert production("press") is None

        decide(page_of("reviewer"), address, "approved", "reviewer")
        wait_for(lambda: production("press") == "1")
        # The history is not the reviewer's to write.
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reviewer")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "the-reviewers-password")
        from mlflow.exceptions import MlflowException

        with pytest.raises(MlflowException, match="403|PERMISSION_DENIED"):
            tracking.client().set_model_version_tag("press-history", "1", "by", "nobody")
