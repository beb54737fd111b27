"""When adfm writes a description in MLflow, and where its links lead."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from adfm import descriptions

OURS = descriptions.to_write(None, "Look here.")
assert OURS


@pytest.mark.parametrize("current", [None, "", " \n", OURS, f"{OURS}\n", OURS.replace("\n", "\r\n")])
def test_a_missing_or_untouched_description_is_brought_up_to_date(current: str | None) -> None:
    new = descriptions.to_write(current, "Look there.")
    assert new is not None and new.startswith("Look there.\n")
    assert descriptions.to_write(new, "Look there.") is None


@pytest.mark.parametrize(
    "current",
    [
        "The team's own words.",
        OURS.replace("here", "elsewhere"),
        f"Ask Ada.\n\n{OURS}",
        f"{OURS}\n\nAsk Ada.",
        OURS.partition("<!--")[0],
        "<!-- adfm updates this description until somebody edits it: 0123456789abcdef -->",
    ],
)
def test_what_a_person_wrote_or_edited_stays(current: str) -> None:
    assert descriptions.to_write(current, "Look there.") is None


@pytest.mark.parametrize("name", ["adfm", "line 3", "a/b?c#d&e", "<b>|[x](y)"])
def test_names_are_no_markup_and_the_links_lead_to_them(name: str) -> None:
    parser = MarkdownIt("commonmark")
    for text in (descriptions.of_experiment(name), descriptions.of_model(name, "7")):
        tokens = [child for token in parser.parse(text) for child in token.children or []]
        assert name in "".join(token.content for token in tokens)
        assert not any(token.type == "html_inline" for token in tokens)
        links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
        assert links and all(re.fullmatch(r"#/[\w/%-]+(%\w\w)*\?workflowType=machine_learning", link) for link in links)
        hidden = parser.render(descriptions.to_write(None, text) or "")
        assert re.sub(r"<!--.*?-->", "", hidden).strip() == parser.render(text).strip()


def test_the_first_line_is_plain_enough_for_the_list_of_experiments() -> None:
    first = descriptions.of_experiment("adfm").splitlines()[0]
    assert len(re.sub(r"\]\([^)]*\)", "", first)) < 100
