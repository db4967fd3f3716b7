"""The texts that the synthetic voices speak, and the ones kept for tests. See README.md beside this file.

    python recipes/nano/texts.py --out runs/nano/texts

Writes OUT/train.jsonl and OUT/test.jsonl, one {"id", "text", "source"} a line in the order in which they are to be spoken, and
OUT/report.json.
The packages come from apt-get and npm unless --packages has them; one that is gone is reported, and the others are used.
The same packages give the same texts in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from packages import fetch_debian, fetch_npm, read_debian
from sources import SOURCES, Files, Source, read_tarball, wordnet_words

from kalle.errors import UserError
from kalle.text.normalise import normalise

logger = logging.getLogger("texts")
TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", " ": " ", "…": "..."})
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
TITLE_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Col|Capt|Gen|Gov|Hon|Rev|No|Vol|viz|etc)|\b[A-Z])\.$")
SPEAKABLE = re.compile(r"[A-Za-z\"'(][A-Za-z0-9 ,;:'\"!?.()$%—-]*[A-Za-z.!?\"')]")
UNCLEAR = re.compile(r"\.\S|\b[IVXLC]{2,}\b|\b[A-Z]{2,}\b|--|\bsic\b|[a-z][A-Z]|\d[A-Za-z]|\b(?:etc|viz|i\.e|e\.g)\b")
"""Abbreviations with inner points, Roman numerals, headings in capitals and slips, which can be read in more than one way."""
CHARACTERS = range(12, 331)
MIN_WORDS = 3
MAX_WORDS = 60
USUAL_CHARACTERS = 60
"""Longer sentences come later in the order, the more so the longer they are."""
FREQUENT_WORDS = 1500
WORD_EVERY = 25
"""One word alone comes after so many sentences, so that every prefix of the list has both."""
AS_WRITTEN_SHARE = 0.1
"""WordNet writes examples in lower case without a full stop; so many stay as they are, the others become sentences."""
TEST_SENTENCES = 200
TEST_CHARACTERS = range(25, 121)
TEST_WORDS = range(4, 25)
COUNTED = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
    "hundred",
    "thousand",
    "million",
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
    "yes",
    "no",
    "hello",
    "goodbye",
    "please",
    "thanks",
    "sorry",
    "okay",
]


def share(key: str) -> float:
    """A number in [0, 1) that follows from ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def key_of(text: str) -> str:
    """``text`` without capitals and punctuation: texts of one key are the same to the ear."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def split_sentences(paragraph: str) -> Iterator[str]:
    """The sentences of a paragraph; none ends with a title or an initial."""
    start = 0
    for match in SENTENCE_END.finditer(paragraph):
        sentence = paragraph[start : match.end()].strip()
        if not TITLE_END.search(sentence):
            yield sentence
            start = match.end()
    yield paragraph[start:].strip()


def clean(text: str) -> str | None:
    """``text`` as it is to be spoken, numbers in words; None if it can be read aloud in more than one way or is too long or too short."""
    line = " ".join(text.translate(TYPOGRAPHY).replace("--", "—").split())
    line = re.sub(r"\s*—\s*", " — ", line).strip(" —-")
    if line.count('"') % 2 or line.count("(") != line.count(")"):
        line = line.replace('"', "").replace("(", "").replace(")", "").strip()
    if len(line) not in CHARACTERS or not SPEAKABLE.fullmatch(line) or UNCLEAR.search(line.replace(" — ", " ")):
        return None
    if any(character.isdigit() or character in "$%" for character in line):
        line = normalise(line, "en").text
        if any(character.isdigit() for character in line):
            return None
    return line if MIN_WORDS <= len(line.split()) <= MAX_WORDS else None


def as_sentence(text: str) -> str:
    """A capital in front and a full stop behind, for most texts."""
    if share(f"as written: {text}") < AS_WRITTEN_SHARE:
        return text
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?\"'" else ".")


def sentences_of(source: Source, files: Files) -> Iterator[str]:
    """Clean sentences of a source, in its own order."""
    for paragraph in source.paragraphs(files):
        if source.name == "wordnet":
            text = clean(paragraph.rstrip(" ,;:-"))
            if text:
                yield as_sentence(text)
        else:
            for sentence in split_sentences(paragraph):
                text = clean(sentence)
                if text and text[-1] in ".!?\"'" and text.lstrip("\"'(")[:1].isupper():
                    yield text


def in_order(texts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Distinct (source, text) pairs, shuffled, long sentences later."""
    found: dict[str, tuple[str, str]] = {}
    for source, text in texts:
        found.setdefault(key_of(text), (source, text))

    def place(key: str) -> float:
        return (share(key) + 0.02) * max(1.0, len(found[key][1]) / USUAL_CHARACTERS)

    return [found[key] for key in sorted(found, key=place)]


def divide(texts: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, test): `TEST_SENTENCES` of every source alike, chosen by their words, and the rest."""
    fit = [pair for pair in texts if len(pair[1]) in TEST_CHARACTERS and len(pair[1].split()) in TEST_WORDS]
    by_source: dict[str, list[tuple[str, str]]] = {}
    for pair in sorted(fit, key=lambda pair: share(f"test: {key_of(pair[1])}")):
        by_source.setdefault(pair[0], []).append(pair)
    test: list[tuple[str, str]] = []
    while len(test) < TEST_SENTENCES and any(by_source.values()):
        test += [pairs.pop(0) for pairs in by_source.values() if pairs]
    test = test[:TEST_SENTENCES]
    return [pair for pair in texts if pair not in set(test)], test


def with_words(texts: list[tuple[str, str]], words: list[str]) -> Iterator[tuple[str, str]]:
    """``texts`` with one of ``words`` after every `WORD_EVERY` of them."""
    for index, pair in enumerate(texts):
        yield pair
        number, rest = divmod(index + 1, WORD_EVERY)
        if rest == 0 and number <= len(words):
            yield ("word", as_sentence(words[number - 1]))


def write_list(path: Path, texts: Iterable[tuple[str, str]], prefix: str) -> None:
    """One JSON line a text."""
    lines = [json.dumps({"id": f"{prefix}{index:06d}", "text": text, "source": source}) for index, (source, text) in enumerate(texts)]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def read_source(source: Source, packages: Path) -> Files | None:
    """The files of a source's package; None, with a warning, when it cannot be had."""
    try:
        if source.registry == "npm":
            return read_tarball(fetch_npm(source.package, packages))
        return read_debian(fetch_debian(source.package, packages))
    except UserError as error:
        logger.warning("texts: %s is left out: %s", source.name, error)
        return None


def make_texts(out: Path, packages: Path) -> dict[str, dict[str, int]]:
    """Write both lists and the report, which is returned: sentences of each source."""
    found: list[tuple[str, str]] = []
    words = list(COUNTED)
    for source in SOURCES:
        files = read_source(source, packages)
        if files is None:
            continue
        found += [(source.name, text) for text in sentences_of(source, files)]
        if source.name == "wordnet":
            words = sorted({*words, *wordnet_words(files, FREQUENT_WORDS)}, key=share)
    if not found:
        raise UserError("texts: got no package, expected at least one; see the warnings above")
    train, test = divide(in_order(found))
    out.mkdir(parents=True, exist_ok=True)
    write_list(out / "train.jsonl", with_words(train, words), "s")
    write_list(out / "test.jsonl", test, "t")
    report = {"train": dict(Counter(source for source, _ in train)), "test": dict(Counter(source for source, _ in test))}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="folder of the packages, filled if need be; by default OUT/packages")
    given = parser.parse_args(arguments)
    try:
        report = make_texts(given.out, given.packages or given.out / "packages")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{sum(report['train'].values())} texts to train on, {sum(report['test'].values())} to test: {given.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run())
