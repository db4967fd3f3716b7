"""English numbers, amounts, dates, units and abbreviations as words, by rules over inflect's numbers."""

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
    "Lt.": "Lieutenant",
    "Col.": "Colonel",
    "Gen.": "General",
    "Gov.": "Governor",
    "Sen.": "Senator",
    "Rep.": "Representative",
    "Rev.": "Reverend",
    "Mt.": "Mount",
    "vs.": "versus",
    "approx.": "approximately",
    "e.g.": "for example",
    "i.e.": "that is",
    "w/o": "without",
    "w/": "with",
    "and/or": "and or",
    "24/7": "twenty-four seven",
    "9/11": "nine eleven",
    "vs": "versus",
    "a.k.a.": "also known as",
    "aka": "also known as",
    "c/o": "care of",
    "50-50": "fifty fifty",
    "C++": "C plus plus",
    "C#": "C sharp",
    "N/A": "N A",
    "A/C": "A C",
    "Messrs.": "Messers",
}
_WORDS_AT_AN_END = {
    "etc.": "et cetera", "Jr.": "Junior", "Sr.": "Senior", "Ave.": "Avenue", "Blvd.": "Boulevard", "Rd.": "Road", "Inc.": "Incorporated",
    "Ltd.": "Limited", "Corp.": "Corporation", "Bros.": "Brothers", "dept.": "department", "Dept.": "Department",
    "Co.": "Company", "govt.": "government", "Govt.": "Government",
}  # fmt: skip
"""Abbreviations whose full stop may end a sentence too."""
_CURRENCIES = {
    "$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent"), "¥": ("yen", ""), "₹": ("rupee", ""), "₩": ("won", ""),
    "US$": ("US dollar", "cent"), "A$": ("Australian dollar", "cent"), "C$": ("Canadian dollar", "cent"), "USD": ("US dollar", "cent"),
    "HK$": ("Hong Kong dollar", "cent"), "NZ$": ("New Zealand dollar", "cent"), "NT$": ("New Taiwan dollar", "cent"),
    "S$": ("Singapore dollar", "cent"), "R$": ("Brazilian real", ""), "AU$": ("Australian dollar", "cent"),
    "CA$": ("Canadian dollar", "cent"),
    "EUR": ("euro", "cent"), "GBP": ("pound", "penny"), "JPY": ("yen", ""), "CNY": ("yuan", ""), "CHF": ("Swiss franc", ""),
}  # fmt: skip
_SAME_IN_PLURAL = ("yen", "won", "yuan")
_SCALES = {
    "k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million", "bn": "billion", "B": "billion", "b": "billion",
    "tn": "trillion", "T": "trillion",
}  # fmt: skip
_UNITS = {
    "km/h": "kilometers per hour", "mph": "miles per hour", "m/s": "meters per second", "km": "kilometers", "cm": "centimeters",
    "mm": "millimeters", "m": "meters", "kg": "kilograms", "mg": "milligrams", "g": "grams", "lbs": "pounds", "lb": "pounds",
    "oz": "ounces", "ft": "feet", "mi": "miles", "ml": "milliliters", "mL": "milliliters", "L": "liters", "GHz": "gigahertz",
    "MHz": "megahertz", "kHz": "kilohertz", "Hz": "hertz", "TB": "terabytes", "GB": "gigabytes", "MB": "megabytes", "kB": "kilobytes",
    "KB": "kilobytes", "Mbps": "megabits per second", "min": "minutes", "mins": "minutes", "hr": "hours", "hrs": "hours",
    "sec": "seconds", "secs": "seconds", "ms": "milliseconds", "kWh": "kilowatt hours", "kW": "kilowatts", "MW": "megawatts",
    "dB": "decibels", "sqft": "square feet", "sq ft": "square feet", "m²": "square meters", "m2": "square meters",
    "km²": "square kilometers", "km2": "square kilometers", "cm²": "square centimeters", "ft²": "square feet", "m³": "cubic meters",
    "cm³": "cubic centimeters", "°C": "degrees Celsius", "°F": "degrees Fahrenheit", "°": "degrees", "℃": "degrees Celsius",
    "GB/s": "gigabytes per second", "MB/s": "megabytes per second", "kB/s": "kilobytes per second", "KB/s": "kilobytes per second",
    "Gbps": "gigabits per second", "kbps": "kilobits per second", "h": "hours", "V": "volts", "W": "watts", "mAh": "milliamp hours",
    "fps": "frames per second", "bpm": "beats per minute", "rpm": "revolutions per minute", "dpi": "dots per inch", "hp": "horsepower",
    "psi": "pounds per square inch", "µm": "micrometers", "μm": "micrometers", "µg": "micrograms", "μg": "micrograms", "nm": "nanometers",
    "µs": "microseconds", "μs": "microseconds", "mA": "milliamps", "GW": "gigawatts", "kcal": "kilocalories", "kJ": "kilojoules",
    "kPa": "kilopascals", "hPa": "hectopascals", "km³": "cubic kilometers", "dL": "deciliters", "gal": "gallons", "yrs": "years",
    "wks": "weeks", "mos": "months", "mm²": "square millimeters", "mi²": "square miles", "sq mi": "square miles", "sq m": "square meters",
    "℉": "degrees Fahrenheit", "%": "percent", "‰": "per mille", "¢": "cents", "Ω": "ohms", "Ah": "amp hours",
    "Wh": "watt hours", "kV": "kilovolts", "mV": "millivolts",
}  # fmt: skip
_PER = {
    "s²": "second squared", "s2": "second squared", "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour",
    "m³": "cubic meter", "m3": "cubic meter", "m²": "square meter", "m2": "square meter", "cm³": "cubic centimeter",
    "cm3": "cubic centimeter", "km²": "square kilometer", "km": "kilometer", "m": "meter", "kg": "kilogram", "g": "gram", "lb": "pound",
    "L": "liter", "l": "liter", "dL": "deciliter", "mL": "milliliter", "ml": "milliliter", "gal": "gallon", "day": "day", "d": "day",
    "week": "week", "wk": "week", "month": "month", "mo": "month", "year": "year", "yr": "year", "person": "person", "night": "night",
    "hour": "hour", "gallon": "gallon", "mile": "mile", "head": "head", "unit": "unit", "user": "user",
}  # fmt: skip
"""Units behind the stroke of a rate, one of each."""
_TENS = ("", "tens", "twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
_ROMAN = {
    "I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8, "IX": 9, "X": 10, "XI": 11, "XII": 12, "XIII": 13,
    "XIV": 14, "XV": 15, "XVI": 16, "XVII": 17, "XVIII": 18, "XIX": 19, "XX": 20, "XXI": 21, "XXII": 22, "XXIII": 23,
}  # fmt: skip
_SHORT_HEADS = {
    "fig": "figure", "figs": "figures", "vol": "volume", "vols": "volumes", "ch": "chapter", "sec": "section", "eq": "equation",
}  # fmt: skip
_NUMBERED = "World War|Chapter|Part|Act|Volume|Book|Type|Phase|Stage|Episode|Section|Article|Title|Grade|Class|Appendix|Level"
_TITLED = "King|Queen|Pope|Emperor|Empress|Tsar|Prince|Sultan"
_RULERS = "Henry|Louis|George|Edward|Charles|William|Richard|Philip|Francis|Frederick|Napoleon|Elizabeth|Catherine|Benedict|Paul|Pius"
_DAYS = {"Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday", "Thur": "Thursday",
         "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday", "Sun": "Sunday"}  # fmt: skip
_POINTS = {"N": "north", "S": "south", "E": "east", "W": "west"}
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|RI|SC|SD|TN|TX|UT|"
    "VT|VA|WA|WV|WI|WY|DC"
)
_SIGNS = {
    "+": "plus", "=": "equals", "×": "times", "÷": "divided by", "<": "is less than", ">": "is greater than", "≤": "is at most",
    "≥": "is at least", "±": "plus or minus", "^": "to the power of",
}  # fmt: skip
_IN_ADDRESSES = {".": " dot ", "/": " slash ", ":": " colon ", "-": " dash ", "_": " underscore ", "@": " at ", "?": " question mark ",
                 "=": " equals ", "&": " and ", "#": " hash ", "%": " percent ", "+": " plus ", "~": " tilde "}  # fmt: skip
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅕": "1/5"}
_NO_YEAR = "\ue000"
"""Behind a number that is no year: it had thousands separators or counts something. A character for private use."""
_NUMBER = rf"\d+(?:\.\d+)?{_NO_YEAR}?"
_LONGEST_CARDINAL_DIGITS = 15


def cardinal(number: int) -> str:
    """``number`` in words, without "and" and commas: one thousand two hundred thirty-four."""
    return _cardinal(_engine(), number)


@lru_cache(maxsize=4096)
def _cardinal(engine: inflect.engine, number: int) -> str:
    return " ".join(str(engine.number_to_words(str(number), andword="", comma="")).split())


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
    whole, _, fraction = number.rstrip(_NO_YEAR).partition(".")
    one_by_one = len(whole) > _LONGEST_CARDINAL_DIGITS or (len(whole) > 1 and whole[0] == "0")
    spoken = digits(whole) if one_by_one else cardinal(int(whole or "0"))
    return f"{spoken} point {digits(fraction)}" if fraction else spoken


def english_words(text: str) -> str:
    """``text`` with every number of ASCII digits in words, and what ``RULES`` know besides. UserError without inflect."""
    # Digits of every script as ASCII, which is what int and the rules read.
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text.translate(_SUBSCRIPTS) if c != _NO_YEAR)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text.replace(_NO_YEAR, "")


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
    if head in ("square", "cubic", "kilowatt", "watt", "amp"):
        return f"{head} {_one(tail, number)}"
    singular = {"feet": "foot", "inches": "inch"}.get(head, head.removesuffix("s"))
    return f"{singular} {tail}".strip()


_NOUN = re.compile(r" (?!(?:of|by|or|and|to|in|per|each|apart|away|is|was|were|from|for|with|at|on|that|which|if|when)\b)[a-z]")
"""Behind "a 100 W", where the unit has no plural: the article wants a noun."""


def _unit(match: re.Match[str]) -> str:
    if match[2] in ("W", "V") and re.match(r" (?:\d|[A-Z][a-z])", match.string[match.end() :]):
        return match[0]  # a street in the west, a part of a name
    article = re.search(r"(?:\ban?|(?:^|[.!?] )An?) $", match.string[max(0, match.start() - 6) : match.start()])
    before_noun = article and _NOUN.match(match.string, match.end())
    return f"{plain(match[1])} {_one(_UNITS[match[2]], '1' if before_noun else match[1])}"


def _apart(match: re.Match[str]) -> str:
    """A space where ``match`` touches a letter or digit before it, so that words don't run together."""
    return " " if match.string[: match.start()][-1:].isalnum() else ""


def _money(match: re.Match[str]) -> str:
    sign, number = match["sign"], match["number"].rstrip(_NO_YEAR)
    scale = _SCALES.get(match["short"] or "", match["scale"])
    whole, _, fraction = number.partition(".")
    major, minor = _CURRENCIES[sign]
    plural = major if major in _SAME_IN_PLURAL else f"{major}s"
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


def _ruler(match: re.Match[str]) -> str:
    return f"{match[1]} the {ordinal(_ROMAN[match[2]])}" if match[2] in _ROMAN else match[0]


def _roman(match: re.Match[str]) -> str:
    return f"{match[1]} {cardinal(_ROMAN[match[2]])}" if match[2] in _ROMAN else match[0]


def _roman_century(match: re.Match[str]) -> str:
    return ordinal(_ROMAN[match[1]]) if match[1] in _ROMAN else match[0]


def _short_head(match: re.Match[str]) -> str:
    word = _SHORT_HEADS[match[1].lower()]
    return f"{word.capitalize() if match[1][0].isupper() else word} "


def _full_month(match: re.Match[str]) -> str:
    """A short month behind its day."""
    return _SHORT_MONTHS[match[0].rstrip(".")] + (_full_stop(match) if match[0].endswith(".") else "")


def _short_date(match: re.Match[str]) -> str:
    """Month, day and two digits of a year; day and month where the first cannot be a month."""
    return _numeric_date(("19" if int(match[3]) >= 50 else "20") + match[3], match[1], match[2], match[0])


def _season(match: re.Match[str]) -> str:
    """A year and the last two digits of the next one."""
    first, second = int(match[1]), int(match[2])
    if (first + 1) % 100 != second:
        return match[0]
    return _apart(match) + (f"{year(first)} to {year(first + 1)}" if second < 10 else f"{year(first)} {cardinal(second)}")


def _two_days(match: re.Match[str]) -> str:
    """Two days of a month with a stroke, such as those around a night."""
    in_year = f", {_year_or_number(match[4])}" if match[4] else ""
    return f"the {ordinal(int(match[1]))} to {ordinal(int(match[2]))} of {match[3]}{in_year}"


def _two_years(match: re.Match[str]) -> str:
    """Two whole years with a stroke, the later one behind it: a season, or from the one to the other."""
    first, second = int(match[1]), int(match[2])
    return f"{_apart(match)}{year(first)} to {year(second)}" if first < second <= first + 20 else match[0]


def _clock_of_soldiers(hour: str, minute: str) -> str:
    """Four digits in front of "hours" that tell a time."""
    spoken = f"zero {cardinal(int(hour[1]))}" if hour[0] == "0" else cardinal(int(hour))
    return f"{spoken} " + ("hundred" if minute == "00" else f"oh {cardinal(int(minute))}" if minute[0] == "0" else cardinal(int(minute)))


def _soldiers(match: re.Match[str]) -> str:
    return _clock_of_soldiers(match[1] or match[3], match[2] or match[4])


def _stopwatch(match: re.Match[str]) -> str:
    """Minutes, seconds and a fraction of a second."""
    minutes, seconds = str(int(match[1])), f"{int(match[2])}.{match[3]}"
    return f"{plain(minutes)} {_one('minutes', minutes)} {plain(seconds)} seconds"


def _place_on_earth(match: re.Match[str]) -> str:
    """Degrees, minutes and seconds, and the direction."""
    parts = [(part, name) for part, name in zip(match.groups()[:3], ("degrees", "minutes", "seconds"), strict=True) if part]
    if len(parts) == 1 and not match[4]:
        return match[0]
    return " ".join(f"{plain(part)} {_one(name, part)}" for part, name in parts) + (f" {_POINTS[match[4]]}" if match[4] else "")


def _rate(match: re.Match[str]) -> str:
    return f"{plain(match[1])} {_one(_UNITS[match[2]], match[1])} per {_PER[match[3]]}"


def _lines_of_video(match: re.Match[str]) -> str:
    """720p and 1080p: the last two digits by themselves."""
    first, last = divmod(int(match[1]), 100)
    return f"{cardinal(first)} {cardinal(last) if last else 'hundred'} p"


def _raised(match: re.Match[str]) -> str:
    number = unicodedata.normalize("NFKC", match[0]).replace("−", "-")
    known = {"2": " squared", "3": " cubed"}.get(number)
    spoken = known or f" to the power of {'minus ' if number[0] == '-' else ''}{plain(number.lstrip('-+'))}"
    return spoken + (" " if match.string[match.end() : match.end() + 1].isalpha() else "")


def _inches(match: re.Match[str]) -> str:
    """A fraction in front of the sign for inches, which no quotation that is open ends."""
    if match.string[: match.start()].count('"') % 2:
        return match[0]
    return f"{match[1]} {'inches' if ' ' in match[1] else 'inch'}"


def _feet_and_inches(match: re.Match[str]) -> str:
    stop = _full_stop(match) if match[0].endswith(".") else ""
    return f"{plain(match[1])} {_one('feet', match[1])} {plain(match[2])} {_one('inches', match[2])}{stop}"


def _roman_number(numeral: str) -> int:
    """The value of a numeral of M, D, C, L, X, V and I; 0 where it is not written as the Romans' rules have it."""
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    numbers = [values[letter] for letter in numeral]
    total = sum(-one if one < after else one for one, after in zip(numbers, [*numbers[1:], 0], strict=True))
    pairs = (
        *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL")),
        *((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
    )
    left, written = total, ""
    for value, letters in pairs:
        written += letters * (left // value)
        left %= value
    return total if written == numeral else 0


def _roman_year(match: re.Match[str]) -> str:
    number = _roman_number(match[0])
    return year(number) if 1500 <= number <= 2099 else match[0]


def _days(match: re.Match[str]) -> str:
    return f"{match[1]} {ordinal(int(match[2]))} to {ordinal(int(match[3]))}" + (f", {_year_or_number(match[4])}" if match[4] else "")


def _groups(match: re.Match[str]) -> str:
    """Digits in more than two groups: a telephone number, an ISBN."""
    groups = match[0].split("-")
    return (", " if any(len(group) > 1 for group in groups) else " ").join(map(digits, groups))


def _two_numbers(match: re.Match[str]) -> str:
    """Two numbers with a hyphen: a range or score, or the name of a model, such as 747-400 and i7-12700."""
    before, first, second = match.string[: match.start()][-1:], match[1].rstrip(_NO_YEAR), match[2]
    counted = (
        re.match(rf" ?(?:B[. ]?C\.?(?:E\.?)?|{_UNIT}|{_COUNTED})(?!\w)", match.string[match.end() :].lstrip("0123456789,." + _NO_YEAR))
        is not None
    )
    is_model = re.search(r"\b(?:Boeing|Airbus) $", match.string[: match.start()]) is not None
    falling = is_model or (len(first) >= 3 and len(second) >= 3 and float(first) > float(second) and not counted)
    return f"{match[1]}{' ' if before.isalpha() or falling else ' to '}"


def _duration(match: re.Match[str]) -> str:
    parts = [(part, name) for part, name in zip(match.groups(), ("hours", "minutes", "seconds"), strict=True) if part]
    return " ".join(f"{plain(str(int(part)))} {_one(name, str(int(part)))}" for part, name in parts)


def _amounts(match: re.Match[str]) -> str:
    """From one amount of money to another."""
    scale = _SCALES.get(match[5] or "", match[4] or "")
    major = _CURRENCIES[match[1]][0]
    return f"{plain(match[2])} to {plain(match[3])} {scale} ".replace("  ", " ") + (major if major in _SAME_IN_PLURAL else f"{major}s")


def _numeric_date(in_year: str, month: str, day: str, written: str) -> str:
    if int(month) > 12:
        month, day = day, month
    return _date(_MONTHS[int(month) - 1], day, in_year) if 1 <= int(month) <= 12 and 1 <= int(day) <= 31 else written


def _year_or_number(number: str) -> str:
    return year(int(number)) if len(number) == 4 and number.isdigit() and 1100 <= int(number) <= 2099 else plain(number)


def _time(match: re.Match[str]) -> str:
    hour, minute, second, half = int(match[1]), int(match[2]), match[3], (match[4] or "")
    stop = _full_stop(match) if half.endswith(".") else ""
    half = f" {half[0].upper()} M{stop}" if half else ""
    if hour > 24 or minute > 59 or int(second or 0) > 59:
        return " to ".join(cardinal(int(part)) for part in match.groups()[:3] if part) + half
    minutes = "" if minute == 0 else f" oh {cardinal(minute)}" if minute < 10 else f" {cardinal(minute)}"
    if second:
        seconds = f" and {cardinal(int(second))} {'second' if int(second) == 1 else 'seconds'}"
        return f"{cardinal(hour)}{minutes}{seconds}{half}"
    if not minutes and not half:
        minutes = " o'clock" if 1 <= hour <= 12 else " hundred"
    return f"{cardinal(hour)}{minutes}{half}"


def _hour(match: re.Match[str]) -> str:
    return f"{cardinal(int(match[1]))} {match[3][0].upper()} M" + (_full_stop(match) if match[3].endswith(".") else "")


def _version(match: re.Match[str]) -> str:
    before = " " if match.string[match.start() - 1 : match.start()].isalpha() else ""
    return before + " point ".join(plain(part) for part in match[0].split("."))


def _full_stop(match: re.Match[str]) -> str:
    """A full stop where the one of an abbreviation ends the sentence too; the name of a time zone begins none."""
    return "." if re.match(r"\s*$|\s+(?!(?:[A-Z]{1,3}T|UTC)\b)[A-Z“\"]", match.string[match.end() :]) else ""


def _at_an_end(match: re.Match[str]) -> str:
    return _WORDS_AT_AN_END[match[0]] + _full_stop(match)


def _saint_or_street(match: re.Match[str]) -> str:
    named = re.search(r"(?:[A-Z][\w'’]*|\d(?:st|nd|rd|th)) $", match.string[: match.start()])
    followed = re.match(r" [A-Z]", match.string[match.end() :])
    return "Saint" if followed and not named else "Street" + _full_stop(match)


def _letters(match: re.Match[str]) -> str:
    return " ".join(match[0].replace(".", "")).upper() + ("." if match.end() == len(match.string) else "")


def _address(match: re.Match[str]) -> str:
    """A web or mail address as it is spelled out; a name that is no word, such as https, letter by letter."""
    text, stop = (match[0][:-1], match[0][-1]) if match[0][-1] in ".,;:!?)" else (match[0], "")
    text = re.sub(r"^(https?|ftp|www)(?=[:.])", lambda name: " ".join(name[0]), text)
    words = "".join(_IN_ADDRESSES.get(c, c) for c in text).split()
    return " ".join("A" if word == "a" else word for word in words) + stop


def _phone(match: re.Match[str]) -> str:
    groups = [group for group in re.findall(r"\d+", match[0]) if group]
    spoken = ["eight hundred" if group == "800" else digits(group) for group in groups]
    return ("plus " if match[0].startswith("+") else "") + ", ".join(spoken)


def _hundreds(match: re.Match[str]) -> str:
    """The number of a room or flight: one oh one, three seventy."""
    first, rest = match[2][0], int(match[2][1:])
    return f"{match[1]} {cardinal(int(first))} " + ("hundred" if rest == 0 else f"oh {cardinal(rest)}" if rest < 10 else cardinal(rest))


def _thousands(match: re.Match[str]) -> str:
    followed = re.match(r"\.\d|[A-Za-z]", match.string[match.end() :])
    return re.sub(r"[, \u00a0\u202f]", "", match[0]) + ("" if followed else _NO_YEAR)


def _counting(match: re.Match[str]) -> str:
    """Four digits before what they count; "in 1984 people ..." is a year."""
    year_follows = re.search(r"\b(?:[Ii]n|[Ss]ince|[Uu]ntil|[Bb]y) $", match.string[: match.start()])
    return match[0] if year_follows else match[0] + _NO_YEAR


def _fraction(match: re.Match[str]) -> str:
    top, bottom, apart = int(match[1]), int(match[2]), _apart(match)
    if top == bottom:
        return f"{apart}{plain(match[1])} {plain(match[2])}"
    if not 0 < top < bottom <= 100:
        return f"{apart}{plain(match[1])} over {plain(match[2])}"
    name = {2: "half", 4: "quarter"}.get(bottom, ordinal(bottom))
    return f"{apart}{cardinal(top)} {name if top == 1 else 'halves' if bottom == 2 else name + 's'}"


def _decade(match: re.Match[str]) -> str:
    century, ten = match[1], int(match[2])
    if ten == 0:
        return "two thousands" if century == "20" else f"{cardinal(int(century))} hundreds"
    return f"{cardinal(int(century))} {_TENS[ten]}"


def _standalone(match: re.Match[str]) -> str:
    """A number, apart from the letters it touches: B4 is B four, and A4 A-four, whose A is no article."""
    text, (start, end) = match.string, match.span()
    before = " " if start and text[start - 1].isalpha() else ""
    before = "-" if re.search(r"(?<![\w'’])A$", text[max(0, start - 2) : start]) else before
    after = " " if end < len(text) and text[end].isalpha() else ""
    return before + _year_or_number(match[0]) + after


_Replacement = str | Callable[[re.Match[str]], str]
_SCALE = r"(?:\s?(?P<scale>thousand|million|billion|trillion)\b|(?P<short>k|K|mn?|M|bn?|B|tn|T)\b)?"
_CODES = "USD|EUR|GBP|JPY|CNY|CHF"
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_HALF_OF_DAY = r"(?: ?([ap]\.m\.|[ap]m\b|[AP]\.M\.|[AP]M\b))"
_ADDRESS = (
    r"\b(?:https?://|ftp://|www\.)[^\s<>\"]+|\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+|"
    r"\b(?:[a-z\d-]+\.)+(?:com|org|net|edu|gov|io|ai|app|dev|info|co\.uk|ac\.uk|org\.uk)\b(?:/[^\s<>\"]*)?"
)
_PHONE = (
    r"(?<![\w.])\+\d(?:[\d ()-]|\.(?=\d)){6,}\d\b|(?<![\w-])\d{3}-\d{4}\b(?!-)|"
    r"(?<![\w.-])(?:1[-. ])?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}\b(?![-.]\d)|"
    r"(?<![\w.,$£€-])(?<!\d )(?:1 )?\d{3} \d{3} \d{4}\b(?![-.,]?\d| \d)|"
    r"(?<![\w.,$£€-])(?<!\d )\(?0\d{2,4}\)? \d{3,4} ?\d{3,4}\b(?![-.,]?\d| \d)"
)
_COUNTED = (
    "dollars|euros|pounds|people|men|women|children|students|soldiers|members|points|items|votes|steps|miles|meters|metres|kilometers|feet|"
    "times|days|hours|minutes|seconds|years|words|pages|copies|units|calories|tons|acres|degrees|percent|million|billion"
)
"""Nouns that a number of four digits counts when it precedes them: it is no year then."""
_EMERGENCY = (
    rf"(\b(?:[Cc]all|[Dd]iall?|[Pp]hon)(?:s|e|ed|ing)? )911(?![\w%]|[.,:/-]\d| ?(?:{_COUNTED}|{_UNIT})(?!\w))|"
    r"(?<![\w.,:/$£€-])911(?= (?:operators?|dispatchers?|callers?|calls?|emergenc\w+|is the emergency|been called|on the line)\b)|"
    r"^911(?=[.!?]?$)"
)
"""911 where the words around it make it the emergency number; elsewhere it is a number like any other."""
RULES: tuple[tuple[re.Pattern[str], _Replacement], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_ADDRESS, _address),
        (r"(?<=\w)\.(?=(?:js|py|txt|pdf|exe|csv|json|html?|jpe?g|png|gif|mp[34]|wav|zip|docx?|xlsx?|md)\b)", " dot "),
        (r"(?<!\w)\.NET\b", "dot net"),
        (r"(?<![\d.,+])(?<!\d )(?<!\d-)([1-9]\d{0,2}) 000(?![ -]?\d)(?![.,]\d)", r"\g<1>,000"),
        (r"(?<![\d.,'’])\d{1,3}(?:['’\u00a0\u202f]\d{3})+(?![\d'’])", lambda m: re.sub(r"['’\u00a0\u202f]", ",", m[0])),
        (r"([$£€])\.(?=\d)", r"\g<1>0."),
        (r"([$£€])[-−](?=\d)", r"-\1"),
        (r"\bU\.S\. ?(?=\$\d)", "US"),
        (r"([$£€]\d+),(\d\d)(?!\d|,\d)|(?<![\d,.])(\d+),(\d\d)(?= ?€)", lambda m: f"{m[1] or m[3]}.{m[2] or m[4]}"),
        (
            r"(?<![\d.,])\d{1,2}(?:,\d\d)+,\d{3}(?!\d|,\d)|"
            r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)|(?<![\d.,+-])(?<!\d )\d{1,3}(?:[ \u00a0\u202f]\d{3}){2,}(?![\d,]| \d)",
            _thousands,
        ),
        (rf"(?<![\d.,:/-])(\d{{4}})(?= (?:{_COUNTED})\b)", _counting),
        (f"[{''.join(_VULGAR)}]", lambda m: (" " if m.start() and m.string[m.start() - 1].isdigit() else "") + _VULGAR[m[0]]),
        (r"(?<=\b[A-Z][a-z]{2}) Dr\.(?! [A-Z])|(?<=[a-z]{3}) Dr\.(?! [A-Z])", " Drive"),
        (r"(?<![\w.])(?:" + "|".join(map(re.escape, sorted(_WORDS, key=len, reverse=True))) + r")(?![\w/+])", lambda m: _WORDS[m[0]]),
        (r"(?<![\w.])(?:" + "|".join(map(re.escape, _WORDS_AT_AN_END)) + r")(?!\w)", _at_an_end),
        (r"\bSt\.", _saint_or_street),
        (r"(?<=\d(?:st|nd|rd|th) )(St|Ave)\b(?!\.)", lambda m: {"St": "Street", "Ave": "Avenue"}[m[1]]),
        (
            r"\b(Mon|Tues?|Wed|Thu|Thurs?|Fri|Sat|Sun)\.? ?[-–] ?(Mon|Tues?|Wed|Thu|Thurs?|Fri|Sat|Sun)\b\.?(?![-–])",
            lambda m: f"{_DAYS[m[1]]} to {_DAYS[m[2]]}" + (_full_stop(m) if m[0].endswith(".") else ""),
        ),
        (
            rf"\b(Mon|Tues?|Wed|Thu|Thurs?|Fri|Sat(?! \d+ (?:{_COUNTED})\b))\.?(?=,? (?:\d|(?:{'|'.join(_SHORT_MONTHS)})\w*\.? \d))|"
            rf"\b(Sun)\.?(?=,? (?:\d\d?(?:st|nd|rd|th)? )?(?:{'|'.join(_SHORT_MONTHS)}))",
            lambda m: _DAYS[m[1] or m[2]],
        ),
        (
            rf"\b({'|'.join(_SHORT_MONTHS)})\.? ?[-–] ?({'|'.join(_SHORT_MONTHS)})\b\.?(?! ?\d?\d\b)",
            lambda m: f"{_SHORT_MONTHS[m[1]]} to {_SHORT_MONTHS[m[2]]}" + (_full_stop(m) if m[0].endswith(".") else ""),
        ),
        (r"\bca?\. ?(?=\d{3,4}\b)", "circa "),
        (r"(?<=\d(?:st|nd|rd|th) )c\.", lambda m: "century" + ("" if re.match(" (?:BC|AD|CE)", m.string[m.end() :]) else _full_stop(m))),
        (r"\b[Ee]xt\. ?(?=\d)", "extension "),
        (r"(?<!\d)(?<!\d )\b([Mm])in\. ?(?=\d)", r"\1inimum "),
        (r"\b([Mm])ax\. ?(?=\d)", r"\1aximum "),
        (r"\b([Aa])vg\. ?(?=\d)", r"\1verage "),
        (r"\bRs\.? ?(\d[\d,]*(?:\.\d+)?)", r"₹\1"),
        (rf"\b({'|'.join(_SHORT_MONTHS)})\.?(?= \d)", lambda m: _SHORT_MONTHS[m[1]]),
        (r"\bpp\. ?(?=\d)", "pages "),
        (r"\bp\. ?(?=\d)", "page "),
        (r"\b[Nn]os\. ?(?=\d)", "numbers "),
        (r"(?:\b[Nn]o\.|№|#) ?(?=\d)", "number "),
        (r"(?<!\w)#(?=[A-Za-z])", "hashtag "),
        (rf"\b({'|'.join(_SHORT_HEADS)}|{'|'.join(map(str.capitalize, _SHORT_HEADS))})\. ?(?=\d)", _short_head),
        (r"§§ ?(?=\d)", "sections "),
        (r"§ ?(?=\d)", "section "),
        (rf"\b({_NUMBERED}) ([IVX]{{2,5}}|V|X|I(?= (?:of|and|in|is|or|to|error|diabetes)\b|[^\w\s'’-]|\s*$))\b", _roman),
        (r"\b(World War) (I)\b(?!['’])", _roman),
        (rf"\b({_RULERS}|(?:{_TITLED}) [A-Z][a-z]+) ([IVX]{{2,6}}|V|X)\b", _ruler),
        (rf"\b({_RULERS}) (I)(?= (?:of|was|died|ruled|reigned|became)\b|['’]s\b|[.;:)]|\s*$)", _ruler),
        (r"\b([A-Z][a-z]{2,}) ([IVX]{2,5})\b(?! (?:drips?|fluids?|lines?|bags?|access|therapy|antibiotics))", _roman),
        (r"\b([IVX]+)(?= (?:century|centuries)\b)", _roman_century),
        (r"(?<![\w.])(?:[A-Z]\.){2,}(?!\w)|(?<![\w.])Ph\.D\.", _letters),
        (rf"\b({'|'.join(_SHORT_HEADS)}|{'|'.join(map(str.capitalize, _SHORT_HEADS))})\. (?=[IVXLC]+\b)", _short_head),
        (
            r"\b([Vv]olumes?|[Cc]hapter|[Ss]ection|[Ff]igures?|Super Bowl) ([IVXLC]{2,}|[VX])\b(?!['’])",
            lambda m: f"{m[1]} {cardinal(_roman_number(m[2]))}" if _roman_number(m[2]) else m[0],
        ),
        (r"\b(Act|Scene|Canto) ([ivx]+)\b", lambda m: f"{m[1]} {cardinal(_ROMAN[m[2].upper()])}" if m[2].upper() in _ROMAN else m[0]),
        (r"\bM{1,2}[CDMXLVI]{3,}\b", _roman_year),
        (_PHONE, _phone),
        (
            rf"((?:(?<=, )|\A)(?:{_STATES}) )(\d{{5}})(?:-(\d{{4}}))?\b(?![,.]?\d)",
            lambda m: m[1] + ", ".join(digits(part) for part in m.groups()[1:] if part),
        ),
        (r"(\d{4})-(\d\d)-(\d\d)T(?=\d\d:\d\d)", lambda m: _numeric_date(m[1], m[2], m[3], m[0]) + " at "),
        (
            rf"(?<!\w)(0\d)([0-5]\d){_NO_YEAR}?(?= (?:hours|hrs)\b)|"
            rf"(?<=\b[Aa]t )([01]\d|2[0-3])([0-5]\d){_NO_YEAR}?(?= (?:hours|hrs)\b)",
            _soldiers,
        ),
        (r"(?<![\d:])(\d\d?):(\d\d)\.(\d{1,3})(?![\d:.])", _stopwatch),
        (r"(?<![\w.-])1-(\d)00-(?=[A-Z]{3,}\b)", lambda m: f"one {cardinal(int(m[1]))} hundred "),
        (r"(?<=\bISBN )\d{9,13}X?\b|(?<=\bISBN: )\d{9,13}X?\b", lambda m: digits(m[0].rstrip("X")) + (" X" if m[0][-1] == "X" else "")),
        (_EMERGENCY, lambda m: f"{m[1] or ''}nine one one"),
        (r"(?<=\b[Cc]all )(?:\d{3})\b(?![-,.:%]?\d)|(?<=\b[Dd]ial )(?:\d{3})\b", lambda m: digits(m[0])),
        (r"\b([Rr]oom|[Ff]light|[Hh]ighway|[Ss]uite) (\d{3})\b", _hundreds),
        (r"\b(\d\d?)\.(\d\d?)\.(\d{4})\b", lambda m: _numeric_date(m[3], m[2], m[1], m[0])),
        (r"(?<![\d.])\d+(?:\.\d+){2,}\b", _version),
        (r"\b(\d{4})-(\d\d)-(\d\d)\b", lambda m: _numeric_date(m[1], m[2], m[3], m[0])),
        (r"\b(\d\d?)/(\d\d?)/(\d{4})\b", lambda m: _numeric_date(m[3], m[1], m[2], m[0])),
        (r"\b(\d{4})/(\d\d?)/(\d\d?)\b(?!/)", lambda m: _numeric_date(m[1], m[2], m[3], m[0])),
        (r"(?<![\w/.])(\d\d?)/(\d\d?)/(\d\d)\b(?![/\d])", _short_date),
        (r"(?<![\d/.])(?<![a-z])((?:1[5-9]|20)\d\d)/((?:1[5-9]|20)\d\d)\b(?![/\d-])", _two_years),
        (r"(?<![\d/.])(?<![a-z])((?:19|20)\d\d)[/–](\d\d)\b(?![/\d-])", _season),
        (r"(?<!\d)(\d+)/(\d+)(?=(?: out of \d+)? stars?\b)", r"\1 out of \2"),
        (r"(?<=\brated )(\d+)/(\d+)\b|(?<=\bscored )(\d+)/(\d+)\b", lambda m: f"{m[1] or m[3]} out of {m[2] or m[4]}"),
        (r"(?<![\d/])(\d+)/(\d+)(?:rd|th|nd)s?\b", _fraction),
        (r"(?<![\w.,:/$£€-])\d+(?:-\d+){2,}(?![\w-])", _groups),
        (rf"(?<=\b\d )({'|'.join(_SHORT_MONTHS)})\b\.?|(?<=\b[123]\d )({'|'.join(_SHORT_MONTHS)})\b\.?", _full_month),
        (rf"\b({_MONTH}) (\d\d?)(?:st|nd|rd|th)? ?[-–] ?(\d\d?)(?:st|nd|rd|th)?\b(?![:%/-])(?:,? (\d{{4}})\b)?", _days),
        (
            rf"\b(\d\d?)(?:st|nd|rd|th)? ?[-–] ?(\d\d?)(?:st|nd|rd|th)? ({_MONTH})\b",
            lambda m: f"the {ordinal(int(m[1]))} to {ordinal(int(m[2]))} of {m[3]}",
        ),
        (rf"(?<![\d/])(\d\d?)/(\d\d?) ({_MONTH})(?:,? (\d{{4}}))?\b", _two_days),
        (rf"\b(\d\d?) ?[-–] ?(?={_MONTH}\b)", r"\1 to "),
        (rf"\b({_MONTH}) (\d\d?)(?:st|nd|rd|th)?(?:,? (\d{{4}}))?\b(?![:%])", lambda m: _date(m[1], m[2], m[3])),
        (rf"\b(\d\d?)(?:st|nd|rd|th)? ({_MONTH})(?:,? (\d{{4}}))?\b", _day_first),
        (r"(?<![/\d])(0\d)/(\d\d)\b(?!/)|(?<![/\d])(\d\d)/(0\d)\b(?!/)", lambda m: _numeric_date("", m[1] or m[3], m[2] or m[4], m[0])),
        (r"\b([Tt]he) the\b", r"\1"),
        (r"([ap]m|[AP]M|[ap]\.m\.|[AP]\.M\.|:\d\d) ?[-–] ?(?=\d\d?(?::\d\d| ?[AaPp]\.?[Mm]))", r"\1 to "),
        (r"\b(\d\d?) ?[-–] ?(?=\d\d?(?::\d\d)? ?(?:[ap]m|[AP]M|[ap]\.m\.|[AP]\.M\.))", r"\1 to "),
        (rf"(?<![\d:])(\d\d?):(\d\d)(?::(\d\d))?{_HALF_OF_DAY}?(?![:\d])", _time),
        (rf"(?<![\d.,:$£€-])(1[0-2]|0?[1-9])\.([0-5]\d)(){_HALF_OF_DAY}", _time),
        (rf"\b(\d\d?)(){_HALF_OF_DAY}", _hour),
        (r"(?<![\w.])([ap])\.m\.", lambda m: f"{m[1].upper()} M" + _full_stop(m)),
        (r"(?<![\d:])(\d+):(\d+)(?![\d:])", lambda m: f"{m[1]} to {m[2]}"),
        (r"\b1000s\b", "thousands"),
        (r"\b(\d{4}) ?[-–] ?(?=\d{4}s\b)", r"\1 to "),
        (r"\b(1\d|20)(\d)0['’]?s\b", _decade),
        (r"\b100s\b", "hundreds"),
        (r"(?<![\w.])(\d+) ?h ?(\d\d?) ?(?:m|min)(?: ?(\d\d?) ?s)?\b", _duration),
        (r"(?<![\w.])()(\d+) ?m ?(\d\d?) ?s\b", _duration),
        (r"(?<!\w)['’]?([1-9])0['’]?s\b", lambda m: _TENS[int(m[1])]),
        (
            rf"([$£€])({_NUMBER}) ?[-–] ?\1?({_NUMBER})(?:\s?(thousand|million|billion|trillion)\b|(k|K|mn?|M|bn?|B|tn|T)\b)?(?!\d)",
            _amounts,
        ),
        (r"(?<![\w)%$£€])[-−](?=[$£€¥₹₩]\d)", "minus "),
        (
            rf"(?P<sign>(?:\b(?:US|AU?|CA?|HK|NZ|NT|R|S))?\$|[£€¥₹₩]|\b(?:{_CODES})(?= ?\d)) ?(?P<number>{_NUMBER}){_SCALE}",
            lambda m: _apart(m) + _money(m) + (" " if m.string[m.end() : m.end() + 1].isalnum() else ""),
        ),
        (rf"\b(?P<number>{_NUMBER})(?P<scale>)(?P<short>)\s?(?P<sign>[$£€¥₹₩]|(?:{_CODES})\b)", _money),
        (r"¢(\d+)", r"\1 cents"),
        (r"(?<![\w.,£])(?!(?:240|360|480|576|720)p)(\d{1,3})p\b", lambda m: f"{plain(m[1])} {'penny' if m[1] == '1' else 'pence'}"),
        (r"(?<![\w.,])(\d{3,4})p\b", _lines_of_video),
        (r"(?<![\w°'])([2-8])['′](\d|1[01])(?![\w'\"′″])", lambda m: f"{plain(m[1])} feet {plain(m[2])}"),
        (rf"(?<!\d)({_NUMBER})°(?: ?(\d+)['′](?: ?(\d+(?:\.\d+)?)[\"″])?)? ?([NSEW])?(?!\w)", _place_on_earth),
        (r"(?<![°\d])(\d+)(?:['′]| ?ft\.?) ?(\d+)(?:[\"″]| ?in\b\.?)", _feet_and_inches),
        (r"(?<![\w.])(\d{1,2}(?:\.\d+)?) ?s\b", lambda m: f"{plain(m[1])} {_one('seconds', m[1])}"),
        (rf"(?<!\d)({_NUMBER}) ?(%|°C|°F|°|℃|℉) ?[-–] ?(?={_NUMBER} ?\2)", r"\1 to "),
        (rf"(?<=[\d{_NO_YEAR}]) ?[-−–] ?(?=\d+(?:\.\d+)? ?=)|(?<=\d) ?− ?(?=\d)|(?<=\b[a-z]) [-−] (?=\d)", " minus "),
        (rf"(?<![\d.])(?<!\d-)({_NUMBER}) ?[-–] ?(?=(\d+(?:\.\d+)?))", _two_numbers),
        (r"(?<![\w)%])[-−](?=\.?\d)", "minus "),
        (r"(?<=\d)(?<!\b0)x(?=\d)|(?<=\d{3})×(?=\d{3})", " by "),
        (r"(?<=\d) x (?=\d)", " by "),
        (r"[~≈] ?(?=\d)", "about "),
        (r"√ ?(?=\d)", "the square root of "),
        (r"(?<=\d)(?:bn|tn)\b|(?<=\d )(?:bn|tn)\b", lambda m: (" " if m.string[m.start() - 1] != " " else "") + _SCALES[m[0]]),
        (r"(?<=\d)(?<!\b3)M(?= [a-z]{3})", " million"),
        (r"(?<![\w)])([+±]) ?(?=\d)", lambda m: f"{_SIGNS[m[1]]} "),
        (
            r"(?:(?<=\s)|(?<=\()|\A)([<>≤≥])(?=\d)",
            lambda m: {"<": "less than", ">": "more than", "≤": "at most", "≥": "at least"}[m[1]] + " ",
        ),
        (r"(?<=[\dKkM])\+(?!\w)|(?<=\b[A-F])\+(?!\w)", " plus"),
        (r"(\b(?:\d+ )?\d+/\d+)[\"″](?!\w)", _inches),
        (rf"(?<![\d.])({_NUMBER}) ?({_UNIT})/({'|'.join(sorted(map(re.escape, _PER), key=len, reverse=True))})(?![\w/])", _rate),
        (rf"(?<![\d.])({_NUMBER}) ?({_UNIT})(?![\w°])(?!\.\w)", _unit),
        (r"(?<=\d)(?= (?:1/[234]|2/3|3/4)(?![\d/]))", " and"),
        (r"(?<![\d/])(\d+)/(\d+)(?![\d/])", _fraction),
        (r"(?<=\d)[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+|(?<=\b[a-zA-Z])[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+|(?<=\b[a-z]{2}|[²³][a-z])[²³]+", _raised),
        (r"\b(\d+)(?:st|nd|rd|th)(?:-(?=\w))?(?!\w)", lambda m: ordinal(int(m[1])) + (" " if m[0].endswith("-") else "")),
        (r"(?<=\w) ?([+=×÷^<>≤≥±]) ?(?=[\w.])", lambda m: f" {_SIGNS[m[1]]} "),
        (r"(?<!\w)([+±]) ?(?=\d)", lambda m: f"{_SIGNS[m[1]]} "),
        (r"(?<=\d)x(?!\w)", " times"),
        (r"(?<=[a-z])/(?:h|hr|hour)\b", " an hour"),
        (r"(?<=[a-z\d])/(day|week|wk|month|mo|year|yr|person|night|kg|lb|gallon|mile|head|user)\b", lambda m: f" a {_PER[m[1]]}"),
        (r"(?<=[A-Za-z])/(?=[A-Za-z])", " slash "),
        (r"(?<=\w) ?& ?(?=\w)", " and "),
        (r"(?<!\w)@(?=\w)", "at "),
        (r"(?<=\w)@(?=\w)", " at "),
        (r"(?<![\w.])\.(\d+)", lambda m: f"point {digits(m[1])}"),
        (_NUMBER, _standalone),
    )
)
