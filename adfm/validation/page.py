"""Report failed expectations: one line each, and an HTML page with pictures."""

import copy
import html
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm.data import pictures
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult

_IDS = 10  # that a line shows
_PICTURE_SIDE = 200  # pixels
_PICTURES_LENGTH = 3_000_000  # characters for all pictures of a page

# Great Expectations' pages take their styles from the web, which `page` leaves out.
_HEAD = f"""<meta http-equiv="Content-Security-Policy" content="{pictures.POLICY}">
<style>{pictures.STYLE}</style>"""
_HEAD += """<style>
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h5 { font: 600 1.1em monospace; margin: 1.6em 0 .4em } h6 { font-size: 1em; margin: 1em 0 .4em }
ul { list-style: none; padding: 0; columns: 4 }
a { color: light-dark(#0a58ca, #78b4ff); text-decoration: none } i { font-style: normal }
table { border-collapse: collapse; width: 100% } td { overflow-wrap: anywhere }
th, td { border-bottom: 1px solid #8884; padding: .35em .6em; text-align: left; vertical-align: top }
.table-responsive > table > * > tr > :first-child:not(:nth-last-child(2)) { width: 4em }
.table-responsive > table > * > tr > :nth-child(3) { width: 11em }
.show-scrollbars { max-height: 20em; overflow: auto } .text-danger { color: light-dark(#b02a37, #ff8078) }
.text-success { color: light-dark(#146c43, #56d364) }
.fa-times::before { content: "\\2717" } .fa-check-circle::before { content: "\\2713" }
.sticky-top, .sticky > :first-child, .collapse, [data-toggle="collapse"] { display: none }
</style></head>"""


def failed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries, of `suite.entries`, of failed expectations, the critical ones first."""
    failed = [entry for entry in entries if not entry["success"]]
    return sorted(failed, key=lambda entry: bool(entry["severity"] == "warning"))


def line(entry: dict[str, Any]) -> str:
    """Return one line on a failed expectation: what, how many, which, what to do."""
    facts = f"observed {entry['observed']}"
    if entry["failing"] is not None:
        more = ", …" if entry["failing"] > _IDS else ""
        facts = f"{entry['failing']} failing: {', '.join(entry['ids'][:_IDS])}{more}"
        values = [str(value) for value in entry["observed"] if value not in (None, False)]
        if values and entry["column"] != "id":
            facts += f" ({entry['column']}: {', '.join(values[:_IDS])})"
    prefix = "warning: " if entry["severity"] == "warning" else ""
    return printable(f"{prefix}{entry['what']}: {facts}; {entry['remedy']}.")


def figures(folder: Path, table: "pd.DataFrame", failing: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Draw images that fail each expectation, by their rows in `table`, as a page can hold; return HTML for each."""
    figures = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged and on huge images
        for number, row in pictures.rows(folder, {number for numbers in failing.values() for number in numbers}):
            lines = table[["id", "source", "product", "label", "split"]].iloc[number].fillna("?").tolist()
            picture = pictures.of_row(row, _PICTURE_SIDE)
            figures[number] = pictures.figure(picture, lines[0], lines[1], " · ".join(lines[2:]))
    by_expectation, length = {}, 0
    for what, numbers in failing.items():
        content = "".join(figures[number] for number in numbers)
        length += len(content)
        by_expectation[what] = content if length <= _PICTURES_LENGTH else ""
    return by_expectation


def page(result: "ExpectationSuiteValidationResult", entries: list[dict[str, Any]], figures: Mapping[str, str]) -> str:
    """Return the HTML page: what failed, with pictures, above Great Expectations' Data Docs."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    result = copy.deepcopy(result)
    for each in result.results:  # the names of a data set are not markup
        each.result = json.loads(html.escape(json.dumps(each.result), quote=False))
    view: Any = DefaultJinjaPageView()  # untyped
    page: str = view.render(ValidationResultsPageRenderer().render(result))
    # The page needs no network.
    page = re.sub(r"(?s)<(script|style|footer)\b.*?</\1>|<(link|img)\b[^>]*>", "", page)
    page = re.sub(r'(?s)<a href="\.\./[^>]*>(.*?)</a>', r"\1", page)  # to pages of a site that is not there
    top = "" if failed(entries) else "<p>All expectations hold.</p>"
    for entry in failed(entries):
        top += f'<p>{html.escape(line(entry))}</p><div class="pictures">{figures[entry["what"]]}</div>'
    page = page.replace("</head>", _HEAD, 1).replace("<body>", f"<body><h2>Validation of the shards</h2>{top}", 1)
    return re.sub(r"\s*\n\s*", "\n", page)
