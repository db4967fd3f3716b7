"""Numbers, amounts, dates, units and abbreviations as words: English by `kalle.text.english`, Chinese by wetext."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kalle.errors import UserError
from kalle.extras import install_command
from kalle.text.english import english_words
from kalle.text.languages import detect_language

if TYPE_CHECKING:
    from wetext import Normalizer

LANGUAGES = ("en", "zh")
_LONGEST_PIECE = 500
"""Characters that are read at once; the rules look ahead, so their time grows with its square."""
_WIDE = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B), 0xFF05)}
_HANDLED = frozenset("°℃℉½¼¾€£¥×÷−–²³")
"""Characters beyond ASCII that may vanish because words stand in their place."""
_ONE_BY_ONE = str.maketrans("0123456789", "零幺二三四五六七八九")
_YEARS = str.maketrans("0123456789", "零一二三四五六七八九")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CHINESE_UNITS = {
    **{"mAh": "毫安时", "kWh": "千瓦时", "GHz": "吉赫兹", "MHz": "兆赫兹", "kHz": "千赫兹", "Hz": "赫兹", "kW": "千瓦", "V": "伏"},
    **{"dB": "分贝", "fps": "帧每秒", "㎡": "平方米", "㎥": "立方米"},
}
_CHINESE_MONEY = {"$": "美元", "€": "欧元", "£": "英镑", "¥": "元", "￥": "元"}
_CHINESE_PHONE = re.compile(
    r"(?<![\w.-])(?:\+86[- ]?)?(?:1\d{2}[- ]?\d{4}[- ]?\d{4}|\(?0\d{2,3}[-)]\d{3,4}[- ]?\d{4}|[48]00-?\d{3}-?\d{4})(?![\d.-])"
)
_CHINESE_SIGNS = {"≥": "大于等于", "≤": "小于等于", "±": "正负", "÷": "除以", "〇": "零"}
_CHINESE_VULGAR = {"½": "二分之一", "¼": "四分之一", "¾": "四分之三", "⅓": "三分之一", "⅔": "三分之二"}
_TWO_OF = "倍次克米吨层台种间栋套份件点个只条张本位家辆岁周块人元"
"""Measure words before which 2 is 两."""


def _one_by_one(match: re.Match[str]) -> str:
    return match[0].translate(_ONE_BY_ONE)


def _as_year(match: re.Match[str]) -> str:
    """Years digit by digit, a stroke or hyphen between them as "to"."""
    return re.sub("[-/–—~～]", "到", match[0]).translate(_YEARS)


def _unit_of(match: re.Match[str]) -> str:
    number, unit = match[1], _CHINESE_UNITS[match[2]]
    return f"{_counted(number) if number.isdigit() else number}{unit}"


def _memorable(match: re.Match[str]) -> str:
    """A date that has become a name: 9.11 digit by digit, 5.1 and 10.1 as numbers."""
    digits = re.sub("[.·]", "", match[0])
    return {"101": "十一"}.get(digits, digits.translate(_YEARS))


def _circled(match: re.Match[str]) -> str:
    return "、".join(str(int(unicodedata.numeric(character))) for character in match[0])


def _chinese_version(match: re.Match[str]) -> str:
    """1.2.3 number by number, but a date, whose year comes first."""
    parts = match[1].split(".")
    if len(parts) == 3 and len(parts[0]) == 4:
        return match[0]
    return "点".join(map(_counted, parts))


def _counted(number: str) -> str:
    """A whole number as a count, where wetext alone would read a known telephone number, such as 120."""
    return "二" if number == "2" else str(_wetext().normalize(f"{number}个")).removesuffix("个")


_CHINESE_RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[A-Za-z\d._+-]+@[A-Za-z\d-]+(?:\.[A-Za-z\d-]+)+", lambda match: re.sub(r"\d", _one_by_one, match[0])),
        (r"(?<![\d.])\d{17}[\dXx](?![\d.])|(?<![\d.])\d{16,19}(?![\d.])", _one_by_one),
        (r"(?<=邮编|密码|口令|账号|卡号|尾号|工号|学号)[是为:： ]{0,2}\d+", _one_by_one),
        (r"(?<=邮政编码|验证码是|验证码为|身份证号)[:： ]{0,2}\d+|(?<=验证码)[:： ]{0,2}\d+", _one_by_one),
        (r"(?<=QQ|微信)号?[是为:： ]{0,2}\d{5,}|(?<=手机号|电话号)码?[是为:： ]{0,2}\d{5,}", _one_by_one),
        (r"(?<![A-Za-z])[GDCZTKSY]\d{1,4}(?=次)|(?<![A-Za-z\d])(?:[A-Z]{2}|\d[A-Z]|[A-Z]\d)\d{3,4}(?=次?航班)", _one_by_one),
        (r"(?<![\d.])\d{3,4}(?=室|号房)", _one_by_one),
        (r"(?<!\d)9[.·]?11(?=事件|恐)|(?<!\d)3[.·]?15(?=晚会)|(?<!\d)[51]0?[.·]1(?=假期|黄金周|长假)", _memorable),
        (
            r"(?<!\d)(?:985|211)(?=高校|大学|院校|工程|、985|、211|和)|(?<!\d)618(?=大促|购物|活动|年中)",
            lambda match: match[0].translate(_YEARS),
        ),
        (r"(?<![\d.])(?:[5-9]\d|0\d|[12][05])后(?![面来天年续半])", lambda match: match[0].translate(_YEARS)),
        (r"(?<!\d)(?:19|20)\d\d[-/–~～](?:(?:19|20)\d\d|\d\d)(?=赛季|学年|财年|年度)", _as_year),
        (r"(?<!\d)(?:1[5-9]|20)\d\d/(?:1[5-9]|20)\d\d(?![\d/])", _as_year),
        (r"(?<=[(（])1\d{3}[-–—~～](?:1\d{3}|20\d\d)(?=[)）])|(?<=[(（])20\d\d[-–—~～]20\d\d(?=[)）])", _as_year),
        (r"([$€£¥￥]) ?(\d+(?:\.\d+)?) ?([万亿]+)", lambda match: match[2] + match[3] + _CHINESE_MONEY[match[1]]),
        (rf"(?<![\d.])(\d+(?:\.\d+)?) ?({'|'.join(_CHINESE_UNITS)})(?![A-Za-z])", _unit_of),
        (r"(\d+)次/(天|日|周|月|年|小时|分钟|分|秒)", r"每\2\1次"),
        (r"(?<=[A-Za-z])\+(?=\d)", "加"),
        (r"√ ?(?=\d)", "根号"),
        (r"≈ ?(?=\d)", "约"),
        (r"(?<=\d)²(?!\w)|(?<=(?<![A-Za-z])[A-Zabcnxyz])²", "的平方"),
        (r"(?<=\d)³(?!\w)|(?<=(?<![A-Za-z])[A-Zabcnxyz])³", "的立方"),
        (r"[①-⑳]+", _circled),
        (f"[{''.join(_CHINESE_VULGAR)}]", lambda match: _CHINESE_VULGAR[match[0]]),
        (f"[{''.join(_CHINESE_SIGNS)}]", lambda match: _CHINESE_SIGNS[match[0]]),
        (r"(?<![\w/])24/7(?![\w/])", "二十四七"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"HK\$ ?(\d+(?:\.\d+)?)", r"\1港元"),
        (r"(?<![A-Za-z\d.])[vV]?(\d+(?:\.\d+){2,})(?![\d.]|-)", _chinese_version),
        (r"(\d+)[vV](\d+)(?!\w)", r"\1对\2"),
        (r"(\d{2,3})/(\d{2,3}) ?mm ?Hg", lambda match: f"{_counted(match[1])}到{_counted(match[2])}毫米汞柱"),
        (r"(?<=血压)([是为:： ]{0,2})(\d{2,3})/(\d{2,3})(?!\d)", lambda match: f"{match[1]}{_counted(match[2])}到{_counted(match[3])}"),
        (r"(?<=比分)([是为:： ]{0,2}\d+)[-–:：](?=\d)", r"\1比"),
        (r"(?<=\d)[-−](?=\d+(?:\.\d+)?=)", "减"),
        (r"(?<=[歼轰运直风征旗舟])-(?=\d)", ""),
        (r"第2(?![\d.])", "第二"),
        (r"7×24小时", "七乘二十四小时"),
        (r"(?<=[点时半日月年号])[-–~～](?=\d{1,4}[点时日月年号])", "到"),
        (r"−(?=\d)", "-"),
        ("￥", "¥"),
        (r"(?<=[A-Za-z])-(?=\d)", ""),
        (r"(?<!\d)(19|20)(\d0)s(?![A-Za-z])", lambda match: f"{int(match[1]) + 1}世纪{match[2]}年代"),
        (r"(\d+(?:\.\d+)?)%?[-–~～](\d+(?:\.\d+)?)%", r"\1%到\2%"),
        (_CHINESE_PHONE.pattern, lambda match: re.sub("[- ()]", "", match[0]).replace("+", "加").translate(_ONE_BY_ONE)),
        (r"(?<![\d.:：/-])(\d{1,4})[-–~～](?=\d{1,4}(?![\d:：/-]))", r"\1到"),
        (r"(?<![\d.第])2(?=日|月|单元)", "二"),
        (rf"(?<![\d.第])2(?=[{_TWO_OF}]|公[斤里]|年(?![代级]))", "两"),
    )
)
"""Readings that wetext gets wrong."""
_QUOTES = re.compile(r"([\"\\]+)")
"""wetext puts a backslash before these."""


@dataclass(frozen=True)
class Normalised:
    """A text as it is to be spoken."""

    text: str
    warnings: tuple[str, ...] = ()
    """Text that was left as written, and the reason, one line each."""


def normalise(text: str, language: str | None = None) -> Normalised:
    """``text`` with numbers, amounts, dates, units and common abbreviations in words; runs of space become one space.

    ``language`` is "en" or "zh", by default guessed from the script; a text in any other is left as written, with a warning.
    Numeric dates are read month first in English. What the rules don't know, such as emoji and other scripts, stays as written;
    a number that stays is in the warnings. UserError without the library of the language.
    """
    language = language or detect_language(text)
    line = " ".join(text.split())
    if language not in LANGUAGES:
        return Normalised(line, (f"not normalised: no rules for language '{language}', only for {' and '.join(LANGUAGES)}",))
    read = english_words if language == "en" else _chinese_words
    spoken = " ".join("".join(read(piece) for piece in _pieces(line.translate(_WIDE))).split())
    left = sorted({character for character in spoken if unicodedata.category(character) in ("Nd", "No", "Nl")})
    return Normalised(spoken, (f"left as written: {' '.join(left)}",) if left else ())


def _pieces(line: str) -> Iterator[str]:
    while len(line) > _LONGEST_PIECE:
        cut = line.rfind(" ", 1, _LONGEST_PIECE)
        cut = _LONGEST_PIECE if cut < 0 else cut
        yield line[:cut]
        line = line[cut:]
    yield line


def _chinese_words(text: str) -> str:
    text = text.translate(_SUBSCRIPTS)
    for pattern, replacement in _CHINESE_RULES:
        text = pattern.sub(replacement, text)
    pieces = _QUOTES.split(text)
    pieces[::2] = [_read_chinese(piece) for piece in pieces[::2]]
    return "".join(pieces)


def _read_chinese(piece: str) -> str:
    core = piece.strip()
    if not core:
        return piece
    before, after = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
    normalizer = _wetext()
    try:
        spoken = str(normalizer.normalize(core))
    except Exception as error:  # the library asserts on what its grammar does not know
        logging.getLogger(__name__).warning("left as written, for wetext cannot read it (%s): %s", type(error).__name__, core)
        spoken = core
    return before + (core if _lost(core, spoken) else spoken) + after


@lru_cache(maxsize=1)
def _wetext() -> Normalizer:
    try:
        from wetext import Normalizer
    except ImportError:
        raise UserError(
            f"Chinese text normalisation needs wetext, which is not installed: run {install_command('text')}, or leave normalisation out"
        ) from None
    return Normalizer(lang="zh")


def _lost(before: str, after: str) -> bool:
    """Whether a letter or a symbol beyond ASCII went missing."""
    missing = Counter(before) - Counter(after)
    return any(c not in _HANDLED and not c.isascii() and unicodedata.category(c)[0] in "LMS" for c in missing)
