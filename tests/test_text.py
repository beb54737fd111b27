from __future__ import annotations

import contextlib
import io
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adfm import text

MARKUP = (
    "<b>", "</b>", "<img src=x onerror=alert(1)>", "<!-- ", "&lt;", "&#60;", "[a](http://b)", "![a](b)", "[a]: /b",
    "](", "http://a.bc", "www.a.bc", "<http://a.bc>", "a@b.cd", "`", "```", "~~~", "~~", "*", "**", "_", "__", "\\",
    "|", "|-|", "\n", "\r\n", "\n\n", "- ", "+ ", "1. ", "2) ", "# ", "> ", "---", "===", "    ", "\t", "$x$",
    ":smile:", "@user", "{", "}", "^", "¨D", "¨T", "\u2028", "\u202e", "\x1b[2J", "\x9b", "\0", "- [ ] ", " ", "a",
    "é", ".", "!", "()",
)  # fmt: skip
hostile = st.one_of(st.text(), st.lists(st.sampled_from(MARKUP), max_size=12).map("".join))
parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def structure(markdown: str) -> list[tuple[str, str]]:
    """The elements of a page, in order: everything but its words."""
    tokens = [each for token in parser.parse(markdown) for each in [token, *(token.children or [])]]
    return [(token.type, token.tag) for token in tokens if token.type not in ("text", "text_special")]


def words(markdown: str) -> str:
    tokens = [child for token in parser.parse(markdown) for child in token.children or []]
    return "".join(token.content for token in tokens)


@given(hostile)
@example("<b>|*[x](y)*http://a.bc")
def test_text_in_a_page_is_words_and_nothing_else(name: str) -> None:
    safe = text.markdown(name)
    plain = "x" if safe else ""
    for around in ("{}", "- {}", "| a | {} |\n| --- | --- |\n| {} | b |", "**{}**, {}"):
        if around.startswith("**") and not safe:
            continue
        page = around.replace("{}", safe)
        assert structure(page) == structure(around.replace("{}", plain))
        assert "<" not in safe and "\n" not in safe
    assert words(f"- {safe}") == text.printable(name).strip()


@pytest.mark.parametrize(
    "address", ["http://a.bc/d", "ftp://a.bc", "www.example.com", "WWW.1and1.com", "a.b@example.com"]
)
def test_no_address_becomes_a_link(address: str) -> None:
    """By the dialects of GitHub and showdown, which link what looks like an address."""
    safe = text.markdown(f"see {address}")
    assert "://" not in safe and "@" not in safe and "www." not in safe.lower()


def test_plain_sentences_stay_as_they_are() -> None:
    sentence = "Accuracy: 81.7% against 90.0% (p = 0.5), -3 and +4; broken-large is 1/2, isn't it? Yes."
    assert text.markdown(sentence) == sentence


@given(hostile)
def test_one_line_that_a_terminal_can_print(name: str) -> None:
    escaped = text.printable(name)
    assert escaped.isprintable() and len(escaped.splitlines()) <= 1
    assert escaped == name or not name.isprintable()


@given(hostile)
def test_output_steers_no_terminal(name: str) -> None:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), text.printable_output():
        print(name)
        print(name, file=sys.stderr)
    written = stream.getvalue()
    assert all(char in "\n\r\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in written)
    assert written.count("\n") == 2 * name.count("\n") + 2


def test_output_is_the_streams_own_again_after_the_block() -> None:
    stream = sys.stdout
    with pytest.raises(ValueError), text.printable_output():
        assert sys.stdout is not stream and sys.stdout.encoding == stream.encoding
        raise ValueError
    assert sys.stdout is stream
