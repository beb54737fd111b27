from pathlib import Path

import pytest

from adfm.data.readers.xmlfiles import document, outermost


def _written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a.xml"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("declared", "encoding", "name"),
    [
        ("gb2312", "gb2312", "划痕"),
        ("GB2312", "gbk", "劃痕"),  # more than GB2312 has, as Windows writes it
        ("gbk", "gbk", "划痕"),
        ("gb18030", "gb18030", "划痕"),
        ("big5", "big5", "劃痕"),
        ("Shift_JIS", "cp932", "傷①"),
        ("euc-kr", "cp949", "긁힘"),
        ("windows-1251", "cp1251", "царапина"),
        ("ISO-8859-1", "latin-1", "éraflure"),
        ("utf-8", "utf-8", "划痕"),
        ("UTF-8", "utf-8-sig", "划痕"),
        ("UTF-16", "utf-16", "划痕"),
        ("UTF-16", "utf-16-le", "划痕"),
        ("UTF-16", "utf-16-be", "划痕"),
        ("UTF-8", "utf-16", "划痕"),  # the byte order mark is right
        ("gb2312", "ascii", "scratch"),
    ],
)
def test_declared_encodings(tmp_path: Path, declared: str, encoding: str, name: str) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>\r\n<annotation><name>{name}</name></annotation>'
    path = _written(tmp_path, text.encode(encoding))
    assert outermost(path) == "annotation"
    assert document(path).findtext("name") == name


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is not XML (no element found: line 1, column 0)"),
        (b"<a>", "is not XML (no element found: line 1, column 3)"),
        ("<a>é</a>".encode("latin-1"), "is not UTF-8 text; save the file with the encoding UTF-8, and declare that"),
        (
            "<?xml version='1.0' encoding='UTF-8'?><a>划痕</a>".encode("gbk"),
            "declares the encoding UTF-8, but is not UTF-8 text; save the file with the encoding UTF-8,"
            " and declare that",
        ),
        (
            '<?xml version="1.0" encoding="gb2312"?><a>划痕</a>'.encode(),
            "declares the encoding gb2312, but is UTF-8 text; declare UTF-8 in its first line, or save it as gb2312",
        ),
        (
            '<?xml version="1.0" encoding="latin-1"?><a>é</a>'.encode(),
            "declares the encoding latin-1, but is UTF-8 text; declare UTF-8 in its first line, or save it as latin-1",
        ),
        (
            b'<?xml version="1.0" encoding="nothing"?><a/>',
            "declares the encoding 'nothing', which is not known; save the file as UTF-8",
        ),
        (
            b'<?xml version="1.0" encoding="rot13"?><a/>',
            "declares the encoding 'rot13', which is not known; save the file as UTF-8",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, content: bytes, error: str) -> None:
    with pytest.raises(ValueError) as raised:
        document(_written(tmp_path, content))
    assert str(raised.value) == error


def test_the_outermost_element(tmp_path: Path) -> None:
    document = b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- <a> -->\n<?style x?>\n<annotations verified="no"><b/>'
    assert outermost(_written(tmp_path, document)) == "annotations"
    assert outermost(_written(tmp_path, b"\0\1\2")) is None
    assert outermost(tmp_path / "gone.xml") is None


def test_blank_lines_before_the_declaration(tmp_path: Path) -> None:
    assert document(_written(tmp_path, b'\n\n<?xml version="1.0" encoding="gb2312"?><annotation/>')).tag == "annotation"
