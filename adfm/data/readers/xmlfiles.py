"""XML files of annotation tools, in the encoding that they are in."""

import codecs
import re
from pathlib import Path
from xml.etree import ElementTree

from adfm.data.readers.textfiles import contents

# Web browsers read these names as the larger encodings too: the tools declare the smaller one and write the larger.
_LARGER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"<\0?\0": "utf-16-le",
    b"\0<\0?": "utf-16-be",
}
_DECLARED = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"']")
_NO_ELEMENT = re.compile(r"<!--.*?-->|<\?.*?\?>", re.DOTALL)
_ELEMENT = re.compile(r"<([A-Za-z_][\w.:-]*)")
_HEAD = 4096  # bytes that are read to learn what a file is


def outermost(path: Path) -> str | None:
    """Return the name of the root element of an XML file, as far as its beginning tells."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    encoding = _marked(head) or "latin-1"  # which decodes any bytes; `_ELEMENT` is ASCII
    first = _ELEMENT.search(_NO_ELEMENT.sub("", head.decode(encoding, errors="ignore")))
    return first[1] if first else None


def document(path: Path) -> ElementTree.Element:
    """Parse an XML file in the encoding that it declares; raise `ValueError` with what is wrong."""
    try:
        # Decoded here, as the parser knows few encodings, and without leading blank lines, which it refuses.
        return ElementTree.fromstring(_decoded(contents(path)).lstrip())
    except ElementTree.ParseError as error:
        raise ValueError(f"is not XML ({error})") from error


def _marked(content: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), None)


def _decoded(content: bytes) -> str:
    encoding = _marked(content)
    declared = _DECLARED.match(content)
    name = declared[1].decode() if declared and not encoding else encoding or "UTF-8"
    try:
        codec = codecs.lookup(name).name
        encoding = encoding or _LARGER.get(codec, codec)
        text = content.decode(encoding)
    except LookupError as error:  # bytes.decode refuses codecs that are no encodings of text so as well
        raise ValueError(f"declares the encoding {name!r}, which is not known; save the file as UTF-8") from error
    except (UnicodeError, ValueError) as error:
        what = f"declares the encoding {name}, but is not {name} text" if declared else f"is not {name} text"
        raise ValueError(f"{what}; save the file with the encoding UTF-8, and declare that") from error
    if not encoding.startswith("utf") and not text.isascii() and _is_utf_8(content, encoding):
        remedy = f"declare UTF-8 in its first line, or save it as {name}"
        raise ValueError(f"declares the encoding {name}, but is UTF-8 text; {remedy}")
    return text


def _is_utf_8(content: bytes, encoding: str) -> bool:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return False
    # Text in an encoding of two bytes a character may be UTF-8 by chance, but hardly with characters of three bytes.
    one_byte = len("é".encode().decode(encoding, errors="replace")) == 2
    return one_byte or max(text) > "\u07ff"
