"""A version's description, read with a parser and in MLflow's own pages, and the decision on a terminal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adfm import tracking
from adfm.evaluation import references
from adfm.evaluation.calibration import Calibration
from adfm.registry import page
from adfm.registry.gate import decide
from adfm.registry.policy import Policy
from adfm.text import markdown

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage

HOSTILE = (
    "<img src=x onerror=alert(1)>|**b**[l](http://evil.bc)\n\n# h\n`c` http://evil.bc www.evil.bc $x$ \x1b[2J\u202e_i_"
)
SEPARATION = {"images": 600, "against": {"candidate": 5200, "production": 4800}, "problems": [], "proved": True}
CALIBRATION = Calibration(threshold=0.3, limit={"overkill": 0.05}, images=200)
ORIGIN = {
    "base": {"name": "Qwen/Qwen3-VL-2B", "revision": "abc"},
    "data": {"trained_on": "f00d", "dvc_md5": None},
    "git_commit": "a" * 40,
    "git_dirty": "true",
}
parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def predictions(
    images: int = 600, wrong: int = 60, iou: float = 0.4, categories: int = 3, name: str = "part"
) -> pd.DataFrame:
    anomalous = np.arange(images) % 2 == 0
    right = np.arange(images) >= wrong
    return pd.DataFrame(
        {
            "id": [f"{i:04}{name}" for i in range(images)],
            "category": [f"{i // 2 % categories:03}{name}" for i in range(images)],
            "defect": np.where(anomalous, [f"{i // 2 % 2}{name}" for i in range(images)], None),
            "label": np.where(anomalous, "anomalous", "normal"),
            "predicted": np.where(anomalous == right, "anomalous", "normal"),
            "score": 0.5,
            "iou": np.where(anomalous, iou, np.nan),
        }
    )


def decided(
    candidate: pd.DataFrame, production: pd.DataFrame | None = None, policy: Policy | None = None, **more: Any
) -> dict[str, Any]:
    decision = decide(candidate, production, None, policy or Policy(), separation=SEPARATION)
    added = {
        "split": "test",
        "policy": (policy or Policy()).model_dump(),
        "production_version": None if production is None else "3",
        "decided_at": "2026-11-26T12:00:00+00:00",
    }
    return dataclasses.asdict(decision) | added | more


def text(decision: dict[str, Any], **more: Any) -> str:
    values: dict[str, Any] = {
        "origin": ORIGIN,
        "measured": {"auroc": 0.93, "ece": 0.04},
        "calibration": CALIBRATION,
        "version": "4",
        "evaluated_by": None,
    }
    return page.text(decision, **values | more)


def plain(description: str) -> str:
    """The description without the spaces that keep columns apart."""
    return description.replace("\u00a0", "")


BETTER = decided(predictions(1600, 60), predictions(1600, 160))
PART = next(row for row in decided(predictions(900, 300), predictions(900))["rows"] if row["of"] == "category")
WORSE = decided(predictions(1600, 300), predictions(1600, 100))
UNCLEAR = decided(predictions(120, 22, 0.5), predictions(120, 20, 0.4))
DECISIONS = [BETTER, WORSE, UNCLEAR, decided(predictions())]


def with_names(decision: dict[str, Any], name: str, parts: int = 3) -> dict[str, Any]:
    """A decision of data in which every name is `name`, and so many parts failed."""
    rows = [row for row in decision["rows"] if row["of"] == "whole"]
    rows += [PART | {"name": f"{number}{name}"} for number in range(parts)]
    changed = [change | {"id": f"{change['id']}{name}", "category": f"c{name}"} for change in decision["changed"]]
    reasons = [f"Overkill of category {number}{name}: too high." for number in range(parts)]
    return decision | {"rows": rows, "changed": changed, "reasons": reasons + decision["reasons"]}


# ------------------------------------------------------------------------------------------------ what it says


def test_the_gain_is_said_first_and_the_rest_in_order() -> None:
    description = plain(text(BETTER, policy_difference=["level: 0.1 instead of 0.05"]))
    assert description.startswith("Gate: passed.\n\n**Better than production: accuracy 96.2% against 90.0%")
    order = [
        "Judged on 800 normal and 800 anomalous images of the test split, against version 3 in",
        "| passed | escape rate | 3.8%",
        "| passed | overkill |",
        "| better | accuracy | 96.2%",
        "**To approve it**, press the pencil of `approval`",
        "**On the line**, where 2.00% of the parts are defective, 8 of 10,000 parts are escapes (at most ",
        "**Looks**: this is candidate 1 of the 20",
        "**Separation**: none of 600 test images is among the training and validation images (5,200 of the candidate",
        "An image is flagged from a probability of 0.3 on",
        "**100 images are decided otherwise than in production**: 50 defects that production misses, 50 good parts",
        "| anomalous | normal | anomalous | 000part | 0060part |",
        "**The submitter's policy differs**",
        "level: 0.1 instead of 0.05",
        "Left out here: 95 images that are decided otherwise; `gate.json`",
    ]
    places = [description.index(part) for part in order]
    assert places == sorted(places)


def test_blind_answers_and_the_reference_detector_are_shown_beside_the_candidate() -> None:
    row = {metric: [0.75, 0.7, 0.8] for metric in references.METRICS}
    words = "The reference detector is better on this data: balanced accuracy 0.966 (detector)."
    compared = {"rows": {"trained": row, "detector": row, "always_A": row}, "lines": [words], "verdict": "detector"}
    description = plain(text(BETTER, compared=compared))
    assert markdown(words) in description and "the same by score" in description
    assert "| detector | 0.750 |" in description and "| always A | 0.750 |" in description
    assert description.index("| passed | escape rate |") < description.index(markdown(words))
    assert words not in text(BETTER)
    hostile = compared | {"rows": {HOSTILE: row}, "lines": [HOSTILE * 30] * 5}
    rendered = parser.render(text(BETTER, compared=hostile))
    assert len(text(BETTER, compared=hostile)) <= page.LONGEST
    assert "<img" not in rendered and "<a" not in rendered


def test_commands_are_code_and_the_step_that_is_done_is_left_out() -> None:
    steps = [
        {"rule": "longer", "text": "Train longer: `make repro PARAMS=params/own_set.yaml`, not `<b>` or ``x`."},
        {"rule": "gate", "text": "Register it (`make repro` does)."},
    ]
    lines = [f"Next: {step['text']}" for step in steps]
    row = {metric: [0.75, 0.7, 0.8] for metric in references.METRICS}
    compared = {"rows": {"trained": row}, "lines": lines, "summary": {"steps": steps}}
    description = text(BETTER, compared=compared)
    codes = [
        child.content for token in parser.parse(description) for child in token.children or [] if "code" in child.type
    ]
    assert "make repro PARAMS=params/own_set.yaml" in codes and "<b>" not in codes
    assert "&#60;b&#62;" in description and "Register it" not in description


def test_a_failure_says_why_before_the_table() -> None:
    description = plain(text(WORSE))
    assert (
        description.startswith("Gate: failed.")
        and "To approve" not in description
        and "**It cannot be promoted.** Fix" in description
        and "To approve" not in description
    )
    assert description.index("- Escape rate: ") < description.index("| verdict |")
    assert "100 new escapes, 100 good parts newly flagged" in description


def test_cannot_tell_names_the_images_that_would_tell() -> None:
    assert UNCLEAR["verdict"] == "cannot tell"
    needed = max(
        answer["needed"]
        for row in UNCLEAR["rows"]
        for answer in row["answers"]
        if (row["metric"], answer["question"], row["of"]) == ("escape_rate", "production", "whole")
    )
    for description in (text(UNCLEAR), page.screen(UNCLEAR, "4")):
        assert f"{needed:,} anomalous images (now 60)" in " ".join(description.split())


def test_the_first_version_has_nothing_to_be_compared_with() -> None:
    description = text(decided(predictions()))
    assert description.startswith("Gate: passed.\n\n**There is no model in production yet: the limits alone decide.**")
    assert "decided otherwise" not in description and "against version" not in description
    # Columns of comparisons would be empty.
    assert "\n| verdict | metric | candidate | limit | images |\n| --- | --- | --- | --- | --- |\n" in plain(
        description
    )


def test_who_may_approve() -> None:
    policy = Policy(approvers=["Ada", "*B*"], team_of_one=False)
    description = text(decided(predictions(), policy=policy))
    assert "May approve: Ada, &#42;B&#42;. Not the one who submitted it." in description


@pytest.mark.parametrize(
    ("separation", "words"),
    [
        (None, "**Separation** of test and training images is not proved."),
        (
            SEPARATION | {"proved": False, "problems": [{"kind": "same pixels", "ids": ["a", "b"], "of": "candidate"}]},
            "**Separation failed**: 2 test images were in the training or validation data.",
        ),
        (SEPARATION | {"proved": False}, "**Separation** of test and training images is not proved."),
    ],
)
def test_separation(separation: dict[str, Any] | None, words: str) -> None:
    assert words in text(BETTER | {"separation": separation})


# ------------------------------------------------------------------------------------------------ what fits


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(DECISIONS), st.integers(0, 80), st.integers(0, 1500), st.integers(1, 6000))
def test_it_fits_and_is_cut_nowhere(decision: dict[str, Any], parts: int, lines: int, length: int) -> None:
    decision = with_names(decision, "n" * length, parts)
    description = text(decision, policy_difference=["x" * lines] * 5)
    assert len(description) <= page.LONGEST
    description = plain(description)
    for line in description.splitlines():
        assert not line.startswith("|") or line.endswith(" |")
        assert not line.startswith("- ") or line.endswith((".", "x", "- "))
    for part in description.split("\n\n"):  # a table has as many cells in every row
        assert not part.startswith("|") or len({len(row.split(" | ")) for row in part.splitlines()}) == 1
    assert ("To approve it" if decision["verdict"] == "passed" else "It cannot be promoted") in description
    left_out = re.search(r"([\d,]+) images that are decided otherwise;? ?", description)
    rows = sum(line.startswith(("| anomalous |", "| normal |")) for line in description.splitlines())
    assert (int(left_out[1].replace(",", "")) if left_out else 0) + rows == len(decision["changed"])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(DECISIONS),
    st.integers(0, 60),
    st.sampled_from(["", "4", "1234"]),
    st.text(max_size=300),
    st.lists(st.tuples(st.integers(1, 5), st.text(max_size=300)), max_size=8),
)
def test_a_decision_fits_on_one_screen(
    decision: dict[str, Any], parts: int, version: str, name: str, verdict: list[tuple[int, str]]
) -> None:
    decision = with_names(decision, name, parts) | {"anchor_version": "1"}
    lines = page.screen(decision, version, verdict).splitlines()
    assert len(lines) < page.LINES and max(map(len, lines)) <= page.WIDTH
    assert decision["verdict"] in lines[0]
    assert all(char.isprintable() for line in lines for char in line)
    if decision["verdict"] == "passed" and version:
        assert f"`adfm approve {version}`" in lines[-1] and "`adfm promote`" in lines[-1]


@pytest.mark.parametrize("decision", DECISIONS)
def test_the_screen_has_model_comparison_and_the_first_step_above_the_next_commands(decision: dict[str, Any]) -> None:
    comparison = [
        "trained is better than a blind answer: balanced accuracy 0.8 [0.7, 0.9], blind 0.5. More.",
        "It wins.",
    ]
    steps = [{"rule": "rate", "text": "Look. At it."}, {"rule": "gate", "text": "Register it."}]
    summary = {"model": "trained is the embedded model.", "comparison": comparison, "steps": steps}
    screen = page.screen(decision, "4", references.brief({"summary": summary}))
    assert len(screen.splitlines()) < page.LINES
    expected = ["trained is the embedded model.", comparison[0].removesuffix(" More."), "It wins.", "Next: Look."]
    places = [screen.index(f"\n{line}\n") for line in expected]
    assert places == sorted(places) and "At it" not in screen and "Register it" not in screen


# ------------------------------------------------------------------------------------------------ what is markup


def structure(description: str) -> list[tuple[str, str, Any]]:
    tokens = [each for token in parser.parse(description) for each in [token, *(token.children or [])]]
    return [
        (token.type, token.tag, token.attrs.get("href"))
        for token in tokens
        if token.type not in ("text", "text_special")
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(DECISIONS),
    st.one_of(st.text(max_size=40), st.lists(st.sampled_from(HOSTILE), max_size=30).map("".join), st.just(HOSTILE)),
)
def test_no_element_comes_from_data(decision_: dict[str, Any], name: str) -> None:
    def described(name: str) -> str:
        more = {"production_version": name, "policy": {"approvers": [name]}}
        decision = with_names(decision_, name) | more
        origin = ORIGIN | {"base": {"name": name, "revision": name}, "git_commit": name}
        description = text(decision, origin=origin, policy_difference=[f"x{name}"], calibration=Calibration(note=name))
        return description.partition("Left out here")[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "LONGEST", 1_000_000)
        assert structure(described(name)) == structure(described("n" * len(name)))


def test_names_are_shown_as_they_are_but_for_what_cannot_be_printed() -> None:
    description = text(decided(predictions(1600, 300, name="<i>|*x*"), predictions(1600, 100, name="<i>|*x*")))
    words = "".join(child.content for token in parser.parse(description) for child in token.children or [])
    assert "000<i>|*x*" in words


# ------------------------------------------------------------------------------------------------ in MLflow's pages


@pytest.fixture
def window(browser: Browser) -> Iterator[BrowserPage]:
    window = browser.new_page()
    window.set_default_timeout(60_000)
    yield window
    window.close()


def test_mlflow_shows_no_markup_of_data_and_the_links_open_report_and_curves(server: str, window: BrowserPage) -> None:
    import mlflow

    store = tracking.client()
    with mlflow.start_run(experiment_id=store.create_experiment("page")) as run:
        for step in range(3):
            mlflow.log_metric("reward", step, step=step)
        mlflow.log_text("<title>a report</title>", page.REPORT)
    candidate, production = predictions(1600, 100, name=HOSTILE), predictions(1600, 300, name=HOSTILE)
    description = text(decided(candidate, production), evaluated_by=run, trained_by=run)
    store.create_registered_model("page")
    store.create_model_version("page", f"runs:/{run.info.run_id}/evaluation", run.info.run_id, {"approval": "pending"})
    store.update_model_version("page", "1", description)
    requests: list[str] = []
    window.on("request", lambda request: requests.append(request.url))
    window.on("dialog", lambda dialog: pytest.fail(dialog.message))

    address = f"{server}/#/models/page/versions/1"
    window.goto(address)
    window.get_by_text("Better than production").wait_for()
    # Everything that the description names is there: the row of the tag, its pencil, Save, and MLflow's own button.
    window.get_by_role("button", name="Promote model").wait_for()
    window.get_by_text("Tags", exact=True).first.wait_for()
    description = window.get_by_text("Better than production").locator("xpath=ancestor::div[.//table][1]")
    links = description.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert links == [tracking.run_page(run, f"artifacts/{page.REPORT}"), tracking.run_page(run)]
    assert description.locator("img, script, h1, em:text-is('i'), strong:text-is('b'), code:text-is('c')").count() == 0
    assert "<img src=x onerror=alert(" in description.inner_text()
    assert not any("evil" in url for url in requests)
    row = window.locator("tr[data-row-key=approval]")
    row.get_by_test_id("editable-table-button-edit").click()
    row.get_by_role("button", name="Save").wait_for()

    for link, content in (("The curves of the training", "Add chart"), ("The report", "report.html")):
        with window.expect_popup() as popup:
            window.get_by_role("link", name=link, exact=True).click()
        popup.value.set_default_timeout(60_000)
        popup.value.get_by_text(content).first.wait_for()
        # The navigation of trainings, not that of GenAI.
        popup.value.get_by_role("link", name="Runs", exact=True).first.wait_for()
        assert popup.value.get_by_text("Evaluation runs").count() == 0
