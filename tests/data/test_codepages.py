# ruff: noqa: RUF001
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adfm.data import codepages

NAMES = {
    "cp936": [
        "零件1.png",
        "图.png",
        "划痕",
        "图像/正常/001.png",
        "产品A-缺陷.json",
        "裂纹",
        "凹坑",
        "电路板检测",
        "钢板",
    ],
    "cp437": ["café.png", "Prüfung/Maß_01.png", "für", "año.png", "pièce défectueuse", "Größe", "Übergang", "schräg"],
    "cp850": ["São Paulo", "peça não", "Área", "coração"],
    "cp852": ["pęknięcie", "škrábanec", "Łódź"],
    "cp1252": ["café.png", "Prüfung", "für"],
    "cp866": ["деталь1.png", "щель.png", "Трещина", "год", "новая папка"],
    "cp1251": ["деталь1.png", "Трещина", "новая папка"],
    "cp932": ["部品1.png", "キズ", "ひび割れ", "検査データ", "正常"],
    "cp949": ["부품1.png", "스크래치", "불량", "정상", "새 폴더"],
    "cp950": ["零件1.png", "刮痕", "正常", "圖片", "裂紋"],
    "utf-8": ["零件", "café.png", "cafe\u0301", "деталь", "ß.png", "łódź"],
}


@pytest.mark.parametrize(("codec", "name"), [(codec, name) for codec, names in NAMES.items() for name in names])
def test_a_single_name_is_read_right(codec: str, name: str) -> None:
    assert codepages.decoder([name.encode(codec)])[1] == name


@pytest.mark.parametrize("codec", NAMES)
def test_all_names_of_an_archive_are_in_one_code_page(codec: str) -> None:
    assert codepages.decoder([name.encode(codec) for name in NAMES[codec]])[0] == codec


@pytest.mark.parametrize("codec", ["cp936", "cp437", "cp850", "cp866", "cp932", "cp949", "utf-8"])
@given(data=st.data())
def test_some_names_of_a_language_are_never_read_wrong(codec: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES[codec]), min_size=1))
    try:
        decoder, _ = codepages.decoder([name.encode(codec) for name in names])
    except ValueError as error:
        assert "a name is" in str(error)
    else:
        assert [name.encode(codec).decode(decoder) for name in names] == names


def test_names_that_may_be_in_several_code_pages_are_refused_with_the_choice() -> None:
    with pytest.raises(ValueError, match=r"a name is 'é.png' in cp437 or 'В.png' in cp866"):
        codepages.decoder(["é.png".encode("cp437")])


@given(names=st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: not name.isascii()), min_size=1))
def test_any_bytes_are_read_or_refused(names: list[bytes]) -> None:
    try:
        codec, example = codepages.decoder(names)
    except ValueError as error:
        assert "a name is" in str(error) or "does not recognise" in str(error)
    else:
        assert example in [name.decode(codec) for name in names]
