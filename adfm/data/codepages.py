"""Guess the code page of a zip's file names that do not say which one they are in.

Such a zip holds names in whatever code page its writer's Windows had, all in the same one. Each candidate gets the
probability of the text that it makes of the names, by a small model of how names in its language are spelt.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

_SAMPLE = 2000  # distinct names whose probability is computed
_CLEARLY = math.log(20)  # ahead of the second, as a likelihood ratio
_PLAUSIBLE = math.log(1e-3)  # a byte, on average
_RARE = math.log(1e-6)

# Characters that Chinese names of pictures, products and defects are mostly made of, and the commonest of the language.
_CHINESE = frozenset(
    "零部件产品图像片照相机号线左右上下前后正反侧面表内外边角圆方孔槽轴承齿轮螺丝钉母栓垫圈壳盖板管阀芯片电路焊点接头端子"
    "瓶罐盒袋箱金属铁钢铜铝塑料玻璃陶瓷橡胶布料木材皮革纸划痕伤裂纹缝凹坑凸起压印污渍脏斑色差毛刺缺陷口损破变形异物气泡砂眼锈蚀烧穿漏"
    "虚偏移错位断少多余合格不良品好坏常训练测试验证数据集样本标注签分类检质量批次工厂车间生产日期年月周第一二三四五六七八九十"
    "百千万大小中高低长短宽厚薄新旧原始备份副本文件夹目录资料未命名截屏幕微信的是在有人这个了我们来到时要就出会也你对可以他"
    "她说发成过地得行动和自己家作为学国经本去者能同道手点进着等其实现种从所使明体事情化加重级平定开关系度水力用法理心间应无"
    "再最主当天政四全公司北京上海广州深圳江苏浙山东南西湖河红黄蓝绿白黑灰深浅亮暗光滑粗糙设计结果报告统计表单组员名称编号图"
)


def decoder(names: Iterable[bytes]) -> tuple[str, str]:
    """Guess the encoding of the names of one archive that are not ASCII; return the codec and an example of a name.

    Raises:
        ValueError: No encoding is plausible, or several are; the message has a name as they read it.
    """
    distinct = sorted(set(names), key=lambda name: (len(name), name))
    example = distinct[0]
    readings: dict[str, tuple[float, str]] = {}  # by the text: code pages that read the same do not compete
    for codec, share, likelihood_of in _PAGES:
        try:
            texts = [name.decode(codec) for name in distinct]
        except UnicodeDecodeError:
            continue
        size = sum(byte > 127 for name in distinct[:_SAMPLE] for byte in name)
        likelihood = sum(map(likelihood_of, texts[:_SAMPLE]))
        text, total = "\n".join(texts), math.log(share) + likelihood
        if likelihood / size > _PLAUSIBLE and total > readings.get(text, (-math.inf, ""))[0]:
            readings[text] = total, codec
    ranked = sorted(readings.values(), reverse=True)
    if not ranked:
        raise ValueError(f"the name {example.decode('latin-1')!r} is in an encoding that adfm does not recognise")
    close = [codec for total, codec in ranked if ranked[0][0] - total < _CLEARLY]
    if len(close) > 1:
        raise ValueError("a name is " + " or ".join(f"{example.decode(codec)!r} in {codec}" for codec in close))
    return close[0], example.decode(close[0])


def _double(weigh: Callable[[str], float], text: str) -> float:
    """Return the log-likelihood of a text, from that of each of its characters that is not ASCII."""
    total = 0.0
    for before, char in pairwise(f" {text}"):
        total += weigh(char) if ord(char) > 127 else 0.0
        # Such characters rarely stand within a Latin word.
        if before.isascii() != char.isascii() and (before if before.isascii() else char).islower():
            total -= math.log(20)
    return total


def _wide_mark(char: str) -> float:
    # A digit or a punctuation mark of the width of a Chinese character.
    is_mark = unicodedata.east_asian_width(char) in "FW" and unicodedata.category(char)[0] in "PN"
    return math.log(0.04 / 40) if is_mark else _RARE - 2


def _gbk(char: str) -> float:
    if char in _CHINESE:
        return math.log(0.7 / len(_CHINESE))
    code = char.encode("cp936")
    if len(code) == 2 and code[1] >= 0xA1:
        if 0xB0 <= code[0] <= 0xD7:  # the 3,755 characters of everyday use
            return math.log(0.25 / 3755)
        if 0xD8 <= code[0] <= 0xF7:
            return math.log(0.01 / 3008)
        return _wide_mark(char)
    return _RARE - 2


def _big5(char: str) -> float:
    code = char.encode("cp950")
    if len(code) == 2 and b"\xa4\x40" <= code <= b"\xc6\x7e":
        return math.log(0.9 / 5401)
    return _wide_mark(char)


def _japanese(char: str) -> float:
    if "ぁ" <= char <= "ん" or "ァ" <= char <= "ヶ" or char == "ー":
        return math.log(0.5 / 170)
    code = char.encode("cp932")
    if len(code) == 2 and b"\x88\x9f" <= code <= b"\x98\x72":
        return math.log(0.45 / 2965)
    return _wide_mark(char)


# How often the parts of a Korean syllable occur, in thousandths, in the order of Unicode.
_INITIAL = (130, 12, 80, 90, 10, 70, 60, 55, 3, 110, 5, 215, 100, 4, 35, 12, 22, 22, 75)
_VOWEL = (190, 40, 8, 1, 100, 45, 55, 8, 95, 30, 5, 12, 18, 75, 8, 3, 12, 10, 95, 18, 165)
_KOREAN = frozenset("제품부정상불량결함검사이미지사진폴더새파일스크래치균열긁힘찍데터시험학습훈련전후좌우면")
_FINAL = {0: 500, 1: 70, 4: 150, 8: 85, 16: 45, 17: 25, 19: 25, 20: 20, 21: 85}


def _korean(char: str) -> float:
    syllable = ord(char) - 0xAC00
    if not 0 <= syllable < 11172:
        return _RARE - 2
    parts = _INITIAL[syllable // 588], _VOWEL[syllable // 28 % 21], _FINAL.get(syllable % 28, 1)
    common = math.log(0.3 / len(_KOREAN)) if char in _KOREAN else -math.inf
    return max(common, sum(math.log(part / 1000) for part in parts))


def _alphabet(letters: str, text: str) -> float:
    """Return the log-likelihood of a text in an alphabet beyond ASCII, by where its letters stand and their case."""
    total = 0.0
    for before, char in pairwise(f" {unicodedata.normalize('NFC', text)}"):
        if ord(char) < 128:
            mixed = letters is _CYRILLIC and char.isalpha() and before in letters
            total += _RARE if mixed else 0.0
        elif char not in letters:
            total += _RARE if char not in "º°ª²³µ№«»" else math.log(1e-4)
        elif char.isupper() and before.islower():
            total += math.log(1e-4)
        elif letters is _CYRILLIC:
            total += _RARE if before.isascii() and before.isalpha() else math.log(1 / 40)
        else:  # accents stand between plain letters
            usual = 1 / 400 if char in _UNUSUAL else 1 / 40
            total += math.log(usual if before.isascii() else 1e-4)
        if ord(before) > 127 and before.islower() and char.isascii() and char.isupper():
            total += math.log(1e-4)
    return total


_CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯёЁ"
_LATIN = "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßœšžÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝŒŠŽ"
_UNUSUAL = "ÿòìùîûâôëïýšžœÀÁÂÃÆÈÊËÌÍÎÏÒÓÔÕÙÚÛÝŠŽŒĚ"  # in names, or at their beginning
_CENTRAL = "ąćęłńóśźżĄĆĘŁŃÓŚŹŻáčďéěíňóřšťúůýžÁČĎÉĚÍŇÓŘŠŤÚŮÝŽöüőűÖÜŐŰäÄßâăîșțşţ"


def _utf8(text: str) -> float:
    # Three bytes and more are hardly valid by chance; two may be, as those of one Chinese character are.
    if any(ord(char) > 0x7FF for char in text):
        return 0.0
    return max(_alphabet(letters, text) for letters in (_CYRILLIC, _LATIN, _CENTRAL))


# The codec, the share of archives that are in it, and the function of the log-likelihood of a name.
_PAGES: tuple[tuple[str, float, Callable[[str], float]], ...] = (
    ("utf-8", 0.5, _utf8),
    ("cp936", 0.2, partial(_double, _gbk)),
    ("cp437", 0.1, partial(_alphabet, _LATIN)),
    ("cp850", 0.05, partial(_alphabet, _LATIN)),
    ("cp852", 0.02, partial(_alphabet, _CENTRAL)),
    ("cp1252", 0.01, partial(_alphabet, _LATIN)),
    ("cp866", 0.05, partial(_alphabet, _CYRILLIC)),
    ("cp1251", 0.01, partial(_alphabet, _CYRILLIC)),
    ("cp932", 0.05, partial(_double, _japanese)),
    ("cp949", 0.05, partial(_double, _korean)),
    ("cp950", 0.02, partial(_double, _big5)),
)
