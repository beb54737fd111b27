"""Links of the pages to files of the repository lead to its web pages."""

import re
from typing import Any


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Let `](../adfm/cli.py)` point to the file on the web: it is not part of the site."""
    return re.sub(r"\]\(\.\./([^)\s]+)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)
