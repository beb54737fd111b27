"""Text and JSON files of annotation tools; bad data raise `ValueError` with what is wrong, `DataSet.at` adds where."""

import codecs
import json
import math
import mmap
from pathlib import Path
from typing import Any, TypeVar

Size = tuple[int, int] | None  # width and height of an image in pixels; `None` if a file does not state them
_T = TypeVar("_T")

_UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}


def contents(path: Path) -> bytes:
    """Read a file as bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def text(path: Path) -> str:
    """Read a text file in UTF-8, with or without byte order mark, or in UTF-16 with one; refuse an empty one."""
    content = contents(path)
    if not content.strip():
        raise ValueError("is empty")
    return _decoded(content)


def lines(path: Path) -> list[str]:
    """Read the lines of a text file, as `text` does; an empty file has none."""
    return _decoded(contents(path)).splitlines()


def encoding_of(content: bytes) -> str:
    """Return the encoding of a text file, by its byte order mark or the lack of one."""
    return "utf-16" if content.startswith(tuple(_UTF_16)) else "utf-8-sig"


def _decoded(content: bytes) -> str:
    encoding = encoding_of(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line}: is not {encoding.removesuffix('-sig').upper()} text; save the file with the encoding UTF-8"
            " (`iconv -t UTF-8 -f` with the encoding of the system that it comes from, such as GB18030, CP1252, CP932)"
        ) from error


def parsed(path: Path) -> Any:
    """Parse a JSON file."""
    content = text(path)
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        comma = content[: error.pos].rstrip().endswith(",") and content[error.pos :].lstrip()[:1] in "]}"
        hint = "; take away the comma before it" if comma else ""
        raise ValueError(f"line {error.lineno}, column {error.colno}: is not JSON ({error.msg}){hint}") from error
    except (RecursionError, ValueError) as error:  # brackets nested too deep, an integer of thousands of digits
        raise ValueError(f"is not JSON that can be read ({error})") from error


def mentions(path: Path, *words: bytes) -> bool:
    """Whether all words are in a file, however large it is."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            encoding = _UTF_16.get(content[:2])
            sought = [word.decode().encode(encoding) for word in words] if encoding else words
            return all(content.find(word) >= 0 for word in sought)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def member(value: object, key: str, kind: type[_T]) -> _T:
    """Return what a JSON object has under a key; refuse a value of another kind, or none."""
    if not isinstance(value, dict):
        raise ValueError(f"is not a JSON object, so that it has no {key!r}")
    if key not in value:
        raise ValueError(f"has no {key!r}")
    if not isinstance(value[key], kind):
        raise ValueError(f"{key!r} is not {_KINDS[kind]}: {str(value[key])[:40]!r}")
    return value[key]  # type: ignore[no-any-return]


def optional(value: object, key: str, kind: type[_T]) -> _T | None:
    """Return what a JSON object has under a key; `None` if it is not an object, or has nothing of that kind there."""
    inside = value.get(key) if isinstance(value, dict) else None
    return inside if isinstance(inside, kind) else None


def number(value: object) -> float:
    """Check that a value of JSON is a finite number."""
    if isinstance(value, str):
        raise ValueError(f"{value[:40]!r} is text, and a number is needed; write it without quotation marks")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:  # nan is not below
        raise ValueError(f"{str(value)[:40]!r} is not a finite number")
    return float(value)


def decimal(text: str | None, name: str) -> float:
    """Parse a finite number of a text file; `name` is what the file calls it."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text!r}, which is not a finite number")
    return value


def pixel_size(width: object, height: object, as_text: bool = False) -> Size:
    """Return width and height of an image; `None` where one is not stated. Text is refused unless `as_text`."""
    sides = []
    for side in (width, height):
        if side in (None, "", 0, -1, "0", "-1"):  # what tools write for an unknown size
            return None
        try:
            sides.append(math.nan if isinstance(side, str) and not as_text else float(side))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            sides.append(math.nan)
    if not all(1 <= side < 1e9 and side.is_integer() for side in sides):
        raise ValueError(f"{width!r:.40} x {height!r:.40} is not a size in pixels")
    return int(sides[0]), int(sides[1])


def point(value: object) -> tuple[float, float]:
    """Check that a value of JSON is a point `[x, y]`."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{str(value)[:40]!r} is not a point [x, y]")
    return number(value[0]), number(value[1])
