"""The texts of the synthetic corpus: WordNet's usage examples, and frequent words alone. See README.md beside this file.

    python recipes/nano/texts.py --out runs/nano/synthetic/texts.jsonl

Reads Debian's package wordnet-base, which apt-get fetches unless --debs has it. One JSON line an item, in the order in which they are to
be spoken: {"id", "text"}. The same texts in the same order every time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from debian import download_packages, find_packages, read_package

from kalle.data.corpus.splits import normalised
from kalle.errors import UserError
from kalle.files import write_atomic

PACKAGE = "wordnet-base"
DATA_FILES = tuple(f"usr/share/wordnet/data.{part}" for part in ("noun", "verb", "adj", "adv"))
COUNTS_FILE = "usr/share/wordnet/cntlist.rev"
QUOTED = re.compile(r'"([^"]+)"')
SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,;:'!?.-]*")
"""Digits and abbreviations with signs are read in more than one way, and the text must be what is heard."""
SENTENCE_CHARACTERS = range(18, 111)
MIN_SENTENCE_WORDS = 3
FREQUENT_WORDS = 1500
WORD_EVERY = 12
"""One word alone comes after so many sentences, so that every prefix of the list has both."""
AS_WRITTEN_SHARE = 0.15
"""WordNet writes examples in lower case without a full stop; so many stay as they are, the others become sentences."""
COUNTED = (
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
)


def share(key: str) -> float:
    """A number in [0, 1) that follows from ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def sentences(package: dict[str, bytes]) -> list[str]:
    """Distinct quoted examples that read aloud in one way, shuffled."""
    found: dict[str, str] = {}
    for name in DATA_FILES:
        for line in package[name].decode("utf-8", "replace").splitlines():
            for quoted in QUOTED.findall(line.partition("|")[2]):
                text = " ".join(quoted.split()).rstrip(" ,;:-")
                if len(text) in SENTENCE_CHARACTERS and SPEAKABLE.fullmatch(text) and len(text.split()) >= MIN_SENTENCE_WORDS:
                    found.setdefault(normalised(text), text)
    return [found[key] for key in sorted(found, key=share)]


def words(package: dict[str, bytes]) -> list[str]:
    """The most frequent lemmas of WordNet's tagged texts, and numbers, days and greetings, shuffled."""
    counts: dict[str, int] = {}
    for line in package[COUNTS_FILE].decode("ascii", "replace").splitlines():
        sense, _, count = line.split()
        lemma = sense.partition("%")[0]
        if lemma.isalpha() and len(lemma) > 1:
            counts[lemma] = counts.get(lemma, 0) + int(count)
    frequent = sorted(counts, key=lambda lemma: (-counts[lemma], lemma))[:FREQUENT_WORDS]
    return sorted({*frequent, *COUNTED}, key=share)


def as_sentence(text: str) -> str:
    """A capital in front and a full stop behind, for most texts."""
    if share(f"as written: {text}") < AS_WRITTEN_SHARE:
        return text
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def items(package: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """All texts in order, a word among every `WORD_EVERY` sentences."""
    alone = words(package)
    for index, sentence in enumerate(sentences(package)):
        yield {"id": f"s{index:05d}", "text": as_sentence(sentence)}
        number, rest = divmod(index, WORD_EVERY)
        if rest == 0 and number < len(alone):
            yield {"id": f"w{number:05d}", "text": as_sentence(alone[number])}


def run(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help=f"a folder that holds {PACKAGE}_VERSION_all.deb")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            archive = (find_packages(given.debs, [PACKAGE]) if given.debs else download_packages(Path(folder), [PACKAGE]))[0]
            lines = [json.dumps(item) + "\n" for item in items(read_package(archive))]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(given.out, "".join(lines))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{len(lines)} texts: {given.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run())
