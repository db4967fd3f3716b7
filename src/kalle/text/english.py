"""English numbers, amounts, dates, units and common abbreviations in words; the numbers themselves come from inflect."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from kalle.errors import UserError
from kalle.extras import install_command

if TYPE_CHECKING:
    import inflect

_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
_MONTH = "|".join(_MONTHS)
_SHORT_MONTHS = {month[:3]: month for month in _MONTHS} | {"Sept": "September"}
_WORDS = {
    "Dr.": "Doctor",
    "Mr.": "Mister",
    "Mrs.": "Missus",
    "Ms.": "Miz",
    "Prof.": "Professor",
    "Capt.": "Captain",
    "Sgt.": "Sergeant",
    "Rev.": "Reverend",
    "vs.": "versus",
    "approx.": "approximately",
    "e.g.": "for example",
    "i.e.": "that is",
    "24/7": "twenty-four seven",
}
_CURRENCIES = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent"), "¥": ("yen", "")}
_UNITS = {
    "km/h": "kilometers per hour", "mph": "miles per hour", "km": "kilometers", "cm": "centimeters", "mm": "millimeters", "m": "meters",
    "kg": "kilograms", "mg": "milligrams", "g": "grams", "lbs": "pounds", "lb": "pounds", "oz": "ounces", "ft": "feet", "mi": "miles",
    "ml": "milliliters", "GHz": "gigahertz", "MHz": "megahertz", "kHz": "kilohertz", "Hz": "hertz", "TB": "terabytes", "GB": "gigabytes",
    "MB": "megabytes", "kB": "kilobytes", "KB": "kilobytes", "min": "minutes", "°C": "degrees Celsius", "°F": "degrees Fahrenheit",
    "°": "degrees", "℃": "degrees Celsius", "℉": "degrees Fahrenheit", "%": "percent", "‰": "per mille",
}  # fmt: skip
_TENS = ("", "tens", "twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
_ROMAN = {"II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9, "X": 10, "XI": 11, "XII": 12}
_VULGAR = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_NUMBER = r"\d+(?:\.\d+)?"
_LONGEST_CARDINAL_DIGITS = 15


def cardinal(number: int) -> str:
    """``number`` in words, without "and" and commas: one thousand two hundred thirty-four."""
    return " ".join(str(_engine().number_to_words(str(number), andword="", comma="")).split())


def ordinal(number: int) -> str:
    """``number`` as a rank: twenty-first."""
    return " ".join(str(_engine().number_to_words(_engine().ordinal(str(number)), andword="", comma="")).split())


def year(number: int) -> str:
    """A year of four digits as it is said: nineteen oh five, two thousand five, twenty twenty-four."""
    century, rest = divmod(number, 100)
    if century % 10 == 0 and rest < 10:
        return cardinal(number)
    return f"{cardinal(century)} " + ("hundred" if rest == 0 else f"oh {cardinal(rest)}" if rest < 10 else cardinal(rest))


def digits(number: str) -> str:
    """Digit by digit."""
    return " ".join(cardinal(int(digit)) for digit in number)


def plain(number: str) -> str:
    """A number without sign or separators: a decimal digit by digit after its point, a leading zero or too many digits digit by digit."""
    whole, _, fraction = number.partition(".")
    one_by_one = len(whole) > _LONGEST_CARDINAL_DIGITS or (len(whole) > 1 and whole[0] == "0")
    spoken = digits(whole) if one_by_one else cardinal(int(whole or "0"))
    return f"{spoken} point {digits(fraction)}" if fraction else spoken


def english_words(text: str) -> str:
    """``text`` with every number of ASCII digits in words, and what ``RULES`` know besides. UserError without inflect."""
    # Digits of every script as ASCII, which is what int and the rules read.
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text


@lru_cache(maxsize=1)
def _engine() -> inflect.engine:
    try:
        import inflect
    except ImportError:
        raise UserError(
            f"English text normalisation needs inflect, which is not installed: run {install_command('text')}, or leave normalisation out"
        ) from None
    return inflect.engine()


def _one(words: str, number: str) -> str:
    """A plural unit in the singular where ``number`` is 1."""
    if number != "1" or words in ("percent", "per mille") or words.endswith("hertz"):
        return words
    head, _, tail = words.partition(" ")
    singular = {"feet": "foot", "inches": "inch"}.get(head, head.removesuffix("s"))
    return f"{singular} {tail}".strip()


def _unit(match: re.Match[str]) -> str:
    return f"{plain(match[1])} {_one(_UNITS[match[2]], match[1])}"


def _money(match: re.Match[str]) -> str:
    sign, number, scale = match["sign"], match["number"], match["scale"]
    whole, _, fraction = number.partition(".")
    major, minor = _CURRENCIES[sign]
    plural = major if sign == "¥" else f"{major}s"
    if scale:
        return f"{plain(number)} {scale} {plural}"
    if len(fraction) != 2 or not minor:
        return f"{plain(number)} {major if number == '1' else plural}"
    amount = f"{plain(whole)} {major if whole == '1' else plural}"
    if fraction == "00":
        return amount
    small = f"{cardinal(int(fraction))} {minor if fraction == '01' else {'penny': 'pence'}.get(minor, 'cents')}"
    return small if whole == "0" else f"{amount} and {small}"


def _date(month: str, day: str, in_year: str | None) -> str:
    return f"{month} {ordinal(int(day))}" + (f", {_year_or_number(in_year)}" if in_year else "")


def _day_first(match: re.Match[str]) -> str:
    in_year = f", {_year_or_number(match[3])}" if match[3] else ""
    return f"the {ordinal(int(match[1]))} of {match[2]}{in_year}"


def _roman(match: re.Match[str]) -> str:
    return f"{match[1]} {cardinal(_ROMAN[match[2]])}" if match[2] in _ROMAN else match[0]


def _numeric_date(in_year: str, month: str, day: str, written: str) -> str:
    return _date(_MONTHS[int(month) - 1], day, in_year) if 1 <= int(month) <= 12 and 1 <= int(day) <= 31 else written


def _year_or_number(number: str) -> str:
    return year(int(number)) if len(number) == 4 and number.isdigit() and 1100 <= int(number) <= 2099 else plain(number)


def _time(match: re.Match[str]) -> str:
    hour, minute, half = int(match[1]), int(match[2]), (match[3] or "")
    if hour > 24 or minute > 59:
        return f"{cardinal(hour)} to {cardinal(minute)}" + (f" {half}" if half else "")
    if half:
        tail = "" if minute == 0 else f" oh {cardinal(minute)}" if minute < 10 else f" {cardinal(minute)}"
        return f"{cardinal(hour)}{tail} {half[0].upper()} M"
    tail = (
        "o'clock"
        if minute == 0 and 1 <= hour <= 12
        else "hundred"
        if minute == 0
        else f"oh {cardinal(minute)}"
        if minute < 10
        else cardinal(minute)
    )
    return f"{cardinal(hour)} {tail}"


def _fraction(match: re.Match[str]) -> str:
    top, bottom = int(match[1]), int(match[2])
    if not 0 < top < bottom <= 100:
        return f"{plain(match[1])} over {plain(match[2])}"
    name = {2: "half", 4: "quarter"}.get(bottom, ordinal(bottom))
    return f"{cardinal(top)} {name if top == 1 else 'halves' if bottom == 2 else name + 's'}"


def _decade(match: re.Match[str]) -> str:
    century, ten = match[1], int(match[2])
    if ten == 0:
        return "two thousands" if century == "20" else f"{cardinal(int(century))} hundreds"
    return f"{cardinal(int(century))} {_TENS[ten]}"


def _spaced(match: re.Match[str]) -> str:
    return ("plus " if match[0].startswith("+") else "") + ", ".join(digits(group) for group in re.findall(r"\d+", match[0]))


def _standalone(match: re.Match[str]) -> str:
    """A number, apart from the letters it touches: A4 is A four."""
    text, (start, end) = match.string, match.span()
    before = " " if start and text[start - 1].isalpha() else ""
    after = " " if end < len(text) and text[end].isalpha() else ""
    return before + _year_or_number(match[0]) + after


_Replacement = str | Callable[[re.Match[str]], str]
_SCALE = r"(?:\s?(?P<scale>thousand|million|billion|trillion)\b)?"
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
RULES: tuple[tuple[re.Pattern[str], _Replacement], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (f"[{''.join(_VULGAR)}]", lambda m: (" " if m.start() and m.string[m.start() - 1].isdigit() else "") + _VULGAR[m[0]]),
        (r"(?<![\w.])(?:" + "|".join(map(re.escape, _WORDS)) + r")(?!\w)", lambda m: _WORDS[m[0]]),
        (r"\betc\.(?=\s+[A-Z]|$)", "et cetera."),
        (r"\betc\.", "et cetera"),
        (rf"\b({'|'.join(_SHORT_MONTHS)})\.?(?= \d)", lambda m: _SHORT_MONTHS[m[1]]),
        (r"(?:\b[Nn]o\.|№|#) ?(?=\d)", "number "),
        (r"\b(World War|Chapter|Part|Act|Volume|Book) ([IVX]{2,4}|V|X)\b", _roman),
        (r"(?<![\w.])\+\d[\d -]{6,}\d\b|(?<![\w-])\d{3}-\d{3}-\d{4}\b|(?<![\w-])\d{3}-\d{4}\b(?!-)", _spaced),
        (r"\b\d+(?:\.\d+){2,}\b", lambda m: " point ".join(plain(part) for part in m[0].split("."))),
        (r"\b(\d{4})-(\d\d)-(\d\d)\b", lambda m: _numeric_date(m[1], m[2], m[3], m[0])),
        (r"\b(\d\d?)/(\d\d?)/(\d{4})\b", lambda m: _numeric_date(m[3], m[1], m[2], m[0])),
        (rf"\b({_MONTH}) (\d\d?)(?:st|nd|rd|th)?(?:,? (\d{{4}}))?\b(?![:%])", lambda m: _date(m[1], m[2], m[3])),
        (rf"\b(\d\d?)(?:st|nd|rd|th)? ({_MONTH})(?:,? (\d{{4}}))?\b", _day_first),
        (r"\bthe the\b", "the"),
        (r"\b(\d\d?):(\d\d)(?: ?([ap])\.?m\b\.?)?(?![:\d])", _time),
        (r"\b(\d\d?) ?([ap])\.?m\b\.?(?=$|\W)", lambda m: f"{cardinal(int(m[1]))} {m[2].upper()} M"),
        (r"\b(1\d|20)(\d)0s\b", _decade),
        (r"(?<!\w)['’]?([1-9])0s\b", lambda m: _TENS[int(m[1])]),
        (r"([$£€])(\d+) ?[-–] ?\1?(\d+)\b", lambda m: f"{plain(m[2])} to {plain(m[3])} {_CURRENCIES[m[1]][0]}s"),
        (rf"(?P<sign>[$£€¥]) ?(?P<number>{_NUMBER}){_SCALE}", _money),
        (rf"\b(?P<number>{_NUMBER})(?P<scale>)\s?(?P<sign>[$£€¥])", _money),
        (r"(\d+)(?:['′]| ?ft\.?) ?(\d+)(?:[\"″]| ?in\b\.?(?= ))", lambda m: f"{plain(m[1])} feet {plain(m[2])} inches"),
        (r"(?<=\d) ?[-–] ?(?=\d)", " to "),
        (r"(?<![\w)])[-−](?=\d)", "minus "),
        (r"[~≈] ?(?=\d)", "about "),
        (rf"({_NUMBER}) ?({_UNIT})(?![\w°])(?!\.\w)", _unit),
        (r"(?<=\d)(?= (?:1/[234]|2/3|3/4)(?![\d/]))", " and"),
        (r"(?<![\d/])(\d+)/(\d+)(?![\d/])", _fraction),
        (r"\b(\d+)(?:st|nd|rd|th)(?:-(?=\w))?(?!\w)", lambda m: ordinal(int(m[1])) + (" " if m[0].endswith("-") else "")),
        (r"(?<=\d) ?([+=×]) ?(?=\d)", lambda m: {"+": " plus ", "=": " equals ", "×": " times "}[m[1]]),
        (r"(?<=\w) ?& ?(?=\w)", " and "),
        (r"(?<=\w)@(?=\w)", " at "),
        (_NUMBER, _standalone),
    )
)  # fmt: skip
